"""What the engine sees of shards, and what it refuses: FSDP2 in a group of one process."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

from isopo_mini.engine import NTK, Isopo, UnhandledParameterError, gram_matrices, verify

WIDTH, ACTIONS = 4, 5
TOKENS, A = torch.randint(ACTIONS, (3, 6), generator=torch.manual_seed(1)), torch.randn(3).double()


class Block(nn.Module):
    """x + tanh(Wx + b)."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.linear(x))


class Model(nn.Module):
    """Two blocks between an embedding and a head. The second is given `(S·T, d)`, as a router might."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(ACTIONS, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(WIDTH, ACTIONS)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.blocks[0](self.embedding(tokens))
        x = self.blocks[1](x.flatten(0, 1)).unflatten(0, tokens.shape)
        return self.head(x).log_softmax(-1)[..., 0].sum(dim=1)

    def other(self, tokens: Tensor) -> Tensor:
        """The same by another name."""
        return self.forward(tokens)


@pytest.fixture(autouse=True)
def group(tmp_path: Path) -> Iterator[None]:
    """This process alone."""
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "meeting"), 1), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def make() -> Model:
    torch.manual_seed(0)
    return Model().double()


def sharded() -> Model:
    model = make()
    for block in model.blocks:
        fully_shard(block)
    return fully_shard(model)


def gradients(model: nn.Module, layers: str = "separate") -> dict[str, Tensor | None]:
    with Isopo(model, NTK(0.3), layers=layers).microbatch(A):
        model(TOKENS).sum().backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    return {name: grad.full_tensor() if isinstance(grad, DTensor) else grad for name, grad in found.items()}


def test_rows_keep_their_sequences_where_fsdp_hands_them_over() -> None:
    torch.testing.assert_close(gradients(sharded()), gradients(make()), rtol=1e-10, atol=1e-12)


def test_all_layers_may_be_one_where_they_are_gathered_together() -> None:
    model = fully_shard(make())
    torch.testing.assert_close(gradients(model, "together"), gradients(make(), "together"), rtol=1e-10, atol=1e-12)


def test_layers_that_are_gathered_one_by_one_cannot_be_one() -> None:
    with pytest.raises(ValueError, match=r"layers: expected 'separate' with 3 modules .* got 'together'"):
        gradients(sharded(), "together")


def test_gram_matrices_and_verify_work() -> None:
    model = sharded()
    found, expected = (gram_matrices(each, lambda each=each: each(TOKENS)) for each in (model, make()))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    errors = verify(model, lambda n: model(TOKENS[:n]), 3, loss=lambda n: -model(TOKENS[:n]).sum())
    assert set(errors) == set(dict(model.named_parameters()))
    assert max(errors.values()) < 1e-14
    assert all(parameter.grad is None for parameter in model.parameters())
    torch.testing.assert_close(gradients(model), gradients(make()), rtol=1e-10, atol=1e-12)  # and leave nothing behind


def test_verify_finds_what_is_wrong_in_a_sharded_model() -> None:
    model = sharded()
    with pytest.raises(ValueError, match=r"expected autograd's gradient with S=3.*'embedding.weight'"):
        verify(model, lambda n: model(TOKENS[:n].flip(0)).flip(0), 3)


def test_a_use_outside_of_forward_is_named() -> None:
    model = sharded()
    isopo = Isopo(model, NTK(0.3))
    said = r"parameter 'embedding.weight': expected a use while FSDP2 has gathered .* register_fsdp_forward_method"
    with pytest.raises(ValueError, match=said), isopo.microbatch(A):
        model.other(TOKENS)
    with pytest.raises(ValueError, match=said), isopo.microbatch(A), torch.no_grad():
        model.other(TOKENS)
    register_fsdp_forward_method(model, "other")
    with isopo.microbatch(A):
        model.other(TOKENS).sum().backward()
    assert model.head.weight.grad.full_tensor().any()


def test_between_its_uses_a_parameter_can_be_looked_at() -> None:
    model = sharded()
    norm = make().head.weight.norm()
    with Isopo(model, NTK(0.3)).microbatch(A):
        weight = model.head.weight
        assert (weight.shape, weight.dtype, weight.requires_grad) == ((ACTIONS, WIDTH), torch.float64, True)
        with torch.no_grad():
            torch.testing.assert_close(weight.norm().full_tensor(), norm)
        # Gradients would go to the shard, or memory be read that is not there.
        uses = (Tensor.square, Tensor.float, Tensor.contiguous, lambda w: w[0], lambda w: w @ w.T, lambda w: 1 + w)
        for use in uses:
            with pytest.raises(ValueError, match=r"parameter 'head.weight': expected a use while FSDP2 has gathered"):
                use(weight)


class Scaled(nn.Module):
    """Something that is computed from a parameter, for another module."""

    def __init__(self) -> None:
        super().__init__()
        self.log_gain = nn.Parameter(torch.zeros(ACTIONS).double())

    def forward(self) -> Tensor:
        return self.log_gain.exp()


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module")  # the value is a view, which nobody changes
def test_what_was_computed_from_a_parameter_is_used_before_it_goes() -> None:
    model = nn.ModuleDict({"gain": Scaled(), "model": make()})
    fully_shard(model["gain"], reshard_after_forward=True)
    with Isopo(model, NTK(0.3)).microbatch(A):
        gain = model["gain"]()
        with pytest.raises(ValueError, match=r"parameter 'gain.log_gain': expected a use while FSDP2 has gathered"):
            model["model"].embedding(TOKENS)[..., :1] * gain


@pytest.mark.parametrize("way", ["function", "dictionary"])
def test_a_gradient_past_the_engine_is_refused(way: str) -> None:
    class Product(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x: Tensor, weight: Tensor) -> Tensor:
            ctx.save_for_backward(x, weight)
            return x @ weight.T

        @staticmethod
        def backward(ctx, gradients: Tensor) -> tuple[Tensor, Tensor]:
            x, weight = ctx.saved_tensors
            return gradients @ weight, torch.einsum("sto,sti->oi", gradients, x)

    model = sharded()
    linear = model.blocks[0].linear
    linear.forward = {
        "function": lambda x: Product.apply(x, linear.weight) + linear.bias,
        "dictionary": lambda x: F.linear(x, linear._parameters["weight"], linear.bias),
    }[way]
    with pytest.raises(UnhandledParameterError, match=r"parameter 'blocks.0.linear.weight'"):
        gradients(model)


def test_a_shard_that_nobody_gathers_is_refused() -> None:
    inner = fully_shard(nn.Sequential(make()))[0]
    split = parallelize_module(nn.Sequential(nn.Linear(4, 4)), init_device_mesh("cpu", (1,)), {"0": ColwiseParallel()})
    for model, name in ((inner, "embedding.weight"), (split, "0.weight")):
        said = rf"parameter '{name}': expected all of it, or a part that fully_shard has made, got a DTensor"
        with pytest.raises(ValueError, match=said), Isopo(model, NTK(0.3)).microbatch(A):
            pass


def test_a_block_without_a_backward_pass_leaves_the_model_as_it_was() -> None:
    model = sharded()
    isopo = Isopo(model, NTK(0.3))
    with isopo.microbatch(A):
        model(TOKENS)
    with pytest.raises(ZeroDivisionError), isopo.microbatch(A):
        model(TOKENS) / (1 // 0)
    assert not any("weight" in module.__dict__ for module in model.modules())
    torch.testing.assert_close(gradients(model), gradients(make()), rtol=1e-10, atol=1e-12)


def test_a_parameter_that_is_thawed_later_takes_part() -> None:
    model, plain = sharded(), make()
    for each in (model, plain):
        each.head.requires_grad_(False)
        assert gradients(each)["head.weight"] is None
        each.zero_grad()
        each.head.requires_grad_(True)
    torch.testing.assert_close(gradients(model), gradients(plain), rtol=1e-10, atol=1e-12)
