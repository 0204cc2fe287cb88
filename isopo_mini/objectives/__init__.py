"""The comparison: advantages, and what the π_old family makes of them."""

from isopo_mini.objectives import advantages
from isopo_mini.objectives.advantages import group_advantages, leave_one_out

__all__ = ["advantages", "group_advantages", "leave_one_out"]
