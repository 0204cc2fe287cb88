"""Where a layer has few parameters and there are many sequences, GᵀG stands for GGᵀ: the same numbers, much sooner."""

import pytest
import torch
from torch import Tensor, nn

from isopo_mini.engine import NTK, FisherNormalized, Isopo, Transform
from isopo_mini.geometry import isopo

TRANSFORMS = [
    NTK(1.0),
    NTK(0.01, scale="natural"),
    NTK(300.0),
    FisherNormalized(),
    FisherNormalized(scale="natural", strength=0.1),
]


def model(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    """Layers of 20, 8 and 15 parameters."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Tanh(), nn.Linear(4, 3)).to(dtype)


def gradients(sequences: int, transform: Transform, path: str, scale: float = 1.0, steps: int = 2) -> dict[str, Tensor]:
    """What two steps of the engine leave in `.grad`; the second knows the first's averages."""
    policy = model()
    engine = Isopo(policy, transform, gram=path)
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        policy.zero_grad()
        inputs = torch.randn(sequences, 5, 4, dtype=torch.float64, generator=generator)
        advantages = torch.randn(sequences, dtype=torch.float64, generator=generator)
        with engine.microbatch(advantages, loss_scale=scale):
            (scale * policy(inputs).log_softmax(-1)[..., 0].sum()).backward()
        engine.end_step()
    return {name: value.grad for name, value in policy.named_parameters() if value.grad is not None}


@pytest.mark.parametrize("transform", TRANSFORMS, ids=str)
@pytest.mark.parametrize("sequences", [20, 36, 60])  # columns in one layer, in two, in all three
def test_the_step_is_that_of_the_gram_matrix(transform: Transform, sequences: int) -> None:
    by_columns = gradients(sequences, transform, "dense")
    by_gram = gradients(sequences, transform, "ghost")
    for name, expected in by_gram.items():
        torch.testing.assert_close(by_columns[name], expected, rtol=1e-9, atol=1e-12)


def test_it_is_taken_where_it_is_the_smaller_system_and_nowhere_else(columns_taken: list[bool]) -> None:
    for sequences, path, expected in [
        (15, "auto", [False, False, False]),
        (16, "auto", [False, True, False]),
        (30, "dense", [False, True, True]),  # backpropagation comes by the last layer first
        (39, "auto", [False, True, True]),
        (40, "auto", [True, True, True]),
        (60, "ghost", [False, False, False]),
        (60, "sketched", [False, False, False]),
    ]:
        columns_taken.clear()
        gradients(sequences, NTK(), path, steps=1)
        assert sorted(columns_taken) == sorted(expected), (sequences, path)


@pytest.mark.parametrize("transform", TRANSFORMS, ids=str)
def test_a_scaled_loss_scales_the_step(transform: Transform) -> None:
    plain, scaled = (gradients(60, transform, "auto", scale) for scale in (1.0, 1024.0))
    for name, expected in plain.items():
        torch.testing.assert_close(scaled[name], 1024 * expected, rtol=1e-10, atol=1e-9)


def test_without_gradient_a_layer_keeps_its_advantages() -> None:
    nothing, advantages = torch.zeros(6, 2), torch.arange(6.0)
    torch.testing.assert_close(isopo.solve_ntk_by_columns(nothing, advantages, torch.tensor(0.0)), advantages)
    assert torch.equal(isopo.fisher_norms_by_columns(nothing), torch.zeros(6))


@pytest.mark.parametrize("unit", [1e-30, 1e-12, 1.0, 1e12])
def test_the_norms_keep_their_range(unit: float) -> None:
    columns = torch.randn(9, 3, generator=torch.Generator().manual_seed(0))
    found = isopo.fisher_norms_by_columns((unit**0.5) * columns)
    expected = isopo.fisher_norms(columns.double() @ columns.double().T)
    torch.testing.assert_close(found.double() / unit, expected, rtol=1e-5, atol=0)
