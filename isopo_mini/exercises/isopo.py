"""The exercises of the chapters on ISOPO."""

from collections.abc import Callable

import torch
from torch import Tensor

from isopo_mini.exercises.exercise import Exercise, normal, solve_damped

# -- Chapter 5: the published step of a linear layer -------------------------------------------------------------------


def _with_the_fisher_matrix(x: Tensor, g: Tensor, advantages: Tensor) -> Tensor:
    """Norms as √(g_sᵀ F_tok g_s / tr F_tok), with the matrix written out."""
    tokens = torch.einsum("sto,sti->stoi", g, x).flatten(2)  # (S, T, P)
    fisher = torch.einsum("stp,stq->pq", tokens, tokens) / len(tokens.flatten(0, 1))
    total = torch.zeros(g.shape[2] * x.shape[2]).to(x)
    for score, advantage in zip(tokens.sum(1), advantages, strict=True):
        total = total + advantage * score / (score @ fisher @ score / fisher.trace()).sqrt()
    return -total.view(g.shape[2], x.shape[2]) / len(x)


def _layer_factors() -> list[tuple[Tensor, Tensor, Tensor]]:
    draw = normal(0)
    return [(draw(S, T, 3), draw(S, T, 2), draw(S)) for S, T in ((1, 1), (4, 3), (3, 4))]


def _normalised(norms: Callable[[Tensor, Tensor, Tensor], Tensor], sign: int = -1) -> Callable[..., Tensor]:
    """The step with norms made of G (S, o, i), x and g."""

    def step(x: Tensor, g: Tensor, advantages: Tensor) -> Tensor:
        G = g.mT @ x
        return sign * torch.einsum("s,soi->oi", advantages / norms(G, x, g), G) / len(x)

    return step


def _overlaps(G: Tensor, x: Tensor, g: Tensor) -> Tensor:
    return torch.einsum("nto,soi,nti->snt", g, G, x).flatten(1)


def _token_lengths(x: Tensor, g: Tensor) -> Tensor:
    return (x.norm(dim=2) * g.norm(dim=2)).flatten()


def _published(G: Tensor, x: Tensor, g: Tensor) -> Tensor:
    return _overlaps(G, x, g).norm(dim=1) / _token_lengths(x, g).norm()


PUBLISHED_STEP = Exercise(
    _with_the_fisher_matrix,
    _layer_factors,
    {
        "The denominator of (6) is missing.": _normalised(lambda G, x, g: _overlaps(G, x, g).norm(dim=1)),
        "The root of the mean overlap is right, its division by the tokens' lengths is missing: see Table 5.": (
            _normalised(lambda G, x, g: _overlaps(G, x, g).square().mean(1).sqrt())
        ),
        "These are the norms of line 6, made of K. Here they are made of overlaps with single tokens, by (6).": (
            _normalised(lambda G, x, g: (G.flatten(1) @ G.flatten(1).T).square().mean(1).sqrt())
        ),
        "The norms are the Euclidean ones.": _normalised(lambda G, x, g: G.flatten(1).norm(dim=1)),
        "The denominator of (6) is the sum of the tokens' lengths. It must be the root of the sum of their squares.": (
            _normalised(lambda G, x, g: _overlaps(G, x, g).norm(dim=1) / _token_lengths(x, g).sum())
        ),
        "The sign: this is the direction that climbs, and an optimizer goes against what it is given.": (
            _normalised(_published, sign=1)
        ),
        "This is the sum over sequences; line 8 has their mean.": (
            lambda x, g, advantages: len(x) * _normalised(_published)(x, g, advantages)
        ),
    },
)

# -- Chapter 6: sequences that come several times ----------------------------------------------------------------------


def _every_copy(gram: Tensor, advantages: Tensor, counts: Tensor, damping: float) -> Tensor:
    """The batch written out; the coefficient of the last copy of each."""
    index = torch.arange(len(counts)).repeat_interleave(counts)
    return damping * solve_damped(gram[index][:, index], advantages[index], damping)[counts.cumsum(0) - 1]


def _distinct_sequences() -> list[tuple[Tensor, Tensor, Tensor, float]]:
    draw = normal(0)
    scores, A = draw(5, 7), draw(5)
    counts = torch.tensor([[1, 1, 1, 1, 1], [4, 1, 2, 1, 9]])
    return [(scores @ scores.T, A, row, 0.5) for row in counts]


SHARED_COEFFICIENTS = Exercise(
    _every_copy,
    _distinct_sequences,
    {
        "These are the coefficients when each sequence comes once: the counts have no effect.": (
            lambda gram, A, counts, damping: damping * solve_damped(gram, A, damping)
        ),
        "These are the coefficients of the transpose: the counts belong to the columns of K, not to its rows.": (
            lambda gram, A, counts, damping: damping * solve_damped(gram * counts[:, None], A, damping)
        ),
        "These are the coefficients of all copies together. One copy has its share of them.": (
            lambda gram, A, counts, damping: damping * counts * solve_damped(gram * counts, A, damping)
        ),
        "The factor λ is missing: these are the coefficients in the natural scale.": (
            lambda gram, A, counts, damping: solve_damped(gram * counts, A, damping)
        ),
        "The advantages are multiplied by the counts. Only what a sequence does to the others is.": (
            lambda gram, A, counts, damping: damping * solve_damped(gram * counts, counts * A, damping)
        ),
    },
)

# -- Chapter 7: ISOPO itself -------------------------------------------------------------------------------------------


def _log_prob(W1: Tensor, W2: Tensor, x: Tensor, actions: Tensor) -> Tensor:
    """log π of one sequence, x (T, i)."""
    log_probs = (torch.tanh(x @ W1.T) @ W2.T).log_softmax(-1)
    return log_probs.gather(-1, actions[:, None]).sum()


def _every_score(W1: Tensor, W2: Tensor, x: Tensor, actions: Tensor) -> list[Tensor]:
    """All G_s of both layers, by one backward pass a sequence: (S, h, i), (S, o, h)."""
    with torch.enable_grad():
        weights = [W.detach().clone().requires_grad_() for W in (W1, W2)]
        pairs = [
            torch.autograd.grad(_log_prob(weights[0], weights[1], *one), weights)
            for one in zip(x, actions, strict=True)
        ]
    return [torch.stack(layer) for layer in zip(*pairs, strict=True)]


def _damped_natural_gradient(
    W1: Tensor, W2: Tensor, x: Tensor, actions: Tensor, advantages: Tensor, rho: float
) -> tuple[Tensor, ...]:
    """λ (GᵀG + λI)⁻¹ GᵀA in the parameters of each layer, (P, P): no Gram matrix of sequences."""
    steps = []
    for G in _every_score(W1, W2, x, actions):
        rows = G.flatten(1)
        fisher, damping = rows.T @ rows, rho * rows.square().sum().item() / len(rows)
        steps.append((damping * solve_damped(fisher, rows.T @ advantages, damping)).view(G.shape[1:]))
    return tuple(steps)


def _tiny_models() -> list[tuple[Tensor, Tensor, Tensor, Tensor, Tensor, float]]:
    draw, whole, cases = normal(0), torch.Generator().manual_seed(0), []
    for S, T, rho in ((4, 1, 1.0), (6, 3, 0.1), (3, 3, 0.3)):
        actions = torch.randint(3, (S, T), generator=whole)
        cases.append((draw(5, 2), draw(3, 5), draw(S, T, 2), actions, draw(S), rho))
    return cases


def _layers(coefficients: Callable[[Tensor, Tensor, float], Tensor]) -> Callable[..., tuple[Tensor, ...]]:
    """A step of both layers whose coefficients are made of a layer's rows (S, P), the advantages and ρ."""

    def step(W1: Tensor, W2: Tensor, x: Tensor, actions: Tensor, advantages: Tensor, rho: float) -> tuple[Tensor, ...]:
        scores = _every_score(W1, W2, x, actions)
        return tuple(torch.einsum("s,soi->oi", coefficients(G.flatten(1), advantages, rho), G) for G in scores)

    return step


def _coefficients(K: Tensor, A: Tensor, damping: float) -> Tensor:
    return damping * solve_damped(K, A, damping)


def _ntk(K: Tensor, A: Tensor, rho: float) -> Tensor:
    return _coefficients(K, A, rho * K.trace().item() / len(K))


def _mean_entry(K: Tensor, A: Tensor, rho: float) -> Tensor:
    return _coefficients(K, A, rho * K.mean().item())


def _together(W1: Tensor, W2: Tensor, x: Tensor, actions: Tensor, advantages: Tensor, rho: float) -> tuple[Tensor, ...]:
    scores = _every_score(W1, W2, x, actions)
    c = _ntk(sum((G.flatten(1) @ G.flatten(1).T for G in scores), torch.zeros(len(x), len(x)).to(x)), advantages, rho)
    return tuple(torch.einsum("s,soi->oi", c, G) for G in scores)


def _weighted_loss(rows: Tensor, A: Tensor, rho: float) -> Tensor:
    """What comes out when the advantages are in the loss already: G_s is A_s G_s, everywhere."""
    weighted = A[:, None] * rows
    return A * _ntk(weighted @ weighted.T, A, rho)


def _tokens_apart(
    W1: Tensor, W2: Tensor, x: Tensor, actions: Tensor, advantages: Tensor, rho: float
) -> tuple[Tensor, ...]:
    S, T = actions.shape
    apart = x.reshape(S * T, 1, -1), actions.reshape(S * T, 1), advantages.repeat_interleave(T)
    return _layers(lambda rows, A, rho: _ntk(rows @ rows.T, A, rho))(W1, W2, *apart, rho)


ISOPO_BY_HAND = Exercise(
    _damped_natural_gradient,
    _tiny_models,
    {
        "This is REINFORCE: the coefficients are the advantages.": _layers(lambda rows, A, rho: A),
        "λ is ρ itself. It must be ρ tr K / S, so that it has the units of K.": (
            _layers(lambda rows, A, rho: _coefficients(rows @ rows.T, A, rho))
        ),
        "λ is made of the mean of all entries of K. It must be that of the diagonal, tr K / S.": (
            _layers(lambda rows, A, rho: _mean_entry(rows @ rows.T, A, rho))
        ),
        "λ is ρ tr K: the division by S is missing.": (
            _layers(lambda rows, A, rho: _ntk(rows @ rows.T, A, rho * len(rows)))
        ),
        "The factor λ is missing in c: this is the natural scale, which does not tend to REINFORCE for large ρ.": (
            _layers(lambda rows, A, rho: _ntk(rows @ rows.T, A, rho) * len(rows) / (rho * rows.square().sum()))
        ),
        "Both layers have the same coefficients, from one Gram matrix. Each layer has its own.": _together,
        "Every position is a sequence of its own here: sum g xᵀ over t before K.": _tokens_apart,
        "The advantages are in the loss and in c. Differentiate the unweighted sum of log π.": _layers(_weighted_loss),
        "The sign: this step descends. Equation (1) climbs.": _layers(
            lambda rows, A, rho: -_ntk(rows @ rows.T, A, rho)
        ),
        "This is the mean over sequences; (1) is their sum.": (
            _layers(lambda rows, A, rho: _ntk(rows @ rows.T, A, rho) / len(rows))
        ),
    },
)


# -- Chapter 8: Newton–Schulz ------------------------------------------------------------------------------------------


def _by_singular_values(M: Tensor) -> Tensor:
    U, _, Vt = torch.linalg.svd(M, full_matrices=False)
    return U @ Vt


ORTHOGONALISE = Exercise(
    _by_singular_values,
    lambda: [(normal(0)(*shape),) for shape in ((3, 5), (6, 2))],
    {
        "This is M over its norm: the singular values are not made equal yet.": lambda M: M / M.norm(),
        "This is one iteration of the 40.": lambda M: _newton_schulz(M / M.norm(), 1),
        "The singular values are inverted: this is (M Mᵀ)⁻¹ M. The exponent must be -1/2.": lambda M: (
            torch.linalg.pinv(M).T
        ),
        "Every row has length one, but the rows are not orthogonal.": lambda M: M / M.norm(dim=1, keepdim=True),
    },
)


def _newton_schulz(X: Tensor, times: int) -> Tensor:
    for _ in range(times):
        X = 1.5 * X - 0.5 * X @ X.T @ X
    return X


EXERCISES = {
    "published_step": PUBLISHED_STEP,
    "shared_coefficients": SHARED_COEFFICIENTS,
    "isopo_by_hand": ISOPO_BY_HAND,
    "orthogonalise": ORTHOGONALISE,
}
