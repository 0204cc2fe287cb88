"""What a loss is computed from: autograd's graph, looked at before a backward pass runs through it.

Some mistakes show in the input of no layer, and in the graph between the layers and the loss: a trainable parameter
that is not the model's, a batch normalisation, sequences in another order. A look costs a quarter of a microsecond a
node.
"""

from collections.abc import Callable, Iterator, Sequence, Set
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from isopo_mini.engine.reports import Use

LEAF = "AccumulateGrad"
GATE = "_GateBackward"
REENTRANT_CHECKPOINT = "CheckpointFunctionBackward"
BATCH_NORMS = {
    "NativeBatchNormBackward0",
    "CudnnBatchNormBackward0",
    "MiopenBatchNormBackward0",
    "SyncBatchNormBackward",
}
CHOICES = {"IndexBackward0", "IndexSelectBackward0", "IndexPutBackward0", "IndexCopyBackward0"}  # of rows, by index

Outputs = Sequence[Tensor | GradientEdge]


@contextmanager
def backward_noticed(look: Callable[[Outputs, bool], None]) -> Iterator[None]:
    """While open, `look` is given the outputs of every backward pass, and whether it adds to every leaf's `.grad`."""
    run = torch.autograd._engine_run_backward  # what `backward` and `grad` both come to

    def noticed(outputs: Outputs, *args: Any, **kwargs: Any) -> Any:
        inputs = args[3] if len(args) > 3 else ()
        look(outputs, not inputs)
        return run(outputs, *args, **kwargs)

    torch.autograd._engine_run_backward = noticed  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.autograd._engine_run_backward = run


def nodes_of(outputs: Outputs) -> Iterator[Node]:
    """All nodes that a backward pass from these outputs would reach, those behind a gate left out."""
    found: list[Any] = [each.grad_fn if isinstance(each, Tensor) else each.node for each in outputs]
    seen = set()
    while found:
        node = found.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        yield node
        if type(node).__name__ != GATE:
            found += [following for following, _ in node.next_functions]


def leaves_of(outputs: Outputs) -> list[Tensor]:
    """The tensors whose `.grad` a backward pass would add to, gates left out."""
    return [node.variable for node in nodes_of(outputs) if type(node).__name__ == LEAF]  # type: ignore[attr-defined]


def check_graph(num_sequences: int, own: Set[Tensor], layers: Set[Any], outputs: Outputs, adds_to_leaves: bool) -> None:
    """Refuse what cannot be right, in a graph that leads to a gate of this microbatch.

    Args:
        num_sequences: S.
        own: the trainable parameters of the model.
        layers: those of the microbatch, as its gates name them.
        outputs: of the backward pass.
        adds_to_leaves: would it add to the `.grad` of other parameters?

    Raises:
        ValueError: see the module. A loss of something else altogether is nobody's business here.
    """
    is_ours, complaints = False, []
    for node in nodes_of(outputs):
        kind = type(node).__name__
        if kind == GATE:
            is_ours = is_ours or node.layer in layers  # type: ignore[attr-defined]
        elif kind == LEAF:
            leaf = node.variable  # type: ignore[attr-defined]
            if adds_to_leaves and isinstance(leaf, nn.Parameter) and leaf not in own:
                complaints.append(_outside(leaf))
        elif kind in BATCH_NORMS:
            if num_sequences > 1 and _mixes_rows(node):
                complaints.append(_mixed(node))
        elif kind in CHOICES and _is_reordering(node, num_sequences):
            complaints.append(_reordered(node, num_sequences))
    if is_ours and complaints:
        raise ValueError(complaints[0])


# --- What is refused ---------------------------------------------------------------------------------------------


def _mixes_rows(batch_norm: Node) -> bool:
    """Does it take its statistics from several rows? An instance norm is one row with as many channels."""
    rows = batch_norm._input_metadata[0].shape[0]  # type: ignore[attr-defined]
    return rows > 1 and getattr(batch_norm, "_saved_training", True)


def _is_reordering(choice: Node, num_sequences: int) -> bool:
    """Are S rows chosen from S, or put into S, each once and in another order?"""
    shape = choice._input_metadata[0].shape  # type: ignore[attr-defined]
    if not shape or shape[0] != num_sequences:
        return False
    rows = _chosen_rows(choice)
    if rows is None or rows[1] not in (None, num_sequences) or len(rows[0]) != num_sequences:
        return False
    order = torch.arange(num_sequences, device=rows[0].device)
    return not torch.equal(rows[0], order) and torch.equal(rows[0].sort().values, order)


def _chosen_rows(choice: Node) -> tuple[Tensor, int | None] | None:
    """The rows that an index chooses, `(N,)`, and of how many; None if it does not choose along the first axis."""
    node: Any = choice
    sizes = getattr(node, "_saved_self_sym_sizes", None)  # what is put somewhere does not say
    if hasattr(node, "_saved_indices"):
        indices = node._saved_indices
        axis = next((axis for axis, index in enumerate(indices) if index is not None), 0)
    else:
        indices, axis = [*[None] * node._saved_dim, node._saved_index], node._saved_dim
    if axis > 0 and (sizes is None or any(size != 1 for size in sizes[:axis])):
        return None
    index = indices[axis]
    if index.dtype in (torch.bool, torch.uint8):
        return index.flatten().nonzero()[:, 0], index.numel()
    total = None if sizes is None else sizes[axis]
    rows = torch.broadcast_tensors(*[each for each in indices if each is not None])[0].flatten()
    return (rows if total is None else rows % total), total  # a negative index counts from the end


def _outside(leaf: Tensor) -> str:
    return (
        f"model: expected every trainable parameter that the loss depends on, got one of shape {tuple(leaf.shape)} "
        f"outside of it, which would get the gradient of the unweighted sum; put both into one module and give that to "
        f"Isopo, or freeze it with requires_grad_(False)"
    )


def _mixed(batch_norm: Node) -> str:
    return (
        f"parameter '{_parameter_below(batch_norm)}': expected no sequence to influence another, got a batch "
        f"normalisation in training mode between it and the loss; call eval() on that module, or take LayerNorm or "
        f"GroupNorm"
    )


def _reordered(choice: Node, num_sequences: int) -> str:
    return (
        f"parameter '{_parameter_below(choice)}': expected the S={num_sequences} sequences in the order of the "
        f"advantages, got them in another order between it and the loss; sort the batch, and the advantages, before "
        f"the model"
    )


def _parameter_below(node: Node) -> str:
    """The name of a parameter that is used on the way to this node."""
    pending = [GradientEdge(node, 0)]
    for below in nodes_of(pending):
        use = getattr(below, "use", None)
        if isinstance(use, Use):
            return use.name
    return "?"
