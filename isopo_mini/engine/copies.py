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
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from isopo_mini.engine.segments import Segments, remember
from isopo_mini.engine.sequence_axis import RowsOfSequences
from isopo_mini.engine.stand_in import Copied, Slot, StandIn, UnhandledParameterError, slot_of

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


class Call:
    """One call of a function that no handler knows.

    Args:
        copies: makes the copies of a parameter, `(S, …)`, from its slot, S and the name of what they are used for.
        function: any of PyTorch's.
        args: its arguments, with stand-ins or `Copied` among them.
        kwargs: likewise.
    """

    def __init__(self, copies: Callable[[Slot, int, str], Tensor], function: Callable, args: Any, kwargs: Any) -> None:
        self._copies = copies
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
        if layer.num_sequences is None:
            for leaf in self.activations():
                if leaf.requires_grad and leaf.ndim:
                    return layer.expected_sequences(leaf)
        return layer.num_sequences

    def carries(self, leaf: Tensor) -> bool:
        """Are its first axes as long as the sequences, or the segments, are?"""
        segments = self.slots[0].layer.segments
        if segments is not None:
            return segments.are_rows_of(leaf)
        return leaf.ndim > 0 and leaf.shape[0] == self.sequences()

    def rows(self, axes: int) -> "_Rows":
        """Whose the rows of the activations are, `axes` the most that one has."""
        sequences = self.sequences()
        assert sequences is not None
        found = None
        for leaf in self.activations():
            if leaf.ndim == axes and (leaf.requires_grad or (found is None and self.carries(leaf))):
                try:
                    segments = self.slots[0].check_input(leaf, axes=1)
                except ValueError as error:
                    raise self.refused(f" with an activation whose sequences are not known ({error})") from error
                found = _Rows(sequences, segments)
        for leaf in self.activations():
            if leaf.requires_grad and (found is None or not found.carried_by(leaf)):
                raise self.refused(_without_sequences(leaf, sequences))
        if found is None:
            raise self.refused(_without_sequences(self.activations()[0], sequences))
        return found

    def lined_up(self) -> Any:
        """An elementwise function: copies `(S, 1, …, *shape)`, so that broadcasting brings each to its sequence."""
        axes = max(leaf.ndim for leaf in self.activations())
        rows = self.rows(axes)
        leaves = []
        for leaf in self.leaves:
            if isinstance(leaf, (StandIn, Copied)):
                copies = self.copies(leaf, rows)
                while copies.ndim > 1 + axes - len(rows.shape) and copies.shape[1] == 1:
                    copies = copies.squeeze(1)
                missing = 1 + axes - len(rows.shape) - copies.ndim
                if missing < 0:
                    raise self.refused(f" with an activation of {axes} axes, whose first the parameter has as well")
                leaf = copies.reshape(*rows.shape, *[1] * missing, *copies.shape[1:])
            leaves.append(leaf)
        return rows.remembered(self.run(leaves))

    def one_by_one(self, plain: Any) -> Any:
        """Any function: one sequence, or row, after the other, as a batch of one, in one call."""
        rows = self.rows(max(leaf.ndim for leaf in self.activations() if self.carries(leaf) or leaf.requires_grad))
        ones = [1] * len(rows.shape)
        outputs = self.batched(rows, lambda leaf: leaf.reshape(-1, *ones, *leaf.shape[len(ones) :]))
        results, structure = tree_flatten(outputs)
        for position, (ours, theirs) in enumerate(zip(results, tree_leaves(plain), strict=True)):
            if isinstance(ours, Tensor):
                alike = list(ours.shape[1 : 1 + len(ones)]) == ones
                if alike:
                    ours = results[position] = ours.reshape(*rows.shape, *ours.shape[1 + len(ones) :])
                if not alike or not _close(ours, theirs):
                    raise self.refused(", which gives all sequences together another result than one after the other")
        return tree_unflatten([rows.remembered(result) for result in results], structure)

    def batched(self, rows: "_Rows", split: Callable[[Tensor], Tensor] | None = None) -> Any:
        """One call with all copies, under vmap. `split` gives the rows of an activation; one without them is shared."""
        by_sequence: dict[int, Tensor] = {}
        for index, leaf in enumerate(self.leaves):
            if isinstance(leaf, (StandIn, Copied)):
                by_sequence[index] = self.copies(leaf, rows)
            elif isinstance(leaf, Tensor) and split is not None and rows.carried_by(leaf):
                by_sequence[index] = split(leaf)

        def of_one(*tensors: Tensor) -> Any:
            replaced = dict(zip(by_sequence, tensors, strict=True))
            return self.run([replaced.get(index, leaf) for index, leaf in enumerate(self.leaves)])

        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "There is a performance drop")  # beside what copies cost anyway
                return torch.vmap(of_one)(*by_sequence.values())
        except (RuntimeError, ValueError) as error:
            raise self.refused(f", which cannot be run one sequence after the other ({error})") from error

    def copies(self, leaf: StandIn | Copied, rows: "_Rows") -> Tensor:
        """One copy of an argument for each row, `(rows, …)`."""
        if isinstance(leaf, Copied):
            copies = leaf.recipe(rows.sequences)
        else:
            copies = self._copies(leaf.slot, rows.sequences, self.name)
        if rows.segments is None:
            return copies
        with torch._C.DisableTorchFunctionSubclass():
            return rows.segments.of_rows(copies, cast(Tensor, _value_of(leaf)))

    def from_parameters_alone(self, plain: Any) -> Any:
        """The result, each of its tensors with a recipe."""
        made: dict[int, list[Any]] = {}

        def recipe(sequences: int, position: int) -> Tensor:
            if sequences not in made:
                made[sequences] = tree_leaves(self.batched(_Rows(sequences)))
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
        return cast(Tensor, self.batched(_Rows(sequences)))[:, 0]


class _Rows:
    """The first axes of an activation: the sequences, or rows of several of them."""

    def __init__(self, sequences: int, segments: Segments | None = None) -> None:
        self.sequences = sequences
        self.segments = segments
        self.shape = (sequences,) if segments is None else segments.shape

    def carried_by(self, leaf: Tensor) -> bool:
        """Does an activation have these axes?"""
        return tuple(leaf.shape[: len(self.shape)]) == self.shape

    def remembered(self, outputs: Any) -> Any:
        """Outputs, in whose history it is noted if their rows are not the sequences."""
        return remember(outputs, self.segments) if isinstance(outputs, Tensor) else outputs


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


def _close(ours: Tensor, theirs: Tensor) -> bool:
    """The same shape, and the same numbers up to rounding, NaN where the other is NaN."""
    if ours.shape != theirs.shape or not ours.is_floating_point():
        return ours.shape == theirs.shape
    tolerance = torch.finfo(ours.dtype).eps ** 0.5
    with torch.no_grad():
        return torch.allclose(ours, theirs, rtol=tolerance, atol=tolerance, equal_nan=True)


def _without_sequences(leaf: Tensor, sequences: int) -> str:
    return f" with an activation of shape {tuple(leaf.shape)}, whose first axis is not the S={sequences} sequences"
