"""isopo_mini: natural policy gradients and ISOPO, small enough to read in an afternoon."""

from isopo_mini.batch import Batch

__all__ = ["Batch"]
__version__ = "0.1.0"
