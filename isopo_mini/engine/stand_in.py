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
from torch.utils._pytree import tree_leaves, tree_map

from isopo_mini.engine.in_place import not_a_view

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

    def expected_sequences(self, tensor: Tensor) -> int: ...
    def gate(self) -> Tensor: ...
    def add_matrix_use(self, slot: "Slot", left: Tensor, right: Tensor) -> None: ...
    def add_vector_use(self, slot: "Slot", output_gradients: Tensor, factors: Tensor | None) -> None: ...


class Slot:
    """A trainable parameter, its full name, its layer, and the modules that keep it."""

    def __init__(self, name: str, parameter: nn.Parameter, layer: Layer) -> None:
        self.name = name
        self.parameter = parameter
        self.layer = layer
        self.places: list[tuple[nn.Module, str]] = []
        self.values = parameter.detach()  # without a path to the parameter: that path is the gate

    def check_places(self) -> None:
        """The modules must still keep this parameter: the stand-in would hide what somebody put in its place."""
        for module, key in self.places:
            if module._parameters.get(key) is not self.parameter:
                raise ValueError(
                    f"parameter '{self.name}': expected the model's own parameter while a microbatch is open, got "
                    f"another tensor in its place; use torch.func.functional_call outside of the block"
                )

    def check_input(self, tensor: Tensor, axes: int) -> None:
        """The first axis must be the sequences, and at least `axes` axes must be there."""
        sequences = self.layer.expected_sequences(tensor)
        if tensor.ndim < axes or tensor.shape[0] != sequences:
            raise ValueError(
                f"parameter '{self.name}': expected an input whose first axis is the S={sequences} sequences, got "
                f"shape {tuple(tensor.shape)}; keep that axis through the model (for positions: expand them to (S, T))"
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
        kwargs = kwargs or {}
        handler = HANDLERS.get(func)
        if handler is not None and torch.is_grad_enabled():
            result = handler(*args, **kwargs)
            if result is not NotImplemented:
                return result
        real_args, real_kwargs = tree_map(_parameter_of, (args, kwargs))
        result = func(*real_args, **real_kwargs)
        if torch.is_grad_enabled() and any(
            isinstance(leaf, Tensor) and leaf.requires_grad for leaf in tree_leaves(result)
        ):
            (name, *_) = [leaf.slot.name for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, StandIn)]
            raise UnhandledParameterError(name, getattr(func, "__name__", str(func)))
        return result


def slot_of(tensor: Any) -> Slot | None:
    """The slot of a stand-in, for a use of its parameter; None for a plain tensor."""
    if not isinstance(tensor, StandIn):
        return None
    tensor.slot.check_places()
    return tensor.slot


HANDLERS: dict[Callable, Callable] = {}


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


def _parameter_of(leaf: Any) -> Any:
    """The parameter behind a stand-in; anything else as it is."""
    slot = slot_of(leaf)
    return leaf if slot is None else slot.parameter


def _refuse_gradient(name: str, gradient: Tensor) -> None:
    """A hook on a stand-in: its gradient would not be transformed, and would never reach the parameter."""
    raise UnhandledParameterError(name, PAST_PYTORCH)
