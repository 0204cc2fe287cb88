"""On a GPU the host queues work and goes on. What asks for a number waits until all of it is done, so nothing may ask.

Here every operation that hands a number, or a size that depends on numbers, to Python is caught, on the CPU as it would
be on a GPU. One is allowed: whether the advantages are finite, asked once a microbatch, before there is work.
"""

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from isopo_mini.engine import NTK, FisherNormalized, Isopo, LayerScaled, Transform, layer_gradients
from isopo_mini.policies import CausalTransformer

ASKS = {"_local_scalar_dense", "nonzero", "equal", "masked_select", "unique", "_unique2", "is_nonzero", "item"}


class Asked(TorchDispatchMode):
    """The operations inside of it that a host would wait for."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        by_mask = name in ("index", "index_put", "index_put_") and any(
            getattr(index, "dtype", None) == torch.bool for index in args[1]
        )
        if name in ASKS or by_mask:
            self.operations.append(name)
        return func(*args, **(kwargs or {}))


def asked_by(
    transform: Transform, gram: str, sequences: int = 6, layers: str = "separate", block_size: int | None = None
) -> list[str]:
    """What one step asks for, after a first one has made what is made once."""
    torch.manual_seed(0)
    policy = CausalTransformer(11, 5, width=16, layers=1, heads=2)
    tokens, advantages = torch.randint(0, 11, (sequences, 5)), torch.randn(sequences)
    engine = Isopo(policy, transform, gram=gram, sketch_size=4, layers=layers)

    def step() -> None:
        with engine.microbatch(advantages, block_size=block_size):
            policy.logits(tokens).log_softmax(-1)[..., 0].sum().backward()
        engine.end_step()

    step()
    with Asked() as asked:
        step()
    return asked.operations


@pytest.mark.parametrize("gram", ["dense", "ghost", "auto", "sketched", "signs", "fast"])
@pytest.mark.parametrize(
    "transform",
    [
        NTK(1.0),
        NTK(0.3, scale="natural"),
        FisherNormalized(strength=0.1),
        FisherNormalized(scale="natural"),
        LayerScaled(),
    ],
    ids=str,
)
def test_a_step_asks_only_whether_the_advantages_are_finite(transform: Transform, gram: str) -> None:
    assert asked_by(transform, gram) == ["_local_scalar_dense"]


@pytest.mark.parametrize("layers", ["separate", "together"])
def test_nor_do_many_sequences_or_one_layer(layers: str) -> None:
    assert asked_by(NTK(1.0, scale="natural"), "fast", sequences=300, layers=layers) == ["_local_scalar_dense"]


def test_nor_do_products_in_place_of_gram_matrices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither with all G_s nor with sketches: the paths that `"fast"` may choose, each taken in all layers."""
    asked_whether = []

    def pay(*_: int) -> bool:
        asked_whether.append(path)
        return True

    monkeypatch.setattr(layer_gradients, "products_pay", pay)
    for path in ("auto", "signs"):
        monkeypatch.setattr(layer_gradients.LayerGradients, "path", path)
        assert asked_by(NTK(1.0), "fast") == ["_local_scalar_dense"]
    assert set(asked_whether) == {"auto", "signs"}


@pytest.mark.parametrize("block_size", [2, 4])  # blocks of one size, and a shorter one at the end
@pytest.mark.parametrize("gram", ["auto", "signs"])
def test_nor_do_blocks(gram: str, block_size: int) -> None:
    asked = asked_by(NTK(1.0, scale="natural"), gram, block_size=block_size)
    assert asked == ["_local_scalar_dense"]


def test_the_token_norm_asks_where_its_tokens_are() -> None:
    """It draws among the positions of the mask, whose number only the mask knows: what its docstring warns of."""
    assert asked_by(FisherNormalized("token", tokens=7), "auto") == ["_local_scalar_dense", "nonzero"]


def test_the_catch_catches() -> None:
    with Asked() as asked:
        numbers = torch.randn(3)
        bool((numbers > 0).any())
        numbers[numbers > 0]
        numbers.sum().item()
    assert asked.operations == ["_local_scalar_dense", "index", "_local_scalar_dense"]
