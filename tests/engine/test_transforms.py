"""The transforms as the engine applies them: the averages they carry along, and their formulas written out."""

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from isopo_mini.engine import Isopo
from isopo_mini.engine.moving_averages import MovingAverages, end_step_of
from isopo_mini.engine.transforms import NTK, FisherNormalized, Transform

DECAY = 0.8
SEQUENCES, POSITIONS = 4, 3


def number(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


class TestMovingAverages:
    def test_the_first_step_uses_its_own_value(self) -> None:
        averages = MovingAverages(DECAY)
        assert averages.blend("norm", number(3.0)) == 3.0
        assert averages.blend("norm", number(5.0)) == 5.0, "another microbatch does not know the first one"
        assert averages.history == {}

    def test_a_later_step_blends_history_and_its_own_value(self) -> None:
        averages = MovingAverages(DECAY)
        averages.history["norm"] = number(2.0)
        torch.testing.assert_close(averages.blend("norm", number(7.0)), number(0.8 * 2.0 + 0.2 * 7.0))
        torch.testing.assert_close(averages.blend("norm", number(2.0)), number(2.0))
        assert averages.history["norm"] == 2.0, "within a step the history stands still"

    def test_end_step_folds_the_mean_over_microbatches_into_the_history(self) -> None:
        averages = MovingAverages(DECAY)
        for value in (1.0, 2.0, 6.0):
            averages.blend("norm", number(value))
        averages.end_step()
        torch.testing.assert_close(averages.history["norm"], number(3.0))
        for value in (0.0, 4.0):
            averages.blend("norm", number(value))
        averages.end_step()
        torch.testing.assert_close(averages.history["norm"], number(0.8 * 3.0 + 0.2 * 2.0))
        averages.end_step()  # a step that brought nothing
        torch.testing.assert_close(averages.history["norm"], number(0.8 * 3.0 + 0.2 * 2.0))

    def test_after_many_steps_it_is_the_exponential_average(self) -> None:
        """m_n = decayⁿ x_0 + (1 − decay) Σ_{i=1..n} decayⁿ⁻ⁱ x_i."""
        values = torch.rand(20, dtype=torch.float64)
        averages = MovingAverages(DECAY)
        for value in values:
            averages.blend("norm", value)
            averages.end_step()
        powers = DECAY ** torch.arange(19, -1, -1, dtype=torch.float64)
        powers[1:] *= 1 - DECAY
        torch.testing.assert_close(powers.sum(), number(1.0))
        torch.testing.assert_close(averages.history["norm"], powers @ values)

    def test_names_do_not_mix(self) -> None:
        averages = MovingAverages(DECAY)
        averages.blend("norm", number(1.0))
        averages.blend("overlap", number(9.0))
        averages.end_step()
        assert averages.history == {"norm": 1.0, "overlap": 9.0}

    def test_an_abandoned_step_leaves_no_trace(self) -> None:
        averages = MovingAverages(DECAY)
        averages.blend("norm", number(1.0))
        averages.end_step()
        averages.blend("norm", number(100.0))
        averages.forget_pending()
        averages.end_step()
        assert averages.history == {"norm": 1.0}

    @pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
    def test_only_finite_numbers_enter_the_history(self, bad: float) -> None:
        averages = MovingAverages(DECAY)
        averages.blend("norm", number(bad))
        averages.end_step()
        assert averages.blend("norm", number(3.0)) == 3.0, "a first step that was bad is no history"
        averages.blend("norm", number(bad))
        averages.blend("norm", number(5.0))
        averages.end_step()
        torch.testing.assert_close(averages.history["norm"], number(4.0))  # the mean of the finite ones
        averages.blend("norm", number(bad))
        averages.end_step()
        torch.testing.assert_close(averages.history["norm"], number(4.0))
        assert not averages.blend("norm", number(bad)).isfinite(), "the bad microbatch itself is not made to look good"

    def test_many_at_once_are_each_by_itself(self) -> None:
        """Of other decays, dtypes and names; with and without a history; with a number that is not finite."""

        def made() -> list[MovingAverages]:
            averages = [MovingAverages(DECAY), MovingAverages(DECAY), MovingAverages(0.5), MovingAverages(DECAY)]
            averages[0].history["norm"] = number(2.0)
            averages[2].history["norm"] = number(float("nan"))
            for index, each in enumerate(averages[:3]):
                each.blend("norm", number(index + 1.0))
                each.blend("overlap", torch.tensor(10.0 * index))  # single precision
            averages[1].blend("norm", number(float("inf")))
            averages[1].blend("size", number(float("nan")))
            return averages

        together, alone = made(), made()
        end_step_of(together)
        for each in alone:
            each.end_step()
        kept = [each.history for each in together]
        torch.testing.assert_close(kept, [each.history for each in alone], rtol=0, atol=0, equal_nan=True)
        expected = {"norm": number(0.8 * 2.0 + 0.2 * 1.0), "overlap": torch.tensor(0.0)}
        torch.testing.assert_close(kept[0], expected)
        assert kept[1]["norm"] == 2.0, "the infinite microbatch is left out"
        assert kept[1]["size"].isnan()
        assert kept[2]["norm"] == 3.0
        assert kept[3] == {}

    def test_without_decay_there_is_no_memory(self) -> None:
        averages = MovingAverages(0.0)
        averages.history["norm"] = number(2.0)
        assert averages.blend("norm", number(7.0)) == 7.0


TRANSFORMS = [
    NTK(0.1),
    NTK(0.1, spectra=True),
    FisherNormalized(strength=0.1),
    FisherNormalized("token", 0.5, 1.0, 0.3, strength=0.1),
]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_the_step_after_a_bad_one_is_the_step_before_it(transform: Transform, first: bool, bad: float) -> None:
    """Same data, same weights; the bad step is one that a GradScaler would skip. It was never forgotten before."""
    layer, ((inputs, advantages),) = make_layer(), make_batches(1)
    engine, gradients = Isopo(layer, transform), []
    for scale in [bad, 1.0, 1.0] if first else [1.0, bad, 1.0, 1.0]:
        layer.zero_grad()
        with engine.microbatch(advantages):
            (scale * objective(layer, inputs)).sum().backward()
        engine.end_step()
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in layer.parameters()]))  # type: ignore[union-attr]
        assert all(value.isfinite() for value in engine.state_dict().values())
    assert [bool(gradient.isfinite().all()) for gradient in gradients].count(False) == 1
    for gradient in gradients[-2:]:
        torch.testing.assert_close(gradient, gradients[0] if not first else gradients[1], rtol=1e-13, atol=1e-15)


def test_one_bad_microbatch_leaves_the_others_in_the_average() -> None:
    layer, batches = make_layer(), make_batches(3)
    states = []
    for scales in ((1.0, float("nan"), 1.0), (1.0, None, 1.0)):
        engine = Isopo(layer, NTK(0.1))
        for scale, (inputs, advantages) in zip(scales, batches, strict=True):
            if scale is not None:
                with engine.microbatch(advantages):
                    (scale * objective(layer, inputs)).sum().backward()
        engine.end_step()
        states.append(engine.state_dict())
    assert states[0].keys() == {"(root)/eigenvalue"}
    torch.testing.assert_close(states[0], states[1])


# --- The formulas, on one linear layer, through the engine ---------------------------------------------------------


def make_layer() -> nn.Linear:
    torch.manual_seed(5)
    return nn.Linear(3, 2).double()


def objective(layer: nn.Linear, inputs: Tensor) -> Tensor:
    """Some scalar of every sequence, `(S,)`, not linear in the parameters."""
    return torch.tanh(layer(inputs)).square().sum(dim=(1, 2))


def make_batches(count: int) -> list[tuple[Tensor, Tensor]]:
    """Inputs and advantages. Each batch is larger than the one before, so that the averages matter."""
    generator = torch.Generator().manual_seed(6)
    return [
        (
            (1 + 0.3 * n) * torch.randn(SEQUENCES, POSITIONS, 3, generator=generator, dtype=torch.float64),
            torch.randn(SEQUENCES, generator=generator, dtype=torch.float64),
        )
        for n in range(count)
    ]


def flat_gradient(layer: nn.Linear, value: Tensor) -> Tensor:
    return torch.cat([gradient.flatten() for gradient in torch.autograd.grad(value, list(layer.parameters()))])


def sequence_gradients(layer: nn.Linear, inputs: Tensor) -> Tensor:
    """G_s by a loop of autograd, weight and bias side by side, `(S, P)`."""
    return torch.stack([flat_gradient(layer, objective(layer, one[None]).sum()) for one in inputs])


def token_gradients(layer: nn.Linear, inputs: Tensor) -> Tensor:
    """The same for every single position: the objective is a sum over them, `(S·T, P)`."""
    return sequence_gradients(layer, inputs.reshape(-1, 1, 3))


def engine_coefficients(transform: Transform, batches: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
    """c of each batch, one optimizer step a batch. The layer itself stays, so that only the averages move."""
    layer = make_layer()
    engine = Isopo(layer, transform, decay=DECAY)
    coefficients = []
    for inputs, advantages in batches:
        layer.zero_grad()
        with engine.microbatch(advantages) as microbatch:
            objective(layer, inputs).sum().backward()
        (c,) = microbatch.coefficients.values()
        computed = torch.cat([parameter.grad.flatten() for parameter in layer.parameters()])
        expected = c @ sequence_gradients(layer, inputs)
        torch.testing.assert_close(computed, expected, rtol=1e-10, atol=1e-12)
        coefficients.append(c)
        engine.end_step()
    return coefficients


def test_ntk_solves_with_the_moving_average_of_the_mean_eigenvalue() -> None:
    batches = make_batches(3)
    average = None
    for (inputs, advantages), computed in zip(batches, engine_coefficients(NTK(0.7), batches), strict=True):
        scores = sequence_gradients(make_layer(), inputs)
        gram = scores @ scores.T
        own = gram.trace() / SEQUENCES
        average = own if average is None else DECAY * average + (1 - DECAY) * own
        damping = 0.7 * average
        identity = torch.eye(SEQUENCES, dtype=torch.float64)
        expected = damping * torch.linalg.solve(gram + damping * identity, advantages)
        # Two solves of a well-conditioned 4 × 4 system in double precision.
        torch.testing.assert_close(computed, expected, rtol=1e-10, atol=1e-12)


POWERS = [(0.0, 1.0, 0.0), (1.0, 0.0, 0.0), (0.0, 0.0, 1.0), (0.5, 2.0, -0.5)]  # p, q, w


@pytest.mark.parametrize("keep_small", [False, True])
@pytest.mark.parametrize("norm", ["sequence", "token", "token-unscaled"])
def test_fisher_normalised_is_the_formula_as_written(norm: str, keep_small: bool) -> None:
    """c_s = A_s / (nᵖ oᵠ rʷ), every factor regularised with the moving average of its own mean square."""
    batches = make_batches(2)
    layer, strength = make_layer(), 0.4
    quantities = []
    for inputs, _ in batches:
        scores, tokens = sequence_gradients(layer, inputs), token_gradients(layer, inputs)
        gradient_norms = scores.norm(dim=1)
        overlaps = {
            "sequence": (scores @ scores.T).square().mean(dim=1).sqrt(),
            "token": (scores @ tokens.T).norm(dim=1) / tokens.norm(),
            "token-unscaled": (scores @ tokens.T).square().mean(dim=1).sqrt(),
        }[norm]
        quantities.append((gradient_norms, overlaps, overlaps / gradient_norms))

    def regularised(x: Tensor, mean_square: Tensor) -> Tensor:
        if keep_small:
            return (x**2 / (strength * mean_square) + 1).sqrt()
        return (x**2 + strength * mean_square).sqrt()

    for powers in POWERS:
        p, q, w = powers
        transform = FisherNormalized(norm, p, q, w, strength=strength, keep_small=keep_small)
        computed = engine_coefficients(transform, batches)
        averages: list[Any] = [x.square().mean() for x in quantities[0]]
        for step, (_, advantages) in enumerate(batches):
            if step:
                own = [x.square().mean() for x in quantities[step]]
                averages = [DECAY * m + (1 - DECAY) * x for m, x in zip(averages, own, strict=True)]
            expected = advantages.clone()
            for x, mean_square, power in zip(quantities[step], averages, powers, strict=True):
                expected /= regularised(x, mean_square) ** power
            torch.testing.assert_close(computed[step], expected, rtol=1e-9, atol=1e-12)


def test_without_any_power_it_is_reinforce() -> None:
    batches = make_batches(1)
    (computed,) = engine_coefficients(FisherNormalized(overlap_power=0.0), batches)
    assert torch.equal(computed, batches[0][1])


def test_without_regulariser_every_sequence_moves_the_policy_equally_far() -> None:
    """‖c_s G_s‖_F = |A_s| in the empirical Fisher norm of the layer: what the method is named after."""
    ((inputs, advantages),) = batches = make_batches(1)
    (computed,) = engine_coefficients(FisherNormalized(), batches)
    steps = computed[:, None] * sequence_gradients(make_layer(), inputs)
    scores = sequence_gradients(make_layer(), inputs)
    lengths = (steps @ scores.T).square().mean(dim=1).sqrt()
    torch.testing.assert_close(lengths, advantages.abs(), rtol=1e-10, atol=0.0)


def test_both_are_transforms() -> None:
    assert isinstance(NTK(), Transform)
    assert isinstance(FisherNormalized(), Transform)


@pytest.mark.usefixtures("unchecked")
class TestErrors:
    @pytest.mark.parametrize("decay", [-0.1, 1.0, float("nan")])
    def test_decay(self, decay: float) -> None:
        with pytest.raises(ValueError, match=rf"^decay: expected a number in \[0, 1\), got {decay}$"):
            MovingAverages(decay)

    def test_state(self) -> None:
        engine, good = Isopo(make_layer(), NTK(1.0)), {"(root)/eigenvalue": number(2.0)}
        engine.load_state_dict(good)
        with pytest.raises(ValueError, match=r"^state\['\(root\)/eigenvalue'\]: expected finite numbers, got nan at"):
            engine.load_state_dict({"(root)/eigenvalue": number(float("nan"))})
        with pytest.raises(ValueError, match=r"^state\['\(root\)/eigenvalue'\]: expected shape \(\), got \(2,\)$"):
            engine.load_state_dict({"(root)/eigenvalue": torch.ones(2)})
        for key in ("head/eigenvalue", "(root)", "eigenvalue"):
            with pytest.raises(
                ValueError, match=rf"^state: expected keys 'layer/name' of layers .* got '{re.escape(key)}'$"
            ):
                engine.load_state_dict({key: number(1.0)})
        assert engine.state_dict() == good, "what was refused has changed nothing"

    @pytest.mark.parametrize("damping", [0.0, -1.0, float("inf"), float("nan")])
    def test_damping(self, damping: float) -> None:
        with pytest.raises(ValueError, match=rf"^damping: expected a finite number > 0, got {damping}$"):
            NTK(damping)

    def test_damping_is_a_number(self) -> None:
        with pytest.raises(TypeError, match=r"^damping: expected a number, got str$"):
            NTK("1")  # type: ignore[arg-type]

    def test_norm(self) -> None:
        with pytest.raises(ValueError, match=r"^norm: expected one of sequence, token, token-unscaled, got 'exact'$"):
            FisherNormalized("exact")

    def test_strength_and_tokens(self) -> None:
        with pytest.raises(ValueError, match=r"^strength: expected a finite number >= 0, got -0\.1$"):
            FisherNormalized(strength=-0.1)
        with pytest.raises(ValueError, match=r"^tokens: expected a finite number >= 1, got 0$"):
            FisherNormalized(tokens=0)
