"""What an ISOPO step costs, as a ratio to REINFORCE's: forward and backward of the same transformer, same batch.

    python benchmarks/step_cost.py [--device cuda] [--rounds 15] [--out results/step_cost.csv]
    python benchmarks/step_cost.py --language --rounds 3 --out results/step_cost_language.csv

The second line takes SmolLM2-135M and needs the extra `language`.

The *floor* is the ratio in multiplications for the dense Gram matrix if nothing else cost anything: a weight of size
o×i takes 3·S·T·o·i multiplications in REINFORCE (forward, input gradient, weight gradient) and S²·o·i more for its
Gram matrix, so 1 + S/(3T). Attention, normalisation and the optimizer are in neither count.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from statistics import median

import pandas as pd
import torch
from timing import ratio, rounds_of

from isopo_mini.engine import NTK, FisherNormalized, Isopo
from isopo_mini.experiments.provenance import provenance, write_table
from isopo_mini.policies import CausalTransformer, TokenPolicy
from isopo_mini.policies.pretrained import load_smollm2

VOCABULARY = 16
# sequences, positions, width, layers
CPU_SETTINGS = [(8, 256, 256, 4), (32, 64, 256, 4), (64, 24, 128, 4), (256, 9, 64, 2), (1024, 9, 64, 2)]
LANGUAGE_SETTING = (8, 64)  # sequences, positions
GPU_SETTINGS = [*CPU_SETTINGS, (8, 1024, 1024, 4), (32, 256, 1024, 4), (64, 256, 512, 4), (256, 32, 512, 4)]


def steps(
    sequences: int, positions: int, width: int, layers: int, device: torch.device
) -> dict[str, Callable[[], None]]:
    """One forward and backward pass of each method on one model and batch."""
    torch.manual_seed(0)
    policy = CausalTransformer(VOCABULARY, positions, width=width, layers=layers, heads=4).to(device)
    return steps_of(policy, sequences, positions, VOCABULARY, device)


def steps_of(
    policy: TokenPolicy, sequences: int, positions: int, vocabulary: int, device: torch.device
) -> dict[str, Callable[[], None]]:
    """The same for a policy that is there."""
    observations = torch.randint(0, vocabulary, (sequences, positions), device=device)
    actions = torch.randint(0, vocabulary, (sequences, positions, 1), device=device)
    advantages = torch.randn(sequences, device=device)

    def log_probs() -> torch.Tensor:
        return policy.logits(observations).log_softmax(-1).gather(-1, actions).sum(dim=(1, 2))

    def reinforce() -> None:
        policy.zero_grad()
        (-(advantages * log_probs()).sum()).backward()

    def isopo(engine: Isopo) -> Callable[[], None]:
        def step() -> None:
            policy.zero_grad()
            with engine.microbatch(advantages):
                (-log_probs().sum()).backward()

        return step

    return {
        "REINFORCE": reinforce,
        "dense": isopo(Isopo(policy, NTK(1.0), gram="dense")),
        "sketched": isopo(Isopo(policy, NTK(1.0), gram="sketched", sketch_size=32)),
        "signs": isopo(Isopo(policy, NTK(1.0), gram="signs", sketch_size=32)),
        "fast": isopo(Isopo(policy, NTK(1.0), gram="fast", sketch_size=32)),
        "Fisher": isopo(Isopo(policy, FisherNormalized(), gram="dense")),
        "Fisher, tokens": isopo(Isopo(policy, FisherNormalized("token"))),
    }


def measure(setting: tuple[int, int, int, int], rounds: int, device: torch.device) -> dict[str, float]:
    """One row of the table."""
    return row_of(setting, steps(*setting, device), rounds, device)


def language_row(rounds: int, device: torch.device) -> dict[str, float]:
    """The same for SmolLM2-135M."""
    policy, _ = load_smollm2(device=device)
    torch.manual_seed(0)
    config = policy.model.config
    made = steps_of(policy, *LANGUAGE_SETTING, config.vocab_size, device)
    return row_of((*LANGUAGE_SETTING, config.hidden_size, config.num_hidden_layers), made, rounds, device)


def row_of(
    setting: tuple[int, int, int, int], made: dict[str, Callable[[], None]], rounds: int, device: torch.device
) -> dict[str, float]:
    """The ratios of these steps."""
    sequences, positions, width, layers = setting
    label = f"S={sequences} T={positions} d={width}"
    seconds = rounds_of(made, rounds, device, label)
    row: dict[str, float] = {"S": sequences, "T": positions, "d": width, "layers": layers}
    row["REINFORCE (ms)"] = round(1e3 * median(seconds["REINFORCE"]), 2)
    row["floor"] = round(1 + sequences / (3 * positions), 3)
    return row | {name: round(ratio(seconds, name, "REINFORCE"), 3) for name in seconds if name != "REINFORCE"}


def main() -> None:
    """Measure, print, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--language", action="store_true", help="SmolLM2-135M alone")
    parser.add_argument("--out", type=Path, help="write a CSV and its provenance here")
    options = parser.parse_args()
    device = torch.device(options.device)
    settings = CPU_SETTINGS if device.type == "cpu" else GPU_SETTINGS
    if options.language:
        table = pd.DataFrame([language_row(options.rounds, device)])
    else:
        table = pd.DataFrame([measure(setting, options.rounds, device) for setting in settings])
    print(table.to_string(index=False))
    if options.out:
        write_table(options.out, table, provenance(device, rounds=options.rounds, statistic="median ratio a round"))


if __name__ == "__main__":
    main()
