"""Does the engine get a model of your own right? One call compares it with autograd."""

from collections.abc import Callable, Set
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn as nn
from jaxtyping import Float, Int
from torch import Tensor

from isopo_mini import checks
from isopo_mini.engine.graph import leaves_of
from isopo_mini.engine.microbatch import Microbatch, Uses
from isopo_mini.engine.parameter_gradients import MatrixGradients, VectorGradients
from isopo_mini.engine.segments import Segments
from isopo_mini.engine.sharded import full_parameters
from isopo_mini.precision import at_least_float32

NAMED = 5  # parameters that an error lists


def verify(
    model: nn.Module,
    log_probs: Callable[[int], Float[Tensor, "..."]],
    num_sequences: int,
    *,
    segments: Callable[[int], Int[Tensor, "..."]] | None = None,
    loss: Callable[[int], Float[Tensor, ""]] | None = None,
    loss_scale: float = 1.0,
    seed: int = 0,
) -> dict[str, float]:
    """Compare the engine's Σ_s A_s G_s, for random A, with autograd's ∇ Σ_s A_s log π_s, which needs no engine.

    If each G_s is the gradient of sequence s and of no other, the two are equal for every A. It is tried with
    `num_sequences` and with one sequence less, since some mistakes are silent where S is also the number of positions.
    Run it once on a new model. It takes four forward passes, six with a loss, and leaves `.grad` alone.

    Args:
        model: the policy, with dropout switched off.
        log_probs: computes the log-probabilities of the first S sequences of a fixed batch, first axis S.
        num_sequences: S, at least 2.
        segments: for packed sequences, what the block is given with the first S sequences. The log-probabilities may
            have its shape then, one a token. A model that does not keep the sequences of a row apart is found out:
            what the score of one owes to the tokens of another would get the other's advantage.
        loss: computes what your training differentiates inside of a block, for the first S sequences. All of it is
            multiplied by c, so it must be plus or minus the *unweighted* sum of the log-probabilities: without
            advantages, without an entropy bonus, a KL penalty or another term, not a mean.
        loss_scale: s, where the loss is s times that and the block is told so.
        seed: of A.

    Returns:
        For every parameter the larger of its two errors ‖engine − autograd‖, divided by the sum of the norms of all
        that its gradient is a sum of: rounding, about 1e-16 in double and 1e-7 in single precision. A parameter that is
        missing had no gradient, so that nothing was compared.

    Raises:
        ValueError: the two differ by more than the root of the dtype's precision; the error says for which parameters
            and by how much. Or the log-probabilities are not `(S, …)`, not the same in two calls, or depend on a
            trainable tensor that is not the model's; or the loss is another one.
        UnhandledParameterError: see `Isopo.microbatch`, whose errors about the model are raised here too.

    What it cannot see: code that this batch does not reach, such as longer sequences or another branch; positions
    that a packed model counts on from one sequence to the next, which is another model, but no mixture; a parameter
    without gradient at these values, such as the first factor of a low-rank update whose second is still zero;
    what is random in training only; without `loss`, what your training differentiates; and in half precision anything
    below ten percent.

    Example:
        >>> import torch
        >>> model, features = torch.nn.Linear(3, 2).double(), torch.randn(5, 3).double()
        >>> errors = verify(model, lambda n: model(features[:n]).log_softmax(-1)[:, 0], 5)
        >>> max(errors.values()) < 1e-14
        True
    """
    if not isinstance(num_sequences, int):
        raise TypeError(f"num_sequences: expected an integer, got {type(num_sequences).__name__}")
    checks.require_at_least("num_sequences", num_sequences, 2)
    full = full_parameters(model)
    parameters = {name: full.get(each, each) for name, each in model.named_parameters() if each.requires_grad}
    if not parameters:
        raise ValueError("model: expected at least one trainable parameter, got none")
    checks.require_positive("loss_scale", loss_scale)
    generator = torch.Generator().manual_seed(seed)
    errors: dict[str, float] = {}
    for count in (num_sequences, num_sequences - 1):
        advantages = torch.randn(count, generator=generator, dtype=torch.float64)
        packed = None if segments is None else Segments.checked(segments(count), count)
        values = partial(_by_sequence, log_probs, count, packed)
        for comparison in _comparisons(model, parameters, values, advantages, packed):
            errors[comparison.name] = max(comparison.relative_error, errors.get(comparison.name, 0.0))
        if loss is not None:
            _check_loss(loss(count), values(), list(parameters.values()), loss_scale)
    return errors


@dataclass
class _Comparison:
    """One parameter's gradient by the engine and by autograd."""

    name: str
    error: float  # ‖engine − autograd‖
    norm: float  # ‖autograd‖
    size: float  # what the norm would be if nothing cancelled
    precision: float  # ε of the numbers that the gradient is made of

    @property
    def relative_error(self) -> float:
        return self.error / self.size

    def __str__(self) -> str:
        is_rounding = self.norm <= self.precision**0.5 * self.size  # of autograd's gradient, which is 0 but for that
        off = self.error / self.norm if self.norm else 0.0
        said = f"{off:.1%} off" if off >= 1e-3 else f"by {off:.0e} of its size"
        return f"'{self.name}' ({'where there is none' if is_rounding else said})"


def _comparisons(
    model: nn.Module,
    parameters: dict[str, nn.Parameter],
    log_probs: Callable[[], Float[Tensor, "S"]],
    advantages: Float[Tensor, "S"],
    packed: Segments | None,
) -> list[_Comparison]:
    """All parameters that have a gradient, for one number of sequences; an error if the gradients are not the same."""
    count, wanted = len(advantages), list(parameters.values())
    values = log_probs()
    advantages = advantages.to(values)
    expected = torch.autograd.grad(values @ advantages, wanted, allow_unused=True)
    parts: Uses = {}

    def close_layer(_: str, uses: Uses) -> dict[str, Tensor]:
        parts.update(uses)
        return {name: part.combine(advantages) for name, part in uses.items()}

    with Microbatch(model, "separate", count, close_layer, segments=packed).opened():
        again = log_probs()
        _require_own_leaves(values, again, set(wanted))
        found = torch.autograd.grad(again.sum(), wanted, allow_unused=True)
    _require_same(values, again)

    comparisons = []
    for name, *pair in zip(parameters, found, expected, strict=True):
        ours, theirs = (torch.zeros_like(parameters[name]) if gradient is None else gradient for gradient in pair)
        error, norm, size, precision = float((ours - theirs).norm()), float(theirs.norm()), 0.0, torch.float64
        if name in parts:
            size, precision = _sum_of_norms(parts[name], advantages), parts[name].dtype
        epsilon = max(torch.finfo(dtype).eps for dtype in (precision, values.dtype))
        if max(norm, size) > 0:
            comparisons.append(_Comparison(name, error, norm, max(norm, size), epsilon))
    wrong = [each for each in comparisons if not each.relative_error <= each.precision**0.5]
    if wrong:
        more = f" and {len(wrong) - NAMED} more" if len(wrong) > NAMED else ""
        raise ValueError(
            f"model: expected autograd's gradient with S={count} sequences, got another one from the engine for "
            f"{', '.join(map(str, wrong[:NAMED]))}{more}; {_advice(wrong)}"
        )
    return comparisons


def _advice(wrong: list[_Comparison]) -> str:
    """What to do about it."""
    single = torch.finfo(torch.float32).eps
    if all(each.precision < single and each.relative_error < single**0.5 for each in wrong):
        return (
            "as small an error is the rounding of single precision: the model may compute in it somewhere, as the "
            "norms of transformers do, so compare it in single precision as a whole"
        )
    return (
        "the first axis of every layer's input must be the sequences, in the order of the advantages, and no "
        "sequence may influence another"
    )


def _by_sequence(compute: Callable[[int], Tensor], count: int, packed: Segments | None) -> Float[Tensor, "S"]:
    """log π of every sequence."""
    log_probs = compute(count)
    if packed is not None and isinstance(log_probs, Tensor) and tuple(log_probs.shape) == packed.shape:
        return at_least_float32(packed.by_sequence(log_probs, 0)).sum(dim=(1, 2))
    if not isinstance(log_probs, Tensor) or log_probs.ndim == 0 or len(log_probs) != count:
        came = tuple(log_probs.shape) if isinstance(log_probs, Tensor) else type(log_probs).__name__
        tokens = "" if packed is None else f", or one entry for each of the tokens {packed.shape}"
        raise ValueError(
            f"log_probs: expected a tensor whose first axis is the S={count} sequences{tokens}, got {came}"
        )
    return at_least_float32(log_probs.reshape(count, -1)).sum(dim=1)


def _require_same(values: Tensor, again: Tensor) -> None:
    """Nothing can be compared if the log-probabilities are random."""
    values, again = values.detach(), again.detach()
    difference = float((values - again).abs().max())
    if not difference <= torch.finfo(values.dtype).eps ** 0.5 * max(1.0, float(values.abs().max())):
        raise ValueError(
            f"log_probs: expected the same numbers in two calls, got numbers up to {difference:.2g} apart; switch "
            f"dropout off with model.eval()"
        )


def _require_own_leaves(values: Tensor, again: Tensor, own: Set[Tensor]) -> None:
    """A trainable tensor outside of the model would get the gradient of the unweighted sum, in silence.

    A leaf that is made anew in each call, such as an embedding's output for the sake of a checkpoint, is none.
    """
    lasting = set(leaves_of([again]))
    for leaf in leaves_of([values]):
        if leaf in lasting and leaf not in own:
            raise ValueError(
                f"log_probs: expected nothing trainable but the model's parameters, got a tensor of shape "
                f"{tuple(leaf.shape)} that requires a gradient and is none of them; make it a parameter of the model"
            )


def _check_loss(loss: Tensor, log_probs: Tensor, parameters: list[nn.Parameter], loss_scale: float) -> None:
    """Its gradient must be plus or minus s times that of Σ log π, for every parameter."""
    if not isinstance(loss, Tensor) or loss.ndim > 0:
        came = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
        raise ValueError(f"loss: expected a tensor without axes, got {came}")
    count, total = len(log_probs), log_probs.sum()
    of_loss, of_sum = (
        torch.cat(
            [
                torch.zeros_like(parameter).flatten() if gradient is None else gradient.flatten()
                for parameter, gradient in zip(
                    parameters, torch.autograd.grad(scalar, parameters, allow_unused=True), strict=True
                )
            ]
        ).double()
        for scalar in (loss, total)
    )
    tolerance = torch.finfo(loss.dtype).eps ** 0.5
    scale = float(of_loss @ of_sum / of_sum.square().sum())
    error = float((of_loss - scale * of_sum).norm() / of_loss.norm())
    if not error <= tolerance:
        raise ValueError(
            f"loss: expected plus or minus the sum of the log-probabilities, got another one with S={count} sequences "
            f"(its gradient is {error:.1%} off); advantages enter through the coefficients, and an entropy bonus, a KL "
            f"penalty or any other term needs a forward and a backward pass of its own, outside of the block"
        )
    if not abs(abs(scale) - loss_scale) <= tolerance * loss_scale:
        raise ValueError(
            f"loss: expected plus or minus {loss_scale:g} times the sum of the log-probabilities, got {scale:.6g} "
            f"times it with S={count} sequences; take the sum and not a mean, or tell verify and the block: "
            f"loss_scale={abs(scale):.6g}"
        )


def _sum_of_norms(part: MatrixGradients | VectorGradients, advantages: Tensor) -> float:
    """Σ_st |A_s| ‖left_st‖ ‖right_st‖: what the norm of the gradient would be if nothing cancelled."""
    lefts, rights = (
        (part.lefts, part.rights) if isinstance(part, MatrixGradients) else (part.output_gradients, part.factors)
    )
    total = 0.0
    for pair in zip(lefts, rights, strict=True):
        vectors = [vector.detach() for vector in pair if vector is not None and vector.is_floating_point()]
        norms = torch.stack([at_least_float32(vector).norm(dim=-1) for vector in vectors]).prod(dim=0)  # (S, T)
        total += float((advantages.abs().to(norms) @ norms).sum())
    return total
