"""A policy as a pure function of its parameters, which is the form `torch.func` differentiates."""

import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp
from torch.nn.attention import SDPBackend, sdpa_kernel

from isopo_mini.precision import at_least_float32

Parameters = dict[str, Tensor]


class _Logits(nn.Module):
    """A policy seen as a module whose output is its logits, which is what `functional_call` can call."""

    def __init__(self, policy: nn.Module) -> None:
        super().__init__()
        self.policy = policy

    def forward(self, observations: Tensor) -> Tensor:
        # Asked of the class: in a plain module `logits` may be the name of its last layer.
        has_logits = callable(getattr(type(self.policy), "logits", None))
        return self.policy.logits(observations) if has_logits else self.policy(observations)  # type: ignore[operator]


def logits(policy: nn.Module, parameters: Parameters, observations: Tensor) -> Tensor:
    """`policy.logits(observations)`, or `policy(observations)` of a plain module, at other parameters.

    In at least single precision: in half, log softmax has two or three digits.
    """
    return at_least_float32(functional_call(_Logits(policy), parameters, (observations,)))


def trainable_parameters(policy: nn.Module) -> Parameters:
    """Detached trainable parameters in `policy.parameters()` order, tied ones once, as `logits` takes them.

    Raises:
        ValueError: there are none.
    """
    named = {f"policy.{name}": value.detach() for name, value in policy.named_parameters() if value.requires_grad}
    if not named:
        raise ValueError("policy: expected at least one parameter with requires_grad=True, got none")
    return named


def flatten(gradients: Parameters, parameters: Parameters, lead: int) -> Tensor:
    """Gradients of shape (lead axes) + (the parameter's), side by side as the P columns: (lead axes) + (P,).

    In at least single precision, since what is made of them are long sums of products.
    """
    pieces = [at_least_float32(gradients[name]) for name in parameters]
    return torch.cat([piece.reshape(*piece.shape[:lead], -1) for piece in pieces], dim=-1)


def directional_derivative(
    function: Callable[[Parameters], Tensor], parameters: Parameters, direction: Parameters
) -> tuple[Tensor, Tensor]:
    """The value of a function, and J v: its forward-mode derivative along `direction`."""
    with warnings.catch_warnings():
        # PyTorch's own set-up of forward mode, at its first use, warns about itself.
        warnings.filterwarnings("ignore", message=".*torch.jit.script.* is deprecated")
        value, change = jvp(function, (parameters,), (direction,))  # type: ignore[misc]
    return value, change


def differentiable_attention() -> AbstractContextManager[None]:
    """Attention by plain matrix products: the fused kernels have no forward-mode or batched derivative."""
    return sdpa_kernel(SDPBackend.MATH)
