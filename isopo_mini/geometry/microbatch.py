"""What happens while a microbatch is open: stand-ins before the parameters, and a gate for every layer."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor
from torch.autograd.function import once_differentiable

from isopo_mini.geometry.layer_functions import Slot, StandIn, UnhandledParameterError
from isopo_mini.geometry.parameter_gradients import MatrixGradients, VectorGradients

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


class _Layer:
    """One layer of an open microbatch: collects the factors of its gradient and closes its gate."""

    def __init__(self, name: str, microbatch: "Microbatch") -> None:
        self.name = name
        self.microbatch = microbatch
        self.slots: list[Slot] = []
        self.uses: Uses = {}
        self._gate: Tensor | None = None

    def expected_sequences(self, tensor: Tensor) -> int:
        """S, which the first axis of every input must have. Where nobody said, the first input decides."""
        if self.microbatch.num_sequences is None:
            self.microbatch.num_sequences = tensor.shape[0]
        return self.microbatch.num_sequences

    def gate(self) -> Tensor:
        """The node that every use hangs on. Made at the first use, so that backward reaches it right after the last."""
        if self._gate is None:
            self._gate = _Gate.apply(self, *[slot.parameter for slot in self.slots])
        return self._gate

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
        num_sequences: S; None when the first input decides.
        close_layer: takes a layer's name and the uses of its parameters, returns their gradients by name.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: str,
        num_sequences: int | None,
        close_layer: Callable[[str, Uses], dict[str, Tensor]],
    ) -> None:
        self.model = model
        self.layers = layers
        self.num_sequences = num_sequences
        self.close_layer = close_layer
        self.coefficients: dict[str, Tensor] = {}
        self.returned: dict[str, Tensor] = {}  # gradients on their way from a gate to `.grad`
        self._shadowed: list[tuple[nn.Module, str]] = []
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Stand-ins are in place inside the `with` block, and gone after it whatever happens."""
        try:
            self.install()
            yield
        finally:
            self.remove()

    def install(self) -> None:
        """Put a stand-in before every trainable parameter, wherever a module keeps it."""
        places = _places(self.model)
        layer_of = _layers_of(places, self.layers)
        layers = {name: _Layer(name, self) for name in layer_of.values()}
        stand_ins: dict[nn.Parameter, StandIn] = {}
        for place in places:
            module, key, parameter = place.module, place.key, place.parameter
            if key in module.__dict__:
                raise RuntimeError("microbatch: expected no other open microbatch of this model, got a second one")
            if parameter not in stand_ins:
                name = f"{place.module_name}.{key}" if place.module_name else key
                layer = layers[layer_of[parameter]]
                slot = Slot(name, parameter, layer)
                layer.slots.append(slot)
                stand_ins[parameter] = StandIn.for_slot(slot)
                self._hooks.append(parameter.register_hook(self._refuse_other_gradients(name)))
            # An entry of __dict__ hides the parameter from attribute access and from nothing else:
            # parameters(), state_dict() and the optimizer still see the real one.
            module.__dict__[key] = stand_ins[parameter]
            self._shadowed.append((module, key))

    def remove(self) -> None:
        """Give the modules their parameters back."""
        for module, key in self._shadowed:
            del module.__dict__[key]
        for hook in self._hooks:
            hook.remove()
        self._shadowed, self._hooks, self.returned = [], [], {}

    def _refuse_other_gradients(self, name: str) -> Callable[[Tensor | None], None]:
        """A hook on the whole gradient of a parameter, on its way to `.grad`: it must be ours and nothing else."""

        def hook(gradient: Tensor | None) -> None:
            if gradient is None:  # the layer was closed without a gradient
                return
            ours = self.returned.pop(name, None)  # popped, so that autograd may keep the tensor without a copy
            if ours is None or ours.data_ptr() != gradient.data_ptr():
                raise UnhandledParameterError(name, "a path that does not go through its module")

        return hook
