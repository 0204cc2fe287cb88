"""How fast policies act: steps of CartPole and tokens a second.

    python benchmarks/rollout.py [--device cuda] [--rounds 5] [--threads 1] [--out results/rollout.csv]

The first table: steps of CartPole, and the share of the time that the environment alone would take.
A step is counted when it belongs to an episode that was asked for: what an environment does after its episode has
ended, while the others still run, takes time and is not counted. The clock covers all of `CartPole.sample`: making
the environments, acting, and putting the episodes together. One thread is the default because the matrices are small:
with more, threads wait for each other.

The second table, written beside the first as `..._tokens.csv`: tokens that a transformer draws a second, when it keeps
the keys and values of earlier tokens and when it computes them again for every token. All sequences go on to the last
token. "addition" is a batch of `tasks.tokens.Addition`, whose groups of 8 share a prompt.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from statistics import median

import gymnasium
import numpy as np
import pandas as pd
import torch
from timing import ratio, rounds_of

from isopo_mini.experiments.provenance import provenance, write_table
from isopo_mini.policies import MLP, CausalTransformer
from isopo_mini.tasks import Addition, CartPole

ENVIRONMENTS = (32, 1024)
# prompts, responses to each, tokens of a prompt, new tokens, width, layers
ADDITION = (32, 8, Addition(2).prompt_length, Addition(2).answer_length, 64, 2)
CPU_TOKENS = {"addition": ADDITION, "long responses": (64, 1, 16, 112, 64, 2)}
GPU_TOKENS = CPU_TOKENS | {"long responses, wider": (64, 1, 64, 448, 512, 4)}


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


def measure_tokens(
    name: str, setting: tuple[int, int, int, int, int, int], rounds: int, device: torch.device
) -> dict[str, object]:
    """One row of the second table."""
    prompts, responses, prompt_length, new_tokens, width, layers = setting
    torch.manual_seed(0)
    policy = CausalTransformer(19, prompt_length + new_tokens, width, layers, 4).to(device)
    tokens = torch.randint(19, (prompts, prompt_length), device=device)

    def draw(use_cache: bool) -> Callable[[], object]:
        return lambda: policy.sample(tokens, new_tokens, responses_per_prompt=responses, use_cache=use_cache)

    seconds = rounds_of({"cache": draw(True), "none": draw(False)}, rounds, device, name)
    drawn = prompts * responses * new_tokens
    return {
        "what": name,
        "sequences": prompts * responses,
        "prompt": prompt_length,
        "new tokens": new_tokens,
        "d": width,
        "layers": layers,
        "tokens/s": round(drawn / median(seconds["cache"])),
        "without cache": round(drawn / median(seconds["none"])),
        "speed-up": round(ratio(seconds, "none", "cache"), 2),
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
    settings = CPU_TOKENS if device.type == "cpu" else GPU_TOKENS
    tokens = pd.DataFrame([measure_tokens(name, row, options.rounds, device) for name, row in settings.items()])
    print(tokens.to_string(index=False))
    if options.out:
        record = provenance(device, rounds=options.rounds, statistic="median")
        write_table(options.out, table, record)
        write_table(options.out.with_stem(f"{options.out.stem}_tokens"), tokens, record)


if __name__ == "__main__":
    main()
