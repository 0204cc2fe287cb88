"""What to measure beside reward: how far a step moved the policy, and along which direction.

Everything is computed in double precision and without gradient. The Kullback–Leibler divergence of a small
step is a difference of nearly equal numbers, which single precision would round away.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from isopo_mini import checks
from isopo_mini.policies.categorical import categorical_kl


@torch.no_grad()
def kl_divergence(
    logits_before: Float[Tensor, "*B A"], logits_after: Float[Tensor, "*B A"], mask: Bool[Tensor, "*B"] | None = None
) -> Float[Tensor, ""]:
    """KL(before ‖ after) = mean over real positions of Σ_a π(a) log(π(a)/π'(a)), exact over the actions.

    Args:
        logits_before: of the policy π before the step, `(..., A)`; −inf forbids an action.
        logits_after: of the policy π' after it, `(..., A)`, at the same observations.
        mask: True where a position counts, `(...)`; all of them when None.

    Returns:
        A scalar, float64, ≥ 0 up to rounding; infinite when π' forbids an action that π takes.

    Raises:
        ValueError: shapes differ, or no position counts.
    """
    if logits_after.shape != logits_before.shape:
        raise ValueError(f"logits_after: expected shape {tuple(logits_before.shape)}, got {tuple(logits_after.shape)}")
    before, after = logits_before.double().log_softmax(-1), logits_after.double().log_softmax(-1)
    return _mean(categorical_kl(before, after), mask)


@torch.no_grad()
def entropy(logits: Float[Tensor, "*B A"], mask: Bool[Tensor, "*B"] | None = None) -> Float[Tensor, ""]:
    """H = −Σ_a π(a) log π(a) in nats, mean over real positions: log A when uniform, 0 when certain.

    Args:
        logits: `(..., A)`; −inf forbids an action.
        mask: True where a position counts, `(...)`; all of them when None.

    Returns:
        A scalar, float64.

    Raises:
        ValueError: shapes differ, or no position counts.
    """
    return _mean(torch.special.entr(logits.double().softmax(-1)).sum(dim=-1), mask)


def snapshot(policy: nn.Module) -> dict[str, Tensor]:
    """A copy of every trainable parameter by name, in `policy.parameters()` order."""
    return {name: value.detach().clone() for name, value in policy.named_parameters() if value.requires_grad}


def gradient_norms(policy: nn.Module) -> dict[str, float]:
    """Euclidean norm of every parameter's `.grad` by name. Parameters without a gradient are left out."""
    return {name: _norm(value.grad) for name, value in policy.named_parameters() if value.grad is not None}


def update_norms(before: dict[str, Tensor], policy: nn.Module) -> dict[str, float]:
    """Euclidean norm of what every parameter moved since `before = snapshot(policy)`, by name.

    Raises:
        ValueError: the policy has no parameter of some name in `before`.
    """
    now = dict(policy.named_parameters())
    missing = before.keys() - now.keys()
    if missing:
        raise ValueError(f"before: expected names of the policy's parameters, got {', '.join(sorted(missing))}")
    return {name: _norm(now[name].double() - value.double()) for name, value in before.items()}


def flat_gradient(policy: nn.Module) -> Float[Tensor, "P"]:
    """The `.grad` of every trainable parameter end to end, in `policy.parameters()` order; zeros where there is none.

    This is the order of the columns of `geometry.fisher.score_matrix`. An update rule leaves in `.grad` what an
    optimizer subtracts, so the direction in which the policy moves is minus this.

    Raises:
        ValueError: no parameter is trainable.
    """
    trainable = [value for value in policy.parameters() if value.requires_grad]
    if not trainable:
        raise ValueError("policy: expected at least one trainable parameter, got none")
    return torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).detach().flatten() for p in trainable])


def cosine(a: Float[Tensor, "P"], b: Float[Tensor, "P"]) -> float:
    """a·b / (‖a‖‖b‖), between −1 and 1; 0 when either vector is zero, which has no direction.

    Raises:
        ValueError: the shapes differ or a number is not finite.
    """
    sizes = checks.require_shape("a", a, "P")
    checks.require_shape("b", b, "P", sizes)
    checks.require_finite("a", a)
    checks.require_finite("b", b)
    norms = _norm(a) * _norm(b)
    return torch.dot(a.detach().double(), b.detach().double()).item() / norms if norms > 0 else 0.0


def _norm(value: Tensor) -> float:
    """Euclidean norm of all entries."""
    return torch.linalg.vector_norm(value.detach().double()).item()


def _mean(values: Tensor, mask: Tensor | None) -> Tensor:
    """Mean of the values (...) where the mask is True."""
    if mask is not None:
        if mask.shape != values.shape:
            raise ValueError(f"mask: expected shape {tuple(values.shape)}, got {tuple(mask.shape)}")
        values = values[mask]
    if values.numel() == 0:
        raise ValueError("mask: expected at least one position that counts, got none")
    return values.mean()
