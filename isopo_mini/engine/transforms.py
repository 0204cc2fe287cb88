"""Which coefficients a layer's gradients get: the two variants of ISOPO, and the scale of a layer."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from isopo_mini import checks
from isopo_mini.engine.layer_gradients import LayerGeometry
from isopo_mini.engine.moving_averages import MovingAverages
from isopo_mini.geometry import isopo, ntk_solvers
from isopo_mini.precision import at_least_float32


@runtime_checkable
class GeometryOfBlocks(Protocol):
    """What the NTK may ask of a layer whose sequences are cut into blocks; see `blocks`."""

    def grams(self) -> Float[Tensor, "B b b"]:
        """K of every block."""
        ...

    def rounding(self) -> Float[Tensor, "B b"] | None:
        """Up to which ‖G_s‖ the gradient is zero but for rounding; None where it is no sum that could cancel."""
        ...


@runtime_checkable
class Transform(Protocol):
    """Turns the advantages of a microbatch into one layer's coefficients."""

    def coefficients(
        self, layer: LayerGeometry, advantages: Float[Tensor, "S"], averages: MovingAverages
    ) -> Float[Tensor, "S"]:
        """c, with which the layer's gradient becomes Σ_s c_s G_s."""
        ...


@dataclass(frozen=True)
class NTK:
    """c = λ(K + λI)⁻¹A or (K + λI)⁻¹A, λ = ρ · (moving average of tr K/S): the damped natural gradient of the layer.

    Args:
        damping: ρ > 0, without units. Large ρ is REINFORCE (with `"natural"`, over λ), small ρ the undamped natural
            gradient.
        scale: `"gradient"`: with the factor λ, as in the public code, for an optimizer such as AdamW, which undoes it;
            `"natural"`: without, for SGD. See `isopo.ntk_coefficients`.
        spectra: note two numbers of every layer's K (`MovingAverages.note`), which cost its eigenvalues:
            `"participation"` (`isopo.participation_ratio`) and `"damping_share"`, λ over the largest eigenvalue, which
            says what ρ does to the top direction there, in any layer of any model.

    Raises:
        ValueError: ρ is not positive, or the scale is unknown.
    """

    damping: float = 1.0
    scale: str = "gradient"
    spectra: bool = False

    def __post_init__(self) -> None:
        checks.require_positive("damping", self.damping)
        checks.require_choice("scale", self.scale, isopo.NTK_SCALES)

    def coefficients(
        self, layer: LayerGeometry, advantages: Float[Tensor, "S"], averages: MovingAverages
    ) -> Float[Tensor, "S"]:
        """See the class."""
        rows, solve = self._rows_and_solver(layer, len(advantages))
        if rows is None:
            gram = layer.gram()
            damping = self.damping * averages.blend("eigenvalue", isopo.mean_eigenvalue(gram))
            coefficients = isopo.solver_for(self.damping, gram)(gram, advantages, damping)
        else:
            row_norms = torch.linalg.vector_norm(rows, dim=1)
            eigenvalue = row_norms.double().square().mean()
            damping = self.damping * averages.blend("eigenvalue", eigenvalue.to(rows.dtype))
            coefficients = solve(rows, advantages, damping)
        if self.spectra:
            if rows is not None:
                gram = rows.double().mT @ rows.double()  # GᵀG has the eigenvalues of GGᵀ, but for zeros
            self._note_spectrum(gram, damping, averages)
        if self.scale == "gradient":
            return coefficients
        norms = _norms_of(gram) if rows is None else row_norms
        return isopo.over_scale(_unless_all_rounding(coefficients, layer, norms, rows is None), damping)

    def _rows_and_solver(
        self, layer: LayerGeometry, sequences: int
    ) -> tuple[Float[Tensor, "S P"] | None, Callable[..., Tensor]]:
        """G, one row a sequence, and how c is found from it; None where K has to be formed."""
        columns = layer.few_columns()
        if columns is not None and isopo.is_above_rounding(self.damping, columns):
            single = isopo.single_precision_suffices(self.damping, columns)
            return columns, partial(isopo.solve_ntk_by_columns, single=single)
        iterations = ntk_solvers.iterations_for(self.damping, sequences)
        rows = None if self.spectra else layer.rows_for_products(iterations)
        return rows, partial(ntk_solvers.solve_ntk_by_products, iterations=iterations)

    def coefficients_of_blocks(
        self, layer: "GeometryOfBlocks", advantages: Float[Tensor, "S"], averages: MovingAverages
    ) -> Float[Tensor, "S"]:
        """`coefficients` of blocks of sequences of the same size, each with a K of its own, all at once."""
        gram = layer.grams()
        of_blocks = advantages.unflatten(0, (len(gram), -1))
        eigenvalues = gram.diagonal(dim1=1, dim2=2).mean(dim=1)
        damping = self.damping * averages.blend("eigenvalue", eigenvalues)
        coefficients = isopo.solver_for(self.damping, gram[0])(gram, of_blocks, damping)
        if self.scale == "natural":
            rounding = layer.rounding()
            if rounding is not None:
                norms = gram.diagonal(dim1=1, dim2=2).clamp_min(0.0).sqrt()
                coefficients = torch.where((norms <= rounding).all(dim=1, keepdim=True), 0.0, coefficients)
            coefficients = isopo.over_scale(coefficients, damping[:, None])
        return coefficients.flatten()

    def _note_spectrum(self, gram: Float[Tensor, "S S"], damping: Float[Tensor, ""], averages: MovingAverages) -> None:
        """Both numbers of K; none of a step that is not finite, which a `GradScaler` skips."""
        if gram.isfinite().all():
            averages.note("participation", isopo.participation_ratio(gram))
            averages.note("damping_share", isopo.damping_share(gram, damping))


@dataclass(frozen=True)
class LayerScaled:
    """c = A/μ with μ = (moving average of) tr K/S: every layer's REINFORCE gradient, in that layer's natural scale.

    No sequence is treated otherwise than another: it is what ISOPO's variants are in the natural scale, without what
    they do between the sequences, and so what they have to be compared with. It is `NTK(ρ, scale="natural")` as ρ → ∞,
    times ρ.
    """

    def coefficients(
        self, layer: LayerGeometry, advantages: Float[Tensor, "S"], averages: MovingAverages
    ) -> Float[Tensor, "S"]:
        """See the class."""
        norms = layer.norms()
        eigenvalue = averages.blend("eigenvalue", norms.double().square().mean())
        return isopo.over_scale(_unless_all_rounding(at_least_float32(advantages), layer, norms, True), eigenvalue)


@dataclass(frozen=True)
class FisherNormalized:
    """c_s = A_s / (nᵖ oᵠ rʷ): the advantages over (powers of) the norms of the layer's gradient.

    n = ‖G_s‖ is the Euclidean norm, o = ‖G_s‖_F the Fisher norm, r = o/n their ratio. The defaults are ISOPO
    as published: o alone.

    Args:
        norm: `"sequence"`: o_s² = (1/S) Σ_s' K_ss'². `"token"`: from sampled tokens and divided by their norms, as in
            the public code. `"token-unscaled"`: the same without that division.
        gradient_power: p.
        overlap_power: q.
        ratio_power: w.
        strength: ρ ≥ 0 of the regulariser, see `isopo.regularized`.
        keep_small: which regulariser.
        tokens: how many tokens are sampled for the token norms.
        scale: of the layer. `"norm"`, as published: the divisor is what it is. `"gradient"`: it is taken relative to
            its root mean square, A·rms(o)/o_s, so that the layer's step has the size of REINFORCE's and only the
            sequences' shares differ. `"natural"`: that, over (a moving average of) tr K/S, as in `LayerScaled`.

    Raises:
        ValueError: an unknown norm or scale, a negative strength, or fewer than one token.
    """

    norm: str = "sequence"
    gradient_power: float = 0.0
    overlap_power: float = 1.0
    ratio_power: float = 0.0
    strength: float = 0.0
    keep_small: bool = False
    tokens: int = 250
    scale: str = "norm"

    def __post_init__(self) -> None:
        checks.require_choice("norm", self.norm, ("sequence", "token", "token-unscaled"))
        checks.require_choice("scale", self.scale, ("norm", "gradient", "natural"))
        checks.require_at_least("strength", self.strength, 0.0)
        checks.require_at_least("tokens", self.tokens, 1)

    def coefficients(
        self, layer: LayerGeometry, advantages: Float[Tensor, "S"], averages: MovingAverages
    ) -> Float[Tensor, "S"]:
        """See the class."""
        overlaps = self._fisher_norms(layer)
        factors = [("overlap", overlaps, self.overlap_power)]
        if self.gradient_power or self.ratio_power:
            norms = layer.norms().to(overlaps.dtype)
            ratios = torch.where(norms == 0, torch.zeros_like(norms), overlaps / norms)
            factors += [("gradient", norms, self.gradient_power), ("ratio", ratios, self.ratio_power)]
        coefficients = advantages
        for name, values, power in factors:
            if power:
                mean_square = averages.blend(name, isopo.mean_of_squares(values))
                values = isopo.regularized(values, self.strength, mean_square, self.keep_small)
                if self.scale != "norm":
                    values = isopo.over_scale(values, isopo.mean_of_squares(values).sqrt())
                coefficients = isopo.divide(coefficients, values, power)
        if self.scale == "natural":
            coefficients = LayerScaled().coefficients(layer, coefficients, averages)
        return coefficients

    def _fisher_norms(self, layer: LayerGeometry) -> Float[Tensor, "S"]:
        if self.norm == "sequence":
            columns = layer.few_columns()
            if columns is not None:
                norms = torch.linalg.vector_norm(columns, dim=1)
                return _zero_where_rounding(isopo.fisher_norms_by_columns(columns), layer, norms, False)
            gram = layer.gram()
            return _zero_where_rounding(isopo.root_mean_square(gram), layer, _norms_of(gram), True)
        overlaps, token_norms = layer.token_overlaps(self.tokens)
        in_their_norms = isopo.token_fisher_norms(overlaps, token_norms)  # at most ‖G_s‖
        norms = in_their_norms if self.norm == "token" else isopo.token_fisher_norms(overlaps)
        return _zero_where_rounding(norms, layer, in_their_norms, False)


# --- A layer whose true gradient is zero: divided by its norm, rounding would be blown up to a step ----------------


def _norms_of(gram: Float[Tensor, "S S"]) -> Float[Tensor, "S"]:
    """‖G_s‖. Products of positions that cancel can leave a square below zero."""
    return gram.diagonal().clamp_min(0.0).sqrt()


def _zero_where_rounding(
    values: Float[Tensor, "S"], layer: LayerGeometry, norms: Float[Tensor, "S"], from_gram: bool
) -> Float[Tensor, "S"]:
    """The values, and 0 for a sequence whose ‖G_s‖ is rounding."""
    rounding = layer.rounding(from_gram)
    return values if rounding is None else torch.where(norms <= rounding, 0.0, values)


def _unless_all_rounding(
    coefficients: Float[Tensor, "S"], layer: LayerGeometry, norms: Float[Tensor, "S"], from_gram: bool
) -> Float[Tensor, "S"]:
    """The coefficients, and 0 for all if the ‖G_s‖ of all are rounding."""
    rounding = layer.rounding(from_gram)
    return coefficients if rounding is None else torch.where((norms <= rounding).all(), 0.0, coefficients)
