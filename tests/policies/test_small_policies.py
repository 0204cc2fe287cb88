"""Tabular, linear and MLP policies: scores with a closed form, padding that is never looked at, sampling."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from isopo_mini.batch import Batch
from isopo_mini.policies import MLP, CategoricalPolicy, LinearSoftmax, TabularSoftmax


def batch_of(observations: Tensor, actions: Tensor, mask: Tensor | None = None) -> Batch:
    sequences, positions = actions.shape
    return Batch(
        observations=observations,
        actions=actions,
        mask=torch.ones(sequences, positions, dtype=torch.bool) if mask is None else mask,
        rewards=torch.zeros(sequences, dtype=torch.float64),
        log_probs=torch.zeros(sequences, positions, dtype=torch.float64),
    )


def test_tabular_starts_uniform() -> None:
    probs = TabularSoftmax(3, 4).logits(torch.arange(3)).softmax(dim=-1)
    torch.testing.assert_close(probs, torch.full((3, 4), 0.25))


def test_tabular_score_is_one_hot_minus_probs() -> None:
    policy = TabularSoftmax.from_probs(torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.1, 0.8]], dtype=torch.float64))
    policy.log_prob(batch_of(torch.tensor([[1]]), torch.tensor([[2]]))).sum().backward()
    expected = torch.tensor([[0.0, 0.0, 0.0], [-0.1, -0.1, 1 - 0.8]], dtype=torch.float64)
    torch.testing.assert_close(policy.table.weight.grad, expected)


def test_from_probs_has_these_probs() -> None:
    probs = torch.rand(5, 3, dtype=torch.float64).softmax(dim=-1)
    policy = TabularSoftmax.from_probs(probs)
    assert policy.table.weight.dtype == torch.float64
    torch.testing.assert_close(policy(torch.arange(5)).softmax(dim=-1), probs)


def test_linear_score_is_outer_product_with_the_features() -> None:
    policy = LinearSoftmax(4, 3).double()
    observation = torch.randn(1, 1, 4, dtype=torch.float64)
    policy.log_prob(batch_of(observation, torch.tensor([[1]]))).sum().backward()
    features = observation[0, 0]
    probs = (policy.linear.weight @ features).softmax(dim=0)
    one_hot = torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64)
    torch.testing.assert_close(policy.linear.weight.grad, torch.outer(one_hot - probs, features))


def test_mlp_is_the_formula() -> None:
    policy = MLP(3, 2, hidden=(5, 4)).double()
    (w1, b1, w2, b2, w3, b3) = policy.parameters()
    x = torch.randn(6, 7, 3, dtype=torch.float64)
    expected = ((x @ w1.T + b1).tanh() @ w2.T + b2).tanh() @ w3.T + b3
    torch.testing.assert_close(policy(x), expected)


def test_mlp_options() -> None:
    assert [type(layer) for layer in MLP(3, 2, hidden=(), activation=nn.ReLU).layers] == [nn.Linear]
    kinds = [type(layer) for layer in MLP(3, 2, hidden=(8,), activation=nn.ReLU).layers]
    assert kinds == [nn.Linear, nn.ReLU, nn.Linear]


@settings(max_examples=15, deadline=None)
@given(data=st.data(), sequences=st.integers(1, 4), positions=st.integers(1, 5), num_actions=st.integers(1, 4))
def test_log_prob_ignores_padding(data: st.DataObject, sequences: int, positions: int, num_actions: int) -> None:
    """Zero where padded, and neither its value nor any gradient depends on what padding holds."""
    lengths = data.draw(st.lists(st.integers(1, positions), min_size=sequences, max_size=sequences))
    mask = torch.arange(positions) < torch.tensor(lengths)[:, None]
    policy = MLP(2, num_actions, hidden=(3,)).double()
    observations = torch.randn(sequences, positions, 2, dtype=torch.float64)
    actions = torch.randint(num_actions, (sequences, positions))
    log_probs = policy.log_prob(batch_of(observations, actions, mask))
    for s in range(sequences):
        for t in range(positions):
            expected = policy(observations[s, t]).log_softmax(0)[actions[s, t]] if mask[s, t] else torch.zeros(())
            assert log_probs[s, t].item() == pytest.approx(expected.item(), abs=1e-12)
    gradient = torch.autograd.grad(log_probs.sum(), list(policy.parameters()))
    other = batch_of(observations.where(mask[..., None], 99.0), actions.where(mask, -1), mask)
    other_log_probs = policy.log_prob(other)
    assert torch.equal(log_probs, other_log_probs)
    for mine, others in zip(
        gradient, torch.autograd.grad(other_log_probs.sum(), list(policy.parameters())), strict=True
    ):
        torch.testing.assert_close(mine, others, rtol=0, atol=1e-14)  # sums may run in another order


def test_sample_actions_follow_the_policy() -> None:
    probs = torch.tensor([[0.7, 0.2, 0.1], [0.05, 0.05, 0.9]], dtype=torch.float64)
    policy = TabularSoftmax.from_probs(probs)
    count = 20_000
    observations = torch.arange(2).expand(count, 2)
    actions, log_probs = policy.sample_actions(observations, generator=torch.Generator().manual_seed(1))
    assert actions.shape == log_probs.shape == (count, 2)
    torch.testing.assert_close(log_probs.exp(), probs.expand(count, 2, 3).gather(2, actions[..., None])[..., 0])
    for state in range(2):
        frequencies = torch.bincount(actions[:, state], minlength=3) / count
        # Five standard deviations of a frequency, √(p(1 − p)/N): a fair rerun fails once in a million.
        margin = 5 * (probs[state] * (1 - probs[state]) / count).sqrt()
        assert ((frequencies - probs[state]).abs() < margin).all()


def test_sample_actions_repeat_with_the_generator() -> None:
    policy = MLP(3, 4)
    observations = torch.randn(50, 3)
    first, second, third = (
        policy.sample_actions(observations, generator=torch.Generator().manual_seed(seed))[0] for seed in (1, 1, 2)
    )
    assert torch.equal(first, second)
    assert not torch.equal(first, third)


def test_one_action_is_certain() -> None:
    policy = LinearSoftmax(2, 1)
    log_probs = policy.log_prob(batch_of(torch.randn(3, 1, 2), torch.zeros(3, 1, dtype=torch.int64)))
    assert torch.equal(log_probs, torch.zeros(3, 1))
    log_probs.sum().backward()
    assert torch.equal(policy.linear.weight.grad, torch.zeros(1, 2))


def test_a_policy_without_logits_says_so() -> None:
    class Forgot(CategoricalPolicy):
        pass

    with pytest.raises(NotImplementedError, match="Forgot does not define logits"):
        Forgot()(torch.zeros(1))


class OnlyTheFirst(CategoricalPolicy):
    """Of 5,000 actions all are forbidden but one, in float16."""

    def logits(self, observations: Tensor) -> Tensor:
        logits = torch.full((len(observations), 5000), -torch.inf, dtype=torch.float16)
        return logits.index_fill(1, torch.tensor([0]), 0.0)


def test_a_forbidden_action_is_never_drawn() -> None:
    """Of float16 probabilities `torch.multinomial` draws some: about 1 in 1,000 here."""
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        actions, log_probs = OnlyTheFirst().sample_actions(torch.zeros(1000, 1), generator=generator)
        assert (actions == 0).all()
        assert torch.equal(log_probs, torch.zeros(1000))


def test_log_probs_of_half_precision_are_computed_in_single() -> None:
    policy = MLP(4, 3).bfloat16()
    batch = batch_of(torch.randn(5, 2, 4).bfloat16(), torch.randint(3, (5, 2)))
    log_probs = policy.log_prob(batch)
    expected = policy.logits(batch.observations).double().log_softmax(-1).gather(-1, batch.actions[..., None])[..., 0]
    torch.testing.assert_close(log_probs.double(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.usefixtures("unchecked")
class TestBadInput:
    def test_sizes(self) -> None:
        with pytest.raises(ValueError, match=r"num_states: expected a finite number >= 1, got 0"):
            TabularSoftmax(0, 2)
        with pytest.raises(ValueError, match=r"num_actions: expected a finite number >= 1, got 0"):
            LinearSoftmax(2, 0)
        with pytest.raises(ValueError, match=r"hidden\[1\]: expected a finite number >= 1, got 0"):
            MLP(2, 2, hidden=(3, 0))

    def test_observations(self) -> None:
        with pytest.raises(TypeError, match=r"observations: expected an int64 tensor, got torch.float32"):
            TabularSoftmax(2, 2).logits(torch.zeros(3))
        with pytest.raises(ValueError, match=r"observations: expected shape \(d=2\), got \(5, 3\)"):
            LinearSoftmax(2, 2).logits(torch.zeros(5, 3))
        with pytest.raises(ValueError, match=r"observations: expected shape \(d=2\), got \(5, 3\)"):
            MLP(2, 2).logits(torch.zeros(5, 3))

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.uint8, torch.bool, torch.int64])
    def test_observations_of_another_dtype_are_named(self, dtype: torch.dtype) -> None:
        for policy in (MLP(4, 2), LinearSoftmax(4, 2), MLP(4, 2, hidden=())):
            with pytest.raises(TypeError, match=rf"observations: expected torch.float32 \(the d.* got {dtype}"):
                policy.logits(torch.zeros(1, 4, dtype=dtype))
        with pytest.raises(TypeError, match=r"observations: expected torch.bfloat16 .* got torch.float32"):
            MLP(4, 2).bfloat16().logits(torch.zeros(1, 4))
        with pytest.raises(TypeError, match=r"observations: expected an int64 tensor, got torch.int32"):
            TabularSoftmax(2, 2).logits(torch.zeros(3, dtype=torch.int32))

    def test_what_autocast_converts_is_left_to_it(self) -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert MLP(4, 2).logits(torch.zeros(1, 4, dtype=torch.bfloat16)).dtype == torch.bfloat16
            with pytest.raises(TypeError, match=r"observations: expected torch.float32 .* got torch.float64"):
                MLP(4, 2).logits(torch.zeros(1, 4, dtype=torch.float64))

    def test_probs(self) -> None:
        with pytest.raises(ValueError, match="probs: expected probabilities > 0, got 0"):
            TabularSoftmax.from_probs(torch.tensor([[0.0, 1.0]]))
        with pytest.raises(ValueError, match=r"probs: expected rows that sum to 1, got a row that is off by 0\.1"):
            TabularSoftmax.from_probs(torch.tensor([[0.5, 0.5], [0.4, 0.5]]))
        with pytest.raises(TypeError, match=r"probs: expected a floating-point tensor, got torch.int64"):
            TabularSoftmax.from_probs(torch.tensor([[1, 1]]))
        with pytest.raises(ValueError, match=r"probs: expected shape \(states A\), got \(2,\)"):
            TabularSoftmax.from_probs(torch.tensor([0.5, 0.5]))

    def test_logits_that_do_not_fit_the_batch(self) -> None:
        policy = TabularSoftmax(2, 2)
        observations = torch.zeros(3, 1, 4, dtype=torch.int64)  # one state index too many axes
        batch = batch_of(observations, torch.zeros(3, 1, dtype=torch.int64))
        with pytest.raises(ValueError, match=r"logits\(batch.observations\): expected shape \(S=3 T=1 A\)"):
            policy.log_prob(batch)
