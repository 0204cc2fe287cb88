"""The sequences are the first axis, and nothing may line them up with another one."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# Operators that broadcast by lining up the last axes of their arguments.
ELEMENTWISE = {
    getattr(owner, name)
    for owner, names in (
        (torch, ("add", "sub", "mul", "div")),
        (Tensor, ("add", "sub", "mul", "div", "add_", "sub_", "mul_", "div_", "__add__", "__radd__", "__iadd__")),
        (Tensor, ("__sub__", "__rsub__", "__isub__", "__mul__", "__rmul__", "__imul__", "__truediv__", "__itruediv__")),
    )
    for name in names
}


class RowsOfSequences(Tensor):
    """What a look-up with indices `(S,)` gives, `(S, d)`, until its first operation.

    Positions that are looked up once for all sequences have the same shape where S = T. They give themselves away by
    being added to `(S, T, d)`: that lines up their first axis with the second one.
    """

    parameter: str

    @classmethod
    def of(cls, rows: Tensor, parameter: str) -> "RowsOfSequences":
        """The same rows, with the name of the parameter they come from."""
        watched = rows.as_subclass(cls)
        watched.parameter = parameter
        return watched

    @classmethod
    def __torch_function__(cls, func: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Called by PyTorch in place of `func`: refuses to add rows of sequences to positions."""
        if not all(issubclass(cls, kind) for kind in types):
            return NotImplemented  # a stand-in is among the arguments: its handler comes first
        if func in ELEMENTWISE:
            for rows in args:
                if isinstance(rows, RowsOfSequences):
                    rows._refuse_positions(args)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    def _refuse_positions(self, others: tuple[Any, ...]) -> None:
        """Is one of the arguments `(S, S, …)`, whose second axis would meet the sequences?"""
        with torch._C.DisableTorchFunctionSubclass():
            for other in others:
                if not isinstance(other, Tensor) or other.ndim <= self.ndim or len(self) == 1:
                    continue
                if other.shape[0] == len(self) == other.shape[-self.ndim]:
                    raise ValueError(
                        f"parameter '{self.parameter}': expected indices whose first axis is the S={len(self)} "
                        f"sequences, got indices ({len(self)},) whose rows are combined with shape "
                        f"{tuple(other.shape)}, as positions are; expand positions to (S, T) before looking them up"
                    )
