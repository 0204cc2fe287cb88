"""Where a model keeps its trainable parameters, and the stand-ins that take their places while a block is open."""

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn as nn

from isopo_mini.engine.recurrent_modules import weights_in_lists
from isopo_mini.engine.sharded import full_parameters, fully_sharded, is_shard
from isopo_mini.engine.stand_in import Layer, Slot, StandIn


@dataclass(frozen=True)
class _Place:
    """Where a trainable parameter is kept: `module.key`. A shared parameter has several places."""

    module: nn.Module
    module_name: str
    key: str
    parameter: nn.Parameter


def _places(modules: Iterable[tuple[str, nn.Module]]) -> list[_Place]:
    """All places of all trainable parameters, in the order of `model.named_modules()`."""
    return [
        _Place(module, module_name, key, parameter)
        for module_name, module in modules
        for key, parameter in module._parameters.items()
        if parameter is not None and parameter.requires_grad
    ]


def layer_names(model: nn.Module, layers: str = "separate") -> dict[nn.Parameter, str]:
    """The layer of every trainable parameter: the module that owns it, with the parameters of that module.

    Modules that share a parameter (a tied embedding) are one layer, named after the first of them.
    """
    return _layers_of(_places(model.named_modules()), layers)


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


@contextmanager
def stand_ins(model: nn.Module, layers: str, make_layer: Callable[[str], Layer]) -> Iterator[list[StandIn]]:
    """A stand-in before every trainable parameter, wherever a module keeps it; gone after the block whatever happens.

    Args:
        model: whose parameters are stood in for.
        layers: see `layer_names`.
        make_layer: makes the layer of a name, to which the uses of its parameters report.

    Raises:
        ValueError: a parameter has no values, being on the meta device; or it is a shard that FSDP2 does not gather
            for this model; or FSDP2 gathers it in several parts, and the layers are to be one.
        RuntimeError: there are stand-ins already, or a parameter was replaced inside of the block.
    """
    modules = list(model.named_modules())
    places = _places(modules)
    layer_of = _layers_of(places, layers)
    full = full_parameters(model) if any(is_shard(place.parameter) for place in places) else {}
    if layers == "together" and (groups := len(fully_sharded(model))) > 1:
        raise ValueError(
            f"layers: expected 'separate' with {groups} modules that fully_shard was given, got 'together'; FSDP2 "
            f"takes their gradients one by one as backpropagation passes them, and these come at the end of all"
        )
    made = {name: make_layer(name) for name in dict.fromkeys(layer_of.values())}
    shadows: dict[nn.Parameter, StandIn] = {}
    shadowed: list[tuple[nn.Module, str, StandIn]] = []
    try:
        for place in places:
            module, key, parameter = place.module, place.key, place.parameter
            if key in module.__dict__:
                raise RuntimeError("microbatch: expected no other open microbatch of this model, got a second one")
            if parameter not in shadows:
                name = f"{place.module_name}.{key}" if place.module_name else key
                if parameter.is_meta:
                    raise ValueError(
                        f"parameter '{name}': expected values, got a tensor on the meta device; give it memory with "
                        f"to_empty() and load its values first"
                    )
                whole: Any = full.get(parameter, parameter)
                if is_shard(whole):
                    raise ValueError(
                        f"parameter '{name}': expected all of it, or a part that fully_shard has made, got a DTensor "
                        f"placed {whole.placements}; give Isopo the module that was given to fully_shard, and use no "
                        f"tensor parallelism"
                    )
                shadows[parameter] = StandIn.for_slot(Slot(name, whole, made[layer_of[parameter]]))
            shadows[parameter].slot.places.append((module, key))
            # An entry of __dict__ hides the parameter from attribute access and from nothing else:
            # parameters(), state_dict() and the optimizer still see the real one.
            module.__dict__[key] = shadows[parameter]
            shadowed.append((module, key, shadows[parameter]))
        with _nothing_compiled(), weights_in_lists([module for _, module in modules]):
            yield list(shadows.values())
    finally:
        replaced = _remove(shadowed)
    if replaced:
        raise RuntimeError(
            f"parameter '{replaced[0]}': expected the same parameter until the microbatch ends, got another one in "
            f"its place; assign parameters outside of the block"
        )


def _remove(shadowed: list[tuple[nn.Module, str, StandIn]]) -> list[str]:
    """Take the stand-ins away, and name the parameters that somebody has replaced in the meantime."""
    replaced = []
    for module, key, shadow in shadowed:
        if module.__dict__.get(key) is shadow:
            del module.__dict__[key]
        parameter, values = shadow.slot.parameter, shadow.slot.values
        kept = module._parameters.get(key)  # after the backward pass FSDP2 has put the shard back
        if (kept is not parameter and not is_shard(kept)) or parameter.data_ptr() != values.data_ptr():
            replaced.append(shadow.slot.name)
    return replaced


@contextmanager
def _nothing_compiled() -> Iterator[None]:
    """Compiled parts of the model run as they were written: compiled code would not know the stand-ins.

    Without the compiler's module there is nothing compiled yet, and loading it takes seconds. It may come inside of
    the block.
    """
    if "torch._dynamo" in sys.modules:
        with torch.compiler.set_stance("force_eager"):
            yield
        return
    compile = torch.compile
    with ExitStack() as stances:

        def compile_for_later(*args: Any, **kwargs: Any) -> Any:
            stances.enter_context(torch.compiler.set_stance("force_eager"))
            return compile(*args, **kwargs)

        torch.compile = compile_for_later  # type: ignore[assignment]
        try:
            yield
        finally:
            torch.compile = compile
