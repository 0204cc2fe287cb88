"""The contest of the third assignment: who learns most from a fixed number of answers?

A learner gets a policy that adds two-digit numbers and is right 20 % of the time. It is shown `BATCHES` batches of
`RESPONSES` answers with their rewards, those of its own policy, and after each of them it may change the policy. What
counts is how often the policy is right in the end, on other questions.

The batches are drawn where the contest is played. A learner never holds more than one of them and cannot draw another,
so that the budget is kept. The digits moreover have other names than in the library, in the policy, its prompts and its
answers alike: what a learner knows of arithmetic does not help it, what it learns from rewards does.
"""

import copy
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import pandas as pd
import torch
from torch import Tensor

from isopo_mini.batch import Batch
from isopo_mini.experiments import records
from isopo_mini.experiments.provenance import provenance, weights_hash
from isopo_mini.experiments.record_files import file_name, pack
from isopo_mini.experiments.runs import Run
from isopo_mini.experiments.setups import setup_of
from isopo_mini.policies import CausalTransformer
from isopo_mini.rules import rule_specs
from isopo_mini.tasks import TokenTask
from isopo_mini.tasks.token_task import DIGITS, VOCABULARY

BATCHES, RESPONSES, EVERY = 30, 128, 5
# What the start policy and GRPO reach. `python -m isopo_mini.coursework.contest` measures GRPO: in the mean over four
# seeds 0.291 with a step size of 5e-5, 0.287 with 1e-4 and 0.253 with 2e-4.
START = 0.20
GRPO = 0.29
GRPO_LEARNING_RATE = 1e-4
# Weights with one row a token.
BY_TOKEN = ("token_embedding.weight", "head.weight")


@runtime_checkable
class Learner(Protocol):
    """Who takes part: made of a policy, with `policy` as an attribute."""

    policy: CausalTransformer

    def learn(self, batch: Batch) -> None:
        """Change the policy in place, from answers that it gave and their rewards."""


@runtime_checkable
class Environment(Protocol):
    """The names of a notebook, or of a submission that runs elsewhere."""

    def get(self, name: str, default: Any = None, /) -> Any:
        """The value of a name."""

    def __setitem__(self, name: str, value: Any, /) -> None:
        """Note a value under a name."""


MakeLearner = Callable[[CausalTransformer], Learner]


class GrpoLearner:
    """GRPO, with the step size that is best for it here: the one to beat."""

    def __init__(self, policy: CausalTransformer, learning_rate: float = GRPO_LEARNING_RATE) -> None:
        setup = setup_of("addition")
        self.policy = policy
        self.rule = rule_specs.make_rule("grpo", setup.all_advantages, default=setup.advantages)
        self.optimizer = torch.optim.AdamW(policy.parameters(), lr=learning_rate)

    def learn(self, batch: Batch) -> None:
        """Four clipped steps."""
        self.rule.step(self.policy, batch, self.optimizer)


def start() -> tuple[TokenTask, CausalTransformer]:
    """The task, and the policy that every learner starts from."""
    task, policy = setup_of("addition").make(torch.device("cpu"))
    assert isinstance(task, TokenTask)
    assert isinstance(policy, CausalTransformer)
    return task, policy


def play(make_learner: MakeLearner, seed: int, batches: int = BATCHES) -> dict[str, Any]:
    """Let a learner learn; the record of it, in the form of `experiments.records`.

    Args:
        make_learner: takes a policy and returns a `Learner`.
        seed: of the batches, and of the digits' names.
        batches: how many, if not all.

    Returns:
        The record. `final` is what counts: the probability of a right answer, in the mean over 1,024 questions.

    Raises:
        ValueError: the learner's policy is no longer one: a weight is missing, has another shape, or is not finite.
    """
    began = time.perf_counter()
    generator = torch.Generator().manual_seed(seed)
    task, policy = start()
    names = renaming(generator)
    theirs = copy.deepcopy(policy)
    theirs.load_state_dict(renamed_weights(policy.state_dict(), names))
    learner = make_learner(theirs)
    curve: dict[str, list] = {"step": [0], "samples": [0], "return": [task.evaluate(policy)["return"]]}
    for step in range(1, batches + 1):
        batch = task.sample(policy, RESPONSES, generator=generator)
        learner.learn(replace(batch, observations=names[batch.observations], actions=names[batch.actions]))
        weights = checked(learner.policy.state_dict(), policy)
        policy.load_state_dict(renamed_weights(weights, names.argsort()))
        if step % EVERY == 0 or step == batches:
            curve["step"].append(step)
            curve["samples"].append(step * RESPONSES)
            curve["return"].append(task.evaluate(policy)["return"])
    return _record(curve, seed, time.perf_counter() - began)


def renaming(generator: torch.Generator) -> Tensor:
    """Another name for every digit, `(V,)`; the other tokens keep theirs."""
    names = torch.arange(len(VOCABULARY))
    digits = torch.tensor(DIGITS)
    names[digits] = digits[torch.randperm(len(DIGITS), generator=generator)]
    return names


def renamed_weights(weights: dict[str, Tensor], names: Tensor) -> dict[str, Tensor]:
    """The same policy when token t is called `names[t]`."""
    return {name: value[names.argsort()] if name in BY_TOKEN else value for name, value in weights.items()}


def checked(weights: Any, policy: CausalTransformer) -> dict[str, Tensor]:
    """Weights that came back from a learner, if they are some of this policy's form.

    Raises:
        ValueError: they are not.
    """
    expected = policy.state_dict()
    if not isinstance(weights, dict) or weights.keys() != expected.keys():
        raise ValueError("learner.policy: expected the policy that the learner was made of, got another")
    for name, value in weights.items():
        if not isinstance(value, Tensor) or value.shape != expected[name].shape:
            raise ValueError(f"learner.policy: expected {name} of shape {tuple(expected[name].shape)}, got another")
        if not torch.isfinite(value).all():
            raise ValueError(f"learner.policy: expected finite numbers in {name}, got inf or nan")
    return weights


def result(environment: Environment, make_learner: MakeLearner, seeds: Sequence[int]) -> float:
    """What a learner reaches, the mean over some seeds. It is played once, and its record noted for the leaderboard.

    Args:
        environment: of the test, as otter gives it to an argument called `env`.
        make_learner: the student's.
        seeds: of the contests. They stand in the hidden tests: whoever knew them could choose a step size for them.
    """
    played = environment.get("noted_contest")
    if played is None:
        played = environment["noted_contest"] = [play(make_learner, seed) for seed in seeds]
    return statistics.mean(record["final"] for record in played)


def add_to_leaderboard(folder: Path, name: str, played: list[dict[str, Any]]) -> None:
    """Add records under a name to a folder of records, which `experiments.records.load_records` reads."""
    (folder / records.FOLDER).mkdir(parents=True, exist_ok=True)
    for record in played:
        run = record["run"] | {"rule": name}
        path = folder / records.FOLDER / file_name(name, run["optimizer"], run["learning_rate"], run["seed"])
        records.write_record(path, record | {"run": run})
    pack(folder)


def leaderboard(folder: str | Path) -> pd.DataFrame:
    """The places: one row a learner, by the mean of what it reached, with the worst and best seed."""
    table = records.load_records(folder).groupby("rule")["final"].agg(["mean", "min", "max", "count"])
    return table.sort_values("mean", ascending=False).rename_axis("name").reset_index()


def _record(curve: dict[str, list], seed: int, seconds: float) -> dict[str, Any]:
    """What `experiments.records` keeps of a run. Rule and step size are the learner's own affair."""
    settings = Run("addition", "reinforce", 1.0, seed, phase="report", sequences=RESPONSES, steps=curve["step"][-1])
    made = provenance("cpu")
    rounded = records.rounded(curve)
    return {
        "run": asdict(settings) | {"rule": "learner", "optimizer": "own"},
        "start": weights_hash(start()[1]),
        "status": "finished",
        "stopped": None,
        **records.rounded(records.scores(rounded)),
        "target": None,
        "wall_seconds": records.rounded(seconds, 3),
        **{name: made[name] for name in ("code", "libraries", "device", "date")},
        "curve": rounded,
    }


def main() -> None:
    """What GRPO reaches with several step sizes."""
    for learning_rate in (5e-5, 1e-4, 2e-4):
        finals = [play(lambda policy: GrpoLearner(policy, learning_rate), seed)["final"] for seed in range(1, 5)]  # noqa: B023
        print(f"grpo {learning_rate:g}: {statistics.mean(finals):.3f}, from {min(finals):.3f} to {max(finals):.3f}")


if __name__ == "__main__":
    main()
