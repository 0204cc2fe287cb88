"""From the losses of tokens to one number: four means that published codes use under one name."""

from jaxtyping import Bool, Float
from torch import Tensor

from isopo_mini import checks, precision

AGGREGATES = ("token-mean", "sequence-mean", "sequence-sum", "constant")


def aggregate_tokens(
    values: Float[Tensor, "S T"], mask: Bool[Tensor, "S T"], aggregate: str, max_length: int | None = None
) -> Float[Tensor, ""]:
    """One number from one number a token. With T = 1 all four are the mean over sequences.

    - `"token-mean"`: Σ/Σm. Every token weighs the same, so a long answer weighs more (DAPO; verl's default).
    - `"sequence-mean"`: mean over sequences of the mean over their tokens. Every answer weighs the same, so a long
      answer's tokens weigh less (GRPO).
    - `"sequence-sum"`: mean over sequences of the sum over their tokens: the policy gradient of whole sequences.
    - `"constant"`: Σ/(S · L). Proportional to `"sequence-sum"`, at the scale of a mean over tokens (Dr. GRPO).

    Args:
        values: one a token, `(S, T)`. What padding holds is never looked at.
        mask: True where a token counts, `(S, T)`.
        aggregate: which mean.
        max_length: L of `"constant"`, the longest answer that is allowed; T when None. Not used by the others.

    Returns:
        A scalar, in at least single precision.

    Raises:
        ValueError: `aggregate` is unknown, shapes disagree, `max_length` is below 1, or a sequence has no token.

    Example:
        >>> import torch
        >>> values, mask = torch.ones(2, 4), torch.tensor([[True, True, False, False], [True, True, True, True]])
        >>> [aggregate_tokens(values, mask, name).item() for name in AGGREGATES]
        [1.0, 1.0, 3.0, 0.75]
    """
    checks.require_choice("aggregate", aggregate, AGGREGATES)
    checks.require_shape("mask", mask, "S T", checks.require_shape("values", values, "S T"))
    if max_length is not None:
        checks.require_at_least("max_length", max_length, 1)
    sequences, positions = mask.shape
    lengths = mask.sum(dim=1)
    if (lengths == 0).any():
        raise ValueError(
            f"mask: expected at least one True a sequence, got none in sequence {int((lengths == 0).nonzero()[0])}"
        )
    sums = precision.at_least_float32(values).masked_fill(~mask, 0.0).sum(dim=1)  # (S,)
    if aggregate == "token-mean":
        return sums.sum() / lengths.sum()
    if aggregate == "sequence-mean":
        return (sums / lengths).mean()
    if aggregate == "sequence-sum":
        return sums.mean()
    return sums.sum() / (sequences * (positions if max_length is None else max_length))
