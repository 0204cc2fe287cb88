"""How a policy learns: update rules, the loop around them, and what is measured on the way.

`update_rules` turn a batch into a step, those of `old_policy_rules` into several or a bounded one; both are made of
`rule_parts`. `loop.train` repeats that and returns a table; a policy whose log-probabilities are random is refused by
`repeatable`. `diagnostics` measure how far a step moved the policy,
`statistics` puts intervals around several seeds, and `provenance` writes down where numbers came from.

`experiments` compares rules: named by `rule_specs`, on tasks named by `setups`, with `optimizers`; each of its `runs`
leaves one of the `records`. It is a command too, and imported by name.
"""

from isopo_mini.training import (
    diagnostics,
    loop,
    old_policy_rules,
    optimizers,
    provenance,
    records,
    repeatable,
    rule_parts,
    rule_specs,
    runs,
    setups,
    statistics,
    update_rules,
)

__all__ = [
    "diagnostics",
    "loop",
    "old_policy_rules",
    "optimizers",
    "provenance",
    "records",
    "repeatable",
    "rule_parts",
    "rule_specs",
    "runs",
    "setups",
    "statistics",
    "update_rules",
]
