"""Products of an activation with a weight matrix, in the ways that PyTorch has of writing them."""

import re
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from isopo_mini.engine.layer_functions import matrix_product, shape_of
from isopo_mini.engine.stand_in import TAKE_TRANSPOSES, Copied, StandIn, register


@register(Tensor.T.__get__, Tensor.mT.__get__, Tensor.t, torch.t)  # type: ignore[attr-defined]
def _transpose(input: Tensor) -> Any:
    """`w.T` remembers whose transpose it is."""
    return _swapped(input, -2, -1)


@register(Tensor.transpose, torch.transpose, Tensor.swapaxes, torch.swapaxes)
def _swapped(input: Any, dim0: int, dim1: int) -> Any:
    if not isinstance(input, StandIn) or len(shape_of(input)) != 2 or {dim0 % 2, dim1 % 2} != {0, 1}:
        return NotImplemented
    transpose = input.slot.layer.fallback(torch.transpose, (input, 0, 1), {})
    assert isinstance(transpose, Copied)
    transpose.transpose_of = input
    return transpose


@register(F.linear)
def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
    """x Wᵀ + b."""
    return _product(input, weight, bias, transposed=False)


@register(torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, Tensor.mm)
def _matmul(input: Any, other: Any) -> Any:
    """x W."""
    return _product(input, other, None, transposed=True)


@register(torch.addmm)
def _addmm(input: Tensor, mat1: Tensor, mat2: Tensor, *, beta: float = 1, alpha: float = 1) -> Any:
    """b + x W."""
    if alpha != 1 or beta != 1 or len(shape_of(input)) != 1:
        return NotImplemented
    return _product(mat1, mat2, input, transposed=True)


@register(torch.einsum)
def _einsum(equation: Any, *operands: Any) -> Any:
    """x W or x Wᵀ, where the equation says no more than that."""
    if len(operands) != 2 or not isinstance(equation, str):
        return NotImplemented
    inputs, weight = operands
    terms = re.fullmatch(r"(.*)(.),(.)(.)->(.*)(.)", equation.replace(" ", "").replace("...", "…"))
    if terms is None or isinstance(inputs, (StandIn, Copied)):
        return NotImplemented
    kept, contracted, row, column, kept_too, free = terms.groups()
    if kept != kept_too or len({contracted, free, *kept}) != len(kept) + 2 or "…" in contracted + free:
        return NotImplemented
    if {row, column} != {contracted, free}:
        return NotImplemented
    return _product(inputs, weight, None, transposed=row == contracted)


TAKE_TRANSPOSES |= {F.linear, torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, Tensor.mm, torch.addmm}
TAKE_TRANSPOSES |= {torch.einsum}


def _product(inputs: Any, weight: Any, bias: Any, transposed: bool) -> Any:
    """x Wᵀ + b, or x W + b with `transposed`; W may be a transpose itself."""
    if isinstance(weight, Copied):
        weight, transposed = weight.transpose_of, not transposed
    if isinstance(inputs, (StandIn, Copied)) or isinstance(bias, Copied) or weight is None:
        return NotImplemented
    if len(shape_of(weight)) != 2 or inputs.ndim < 2:
        return NotImplemented
    return matrix_product(inputs, weight, bias, transposed=transposed)
