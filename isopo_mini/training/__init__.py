"""The loop around a rule, and what is measured on the way.

`loop.train` lets a policy sample, a rule step, and returns a table. `diagnostics` measure how far a step moved the
policy and along which direction.
"""

from isopo_mini.old_names import attributes_of
from isopo_mini.training import diagnostics, loop

__all__ = ["diagnostics", "loop"]

__getattr__ = attributes_of(__name__)
