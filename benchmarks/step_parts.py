"""What the time of an ISOPO step beyond REINFORCE's is spent on.

    python benchmarks/step_parts.py [--rounds 15] [--out results/step_parts.csv]

The step of `gram="fast"` is taken apart by leaving out its end. *Without K* every c is A: what is left is the engine,
which sees every use of a parameter and multiplies by c. *Sketches* is what c is found from: those, or G, or K where it
is made of neither. *c* is the rest: inner products and equations, or products in their place. What a part takes is the
difference to the step before it, in units of REINFORCE's step. The *calls* are the excess of the whole step on two
sequences of one position, where there is next to nothing to compute, in the same units; all parts share them.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import pandas as pd
import torch
from step_cost import CPU_SETTINGS, VOCABULARY
from timing import ratio, rounds_of
from torch import Tensor

from isopo_mini.engine import NTK, Isopo, MovingAverages, Transform
from isopo_mini.engine.layer_gradients import LayerGradients
from isopo_mini.experiments.provenance import provenance, write_table
from isopo_mini.geometry.ntk_solvers import iterations_for
from isopo_mini.policies import CausalTransformer

FEWEST = (2, 1)  # sequences and positions of the step that is nothing but calls
RATIO = 1.0  # ρ
PARTS = ("without K", "sketches", "c")


@dataclass(frozen=True)
class UpTo:
    """c = A, after a layer has made its sketches, or not even that."""

    part: str

    def coefficients(self, layer: LayerGradients, advantages: Tensor, averages: MovingAverages) -> Tensor:
        """The advantages."""
        if self.part == "sketches" and layer.is_sketched:
            _ = layer.sketched_parts
        elif self.part == "sketches" and layer.few_columns() is None and not self._gives_rows(layer, advantages):
            layer.gram()
        return advantages

    def _gives_rows(self, layer: LayerGradients, advantages: Tensor) -> bool:
        return layer.rows_for_products(iterations_for(RATIO, len(advantages))) is not None


def steps(sequences: int, positions: int, width: int, layers: int) -> dict[str, Callable[[], None]]:
    """REINFORCE's step, and ISOPO's up to the end of each part."""
    torch.manual_seed(0)
    policy = CausalTransformer(VOCABULARY, positions, width=width, layers=layers, heads=4)
    observations = torch.randint(0, VOCABULARY, (sequences, positions))
    actions = torch.randint(0, VOCABULARY, (sequences, positions, 1))
    advantages = torch.randn(sequences)

    def log_probs() -> Tensor:
        return policy.logits(observations).log_softmax(-1).gather(-1, actions).sum(dim=(1, 2))

    def reinforce() -> None:
        policy.zero_grad()
        (-(advantages * log_probs()).sum()).backward()

    def isopo(transform: Transform) -> Callable[[], None]:
        engine = Isopo(policy, transform, gram="fast")

        def step() -> None:
            policy.zero_grad()
            with engine.microbatch(advantages):
                (-log_probs().sum()).backward()
            engine.end_step()

        return step

    return {
        "REINFORCE": reinforce,
        "without K": isopo(UpTo("without K")),
        "sketches": isopo(UpTo("sketches")),
        "c": isopo(NTK(RATIO)),
    }


def parts_of(setting: tuple[int, int, int, int], rounds: int) -> dict[str, float]:
    """One row: what every part takes, REINFORCE = 1."""
    device = torch.device("cpu")
    sequences, positions, width, layers = setting
    seconds = rounds_of(steps(*setting), rounds, device, f"S={sequences} T={positions} d={width}")
    few = rounds_of(steps(*FEWEST, width, layers), rounds, device, "calls")
    reference = seconds["REINFORCE"]
    calls = median(b - a for a, b in zip(few["REINFORCE"], few["c"], strict=True)) / median(reference)
    row: dict[str, float] = {"S": sequences, "T": positions, "d": width, "layers": layers}
    row["REINFORCE (ms)"] = round(1e3 * median(reference), 2)
    ratios = {name: ratio(seconds, name, "REINFORCE") for name in seconds}
    for before, part in zip(("REINFORCE", *PARTS), PARTS, strict=False):
        row[part] = round(ratios[part] - ratios[before], 3)
    return row | {"all": round(ratios[PARTS[-1]] - 1.0, 3), "calls": round(calls, 3)}


def main() -> None:
    """Measure, print, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, help="write a CSV and its provenance here")
    options = parser.parse_args()
    table = pd.DataFrame([parts_of(setting, options.rounds) for setting in CPU_SETTINGS])
    print(table.to_string(index=False))
    if options.out:
        made = provenance(torch.device("cpu"), rounds=options.rounds, statistic="differences of median ratios a round")
        write_table(options.out, table, made)


if __name__ == "__main__":
    main()
