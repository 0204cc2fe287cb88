"""What modules such as `nn.LSTM` do beside their functions: a list of their weights, and sequences sorted by length."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn as nn
from torch.nn.utils.rnn import PackedSequence


@contextmanager
def weights_in_lists(modules: Iterable[nn.Module]) -> Iterator[None]:
    """While open, the stand-ins may go into the lists in which the recurrent ones of the modules keep their weights.

    Such a module fills its list when it notices other weights, and on a GPU it then moves them to one piece of memory.
    The parameters must stay where they are, so this is left out. Afterwards the list is what it was.
    """
    recurrent = [module for module in modules if isinstance(module, nn.RNNBase)]
    before = [(module, module._flat_weights, module._flat_weight_refs) for module in recurrent]
    hooks = [module.register_forward_pre_hook(_refuse_another_order) for module in recurrent]
    for module in recurrent:
        module.__dict__["flatten_parameters"] = _do_nothing
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for module, weights, references in before:
            del module.__dict__["flatten_parameters"]
            module._flat_weights, module._flat_weight_refs = weights, references


def _do_nothing() -> None:
    """In place of `flatten_parameters`."""


def _refuse_another_order(module: nn.Module, inputs: tuple[Any, ...]) -> None:
    """Packing sorts sequences by their lengths, and PyTorch's function is not told in which order they were."""
    if not inputs or not isinstance(inputs[0], PackedSequence) or not torch.is_grad_enabled():
        return
    order = inputs[0].sorted_indices
    if order is None or torch.equal(order, torch.arange(len(order), device=order.device)):
        return
    names = [name for name, parameter in module.named_parameters() if parameter.requires_grad]
    if not names:
        return
    raise ValueError(
        f"parameter '{names[0]}' of {type(module).__name__}: expected packed sequences in the order of the advantages, "
        f"got them sorted by length; sort the batch by decreasing length before the model, the advantages with it, and "
        f"pack with enforce_sorted=True"
    )
