"""The comparison: advantages, and what the π_old family makes of them."""

from isopo_mini.objectives import advantages, aggregation, kl, losses, values
from isopo_mini.objectives.advantages import discounted_returns, gae, group_advantages, leave_one_out
from isopo_mini.objectives.values import episode_advantages, fitted_values

__all__ = [
    "advantages",
    "aggregation",
    "discounted_returns",
    "episode_advantages",
    "fitted_values",
    "gae",
    "group_advantages",
    "kl",
    "leave_one_out",
    "losses",
    "values",
]
