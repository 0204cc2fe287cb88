"""Divergences, entropies, norms and directions against closed forms and plain loops."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from isopo_mini.policies.softmax import TabularSoftmax
from isopo_mini.training import diagnostics


def test_kl_of_two_coins() -> None:
    p, q = 0.3, 0.6
    before = torch.tensor([[math.log(p), math.log(1 - p)]], dtype=torch.float64) + 5.0  # logits have a free constant
    after = torch.tensor([[math.log(q), math.log(1 - q)]], dtype=torch.float64)
    expected = p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))
    assert diagnostics.kl_divergence(before, after).item() == pytest.approx(expected, rel=1e-12)
    assert diagnostics.kl_divergence(after, before).item() != pytest.approx(expected, rel=0.01)  # not symmetric


@given(seed=st.integers(0, 10_000))
@settings(max_examples=25, deadline=None)
def test_masked_mean_against_a_loop(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    before, after = torch.randn(2, 3, 4, 5, generator=generator, dtype=torch.float64)
    mask = torch.rand(3, 4, generator=generator) < 0.5
    mask[0, 0] = True
    divergence, surprise = [], []
    for s, t in mask.nonzero().tolist():
        p, q = before[s, t].softmax(0), after[s, t].softmax(0)
        divergence.append((p * (p / q).log()).sum())
        surprise.append(-(p * p.log()).sum())
    assert diagnostics.kl_divergence(before, after, mask) >= 0
    torch.testing.assert_close(diagnostics.kl_divergence(before, after, mask), torch.stack(divergence).mean())
    torch.testing.assert_close(diagnostics.entropy(before, mask), torch.stack(surprise).mean())
    # What padding holds does not matter, not even when it is not a number.
    dirty = before.masked_fill(~mask[..., None], math.nan)
    torch.testing.assert_close(diagnostics.kl_divergence(dirty, after, mask), torch.stack(divergence).mean())


def test_kl_of_a_small_step_is_half_the_fisher_norm_even_in_single_precision() -> None:
    """KL ≈ ½ dᵀFd with F = diag(p) − ppᵀ at the logits: 1e-9 here, far below single precision's 1e-7."""
    logits = torch.randn(1, 6)
    direction = torch.randn(1, 6)
    after = logits + 1e-4 * direction
    moved = (after - logits).double()[0]  # what single precision made of the step
    p = logits.double().softmax(-1)[0]
    expected = 0.5 * ((p * moved**2).sum() - (p @ moved) ** 2)
    assert 1e-10 < expected < 1e-7
    # The next term is smaller by the step's size, 1e-4.
    assert diagnostics.kl_divergence(logits, after).item() == pytest.approx(expected.item(), rel=1e-3)


def test_forbidden_actions() -> None:
    allowed = torch.tensor([[0.0, 0.0, -math.inf]])
    other = torch.tensor([[0.0, math.log(3.0), -math.inf]])
    expected = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    assert diagnostics.kl_divergence(allowed, other).item() == pytest.approx(expected, rel=1e-6)
    assert diagnostics.entropy(allowed).item() == pytest.approx(math.log(2), rel=1e-12)
    free = torch.zeros(1, 3)
    assert diagnostics.kl_divergence(allowed, free).item() == pytest.approx(math.log(3 / 2), rel=1e-12)
    assert diagnostics.kl_divergence(free, allowed).item() == math.inf


def test_a_forbidden_action_of_a_probability_too_small_to_be_written_is_still_forbidden() -> None:
    """e^−1000 is 0 in every dtype, and 0 · ∞ no number."""
    rare, without = torch.tensor([[0.0, -1000.0]]), torch.tensor([[0.0, -math.inf]])
    assert diagnostics.kl_divergence(rare, without).item() == math.inf
    assert diagnostics.kl_divergence(without, rare).item() == 0.0


def test_entropy_limits() -> None:
    assert diagnostics.entropy(torch.zeros(2, 7)).item() == pytest.approx(math.log(7), rel=1e-12)
    assert diagnostics.entropy(torch.tensor([[1000.0, 0.0]])).item() == 0.0


def test_norms_by_name() -> None:
    network = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1, bias=False))
    network[1].weight.requires_grad_(False)
    before = diagnostics.snapshot(network)
    assert list(before) == ["0.weight", "0.bias"]  # the frozen one is not followed
    network[0].weight.grad = torch.tensor([[3.0, 0.0], [0.0, 4.0], [0.0, 0.0]])
    assert diagnostics.gradient_norms(network) == {"0.weight": 5.0}
    with torch.no_grad():
        network[0].bias += torch.tensor([2.0, 1.0, 2.0])
    # single precision: the bias itself is rounded to 1e-7
    assert diagnostics.update_norms(before, network) == {"0.weight": 0.0, "0.bias": pytest.approx(3.0, rel=1e-6)}


def test_snapshot_is_a_copy() -> None:
    policy = TabularSoftmax(2, 3)
    before = diagnostics.snapshot(policy)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter += 1
    assert all((value == 0).all() for value in before.values())


def test_flat_gradient_has_the_order_of_parameters() -> None:
    network = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    network[0].bias.requires_grad_(False)
    network[0].weight.grad = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    network[1].bias.grad = torch.tensor([5.0])
    expected = torch.tensor([1.0, 2.0, 3.0, 4.0, 0.0, 0.0, 5.0])  # 1.weight has none
    assert torch.equal(diagnostics.flat_gradient(network), expected)


def test_cosine() -> None:
    a, b = torch.tensor([1.0, 0.0]), torch.tensor([1.0, math.sqrt(3.0)])
    assert diagnostics.cosine(a, b) == pytest.approx(0.5, rel=1e-6)
    assert diagnostics.cosine(a, -3 * a) == -1.0
    assert diagnostics.cosine(a, torch.zeros(2)) == 0.0
    # 1e-30 squared is zero in single precision
    assert diagnostics.cosine(1e-30 * b, b) == pytest.approx(1.0, rel=1e-6)


@pytest.mark.usefixtures("unchecked")
class TestErrors:
    def test_shapes(self) -> None:
        logits = torch.zeros(2, 3, 4)
        with pytest.raises(ValueError, match=r"logits_after: expected shape \(2, 3, 4\), got \(2, 3, 1\)"):
            diagnostics.kl_divergence(logits, logits[..., :1])
        with pytest.raises(ValueError, match=r"mask: expected shape \(2, 3\), got \(2,\)"):
            diagnostics.entropy(logits, torch.ones(2, dtype=torch.bool))
        with pytest.raises(ValueError, match="mask: expected at least one position that counts"):
            diagnostics.entropy(logits, torch.zeros(2, 3, dtype=torch.bool))
        with pytest.raises(ValueError, match=r"b: expected shape \(P=2\), got \(3,\)"):
            diagnostics.cosine(torch.ones(2), torch.ones(3))
        with pytest.raises(ValueError, match=r"a: expected finite numbers, got nan at index \(1,\)"):
            diagnostics.cosine(torch.tensor([1.0, math.nan]), torch.ones(2))

    def test_policies(self) -> None:
        frozen = nn.Linear(2, 2).requires_grad_(False)
        with pytest.raises(ValueError, match="policy: expected at least one trainable parameter"):
            diagnostics.flat_gradient(frozen)
        with pytest.raises(ValueError, match=r"before: expected names of the policy's parameters, got other\.weight"):
            diagnostics.update_norms({"other.weight": torch.zeros(2)}, frozen)
