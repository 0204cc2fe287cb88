"""Sampling tokens: the layout of the record, the distribution drawn from, and the key-value cache."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from isopo_mini.policies.sampling import tempered_log_probs
from isopo_mini.policies.transformer import CausalTransformer

VOCABULARY = 7
CONTEXT = 16


def small(seed: int = 0, dtype: torch.dtype = torch.float64) -> CausalTransformer:
    """A tiny policy whose weights are blown up, so that attention and tokens matter."""
    generator = torch.Generator().manual_seed(seed)
    policy = CausalTransformer(VOCABULARY, CONTEXT, width=8, heads=2, generator=generator)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return policy.to(dtype)


def tokens_of(rows: int, length: int, seed: int = 1) -> Tensor:
    return torch.randint(VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


PROMPT_LENGTHS = torch.tensor([1, 4, 2, 3, 4, 1, 2, 2])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("temperature", [0.0, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("end_token", [None, 2])
@pytest.mark.parametrize("lengths", [None, PROMPT_LENGTHS])
def test_cache_gives_the_same_tokens(
    dtype: torch.dtype, temperature: float, end_token: int | None, lengths: Tensor | None
) -> None:
    policy, prompts = small(dtype=dtype), tokens_of(8, 4)
    with_cache, without = (
        policy.sample(
            prompts,
            12,
            lengths,
            end_token=end_token,
            temperature=temperature,
            generator=torch.Generator().manual_seed(11),
            use_cache=use_cache,
        )
        for use_cache in (True, False)
    )
    assert torch.equal(with_cache.observations, without.observations)
    assert torch.equal(with_cache.actions, without.actions)
    assert torch.equal(with_cache.mask, without.mask)
    tolerance = 1e-11 if dtype == torch.float64 else 1e-4
    torch.testing.assert_close(with_cache.log_probs, without.log_probs, rtol=0, atol=tolerance)
    assert with_cache.log_probs.dtype == dtype


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("lengths", [None, torch.tensor([3, 4, 1])])
def test_responses_to_one_prompt_are_rows_of_a_repeated_prompt(use_cache: bool, lengths: Tensor | None) -> None:
    """Reading a prompt once gives what reading it in every row gives."""
    policy, prompts = small(), tokens_of(3, 4)
    options = {"end_token": 2, "use_cache": use_cache}
    once = policy.sample(
        prompts, 6, lengths, responses_per_prompt=5, generator=torch.Generator().manual_seed(3), **options
    )
    repeated = policy.sample(
        prompts.repeat_interleave(5, dim=0),
        6,
        None if lengths is None else lengths.repeat_interleave(5),
        generator=torch.Generator().manual_seed(3),
        **options,
    )
    assert torch.equal(once.observations, repeated.observations)
    assert torch.equal(once.actions, repeated.actions)
    assert torch.equal(once.mask, repeated.mask)
    torch.testing.assert_close(once.log_probs, repeated.log_probs, rtol=0, atol=1e-11)
    assert len({tuple(row.tolist()) for row in once.actions}) > 3  # rows of one prompt do differ


@given(
    seed=st.integers(0, 1000),
    lengths=st.lists(st.integers(1, 4), min_size=1, max_size=5),
    max_new_tokens=st.integers(1, 6),
    end_token=st.sampled_from([None, 0, 3]),
)
@settings(max_examples=40, deadline=None)
def test_layout_of_a_sample(seed: int, lengths: list[int], max_new_tokens: int, end_token: int | None) -> None:
    """Prompt, response, padding: read off row by row with plain loops."""
    policy, prompts = small(), tokens_of(len(lengths), 4, seed)
    sampled = policy.sample(
        prompts,
        max_new_tokens,
        torch.tensor(lengths),
        end_token=end_token,
        pad_token=5,
        generator=torch.Generator().manual_seed(seed),
    )
    assert torch.equal(sampled.observations[:, 1:], sampled.actions[:, :-1])
    ends = []
    for s, length in enumerate(lengths):
        row = [sampled.observations[s, 0].item(), *sampled.actions[s].tolist()]
        assert row[:length] == prompts[s, :length].tolist()
        response = row[length : length + max_new_tokens]
        if end_token in response:
            response = response[: response.index(end_token) + 1]
        else:
            assert len(response) == max_new_tokens
        end = length + len(response)
        ends.append(end)
        assert row[end:] == [5] * (len(row) - end)
        assert sampled.mask[s].tolist() == [length <= t + 1 < end for t in range(len(row) - 1)]
        assert sampled.responses()[s].tolist() == response
    assert sampled.mask.shape == (len(lengths), max(ends) - 1)  # not one position longer than needed


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-11), (torch.float32, 1e-4)])
@pytest.mark.parametrize("use_cache", [True, False])
def test_log_probs_are_those_of_the_policy(dtype: torch.dtype, tolerance: float, use_cache: bool) -> None:
    policy, prompts = small(dtype=dtype), tokens_of(8, 4)
    sampled = policy.sample(prompts, 8, PROMPT_LENGTHS, end_token=2, use_cache=use_cache)
    batch = sampled.with_rewards(torch.zeros(8), groups=torch.arange(8) // 4)
    torch.testing.assert_close(batch.log_probs, policy.log_prob(batch), rtol=0, atol=tolerance)
    assert (batch.log_probs[batch.mask] < 0).all()
    assert torch.equal(batch.groups, torch.arange(8) // 4)


def test_log_probs_belong_to_the_distribution_that_was_drawn_from() -> None:
    policy, prompts = small(), tokens_of(4, 3)
    sampled = policy.sample(prompts, 6, temperature=0.5)
    doubled = copy.deepcopy(policy)
    doubled.head.weight.data *= 2  # softmax(logits / 0.5)
    batch = sampled.with_rewards(torch.zeros(4))
    torch.testing.assert_close(sampled.log_probs, doubled.log_prob(batch), rtol=0, atol=1e-11)
    assert (sampled.log_probs - policy.log_prob(batch)).abs().max() > 0.01
    greedy = policy.sample(prompts, 6, temperature=0.0)
    assert torch.equal(policy.logits(greedy.observations).argmax(-1)[greedy.mask], greedy.actions[greedy.mask])
    assert (greedy.log_probs == 0).all()


def test_small_temperatures_approach_the_greedy_limit() -> None:
    logits = torch.randn(4, VOCABULARY, dtype=torch.float64)
    limit = tempered_log_probs(logits, 0.0).exp()
    torch.testing.assert_close(tempered_log_probs(logits, 1e-4).exp(), limit, rtol=0, atol=1e-8)
    assert torch.equal(limit.sum(-1), torch.ones(4, dtype=torch.float64))


def test_sampled_frequencies_match_the_policy() -> None:
    """4,000 rows of two tokens against the exact joint distribution of 49 pairs."""
    policy, rows = small(), 4000
    prompt = torch.tensor([[3, 1]])
    sampled = policy.sample(prompt.expand(rows, 2), 2, generator=torch.Generator().manual_seed(0))
    pairs = torch.stack(sampled.responses())
    first = policy.logits(prompt)[0, -1].softmax(0)
    continued = torch.cat([prompt.expand(VOCABULARY, 2), torch.arange(VOCABULARY)[:, None]], 1)
    joint = (first[:, None] * policy.logits(continued)[:, -1].softmax(1)).flatten()
    counts = torch.bincount(pairs[:, 0] * VOCABULARY + pairs[:, 1], minlength=VOCABULARY**2)
    expected = rows * joint
    common = expected > 5  # Pearson's statistic needs cells that are not nearly empty
    statistic = ((counts - expected) ** 2 / expected)[common].sum().item()
    # χ² with n degrees of freedom: mean n, standard deviation √(2n); four of them is far in the tail.
    degrees = int(common.sum())
    assert degrees > 10
    assert statistic < degrees + 4 * math.sqrt(2 * degrees)


def test_the_whole_context_can_be_used_and_not_more() -> None:
    policy, prompts = small(), tokens_of(2, 4)
    sampled = policy.sample(prompts, CONTEXT - 3)  # the last token is written, never read
    assert sampled.observations.shape == (2, CONTEXT)
    with pytest.raises(ValueError, match=r"max_new_tokens: .* <= context_length=16, got 4 \+ 14 - 1"):
        policy.sample(prompts, CONTEXT - 2)


def test_sampling_keeps_no_graph_and_its_tokens_can_be_trained_on() -> None:
    policy, prompts = small(), tokens_of(2, 3)
    sampled = policy.sample(prompts, 4)
    assert not sampled.log_probs.requires_grad
    policy.log_prob(sampled.with_rewards(torch.ones(2))).sum().backward()
    assert policy.head.weight.grad.abs().sum() > 0
    with torch.inference_mode():
        inside = policy.sample(prompts, 4, generator=torch.Generator().manual_seed(4))
    outside = policy.sample(prompts, 4, generator=torch.Generator().manual_seed(4))
    assert torch.equal(inside.actions, outside.actions)


@pytest.mark.parametrize("use_cache", [True, False])
def test_sampling_under_autocast(use_cache: bool) -> None:
    policy, prompts = small(dtype=torch.float32), tokens_of(2, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        sampled = policy.sample(prompts, 4, use_cache=use_cache)
    assert sampled.log_probs.dtype == torch.float32
    # bfloat16 has 8 bits: log-probabilities of order 1 are right to about 1 %.
    batch = sampled.with_rewards(torch.zeros(2))
    torch.testing.assert_close(sampled.log_probs, policy.log_prob(batch), rtol=0.1, atol=0.2)


def test_what_lies_behind_a_prompt_is_not_looked_at() -> None:
    policy, prompts = small(), tokens_of(8, 4)
    garbage = prompts.masked_fill(torch.arange(4) >= PROMPT_LENGTHS[:, None], -100)
    first, second = (
        policy.sample(rows, 5, PROMPT_LENGTHS, generator=torch.Generator().manual_seed(2))
        for rows in (prompts, garbage)
    )
    assert torch.equal(first.actions, second.actions)
    assert torch.equal(first.observations, second.observations)


@pytest.mark.usefixtures("unchecked")
class TestErrors:
    @pytest.mark.parametrize(
        ("changes", "error", "message"),
        [
            ({"prompts": torch.zeros(2, 3)}, TypeError, "prompts: expected an int64 tensor"),
            ({"prompts": torch.full((2, 3), 7)}, ValueError, "prompts: expected tokens from 0 to 6"),
            (
                {"prompts": torch.zeros(0, 3, dtype=torch.int64)},
                ValueError,
                "prompts: expected at least one",
            ),
            ({"prompt_lengths": torch.tensor([1])}, ValueError, r"prompt_lengths: expected shape \(S=2\)"),
            ({"prompt_lengths": torch.tensor([1, 4])}, ValueError, r"expected 1 to P=3, got \[1, 4\]"),
            ({"prompt_lengths": torch.tensor([0, 3])}, ValueError, r"expected 1 to P=3, got \[0, 3\]"),
            ({"max_new_tokens": 0}, ValueError, "max_new_tokens: expected a finite number >= 1, got 0"),
            ({"responses_per_prompt": 0}, ValueError, "responses_per_prompt: expected a finite number >= 1, got 0"),
            ({"temperature": -1.0}, ValueError, "temperature: expected a finite number >= 0, got -1"),
            ({"end_token": 7}, ValueError, "end_token: expected a token from 0 to 6, got 7"),
            ({"pad_token": -1}, ValueError, "pad_token: expected a token from 0 to 6, got -1"),
        ],
    )
    def test_sampling(self, changes: dict[str, object], error: type[Exception], message: str) -> None:
        arguments = {"prompts": torch.zeros(2, 3, dtype=torch.int64), "max_new_tokens": 2}
        with pytest.raises(error, match=message):
            small().sample(**(arguments | changes))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_a_tiny_temperature_is_nearly_zero_and_not_nan(dtype: torch.dtype) -> None:
    """Divided by 1e-39 the logits themselves overflow, to ∞ − ∞."""
    logits = torch.tensor([[3.0, -2.0, 1.0], [0.5, 0.5, -1.0]], dtype=dtype)
    given = tempered_log_probs(logits, 1e-39)
    assert given.dtype == torch.promote_types(dtype, torch.float32)
    torch.testing.assert_close(given.exp().double(), torch.tensor([[1.0, 0.0, 0.0], [0.5, 0.5, 0.0]]).double())
