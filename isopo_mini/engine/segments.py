"""Which sequence a row belongs to, where the first axis of an input is not the sequences but rows of several of them.

Two things make such rows: packing, where the caller says whose they are; and layers that flatten `(S, T, d)` to
`(S·T, d)` or pick rows of that, as routers and experts do. Autograd's history of a tensor shows the latter. Where it
does not, nothing is guessed: a first axis that happens to be a multiple of S may be anything.
"""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

# Nodes of autograd's graph whose outputs have the rows of their inputs: elementwise ones, and some along other axes.
SAME_ROWS = frozenset(
    f"{name}Backward{version}"
    for name in (
        *("Add", "Sub", "Mul", "Div", "Neg", "Pow", "Exp", "Log", "Rsqrt", "Sqrt", "Where", "Clamp", "MaskedFill"),
        *("Relu", "Gelu", "Silu", "Tanh", "Sigmoid", "Softplus", "LeakyRelu", "Elu", "Hardtanh", "Mish", "Square"),
        *("ToCopy", "Clone", "NativeDropout", "NativeLayerNorm", "Unsqueeze", "Expand", "Alias"),
    )
    for version in (0, 1, 2)
)
ALONG_AN_AXIS = frozenset(
    f"{name}Backward{version}"
    for name in ("Softmax", "LogSoftmax", "Split", "SplitWithSizes", "Slice", "Mean", "Sum", "Gather", "Topk")
    for version in (0, 1)
)
VIEWS = frozenset(("ViewBackward0", "UnsafeViewBackward0", "ReshapeAliasBackward0"))
SHARDED_MODULE = "RegisterPostBackwardFunctionBackward"  # where FSDP2 hands a module its inputs, as they are
KEY = "isopo_mini.segments"  # of a node's metadata
LONGEST_HISTORY = 64  # nodes that are looked at


class Segments:
    """The sequence of every row.

    Args:
        index: the sequence of each row, `(N,)`; negative for a row that belongs to none.
        num_sequences: S.
        shape: the leading axes of the tensors that have these rows, `(N,)` or `(R, T)` with R·T = N.
    """

    def __init__(self, index: Tensor, num_sequences: int, shape: Sequence[int] | None = None) -> None:
        self.index = index
        self.num_sequences = num_sequences
        self.shape = tuple(index.shape if shape is None else shape)
        self._destination: tuple[Tensor, Tensor, int] | None = None

    @classmethod
    def checked(cls, index: Tensor, num_sequences: int) -> "Segments":
        """Those that a caller gives, `(R, T)` or `(N,)`.

        Raises:
            ValueError: not integers, a sequence that there is none of, or none at all.
        """
        if not isinstance(index, Tensor) or index.dtype != torch.int64 or index.ndim == 0:
            came = f"{index.dtype} of shape {tuple(index.shape)}" if isinstance(index, Tensor) else type(index).__name__
            raise ValueError(f"segments: expected an int64 tensor with the shape of the tokens, got {came}")
        smallest, largest = (int(index.min()), int(index.max())) if index.numel() else (-1, -1)
        if not 0 <= largest < num_sequences:
            came = f"{smallest} to {largest}" if index.numel() else "no tokens"
            raise ValueError(f"segments: expected sequences from 0 to {num_sequences - 1}, got {came}")
        return cls(index.flatten(), num_sequences, index.shape)

    def are_rows_of(self, tensor: Tensor) -> bool:
        """Are the first axes of a tensor those of the rows?"""
        return tuple(tensor.shape[: len(self.shape)]) == self.shape

    def are_sequences(self) -> bool:
        """Is each row a sequence, in their order?"""
        return torch.equal(self.index, torch.arange(self.num_sequences, device=self.index.device))

    def by_sequence(self, tensor: Tensor, feature_axes: int) -> Tensor:
        """Rows `(N, …, *features)` as `(S, T, d)`, with zeros where a sequence has fewer than T positions."""
        end = tensor.ndim - feature_axes
        features, between = tensor.shape[end:].numel(), tensor.shape[len(self.shape) : end].numel()
        rows = tensor.reshape(len(self.index), between, features)
        chosen, destination, longest = self._places()
        places = rows.new_zeros(self.num_sequences * longest, *rows.shape[1:])
        places[destination] = rows[chosen]
        return places.view(self.num_sequences, -1, features)

    def of_rows(self, copies: Tensor, shared: Tensor) -> Tensor:
        """The copy of its sequence for every row, `(N, …)`, and `shared` for a row that belongs to none."""
        return torch.cat([copies, shared.detach()[None]])[self.index.clamp_min(-1)]

    def _places(self) -> tuple[Tensor, Tensor, int]:
        """Rows that belong to a sequence, where each goes in `(S · T)`, and T."""
        if self._destination is None:
            chosen = (self.index >= 0).nonzero()[:, 0]
            order = self.index[chosen].argsort(stable=True)
            counts = torch.bincount(self.index[chosen], minlength=self.num_sequences)
            longest = max(1, int(counts.max()))
            starts = counts.cumsum(0) - counts
            owners = self.index[chosen][order]
            positions = torch.arange(len(order), device=order.device) - starts[owners]
            self._destination = chosen[order], owners * longest + positions, longest
        return self._destination


def from_history(tensor: Tensor, num_sequences: int, packed: Segments | None = None) -> Segments | None:
    """The sequences of a tensor's rows, as far as its history shows them; None otherwise.

    Args:
        tensor: some input, `(N, …)`.
        num_sequences: S.
        packed: the sequences of the rows that everything begins with, if those are not the sequences.

    Raises:
        LookupError: the rows were picked from rows whose sequences are not known; they may be as many as there are
            sequences by chance.
    """
    if tensor.ndim < 1:
        return None
    start = packed or Segments(torch.arange(num_sequences), num_sequences)
    index = None
    if tensor.grad_fn is not None:
        index = _index(tensor.grad_fn, tensor.output_nr, start, [LONGEST_HISTORY])
    elif tensor._is_view() and tensor.is_contiguous():
        base = tensor._base
        if base is not None and base.is_contiguous() and base.numel() == tensor.numel():
            index = _unflattened(base.shape, tensor.shape[0], start)
    return None if index is None else Segments(index.to(tensor.device), num_sequences)


def remember(outputs: Tensor, segments: Segments | None) -> Tensor:
    """Note in the history of a use's outputs what its rows are."""
    if segments is not None and outputs.grad_fn is not None:
        cast(dict, outputs.grad_fn.metadata)[KEY] = segments
    return outputs


def _index(node: Any, output: int, start: Segments, left: list[int]) -> Tensor | None:
    """The sequences of the rows of one of a node's outputs."""
    left[0] -= 1
    if node is None or left[0] < 0 or (rows := _rows_of(node, output)) is None:
        return None
    known = node.metadata.get(KEY)
    if known is not None:
        return known.index if len(known.index) == rows else None
    name = node.name()
    if name in VIEWS:
        sizes = node._saved_self_sym_sizes
        return _of_input(node, start, left) if sizes[0] == rows else _unflattened(sizes, rows, start)
    if name == SHARDED_MODULE:
        parent, number = node.next_functions[output]
        return _index(parent, number, start, left)
    chosen = _chosen_rows(node, name, output)
    if chosen is not None:
        sizes = node._saved_self_sym_sizes
        before = _unflattened(sizes, sizes[0], start) if len(sizes) > 2 else _of_input(node, start, left)
        if before is None and sizes[0] != len(start.index):
            raise LookupError(f"rows picked from {sizes[0]} others whose sequences are not known")
        if before is None:
            return None
        return before[chosen.to(before.device) if isinstance(chosen, Tensor) else chosen]
    if name not in SAME_ROWS and not (name in ALONG_AN_AXIS and _leaves_rows(node)):
        return None
    for parent, number in node.next_functions:
        if parent is not None and _rows_of(parent, number) == rows:
            found = _index(parent, number, start, left)
            if found is not None:
                return found
    return None


def _of_input(node: Any, start: Segments, left: list[int]) -> Tensor | None:
    """The sequences of the rows of what a node is a function of."""
    ((parent, number), *_) = node.next_functions
    return _index(parent, number, start, left)


def _chosen_rows(node: Any, name: str, output: int) -> Tensor | slice | None:
    """Which rows of its input an output has, by one index for each or as a part; None if it is another function."""
    if name == "IndexBackward0":
        indices = list(node._saved_indices)
        while indices and indices[-1] is None:
            indices.pop()
        one_each = bool(indices) and all(index is not None and index.ndim == 1 for index in indices)
        return indices[0] if one_each else None
    if getattr(node, "_saved_dim", None) != 0:
        return None
    if name == "IndexSelectBackward0":
        return cast(Tensor, node._saved_index)
    if name == "SliceBackward0":
        return slice(_signed(node._saved_start), _signed(node._saved_end), node._saved_step)
    if name == "SplitBackward0":
        begin = output * node._saved_split_size
    elif name == "SplitWithSizesBackward0":
        begin = sum(node._saved_split_sizes[:output])
    else:
        return None
    return slice(begin, begin + cast(int, _rows_of(node, output)))


def _signed(number: int) -> int:
    """A negative −n is kept as 2⁶⁴ − n."""
    return number if number < 2**63 else number - 2**64


def _leaves_rows(node: Any) -> bool:
    """Does a function along an axis go along another one than the first?"""
    axes = getattr(node, "_saved_dim", None)
    if axes is None:
        return False
    axes = axes if isinstance(axes, tuple) else (axes,)
    longest = len(getattr(node, "_saved_self_sym_sizes", node._input_metadata[0].shape))
    return bool(axes) and all(_signed(axis) % longest != 0 for axis in axes)


def _rows_of(node: Any, output: int) -> int | None:
    """The length of the first axis of one of a node's outputs."""
    shape = node._input_metadata[output].shape
    return int(shape[0]) if len(shape) else None


def _unflattened(sizes: Sequence[int], rows: int, start: Segments) -> Tensor | None:
    """The sequences of the rows that `(S, …)`, or what is packed, has after its first axes were joined to one."""
    if tuple(sizes[: len(start.shape)]) != start.shape or rows % len(start.index):
        return None
    return start.index.repeat_interleave(rows // len(start.index))
