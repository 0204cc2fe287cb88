"""The long comparisons of token tasks by name: each is one command of `isopo_mini.training.experiments`.

    python scripts/grids.py                      # lists them
    python scripts/grids.py addition_60          # makes results/addition_60, or goes on where it was stopped
    python scripts/grids.py addition_60 --show   # the command, without running it

The optimizer is a part of the method: every rule is searched with every optimizer, from four step sizes a factor of
four apart, on by factors of two. Where the search starts depends on the scale of the rule's step and on the optimizer
alone (`STARTS`); it ends where it ends. Three seeds choose and ten others report.
"""

import argparse
import shlex
from dataclasses import dataclass

from isopo_mini.training import experiments
from isopo_mini.training.optimizers import OPTIMIZERS

REPORT_SEEDS = range(100, 110)
FACTOR, POINTS = 4, 4

# The smallest of the four step sizes, by the scale of a rule's step and the optimizer.
STARTS = {
    "gradient": {"sgd": 2.5e-4, "momentum": 3e-5, "adamw": 5e-5, "muon": 5e-5},
    "ntk": {"sgd": 2.5e-3, "momentum": 5e-4, "adamw": 5e-5, "muon": 5e-5},
    "layer": {"sgd": 0.25, "momentum": 0.03, "adamw": 5e-5, "muon": 5e-5},
    "natural": {"sgd": 2.5, "momentum": 0.3, "adamw": 5e-5, "muon": 5e-5},
    "old policy": {"sgd": 7.5e-4, "momentum": 1e-4, "adamw": 5e-5, "muon": 5e-5},
}
ONE_PASS = {
    "reinforce": "gradient",
    "layer_scaled": "layer",
    "fisher": "layer",
    "fisher:scale=gradient": "gradient",
    "fisher:scale=natural": "layer",
    "ntk:damping=0.3|1|3,gram=sketched": "ntk",
    "ntk:damping=0.3|1|3,scale=natural,gram=sketched": "natural",
    "ntk": "ntk",
    "ntk:scale=natural": "natural",
}
# How a clipped loss spends its batch: four epochs, two of two minibatches, or one of four.
SHAPES = ("", ":epochs=2,minibatches=2", ":epochs=1,minibatches=4")
OLD_POLICY = {loss + shape: "old policy" for loss in ("ppo", "grpo", "gspo", "cispo") for shape in SHAPES}
# {none, Fisher, NTK} × {gradient scale, natural scale} × {SGD, AdamW}, and the published Fisher norm.
ATTRIBUTION = (
    *("reinforce", "layer_scaled", "fisher", "fisher:scale=gradient", "fisher:scale=natural"),
    *("ntk:damping=1,gram=sketched", "ntk:damping=1,scale=natural,gram=sketched"),
)


@dataclass(frozen=True)
class Grid:
    """One command.

    Args:
        task: a name of `setups.SETUPS`.
        rules: families of rules, each with the scale of its step, a key of `STARTS`.
        options: others of the command.
        report: what is reported beside the best of each family.
    """

    task: str
    rules: dict[str, str]
    options: str
    report: tuple[str, ...] = ()

    def command(self, name: str) -> list[str]:
        """The arguments of `python -m isopo_mini.training.experiments`."""
        rules = [
            f"{rule}/{optimizer}@" + ",".join(f"{STARTS[scale][optimizer] * FACTOR**i:g}" for i in range(POINTS))
            for rule, scale in self.rules.items()
            for optimizer in OPTIMIZERS
        ]
        line = [self.task, "--rules", *rules, "--search", "--report", "best", *self.report]
        line += ["--report-seeds", *map(str, REPORT_SEEDS), *self.options.split()]
        return [*line, "--out", f"results/{name}"]


OPTIONS = "--screen 1 --seeds 0 1 2 --steps 60 --evaluations 15"
IN_FULL = tuple(f"{rule}/{optimizer}" for rule in ATTRIBUTION for optimizer in ("sgd", "adamw"))
GRIDS = {
    "addition_60": Grid("addition", ONE_PASS | OLD_POLICY, OPTIONS, IN_FULL),
    "sorting_60": Grid("sorting", ONE_PASS | OLD_POLICY, OPTIONS),
    "modular_60": Grid("modular", ONE_PASS | OLD_POLICY, OPTIONS),
}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", nargs="?", choices=GRIDS, help="which one; without it they are listed")
    parser.add_argument("--show", action="store_true", help="print the command only")
    parser.add_argument("--processes", type=int, help="runs at a time; all cores when left out")
    options = parser.parse_args()
    if options.name is None:
        print("\n".join(f"{name:16s}{grid.task}, {len(grid.rules)} families" for name, grid in GRIDS.items()))
        return
    command = GRIDS[options.name].command(options.name)
    print("python -m isopo_mini.training.experiments", shlex.join(command))
    if not options.show:
        more = ["--processes", str(options.processes)] if options.processes else []
        experiments.main([*command, *more])


if __name__ == "__main__":
    main()
