"""Scores and Fisher matrices against loops of autograd, brute-force sums, the Hessian of KL and closed forms."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call, hessian

from isopo_mini.geometry import fisher
from isopo_mini.policies import MLP, CausalTransformer, LinearSoftmax, TabularSoftmax
from isopo_mini.tasks import ContextualBandit


class Example:
    """A policy with observations, and a mask for the sequences."""

    def __init__(self, policy: nn.Module, observations: Tensor, num_actions: int) -> None:
        self.policy = policy.double()
        for parameter in self.policy.parameters():
            nn.init.normal_(parameter, std=0.7)  # far from the symmetric start
        self.observations = observations
        shape = self.logits().shape[:-1]
        self.actions = torch.randint(num_actions, shape)
        self.mask = torch.rand(shape) < 0.7
        self.weights = torch.rand(shape[0], dtype=torch.float64)

    def logits(self) -> Tensor:
        return self.policy(self.observations)

    def parameters(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.policy.parameters() if parameter.requires_grad]


class HeadCalledLogits(nn.Module):
    """A module of another style: no method `logits`, but a layer of that name, used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.logits = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.logits(self.logits(x).tanh())


def transformer(tied_head: bool) -> Example:
    policy = CausalTransformer(4, 3, width=4, layers=1, heads=2, tied_head=tied_head)
    return Example(policy, torch.randint(4, (5, 3)), 4)


def half_frozen() -> Example:
    example = Example(MLP(3, 4, hidden=(5,)), torch.randn(6, 3, dtype=torch.float64), 4)
    example.policy.layers[0].bias.requires_grad_(False)
    return example


def features(*shape: int) -> Tensor:
    return torch.randn(*shape, 3, dtype=torch.float64)


EXAMPLES = {
    "tabular": lambda: Example(TabularSoftmax(3, 4), torch.randint(3, (6,)), 4),
    "tabular sequences": lambda: Example(TabularSoftmax(3, 4), torch.randint(3, (6, 2)), 4),
    "linear": lambda: Example(LinearSoftmax(3, 4), features(6), 4),
    "mlp": lambda: Example(MLP(3, 4, hidden=(5,)), features(6), 4),
    "plain module": lambda: Example(HeadCalledLogits(), features(6, 2), 3),
    "half frozen": half_frozen,
    "transformer": lambda: transformer(tied_head=False),
    "tied transformer": lambda: transformer(tied_head=True),
}


@pytest.fixture(params=EXAMPLES)
def example(request: pytest.FixtureRequest) -> Example:
    torch.manual_seed(1)
    return EXAMPLES[request.param]()


def gradient(value: Tensor, example: Example) -> Tensor:
    pieces = torch.autograd.grad(value, example.parameters(), retain_graph=True)
    return torch.cat([piece.flatten() for piece in pieces])


def looped_fisher(example: Example, weights: Tensor, mask: Tensor) -> Tensor:
    """Σ_n w_n Σ_t m_nt Σ_a π ∇log π ∇log πᵀ, term by term."""
    log_probs = example.logits().log_softmax(dim=-1)
    total = 0
    for n in range(len(mask)):
        rows, row_mask = log_probs[n].reshape(-1, log_probs.shape[-1]), mask[n].flatten()
        for t, a in itertools.product(range(len(rows)), range(rows.shape[1])):
            if row_mask[t]:
                score = gradient(rows[t, a], example)
                total = total + weights[n] / weights.sum() * rows[t, a].exp().detach() * torch.outer(score, score)
    return total


def test_score_matrix_is_a_loop_of_autograd(example: Example) -> None:
    log_probs = example.logits().log_softmax(dim=-1).gather(-1, example.actions[..., None])[..., 0]
    loop = torch.stack(
        [gradient((row * keep).sum(), example) for row, keep in zip(log_probs, example.mask, strict=True)]
    )
    scores = fisher.score_matrix(example.policy, example.observations, example.actions, example.mask)
    torch.testing.assert_close(scores, loop, rtol=0, atol=1e-12)
    chunked = fisher.score_matrix(example.policy, example.observations, example.actions, example.mask, chunk_size=2)
    torch.testing.assert_close(chunked, scores, rtol=0, atol=1e-12)
    assert all(parameter.grad is None for parameter in example.policy.parameters())


def test_exact_fisher_is_the_sum_over_actions(example: Example, monkeypatch: pytest.MonkeyPatch) -> None:
    loop = looped_fisher(example, example.weights, example.mask)
    arguments = (example.policy, example.observations, example.weights, example.mask)
    exact = fisher.exact_fisher(*arguments)
    torch.testing.assert_close(exact, loop, rtol=0, atol=1e-12)
    monkeypatch.setattr(fisher, "_CHUNK_NUMBERS", 1)  # one observation at a time
    torch.testing.assert_close(fisher.exact_fisher(*arguments), exact, rtol=0, atol=1e-12)


def test_fisher_vector_product_is_the_dense_product(example: Example) -> None:
    for options in ({}, {"weights": example.weights, "mask": example.mask}):
        dense = fisher.exact_fisher(example.policy, example.observations, **options)
        vector = torch.randn(len(dense), dtype=torch.float64)
        product = fisher.fisher_vector_product(example.policy, example.observations, vector, **options)
        torch.testing.assert_close(product, dense @ vector, rtol=0, atol=1e-12)


def test_fisher_is_symmetric_and_positive_semi_definite(example: Example) -> None:
    exact = fisher.exact_fisher(example.policy, example.observations)
    torch.testing.assert_close(exact, exact.T, rtol=0, atol=1e-15)
    eigenvalues = torch.linalg.eigvalsh(exact)
    assert eigenvalues[0] > -1e-13 * eigenvalues[-1]
    # At every position the A scores lie in a space of A − 1 dimensions: Σ_a π(a) ∇log π(a) = 0.
    logits = example.logits()
    assert torch.linalg.matrix_rank(exact, hermitian=True) <= logits[..., 0].numel() * (logits.shape[-1] - 1)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script")  # PyTorch's own set-up of forward mode
@pytest.mark.parametrize("name", ["tabular sequences", "mlp", "tied transformer"])
def test_exact_fisher_is_the_hessian_of_kl(name: str) -> None:
    """KL(π_θ ‖ π_θ+d) has the Hessian F at d = 0."""
    example = EXAMPLES[name]()
    flat = torch.nn.utils.parameters_to_vector(example.policy.parameters()).detach()
    names = [name for name, _ in example.policy.named_parameters()]
    shapes = [parameter.shape for parameter in example.policy.parameters()]
    before = example.logits().log_softmax(dim=-1).detach()

    def kl(step: Tensor) -> Tensor:
        pieces = (flat + step).split([shape.numel() for shape in shapes])
        moved = {name: piece.reshape(shape) for name, piece, shape in zip(names, pieces, shapes, strict=True)}
        after = functional_call(example.policy, moved, (example.observations,)).log_softmax(dim=-1)
        return (before.exp() * (before - after)).sum() / len(before)

    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        expected = hessian(kl)(torch.zeros_like(flat))
    exact = fisher.exact_fisher(example.policy, example.observations)
    torch.testing.assert_close(exact, expected, rtol=0, atol=1e-12 * exact.abs().max().item() + 1e-13)


def test_exact_fisher_is_the_closed_form_of_the_bandit() -> None:
    context_probs = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
    bandit = ContextualBandit(torch.randn(3, 4, dtype=torch.float64), context_probs)
    policy = TabularSoftmax.from_probs(torch.randn(3, 4, dtype=torch.float64).softmax(dim=1))
    exact = fisher.exact_fisher(policy, torch.arange(3), context_probs)
    torch.testing.assert_close(exact, bandit.logit_fisher(policy), rtol=0, atol=1e-15)


def test_sum_over_positions_is_the_fisher_of_whole_sequences() -> None:
    """All 3³ responses of a transformer: E[g_s g_sᵀ] by enumeration, where F only ever sees single positions."""
    policy = CausalTransformer(3, 3, width=2, layers=1, heads=1).double()
    for parameter in policy.parameters():
        nn.init.normal_(parameter, std=0.7)
    responses = torch.tensor(list(itertools.product(range(3), repeat=3)))
    observations = torch.cat([torch.zeros(27, 1, dtype=torch.int64), responses[:, :-1]], dim=1)
    log_probs = policy(observations).log_softmax(dim=-1).gather(-1, responses[..., None])[..., 0]
    probs = log_probs.sum(dim=1).exp().detach()
    assert probs.sum().item() == pytest.approx(1)
    scores = fisher.score_matrix(policy, observations, responses)
    enumerated = scores.T @ (probs[:, None] * scores)
    exact = fisher.exact_fisher(policy, observations, probs)
    torch.testing.assert_close(exact, enumerated, rtol=0, atol=1e-12)


def test_empirical_fisher_converges_to_the_exact_one() -> None:
    policy = MLP(2, 3, hidden=(2,)).double()
    states = torch.randn(3, 2, dtype=torch.float64)
    exact = fisher.exact_fisher(policy, states)
    count = 5_000
    observations = states[torch.arange(3 * count) % 3]
    actions, _ = policy.sample_actions(observations)
    scores = fisher.score_matrix(policy, observations, actions)
    products = scores[:, :, None] * scores[:, None, :]
    # An entry is a mean of 3·count products; five of its standard deviations, estimated from the sample.
    margin = 5 * products.std(dim=0) / len(products) ** 0.5 + 1e-12
    assert ((fisher.empirical_fisher(scores) - exact).abs() < margin).all()
    # And the margin says something: it is small against the matrix.
    assert margin.norm() < 0.15 * exact.norm()


def test_empirical_fisher_is_the_mean_of_outer_products() -> None:
    scores = torch.randn(4, 3, dtype=torch.float64)
    expected = torch.stack([torch.outer(score, score) for score in scores]).mean(dim=0)
    torch.testing.assert_close(fisher.empirical_fisher(scores), expected)


def test_weights_count_like_copies() -> None:
    policy, observations = MLP(3, 2).double(), features(3)
    weighted = fisher.exact_fisher(policy, observations, torch.tensor([1.0, 0.0, 3.0], dtype=torch.float64))
    copies = fisher.exact_fisher(policy, observations[[0, 2, 2, 2]])
    torch.testing.assert_close(weighted, copies, rtol=0, atol=1e-14)


@settings(max_examples=15, deadline=None)
@given(data=st.data(), sequences=st.integers(1, 4), positions=st.integers(1, 4), num_actions=st.integers(1, 4))
def test_masked_positions_are_as_if_absent(
    data: st.DataObject, sequences: int, positions: int, num_actions: int
) -> None:
    """With one state a position, the score of a sequence is the sum of the scores of its real steps."""
    flags = st.lists(st.booleans(), min_size=sequences * positions, max_size=sequences * positions)
    mask = torch.tensor(data.draw(flags)).reshape(sequences, positions)
    policy = LinearSoftmax(3, num_actions).double()
    observations = features(sequences, positions)
    actions = torch.randint(num_actions, (sequences, positions))
    padded_actions = actions.where(mask, -1)
    scores = fisher.score_matrix(policy, observations, padded_actions, mask)
    steps = fisher.score_matrix(policy, observations.flatten(0, 1), actions.flatten())
    expected = (steps.reshape(sequences, positions, -1) * mask[..., None]).sum(dim=1)
    torch.testing.assert_close(scores, expected, rtol=0, atol=1e-12)
    # Each sequence weighs 1/S in F, however many of its positions are real.
    exact = fisher.exact_fisher(policy, observations, mask=mask)
    if mask.any():
        expected = fisher.exact_fisher(policy, observations[mask]) * (mask.sum().item() / sequences)
        torch.testing.assert_close(exact, expected, rtol=0, atol=1e-12)
    else:
        assert torch.equal(exact, torch.zeros_like(exact))


def test_weights_of_another_precision() -> None:
    policy, observations = MLP(3, 2).double(), features(3)
    single = fisher.exact_fisher(policy, observations, torch.full((3,), 0.1))
    torch.testing.assert_close(single, fisher.exact_fisher(policy, observations), rtol=0, atol=1e-14)


def test_one_action_has_no_geometry() -> None:
    policy = LinearSoftmax(3, 1)
    assert torch.equal(fisher.exact_fisher(policy, torch.randn(2, 3)), torch.zeros(3, 3))
    scores = fisher.score_matrix(policy, torch.randn(2, 3), torch.zeros(2, dtype=torch.int64))
    assert torch.equal(scores, torch.zeros(2, 3))


def test_a_policy_that_is_certain_gives_finite_numbers() -> None:
    policy = TabularSoftmax(1, 2)
    with torch.no_grad():
        policy.table.weight.copy_(torch.tensor([[0.0, 1e4]]))  # π underflows to (0, 1)
    state = torch.zeros(1, dtype=torch.int64)
    assert torch.equal(fisher.exact_fisher(policy, state), torch.zeros(2, 2))
    assert torch.equal(fisher.fisher_vector_product(policy, state, torch.ones(2)), torch.zeros(2))
    scores = fisher.score_matrix(policy, state, torch.tensor([0]))
    assert torch.equal(scores, torch.tensor([[1.0, -1.0]]))


@pytest.mark.usefixtures("unchecked")
class TestBadInput:
    policy = MLP(3, 4)
    observations = torch.zeros(5, 3)
    actions = torch.zeros(5, dtype=torch.int64)

    def test_actions(self) -> None:
        with pytest.raises(TypeError, match=r"actions: expected an int64 tensor, got torch.float32"):
            fisher.score_matrix(self.policy, self.observations, self.actions.float())
        with pytest.raises(ValueError, match=r"actions: expected N=5 rows, one an observation, got 4"):
            fisher.score_matrix(self.policy, self.observations, self.actions[:4])
        with pytest.raises(ValueError, match=r"actions: expected the shape of the logits .* \(5,\), got \(5, 1\)"):
            fisher.score_matrix(self.policy, self.observations, self.actions[:, None])
        with pytest.raises(ValueError, match=r"actions: expected at least one entry"):
            fisher.score_matrix(self.policy, self.observations[:0], self.actions[:0])

    def test_observations(self) -> None:
        with pytest.raises(ValueError, match=r"observations: expected finite numbers, got nan"):
            fisher.exact_fisher(self.policy, self.observations * torch.nan)
        with pytest.raises(ValueError, match=r"observations: expected shape \(N \.\.\.\) with N >= 1, got \(0, 3\)"):
            fisher.exact_fisher(self.policy, self.observations[:0])
        with pytest.raises(TypeError, match=r"observations: expected a tensor, got list"):
            fisher.exact_fisher(self.policy, [[0.0] * 3])

    def test_logits_without_a_sample_axis(self) -> None:
        flat = nn.Sequential(nn.Linear(3, 4), nn.Flatten(0))
        with pytest.raises(ValueError, match=r"policy: expected logits of shape \(N=5 \.\.\. A\), got \(20,\)"):
            fisher.exact_fisher(flat, self.observations)

    def test_weights_and_mask(self) -> None:
        with pytest.raises(ValueError, match=r"weights: expected shape \(N=5\), got \(4,\)"):
            fisher.exact_fisher(self.policy, self.observations, torch.ones(4))
        with pytest.raises(ValueError, match=r"weights: expected numbers >= 0, not all of them 0"):
            fisher.exact_fisher(self.policy, self.observations, torch.zeros(5))
        with pytest.raises(ValueError, match=r"weights: expected numbers >= 0, not all of them 0"):
            fisher.exact_fisher(self.policy, self.observations, torch.tensor([1.0, 1.0, 1.0, 1.0, -1.0]))
        with pytest.raises(TypeError, match=r"mask: expected a bool tensor, got torch.float32"):
            fisher.exact_fisher(self.policy, self.observations, mask=torch.ones(5))
        with pytest.raises(ValueError, match=r"mask: expected shape \(5,\), got \(5, 1\)"):
            fisher.score_matrix(self.policy, self.observations, self.actions, torch.ones(5, 1, dtype=torch.bool))

    def test_devices(self) -> None:
        def elsewhere(tensor: Tensor) -> Tensor:
            return tensor.to("meta")

        with pytest.raises(ValueError, match=r"actions: expected device cpu \(that of observations\), got meta"):
            fisher.score_matrix(self.policy, self.observations, elsewhere(self.actions))
        with pytest.raises(ValueError, match=r"weights: expected device cpu \(that of logits\), got meta"):
            fisher.exact_fisher(self.policy, self.observations, elsewhere(torch.ones(5)))
        with pytest.raises(ValueError, match=r"mask: expected device cpu \(that of logits\), got meta"):
            fisher.exact_fisher(self.policy, self.observations, mask=elsewhere(self.actions == 0))
        with pytest.raises(ValueError, match=r"vector: expected device cpu \(that of logits\), got meta"):
            fisher.fisher_vector_product(self.policy, self.observations, elsewhere(torch.ones(516)))

    def test_vector(self) -> None:
        with pytest.raises(ValueError, match=r"vector: expected shape \(P=516\), got \(3,\)"):
            fisher.fisher_vector_product(self.policy, self.observations, torch.zeros(3))
        with pytest.raises(ValueError, match=r"vector: expected finite numbers, got inf"):
            fisher.fisher_vector_product(self.policy, self.observations, torch.full((516,), torch.inf))

    def test_nothing_to_train(self) -> None:
        frozen = MLP(3, 4).requires_grad_(False)
        with pytest.raises(ValueError, match=r"policy: expected at least one parameter with requires_grad=True"):
            fisher.score_matrix(frozen, self.observations, self.actions)

    def test_scores(self) -> None:
        with pytest.raises(ValueError, match=r"scores: expected shape \(N P\), got \(3,\)"):
            fisher.empirical_fisher(torch.zeros(3))
        with pytest.raises(ValueError, match=r"scores: expected at least one entry"):
            fisher.empirical_fisher(torch.zeros(0, 3))
