"""Say at the door what was expected and what came.

Silent broadcasting is the commonest bug of reinforcement learning: `(S,)` advantages times `(S, 1)`
log-probabilities make an `(S, S)` matrix that averages to something plausible. Every public function
therefore checks its arguments with the helpers below, which all raise with the argument's name,
what was expected and what came.
"""

from numbers import Real

import torch
from torch import Tensor


def require_shape(name: str, tensor: Tensor, shape: str, sizes: dict[str, int] | None = None) -> dict[str, int]:
    """Check that `tensor` has the axes named in `shape`, for example `"S T"`; return the size of each axis.

    A name stands for one size throughout: pass the returned `sizes` on to check the next argument against it.
    A number stands for itself, and a leading `...` for any number of axes.

    Raises:
        TypeError: `tensor` is not a tensor.
        ValueError: the number of axes or a size differs.
    """
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a tensor of shape ({shape}), got {type(tensor).__name__}")
    sizes = sizes or {}
    axes = shape.replace(",", " ").split()
    actual = tuple(tensor.shape)
    if axes and axes[0] == "...":
        axes = axes[1:]
        actual = actual[len(actual) - len(axes) :] if len(actual) >= len(axes) else actual
    found = dict(sizes)
    fits = len(actual) == len(axes) and all(
        size == (int(axis) if axis.isdigit() else found.setdefault(axis, size))
        for axis, size in zip(axes, actual, strict=True)
    )
    if not fits:
        expected = " ".join(f"{axis}={sizes[axis]}" if axis in sizes else axis for axis in axes)
        raise ValueError(f"{name}: expected shape ({expected}), got {tuple(tensor.shape)}")
    return found


def require_floating(name: str, tensor: Tensor) -> None:
    """Check that `tensor` holds floating-point numbers."""
    if not tensor.is_floating_point():
        raise TypeError(f"{name}: expected a floating-point tensor, got {tensor.dtype}")


def require_integer(name: str, tensor: Tensor) -> None:
    """Check that `tensor` holds 64-bit integers, which is what indexing expects."""
    if tensor.dtype != torch.int64:
        raise TypeError(f"{name}: expected an int64 tensor, got {tensor.dtype}")


def require_finite(name: str, tensor: Tensor) -> None:
    """Check that no entry of `tensor` is infinite or not a number."""
    if tensor.is_meta:
        raise ValueError(f"{name}: expected numbers, got a tensor on the meta device, which has none")
    finite = torch.isfinite(tensor)
    if not finite.all():
        bad = torch.nonzero(~finite)[0].tolist()
        raise ValueError(f"{name}: expected finite numbers, got {tensor[tuple(bad)].item()} at index {tuple(bad)}")


def require_same_device(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    """Check that two tensors live on one device."""
    if tensor.device != other.device:
        raise ValueError(f"{name}: expected device {other.device} (that of {other_name}), got {tensor.device}")


def require_layer_input(name: str, tensor: Tensor, weight: Tensor) -> None:
    """Check that a linear layer with this weight, `(o, d)`, takes `tensor`: d features, and its dtype or one that
    autocast converts.
    """
    require_shape(name, tensor, "... d", {"d": weight.shape[1]})
    converted = torch.is_autocast_enabled(tensor.device.type) and tensor.is_floating_point()
    if tensor.dtype != weight.dtype and not (converted and tensor.dtype != torch.float64):
        raise TypeError(f"{name}: expected {weight.dtype} (the dtype of the policy's weights), got {tensor.dtype}")


def require_not_empty(name: str, tensor: Tensor) -> None:
    """Check that every axis of `tensor` has at least one entry."""
    if tensor.numel() == 0:
        raise ValueError(f"{name}: expected at least one entry along every axis, got shape {tuple(tensor.shape)}")


def require_numbers(name: str, tensor: Tensor) -> None:
    """Check that `tensor` holds floating-point numbers, at least one, and all of them finite."""
    require_floating(name, tensor)
    require_not_empty(name, tensor)
    require_finite(name, tensor)


def require_vector(
    name: str, vector: Tensor, other: Tensor, other_name: str, sizes: dict[str, int], axis: str = "P"
) -> None:
    """Check that a vector of numbers has the length and the device of another argument."""
    require_shape(name, vector, axis, sizes)
    require_numbers(name, vector)
    require_same_device(name, vector, other_name, other)


def require_symmetric(name: str, matrix: Tensor) -> None:
    """Check that a matrix equals its transpose, up to rounding."""
    asymmetry = (matrix - matrix.mT).abs().max().item()
    if asymmetry > 100 * torch.finfo(matrix.dtype).eps * matrix.abs().max().item():
        raise ValueError(f"{name}: expected a symmetric matrix, got entries that differ by {asymmetry:g}")


def require_at_least(name: str, value: float, minimum: float) -> None:
    """Check that a number is finite and at least `minimum`."""
    if not isinstance(value, Real):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    if not minimum <= value < float("inf"):
        raise ValueError(f"{name}: expected a finite number >= {minimum:g}, got {value}")


def require_positive(name: str, value: float) -> None:
    """Check that a number is finite and greater than zero."""
    if not isinstance(value, Real):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    if not 0 < value < float("inf"):
        raise ValueError(f"{name}: expected a finite number > 0, got {value}")


def require_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Check that a named option exists; the error lists those that do."""
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(choices)}, got {value!r}")


def require_probabilities(name: str, probs: Tensor, axes: tuple[str, ...] = ()) -> None:
    """The last axis holds probabilities, up to rounding; the error names the row by `axes`, such as ("state",)."""
    sums, smallest = probs.sum(dim=-1), probs.amin(dim=-1)
    bad = ((sums - 1).abs() > 1.001e-5) | ~(smallest >= -1e-12)  # five digits, 0.33333 three times, whatever the order
    if not bad.any():
        return
    index = tuple(bad.nonzero()[0].tolist()) if axes else ()
    where = ", ".join(f"{axis} {i}" for axis, i in zip(axes, index, strict=True))
    raise ValueError(
        f"{name}: expected non-negative numbers with sum 1{' in each row' if axes else ''}, "
        f"got sum {sums[index].item():g} and smallest {smallest[index].item():g}{' at ' + where if axes else ''}"
    )
