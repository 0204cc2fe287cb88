"""What every loss of `losses` does before its formula and after it: check the arguments, report metrics."""

import torch
from torch import Tensor

from isopo_mini import checks, precision
from isopo_mini.objectives import kl


def prepared(
    log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, mask: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The checked arguments, 0 at padding so that nothing there can spread; advantages as `(S, T)`.

    All in at least single precision: 1 + 4e-4, a ratio that `gspo` clips, is 1 in bfloat16.
    """
    sizes = checks.require_shape("log_probs", log_probs, "S T")
    checks.require_not_empty("log_probs", log_probs)
    checks.require_shape("mask", mask, "S T", sizes)
    if mask.dtype != torch.bool:
        raise TypeError(f"mask: expected a bool tensor, got {mask.dtype}")
    if not isinstance(advantages, Tensor) or advantages.ndim not in (1, 2):
        got = tuple(advantages.shape) if isinstance(advantages, Tensor) else type(advantages).__name__
        raise ValueError(f"advantages: expected shape (S) or (S T), got {got}")
    checks.require_shape("advantages", advantages, "S" if advantages.ndim == 1 else "S T", sizes)
    checks.require_shape("old_log_probs", old_log_probs, "S T", sizes)
    values = {
        "log_probs": log_probs,
        "old_log_probs": old_log_probs.detach(),
        "advantages": advantages.detach() if advantages.ndim == 2 else advantages.detach()[:, None].expand(mask.shape),
    }
    for name, value in values.items():
        checks.require_floating(name, value)
        checks.require_same_device(name, value, "mask", mask)
        values[name] = precision.at_least_float32(value).masked_fill(~mask, 0.0)
        checks.require_finite(name, values[name])
    return values["log_probs"], values["old_log_probs"], values["advantages"]


@torch.no_grad()
def metrics(log_probs: Tensor, old_log_probs: Tensor, mask: Tensor, clipped: Tensor) -> dict[str, float]:
    """What every loss reports; see the head of `losses`.

    In double precision, where the ratio of a token that a clip has dealt with still has a value.
    """
    current, old = log_probs[mask][None].double(), old_log_probs[mask][None].double()  # (1, real tokens)
    # The actions are π_old's, so π_old is the first policy of this divergence.
    means = [(current - old).exp().mean(), clipped[mask].double().mean(), kl.estimate(old, current).mean()]
    ratio_mean, clip_fraction, kl_old = torch.stack(means).tolist()  # a GPU is waited for once
    return {"ratio_mean": ratio_mean, "clip_fraction": clip_fraction, "kl_old": kl_old}
