"""How one batch changes the policy: REINFORCE, the natural gradient, and the two variants of ISOPO.

Every rule has `step(policy, batch, optimizer)`: it leaves minus its ascent direction in `.grad`, lets the optimizer
step, and returns metrics under the same names:

- `backward_passes`: in units of the batch;
- `gradient_norm`: Euclidean norm of what was left in `.grad`, of the whole policy;
- `cg_iterations`: products with F, of the rules that solve by conjugate gradients.

All directions are means over the N units of the batch, (1/N) Σ_n c_n ∇ log π(unit n). The unit is a sequence unless
`unit=` says "step" or "token"; see `rule_parts`. The rules of the π_old family are in `old_policy`.

A rule begins by forgetting the `.grad` of every parameter of the policy, those that the optimizer does not hold
included, and refuses a policy whose log-probabilities are random, such as one with dropout in training mode: see
`repeatable`.
"""

from dataclasses import dataclass, field
from typing import Any

import torch

from isopo_mini import checks
from isopo_mini.batch import Batch
from isopo_mini.engine import NTK, FisherNormalized, Isopo, LayerScaled, Transform
from isopo_mini.geometry import fisher as fisher_matrices
from isopo_mini.geometry import isopo, natural_gradient
from isopo_mini.rules.repeatable import log_prob, repeatable
from isopo_mini.rules.rule_parts import (
    UNITS,
    Advantages,
    accumulate,
    assign_gradient,
    batch_advantages,
    clear_gradients,
    cut,
    finish,
    spread_order,
    weigh,
)


@dataclass
class Reinforce:
    """(1/N) Σ_n A_n g_n, one step a batch: the policy gradient of Williams (1992).

    Args:
        advantages: computes A from the batch, `(S,)`; for the units "step" and "token" it may be `(S, T)`.
        microbatch_size: sequences (steps, for that unit) in one backward pass; the whole batch when None. It changes
            memory, not the result.
        unit: what the mean is over, `"sequence"`, `"step"` or `"token"`.
    """

    advantages: Advantages = batch_advantages
    microbatch_size: int | None = None
    unit: str = "sequence"

    def __post_init__(self) -> None:
        checks.require_choice("unit", self.unit, UNITS)

    def step(self, policy: Any, batch: Batch, optimizer: torch.optim.Optimizer) -> dict[str, float]:
        """Use the batch once; see the module."""
        units, weights, _ = weigh(self.advantages, batch, self.unit)
        clear_gradients(policy, optimizer)
        accumulate(policy, units, weights, self.microbatch_size)
        return finish(policy, optimizer)


@dataclass
class NaturalGradient:
    """(F + λI)⁻¹ times the policy gradient: what all the others approximate. For policies small enough.

    Args:
        damping: λ, in the units of F (per unit, so per sequence by default).
        fisher: `"exact"`: expectation over the policy's own actions at the observations of the batch;
            `"empirical"`: over the sampled actions, SᵀS/N.
        solver: `"dense"`: form F and factor it; `"cg"`: conjugate gradients on Fisher-vector products (exact F);
            `"dual"`: through the N×N Gram matrix (empirical F).
        max_iterations: of the conjugate gradients.
        tolerance: of the conjugate gradients, relative residual.
        advantages: computes A from the batch, `(S,)`; for the units "step" and "token" it may be `(S, T)`.
        unit: what g and F are means over, `"sequence"`, `"step"` or `"token"`.

    Raises:
        ValueError: a negative damping, an unknown option, or a solver that does not fit the Fisher matrix.
    """

    damping: float = 1e-3
    fisher: str = "exact"
    solver: str = "dense"
    max_iterations: int = 100
    tolerance: float = 1e-6
    advantages: Advantages = batch_advantages
    unit: str = "sequence"

    def __post_init__(self) -> None:
        checks.require_at_least("damping", self.damping, 0.0)
        checks.require_choice("fisher", self.fisher, ("exact", "empirical"))
        checks.require_choice("solver", self.solver, ("dense", "cg") if self.fisher == "exact" else ("dense", "dual"))
        checks.require_choice("unit", self.unit, UNITS)

    def step(self, policy: Any, batch: Batch, optimizer: torch.optim.Optimizer) -> dict[str, float]:
        """Use the batch once; see the module.

        Each product with F counts as a backward pass. What it takes to form F is not counted: compare seconds.
        """
        batch, advantages = cut(self.advantages, batch, self.unit)
        clear_gradients(policy, optimizer)
        repeatable(policy, lambda: policy.logits(batch.observations[:1]))
        scores = fisher_matrices.score_matrix(policy, batch.observations, batch.actions, batch.mask)
        gradient = scores.T @ advantages.to(scores.dtype) / len(batch)
        metrics: dict[str, float] = {}
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
        return metrics | finish(policy, optimizer, 1.0 + metrics.get("cg_iterations", 0.0))


@dataclass
class LayerwiseIsopo:
    """ISOPO in one backward pass: a transform of the engine, applied to every layer. See the subclasses.

    Args:
        transform: from the layer's gradients and A to coefficients.
        advantages: computes A from the batch, `(S,)`; for the units "step" and "token" it may be `(S, T)`.
        microbatch_size: units in a microbatch. Each is transformed on its own, then all are summed; the whole batch
            when None.
        block_size: units that share a Gram matrix inside of a microbatch; all of them when None. It makes the step of
            microbatches of this size in one pass, faster and in more memory.
        gram: how Gram matrices are made, see `engine.Isopo`. The default estimates them where that is much faster;
            `"auto"` is exact everywhere, and is what a specification of `rule_specs` means unless it says otherwise.
            For many sequences the default finds the NTK's c without K, to about 1 % of its length.
        sketch_size: k of the estimates.
        layers: `"separate"`, or `"together"` for one set of coefficients for the whole policy.
        seed: of sketches and sampled tokens.
        unit: what has one gradient, one row of K and one coefficient: `"sequence"`, `"step"` or `"token"`. With tokens
            each token's context is computed again for it, T times the cost of a step.
        spread: deal every group over the microbatches, instead of taking whole groups together. It decides which
            sequences share a Gram matrix, and so the result.
    """

    transform: Transform
    advantages: Advantages = batch_advantages
    microbatch_size: int | None = None
    block_size: int | None = None
    gram: str = "fast"
    sketch_size: int = 32
    layers: str = "separate"
    seed: int = 0
    unit: str = "sequence"
    spread: bool = False
    _engine: Isopo | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        checks.require_choice("unit", self.unit, UNITS)

    def step(self, policy: Any, batch: Batch, optimizer: torch.optim.Optimizer) -> dict[str, float]:
        """Use the batch once; see the module."""
        units, advantages = cut(self.advantages, batch, self.unit)
        weights = advantages / len(units)
        if self.spread:
            order = spread_order(units)
            units, weights = units.select(order), weights[order]
        engine = self._engine_of(policy)
        clear_gradients(policy, optimizer)
        start = 0
        for part in units.microbatches(self.microbatch_size):
            shares = weights[start : start + len(part)]
            with engine.microbatch(shares, part.mask, block_size=self.block_size):
                (-log_prob(policy, part).sum()).backward()
            start += len(part)
        metrics = finish(policy, optimizer)
        for name, of_layers in engine.noted().items():
            metrics[name] = torch.stack(list(of_layers.values())).median().item()
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
    """ISOPO, interacting: c = λ(K + λI)⁻¹A in every layer, with λ = ρ·tr K/S (moving average); or that over λ.

    Args:
        damping: ρ.
        scale: `"gradient"`, of the public code, which AdamW belongs to; or `"natural"`, the damped natural gradient
            itself, which SGD belongs to. See `geometry.isopo.ntk_coefficients`.
        spectra: two more metrics, of the median layer: `participation`, how many directions share its gradients, and
            `damping_share`, λ over the largest eigenvalue. They make one ρ comparable with another task's, and cost
            the eigenvalues of every K.
        **options: see `LayerwiseIsopo`.
    """

    def __init__(self, damping: float = 1.0, scale: str = "gradient", spectra: bool = False, **options: Any) -> None:
        super().__init__(NTK(damping, scale, spectra), **options)


class LayerScaledReinforce(LayerwiseIsopo):
    """REINFORCE with every layer in its natural scale: c = A over tr K/S (moving average), one number a layer.

    What remains of ISOPO when no sequence is treated otherwise than another; `engine.transforms.LayerScaled`.

    Args:
        **options: see `LayerwiseIsopo`. No Gram matrix is made, so `gram` changes nothing.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(LayerScaled(), **options)


class FisherNormalizedIsopo(LayerwiseIsopo):
    """ISOPO, non-interacting: c_s = A_s/‖G_s‖_F in every layer.

    Args:
        norm: `"sequence"`, `"token"` or `"token-unscaled"`: see `engine.transforms.FisherNormalized`.
        power: of the Fisher norm.
        strength: ρ of the regulariser.
        keep_small: which regulariser.
        scale: of the layer, `"norm"` as published, `"gradient"` or `"natural"`; see there too.
        **options: see `LayerwiseIsopo`.
    """

    def __init__(
        self,
        norm: str = "sequence",
        power: float = 1.0,
        strength: float = 0.0,
        keep_small: bool = False,
        scale: str = "norm",
        **options: Any,
    ) -> None:
        super().__init__(
            FisherNormalized(norm, overlap_power=power, strength=strength, keep_small=keep_small, scale=scale),
            **options,
        )


@dataclass
class ExactFisherIsopo:
    """ISOPO with the exact Fisher norm of the whole policy: c_s = A_s/√(g_sᵀ F g_s). For small policies.

    Args:
        power: of the norm.
        advantages: computes A from the batch, `(S,)`; for the units "step" and "token" it may be `(S, T)`.
        unit: what is normalised, `"sequence"`, `"step"` or `"token"`.
    """

    power: float = 1.0
    advantages: Advantages = batch_advantages
    unit: str = "sequence"

    def __post_init__(self) -> None:
        checks.require_choice("unit", self.unit, UNITS)

    def step(self, policy: Any, batch: Batch, optimizer: torch.optim.Optimizer) -> dict[str, float]:
        """Use the batch once; see the module. What it takes to form F is not counted as backward passes."""
        batch, advantages = cut(self.advantages, batch, self.unit)
        clear_gradients(policy, optimizer)
        repeatable(policy, lambda: policy.logits(batch.observations[:1]))
        scores = fisher_matrices.score_matrix(policy, batch.observations, batch.actions, batch.mask)
        matrix = fisher_matrices.exact_fisher(policy, batch.observations, mask=batch.mask)
        norms = isopo.exact_fisher_norms(scores, matrix)
        coefficients = isopo.normalized_coefficients(norms, advantages.to(scores.dtype), self.power)
        assign_gradient(policy, -(scores.T @ coefficients) / len(batch))
        return finish(policy, optimizer)
