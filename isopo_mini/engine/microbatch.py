"""What happens while a microbatch is open: uses report to their layer, and a gate closes it.

Every gradient is accounted for. What a use reports waits for the gate of its layer; what does not go through a use
meets a hook, on the parameter or on its stand-in; what is left when the block ends is an error.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, cast

import torch
import torch.nn as nn
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.autograd.graph import Node

from isopo_mini.engine.fallback import Fallback
from isopo_mini.engine.graph import backward_noticed, check_graph
from isopo_mini.engine.in_place import Unchanged
from isopo_mini.engine.parameter_gradients import MatrixGradients, VectorGradients
from isopo_mini.engine.places import stand_ins
from isopo_mini.engine.segments import Segments
from isopo_mini.engine.stand_in import Slot, Tape, UnhandledParameterError

PAST_ITS_MODULE = "a path that does not go through its module"

Uses = dict[str, MatrixGradients | VectorGradients]


class LayerUses:
    """Collects the factors of one layer's gradient as backpropagation comes by its uses.

    Args:
        num_sequences: S, which the first axis of every input must have; None when the tape knows.
        tape: where the uses are noted; None when they report to the gate.
        fallback: calls what no handler knows.
        segments: the sequence of every row, where the first axis of the inputs is not the sequences.
    """

    def __init__(
        self,
        num_sequences: int | None = None,
        tape: Tape | None = None,
        fallback: Fallback | None = None,
        segments: Segments | None = None,
    ) -> None:
        self._num_sequences = num_sequences
        self.tape = tape
        self.fallback = fallback or Fallback()
        self.segments = segments
        self.uses: Uses = {}
        self._kept: list[Unchanged] = []

    def gate(self) -> Tensor:
        """The node that the uses of an open microbatch hang on."""
        raise NotImplementedError(f"{type(self).__name__} has no gate")

    @property
    def num_sequences(self) -> int | None:
        """S; None as long as the tape does not know."""
        return self._num_sequences if self.tape is None else self.tape.num_sequences

    def expected_sequences(self, tensor: Tensor) -> int:
        """S, which this tensor decides if nothing has before."""
        if self.tape is None:
            return cast(int, self._num_sequences)
        if self.tape.num_sequences is None:
            self.tape.num_sequences = tensor.shape[0]
        return self.tape.num_sequences

    def wanted(self) -> bool:
        """Does anybody ask for the gradient of the layer's parameters?"""
        return True

    def add_matrix_use(self, slot: Slot, left: Tensor, right: Tensor) -> None:
        """Backward has reached a use of a weight matrix: G_s += Σ_t left_st right_stᵀ."""
        if not self.wanted():
            return
        rows, columns = slot.parameter.shape[0], slot.parameter.shape[1:].numel()
        matrix = self.uses.setdefault(slot.name, MatrixGradients(rows, columns))
        if isinstance(matrix, VectorGradients):  # an earlier use gave it in full
            matrix = self.uses[slot.name] = matrix.as_matrix(rows, columns)
        matrix.add_use(left, right)
        self._kept += [Unchanged(slot.name, left), Unchanged(slot.name, right)]

    def add_vector_use(self, slot: Slot, output_gradients: Tensor, factors: Tensor | None) -> None:
        """Backward has reached a use of a bias or scale: G_s += Σ_t g_st ∘ factor_st."""
        if not self.wanted():
            return
        vector = self.uses.setdefault(slot.name, VectorGradients())
        if isinstance(vector, MatrixGradients):
            alone = VectorGradients([output_gradients], [factors])
            vector.add_use(*alone.as_matrix(vector.rows, vector.columns).pairs[0])
        else:
            vector.add_use(output_gradients, factors)
        self._kept += [Unchanged(slot.name, kept) for kept in (output_gradients, factors) if kept is not None]

    def take_uses(self) -> Uses:
        """All uses of one backward pass, as they were when it came by. A second pass starts afresh."""
        for kept in self._kept:
            kept.check()
        uses, self.uses, self._kept = self.uses, {}, []
        return uses


class _Layer(LayerUses):
    """One layer of an open microbatch: once backpropagation has passed all its uses, it closes its gate."""

    def __init__(self, name: str, microbatch: "Microbatch") -> None:
        super().__init__(microbatch.num_sequences, fallback=microbatch.fallback, segments=microbatch.segments)
        self.name = name
        self.microbatch = microbatch
        self.slots: list[Slot] = []
        self.is_open = True
        self._gate: Tensor | None = None
        self._pass = -1  # the backward pass that the uses are of
        self._wanted = False

    def wanted(self) -> bool:
        """Will the backward pass that is running reach the gate? One that asks for inputs alone does not.

        What an earlier pass has left, since an error stopped it, belongs to no gate any more.
        """
        running = torch._C._current_graph_task_id()
        if running != self._pass:
            self.uses, self._kept = {}, []
            self._pass = running
            gate = self._gate
            self._wanted = gate is not None and torch._C._will_engine_execute_node(cast(Node, gate.grad_fn))
        return self._wanted

    def gate(self) -> Tensor:
        """The node that every use hangs on. Made at the first use, so that backward reaches it right after the last."""
        if self._gate is None:
            self._gate = _Gate.apply(self, *[slot.parameter for slot in self.slots])
        return self._gate

    def end(self) -> None:
        """The block is over. Nothing is held any longer that would make a cycle of references with its graph."""
        self.is_open, self._gate, self.slots = False, None, []

    def transformed_gradients(self) -> list[Tensor | None]:
        """Σ_s c_s G_s for every parameter of the layer; None for one that the loss does not depend on."""
        self._gate = None  # what is computed after this pass belongs to another one, with a gate of its own
        uses = self.take_uses()
        if not uses:
            return [None] * len(self.slots)
        device_type = self.slots[0].parameter.device.type
        autocast = torch.is_autocast_enabled(device_type)
        with torch.autocast(device_type, enabled=False) if autocast else nullcontext():
            combined = self.microbatch.close_layer(self.name, uses)
        result: list[Tensor | None] = []
        for slot in self.slots:
            gradient = combined.get(slot.name)
            if gradient is not None:
                gradient = gradient.to(slot.parameter.dtype)
                if gradient.shape != slot.parameter.shape:
                    gradient = gradient.view_as(slot.parameter)
            for index, part in slot.parts.items():
                if part.name in combined:
                    gradient = torch.zeros_like(slot.parameter) if gradient is None else gradient
                    gradient[index] += combined[part.name].view_as(part.parameter)
            if gradient is not None:
                self.microbatch.returned[slot.name] = gradient
            result.append(gradient)
        return result


class _Gate(torch.autograd.Function):
    """Forward: nothing. Backward: the gradient of all parameters of a layer, once all its uses have been seen."""

    @staticmethod
    def forward(ctx: Any, layer: _Layer, *parameters: Tensor) -> Tensor:
        """An empty scalar that carries the dependency."""
        ctx.set_materialize_grads(False)  # of a gradient that nobody looks at
        ctx.layer = layer
        ctx.passed, ctx.name = False, layer.slots[0].name
        return parameters[0].new_zeros(())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor | None) -> tuple[Tensor | None, ...]:
        """Σ_s c_s G_s for every parameter."""
        if not ctx.layer.is_open:
            raise RuntimeError(
                f"parameter '{ctx.name}': expected the backward pass inside of the microbatch's block, got one after it"
            )
        if ctx.passed:
            raise RuntimeError(
                f"parameter '{ctx.name}': expected one backward pass for all that a microbatch computes, got a second "
                f"one, which would be transformed by itself; add the losses and call backward() once"
            )
        ctx.passed = True
        return None, *ctx.layer.transformed_gradients()


class Microbatch:
    """What is open between entering and leaving `Isopo.microbatch`.

    Args:
        model: whose parameters are stood in for.
        layers: see `layer_names`.
        num_sequences: S.
        close_layer: takes a layer's name and the uses of its parameters, returns their gradients by name.
        coefficients: where it keeps each layer's c.
        fallback: calls what no handler knows.
        segments: the sequence of every row, where the first axis of the inputs is not the sequences.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: str,
        num_sequences: int,
        close_layer: Callable[[str, Uses], dict[str, Tensor]],
        coefficients: dict[str, Tensor] | None = None,
        fallback: Fallback | None = None,
        segments: Segments | None = None,
    ) -> None:
        self.fallback = fallback or Fallback()
        self.segments = segments
        self.model = model
        self.layers = layers
        self.num_sequences = num_sequences
        self.close_layer = close_layer
        self.coefficients: dict[str, Tensor] = {} if coefficients is None else coefficients
        self._made: list[_Layer] = []
        self.returned: dict[str, Tensor] = {}  # gradients on their way from a gate to `.grad`

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Stand-ins are in place inside the `with` block."""
        hooks = []
        with stand_ins(self.model, self.layers, self._make_layer) as shadows:
            for slot in [shadow.slot for shadow in shadows]:
                cast(_Layer, slot.layer).slots.append(slot)
                hooks.append(slot.parameter.register_hook(self._refuse_other_gradients(slot.name)))
            own = {shadow.slot.parameter for shadow in shadows}
            try:
                with backward_noticed(partial(check_graph, self.num_sequences, own, set(self._made))):
                    yield
            finally:
                for hook in hooks:
                    hook.remove()
                self.returned = {}
                made, self._made = self._made, []
                for layer in made:
                    layer.end()
        _refuse_open_layers(made)
        self.fallback.warn()

    def _make_layer(self, name: str) -> _Layer:
        """The layer of a name, to be asked at the end whether it is closed."""
        self._made.append(_Layer(name, self))
        return self._made[-1]

    def _refuse_other_gradients(self, name: str) -> Callable[[Tensor | None], None]:
        """A hook on the whole gradient of a parameter, on its way to `.grad`: it must be ours and nothing else."""

        def hook(gradient: Tensor | None) -> None:
            if gradient is None:  # the layer was closed without a gradient
                return
            ours = self.returned.pop(name, None)  # popped, so that autograd may keep the tensor without a copy
            if ours is None or ours.data_ptr() != gradient.data_ptr():
                raise UnhandledParameterError(name, PAST_ITS_MODULE)

        return hook


def _refuse_open_layers(layers: list[_Layer]) -> None:
    """Backward has reached uses of a layer and not its gate: the parameters have no gradient, or only a part."""
    for layer in layers:
        if layer.uses:
            raise RuntimeError(
                f"parameter '{next(iter(layer.uses))}': expected every backward pass of the microbatch to run to "
                f"its end, got one that stopped before the gradient was complete"
            )
