"""vᵀFv without F: against the dense matrix, against the KL divergence of a short step, and where it must be 0.

F v itself is compared with the dense product in `test_fisher`.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from isopo_mini.geometry import fisher
from isopo_mini.policies import MLP, CausalTransformer, TabularSoftmax
from isopo_mini.training.diagnostics import kl_divergence

Example = tuple[nn.Module, Tensor]


def perceptron() -> Example:
    return MLP(3, 4, hidden=(5,)), torch.randn(6, 3, dtype=torch.float64)


def perceptron_of_sequences() -> Example:
    return MLP(3, 4, hidden=(5,)), torch.randn(6, 2, 3, dtype=torch.float64)


def half_frozen() -> Example:
    policy, observations = perceptron()
    policy.layers[0].bias.requires_grad_(False)
    return policy, observations


def transformer() -> Example:
    return CausalTransformer(4, 3, width=4, layers=1, heads=2), torch.randint(4, (5, 3))


def tied_transformer() -> Example:
    return CausalTransformer(4, 3, width=4, layers=1, heads=2, tied_head=True), torch.randint(4, (5, 3))


@pytest.fixture(params=[perceptron, perceptron_of_sequences, half_frozen, transformer, tied_transformer])
def example(request: pytest.FixtureRequest) -> Example:
    policy, observations = request.param()
    policy.double()
    for parameter in policy.parameters():
        nn.init.normal_(parameter, std=0.7)  # far from the symmetric start
    return policy, observations


def logits(policy: nn.Module, observations: Tensor) -> Tensor:
    return policy(observations).detach()


def options_of(policy: nn.Module, observations: Tensor) -> list[dict[str, Tensor]]:
    """Nothing; weights; a mask; and both, with a sequence of weight 0 and one of which nothing counts."""
    shape = logits(policy, observations).shape[:-1]
    weights, mask = torch.rand(shape[0], dtype=torch.float64), torch.rand(shape) < 0.7
    zero_weight, nothing = weights.clone(), mask.clone()
    zero_weight[0], nothing[1] = 0.0, False
    return [{}, {"weights": weights}, {"mask": mask}, {"weights": zero_weight, "mask": nothing}]


def test_is_the_quadratic_form_of_the_dense_matrix(example: Example) -> None:
    policy, observations = example
    for options in options_of(policy, observations):
        dense = fisher.exact_fisher(policy, observations, **options)
        for vector in torch.randn(3, len(dense), dtype=torch.float64):
            squared = fisher.squared_length(policy, observations, vector, **options)
            assert squared.item() == pytest.approx((vector @ dense @ vector).item(), rel=1e-10)
            product = fisher.fisher_vector_product(policy, observations, vector, **options)
            assert squared.item() == pytest.approx(vector.dot(product).item(), rel=1e-10)
    assert all(parameter.grad is None for parameter in policy.parameters())


def test_is_never_negative_and_scales_as_a_square(example: Example) -> None:
    """Along the null space of F too, where a difference of products would be of either sign."""
    policy, observations = example
    _, vectors = torch.linalg.eigh(fisher.exact_fisher(policy, observations))
    lengths = torch.stack([fisher.squared_length(policy, observations, vector) for vector in vectors.T])
    assert (lengths >= 0).all()
    assert lengths.min() < 1e-20 * lengths.max()
    vector = vectors[:, -1]
    assert fisher.squared_length(policy, observations, -1e6 * vector).item() == pytest.approx(
        1e12 * lengths[-1].item(), rel=1e-12
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_is_exactly_zero_where_all_logits_change_alike(dtype: torch.dtype) -> None:
    """A shift of every logit of a state leaves the policy as it is: not 1e-17, and in no precision."""
    policy = TabularSoftmax(3, 4).to(dtype)
    nn.init.normal_(policy.table.weight, std=2.0)
    shift = torch.tensor([0.3, -7.1, 123.4]).to(dtype)[:, None].expand(3, 4).flatten()
    assert fisher.squared_length(policy, torch.arange(3), shift).item() == 0.0
    shift = shift.clone()
    shift[0] += 1
    assert fisher.squared_length(policy, torch.arange(3), shift).item() > 0


def test_half_of_it_is_the_kl_divergence_of_a_short_step(example: Example) -> None:
    """What is missing falls as the third power of the step: an eighth for each half."""
    policy, observations = example
    trainable = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    before, start = logits(policy, observations), parameters_to_vector(trainable).detach()
    vector = torch.randn_like(start)
    vector /= fisher.squared_length(policy, observations, vector).sqrt()
    positions = before[0, ..., 0].numel()  # F is of whole sequences, the KL a mean over positions

    def error(size: float) -> float:
        vector_to_parameters(start + size * vector, trainable)
        kl = positions * kl_divergence(before, logits(policy, observations)).item()
        return kl - 0.5 * size**2

    errors = [error(size) for size in (4e-3, 2e-3, 1e-3)]
    assert abs(errors[0]) < 0.1 * 0.5 * 4e-3**2
    assert errors[0] / errors[1] == pytest.approx(8, rel=0.1)
    assert errors[1] / errors[2] == pytest.approx(8, rel=0.1)


def test_a_rare_action_keeps_its_digits() -> None:
    """π = (1 − p, p) with p = e⁻³⁰, in single precision: the variance of the change is p(1 − p)."""
    policy = TabularSoftmax(1, 2)
    with torch.no_grad():
        policy.table.weight.copy_(torch.tensor([[30.0, 0.0]]))
    for vector in ([0.0, 1.0], [1.0, 0.0], [-2.0, -3.0]):
        squared = fisher.squared_length(policy, torch.zeros(1, dtype=torch.int64), torch.tensor(vector))
        assert squared.item() == pytest.approx(torch.tensor(-30.0).double().exp().item(), rel=1e-5)


def test_needs_no_gradient_and_leaves_none() -> None:
    policy, observations = MLP(3, 4).double(), torch.randn(5, 3, dtype=torch.float64)
    vector = torch.randn(516, dtype=torch.float64)
    expected = fisher.squared_length(policy, observations, vector)
    assert expected.dtype == torch.float64
    assert not expected.requires_grad
    with torch.no_grad():
        assert torch.equal(fisher.squared_length(policy, observations, vector), expected)
    single = fisher.squared_length(policy.float(), observations.float(), vector)  # a vector of another precision
    assert single.dtype == torch.float64
    assert single.item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("function", [fisher.squared_length, fisher.fisher_vector_product])
def test_errors_say_what_was_expected_and_what_came(function: Callable[..., Tensor]) -> None:
    policy, observations, vector = MLP(3, 4), torch.zeros(5, 3), torch.zeros(516)
    for bad, kind, message in (
        (torch.zeros(3), ValueError, r"^vector: expected shape \(P=516\), got \(3,\)$"),
        (torch.full((516,), torch.nan), ValueError, r"^vector: expected finite numbers, got nan at index \(0,\)$"),
        (torch.zeros(516, dtype=torch.int64), TypeError, r"^vector: expected a floating-point tensor, got torch.int64"),
        (
            torch.full((516,), 1e300, dtype=torch.float64),
            ValueError,
            r"^vector: expected numbers that fit float32, got inf",
        ),
        (vector.to("meta"), ValueError, r"^vector: expected device cpu \(that of logits\), got meta$"),
        ([0.0] * 516, TypeError, r"^vector: expected a tensor of shape \(P\), got list$"),
    ):
        with pytest.raises(kind, match=message):
            function(policy, observations, bad)
    with pytest.raises(ValueError, match=r"^weights: expected numbers >= 0, not all of them 0"):
        function(policy, observations, vector, torch.zeros(5))
    with pytest.raises(TypeError, match=r"^mask: expected a bool tensor, got torch.float32$"):
        function(policy, observations, vector, mask=torch.ones(5))
    with pytest.raises(ValueError, match=r"^observations: expected finite numbers, got nan"):
        function(policy, observations * torch.nan, vector)
    with pytest.raises(ValueError, match=r"^policy: expected at least one parameter with requires_grad=True"):
        function(MLP(3, 4).requires_grad_(False), observations, vector)
