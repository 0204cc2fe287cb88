"""What calls a function that no handler knows, keeps account of the copies that takes, and says so."""

import warnings
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from isopo_mini.engine.copies import ELEMENTWISE, EXPANDING, Call
from isopo_mini.engine.layer_functions import copies_of
from isopo_mini.engine.sequence_axis import RowsOfSequences
from isopo_mini.engine.stand_in import Slot, UnhandledParameterError

MAX_BYTES = 2**28  # of the copies of one parameter
NAMED = 3  # parameters that a warning lists


class Fallback:
    """Calls functions that no handler knows, and remembers for which parameters.

    Args:
        max_bytes: what the copies of one parameter may take; 0 refuses every use that no handler covers.
    """

    def __init__(self, max_bytes: int = MAX_BYTES) -> None:
        self.max_bytes = max_bytes
        self.used: dict[str, str] = {}  # parameter → the first function that met it
        self._warned: set[str] = set()

    def __call__(self, function: Callable, args: Any, kwargs: Any) -> Any:
        """The function's result, through which every sequence's gradient reaches its own copy.

        Args:
            function: any of PyTorch's.
            args: its arguments, with stand-ins or `Copied` among them.
            kwargs: likewise.

        Raises:
            UnhandledParameterError: the copies are too large, an activation does not carry the sequences, or all
                sequences together give something else than one after the other.
        """
        call = Call(self.copies, function, args, kwargs)
        activations = call.activations()
        if torch.is_grad_enabled() and activations and call.changes_in_place:
            if call.name not in ELEMENTWISE or args[0] is not activations[0]:
                raise call.refused(", which changes it in place")
            return call.lined_up()
        plain = call.with_parameters()
        if not torch.is_grad_enabled() or not any(map(_asks_for_gradient, tree_leaves(plain))):
            return plain
        sequences = call.sequences()
        if call.name in EXPANDING and not activations and call.repeats(sequences, plain):
            return RowsOfSequences.of(call.one_row(cast(int, sequences)), call.slots[0].name)
        if not any(leaf.requires_grad or call.carries(leaf) for leaf in activations):
            return call.from_parameters_alone(plain)
        if sequences is None:
            raise call.refused(" before any activation that carries the sequences")
        return call.lined_up() if call.name in ELEMENTWISE else call.one_by_one(plain)

    def of_parameters_alone(self, function: Callable, *args: Any) -> Any:
        """The function's result, where none of its arguments belongs to a sequence."""
        call = Call(self.copies, function, args, {})
        return call.from_parameters_alone(call.with_parameters())

    def copies(self, slot: Slot, sequences: int, use: str) -> Tensor:
        """One copy of a parameter a sequence, `(S, …)`."""
        slot.check_places()  # what was computed from the parameter may meet a sequence when that has gone
        needed = sequences * slot.parameter.numel() * slot.parameter.element_size()
        if needed > self.max_bytes:
            raise UnhandledParameterError(
                slot.name, f"{use}, for which {sequences} copies take {needed:,} bytes of {self.max_bytes:,} allowed"
            )
        self.used.setdefault(slot.name, use)
        return copies_of(slot, sequences)

    def warn(self) -> None:
        """Say for which parameters it was used, each once."""
        new = [name for name in self.used if name not in self._warned]
        if not new:
            return
        self._warned.update(new)
        more = f" and {len(new) - NAMED} more" if len(new) > NAMED else ""
        warnings.warn(
            f"{', '.join(f'{name} ({self.used[name]})' for name in new[:NAMED])}{more}: no handler covers what is done "
            f"with these parameters, so each sequence gets a copy of its own: exact, at S times their memory",
            stacklevel=6,  # the block of the user
        )


def _asks_for_gradient(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.requires_grad
