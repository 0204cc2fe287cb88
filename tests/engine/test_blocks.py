"""A block-diagonal K in one pass is the loop over microbatches: for every transform and path. What is refused."""

from typing import Any

import pytest
import torch
import torch.nn as nn
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from isopo_mini.engine import NTK, FisherNormalized, Isopo, LayerScaled
from isopo_mini.engine.layer_gradients import LayerGeometry
from isopo_mini.engine.moving_averages import MovingAverages
from isopo_mini.geometry.isopo import ntk_coefficients
from isopo_mini.policies.transformer import CausalTransformer

SEQUENCES, POSITIONS, WORDS = 6, 5, 7
TRANSFORMS = {
    "NTK": NTK(0.3),
    "NTK natural": NTK(0.3, "natural"),
    "NTK below rounding": NTK(1e-9),
    "NTK with spectra": NTK(0.3, spectra=True),
    "Fisher": FisherNormalized(),
    "Fisher natural": FisherNormalized(strength=0.1, scale="natural"),
    "Fisher tokens": FisherNormalized("token"),
    "layer scaled": LayerScaled(),
}


def make_policy(dtype: torch.dtype = torch.float64) -> CausalTransformer:
    torch.manual_seed(1)
    return CausalTransformer(WORDS, 8, width=8, layers=1, heads=2).to(dtype)


def make_data(seed: int = 2, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, WORDS, (SEQUENCES, POSITIONS), generator=generator)
    return tokens, torch.randn(SEQUENCES, dtype=dtype, generator=generator)


def log_prob(policy: nn.Module, tokens: Tensor) -> Tensor:
    return policy(tokens[:, :-1]).log_softmax(-1).gather(-1, tokens[:, 1:, None]).sum(dim=(1, 2))


def steps(engine: Isopo, size: int, looped: bool, scale: float = 1.0) -> list[Tensor]:
    """Gradients of two steps on two batches, with the moving averages going on."""
    policy, found = engine.model, []
    for seed in range(2):
        tokens, advantages = make_data(seed, next(policy.parameters()).dtype)
        policy.zero_grad()
        parts = torch.arange(SEQUENCES).split(size) if looped else [torch.arange(SEQUENCES)]
        for part in parts:
            with engine.microbatch(advantages[part], loss_scale=scale, block_size=None if looped else size):
                (scale * log_prob(policy, tokens[part]).sum()).backward()
        engine.end_step()
        found.append(nn.utils.parameters_to_vector([p.grad for p in policy.parameters()]) / scale)
    return found


@pytest.mark.parametrize("size", [1, 2, 4, 5, 6, 40])
@pytest.mark.parametrize("name", TRANSFORMS)
def test_equals_the_loop_over_microbatches(name: str, size: int) -> None:
    loop, blocks = (steps(Isopo(make_policy(), TRANSFORMS[name]), size, looped) for looped in (True, False))
    torch.testing.assert_close(blocks, loop, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("options", [{"gram": "dense"}, {"gram": "ghost"}, {"layers": "together"}, {"gram_bytes": 0}])
@pytest.mark.parametrize("name", ["NTK", "NTK natural", "Fisher"])
def test_equals_the_loop_on_every_path(name: str, options: dict[str, Any]) -> None:
    loop, blocks = (
        steps(Isopo(make_policy(), TRANSFORMS[name], **options), 3, looped, scale=2.0**10) for looped in (True, False)
    )
    torch.testing.assert_close(blocks, loop, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("gram", ["sketched", "signs"])
def test_a_sketch_that_is_as_long_as_the_gradients_is_exact(gram: str) -> None:
    exact = steps(Isopo(make_policy(), NTK(0.3, "natural")), 3, looped=True)
    found = steps(Isopo(make_policy(), NTK(0.3, "natural"), gram=gram, sketch_size=64), 3, looped=False)
    torch.testing.assert_close(found, exact, rtol=1e-9, atol=1e-11)


class Recorded:
    """Plain advantages; keeps every layer's K."""

    def __init__(self) -> None:
        self.grams: list[Tensor] = []

    def coefficients(self, layer: LayerGeometry, advantages: Tensor, averages: MovingAverages) -> Tensor:
        self.grams.append(layer.gram())
        return advantages


@pytest.mark.parametrize("gram", ["sketched", "signs"])
def test_blocks_of_a_short_sketch_are_those_on_the_diagonal(gram: str) -> None:
    policy, (tokens, advantages), recorded = make_policy(), make_data(), Recorded()
    options: dict[str, Any] = {"gram": gram, "sketch_size": 4, "decay": 0.0}
    with Isopo(policy, recorded, **options).microbatch(advantages):
        log_prob(policy, tokens).sum().backward()
    with Isopo(policy, NTK(0.3), **options).microbatch(advantages, block_size=3) as microbatch:
        log_prob(policy, tokens).sum().backward()
    assert len(recorded.grams) == len(microbatch.coefficients)
    for whole, found in zip(recorded.grams, microbatch.coefficients.values(), strict=True):
        for place in torch.arange(SEQUENCES).split(3):
            block = whole[place][:, place]
            expected = ntk_coefficients(block, advantages[place], 0.3 * block.trace() / 3)
            torch.testing.assert_close(found[place], expected, rtol=1e-9, atol=1e-11)


def test_in_single_precision_and_half() -> None:
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.bfloat16, 0.1)):
        loop, blocks = (steps(Isopo(make_policy(dtype), NTK(1.0)), 3, looped) for looped in (True, False))
        for one, other in zip(loop, blocks, strict=True):
            assert (one - other).norm() < tolerance * one.norm()


def test_padding_that_tokens_must_not_be_drawn_from() -> None:
    """The mask is cut with the sequences."""
    tokens, advantages = make_data()
    mask = torch.ones(SEQUENCES, POSITIONS - 1, dtype=torch.bool)
    mask[::2, 3:] = False
    transform, found = FisherNormalized("token-unscaled"), []
    for size, looped in ((3, True), (3, False)):
        policy = make_policy()
        engine = Isopo(policy, transform)
        for part in torch.arange(SEQUENCES).split(size if looped else SEQUENCES):
            with engine.microbatch(advantages[part], mask[part], block_size=None if looped else size):
                log_prob(policy, tokens[part]).sum().backward()
        found.append(nn.utils.parameters_to_vector([p.grad for p in policy.parameters()]))
    torch.testing.assert_close(found[1], found[0], rtol=1e-9, atol=1e-11)


def test_a_sequence_whose_gradient_is_rounding_alone() -> None:
    """Blocks without any gradient get a step of zero in the natural scale, as microbatches do."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).double()
    inputs = torch.randn(6, 5, 3, dtype=torch.float64)
    sign = torch.ones(6, 1, dtype=torch.float64)
    sign[:2] = 0.0
    found = []
    for size, parts in ((None, torch.arange(6).split(2)), (2, [torch.arange(6)])):
        model.zero_grad()
        engine = Isopo(model, NTK(1.0, "natural"), decay=0.0)
        for part in parts:
            with engine.microbatch(torch.ones(len(part), dtype=torch.float64), block_size=size):
                (model(inputs[part])[..., 0] * sign[part]).sum().backward()
        found.append(nn.utils.parameters_to_vector([p.grad for p in model.parameters()]))
    assert found[1].isfinite().all()
    torch.testing.assert_close(found[1], found[0], rtol=1e-9, atol=1e-11)


def test_of_recomputed_activations_and_packed_rows() -> None:
    """What the engine does for whole microbatches it does for blocks."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2)).double()
    rows, owner = torch.randn(1, 30, 3, dtype=torch.float64), torch.arange(6).repeat_interleave(5)[None]
    advantages = torch.randn(6, dtype=torch.float64)

    def gradient(engine: Isopo, packed: bool, looped: bool) -> Tensor:
        model.zero_grad()
        for part in torch.arange(6).split(2) if looped else [torch.arange(6)]:
            inputs = rows[:, torch.isin(owner[0], part)] if packed else rows.view(6, 5, 3)[part]
            segments = {"segments": owner[:, : inputs.shape[1]]} if packed else {}
            with engine.microbatch(advantages[part], block_size=None if looped else 2, **segments):
                outputs = inputs
                for layer in model:
                    outputs = checkpoint(layer, outputs, use_reentrant=False)
                outputs.log_softmax(-1)[..., 0].sum().backward()
        return nn.utils.parameters_to_vector([parameter.grad for parameter in model.parameters()])

    expected = gradient(Isopo(model, NTK(0.3)), packed=False, looped=True)
    for packed, looped in ((False, False), (True, True), (True, False)):
        torch.testing.assert_close(gradient(Isopo(model, NTK(0.3)), packed, looped), expected, rtol=1e-9, atol=1e-11)


def test_coefficients_are_told_for_all_sequences() -> None:
    policy, (tokens, advantages) = make_policy(), make_data()
    with Isopo(policy, NTK(0.3)).microbatch(advantages, block_size=5) as microbatch:
        log_prob(policy, tokens).sum().backward()
    assert all(coefficients.shape == (SEQUENCES,) for coefficients in microbatch.coefficients.values())


def test_bad_sizes() -> None:
    policy, (_, advantages) = make_policy(), make_data()
    with (
        pytest.raises(ValueError, match="block_size: expected a finite number >= 1, got 0"),
        Isopo(policy, NTK(0.3)).microbatch(advantages, block_size=0),
    ):
        pass
