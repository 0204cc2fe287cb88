"""The Fisher matrix of a policy over finitely many actions, four ways.

F = E_o E_{a∼π(·|o)} [∇log π(a|o) ∇log π(a|o)ᵀ] = E_o [Jᵀ (diag π − ππᵀ) J],    J = ∂logits/∂θ.

Everything here is dense and obvious, and made of `torch.func`. Scores of N samples take the memory of N
gradients; the engine avoids that, and this module is what it is measured against.

The first axis of the observations is the sample n of N. A sample may have more positions: a sequence of
tokens has T of them, and its score is the sum of ∇log π over them. Columns run over the trainable
`policy.parameters()`, each flattened, in order; a tied parameter is counted once.
"""

from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.func import grad, jacrev, vmap

from isopo_mini import checks
from isopo_mini.geometry import functional
from isopo_mini.geometry.fisher_products import fisher_vector_product as fisher_vector_product
from isopo_mini.geometry.fisher_products import squared_length as squared_length
from isopo_mini.geometry.functional import Parameters
from isopo_mini.geometry.positions import checked_mask, position_weights, require_observations
from isopo_mini.precision import at_least_float32, require_fits

# Numbers a chunk of `exact_fisher` holds at most: 128 MiB in float64.
_CHUNK_NUMBERS = 2**24


def score_matrix(
    policy: nn.Module,
    observations: Tensor,
    actions: Int[Tensor, "N *positions"],
    mask: Bool[Tensor, "N *positions"] | None = None,
    *,
    chunk_size: int | None = None,
) -> Float[Tensor, "N P"]:
    """Scores of N samples: row n is g_n = ∇_θ Σ_t m_nt log π(a_nt | o_nt).

    Args:
        policy: a module with `logits(observations)`, or one whose output is the logits.
        observations: `(N, ...)`.
        actions: int64 `(N,)`, or `(N, T)` for sequences.
        mask: which positions count, of the shape of `actions`; all when None.
        chunk_size: samples to differentiate at a time, to bound the memory; all at once when None.

    Returns:
        `(N, P)`, columns in `policy.parameters()` order.

    Raises:
        TypeError: a dtype is wrong.
        ValueError: shapes or devices disagree, there is no sample, or the policy has no trainable parameter.

    Example:
        >>> import torch
        >>> from isopo_mini.policies import TabularSoftmax
        >>> score_matrix(TabularSoftmax(1, 2), torch.tensor([0, 0]), torch.tensor([0, 1]))
        tensor([[ 0.5000, -0.5000],
                [-0.5000,  0.5000]])
    """
    parameters = functional.trainable_parameters(policy)
    checks.require_integer("actions", actions)
    checks.require_not_empty("actions", actions)
    require_observations(observations)
    if len(observations) != len(actions):
        raise ValueError(f"actions: expected N={len(observations)} rows, one an observation, got {len(actions)}")
    checks.require_same_device("actions", actions, "observations", observations)
    mask = checked_mask(mask, "actions", actions, actions.shape)

    def log_prob(parameters: Parameters, observation: Tensor, action: Tensor, keep: Tensor) -> Tensor:
        log_probs = functional.logits(policy, parameters, observation.unsqueeze(0)).squeeze(0).log_softmax(dim=-1)
        if log_probs.shape[:-1] != action.shape:
            expected, got = (len(actions), *log_probs.shape[:-1]), tuple(actions.shape)
            raise ValueError(
                f"actions: expected the shape of the logits without their last axis, {expected}, got {got}"
            )
        chosen = log_probs.gather(-1, action.masked_fill(~keep, 0).unsqueeze(-1)).squeeze(-1)
        return chosen.masked_fill(~keep, 0.0).sum()

    with functional.differentiable_attention():
        per_sample = vmap(grad(log_prob), in_dims=(None, 0, 0, 0), chunk_size=chunk_size)
        return functional.flatten(per_sample(parameters, observations, actions, mask), parameters, lead=1)


def exact_fisher(
    policy: nn.Module,
    observations: Tensor,
    weights: Float[Tensor, "N"] | None = None,
    mask: Bool[Tensor, "N *positions"] | None = None,
) -> Float[Tensor, "P P"]:
    """Fisher matrix with the expectation over actions taken exactly: no action is sampled.

    F = Σ_n w_n Σ_t m_nt Σ_a π(a|o_nt) ∇log π(a|o_nt) ∇log π(a|o_nt)ᵀ,    Σ_n w_n = 1.

    Summed over positions it is the Fisher matrix of whole sequences, given the prefixes that were observed:
    between two positions nothing is left, because the later score has mean zero given the earlier one.

    Args:
        policy: a module with `logits(observations)`, or one whose output is the logits.
        observations: `(N, ...)`.
        weights: how probable each observation is, `(N,)`, ≥ 0, normalised here to sum 1; uniform when None.
        mask: which positions count, `(N,)` or `(N, T)`; all when None.

    Returns:
        `(P, P)`, symmetric and positive semi-definite. Made in chunks of observations, to bound the memory.

    Raises:
        TypeError: a dtype is wrong.
        ValueError: shapes disagree, there is no observation, a weight is negative, all of them are zero, or
            the policy has no trainable parameter.

    Source: Kakade, A natural policy gradient, NIPS 2001; Martens, New insights and perspectives on the
        natural gradient method, arXiv 1412.1193.
    """
    parameters = functional.trainable_parameters(policy)
    share, num_actions = position_weights(policy, parameters, observations, weights, mask)
    num_parameters = sum(parameter.numel() for parameter in parameters.values())
    chunk = max(1, _CHUNK_NUMBERS // (share[0].numel() * num_actions * num_parameters))

    def log_probs(parameters: Parameters, observation: Tensor) -> tuple[Tensor, Tensor]:
        values = functional.logits(policy, parameters, observation.unsqueeze(0)).squeeze(0).log_softmax(dim=-1)
        return values, values

    fisher = share.new_zeros(num_parameters, num_parameters)
    with functional.differentiable_attention():
        for observation, weight in zip(observations.split(chunk), share.split(chunk), strict=True):
            jacobian, values = vmap(jacrev(log_probs, has_aux=True), in_dims=(None, 0))(parameters, observation)
            # ∇log π of every action at every position, (n, ..., A, P)
            scores = functional.flatten(jacobian, parameters, lead=values.ndim)
            counts = weight > 0  # what the mask leaves out would only be multiplied by 0
            probs = weight[counts].unsqueeze(-1) * values[counts].exp()
            rows = (probs.sqrt().unsqueeze(-1) * scores[counts]).reshape(-1, num_parameters)
            fisher += rows.mT @ rows
    return fisher


def empirical_fisher(scores: Float[Tensor, "N P"]) -> Float[Tensor, "P P"]:
    """Fisher matrix from the sampled actions: SᵀS/N.

    An estimate of the exact Fisher when the actions were drawn from the policy itself. Its rank is at most N.

    Args:
        scores: S, one row a sample, as `score_matrix` gives, `(N, P)`.

    Returns:
        `(P, P)`.

    Raises:
        TypeError: not a floating-point tensor.
        ValueError: wrong shape, empty, not finite, or so large that their products do not fit.
    """
    checks.require_shape("scores", scores, "N P")
    checks.require_floating("scores", scores)
    checks.require_not_empty("scores", scores)
    checks.require_finite("scores", scores)
    scores = at_least_float32(scores)
    return require_fits("scoresᵀscores/N", scores.mT @ scores / len(scores))
