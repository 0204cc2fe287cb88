"""The fallback: where no handler knows a function, each sequence gets a copy of the parameter.

The gradient at the copies is the G_s themselves, at S times the memory of the parameter. It is exact where sequence s
meets copy s and no other. Elementwise, the copies are lined up with the sequences. Any other function is run for each
sequence as a batch of one, and must give what it gives for all together: one that mixes sequences, or whose first axis
is another, is refused.

What is computed from parameters alone, such as 1 + w or w.T, is `Copied`: it keeps how it was computed until it meets
an activation, and with it the sequences.
"""

import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from isopo_mini.engine.layer_functions import copies_of
from isopo_mini.engine.sequence_axis import RowsOfSequences
from isopo_mini.engine.stand_in import Copied, Slot, StandIn, UnhandledParameterError, slot_of

MAX_BYTES = 2**28  # of the copies of one parameter
NAMED = 3  # parameters that a warning lists

_OPERATORS = ("add", "sub", "mul", "truediv", "floordiv", "pow")
INPLACE_OPERATORS = frozenset(f"__i{name}__" for name in _OPERATORS)
# Functions that broadcast their arguments and work entry by entry.
ELEMENTWISE = frozenset(
    [f"__{before}{name}__" for name in _OPERATORS for before in ("", "r", "i")]
    + ["add", "sub", "mul", "div", "true_divide", "rsub", "pow", "maximum", "minimum", "where", "addcmul", "lerp"]
    + ["add_", "sub_", "mul_", "div_"]
)
# Methods that repeat a parameter along a new first axis, or along one of length 1.
EXPANDING = frozenset(("expand", "expand_as", "broadcast_to", "repeat", "tile"))


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
        call = _Call(self, function, args, kwargs)
        activations = call.activations()
        if torch.is_grad_enabled() and activations and call.changes_in_place:
            sequences = call.sequences()
            if call.name not in ELEMENTWISE or sequences is None or args[0] is not activations[0]:
                raise call.refused(", which changes it in place")
            return call.lined_up(sequences)
        plain = call.with_parameters()
        if not torch.is_grad_enabled() or not any(map(_asks_for_gradient, tree_leaves(plain))):
            return plain
        sequences = call.sequences()
        if call.name in EXPANDING and not activations and call.repeats(sequences, plain):
            return RowsOfSequences.of(call.one_row(cast(int, sequences)), call.slots[0].name)
        if not any(leaf.requires_grad or _carries(leaf, sequences) for leaf in activations):
            return call.from_parameters_alone(plain)
        if sequences is None:
            raise call.refused(" before any activation that carries the sequences")
        if call.name in ELEMENTWISE:
            return call.lined_up(sequences)
        return call.one_by_one(sequences, plain)

    def copies(self, slot: Slot, sequences: int, use: str) -> Tensor:
        """One copy of a parameter a sequence, `(S, …)`."""
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
            stacklevel=4,
        )


class _Call:
    """One call of a function that no handler knows."""

    def __init__(self, fallback: Fallback, function: Callable, args: Any, kwargs: Any) -> None:
        self.fallback = fallback
        self.function = function
        self.name = getattr(function, "__name__", str(function))
        if self.name == "__get__":  # a property, such as `weight.T`
            self.name = getattr(getattr(function, "__self__", None), "__name__", self.name)
        leaves, self.structure = tree_flatten((args, kwargs))
        self.leaves = [_without_watch(leaf) for leaf in leaves]
        self.slots = tuple(dict.fromkeys(slot for leaf in leaves for slot in _slots_of(leaf)))

    def run(self, leaves: Sequence[Any]) -> Any:
        """The function with other arguments."""
        args, kwargs = tree_unflatten(list(leaves), self.structure)
        return self.function(*args, **kwargs)

    def with_parameters(self) -> Any:
        """What the function gives with the parameters themselves."""
        with torch._C.DisableTorchFunctionSubclass():
            return self.run([_value_of(leaf) for leaf in self.leaves])

    def refused(self, why: str) -> UnhandledParameterError:
        """The error that names the parameter."""
        return UnhandledParameterError(self.slots[0].name, f"{self.name}{why}")

    @property
    def changes_in_place(self) -> bool:
        """By PyTorch's names: `add_`, `__iadd__`, `__setitem__`."""
        name = self.name
        return (name[-1] == "_" and name[-2:] != "__") or name in INPLACE_OPERATORS

    def activations(self) -> list[Tensor]:
        """The tensors among the arguments that have nothing to do with parameters, as far as can be seen."""
        return [leaf for leaf in self.leaves if isinstance(leaf, Tensor) and not isinstance(leaf, (StandIn, Copied))]

    def sequences(self) -> int | None:
        """S, where it is known: from the microbatch, or from the first activation that asks for a gradient."""
        layer = self.slots[0].layer
        known = layer.num_sequences if layer.tape is None else layer.tape.num_sequences
        if known is None:
            for leaf in self.activations():
                if leaf.requires_grad and leaf.ndim:
                    return layer.expected_sequences(leaf)
        return known

    def lined_up(self, sequences: int) -> Any:
        """An elementwise function: copies `(S, 1, …, *shape)`, so that broadcasting brings each to its sequence."""
        activations = self.activations()
        axes = max(leaf.ndim for leaf in activations)
        for leaf in activations:
            if leaf.requires_grad and not (leaf.ndim == axes and leaf.shape[0] == sequences):
                raise self.refused(_without_sequences(leaf, sequences))
        leaves = []
        for leaf in self.leaves:
            if isinstance(leaf, (StandIn, Copied)):
                shape = _shape(leaf)
                if len(shape) > axes or (len(shape) == axes and shape[0] != 1):
                    raise self.refused(f" with an activation of {axes} axes, whose first the parameter has as well")
                copies = self.copies(leaf, sequences)
                copies = copies.flatten(0, 1) if len(shape) == axes else copies
                leaf = copies.reshape(sequences, *[1] * (axes - copies.ndim), *copies.shape[1:])
            leaves.append(leaf)
        return self.run(leaves)

    def one_by_one(self, sequences: int, plain: Any) -> Any:
        """Any function: one sequence after the other, as a batch of one, in one call."""
        for leaf in self.activations():
            if leaf.requires_grad and not _carries(leaf, sequences):
                raise self.refused(_without_sequences(leaf, sequences))
        outputs = self.batched(sequences, lambda leaf: leaf.unsqueeze(1) if _carries(leaf, sequences) else None)
        shapes_agree = all(
            not isinstance(ours, Tensor) or (ours.ndim > 1 and ours.shape[1] == 1 and ours[:, 0].shape == theirs.shape)
            for ours, theirs in zip(tree_leaves(outputs), tree_leaves(plain), strict=True)
        )
        if shapes_agree:
            outputs = tree_map(lambda ours: ours[:, 0] if isinstance(ours, Tensor) else ours, outputs)
        if not shapes_agree or not all(map(_close, tree_leaves(outputs), tree_leaves(plain))):
            raise self.refused(", which gives all sequences together another result than one after the other")
        return outputs

    def batched(self, sequences: int, split: Callable[[Tensor], Tensor | None]) -> Any:
        """One call with all copies, under vmap. `split` gives an activation by sequence, or None for one they share."""
        by_sequence: dict[int, Tensor] = {}
        for index, leaf in enumerate(self.leaves):
            if isinstance(leaf, (StandIn, Copied)):
                by_sequence[index] = self.copies(leaf, sequences)
            elif isinstance(leaf, Tensor) and (parts := split(leaf)) is not None:
                by_sequence[index] = parts

        def of_one(*tensors: Tensor) -> Any:
            replaced = dict(zip(by_sequence, tensors, strict=True))
            return self.run([replaced.get(index, leaf) for index, leaf in enumerate(self.leaves)])

        try:
            return torch.vmap(of_one)(*by_sequence.values())
        except (RuntimeError, ValueError) as error:
            raise self.refused(f", which cannot be run one sequence after the other ({error})") from error

    def copies(self, leaf: "StandIn | Copied", sequences: int) -> Tensor:
        """One copy a sequence of an argument."""
        if isinstance(leaf, Copied):
            return leaf.recipe(sequences)
        return self.fallback.copies(leaf.slot, sequences, self.name)

    def from_parameters_alone(self, plain: Any) -> Any:
        """The result, each of its tensors with a recipe."""
        made: dict[int, list[Any]] = {}

        def recipe(sequences: int, position: int) -> Tensor:
            if sequences not in made:
                made[sequences] = tree_leaves(self.batched(sequences, lambda leaf: None))
            return made[sequences][position]

        leaves, structure = tree_flatten(plain)
        for position, leaf in enumerate(leaves):
            if isinstance(leaf, Tensor) and leaf.requires_grad:
                leaves[position] = Copied.of(leaf, self.slots, partial(recipe, position=position))
        return tree_unflatten(leaves, structure)

    def repeats(self, sequences: int | None, plain: Any) -> bool:
        """Does `expand` or one like it give every sequence the same value, `(S, …)`?"""
        (leaf, *_) = [leaf for leaf in self.leaves if isinstance(leaf, (StandIn, Copied))]
        shape = _shape(leaf)
        new_axis = plain.ndim > len(shape) or (len(shape) > 0 and shape[0] == 1)
        return sequences is not None and plain.ndim > 0 and plain.shape[0] == sequences and new_axis

    def one_row(self, sequences: int) -> Tensor:
        """Of a value that is repeated S times, the first row of each copy: `(S, …)`."""
        return cast(Tensor, self.batched(sequences, lambda leaf: None))[:, 0]


def _slots_of(leaf: Any) -> tuple[Slot, ...]:
    """The parameters behind an argument."""
    if isinstance(leaf, Copied):
        return leaf.slots
    slot = slot_of(leaf)
    return () if slot is None else (slot,)


def _value_of(leaf: Any) -> Any:
    """The value of an argument, which asks for a gradient if it depends on a parameter."""
    if isinstance(leaf, StandIn):
        return leaf.slot.parameter
    return leaf.as_subclass(Tensor) if isinstance(leaf, Copied) else leaf


def _shape(leaf: Tensor) -> torch.Size:
    with torch._C.DisableTorchFunctionSubclass():
        return leaf.shape


def _without_watch(leaf: Any) -> Any:
    """Rows of sequences as a plain tensor."""
    if not isinstance(leaf, RowsOfSequences):
        return leaf
    with torch._C.DisableTorchFunctionSubclass():
        return leaf.as_subclass(Tensor)


def _asks_for_gradient(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.requires_grad


def _carries(leaf: Tensor, sequences: int | None) -> bool:
    """Is its first axis as long as there are sequences?"""
    return leaf.ndim > 0 and leaf.shape[0] == sequences


def _close(ours: Any, theirs: Any) -> bool:
    """The same up to rounding, NaN where the other is NaN."""
    if not isinstance(ours, Tensor) or not ours.is_floating_point():
        return True
    tolerance = torch.finfo(ours.dtype).eps ** 0.5
    with torch.no_grad():
        return torch.allclose(ours, theirs, rtol=tolerance, atol=tolerance, equal_nan=True)


def _without_sequences(leaf: Tensor, sequences: int) -> str:
    return f" with an activation of shape {tuple(leaf.shape)}, whose first axis is not the S={sequences} sequences"
