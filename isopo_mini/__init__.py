"""isopo_mini: natural policy gradients and ISOPO, small enough to read in an afternoon.

`import isopo_mini` makes every room available: `isopo_mini.geometry.isopo.ntk_coefficients`, and so on. Only
`isopo_mini.plotting` and `isopo_mini.exercises`, which serve the book, are imported by name.
"""

from isopo_mini import engine, experiments, geometry, objectives, policies, rules, tasks, training
from isopo_mini.batch import Batch

__all__ = ["Batch", "engine", "experiments", "geometry", "objectives", "policies", "rules", "tasks", "training"]
__version__ = "0.1.0"
