"""Grids of runs: which rule is better on which task, with which optimizer and step size.

    python -m isopo_mini.experiments bandit --rules reinforce ntk:damping=0.1 --search --out results/mine

`command` reads such a line. A run is a rule on one of the `setups`; `search` finds step sizes, a `pool` makes the
`runs` in processes or on a cluster, and each leaves one of the `records`, with its `provenance`. `statistics` puts
intervals around several seeds.
"""

from isopo_mini.experiments import command, pool, provenance, records, runs, search, setups, statistics

__all__ = ["command", "pool", "provenance", "records", "runs", "search", "setups", "statistics"]
