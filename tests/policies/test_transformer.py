"""The transformer policy: what it may see, how many numbers it has, and that sampling is exact."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.func import functional_call, grad, jvp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from isopo_mini import Batch
from isopo_mini.policies.sampling import tempered_log_probs
from isopo_mini.policies.transformer import CausalTransformer

VOCABULARY = 7
CONTEXT = 16


def small(
    seed: int = 0, dtype: torch.dtype = torch.float64, spread: float = 1.0, **options: object
) -> CausalTransformer:
    """A tiny policy; `spread` blows the initial weights up so that attention and tokens matter."""
    generator = torch.Generator().manual_seed(seed)
    policy = CausalTransformer(VOCABULARY, CONTEXT, width=8, heads=2, generator=generator, **options)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter += spread * 0.3 * torch.randn(parameter.shape, generator=generator)
    return policy.to(dtype)


def tokens_of(rows: int, length: int, seed: int = 1) -> Tensor:
    return torch.randint(VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def by_hand(policy: CausalTransformer, tokens: Tensor) -> Tensor:
    """The same network written with einsum, an explicit mask and no torch module, (S, T, V)."""
    weights = dict(policy.state_dict())

    def norm(x: Tensor, name: str) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        variance = centred.pow(2).mean(-1, keepdim=True)
        return centred / (variance + 1e-5).sqrt() * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    def affine(x: Tensor, name: str) -> Tensor:
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    length = tokens.shape[1]
    x = weights["token_embedding.weight"][tokens] + weights["position_embedding.weight"][:length]
    hidden = torch.ones(length, length).triu(diagonal=1).bool()
    for index in range(len(policy.blocks)):
        name = f"blocks.{index}"
        q, k, v = affine(norm(x, f"{name}.attention_norm"), f"{name}.attention.qkv").chunk(3, dim=-1)
        mixed = []
        for q_head, k_head, v_head in zip(*[part.chunk(policy.heads, dim=-1) for part in (q, k, v)], strict=True):
            scores = torch.einsum("std,sud->stu", q_head, k_head) / math.sqrt(q_head.shape[-1])
            mixed.append(scores.masked_fill(hidden, -math.inf).softmax(-1) @ v_head)
        x = x + affine(torch.cat(mixed, dim=-1), f"{name}.attention.output")
        inner = affine(norm(x, f"{name}.mlp_norm"), f"{name}.mlp.0")
        inner = inner * 0.5 * (1 + torch.erf(inner / math.sqrt(2)))
        x = x + affine(inner, f"{name}.mlp.2")
    return norm(x, "final_norm") @ weights["head.weight"].T


@pytest.mark.parametrize("tied_head", [False, True])
def test_logits_equal_the_formulas_written_out(tied_head: bool) -> None:
    policy, tokens = small(tied_head=tied_head), tokens_of(3, 9)
    # float64: rounding of a few thousand additions
    torch.testing.assert_close(policy.logits(tokens), by_hand(policy, tokens), rtol=1e-10, atol=1e-11)


@given(length=st.integers(2, CONTEXT), data=st.data())
@settings(max_examples=15, deadline=None)
def test_a_later_token_never_changes_earlier_logits(length: int, data: st.DataObject) -> None:
    policy, tokens = small(), tokens_of(2, length)
    changed_at = data.draw(st.integers(1, length - 1))
    other = tokens.clone()
    other[:, changed_at:] = (other[:, changed_at:] + 1) % VOCABULARY
    before, after = policy.logits(tokens), policy.logits(other)
    torch.testing.assert_close(before[:, :changed_at], after[:, :changed_at], rtol=0, atol=1e-12)
    # ... and the changed token itself does matter, or the lines above would hold for a constant.
    assert (before[:, changed_at] - after[:, changed_at]).abs().max() > 1e-3


def test_right_padding_changes_neither_log_probs_nor_gradients() -> None:
    policy, tokens = small(), tokens_of(2, 6)
    short = Batch(tokens[:, :-1], tokens[:, 1:], torch.ones(2, 5, dtype=torch.bool), torch.zeros(2), torch.zeros(2, 5))
    padding = torch.full((2, 4), 3)
    padded = Batch(
        torch.cat([short.observations, padding], 1),
        torch.cat([short.actions, padding - 4], 1),  # -1 is no token: padding is never looked at
        torch.arange(9).expand(2, 9) < 5,
        short.rewards,
        torch.zeros(2, 9),
    )
    gradients = []
    for batch in (short, padded):
        policy.zero_grad()
        policy.log_prob(batch).sum().backward()
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in policy.parameters()]))
    torch.testing.assert_close(policy.log_prob(padded)[:, :5], policy.log_prob(short), rtol=0, atol=1e-12)
    assert (policy.log_prob(padded)[:, 5:] == 0).all()
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-10, atol=1e-11)


def test_log_prob_is_the_gathered_log_softmax() -> None:
    policy, tokens = small(), tokens_of(3, 6)
    mask = torch.tensor([[0, 0, 1, 1, 1], [0, 1, 1, 0, 0], [1, 1, 1, 1, 1]], dtype=torch.bool)
    batch = Batch(tokens[:, :-1], tokens[:, 1:], mask, torch.zeros(3), torch.zeros(3, 5))
    logits = by_hand(policy, batch.observations)
    for s in range(3):
        for t in range(5):
            expected = logits[s, t, batch.actions[s, t]] - logits[s, t].logsumexp(0) if mask[s, t] else 0.0
            assert policy.log_prob(batch)[s, t].item() == pytest.approx(float(expected), abs=1e-11)


@pytest.mark.parametrize("tied_head", [False, True])
@pytest.mark.parametrize(("width", "layers"), [(8, 1), (12, 3)])
def test_parameter_count_is_the_one_in_the_docstring(width: int, layers: int, tied_head: bool) -> None:
    policy = CausalTransformer(VOCABULARY, CONTEXT, width, layers, heads=4, tied_head=tied_head)
    body = layers * (12 * width**2 + 13 * width) + (VOCABULARY + CONTEXT) * width + 2 * width
    head = 0 if tied_head else VOCABULARY * width
    assert sum(parameter.numel() for parameter in policy.parameters()) == body + head


def test_a_tied_head_is_one_parameter_and_stays_so() -> None:
    policy = small(tied_head=True)
    for model in (policy, copy.deepcopy(policy), copy.deepcopy(policy).to(torch.float32)):
        assert model.head.weight is model.token_embedding.weight
        assert model.head.weight.data_ptr() == model.token_embedding.weight.data_ptr()
    untied = small(tied_head=False)
    assert untied.head.weight.data_ptr() != untied.token_embedding.weight.data_ptr()


def test_initial_weights_follow_gpt2_and_the_generator() -> None:
    policies = [
        CausalTransformer(50, 32, width=64, layers=2, generator=torch.Generator().manual_seed(seed))
        for seed in (5, 5, 6)
    ]
    flat = [torch.cat([p.detach().flatten() for p in policy.parameters()]) for policy in policies]
    assert torch.equal(flat[0], flat[1])
    assert not torch.equal(flat[0], flat[2])
    policy = policies[0]
    # 5 % is over four standard errors of a standard deviation estimated from 3,200 numbers or more.
    assert policy.token_embedding.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert policy.blocks[1].attention.qkv.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert policy.blocks[1].attention.output.weight.std().item() == pytest.approx(0.01, rel=0.05)
    assert policy.blocks[0].mlp[2].weight.std().item() == pytest.approx(0.01, rel=0.05)
    assert all((p == 0).all() for name, p in policy.named_parameters() if name.endswith("bias"))
    assert (policy.final_norm.weight == 1).all()
    # Small weights: the first policy is close to uniform, log 50 ± .1.
    logits = policy.logits(torch.zeros(1, 32, dtype=torch.int64))
    assert (logits.log_softmax(-1) + math.log(50)).abs().max() < 1.0


@pytest.mark.parametrize("tied_head", [False, True])
def test_gradient_agrees_with_finite_differences(tied_head: bool) -> None:
    policy, tokens = small(tied_head=tied_head), tokens_of(2, 6)
    mask = torch.arange(5).expand(2, 5) >= 2
    batch = Batch(tokens[:, :-1], tokens[:, 1:], mask, torch.zeros(2), torch.zeros(2, 5))
    policy.log_prob(batch).sum().backward()
    generator = torch.Generator().manual_seed(3)
    step = 1e-5
    for name, parameter in policy.named_parameters():
        direction = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        values = []
        with torch.no_grad():
            for sign in (1, -1):
                parameter += sign * step * direction
                values.append(policy.log_prob(batch).sum().item())
                parameter -= sign * step * direction
        # central differences: error step² · third derivative, plus rounding 1e-15 / step
        slope = (values[0] - values[1]) / (2 * step)
        assert (parameter.grad * direction).sum().item() == pytest.approx(slope, rel=1e-6, abs=1e-7), name


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")  # from inside torch.func.jvp
def test_functional_transforms_work_with_the_math_kernel() -> None:
    """Scores by vmap(grad) and directional derivatives by jvp, as `geometry.fisher` forms them."""
    policy, tokens = small(layers=1), tokens_of(3, 5)
    parameters = {name: p.detach() for name, p in policy.named_parameters()}

    def log_prob(values: dict[str, Tensor], row: Tensor) -> Tensor:
        logits = functional_call(policy, values, (row[None, :-1],))
        return logits.log_softmax(-1).gather(-1, row[None, 1:, None]).sum()

    with sdpa_kernel(SDPBackend.MATH):
        scores = vmap(grad(log_prob), (None, 0))(parameters, tokens)
        _, slopes = jvp(
            lambda values: torch.stack([log_prob(values, row) for row in tokens]),
            (parameters,),
            (parameters,),
        )
    for s, row in enumerate(tokens):
        policy.zero_grad()
        policy.logits(row[None, :-1]).log_softmax(-1).gather(-1, row[None, 1:, None]).sum().backward()
        for name, parameter in policy.named_parameters():
            torch.testing.assert_close(scores[name][s], parameter.grad, rtol=1e-9, atol=1e-11)
        expected = sum((p.grad * p).sum() for p in policy.parameters())
        assert slopes[s].item() == pytest.approx(expected.item(), rel=1e-9, abs=1e-11)


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
    def test_sizes(self) -> None:
        with pytest.raises(ValueError, match="layers: expected a finite number >= 1, got 0"):
            CausalTransformer(VOCABULARY, CONTEXT, layers=0)
        with pytest.raises(ValueError, match="heads: expected a divisor of width=10, got 4"):
            CausalTransformer(VOCABULARY, CONTEXT, width=10)

    def test_observations(self) -> None:
        policy = small()
        with pytest.raises(ValueError, match=r"observations: expected shape \(S T\), got \(3,\)"):
            policy.logits(torch.zeros(3, dtype=torch.int64))
        with pytest.raises(TypeError, match=r"observations: expected an int64 tensor, got torch\.float32"):
            policy.logits(torch.zeros(3, 2))
        with pytest.raises(ValueError, match="observations: expected at least one entry"):
            policy.logits(torch.zeros(3, 0, dtype=torch.int64))
        with pytest.raises(ValueError, match="observations: expected T <= context_length=16, got T=17"):
            policy.logits(torch.zeros(1, 17, dtype=torch.int64))

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
            ({"temperature": -1.0}, ValueError, "temperature: expected a finite number >= 0, got -1"),
            ({"end_token": 7}, ValueError, "end_token: expected a token from 0 to 6, got 7"),
            ({"pad_token": -1}, ValueError, "pad_token: expected a token from 0 to 6, got -1"),
        ],
    )
    def test_sampling(self, changes: dict[str, object], error: type[Exception], message: str) -> None:
        arguments = {"prompts": torch.zeros(2, 3, dtype=torch.int64), "max_new_tokens": 2}
        with pytest.raises(error, match=message):
            small().sample(**(arguments | changes))
