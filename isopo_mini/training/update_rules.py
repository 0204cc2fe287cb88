"""How one batch changes the policy: REINFORCE, the natural gradient, and the two variants of ISOPO.

Every rule has `step(policy, batch, optimizer)`: it leaves minus its ascent direction in `.grad`, lets the optimizer
step, and returns metrics under the same names:

- `backward_passes`: in units of the batch;
- `gradient_norm`: Euclidean norm of what was left in `.grad`.

All directions are means over the S sequences of the batch, (1/S) Σ_s c_s ∇ log π(sequence s).
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from isopo_mini import checks
from isopo_mini.batch import Batch
from isopo_mini.geometry import fisher as fisher_matrices
from isopo_mini.geometry import isopo, natural_gradient
from isopo_mini.geometry.layerwise import NTK, FisherNormalized, Isopo, Transform
from isopo_mini.objectives.advantages import group_advantages, leave_one_out
from isopo_mini.training import diagnostics

Advantages = Callable[[Batch], Tensor]


def batch_advantages(batch: Batch) -> Float[Tensor, "S"]:
    """A_s = R_s − mean of the other rewards of the batch. Rewards given by time step are summed first."""
    returns = batch.total_rewards()
    return leave_one_out(returns, torch.zeros(len(batch), dtype=torch.int64, device=returns.device))


def centred_advantages(batch: Batch) -> Float[Tensor, "S"]:
    """A_s = R_s − mean of its group (of the batch, where there are no groups)."""
    groups = torch.zeros_like(batch.actions[:, 0]) if batch.groups is None else batch.groups
    return group_advantages(batch.total_rewards(), groups, scale="none")


@dataclass
class Reinforce:
    """(1/S) Σ_s A_s g_s, one step a batch: the policy gradient of Williams (1992).

    Args:
        advantages: computes A `(S,)` from the batch.
        microbatch_size: sequences in one backward pass; the whole batch when None. It changes memory, not the result.
    """

    advantages: Advantages = batch_advantages
    microbatch_size: int | None = None

    def step(self, policy: Any, batch: Batch, optimizer: torch.optim.Optimizer) -> dict[str, float]:
        """Use the batch once; see the module."""
        weights = _advantages_of(self.advantages, batch) / len(batch)
        optimizer.zero_grad()
        start = 0
        for part in batch.microbatches(self.microbatch_size):
            log_probs = policy.log_prob(part).sum(dim=1)  # (S,) log π of whole sequences
            (-(weights[start : start + len(part)] * log_probs).sum()).backward()
            start += len(part)
        return _finish(policy, optimizer)


@dataclass
class NaturalGradient:
    """(F + λI)⁻¹ times the policy gradient: what all the others approximate. For policies small enough.

    Args:
        damping: λ, in the units of F (per sequence).
        fisher: `"exact"`: expectation over the policy's own actions at the observations of the batch;
            `"empirical"`: over the sampled actions, SᵀS/S.
        solver: `"dense"`: form F and factor it; `"cg"`: conjugate gradients on Fisher-vector products (exact F);
            `"dual"`: through the S×S Gram matrix (empirical F).
        max_iterations: of the conjugate gradients.
        tolerance: of the conjugate gradients, relative residual.
        advantages: computes A `(S,)` from the batch.

    Raises:
        ValueError: a negative damping, an unknown option, or a solver that does not fit the Fisher matrix.
    """

    damping: float = 1e-3
    fisher: str = "exact"
    solver: str = "dense"
    max_iterations: int = 100
    tolerance: float = 1e-6
    advantages: Advantages = batch_advantages

    def __post_init__(self) -> None:
        checks.require_at_least("damping", self.damping, 0.0)
        checks.require_choice("fisher", self.fisher, ("exact", "empirical"))
        checks.require_choice("solver", self.solver, ("dense", "cg") if self.fisher == "exact" else ("dense", "dual"))

    def step(self, policy: Any, batch: Batch, optimizer: torch.optim.Optimizer) -> dict[str, float]:
        """Use the batch once; see the module. The metric `cg_iterations` counts Fisher-vector products."""
        advantages = _advantages_of(self.advantages, batch)
        optimizer.zero_grad()
        scores = fisher_matrices.score_matrix(policy, batch.observations, batch.actions, batch.mask)
        gradient = scores.T @ advantages.to(scores.dtype) / len(batch)
        metrics = {}
        if self.solver == "dual":
            direction = natural_gradient.solve_dual(scores, advantages.to(scores.dtype), self.damping)
        elif self.solver == "cg":
            direction, convergence = natural_gradient.solve_cg(
                lambda vector: fisher_matrices.fisher_vector_product(
                    policy, batch.observations, vector, mask=batch.mask
                ),
                gradient,
                self.damping,
                self.max_iterations,
                self.tolerance,
            )
            metrics["cg_iterations"] = float(convergence.iterations)
        else:
            matrix = (
                fisher_matrices.exact_fisher(policy, batch.observations, mask=batch.mask)
                if self.fisher == "exact"
                else fisher_matrices.empirical_fisher(scores)
            )
            direction = natural_gradient.solve(matrix, gradient, self.damping)
        assign_gradient(policy, -direction)
        return metrics | _finish(policy, optimizer)


@dataclass
class LayerwiseIsopo:
    """ISOPO in one backward pass: a transform of `geometry.layerwise`, applied to every layer. See the subclasses.

    Args:
        transform: from the layer's gradients and A to coefficients.
        advantages: computes A `(S,)` from the batch.
        microbatch_size: each microbatch is transformed on its own, then all are summed; the whole batch when None.
        gram: `"auto"`, `"dense"`, `"ghost"` or `"sketched"`.
        sketch_size: k of the sketched Gram matrix.
        layers: `"separate"`, or `"together"` for one set of coefficients for the whole policy.
        seed: of sketches and sampled tokens.
    """

    transform: Transform
    advantages: Advantages = batch_advantages
    microbatch_size: int | None = None
    gram: str = "auto"
    sketch_size: int = 32
    layers: str = "separate"
    seed: int = 0
    _engine: Isopo | None = field(default=None, init=False, repr=False)

    def step(self, policy: Any, batch: Batch, optimizer: torch.optim.Optimizer) -> dict[str, float]:
        """Use the batch once; see the module."""
        weights = _advantages_of(self.advantages, batch) / len(batch)
        engine = self._engine_of(policy)
        optimizer.zero_grad()
        start = 0
        for part in batch.microbatches(self.microbatch_size):
            with engine.microbatch(weights[start : start + len(part)], part.mask):
                (-policy.log_prob(part).sum()).backward()
            start += len(part)
        metrics = _finish(policy, optimizer)
        engine.end_step()
        return metrics

    def _engine_of(self, policy: Any) -> Isopo:
        """The engine of this policy. Another policy gets a new one, since the moving averages are of its layers."""
        if self._engine is None or self._engine.model is not policy:
            self._engine = Isopo(
                policy,
                self.transform,
                gram=self.gram,
                sketch_size=self.sketch_size,
                layers=self.layers,
                seed=self.seed,
            )
        return self._engine


class NtkIsopo(LayerwiseIsopo):
    """ISOPO, interacting: c = λ(K + λI)⁻¹A in every layer, with λ = ρ·tr K/S (moving average).

    Args:
        damping: ρ.
        **options: see `LayerwiseIsopo`.
    """

    def __init__(self, damping: float = 1.0, **options: Any) -> None:
        super().__init__(NTK(damping), **options)


class FisherNormalizedIsopo(LayerwiseIsopo):
    """ISOPO, non-interacting: c_s = A_s/‖G_s‖_F in every layer.

    Args:
        norm: `"sequence"`, `"token"` or `"token-unscaled"`: see `geometry.transforms.FisherNormalized`.
        power: of the Fisher norm.
        strength: ρ of the regulariser.
        keep_small: which regulariser.
        **options: see `LayerwiseIsopo`.
    """

    def __init__(
        self,
        norm: str = "sequence",
        power: float = 1.0,
        strength: float = 0.0,
        keep_small: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(
            FisherNormalized(norm, overlap_power=power, strength=strength, keep_small=keep_small), **options
        )


@dataclass
class ExactFisherIsopo:
    """ISOPO with the exact Fisher norm of the whole policy: c_s = A_s/√(g_sᵀ F g_s). For small policies.

    Args:
        power: of the norm.
        advantages: computes A `(S,)` from the batch.
    """

    power: float = 1.0
    advantages: Advantages = batch_advantages

    def step(self, policy: Any, batch: Batch, optimizer: torch.optim.Optimizer) -> dict[str, float]:
        """Use the batch once; see the module."""
        optimizer.zero_grad()
        scores = fisher_matrices.score_matrix(policy, batch.observations, batch.actions, batch.mask)
        matrix = fisher_matrices.exact_fisher(policy, batch.observations, mask=batch.mask)
        norms = isopo.exact_fisher_norms(scores, matrix)
        advantages = _advantages_of(self.advantages, batch).to(scores.dtype)
        coefficients = isopo.normalized_coefficients(norms, advantages, self.power)
        assign_gradient(policy, -(scores.T @ coefficients) / len(batch))
        return _finish(policy, optimizer)


def assign_gradient(policy: torch.nn.Module, gradient: Float[Tensor, "P"]) -> None:
    """Write a flat vector into `.grad`, in `policy.parameters()` order; the inverse of `diagnostics.flat_gradient`.

    Raises:
        ValueError: the length is not the number of trainable parameters.
    """
    trainable = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    sizes = [parameter.numel() for parameter in trainable]
    checks.require_shape("gradient", gradient, "P", {"P": sum(sizes)})
    for parameter, part in zip(trainable, gradient.split(sizes), strict=True):
        parameter.grad = part.view_as(parameter).to(parameter.dtype).clone()


def _advantages_of(function: Advantages, batch: Batch) -> Float[Tensor, "S"]:
    """A `(S,)`, checked: a wrong shape here would broadcast silently later."""
    advantages = function(batch)
    checks.require_shape("advantages(batch)", advantages, "S", {"S": len(batch)})
    checks.require_finite("advantages(batch)", advantages)
    return advantages.detach()


def _finish(policy: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """Let the optimizer step, and report."""
    norm = diagnostics.flat_gradient(policy).norm().item()
    optimizer.step()
    return {"backward_passes": 1.0, "gradient_norm": norm}
