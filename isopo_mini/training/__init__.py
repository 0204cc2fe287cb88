"""How a policy learns: update rules, the loop around them, and what is measured on the way.

`update_rules` turn a batch into a step; `loop.train` repeats that and returns a table. `diagnostics` measure how far
a step moved the policy, `statistics` puts intervals around several seeds, and `provenance` writes down where
numbers came from.
"""

from isopo_mini.training import diagnostics, loop, provenance, statistics, update_rules

__all__ = ["diagnostics", "loop", "provenance", "statistics", "update_rules"]
