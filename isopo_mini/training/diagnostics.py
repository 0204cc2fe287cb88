"""What to measure beside reward: how far a step moved the policy, and along which direction.

Everything is computed in double precision and without gradient. The Kullback–Leibler divergence of a small
step is a difference of nearly equal numbers, which single precision would round away.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from isopo_mini import checks
from isopo_mini.policies.categorical import entropy as entropy
from isopo_mini.policies.categorical import kl_divergence as kl_divergence
from isopo_mini.rules.rule_parts import flat_gradient as flat_gradient


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
