"""Products with the Fisher matrix that never form it: F v, and vᵀF v.

Both begin with u = J v, the change of the logits along v, which forward mode computes beside the logits themselves.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.func import vjp

from isopo_mini import checks
from isopo_mini.geometry import functional
from isopo_mini.geometry.functional import Parameters
from isopo_mini.geometry.positions import position_weights
from isopo_mini.precision import require_fits


def fisher_vector_product(
    policy: nn.Module,
    observations: Tensor,
    vector: Float[Tensor, "P"],
    weights: Float[Tensor, "N"] | None = None,
    mask: Bool[Tensor, "N *positions"] | None = None,
) -> Float[Tensor, "P"]:
    """F v for the exact Fisher, without forming F: three linear maps, right to left.

    u = J v (forward mode);  u ← w m (diag π − ππᵀ) u;  F v = Jᵀ u (reverse mode).

    Args:
        policy, observations, weights, mask: as for `exact_fisher`.
        vector: v, `(P,)`.

    Returns:
        `(P,)`, at the cost of about two gradients.

    Raises:
        TypeError: a dtype is wrong.
        ValueError: as `exact_fisher`; or `vector` has the wrong length or is not finite.

    Source: Schraudolph, Fast curvature matrix-vector products, Neural Computation 14 (2002).
    """
    parameters = functional.trainable_parameters(policy)
    share, _ = position_weights(policy, parameters, observations, weights, mask)
    with functional.differentiable_attention():
        probs, change = _centred_change(policy, parameters, observations, vector, share)
        _, pull_back = vjp(lambda at: functional.logits(policy, at, observations), parameters)  # type: ignore[misc]
        (product,) = pull_back(share.unsqueeze(-1) * probs * change)
    return functional.flatten(product, parameters, lead=0)


def squared_length(
    policy: nn.Module,
    observations: Tensor,
    vector: Float[Tensor, "P"],
    weights: Float[Tensor, "N"] | None = None,
    mask: Bool[Tensor, "N *positions"] | None = None,
) -> Float[Tensor, ""]:
    """vᵀF v for the exact Fisher, without forming F: the variance of the logits' change under π, weighted and summed.

    Half of it is the KL divergence that a short step v causes. No backward pass is needed.

    Args:
        policy, observations, weights, mask: as for `exact_fisher`.
        vector: v, `(P,)`.

    Returns:
        A scalar ≥ 0, float64, at the cost of about two forward passes.

    Raises:
        TypeError, ValueError: as `fisher_vector_product`.
    """
    parameters = functional.trainable_parameters(policy)
    share, _ = position_weights(policy, parameters, observations, weights, mask)
    with torch.no_grad(), functional.differentiable_attention():
        probs, change = _centred_change(policy, parameters, observations, vector, share)
        variance = (probs.double() * change.double().square()).sum(dim=-1)
    return (share.double() * variance).sum()


def _centred_change(
    policy: nn.Module, parameters: Parameters, observations: Tensor, vector: Tensor, like: Tensor
) -> tuple[Tensor, Tensor]:
    """π, and J v minus its mean under π, both `(N, ..., A)`."""
    sizes = [parameter.numel() for parameter in parameters.values()]
    checks.require_shape("vector", vector, "P", {"P": sum(sizes)})
    checks.require_floating("vector", vector)
    checks.require_same_device("vector", vector, "logits", like)
    checks.require_finite("vector", vector)
    tangents = {
        name: require_fits("vector", piece.to(parameters[name].dtype)).reshape(parameters[name].shape)
        for name, piece in zip(parameters, vector.split(sizes), strict=True)
    }
    values, change = functional.directional_derivative(
        lambda at: functional.logits(policy, at, observations), parameters, tangents
    )
    probs = values.softmax(dim=-1)
    # Measured from the change of the most probable action: a change that is the same for all then gives exactly 0,
    # and a rare action's share keeps its digits.
    change = change - change.gather(-1, probs.argmax(dim=-1, keepdim=True))
    return probs, change - (probs * change).sum(dim=-1, keepdim=True)
