"""The long comparisons by name: each is one command of `isopo_mini.experiments`.

    python scripts/grids.py                      # lists them
    python scripts/grids.py addition_60          # makes results/addition_60, or goes on where it was stopped
    python scripts/grids.py addition_60 --show   # the command, without running it

The optimizer is a part of the method: a family of rules is searched with all four, or with those that it names, from
four step sizes a factor of four apart (of two in the ablations), on by factors of two. Where the search starts depends
on the scale of the rule's step and on the optimizer alone; it ends where it ends. Three seeds choose (on CartPole ten)
and ten others report. `language` needs the packages of `make models` and is smaller.
"""

import argparse
import shlex
from dataclasses import dataclass

from isopo_mini.experiments.command import main as run_experiments
from isopo_mini.rules.optimizers import OPTIMIZERS

REPORT_SEEDS = range(100, 110)
FACTOR, POINTS = 4, 4
BEST, EVERY = ("best",), ("all",)

# The smallest of the four step sizes, by the scale of a rule's step and the optimizer: on the transformer of the token
# tasks, and on the small networks of bandit and CartPole.
TRANSFORMER = {
    "gradient": {"sgd": 2.5e-4, "momentum": 3e-5, "adamw": 5e-5, "muon": 5e-5},
    "ntk": {"sgd": 2.5e-3, "momentum": 5e-4, "adamw": 5e-5, "muon": 5e-5},
    "layer": {"sgd": 0.25, "momentum": 0.03, "adamw": 5e-5, "muon": 5e-5},
    "natural": {"sgd": 2.5, "momentum": 0.3, "adamw": 5e-5, "muon": 5e-5},
    "winner": {"sgd": 5.0},  # about what the search with the line before came to: see `ABLATIONS`
    "old policy": {"sgd": 7.5e-4, "momentum": 1e-4, "adamw": 5e-5, "muon": 5e-5},
    "nats": {"sgd": 1e-4, "adamw": 1e-4},  # of a rule with `step=kl`
}
ADAPTIVE = {"adamw": 0.003, "muon": 0.003}
SMALL_NETWORK = {
    "gradient": {"sgd": 0.1, "momentum": 0.02} | ADAPTIVE,
    "ntk": {"sgd": 1.0, "momentum": 0.1} | ADAPTIVE,
    "layer": {"sgd": 0.3, "momentum": 0.03} | ADAPTIVE,
    "natural": {"sgd": 1.0, "momentum": 0.1} | ADAPTIVE,
    "old policy": {"sgd": 0.1, "momentum": 0.02} | ADAPTIVE,
    "whole Fisher": {"sgd": 0.1, "momentum": 0.02} | ADAPTIVE,
    "rank one": {"sgd": 0.1, "momentum": 0.02} | ADAPTIVE,  # at λ = 1 it is about the gradient
    "trust region": {"sgd": 0.001},  # a bound on the KL: there is no optimizer
    "nats": {"sgd": 1e-4, "adamw": 1e-4},
}
# SmolLM2-135M: about where three batches of a first trial learned something.
PRETRAINED = {
    "gradient": {"adamw": 2.5e-6},
    "layer": {"momentum": 2.5e-3},
    "natural": {"sgd": 0.125},
    "old policy": {"adamw": 2.5e-6},
}
ALL = tuple(OPTIMIZERS)
ENDS = ("sgd", "adamw")  # of what is compared only in the attribution table, or only checks another family


@dataclass(frozen=True)
class Family:
    """Rules that differ in choices which are part of the method.

    Args:
        scale: of the rule's step, a key of `TRANSFORMER` or `SMALL_NETWORK`.
        optimizers: those it is searched with.
    """

    scale: str
    optimizers: tuple[str, ...] = ALL


# How a clipped loss spends its batch: four epochs, two of two minibatches, or one of four.
EPOCHS, TWO, ONE_PASS = "", ":epochs=2,minibatches=2", ":epochs=1,minibatches=4"
TOKENS = {
    "reinforce": Family("gradient"),
    "layer_scaled": Family("layer"),
    "fisher": Family("layer"),
    "fisher:scale=gradient": Family("gradient", ENDS),
    "fisher:scale=natural": Family("layer", ENDS),
    "ntk:damping=0.3|1|3,gram=sketched": Family("ntk"),
    "ntk:damping=0.3|1|3,scale=natural,gram=sketched": Family("natural"),
    **{loss + shape: Family("old policy") for loss in ("ppo", "grpo") for shape in (EPOCHS, TWO, ONE_PASS)},
}
# What the sketch estimates, and the other two clipped losses.
MORE_TOKENS = {
    "ntk": Family("ntk", ENDS),
    "ntk:scale=natural": Family("natural", ENDS),
    **{loss + shape: Family("old policy") for loss in ("gspo", "cispo") for shape in (EPOCHS, TWO, ONE_PASS)},
}
# What the clip does for four epochs: nothing clipped, and CISPO's weights with the bound of another program.
NO_CLIP = "clip_low=0.99,clip_high=100"
CLIPS = {
    f"ppo:{NO_CLIP}": Family("old policy", ("adamw", "muon")),
    "cispo:dialect=trl": Family("old policy", ("muon",)),
}
# {none, Fisher, NTK} × {gradient scale, natural scale} × {SGD, AdamW}, and the published Fisher norm.
ATTRIBUTION = tuple(
    f"{rule}/{optimizer}"
    for rule in (
        *("reinforce", "layer_scaled", "fisher", "fisher:scale=gradient", "fisher:scale=natural"),
        *("ntk:damping=1,gram=sketched", "ntk:damping=1,scale=natural,gram=sketched"),
    )
    for optimizer in ENDS
)
BANDIT = {
    "reinforce": Family("gradient"),
    "layer_scaled": Family("layer"),
    "fisher": Family("layer"),
    "exact_fisher": Family("layer"),
    "ntk:damping=0.1|1|10": Family("ntk"),
    "ntk:damping=0.1|1|10,scale=natural": Family("natural"),
    "npg:damping=0.01|0.1|1": Family("whole Fisher"),
    "trpo": Family("trust region", ("sgd",)),
    **{loss + shape: Family("old policy") for loss in ("ppo", "cispo") for shape in (EPOCHS, TWO, ONE_PASS)},
}
# Losses whose paper defines the advantages.
OWN_ADVANTAGES = {
    **{loss + shape: Family("old policy") for loss in ("grpo", "gspo") for shape in (EPOCHS, TWO, ONE_PASS)},
    **{loss: Family("old policy") for loss in ("dr_grpo", "dapo")},
}
CARTPOLE = {
    "reinforce": Family("gradient"),
    "layer_scaled": Family("layer"),
    "fisher:unit=step|sequence": Family("layer"),
    "ntk:damping=1|20|300,unit=step|sequence": Family("ntk"),
    # AdamW divides the scale out, so with it this is the family before.
    "ntk:damping=1|20|300,unit=step|sequence,scale=natural": Family("natural", ("sgd", "momentum")),
    "npg:damping=0.01|0.1|1": Family("whole Fisher"),
    "trpo": Family("trust region", ("sgd",)),
    **{loss + shape: Family("old policy") for loss in ("ppo", "grpo", "cispo") for shape in (EPOCHS, ONE_PASS)},
    "ppo" + TWO: Family("old policy"),
    "gspo": Family("old policy"),
}
# A small and a large damping beside the top direction, under SGD in the natural scale and under AdamW.
CARTPOLE_DAMPING = {f"npg:damping={damping}": Family("whole Fisher", ENDS) for damping in (0.1, 1)}
for unit, damping in (("step", 1), ("step", 300), ("sequence", 1), ("sequence", 20)):
    CARTPOLE_DAMPING[f"ntk:damping={damping},unit={unit}"] = Family("ntk", ("adamw",))
    CARTPOLE_DAMPING[f"ntk:damping={damping},unit={unit},scale=natural"] = Family("natural", ("sgd",))
# Beside `cartpole`: the Fisher matrix of one sampled score (chapter 15).
RANK_ONE = {"rank_one:damping=0.1|1": Family("rank one")}
# The same on another task, with what it is compared with.
ACROBOT = RANK_ONE | {"reinforce": Family("gradient"), "trpo": Family("trust region", ("sgd",))}
# The other two tasks: what addition left in front, and what it is compared with. Under AdamW and Muon the two scales
# of the NTK are one rule, so each scale gets the optimizers that suit it.
OTHER_TASKS = {
    "reinforce": Family("gradient"),
    "layer_scaled": Family("layer"),
    "fisher": Family("layer"),
    "ntk:gram=sketched": Family("ntk", ("adamw", "muon")),
    "ntk:damping=0.3|1|3,scale=natural,gram=sketched": Family("natural", ("sgd", "momentum")),
    **{loss: Family("old policy") for loss in ("ppo", "ppo" + ONE_PASS, "grpo" + ONE_PASS)},
}
# What is changed, one at a time, in ISOPO (NTK) in its natural scale under SGD.
WINNER = "ntk:damping=1,scale=natural,gram=sketched"
CHANGES = (
    *("ntk:scale=natural,microbatch_size=8", "ntk:scale=natural,microbatch_size=32"),
    *("ntk:scale=natural,microbatch_size=32,spread=true", f"{WINNER},microbatch_size=64"),
    *(f"ntk:damping={damping},scale=natural,gram=sketched" for damping in (0.1, 0.3, 3, 10)),
    *(f"{WINNER},sketch_size={size}" for size in (8, 128)),
    *(f"{WINNER},{change}" for change in ("layers=together", "reuse=2", "reuse=4")),
    f"{WINNER},microbatch_size=256,unit=token",  # 256 tokens are 64 answers
)
ABLATIONS = {rule: Family("winner", ("sgd",)) for rule in (WINNER, *CHANGES)}

# Four times as many batches, for what the search on 60 left in front: the others need an hour more.
BONUS = "entropy=0|0.03"
LONG = {
    f"ntk:damping=0.3|1|3,scale=natural,gram=sketched,{BONUS}": Family("natural", ("sgd",)),
    f"ppo:{BONUS}": Family("old policy", ("adamw", "muon")),
    "grpo": Family("old policy", ("muon",)),
    "fisher": Family("layer", ("momentum",)),
    "layer_scaled": Family("layer", ("momentum",)),
    "reinforce": Family("gradient", ("muon",)),
}
# A real language model, one seed to choose, three to report: about an hour. One optimizer each: for the rules with a
# scale of their own the one that was best on addition, for the others the one that language models are trained with.
LANGUAGE = {
    "reinforce": Family("gradient", ("adamw",)),
    "grpo" + ONE_PASS: Family("old policy", ("adamw",)),
    "fisher": Family("layer", ("momentum",)),
    WINNER: Family("natural", ("sgd",)),
}
# Does the weight of a token, A in place of rA, keep a Gaussian policy from narrowing? See chapter 17.
PENDULUM = {loss: Family("old policy", ("adamw",)) for loss in ("ppo", "copg")}
# Is one length of a step, in nats, best for all rules and tasks?
NATS = {
    f"{rule}step=kl": Family("nats", ("sgd",))
    for rule in ("reinforce:", "layer_scaled:", "fisher:", "ntk:", "ntk:scale=natural,")
}
NATS["reinforce:step=kl"] = Family("nats", ENDS)
SMALL_NATS = NATS | {"npg:step=kl": Family("nats", ("sgd",))}
TOKEN_NATS = {rule.replace("ntk:", "ntk:gram=sketched,"): family for rule, family in NATS.items()}


@dataclass(frozen=True)
class Grid:
    """One command.

    Args:
        task: a name of `setups.SETUPS`.
        rules: the families.
        options: others of the command.
        starts: `TRANSFORMER`, `SMALL_NETWORK` or `PRETRAINED`.
        report: what is reported.
        factor: between the first step sizes.
        report_seeds: of the runs that are reported.
    """

    task: str
    rules: dict[str, Family]
    options: str
    starts: dict[str, dict[str, float]]
    report: tuple[str, ...] = BEST
    factor: int = FACTOR
    report_seeds: range = REPORT_SEEDS

    def command(self, name: str) -> list[str]:
        """The arguments of `python -m isopo_mini.experiments`."""
        rules = [
            f"{rule}/{optimizer}@" + ",".join(f"{start * self.factor**i:g}" for i in range(POINTS))
            for rule, family in self.rules.items()
            for optimizer, start in self.starts[family.scale].items()
            if optimizer in family.optimizers
        ]
        line = [self.task, "--rules", *rules, "--search", "--report", *self.report]
        line += ["--report-seeds", *map(str, self.report_seeds), *self.options.split()]
        return [*line, "--out", f"results/{name}"]


def with_advantages(rules: dict[str, Family], name: str) -> dict[str, Family]:
    """The same rules with these advantages."""
    return {f"{rule}{',' if ':' in rule else ':'}advantages={name}": family for rule, family in rules.items()}


BANDIT_OPTIONS = "--screen 1 --seeds 0 1 2"
OPTIONS = "--screen 1 --seeds 0 1 2 --steps 60 --evaluations 15"
LONG_OPTIONS = "--screen 1 --seeds 0 1 2 --steps 240 --evaluations 60"
# Three seeds promise too much there: see chapter 10.
CARTPOLE_OPTIONS = "--screen 2 --seeds 0 1 2 3 4 5 6 7 8 9 --sequences 32 --steps 20 --evaluations 10"
GRIDS = {
    "bandit": Grid("bandit", BANDIT | OWN_ADVANTAGES, BANDIT_OPTIONS, SMALL_NETWORK),
    "bandit_context_baseline": Grid("bandit", with_advantages(BANDIT, "leave_one_out"), BANDIT_OPTIONS, SMALL_NETWORK),
    "cartpole": Grid("cartpole", CARTPOLE, CARTPOLE_OPTIONS, SMALL_NETWORK),
    "cartpole_damping": Grid("cartpole", CARTPOLE_DAMPING, CARTPOLE_OPTIONS, SMALL_NETWORK, EVERY),
    "cartpole_rank_one": Grid("cartpole", RANK_ONE, CARTPOLE_OPTIONS, SMALL_NETWORK),
    "acrobot": Grid("acrobot", ACROBOT, "--screen 1 --seeds 0 1 2", SMALL_NETWORK),
    "addition_60": Grid("addition", TOKENS, OPTIONS, TRANSFORMER, BEST + ATTRIBUTION),
    "addition_60_more": Grid("addition", MORE_TOKENS, OPTIONS, TRANSFORMER),
    "addition_60_clip": Grid("addition", CLIPS, OPTIONS, TRANSFORMER),
    "ablations": Grid("addition", ABLATIONS, OPTIONS, TRANSFORMER, factor=2),
    "addition_240": Grid("addition", LONG, LONG_OPTIONS, TRANSFORMER),
    "kl_addition": Grid("addition", TOKEN_NATS, OPTIONS, TRANSFORMER),
    "kl_bandit": Grid("bandit", with_advantages(SMALL_NATS, "leave_one_out"), BANDIT_OPTIONS, SMALL_NETWORK),
    "kl_cartpole": Grid("cartpole", SMALL_NATS, CARTPOLE_OPTIONS, SMALL_NETWORK),
    "sorting_60": Grid("sorting", OTHER_TASKS, OPTIONS, TRANSFORMER),
    "modular_60": Grid("modular", OTHER_TASKS, OPTIONS, TRANSFORMER),
    "pendulum": Grid("pendulum", PENDULUM, "--seeds 0 1 2", SMALL_NETWORK, report_seeds=range(100, 116)),
    "language": Grid("language", LANGUAGE, "--seeds 0", PRETRAINED, report_seeds=range(100, 103)),
}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", nargs="?", choices=GRIDS, help="which one; without it they are listed")
    parser.add_argument("--show", action="store_true", help="print the command only")
    parser.add_argument("--processes", type=int, help="runs at a time; all cores when left out")
    options = parser.parse_args()
    if options.name is None:
        print("\n".join(f"{name:26s}{grid.task}, {len(grid.rules)} families" for name, grid in GRIDS.items()))
        return
    command = GRIDS[options.name].command(options.name)
    print("python -m isopo_mini.experiments", shlex.join(command))
    if not options.show:
        more = ["--processes", str(options.processes)] if options.processes else []
        run_experiments([*command, *more])


if __name__ == "__main__":
    main()
