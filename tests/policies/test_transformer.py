"""The transformer policy: its formulas, what it may see, its initial weights and its gradient."""

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
from isopo_mini.policies.transformer import CausalTransformer

VOCABULARY = 7
CONTEXT = 16


def small(seed: int = 0, dtype: torch.dtype = torch.float64, **options: object) -> CausalTransformer:
    """A tiny policy whose weights are blown up, so that attention and tokens matter."""
    generator = torch.Generator().manual_seed(seed)
    policy = CausalTransformer(VOCABULARY, CONTEXT, width=8, heads=2, generator=generator, **options)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
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
        CausalTransformer(50, 32, width=64, layers=3, generator=torch.Generator().manual_seed(seed))
        for seed in (5, 5, 6)
    ]
    flat = [torch.cat([p.detach().flatten() for p in policy.parameters()]) for policy in policies]
    assert torch.equal(flat[0], flat[1])
    assert not torch.equal(flat[0], flat[2])
    policy = policies[0]
    # 5 % is over four standard errors of a standard deviation estimated from 3,200 numbers or more.
    assert policy.token_embedding.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert policy.blocks[1].attention.qkv.weight.std().item() == pytest.approx(0.02, rel=0.05)
    residual = 0.02 / math.sqrt(6)  # two branches in each of three layers
    assert policy.blocks[1].attention.output.weight.std().item() == pytest.approx(residual, rel=0.05)
    assert policy.blocks[0].mlp[2].weight.std().item() == pytest.approx(residual, rel=0.05)
    assert all((p == 0).all() for name, p in policy.named_parameters() if name.endswith("bias"))
    assert (policy.final_norm.weight == 1).all()
    # Small weights: the first policy is close to uniform.
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
