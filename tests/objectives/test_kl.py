"""The three estimators, with the expectation over actions taken exactly."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from isopo_mini.objectives.kl import estimate

KINDS = ("k1", "k2", "k3")


def two_policies(distance: float = 1.0, actions: int = 5) -> tuple[Tensor, Tensor]:
    """Logits of π, and log ref, `(actions,)`."""
    reference = torch.randn(actions, dtype=torch.float64).log_softmax(0)
    return (reference + distance * torch.randn(actions, dtype=torch.float64)).requires_grad_(), reference


def expectation(values: Callable[[Tensor, Tensor], Tensor], logits: Tensor, reference: Tensor) -> Tensor:
    """E_π of the estimator: every action once, weighted by its probability, which is not differentiated."""
    log_probs = logits.log_softmax(0)
    return (log_probs.exp().detach() * values(log_probs[None], reference[None])[0]).sum()


def divergence(log_probs: Tensor, other: Tensor) -> Tensor:
    return (log_probs.exp() * (log_probs - other)).sum()


@pytest.mark.parametrize("kind", ["k1", "k3"])
def test_k1_and_k3_are_unbiased(kind: str) -> None:
    logits, reference = two_policies()
    mean = expectation(lambda a, b: estimate(a, b, kind), logits, reference)
    torch.testing.assert_close(mean, divergence(logits.log_softmax(0), reference), rtol=1e-12, atol=0)


def test_k3_with_the_ratio_upside_down_is_biased() -> None:
    """e^d − 1 − d, the form for samples from the *other* policy, is easily written instead of e^−d − 1 + d."""
    logits, reference = two_policies()

    def upside_down(log_probs: Tensor, reference_log_probs: Tensor) -> Tensor:
        return estimate(reference_log_probs, log_probs, "k3")

    wrong, exact = expectation(upside_down, logits, reference), divergence(logits.log_softmax(0), reference)
    assert abs(wrong - exact) > 0.2 * exact


def test_k2_is_biased_but_not_for_small_steps() -> None:
    """The bias is of third order: a tenth of the distance makes it about a thousandth."""
    logits, reference = two_policies()
    direction = (logits - reference).detach()
    biases = []
    for distance in (0.1, 0.01):
        near = reference + distance * direction
        exact = divergence(near.log_softmax(0), reference)
        biases.append(abs(expectation(lambda a, b: estimate(a, b, "k2"), near, reference) - exact).item())
    assert biases[0] > 0
    assert 500 < biases[0] / biases[1] < 2000


def test_k2_and_k3_are_never_negative_and_k1_is() -> None:
    log_probs, reference = torch.randn(2, 20, 10, dtype=torch.float64)
    assert (estimate(log_probs, reference, "k1") < 0).any()
    for kind in ("k2", "k3"):
        assert (estimate(log_probs, reference, kind) >= 0).all()
        assert (estimate(log_probs, log_probs, kind) == 0).all()


def test_k3_of_a_tiny_step_is_not_rounded_away() -> None:
    """d = 1e-4 in float32: e^−d − 1 + d, taken term by term, is all rounding. k3 = d²/2 − d³/6 + …"""
    difference = torch.full((1, 1), 1e-4)
    torch.testing.assert_close(
        estimate(difference, torch.zeros(1, 1), "k3").double(), torch.full((1, 1), 5e-9).double(), rtol=0.02, atol=0
    )


def test_gradients_as_losses() -> None:
    """On fixed samples only k2 has the gradient of KL(π ‖ ref). k1, the unbiased estimator, has none at all."""
    logits, reference = two_policies()

    def gradient(value: Tensor) -> Tensor:
        return torch.autograd.grad(value, logits)[0]

    as_loss = {
        kind: gradient(expectation(lambda a, b, kind=kind: estimate(a, b, kind), logits, reference))  # type: ignore[misc]
        for kind in KINDS
    }
    forward = gradient(divergence(logits.log_softmax(0), reference))
    backward = gradient(divergence(reference, logits.log_softmax(0)))
    torch.testing.assert_close(as_loss["k1"], torch.zeros_like(logits), rtol=0, atol=1e-14)
    torch.testing.assert_close(as_loss["k2"], forward, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(as_loss["k3"], backward, rtol=1e-10, atol=1e-12)
    assert (forward - backward).norm() > 0.1 * forward.norm()


@pytest.mark.usefixtures("unchecked")
def test_errors_say_what_was_expected_and_what_came() -> None:
    values = torch.zeros(2, 3)
    with pytest.raises(ValueError, match=r"kind: expected one of k1, k2, k3, got 'k4'"):
        estimate(values, values, "k4")
    with pytest.raises(ValueError, match=r"reference_log_probs: expected shape \(S=2 T=3\), got \(2, 1\)"):
        estimate(values, values[:, :1])
    with pytest.raises(ValueError, match=r"log_probs: expected shape \(S T\), got \(3,\)"):
        estimate(values[0], values[0])
    with pytest.raises(TypeError, match=r"log_probs: expected a floating-point tensor, got torch.int64"):
        estimate(values.long(), values)
