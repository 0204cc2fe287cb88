"""isopo_mini: natural policy gradients and ISOPO, small enough to read in an afternoon.

After `import isopo_mini` every room is there, `isopo_mini.geometry.isopo.ntk_coefficients` and so on; it is loaded when
it is first asked for. So `import isopo_mini.engine`, in training code of your own, loads torch and jaxtyping and not
the libraries of the experiments. Only `isopo_mini.plotting` and `isopo_mini.exercises`, which serve the book, and the
modules of `isopo_mini.integrations` and `isopo_mini.coursework`, which need other libraries, are imported by name.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from isopo_mini import old_names

if TYPE_CHECKING:
    from isopo_mini import engine, experiments, geometry, objectives, policies, rules, tasks, training
    from isopo_mini.batch import Batch

__all__ = ["Batch", "engine", "experiments", "geometry", "objectives", "policies", "rules", "tasks", "training"]
__version__ = "0.1.0"

old_names.keep()


def __getattr__(name: str) -> Any:
    """A room, or `Batch`."""
    if name == "Batch":
        return import_module("isopo_mini.batch").Batch
    if name in __all__:
        return import_module(f"isopo_mini.{name}")
    raise AttributeError(f"module 'isopo_mini' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
