"""What may happen inside of a block, or when it ends, and leaves nothing behind."""

import gc
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn as nn
from against_autograd import (
    WIDTH,
    A,
    Given,
    S,
    T,
    X,
    assert_clean,
    assert_exact,
    autograd_gradients,
    engine_gradients,
    perceptron,
    score,
)
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from isopo_mini import engine
from isopo_mini.engine import NTK, FisherNormalized, Isopo
from isopo_mini.engine.fallback import Fallback

# --- Compiled inside of the block, kept afterwards ----------------------------------------------------------------


@pytest.fixture
def _compiler_not_loaded(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As in a process that has compiled nothing yet."""
    torch.compile(nn.Identity(), backend="eager")
    without = SimpleNamespace(modules={name: None for name in sys.modules if name != "torch._dynamo"})
    monkeypatch.setattr("isopo_mini.engine.places.sys", without)
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("_compiler_not_loaded")
@pytest.mark.parametrize("in_place", [False, True])
def test_a_model_that_is_compiled_inside_of_the_block(in_place: bool) -> None:
    model, compile = perceptron(), torch.compile
    expected = autograd_gradients(model, lambda: score(model(X)))

    def compiled() -> Tensor:
        if in_place:
            model.compile(backend="eager")
            return score(model(X))
        return score(torch.compile(model, backend="eager")(X))

    assert_exact(engine_gradients(model, compiled), expected)
    assert torch.compile is compile


def test_a_block_is_no_cycle_of_references() -> None:
    """0.4 MB a step before, for as long as the collector does not come by."""
    model = nn.Sequential(nn.Embedding(9, WIDTH), nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH))
    tokens, isopo = torch.randint(9, (S, T)), Isopo(model, NTK(1.0))

    def step() -> None:
        model.zero_grad()
        with isopo.microbatch(A.float()):
            score(model(tokens)).sum().backward()
        isopo.end_step()
        engine.gram_matrices(model, lambda: score(model(tokens)))

    step()
    gc.collect()
    gc.disable()
    gc.set_debug(gc.DEBUG_SAVEALL)  # keeps what only the collector could free
    try:
        step()
        gc.collect()
        kinds = [type(found) for found in gc.garbage]
        # A compiler that an earlier test has loaded leaves cycles of its own, with tensors of its own kind.
        assert [kind for kind in kinds if kind is Tensor or kind.__module__.startswith("isopo_mini")] == []
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()


# --- Parameters and tokens ----------------------------------------------------------------------------------------


def test_states_that_are_assigned_inside_of_a_block_are_named() -> None:
    for replace in (
        lambda model, state: model.load_state_dict(state, assign=True),
        lambda model, state: setattr(model[0].weight, "data", state["0.weight"]),
    ):
        model = perceptron()
        state = {name: 2 * value for name, value in model.state_dict().items()}
        with (
            pytest.raises(RuntimeError, match=r"^parameter '0\.weight': expected the same parameter until"),
            Isopo(model, Given()).microbatch(A),
        ):
            replace(model, state)
        assert_clean(model)
        assert_exact({"0.weight": model[0].weight.detach()}, {"0.weight": state["0.weight"]})


@pytest.mark.parametrize("gram", ["dense", "ghost", "sketched", "signs"])
@pytest.mark.parametrize("transform", [NTK(0.3), FisherNormalized("token")], ids=str)
def test_tokens_of_32_bits(transform: Any, gram: str) -> None:
    model, tokens = nn.Sequential(nn.Embedding(9, WIDTH), nn.Linear(WIDTH, 9)).double(), torch.randint(9, (S, T))
    found = []
    for indices in (tokens.int(), tokens):
        model.zero_grad()
        with Isopo(model, transform, gram=gram, sketch_size=2).microbatch(A):
            score(model(indices)).sum().backward()
        found.append({name: parameter.grad for name, parameter in model.named_parameters()})
    assert_exact(*found)


def test_tensors_without_values_are_named() -> None:
    model = nn.Linear(WIDTH, WIDTH, device="meta")
    with pytest.raises(ValueError, match=r"^parameter 'weight': expected values, got a tensor on the meta device; .*"):
        Isopo(model, NTK(1.0)).microbatch(A.float()).__enter__()
    with pytest.raises(ValueError, match=r"^advantages: expected numbers, got a tensor on the meta device"):
        Isopo(model, NTK(1.0)).microbatch(torch.ones(S, device="meta")).__enter__()
    assert_clean(model)


def test_views_without_gradient() -> None:
    model = nn.Linear(WIDTH, WIDTH).double()
    for without in (torch.no_grad, torch.inference_mode):
        with Isopo(model, Given()).microbatch(A), without():
            assert torch.equal(X @ model.weight.T + model.bias, X @ model.weight.t() + model.bias)
            assert model.weight[0:1].shape == (1, WIDTH)


def test_gram_matrices_with_checkpoints() -> None:
    model = perceptron()
    plain = engine.gram_matrices(model, lambda: score(model[2](torch.tanh(model[0](model[2](X))))))

    def recomputed() -> Tensor:
        return score(checkpoint(model, checkpoint(model[2], X, use_reentrant=False), use_reentrant=False))

    torch.testing.assert_close(engine.gram_matrices(model, recomputed), plain, rtol=1e-12, atol=1e-13)
    with pytest.raises(RuntimeError, match=r"^log_probs: .* got a checkpoint .* use_reentrant=False$"):
        engine.gram_matrices(model, lambda: score(checkpoint(model[2], model[0](X), use_reentrant=True)))


def test_a_parameters_form_is_asked_for_without_the_fallback(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shape, dtype and their like inside of a block are the parameter's, and no function that no handler knows."""
    layer = nn.Linear(3, 2).double()
    outside = [layer.weight.shape, layer.weight.dtype, layer.weight.device, layer.weight.ndim, layer.weight.size(1)]

    def refuse(*_: Any) -> None:
        raise AssertionError("the fallback was asked")

    monkeypatch.setattr(Fallback, "__call__", refuse)
    with Isopo(layer, NTK()).microbatch(torch.ones(4, dtype=torch.float64)):
        weight = layer.weight
        inside = [weight.shape, weight.dtype, weight.device, weight.ndim, weight.size(1)]
        with pytest.raises(AssertionError, match="the fallback was asked"):
            weight.sin()
    assert inside == outside
