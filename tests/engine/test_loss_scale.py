"""A loss that is multiplied by s: the same coefficients, and s times the gradient, at every s."""

from typing import Any

import pytest
import torch
import torch.nn as nn
from torch import Tensor
from torch.amp import GradScaler

from isopo_mini.engine import NTK, FisherNormalized, Isopo, LayerScaled
from isopo_mini.precision import at_least_float32

S, T = 5, 3
TRANSFORMS = {
    "NTK": NTK(0.3),
    "Fisher": FisherNormalized(),
    "Fisher, tokens": FisherNormalized("token"),
    "Fisher, tokens unscaled": FisherNormalized("token-unscaled"),
    "Fisher, three powers": FisherNormalized(gradient_power=0.5, ratio_power=0.3, strength=0.1),
    "NTK, natural": NTK(0.3, "natural"),
    "layer scaled": LayerScaled(),
    "Fisher, in the scale of the gradient": FisherNormalized(scale="gradient"),
    "Fisher, natural": FisherNormalized(scale="natural", strength=0.1),
}
EVERY_TRANSFORM = pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS.keys())


def make_model(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.LayerNorm(6), nn.Linear(6, 3)).to(dtype)


def make_data(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(S, T, 4, generator=generator).to(dtype), torch.randn(S, generator=generator).to(dtype)


def loss(model: nn.Module, inputs: Tensor) -> Tensor:
    return -at_least_float32(model(inputs)).log_softmax(-1)[..., 0].sum()


def flat_gradient(model: nn.Module) -> Tensor:
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])  # type: ignore[union-attr]


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def unscaled_step(transform: Any, gram: str = "auto", dtype: torch.dtype = torch.float32) -> tuple[Tensor, Any]:
    model, (inputs, advantages) = make_model(dtype), make_data(dtype)
    with Isopo(model, transform, gram=gram).microbatch(advantages) as opened:
        loss(model, inputs).backward()
    return flat_gradient(model), opened.coefficients


@pytest.mark.parametrize("scale", [2.0**-12, 1024.0, 65536.0, 2.0**24, 3.7])
@pytest.mark.parametrize("gram", ["dense", "ghost", "sketched", "signs"])
@EVERY_TRANSFORM
def test_the_recipe_of_a_grad_scaler_leaves_the_step_alone(transform: Any, gram: str, scale: float) -> None:
    """scale → backward → unscale_, without a word to the engine. The update was s⁻² times too short."""
    expected, coefficients = unscaled_step(transform, gram)
    model, (inputs, advantages) = make_model(), make_data()
    scaler, optimizer = GradScaler("cpu", init_scale=scale), torch.optim.SGD(model.parameters(), 1.0)
    with Isopo(model, transform, gram=gram).microbatch(advantages) as opened:
        scaler.scale(loss(model, inputs)).backward()
    scaler.unscale_(optimizer)
    # Powers of two do not round. Others do, a few times, in single precision.
    tolerance = 1e-5 if scale == 3.7 else 0.0
    assert relative_error(flat_gradient(model), expected) <= tolerance
    for layer, c in coefficients.items():
        assert relative_error(opened.coefficients[layer], c) <= tolerance


@pytest.mark.parametrize("scale", [0.25, 1e6, torch.tensor(64.0)])
@EVERY_TRANSFORM
def test_a_scale_of_ones_own_is_an_argument(transform: Any, scale: float | Tensor) -> None:
    expected, _ = unscaled_step(transform, dtype=torch.float64)
    model, (inputs, advantages) = make_model(torch.float64), make_data(torch.float64)
    with Isopo(model, transform).microbatch(advantages, loss_scale=scale):
        (scale * loss(model, inputs)).backward()
    assert relative_error(flat_gradient(model), scale * expected) < 1e-12
    # Both at once: the argument does not count the scaler.
    model.zero_grad()
    scaler = GradScaler("cpu", init_scale=1024.0)
    with Isopo(model, transform).microbatch(advantages, loss_scale=scale):
        scaler.scale(scale * loss(model, inputs)).backward()
    assert relative_error(flat_gradient(model), 1024 * scale * expected) < 1e-12


def test_without_being_told_the_fisher_normalised_step_is_wrong() -> None:
    """Its coefficients have degree −2 in the gradients: the reason for all of this."""
    expected, _ = unscaled_step(FisherNormalized(), dtype=torch.float64)
    model, (inputs, advantages) = make_model(torch.float64), make_data(torch.float64)
    with Isopo(model, FisherNormalized()).microbatch(advantages):
        (0.25 * loss(model, inputs)).backward()
    torch.testing.assert_close(flat_gradient(model) / 0.25, 16 * expected)


@pytest.mark.parametrize("transform", [NTK(0.3), FisherNormalized(strength=0.1)], ids=["NTK", "Fisher"])
def test_the_step_after_a_change_of_the_scale(transform: Any) -> None:
    """The moving averages are of what is not scaled: λ was s² too large after the scale had been halved."""

    def steps(scales: list[float]) -> tuple[list[Tensor], dict[str, Tensor]]:
        model, (inputs, advantages) = make_model(), make_data()
        engine, gradients = Isopo(model, transform), []
        for scale in scales:
            model.zero_grad()
            scaler = GradScaler("cpu", init_scale=scale)
            with engine.microbatch(advantages):
                scaler.scale(loss(model, inputs)).backward()
            engine.end_step()
            gradients.append(flat_gradient(model) / scale)
        return gradients, engine.state_dict()

    (plain, state), (scaled, scaled_state) = steps([1.0, 1.0, 1.0]), steps([65536.0, 32768.0, 1.0])
    assert all(torch.equal(a, b) for a, b in zip(plain, scaled, strict=True))
    assert state.keys() == scaled_state.keys()
    assert all(torch.equal(state[name], scaled_state[name]) for name in state)


@pytest.mark.parametrize("transform", [NTK(0.3), FisherNormalized(strength=0.1)], ids=["NTK", "Fisher"])
def test_a_step_that_the_scaler_skips_leaves_nothing_behind(transform: Any) -> None:
    """Gradients that overflow: the optimizer does not move, the scale is halved, and the next step is as the first."""
    model, (inputs, advantages) = make_model(), make_data()
    optimizer = torch.optim.SGD(model.parameters(), 0.0)  # so that all steps would be the same
    scaler, engine = GradScaler("cpu", init_scale=2.0**10), Isopo(model, transform)
    gradients, scales = [], []
    for overflow in (False, True, False):
        optimizer.zero_grad()
        with engine.microbatch(advantages):
            scaler.scale(loss(model, inputs * (float("inf") if overflow else 1.0))).backward()
        scaler.unscale_(optimizer)
        gradients.append(flat_gradient(model))
        scaler.step(optimizer)
        scaler.update()
        engine.end_step()
        scales.append(scaler.get_scale())
    assert scales == [2.0**10, 2.0**9, 2.0**9]
    assert not gradients[1].isfinite().all()
    assert relative_error(gradients[2], gradients[0]) < 1e-6  # 0.9 m + 0.1 m is m up to rounding


@EVERY_TRANSFORM
def test_half_precision_with_its_scale(transform: Any) -> None:
    """float16 keeps 11 bits: errors of some 2⁻¹⁰ through a few layers. Without the scale there is nothing left."""
    model, (inputs, advantages) = make_model(), make_data()
    small = 1e-6  # of the log-probabilities, so that a float16 would have two or three bits left of their gradients
    gradients = []
    for autocast, scale in ((False, 1.0), (True, 2.0**16), (True, 1.0)):
        model.zero_grad()
        scaler = GradScaler("cpu", init_scale=scale)
        with (
            torch.autocast("cpu", torch.float16, enabled=autocast),
            Isopo(model, transform).microbatch(advantages) as opened,
        ):
            scaler.scale(small * loss(model, inputs)).backward()
        gradients.append(flat_gradient(model) / scale)
        assert all(c.isfinite().all() for c in opened.coefficients.values())
    assert relative_error(gradients[1], gradients[0]) < 0.02
    assert relative_error(gradients[2], gradients[0]) > 0.05  # three bits leave 6 %


def test_a_scaler_that_is_switched_off_scales_nothing() -> None:
    expected, _ = unscaled_step(FisherNormalized())
    model, (inputs, advantages) = make_model(), make_data()
    scaler = GradScaler("cpu", enabled=False)
    with Isopo(model, FisherNormalized()).microbatch(advantages):
        scaler.scale(loss(model, inputs)).backward()
    assert torch.equal(flat_gradient(model), expected)


def test_outside_of_a_block_the_scaler_is_itself() -> None:
    scale = GradScaler.scale
    model, (_, advantages) = make_model(), make_data()
    with Isopo(model, NTK()).microbatch(advantages), Isopo(make_model(), NTK()).microbatch(advantages):
        assert GradScaler.scale is not scale
    assert GradScaler.scale is scale
    with pytest.raises(KeyError, match="mine"), Isopo(model, NTK()).microbatch(advantages):
        raise KeyError("mine")
    assert GradScaler.scale is scale
    scaled = GradScaler("cpu", init_scale=8.0).scale([torch.ones(()), torch.ones(())])
    assert [float(value) for value in scaled] == [8.0, 8.0]


@pytest.mark.usefixtures("unchecked")
def test_errors_say_what_was_expected_and_what_came() -> None:
    engine, (_, advantages) = Isopo(make_model(), NTK()), make_data()
    with pytest.raises(ValueError, match=r"^loss_scale: expected a finite number > 0, got 0\.0$"):
        engine.microbatch(advantages, loss_scale=0.0).__enter__()
    with pytest.raises(TypeError, match=r"^loss_scale: expected a number, got GradScaler$"):
        engine.microbatch(advantages, loss_scale=GradScaler("cpu")).__enter__()  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^loss_scale: expected shape \(\), got \(2,\)$"):
        engine.microbatch(advantages, loss_scale=torch.ones(2)).__enter__()
    with pytest.raises(TypeError, match=r"^loss_scale: expected a floating-point tensor, got torch\.int64$"):
        engine.microbatch(advantages, loss_scale=torch.tensor(2)).__enter__()
