"""How fast policies act: steps of CartPole a second, and their share that the environment alone would take.

    python benchmarks/rollout.py [--device cuda] [--rounds 5] [--threads 1] [--out results/rollout.csv]

A step is counted when it belongs to an episode that was asked for: what an environment does after its episode has
ended, while the others still run, takes time and is not counted. The clock covers all of `CartPole.sample`: making
the environments, acting, and putting the episodes together. One thread is the default because the matrices are small:
with more, threads wait for each other.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from statistics import median

import gymnasium
import numpy as np
import pandas as pd
import torch
from timing import rounds_of

from isopo_mini.policies import MLP
from isopo_mini.tasks import CartPole
from isopo_mini.training.provenance import provenance, write_table

ENVIRONMENTS = (32, 1024)


def new_policy(device: torch.device) -> MLP:
    """An MLP of 64 as it starts: episodes of about 22 steps."""
    torch.manual_seed(0)
    return MLP(4, 2, hidden=(64,)).to(device)


def balancing_policy(device: torch.device) -> MLP:
    """An MLP of 64 that pushes where the pole falls: nearly every episode lasts 500 steps, as after training."""
    policy = new_policy(device)
    push = torch.tensor([0.1, 0.3, 5.0, 1.0], device=device)
    first, last = policy.layers[0], policy.layers[-1]
    with torch.no_grad():
        first.weight.copy_(push / 10)
        first.bias.zero_()
        last.weight.copy_(torch.tensor([[-1.0], [1.0]]))
    return policy


def environment_alone(environments: int, steps: int) -> Callable[[], None]:
    """The same number of vectorised steps with actions chosen beforehand."""

    def run() -> None:
        vector = gymnasium.make_vec("CartPole-v1", num_envs=environments, vectorization_mode="vector_entry_point")
        vector.reset(seed=0)
        actions = np.zeros(environments, dtype=np.int64)
        for _ in range(steps):
            vector.step(actions)

    return run


def measure(name: str, policy: MLP, environments: int, rounds: int, device: torch.device) -> dict[str, object]:
    """One row of the table."""
    task = CartPole()
    episodes = task.sample(policy, environments, torch.Generator(device).manual_seed(0))

    def act() -> None:
        task.sample(policy, environments, torch.Generator(device).manual_seed(0))

    steps, longest = int(episodes.mask.sum()), episodes.mask.shape[1]
    seconds = rounds_of(
        {"policy": act, "environment": environment_alone(environments, longest)}, rounds, device, f"{name} policy"
    )
    return {
        "what": f"CartPole, {name} policy",
        "environments": environments,
        "mean length": round(steps / environments, 1),
        "steps/s": round(steps / median(seconds["policy"])),
        "environment's share": round(median(seconds["environment"]) / median(seconds["policy"]), 2),
    }


def main() -> None:
    """Measure, print, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="write a CSV and its provenance here")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    policies = {"new": new_policy(device), "balancing": balancing_policy(device)}
    rows = [
        measure(name, policy, environments, options.rounds, device)
        for name, policy in policies.items()
        for environments in ENVIRONMENTS
    ]
    table = pd.DataFrame(rows)
    print(table.to_string(index=False))
    if options.out:
        write_table(options.out, table, provenance(device, rounds=options.rounds, statistic="median"))


if __name__ == "__main__":
    main()
