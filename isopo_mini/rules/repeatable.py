"""The log-probabilities of a policy are numbers, not draws: dropout that was left on is an error that names its module.

A ratio π/π_old, a KL, a trust region and an exact gradient all compare two evaluations of one policy. Under dropout in
training mode each of them is of another network: with the parameters unmoved the KL is not 0 and the ratio not 1. So
`train` and every update rule evaluate the policy through this module, which looks whether torch's random numbers were
used on the way. A policy acts and learns in evaluation mode; its gradients flow all the same.

What it does not see: noise from a generator of the policy's own, or of another library.
"""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from isopo_mini.batch import Batch


def log_prob(policy: Any, batch: Batch) -> Float[Tensor, "S T"]:
    """`policy.log_prob(batch)`, differentiable.

    Raises:
        ValueError: see `repeatable`.
    """
    return repeatable(policy, lambda: policy.log_prob(batch))


def repeatable(policy: nn.Module, evaluate: Callable[[], Tensor]) -> Tensor:
    """What `evaluate` says of the policy, if it would say the same again.

    Args:
        policy: is evaluated.
        evaluate: computes something of it, such as its logits at some observations.

    Returns:
        What it computed; nothing is evaluated twice unless random numbers were used.

    Raises:
        ValueError: random numbers were used and a second evaluation is another; names the module that drew them.
    """
    device = next((parameter.device for parameter in policy.parameters()), torch.device("cpu"))
    before = _generator_state(device)
    value = evaluate()
    if _same(before, _generator_state(device)):
        return value
    name, again = _first_to_draw(policy, evaluate, device)
    if torch.allclose(value.detach(), again, rtol=0.0, atol=0.0, equal_nan=True):
        return value  # drawn, and used for something else
    raise ValueError(
        f"policy: expected the same log-probabilities from two evaluations, got random ones from {name}; "
        "call policy.eval(), in which gradients flow all the same, or make its dropout 0"
    )


@torch.no_grad()
def _first_to_draw(policy: nn.Module, evaluate: Callable[[], Tensor], device: torch.device) -> tuple[str, Tensor]:
    """Evaluate once more, watching every module: the first and innermost that draws, and what came out."""
    running: list[list[Tensor]] = []  # the generators' state at the start of every forward that is not done
    drew: list[str] = []

    def start(*_: Any) -> None:
        running.append(_generator_state(device))

    def end(name: str, module: nn.Module) -> None:
        if not _same(running.pop(), _generator_state(device)):
            mode = "training" if module.training else "evaluation"
            drew.append(f"{name} ({type(module).__name__}, in {mode} mode)")

    with ExitStack() as hooks:
        for name, module in policy.named_modules():
            hooks.enter_context(module.register_forward_pre_hook(start))
            hooks.enter_context(module.register_forward_hook(lambda module, *_, name=name: end(name, module)))
        value = evaluate()
    return next(iter(drew), f"{type(policy).__name__} itself"), value


def _generator_state(device: torch.device) -> list[Tensor]:
    """The state of torch's global generators, on the CPU and on the device; both are held on the host."""
    states = [torch.get_rng_state()]
    if device.type == "mps":  # the only one of its kind, so it takes no device
        states.append(torch.mps.get_rng_state())
    elif device.type not in ("cpu", "meta"):
        states.append(torch.get_device_module(device).get_rng_state(device))
    return states


def _same(before: list[Tensor], after: list[Tensor]) -> bool:
    """Whether nothing was drawn in between."""
    return all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
