"""How a policy learns: update rules, the loop around them, and what is measured on the way.

`update_rules` turn a batch into a step, those of `old_policy_rules` into several or a bounded one; both are made of
`rule_parts`, and `kl_steps` makes the steps of any of them as long as a given KL. `loop.train` repeats that and returns
a table; a policy whose log-probabilities are random is refused by `repeatable`. `diagnostics` measure how far a step
moved the policy, `statistics` puts intervals around several seeds, `provenance` writes down where numbers came from.

`experiments` compares rules: named by `rule_specs`, on tasks named by `setups`, with `optimizers` and step sizes that
`search` finds. A `pool` makes its `runs`; each leaves one of the `records`. It is a command too, and imported by name.
"""

from isopo_mini.training import (
    diagnostics,
    kl_steps,
    loop,
    old_policy_rules,
    optimizers,
    pool,
    provenance,
    records,
    repeatable,
    rule_parts,
    rule_specs,
    runs,
    search,
    setups,
    statistics,
    update_rules,
)

__all__ = [
    "diagnostics",
    "kl_steps",
    "loop",
    "old_policy_rules",
    "optimizers",
    "pool",
    "provenance",
    "records",
    "repeatable",
    "rule_parts",
    "rule_specs",
    "runs",
    "search",
    "setups",
    "statistics",
    "update_rules",
]
