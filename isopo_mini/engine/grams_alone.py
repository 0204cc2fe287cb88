"""`gram_matrices`: the Gram matrix of every layer, without a step and without a weight gradient."""

from collections.abc import Callable
from itertools import product
from typing import Any

import torch
import torch.nn as nn
from jaxtyping import Float
from torch import Tensor

from isopo_mini.engine.graph import REENTRANT_CHECKPOINT, nodes_of
from isopo_mini.engine.isopo import Isopo
from isopo_mini.engine.layer_gradients import LayerGradients
from isopo_mini.engine.microbatch import PAST_ITS_MODULE, LayerUses
from isopo_mini.engine.places import stand_ins
from isopo_mini.engine.stand_in import PAST_PYTORCH, Tape, UnhandledParameterError
from isopo_mini.engine.transforms import NTK


def gram_matrices(
    model: nn.Module,
    log_probs: Callable[[], Float[Tensor, "S ..."]],
    *,
    gram: str = "auto",
    sketch_size: int = 32,
) -> dict[str, Float[Tensor, "S S"]]:
    """K of every layer, without touching `.grad`.

    Args:
        model: the policy.
        log_probs: computes the log-probabilities, first axis S, or their sum; they are summed over everything.

    Returns:
        The Gram matrix of each layer that the log-probabilities depend on, by the layer's name.

    Raises:
        ValueError: the first axis of the log-probabilities is not that of the first layer's input.
        RuntimeError: a checkpoint is re-entrant. For the errors about the model see `Isopo.microbatch`.
    """
    engine = Isopo(model, NTK(), gram=gram, sketch_size=sketch_size)
    tape = Tape()
    layers: dict[str, LayerUses] = {}

    def make_layer(name: str) -> LayerUses:
        layers[name] = LayerUses(tape=tape, fallback=engine._fallback)
        return layers[name]

    with stand_ins(model, "separate", make_layer) as shadows:
        values = log_probs()
        if values.ndim > 0 and tape.num_sequences not in (None, len(values)):
            raise ValueError(
                f"log_probs: expected a tensor whose first axis is the S={tape.num_sequences} sequences of the first "
                f"layer's input, got shape {tuple(values.shape)}"
            )
        total = values.sum()
        if any(type(node).__name__ == REENTRANT_CHECKPOINT for node in nodes_of([total])):
            raise RuntimeError(
                "log_probs: expected all of it in autograd's graph, got a checkpoint that is not until the backward "
                "pass; checkpoint with use_reentrant=False"
            )
        edges, reports = tape.take()
        # Of parameters and stand-ins nothing is expected back: what they are used for is on the tape.
        names = [shadow.slot.name for shadow in shadows]
        wanted: list[Any] = [*edges]
        wanted += [shadow.slot.parameter for shadow in shadows] + [shadow.edge() for shadow in shadows]
        gradients = torch.autograd.grad(total, wanted, allow_unused=True)
    past = product((PAST_ITS_MODULE, PAST_PYTORCH), names)
    for (use, name), gradient in zip(past, gradients[-2 * len(names) :], strict=True):
        if gradient is not None:
            raise UnhandledParameterError(name, use)
    for report, gradient in zip(reports, gradients, strict=False):
        if gradient is not None:
            report(gradient)
    resources = engine._resources()
    uses = {name: layer.take_uses() for name, layer in layers.items()}
    return {name: LayerGradients(of_layer, resources).gram() for name, of_layer in uses.items() if of_layer}
