"""What happens while a microbatch is open: stand-ins before the parameters, and a gate for every layer."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn as nn
from torch import Tensor
from torch.autograd.function import once_differentiable

from isopo_mini.geometry.parameter_gradients import MatrixGradients, VectorGradients
from isopo_mini.geometry.stand_in import Slot, StandIn, Tape, UnhandledParameterError

PAST_ITS_MODULE = "a path that does not go through its module"

Uses = dict[str, MatrixGradients | VectorGradients]


@dataclass(frozen=True)
class _Place:
    """Where a trainable parameter is kept: `module.key`. A shared parameter has several places."""

    module: nn.Module
    module_name: str
    key: str
    parameter: nn.Parameter


def _places(model: nn.Module) -> list[_Place]:
    """All places of all trainable parameters, in the order of `model.named_modules()`."""
    return [
        _Place(module, module_name, key, parameter)
        for module_name, module in model.named_modules()
        for key, parameter in module._parameters.items()
        if parameter is not None and parameter.requires_grad
    ]


def layer_names(model: nn.Module, layers: str = "separate") -> dict[nn.Parameter, str]:
    """The layer of every trainable parameter: the module that owns it, with the parameters of that module.

    Modules that share a parameter (a tied embedding) are one layer, named after the first of them.
    """
    return _layers_of(_places(model), layers)


def _layers_of(places: list[_Place], layers: str) -> dict[nn.Parameter, str]:
    """See `layer_names`."""
    if layers == "together":
        return {place.parameter: "(all)" for place in places}
    names: dict[nn.Parameter, str] = {}
    of_module: dict[nn.Module, str] = {}
    for place in places:
        own = of_module.setdefault(place.module, place.module_name or "(root)")
        known = names.setdefault(place.parameter, own)
        if known != own:  # the parameter ties this module to an earlier layer
            for table in (names, of_module):
                table.update({key: known for key, name in table.items() if name == own})  # type: ignore[misc]
    return names


class LayerUses:
    """Collects the factors of one layer's gradient as backpropagation comes by its uses.

    Args:
        num_sequences: S, which the first axis of every input must have; None when the first input decides.
        tape: where the uses are noted; None when they report to the gate.
    """

    def __init__(self, num_sequences: int | None, tape: Tape | None = None) -> None:
        self.num_sequences = num_sequences
        self.tape = tape
        self.uses: Uses = {}

    def gate(self) -> Tensor:
        """The node that the uses of an open microbatch hang on."""
        raise NotImplementedError(f"{type(self).__name__} has no gate")

    def expected_sequences(self, tensor: Tensor) -> int:
        """S; see the class."""
        if self.num_sequences is None:
            self.num_sequences = tensor.shape[0]
        return self.num_sequences

    def add_matrix_use(self, slot: Slot, left: Tensor, right: Tensor) -> None:
        """Backward has reached a use of a weight matrix: G_s += Σ_t left_st right_stᵀ."""
        rows, columns = slot.parameter.shape[0], slot.parameter[0].numel()
        matrix = self.uses.setdefault(slot.name, MatrixGradients(rows, columns))
        if not isinstance(matrix, MatrixGradients):
            raise UnhandledParameterError(slot.name, "both an elementwise use and a matrix product")
        matrix.add_use(left, right)

    def add_vector_use(self, slot: Slot, output_gradients: Tensor, factors: Tensor | None) -> None:
        """Backward has reached a use of a bias or scale: G_s += Σ_t g_st ∘ factor_st."""
        vector = self.uses.setdefault(slot.name, VectorGradients())
        if not isinstance(vector, VectorGradients):
            raise UnhandledParameterError(slot.name, "both an elementwise use and a matrix product")
        vector.add_use(output_gradients, factors)


@contextmanager
def stand_ins(model: nn.Module, layers: str, make_layer: Callable[[str], LayerUses]) -> Iterator[list[Slot]]:
    """A stand-in before every trainable parameter, wherever a module keeps it; gone after the block whatever happens.

    Args:
        model: whose parameters are stood in for.
        layers: see `layer_names`.
        make_layer: makes the layer of a name, to which the uses of its parameters report.
    """
    places = _places(model)
    layer_of = _layers_of(places, layers)
    made = {name: make_layer(name) for name in dict.fromkeys(layer_of.values())}
    slots: dict[nn.Parameter, Slot] = {}
    shadows: dict[nn.Parameter, StandIn] = {}
    shadowed: list[tuple[nn.Module, str]] = []
    try:
        for place in places:
            module, key, parameter = place.module, place.key, place.parameter
            if key in module.__dict__:
                raise RuntimeError("microbatch: expected no other open microbatch of this model, got a second one")
            if parameter not in slots:
                name = f"{place.module_name}.{key}" if place.module_name else key
                slots[parameter] = Slot(name, parameter, made[layer_of[parameter]])
                shadows[parameter] = StandIn.for_slot(slots[parameter])
            # An entry of __dict__ hides the parameter from attribute access and from nothing else:
            # parameters(), state_dict() and the optimizer still see the real one.
            module.__dict__[key] = shadows[parameter]
            shadowed.append((module, key))
        yield list(slots.values())
    finally:
        for module, key in shadowed:
            del module.__dict__[key]


class _Layer(LayerUses):
    """One layer of an open microbatch: once backpropagation has passed all its uses, it closes its gate."""

    def __init__(self, name: str, microbatch: "Microbatch") -> None:
        super().__init__(microbatch.num_sequences)
        self.name = name
        self.microbatch = microbatch
        self.slots: list[Slot] = []
        self._gate: Tensor | None = None

    def gate(self) -> Tensor:
        """The node that every use hangs on. Made at the first use, so that backward reaches it right after the last."""
        if self._gate is None:
            self._gate = _Gate.apply(self, *[slot.parameter for slot in self.slots])
        return self._gate

    def transformed_gradients(self) -> list[Tensor | None]:
        """Σ_s c_s G_s for every parameter of the layer; None for one that the loss does not depend on."""
        if not self.uses:
            return [None] * len(self.slots)
        device_type = self.slots[0].parameter.device.type
        autocast = torch.is_autocast_enabled(device_type)
        with torch.autocast(device_type, enabled=False) if autocast else nullcontext():
            combined = self.microbatch.close_layer(self.name, self.uses)
        self.uses = {}  # a second backward through the same graph starts afresh
        result: list[Tensor | None] = []
        for slot in self.slots:
            gradient = combined.get(slot.name)
            if gradient is not None:
                gradient = gradient.view_as(slot.parameter).to(slot.parameter.dtype)
                self.microbatch.returned[slot.name] = gradient
            result.append(gradient)
        return result


class _Gate(torch.autograd.Function):
    """Forward: nothing. Backward: the gradient of all parameters of a layer, once all its uses have been seen."""

    @staticmethod
    def forward(ctx: Any, layer: _Layer, *parameters: Tensor) -> Tensor:
        """An empty scalar that carries the dependency."""
        ctx.layer = layer
        return parameters[0].new_zeros(())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor | None, ...]:
        """Σ_s c_s G_s for every parameter."""
        return None, *ctx.layer.transformed_gradients()


class Microbatch:
    """What is open between entering and leaving `Isopo.microbatch`.

    Args:
        model: whose parameters are stood in for.
        layers: see `layer_names`.
        num_sequences: S.
        close_layer: takes a layer's name and the uses of its parameters, returns their gradients by name.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: str,
        num_sequences: int,
        close_layer: Callable[[str, Uses], dict[str, Tensor]],
    ) -> None:
        self.model = model
        self.layers = layers
        self.num_sequences = num_sequences
        self.close_layer = close_layer
        self.coefficients: dict[str, Tensor] = {}
        self.returned: dict[str, Tensor] = {}  # gradients on their way from a gate to `.grad`

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Stand-ins are in place inside the `with` block."""
        hooks = []
        with stand_ins(self.model, self.layers, lambda name: _Layer(name, self)) as slots:
            for slot in slots:
                cast(_Layer, slot.layer).slots.append(slot)
                hooks.append(slot.parameter.register_hook(self._refuse_other_gradients(slot.name)))
            try:
                yield
            finally:
                for hook in hooks:
                    hook.remove()
                self.returned = {}

    def _refuse_other_gradients(self, name: str) -> Callable[[Tensor | None], None]:
        """A hook on the whole gradient of a parameter, on its way to `.grad`: it must be ours and nothing else."""

        def hook(gradient: Tensor | None) -> None:
            if gradient is None:  # the layer was closed without a gradient
                return
            ours = self.returned.pop(name, None)  # popped, so that autograd may keep the tensor without a copy
            if ours is None or ours.data_ptr() != gradient.data_ptr():
                raise UnhandledParameterError(name, PAST_ITS_MODULE)

        return hook
