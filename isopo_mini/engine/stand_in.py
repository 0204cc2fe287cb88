"""Stand-ins: what takes a parameter's place while a microbatch is open, and where its uses are sent.

A stand-in sends every PyTorch function it is given to, by way of `HANDLERS`, to one of the three uses of
`layer_functions.py`. A *slot* says which parameter it stands for and which layer its uses report to.

What does not go through PyTorch's functions, an `autograd.Function` or an extension, meets the stand-in as a tensor of
its own. It then gets a gradient, and that is an error: nothing a parameter is used for is lost in silence.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Protocol, cast, runtime_checkable

import torch
import torch.nn as nn
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from isopo_mini.engine.in_place import not_a_view
from isopo_mini.engine.segments import Segments, from_history
from isopo_mini.engine.sharded import is_shard

# What is asked of a parameter's form. The long way round by the fallback would take longer than a small layer.
FORM: set[Any] = {
    *(getattr(Tensor, name).__get__ for name in ("shape", "dtype", "device", "ndim", "layout", "is_cuda", "is_sparse")),
    *(Tensor.size, Tensor.dim, Tensor.numel, Tensor.is_floating_point),
}
PAST_PYTORCH = "an autograd.Function or an extension that reads its values"


class UnhandledParameterError(ValueError):
    """A trainable parameter would get a gradient that ISOPO has not transformed."""

    def __init__(self, name: str, use: str) -> None:
        super().__init__(
            f"parameter '{name}': expected a use that a handler covers, got {use}; register a handler with "
            f"isopo_mini.engine.register, or freeze it with requires_grad_(False)"
        )


@runtime_checkable
class Layer(Protocol):
    """What a use reports to; see `microbatch.LayerUses`."""

    tape: "Tape | None"
    segments: Segments | None

    @property
    def num_sequences(self) -> int | None: ...
    @property
    def fallback(self) -> "Fallback": ...
    def expected_sequences(self, tensor: Tensor) -> int: ...
    def gate(self) -> Tensor: ...
    def add_matrix_use(self, slot: "Slot", left: Tensor, right: Tensor) -> None: ...
    def add_vector_use(self, slot: "Slot", output_gradients: Tensor, factors: Tensor | None) -> None: ...


class Fallback(Protocol):
    """Calls what no handler knows; see `fallback.Fallback`."""

    def __call__(self, function: Callable, args: Any, kwargs: Any) -> Any: ...
    def of_parameters_alone(self, function: Callable, *args: Any) -> Any: ...


class Slot:
    """A trainable parameter, its full name, its layer, and the modules that keep it."""

    def __init__(self, name: str, parameter: Tensor, layer: Layer) -> None:
        self.name = name
        self.parameter = parameter
        self.layer = layer
        self.places: list[tuple[nn.Module, str]] = []
        self.values = parameter.detach()  # without a path to the parameter: that path is the gate
        self.parts: dict[int, Slot] = {}
        self.whole: Slot | None = None  # of which this is a part

    def part(self, index: int) -> "Slot":
        """Entry `index` of a parameter that is a stack, such as one of experts: a parameter of its own to the layer."""
        index %= len(self.parameter)
        if index not in self.parts:
            self.parts[index] = Slot(f"{self.name}[{index}]", self.parameter[index], self.layer)
            self.parts[index].places = self.places
            self.parts[index].whole = self
        return self.parts[index]

    def shard(self) -> Tensor | None:
        """What FSDP2 keeps in the parameter's place while its values are away; None while they are there."""
        module, key = self.places[0]
        kept = module._parameters.get(key)
        return kept if is_shard(kept) and self.whole is None else None

    def check_places(self) -> None:
        """The modules must still keep this parameter: the stand-in would hide what somebody put in its place."""
        parameter = self.parameter if self.whole is None else self.whole.parameter
        for module, key in self.places:
            kept = module._parameters.get(key)
            if kept is parameter:
                continue
            if is_shard(kept):
                raise ValueError(
                    f"parameter '{self.name}': expected a use while FSDP2 has gathered its values, got one while it is "
                    f"a shard; call the module that fully_shard was given, or tell FSDP2 of another method than "
                    f"forward by register_fsdp_forward_method"
                )
            raise ValueError(
                f"parameter '{self.name}': expected the model's own parameter while a microbatch is open, got "
                f"another tensor in its place; use torch.func.functional_call outside of the block"
            )

    def check_input(self, tensor: Tensor, axes: int) -> Segments | None:
        """At least `axes` axes must be there, and the first must be the sequences; or else whose its rows are."""
        sequences, segments = self.layer.expected_sequences(tensor), self.layer.segments
        if segments is not None and segments.are_rows_of(tensor) and tensor.ndim >= axes - 1 + len(segments.shape):
            return segments
        if tensor.ndim >= axes:
            has_their_length = segments is None and tensor.shape[0] == sequences
            if has_their_length and (tensor.ndim > axes or tensor.grad_fn is None):
                return None
            try:  # an expert may be given S tokens
                found = from_history(tensor, sequences, segments)
            except LookupError:
                found, has_their_length = None, False
            if has_their_length and (found is None or found.are_sequences()):
                return None
            if found is not None:
                return found
        raise ValueError(
            f"parameter '{self.name}': expected an input whose first axis is the S={sequences} sequences"
            f"{'' if segments is None else f', in the segments {segments.shape}'}, got shape {tuple(tensor.shape)}; "
            f"keep that axis through the model (for positions: expand them to (S, T)), or say which sequence each row "
            f"belongs to by the segments of the microbatch"
        )


class Tape:
    """Notes the outputs of all uses, for asking autograd afterwards for their gradients and for nothing else."""

    def __init__(self) -> None:
        self.num_sequences: int | None = None  # S, which the first use decides for all
        self.edges: list[GradientEdge] = []
        self.reports: list[Callable[[Tensor], None]] = []
        self._is_over = False

    def take(self) -> tuple[list[GradientEdge], list[Callable[[Tensor], None]]]:
        """All edges and reports. What a checkpoint computes once more later on is not noted again."""
        taken = self.edges, self.reports
        self.edges, self.reports, self._is_over = [], [], True
        return taken

    def note(self, outputs: Tensor, report: Callable[[Tensor], None]) -> Tensor:
        """The same outputs, in a graph; `report` is what their gradient will be given to."""
        if not outputs.requires_grad:
            outputs = outputs.requires_grad_().clone()  # a leaf could not be changed in place by what follows
        outputs = not_a_view(outputs)  # a view that is changed in place would leave the graph, and this edge with it
        if not self._is_over:
            self.edges.append(get_gradient_edge(outputs))
            self.reports.append(report)
        return outputs


class StandIn(Tensor):
    """Takes a parameter's place in its module and sends every use to its handler."""

    slot: Slot

    @classmethod
    def for_slot(cls, slot: Slot) -> "StandIn":
        """A stand-in that shares the memory of the parameter and refuses a gradient."""
        with torch._C.DisableTorchFunctionSubclass():
            stand_in = cast(StandIn, slot.values.as_subclass(cls).requires_grad_())
            stand_in.register_hook(partial(_refuse_gradient, slot.name))
        stand_in.slot = slot
        return stand_in

    def edge(self) -> GradientEdge:
        """Where a gradient past PyTorch's functions would arrive."""
        with torch._C.DisableTorchFunctionSubclass():
            return get_gradient_edge(self)

    @classmethod
    def __torch_function__(cls, func: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Called by PyTorch in place of `func` whenever an argument is a stand-in."""
        if Copied in types:
            return NotImplemented  # a handler would take it for an activation
        kwargs = kwargs or {}
        if func in FORM and args[0].slot.shard() is None:
            return func(args[0].slot.values, *args[1:], **kwargs)
        handler = HANDLERS.get(func)
        if handler is not None and torch.is_grad_enabled():
            result = handler(*args, **kwargs)
            if result is not NotImplemented:
                return result
        (first, *_) = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, StandIn)]
        shard = first.slot.shard()
        if shard is not None:
            answer = _of_shard(shard, first, func, args, kwargs)
            if answer is not NotImplemented:
                return answer
        return first.slot.layer.fallback(func, args, kwargs)


class Copied(Tensor):
    """Computed from parameters alone: the value, and how to compute it once for every sequence; see `copies`."""

    slots: tuple[Slot, ...]
    recipe: Callable[[int], Tensor]  # S → `(S, *shape)`
    transpose_of: StandIn | None = None  # the matrix of which this is the transpose, for a product with it

    @classmethod
    def of(cls, value: Tensor, slots: tuple[Slot, ...], recipe: Callable[[int], Tensor]) -> "Copied":
        """The value, without its graph, and its recipe."""
        with torch._C.DisableTorchFunctionSubclass():
            # It asks for a gradient, as code that looks at it expects. What uses it comes by `__torch_function__`.
            copied = cast(Copied, value.detach().as_subclass(cls).requires_grad_())
            copied.register_hook(partial(_refuse_gradient, slots[0].name))
        copied.slots, copied.recipe = slots, recipe
        return copied

    @classmethod
    def __torch_function__(cls, func: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Called by PyTorch in place of `func` whenever an argument was computed from parameters alone."""
        kwargs = kwargs or {}
        copied = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Copied)]
        if (
            func in TAKE_TRANSPOSES
            and torch.is_grad_enabled()
            and len(copied) == 1
            and copied[0].transpose_of is not None
        ):
            result = HANDLERS[func](*args, **kwargs)
            if result is not NotImplemented:
                return result
        return copied[0].slots[0].layer.fallback(func, args, kwargs)


def _of_shard(shard: Tensor, stand_in: StandIn, func: Callable, args: Any, kwargs: Any) -> Any:
    """What the function gives with the shard alone, such as its dtype; else `NotImplemented`, and it is refused."""
    leaves, structure = tree_flatten((args, kwargs))
    if sum(isinstance(leaf, Tensor) for leaf in leaves) > 1:
        return NotImplemented
    args, kwargs = tree_unflatten([shard if leaf is stand_in else leaf for leaf in leaves], structure)
    answer = func(*args, **kwargs)
    asks = any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in tree_leaves(answer))
    return NotImplemented if asks else answer


def slot_of(tensor: Any) -> Slot | None:
    """The slot of a stand-in, for a use of its parameter; None for a plain tensor."""
    if not isinstance(tensor, StandIn):
        return None
    tensor.slot.check_places()
    return tensor.slot


HANDLERS: dict[Callable, Callable] = {}
TAKE_TRANSPOSES: set[Callable] = set()  # functions whose handlers know what to do with `Copied.transpose_of`


def register(*functions: Callable) -> Callable[[Callable], Callable]:
    """Decorator: handle uses of trainable parameters by these PyTorch functions.

    The handler takes the function's own arguments, with stand-ins where parameters are, and returns its result by
    way of `matrix_product`, `table_lookup` and `scale_and_shift`. It may return `NotImplemented`.
    """

    def add(handler: Callable) -> Callable:
        for function in functions:
            HANDLERS[function] = handler
        return handler

    return add


def _refuse_gradient(name: str, gradient: Tensor) -> None:
    """A hook on a stand-in: its gradient would not be transformed, and would never reach the parameter."""
    raise UnhandledParameterError(name, PAST_PYTORCH)
