"""Former names of modules: they can be imported for one version more, with a warning that says the new one.

`geometry` once held the engine and `training` the rules and the experiments. Delete this file, and the lines that
call it in the `__init__.py` of these two rooms and of `isopo_mini`, after version 0.1.
"""

import importlib
import sys
import warnings
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

_ENGINE = (
    *("handlers", "in_place", "layer_functions", "layer_gradients", "loss_scale", "microbatch", "parameter_gradients"),
    *("places", "sequence_axis", "stand_in", "transforms", "verification"),
)
_RULES = ("kl_steps", "optimizers", "repeatable", "rule_parts", "rule_specs")
_EXPERIMENTS = (
    *("families", "leases", "pool", "provenance", "record_files", "records", "runs", "search", "setups", "statistics"),
)
NEW_NAMES = {
    "isopo_mini.geometry.layerwise": "isopo_mini.engine",
    "isopo_mini.training.update_rules": "isopo_mini.rules",
    "isopo_mini.training.old_policy_rules": "isopo_mini.rules.old_policy",
    "isopo_mini.training.experiments": "isopo_mini.experiments.command",
    **{f"isopo_mini.geometry.{name}": f"isopo_mini.engine.{name}" for name in _ENGINE},
    **{f"isopo_mini.training.{name}": f"isopo_mini.rules.{name}" for name in _RULES},
    **{f"isopo_mini.training.{name}": f"isopo_mini.experiments.{name}" for name in _EXPERIMENTS},
}


class _OldNames(MetaPathFinder, Loader):
    """Python asks it for a module that it finds nowhere else; it answers with the module under its new name."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        return ModuleSpec(name, self) if name in NEW_NAMES else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        new = NEW_NAMES[spec.name]
        warnings.warn(f"{spec.name} is now {new}; the old name ends with version 0.1", DeprecationWarning, stacklevel=2)
        module = importlib.import_module(new)
        spec.loader_state = module.__spec__  # which Python is about to overwrite
        return module

    def exec_module(self, module: ModuleType) -> None:
        """It has run already, under its new name."""
        assert module.__spec__ is not None
        module.__spec__ = module.__spec__.loader_state

    def get_code(self, name: str) -> object:
        """For `python -m isopo_mini.training.experiments`."""
        new = NEW_NAMES[name]
        warnings.warn(f"python -m {name} is now python -m isopo_mini.experiments", DeprecationWarning, stacklevel=2)
        program = f"from {new} import main\nmain()\n"
        return compile(program, name, "exec")


def attributes_of(package: str) -> Callable[[str], ModuleType]:
    """A `__getattr__` for a package whose modules have moved: `geometry.layerwise` without an import of its own."""

    def __getattr__(name: str) -> ModuleType:
        if f"{package}.{name}" not in NEW_NAMES:
            raise AttributeError(f"module '{package}' has no attribute '{name}'")
        return importlib.import_module(f"{package}.{name}")

    return __getattr__


def keep() -> None:
    """Let the old names be imported."""
    if not any(isinstance(finder, _OldNames) for finder in sys.meta_path):
        sys.meta_path.append(_OldNames())
