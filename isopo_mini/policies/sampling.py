"""What sampling tokens needs beside the model: the record it returns, its checks, the temperature."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from isopo_mini import checks
from isopo_mini.batch import Batch
from isopo_mini.precision import at_least_float32


@dataclass(frozen=True, eq=False)
class Sampled:
    """What `CausalTransformer.sample` drew: all of a `Batch` but the rewards.

    Row s holds prompt, response, padding. `actions[s, t]` is the token that follows `observations[s, t]`.
    `mask` is True where it belongs to the response, the end token included; `log_probs` is 0 elsewhere.
    """

    observations: Int[Tensor, "S T"]
    actions: Int[Tensor, "S T"]
    mask: Bool[Tensor, "S T"]
    log_probs: Float[Tensor, "S T"]

    def responses(self) -> list[Tensor]:
        """The drawn tokens of each row, without prompt and padding, the end token included."""
        return [actions[mask] for actions, mask in zip(self.actions, self.mask, strict=True)]

    def with_rewards(self, rewards: Tensor, groups: Tensor | None = None) -> Batch:
        """The `Batch` of these sequences and their rewards, `(S,)` or `(S, T)`."""
        return Batch(self.observations, self.actions, self.mask, rewards, self.log_probs, groups)


def tempered_log_probs(logits: Float[Tensor, "... A"], temperature: float) -> Float[Tensor, "... A"]:
    """log softmax(logits / temperature); at temperature 0 its limit, all mass on the largest logit.

    Returns:
        `(..., A)`, in at least single precision.

    Raises:
        ValueError: the temperature is negative or not finite.
    """
    checks.require_at_least("temperature", temperature, 0)
    logits = at_least_float32(logits)
    if temperature == 0:
        return torch.zeros_like(logits).scatter(-1, logits.argmax(-1, keepdim=True), 1.0).log()
    # Measured from the largest, so that a division by a tiny temperature overflows to −∞ only.
    return ((logits - logits.amax(dim=-1, keepdim=True)) / temperature).log_softmax(dim=-1)


def check_prompts(
    prompts: Tensor, prompt_lengths: Tensor | None, vocabulary_size: int, weight: Tensor
) -> Int[Tensor, "S"]:
    """Check prompts `(S, P)` for a policy with this vocabulary, on the device of `weight`.

    Returns:
        The prompt lengths `(S,)`: those given, or P for all.

    Raises:
        TypeError: prompts or lengths are no int64 tensors.
        ValueError: a shape, device, length or token is wrong. What lies behind a prompt is not looked at.
    """
    sizes = checks.require_shape("prompts", prompts, "S P")
    checks.require_integer("prompts", prompts)
    checks.require_not_empty("prompts", prompts)
    checks.require_same_device("prompts", prompts, "the policy", weight)
    lengths = torch.full_like(prompts[:, 0], sizes["P"]) if prompt_lengths is None else prompt_lengths
    checks.require_shape("prompt_lengths", lengths, "S", sizes)
    checks.require_integer("prompt_lengths", lengths)
    checks.require_same_device("prompt_lengths", lengths, "the policy", weight)
    if lengths.min() < 1 or lengths.max() > sizes["P"]:
        raise ValueError(f"prompt_lengths: expected 1 to P={sizes['P']}, got {lengths.tolist()}")
    tokens = prompts[torch.arange(sizes["P"], device=prompts.device) < lengths[:, None]]
    if tokens.min() < 0 or tokens.max() >= vocabulary_size:
        raise ValueError(
            f"prompts: expected tokens from 0 to {vocabulary_size - 1}, "
            f"got values from {int(tokens.min())} to {int(tokens.max())}"
        )
    return lengths
