"""What one iteration of an experiment costs: sample a batch, let the rule use it, step the optimizer.

    python benchmarks/iteration_cost.py [--task addition] [--device cuda] [--rounds 15] [--out FILE.csv]

All rules run in turn in one process, each on a policy of its own that starts from the same weights. "sampling" is the
same for all; the ratio is to REINFORCE's whole iteration. Chapter 12 takes its axis of seconds from here, since the
runs themselves share the machine with each other.
"""

import argparse
import copy
from collections.abc import Callable
from pathlib import Path
from statistics import median

import pandas as pd
import torch
from timing import ratio, rounds_of

from isopo_mini.experiments.provenance import provenance, write_table
from isopo_mini.experiments.setups import SETUPS, setup_of
from isopo_mini.rules.optimizers import make_optimizer
from isopo_mini.rules.rule_specs import make_rule

# How a clipped loss spends its batch: four epochs, two of two minibatches, or one of four.
SHAPES = ("", ":epochs=2,minibatches=2", ":epochs=1,minibatches=4")
RULES = (
    "reinforce",
    "layer_scaled",
    "fisher",
    "ntk",
    "ntk:gram=sketched",
    "ntk:gram=fast",
    "fisher:gram=fast",
    "ntk:scale=natural",
    "ntk:scale=natural,gram=sketched",
    "ntk:scale=natural,gram=fast",
    "ntk:microbatch_size=32",
    "ntk:block_size=32",
    "ntk:block_size=32,gram=fast",
    "ntk:block_size=64,gram=fast",
    *(f"{loss}{shape}" for loss in ("ppo", "grpo", "gspo", "cispo") for shape in SHAPES),
    "dr_grpo",
    "dapo",
    "copg",
)


def iterations(task_name: str, rules: tuple[str, ...], device: torch.device) -> dict[str, Callable[[], object]]:
    """One iteration of each rule, and the sampling alone."""
    setup = setup_of(task_name)
    torch.manual_seed(0)
    task, policy = setup.make(device)
    generator = torch.Generator(device).manual_seed(0)

    def iteration(spec: str) -> Callable[[], object]:
        own = copy.deepcopy(policy)
        rule = make_rule(
            spec, setup.all_advantages, default=setup.advantages, by_step=setup.by_step, unit=setup.unit, step_size=1e-6
        )
        optimizer = make_optimizer("adamw", own, 1e-6)  # so small that the policy stays as it was
        return lambda: rule.step(own, task.sample(own, setup.sequences, generator=generator), optimizer)

    sampling = {"sampling": lambda: task.sample(policy, setup.sequences, generator=generator)}
    return sampling | {spec: iteration(spec) for spec in rules}


def main() -> None:
    """Measure, print, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=SETUPS, default="addition")
    parser.add_argument("--rules", nargs="+", default=RULES)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, help="write a CSV and its provenance here")
    options = parser.parse_args()
    device = torch.device(options.device)
    rules = ("reinforce", *[spec for spec in options.rules if spec != "reinforce"])
    seconds = rounds_of(iterations(options.task, rules, device), options.rounds, device, options.task)
    table = pd.DataFrame(
        [
            {
                "rule": name,
                "ms": round(1e3 * median(seconds[name]), 2),
                "over REINFORCE": round(ratio(seconds, name, "reinforce"), 3),
            }
            for name in seconds
        ]
    )
    print(table.to_string(index=False))
    if options.out:
        write_table(options.out, table, provenance(device, task=options.task, rounds=options.rounds))


if __name__ == "__main__":
    main()
