"""Everything that wants a GPU, in one command of under ten minutes: `make gpu`.

    python benchmarks/gpu.py [--device cuda] [--seconds 570] [--out results/gpu]

What a step costs (up to S=8, T=1,024, d=1,024), what the Gram matrices take, how fast policies act, and what an
iteration of an experiment costs, timed by CUDA's own events; then the warm start of `addition-large` and one run of
each of three rules on it. Each part leaves its files as it ends. A part that fails, or that the time is up for, is
named at the end, and the exit status is 1. Given again, the runs of `addition-large` go on where they were; the rest is
measured anew.
"""

import argparse
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from isopo_mini.experiments.setups import MADE, WARM_START_OPTIONS

HERE = Path(__file__).parent
WEIGHTS = "addition_large.safetensors"
# The optimizers and step sizes are those that the search on `addition` chose for 240 batches.
LARGE = ("reinforce/muon@0.0008", "ppo/muon@0.0002", "ntk:damping=0.3,scale=natural,gram=fast/sgd@20")


def parts(device: str, out: Path) -> dict[str, list[str]]:
    """The commands by name, in the order of their worth."""
    options = ["--device", device]
    commands = {
        name: [sys.executable, str(HERE / f"{name}.py"), *options, "--out", str(out / f"{name}.csv")]
        for name in ("step_cost", "iteration_cost", "gram_cost", "rollout")
    }
    weights = MADE / WEIGHTS
    if not weights.exists():
        size = WARM_START_OPTIONS[WEIGHTS].split()
        start = [sys.executable, "-m", "isopo_mini.tasks.warm_start", "addition:digits=3", *size]
        commands["warm start of addition-large"] = [*start, *options, "--out", str(weights)]
    run = [sys.executable, "-m", "isopo_mini.experiments", "addition-large", "--rules", *LARGE, *options]
    run += ["--seeds", "0", "--steps", "100", "--processes", "1", "--out", str(out / "addition_large")]
    return commands | {"addition-large": run}


def run_all(commands: Mapping[str, Sequence[str]], seconds: float) -> dict[str, str]:
    """Run the commands one after another, and say of each what became of it.

    Args:
        commands: by name.
        seconds: for all together. What runs when they are over is stopped, and what comes after is not begun.
    """
    end = time.monotonic() + seconds
    became: dict[str, str] = {}
    for name, command in commands.items():
        left = end - time.monotonic()
        if left <= 0:
            became[name] = "not begun: the time is up"
            continue
        print(f"=== {name}", flush=True)
        began = time.monotonic()
        try:
            status = subprocess.run(command, timeout=left, check=False).returncode
        except subprocess.TimeoutExpired:
            became[name] = "stopped: the time was up"
            continue
        became[name] = f"done in {time.monotonic() - began:.0f} s" if status == 0 else f"failed with status {status}"
    return became


def main() -> int:
    """Measure, and say what there was no time for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seconds", type=float, default=570.0)
    parser.add_argument("--out", type=Path, default=Path("results/gpu"))
    options = parser.parse_args()
    if torch.device(options.device).type == "cuda" and not torch.cuda.is_available():
        print(
            "--device: expected a GPU that PyTorch can use, found none; --device cpu measures the CPU", file=sys.stderr
        )
        return 1
    options.out.mkdir(parents=True, exist_ok=True)
    became = run_all(parts(options.device, options.out), options.seconds)
    print(*(f"{name}: {what}" for name, what in became.items()), sep="\n")
    return 0 if all(what.startswith("done") for what in became.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
