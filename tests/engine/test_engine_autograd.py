"""What PyTorch builds on autograd works with the engine inside, and what it cannot handle is a named error."""

import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from isopo_mini import engine
from isopo_mini.engine import NTK, FisherNormalized, Isopo, UnhandledParameterError
from isopo_mini.engine.stand_in import HANDLERS
from isopo_mini.policies.transformer import CausalTransformer

SEQUENCES, POSITIONS, WORDS = 6, 5, 7
BOTH = pytest.mark.parametrize("transform", [NTK(0.3), FisherNormalized()], ids=["NTK", "Fisher"])


def make_policy(dtype: torch.dtype = torch.float64, **options: Any) -> CausalTransformer:
    torch.manual_seed(1)
    return CausalTransformer(WORDS, 8, width=8, layers=2, heads=2, **options).to(dtype)


def make_data(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randint(0, WORDS, (SEQUENCES, POSITIONS), generator=generator)
    return tokens, torch.randn(SEQUENCES, dtype=dtype, generator=generator)


def log_prob(policy: nn.Module, tokens: Tensor) -> Tensor:
    """Σ_t log π(y_t | y_<t), one a sequence."""
    return policy(tokens[:, :-1]).log_softmax(-1).gather(-1, tokens[:, 1:, None]).sum(dim=(1, 2))


def gradients(policy: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.grad.clone() for name, parameter in policy.named_parameters() if parameter.grad is not None}


def isopo_gradients(policy: nn.Module, isopo: Isopo, tokens: Tensor, advantages: Tensor) -> dict[str, Tensor]:
    policy.zero_grad()
    with isopo.microbatch(advantages):
        log_prob(policy, tokens).sum().backward()
    return gradients(policy)


def reinforce_gradients(policy: nn.Module, tokens: Tensor, advantages: Tensor) -> dict[str, Tensor]:
    policy.zero_grad()
    (log_prob(policy, tokens) * advantages).sum().backward()
    return gradients(policy)


def assert_equal(first: dict[str, Tensor], second: dict[str, Tensor], tolerance: float) -> None:
    """Relative error of the whole gradient, and the same parameters."""
    assert first.keys() == second.keys()
    error = torch.stack([(first[name] - second[name]).norm() for name in first]).norm()
    assert error <= tolerance * torch.stack([value.norm() for value in second.values()]).norm()


# --- Limits ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gram", ["dense", "ghost", "sketched", "signs"])
def test_large_damping_is_reinforce(gram: str) -> None:
    policy = make_policy(tied_head=True)
    tokens, advantages = make_data()
    isopo = Isopo(policy, NTK(1e8), gram=gram, sketch_size=4)
    assert_equal(
        isopo_gradients(policy, isopo, tokens, advantages), reinforce_gradients(policy, tokens, advantages), 1e-6
    )


def test_large_damping_is_reinforce_in_single_precision() -> None:
    policy = make_policy(torch.float32)
    tokens, advantages = make_data(torch.float32)
    isopo = Isopo(policy, NTK(1e8))
    assert_equal(
        isopo_gradients(policy, isopo, tokens, advantages), reinforce_gradients(policy, tokens, advantages), 1e-6
    )


@BOTH
def test_zero_advantages_are_fine(transform: Any) -> None:
    policy = make_policy()
    tokens, advantages = make_data()
    result = isopo_gradients(policy, Isopo(policy, transform), tokens, torch.zeros_like(advantages))
    assert result.keys() == dict(policy.named_parameters()).keys()
    assert all(torch.equal(value, torch.zeros_like(value)) for value in result.values())


@BOTH
def test_identical_sequences_and_one_sequence_alone(transform: Any) -> None:
    policy = make_policy()
    tokens, _ = make_data()
    for batch in (tokens[:1].expand(4, -1), tokens[:1]):
        result = isopo_gradients(policy, Isopo(policy, transform), batch, torch.ones(len(batch)).double())
        assert all(torch.isfinite(value).all() for value in result.values())
        assert max(float(value.norm()) for value in result.values()) > 0


# --- Invariances -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("transform", [NTK(0.3), FisherNormalized(), FisherNormalized("token")], ids=str)
@pytest.mark.parametrize("gram", ["dense", "ghost", "sketched", "signs"])
def test_the_order_of_sequences_does_not_matter(transform: Any, gram: str) -> None:
    policy = make_policy()
    tokens, advantages = make_data()
    order = torch.randperm(SEQUENCES)

    def result(tokens: Tensor, advantages: Tensor) -> dict[str, Tensor]:
        isopo = Isopo(policy, transform, gram=gram, sketch_size=4, seed=3)  # the same sketch both times
        return isopo_gradients(policy, isopo, tokens, advantages)

    assert_equal(result(tokens[order], advantages[order]), result(tokens, advantages), 1e-12)


@pytest.mark.parametrize("transform", [NTK(0.3), FisherNormalized(), FisherNormalized("token")], ids=str)
@pytest.mark.parametrize("gram", ["dense", "ghost", "sketched", "signs"])
def test_padding_does_not_matter(transform: Any, gram: str) -> None:
    """Three more positions of padding on the right, masked out of the loss: the same gradient."""
    policy = make_policy()
    tokens, advantages = make_data()
    padded = torch.cat([tokens, torch.zeros(SEQUENCES, 3, dtype=torch.int64)], dim=1)

    def result(tokens: Tensor) -> dict[str, Tensor]:
        mask = torch.zeros(SEQUENCES, tokens.shape[1] - 1, dtype=torch.bool)
        mask[:, : POSITIONS - 1] = True
        policy.zero_grad()
        isopo = Isopo(policy, transform, gram=gram, sketch_size=4, seed=3)
        with isopo.microbatch(advantages, mask):
            log_probs = policy(tokens[:, :-1]).log_softmax(-1).gather(-1, tokens[:, 1:, None])[..., 0]
            log_probs.masked_fill(~mask, 0.0).sum().backward()
        return gradients(policy)

    assert_equal(result(padded), result(tokens), 1e-12)


def test_the_sign_of_the_loss_carries_through() -> None:
    """Differentiate minus the log-probabilities, as optimizers want it: minus the gradient."""
    policy = make_policy()
    tokens, advantages = make_data()
    plus = isopo_gradients(policy, Isopo(policy, NTK(0.3)), tokens, advantages)
    policy.zero_grad()
    with Isopo(policy, NTK(0.3)).microbatch(advantages):
        (-log_prob(policy, tokens).sum()).backward()
    assert_equal({name: -value for name, value in gradients(policy).items()}, plus, 1e-14)


# --- What is built on autograd ---------------------------------------------------------------------------------------


@BOTH
def test_gradient_accumulation_over_microbatches(transform: Any) -> None:
    """Two microbatches into one `.grad` are the sum of two separate ones. Their order does not matter."""
    policy = make_policy()
    tokens, advantages = make_data()
    halves = [(tokens[:3], advantages[:3]), (tokens[3:], advantages[3:])]

    def accumulated(parts: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
        isopo = Isopo(policy, transform)
        policy.zero_grad()
        for part, part_advantages in parts:
            with isopo.microbatch(part_advantages):
                log_prob(policy, part).sum().backward()
        return gradients(policy)

    separate = [isopo_gradients(policy, Isopo(policy, transform), *half) for half in halves]
    summed = {name: separate[0][name] + separate[1][name] for name in separate[0]}
    assert_equal(accumulated(halves), summed, 1e-12)
    assert_equal(accumulated(halves[::-1]), summed, 1e-12)
    # The microbatch is the unit: the whole batch at once is another gradient, except for REINFORCE.
    whole = isopo_gradients(policy, Isopo(policy, transform), tokens, advantages)
    with pytest.raises(AssertionError):
        assert_equal(whole, summed, 1e-3)


def test_the_averages_move_between_steps_and_not_within() -> None:
    policy = make_policy()
    tokens, advantages = make_data()
    isopo = Isopo(policy, NTK(0.3), decay=0.9)
    layer = next(iter(engine.layer_names(policy).values()))

    def eigenvalue(batch: Tensor) -> Tensor:
        grams = engine.gram_matrices(policy, lambda: log_prob(policy, batch))
        return grams[layer].diagonal().mean()

    first, second = eigenvalue(tokens[:3]), eigenvalue(tokens[3:])
    for part in (slice(0, 3), slice(3, 6)):
        isopo_gradients(policy, isopo, tokens[part], advantages[part])
    assert isopo.state_dict() == {}
    isopo.end_step()
    mean = (first + second) / 2
    torch.testing.assert_close(isopo.state_dict()[f"{layer}/eigenvalue"], mean)
    isopo_gradients(policy, isopo, tokens[:3], advantages[:3])
    isopo.end_step()
    torch.testing.assert_close(isopo.state_dict()[f"{layer}/eigenvalue"], 0.9 * mean + 0.1 * first)
    # Saved and loaded, the next step is the same.
    copy = Isopo(policy, NTK(0.3), decay=0.9)
    copy.load_state_dict(isopo.state_dict())
    result = isopo_gradients(policy, copy, tokens, advantages)
    assert_equal(result, isopo_gradients(policy, isopo, tokens, advantages), 0.0)


@BOTH
def test_autocast(transform: Any) -> None:
    """bfloat16 in forward and backward, float32 in `.grad`, and the direction of full precision to a few percent."""
    policy = make_policy(torch.float32)
    tokens, advantages = make_data(torch.float32)
    full = isopo_gradients(policy, Isopo(policy, transform), tokens, advantages)
    policy.zero_grad()
    seen = []
    hook = policy.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16), Isopo(policy, transform).microbatch(advantages):
        log_prob(policy, tokens).sum().backward()
    hook.remove()
    assert seen == [torch.bfloat16]  # autocast did reach the engine's layers
    assert all(value.dtype == torch.float32 for value in gradients(policy).values())
    # bfloat16 keeps 8 bits: relative errors of a few times 2⁻⁸ through a dozen layers.
    assert_equal(gradients(policy), full, 0.05)


class Checkpointed(nn.Module):
    """The same transformer, its blocks recomputed inside the backward pass."""

    def __init__(self, policy: CausalTransformer, active: bool) -> None:
        super().__init__()
        self.policy = policy
        self.calls = 0
        if active:
            for block in policy.blocks:
                block.forward = self.recomputed(block.forward)  # type: ignore[method-assign]

    def recomputed(self, forward: Callable) -> Callable:
        def counted(*inputs: Tensor) -> Tensor:
            self.calls += 1
            return forward(*inputs)

        return lambda *inputs: checkpoint(counted, *inputs, use_reentrant=False)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.policy(tokens)


@BOTH
def test_activation_checkpointing(transform: Any) -> None:
    tokens, advantages = make_data()
    plain, recomputed = Checkpointed(make_policy(), False), Checkpointed(make_policy(), True)
    expected = isopo_gradients(plain, Isopo(plain, transform), tokens, advantages)
    result = isopo_gradients(recomputed, Isopo(recomputed, transform), tokens, advantages)
    assert recomputed.calls == 4  # two blocks, forward and again in backward
    assert_equal(result, expected, 1e-13)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def one_rank(rank: int, port: int, folder: str) -> None:
    """Each rank transforms its own microbatch; DDP averages the gradients."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    torch.set_num_threads(1)
    tokens, advantages = make_data()
    own = slice(3 * rank, 3 * rank + 3)
    for index, transform in enumerate((NTK(0.3), FisherNormalized())):
        policy = make_policy()
        parallel = nn.parallel.DistributedDataParallel(policy)
        for _ in range(2):  # a second step: the reducer is armed again
            result = isopo_gradients(parallel, Isopo(policy, transform), tokens[own], advantages[own])
        torch.save({name.removeprefix("module."): g for name, g in result.items()}, f"{folder}/{rank}-{index}.pt")
    torch.distributed.destroy_process_group()


def test_distributed_data_parallel(tmp_path: Path) -> None:
    mp.spawn(one_rank, args=(free_port(), str(tmp_path)), nprocs=2)
    tokens, advantages = make_data()
    for index, transform in enumerate((NTK(0.3), FisherNormalized())):
        policy = make_policy()
        parts = [
            isopo_gradients(policy, Isopo(policy, transform), tokens[part], advantages[part])
            for part in (slice(0, 3), slice(3, 6))
        ]
        mean = {name: (parts[0][name] + parts[1][name]) / 2 for name in parts[0]}
        for rank in (0, 1):
            assert_equal(torch.load(tmp_path / f"{rank}-{index}.pt", weights_only=True), mean, 1e-12)


def test_all_layers_together_share_one_set_of_coefficients() -> None:
    policy = make_policy()
    tokens, advantages = make_data()
    grams = engine.gram_matrices(policy, lambda: log_prob(policy, tokens))
    total = torch.stack(list(grams.values())).sum(dim=0)
    damping = 0.3 * total.diagonal().mean()
    identity = torch.eye(SEQUENCES).double()
    expected = damping * torch.linalg.solve(total + damping * identity, advantages)
    isopo = Isopo(policy, NTK(0.3), layers="together")
    with isopo.microbatch(advantages) as opened:
        log_prob(policy, tokens).sum().backward()
    (coefficients,) = opened.coefficients.values()
    torch.testing.assert_close(coefficients, expected, rtol=1e-10, atol=1e-12)
    assert_equal(gradients(policy), reinforce_gradients(policy, tokens, expected), 1e-10)


def test_gram_matrices_leave_grad_alone() -> None:
    policy = make_policy()
    tokens, _ = make_data()
    grams = engine.gram_matrices(policy, lambda: log_prob(policy, tokens))
    assert gradients(policy) == {}
    assert set(grams) == set(engine.layer_names(policy).values())


@pytest.mark.parametrize("gram", ["dense", "ghost"])
def test_the_weight_gradient_is_computed_once(gram: str) -> None:
    """Floating-point operations of a linear layer, counted: REINFORCE's, plus the inner products, plus nothing.

    A first layer has no input gradient, so REINFORCE is two products of S·T·o·i: forward and weight gradient.
    """
    s, t, o, i = 4, 50, 24, 16
    layer, inputs = nn.Linear(i, o, bias=False), torch.randn(s, t, i)
    advantages = torch.randn(s)

    def flops(run: Callable[[], None]) -> int:
        with FlopCounterMode(display=False) as counter:
            run()
        return counter.get_total_flops()

    reinforce = flops(lambda: (layer(inputs) * advantages[:, None, None]).sum().backward())
    assert reinforce == 2 * 2 * s * t * o * i

    def isopo_step() -> None:
        with Isopo(layer, NTK(1.0), gram=gram).microbatch(advantages):
            layer(inputs).sum().backward()

    extra = {
        "dense": 2 * s * s * o * i + 2 * s * o * i,  # K, and the weighted sum of the G_s that are there already
        "ghost": 2 * (s * t) ** 2 * (o + i),
    }
    assert flops(isopo_step) == reinforce + extra[gram]


# --- Errors ----------------------------------------------------------------------------------------------------------


class OwnLayer(nn.Module):
    """A layer that no handler knows."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 3)
        self.temperature = nn.Parameter(torch.ones(()))

    def forward(self, inputs: Tensor) -> Tensor:
        return self.inner(inputs) / self.temperature


def test_an_unhandled_use_is_named() -> None:
    model = OwnLayer()
    with (
        pytest.raises(
            UnhandledParameterError, match=r"parameter 'temperature': .* got (div|true_divide|__truediv__).*freeze"
        ),
        Isopo(model, NTK(1.0), copy_bytes=0).microbatch(torch.ones(2)),
    ):
        model(torch.randn(2, 3)).sum().backward()
    # The model is whole again, and frozen it works.
    assert isinstance(model.temperature, nn.Parameter)
    model.temperature.requires_grad_(False)
    with Isopo(model, NTK(1.0), copy_bytes=0).microbatch(torch.ones(2)):
        model(torch.randn(2, 3)).sum().backward()
    assert model.inner.weight.grad is not None


def test_a_parameter_that_bypasses_its_module_is_named() -> None:
    """A reference kept elsewhere escapes the stand-in. Its gradient is noticed on the way to `.grad`."""
    model = nn.Linear(3, 3)
    kept = model.weight
    with (
        pytest.raises(UnhandledParameterError, match=r"parameter 'weight': .* got a path that does not go through"),
        Isopo(model, NTK(1.0)).microbatch(torch.ones(2)),
    ):
        (model(torch.randn(2, 3)).sum() + kept.square().sum()).backward()


def test_a_registered_handler_is_used() -> None:
    """An instance norm as a gain and a shift of every channel: exact against the loop over sequences."""
    model = nn.InstanceNorm1d(2, affine=True).double()
    inputs, advantages = torch.randn(4, 2, 6).double(), torch.randn(4).double()

    def objective(part: Tensor) -> Tensor:
        return torch.tanh(model(part)).sum()

    with (
        pytest.raises(UnhandledParameterError, match=r"parameter 'weight': .* got instance_norm"),
        Isopo(model, NTK(0.5), copy_bytes=0).microbatch(advantages),
    ):
        objective(inputs).backward()

    @engine.register(F.instance_norm)
    def norm(input: Tensor, weight: Tensor, bias: Tensor, **rest: Any) -> Tensor:
        channels_last = F.instance_norm(input).transpose(1, 2)  # (S, T, channels)
        return engine.scale_and_shift(channels_last, weight, bias).transpose(1, 2)

    try:
        with Isopo(model, NTK(0.5), copy_bytes=0).microbatch(advantages):
            objective(inputs).backward()
    finally:
        del HANDLERS[F.instance_norm]
    computed = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])  # type: ignore[union-attr]
    scores = torch.stack(
        [
            torch.cat([g.flatten() for g in torch.autograd.grad(objective(part[None]), list(model.parameters()))])
            for part in inputs
        ]
    )
    gram = scores @ scores.T
    damping = 0.5 * gram.diagonal().mean()
    coefficients = damping * torch.linalg.solve(gram + damping * torch.eye(4).double(), advantages)
    torch.testing.assert_close(computed, scores.T @ coefficients, rtol=1e-10, atol=1e-12)


@pytest.mark.usefixtures("unchecked")
def test_errors_say_what_was_expected_and_what_came() -> None:
    model = nn.Linear(3, 2)
    with pytest.raises(
        ValueError, match=r"gram: expected one of auto, dense, ghost, sketched, signs, fast, got 'quick'"
    ):
        Isopo(model, NTK(1.0), gram="quick")
    with pytest.raises(ValueError, match=r"layers: expected one of separate, together, got 'all'"):
        Isopo(model, NTK(1.0), layers="all")
    with pytest.raises(ValueError, match=r"decay: expected a number in \[0, 1\), got 1.0"):
        Isopo(model, NTK(1.0), decay=1.0).averages("layer")
    isopo = Isopo(model, NTK(1.0))
    with (
        pytest.raises(ValueError, match=r"first axis is the S=2 sequences, got shape \(5, 3\)"),
        isopo.microbatch(torch.ones(2)),
    ):
        model(torch.randn(5, 3))
    with pytest.raises(ValueError, match=r"advantages: expected finite numbers, got inf at index \(1,\)"):
        isopo.microbatch(torch.tensor([1.0, float("inf")])).__enter__()
    with pytest.raises(ValueError, match=r"advantages: expected at least one entry"):
        isopo.microbatch(torch.ones(0)).__enter__()
    with (
        pytest.raises(RuntimeError, match=r"expected no other open microbatch of this model"),
        isopo.microbatch(torch.ones(2)),
    ):
        isopo.microbatch(torch.ones(2)).__enter__()
    assert "weight" not in model.__dict__  # closed again after each of these
    model.requires_grad_(False)
    with pytest.raises(ValueError, match=r"model: expected at least one trainable parameter, got none"):
        Isopo(model, NTK(1.0))


def test_without_gradient_the_model_is_itself() -> None:
    """Old log-probabilities may be computed inside an open microbatch; nothing of it reaches the gradient."""
    policy = make_policy()
    tokens, advantages = make_data()
    expected = isopo_gradients(policy, Isopo(policy, NTK(0.3)), tokens, advantages)
    policy.zero_grad()
    with Isopo(policy, NTK(0.3)).microbatch(advantages):
        with torch.no_grad():
            inside = log_prob(policy, tokens[:2])
        log_prob(policy, tokens).sum().backward()
    assert_equal(gradients(policy), expected, 0.0)
    torch.testing.assert_close(inside, log_prob(policy, tokens[:2]).detach(), rtol=0.0, atol=0.0)
