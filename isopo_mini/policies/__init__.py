"""Who acts: policies over a finite set of actions."""

from isopo_mini.policies.categorical import CategoricalPolicy

__all__ = ["CategoricalPolicy"]
