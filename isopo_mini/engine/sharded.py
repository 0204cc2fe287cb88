"""Parameters of which every process keeps a part: FSDP2, `torch.distributed.fsdp.fully_shard`.

Most of the time a module has *shards* in it, `DTensor`s with a part of the numbers; they are what the optimizer sees.
For the module's forward and backward pass FSDP2 gathers the numbers and puts a *full* parameter in the shard's place.
What autograd adds to the full one's `.grad` it averages over the processes and leaves, in parts, at the shards.

So a stand-in stands for the full parameter. FSDP2 makes that once, and from then on only its memory comes and goes.
A use while the memory is gone is an error with the parameter's name.
"""

import sys
from typing import Any

import torch.nn as nn
from torch.utils.weak import WeakTensorKeyDictionary

# Shard → full parameter. Both live as long as the model; to look for them anew would cost every block a gather.
_FULL: Any = WeakTensorKeyDictionary()


def is_shard(parameter: Any) -> bool:
    """Is it a `DTensor`? Without their module, which takes most of a second to load, there are none."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(parameter, module.DTensor)


def full_parameters(model: nn.Module) -> dict[nn.Parameter, nn.Parameter]:
    """The full parameter of every shard that FSDP2 has put into the model.

    One that was never gathered does not exist yet. So the first block gathers once more than FSDP2 does, one module
    after another, so that never more than one is held.
    """
    for module in fully_sharded(model):
        if any(shard not in _FULL for _, _, shard in _shards(module)):
            _gather(module)
    full = {shard: _FULL[shard] for _, _, shard in _shards(model) if shard in _FULL}
    for shard, parameter in full.items():
        parameter.requires_grad_(shard.requires_grad)  # as FSDP2 does when it gathers
    return full


def fully_sharded(model: nn.Module) -> list[Any]:
    """The modules of a model that were given to `fully_shard`."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return [] if fsdp is None else [module for module in model.modules() if isinstance(module, fsdp.FSDPModule)]


def _gather(module: Any) -> None:
    """Have FSDP2 put the full parameters of a module in the places of its shards, note them, and let them go."""
    before = _shards(module)
    module.unshard()
    for owner, key, shard in before:
        if owner._parameters[key] is not shard:
            _FULL[shard] = owner._parameters[key]
    module.reshard()


def _shards(model: nn.Module) -> list[tuple[nn.Module, str, Any]]:
    """All shards that are in a model at this moment, with their places."""
    return [
        (module, key, parameter)
        for module in model.modules()
        for key, parameter in module._parameters.items()
        if is_shard(parameter)
    ]
