"""ISOPO in trl's trainer: how far its gradient is from one computed sequence by sequence, and whether it learns.

    python scripts/trl_table.py results/trl.csv results/trl_rewards.csv

Needs the extra `trl`. The model is random and tiny, in double precision for the comparison; nothing is downloaded.
"""

import argparse
import math
import os
import sys
import tempfile
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pandas as pd
import torch
from peft import LoraConfig
from tqdm.auto import tqdm

from isopo_mini.engine import NTK, FisherNormalized, Transform
from isopo_mini.experiments.provenance import provenance, write_table
from isopo_mini.integrations.trl import IsopoGRPOTrainer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "integrations"))
from by_sequences import Reference
from tiny_grpo import Run, make_config, make_model, make_prompts, make_tokenizer, relative_error

TRANSFORMS: dict[str, Transform] = {
    "NTK": NTK(0.5),
    "NTK, natural": NTK(0.5, scale="natural"),
    "Fisher": FisherNormalized(),
    "Fisher, natural": FisherNormalized(scale="natural"),
}
ADAPTERS = LoraConfig(r=2, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False)
TWICE = {"gradient_accumulation_steps": 2, "num_iterations": 2, "max_steps": 2}
# How trl is used: options of its configuration, of the model, and of the trainer.
USES: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "two microbatches": ({"gradient_accumulation_steps": 2, "max_steps": 2}, {}, {}),
    "checkpointing": ({"gradient_checkpointing": True}, {}, {}),
    "tied head": ({}, {"tied": True}, {}),
    "LoRA": ({"learning_rate": 1e-3}, {}, {"peft_config": ADAPTERS}),
    "each batch twice": (TWICE, {}, {}),
    "twice, grpo": ({"loss_type": "grpo", **TWICE}, {}, {}),
    "twice, GSPO": ({"loss_type": "grpo", "importance_sampling_level": "sequence", **TWICE}, {}, {}),
    "twice, bnpo": ({"loss_type": "bnpo", **TWICE}, {}, {}),
    "twice, dr_grpo": ({"loss_type": "dr_grpo", **TWICE}, {}, {}),
    "twice, cispo": ({"loss_type": "cispo", "epsilon_high": 1.05, **TWICE}, {}, {}),
}
STEPS, STEP_SIZE = 30, 5.0


def error(use: str, transform: Transform) -> float:
    """The largest relative error of any parameter's gradient in any step."""
    configuration, of_model, options = USES[use]
    with tempfile.TemporaryDirectory() as folder:
        run = Run(Reference(transform)).of(
            make_model(**of_model), make_config(folder, **configuration), transform=transform, **options
        )
    errors = [relative_error(step.gradients, step.expected) for step in run.steps]
    assert all(map(math.isfinite, errors)), "of which `max` might choose another"
    return max(errors)


def share_of_a(completions: list[str], **_: Any) -> list[float]:
    """The reward of the learning curve: how much of five words is "a"."""
    return [text.count("a") / 5 for text in completions]


def learn(seed: int) -> list[float]:
    """Mean rewards of the batches of 16 answers, before every step."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = IsopoGRPOTrainer(
            model=make_model(dtype=torch.float32, as_it_comes=True),
            reward_funcs=share_of_a,
            args=make_config(
                folder, max_steps=STEPS, learning_rate=STEP_SIZE, per_device_train_batch_size=16, seed=seed
            ),
            train_dataset=make_prompts(64),
            processing_class=make_tokenizer(),
            transform=NTK(1.0, scale="natural"),
        )
        trainer.train()
    return [line["reward"] for line in trainer.state.log_history if "reward" in line]


def main() -> None:
    """Write both tables with their provenance."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("errors", type=Path)
    parser.add_argument("rewards", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    errors = pd.DataFrame(
        [{"use": use, **{name: error(use, transform) for name, transform in TRANSFORMS.items()}} for use in tqdm(USES)]
    )
    rewards = pd.DataFrame({"step": range(STEPS)} | {f"seed {seed}": learn(seed) for seed in tqdm(arguments.seeds)})
    libraries = {name: version(name) for name in ("trl", "transformers", "peft")}
    for path, table, settings in [
        (arguments.errors, errors, {"dtype": "float64"}),
        (arguments.rewards, rewards, {"seeds": arguments.seeds, "optimizer": "sgd", "step_size": STEP_SIZE}),
    ]:
        record = provenance(**settings)
        record["libraries"] |= libraries
        write_table(path, table, record)
        print(table.to_string(index=False))


if __name__ == "__main__":
    main()
