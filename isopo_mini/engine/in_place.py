"""What a use of a parameter keeps for the backward pass, and how it notices that somebody has changed it since.

A tensor counts its in-place changes (`_version`). Autograd compares the count for what it saves itself; the engine does
the same for what it holds beyond that. Changes that bypass the count, by `.data` or through NumPy, are seen by neither.
"""

from typing import Any

import torch
from torch import Tensor


class Unchanged:
    """A tensor that must stay as it is until it has been used."""

    def __init__(self, name: str, tensor: Tensor) -> None:
        self.name = name
        self.tensor = tensor
        self._version = _version(tensor)

    def check(self) -> None:
        """Has anybody written to the tensor since?

        Raises:
            RuntimeError: yes; with the name of the parameter whose gradient would be wrong.
        """
        if _version(self.tensor) != self._version:
            raise changed_in_place(self.name, self.tensor)


def changed_in_place(name: str, tensor: Tensor | None = None) -> RuntimeError:
    """The error for a parameter whose use kept something that is no longer what it was."""
    what = "one" if tensor is None else f"the one of shape {tuple(tensor.shape)}"
    return RuntimeError(
        f"parameter '{name}': expected the tensors of its use to stay as they are until the backward pass is over, "
        f"got {what} changed in place; use an operation that makes a new tensor"
    )


def saved_tensors(ctx: Any, name: str) -> tuple[Any, ...]:
    """`ctx.saved_tensors` of a use of the named parameter, which autograd's own error does not name."""
    try:
        return ctx.saved_tensors
    except RuntimeError as error:
        if "modified by an inplace operation" not in str(error):
            raise
        raise changed_in_place(name) from error


def not_a_view(outputs: Tensor) -> Tensor:
    """The same numbers in the same memory, as a tensor that what follows may change in place.

    `F.linear` with a bias works on two axes and returns a view of that. Autograd forbids to change a view that a custom
    function has made, and of any other it moves the history to what is viewed.
    """
    return torch.ops.aten._unsafe_view(outputs, outputs.shape) if outputs._is_view() else outputs


def _version(tensor: Tensor) -> int:
    """How often the tensor was changed in place. A tensor of inference mode does not count."""
    return -1 if tensor.is_inference() else tensor._version
