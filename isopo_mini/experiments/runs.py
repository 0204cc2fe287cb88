"""One run: a rule on a task with a step size and a seed, and the record that is left of it."""

import math
import time
from dataclasses import asdict, dataclass
from typing import Any

import pandas as pd
import torch
from torch import nn

from isopo_mini import checks
from isopo_mini.batch import Batch
from isopo_mini.experiments import records
from isopo_mini.experiments.provenance import provenance, source_hash, weights_hash
from isopo_mini.experiments.record_files import file_name
from isopo_mini.experiments.setups import setup_of
from isopo_mini.rules import rule_specs
from isopo_mini.rules.optimizers import OPTIMIZERS, make_optimizer
from isopo_mini.training.loop import Task, train

source_hash()  # of the code as it is now that it is imported: records are made with that
# Columns of `train` that count from the start; the others are means since the evaluation before.
_TOTALS = ("step", "samples", "actions", "backward_passes", "seconds")
# No policy worth running has logits like these: what fails beyond them failed because it diverged.
_LARGEST_LOGIT = 1e4


@dataclass(frozen=True)
class Run:
    """Everything that decides the outcome of one run.

    Args:
        task: a name of `setups.SETUPS`.
        rule: see `rule_specs`.
        learning_rate: the step size: of the optimizer, or for `trpo` the bound on the KL.
        seed: of the policy's first weights, of everything sampled, and of what the rule draws.
        phase: `"choose"` or `"report"`; see the module. It changes nothing in the run.
        optimizer: a name of `optimizers.OPTIMIZERS`.
        device: such as `"cpu"` or `"cuda"`.
        sequences: S in every batch; the task's when None, as the next two.
        steps: batches.
        evaluations: points of the learning curve after the first, at most.

    Raises:
        ValueError: the task, rule, optimizer or phase is unknown, or a number is too small.
    """

    task: str
    rule: str
    learning_rate: float
    seed: int
    phase: str = "choose"
    optimizer: str = "adamw"
    device: str = "cpu"
    sequences: int | None = None
    steps: int | None = None
    evaluations: int | None = None

    def __post_init__(self) -> None:
        setup = setup_of(self.task)
        rule_specs.parse(self.rule)
        checks.require_choice("phase", self.phase, records.PHASES)
        checks.require_choice("optimizer", self.optimizer, OPTIMIZERS)
        checks.require_positive("learning_rate", self.learning_rate)
        for name in ("sequences", "steps", "evaluations"):
            if getattr(self, name) is None:
                object.__setattr__(self, name, getattr(setup, name))
            checks.require_at_least(name, getattr(self, name), 1)

    @property
    def file_name(self) -> str:
        """Of its record: see `record_files.file_name`."""
        return file_name(self.rule, self.optimizer, self.learning_rate, self.seed)


class _Watched:
    """A task that remembers its last batch and all that `evaluate` said: what is left of a run that broke down."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self.last: Batch | None = None
        self.evaluations: list[dict[str, float]] = []

    def sample(self, policy: Any, num_sequences: int, generator: torch.Generator | None = None) -> Batch:
        self.last = self.task.sample(policy, num_sequences, generator=generator)
        return self.last

    def evaluate(self, policy: Any) -> dict[str, float]:
        evaluation = dict(self.task.evaluate(policy))
        if not math.isfinite(evaluation["return"]):
            raise FloatingPointError(f"return: expected a finite number, got {evaluation['return']}")
        self.evaluations.append(evaluation)
        return evaluation


def run(settings: Run) -> dict[str, Any]:
    """Train once, in this process and on one thread, and return the record.

    A run that diverges (numbers that are not finite or do not fit, or an error once the policy's logits are beyond all
    measure) is a record too: its return is the task's lowest from there on.

    Returns:
        A dict that JSON can hold, numbers cut to five digits: `run`, the settings; `start`, of the first weights
        (`provenance.weights_hash`); `status`, "finished" or "diverged", with `stopped`, why; `score`, `final`, `area`,
        `to_target`, see `records.scores`; `target`; `curve`, see `records.curves`; `wall_seconds`, all included;
        `code`, `libraries`, `device`, `date`.
    """
    started = time.perf_counter()
    setup, device = setup_of(settings.task), torch.device(settings.device)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(settings.seed)
            task, policy = setup.make(device)
            start = weights_hash(policy)
            curve, stopped = _learn(settings, _Watched(task), policy)
        machine = provenance(device)
    finally:
        torch.set_num_threads(threads)
    curve = records.rounded(curve)
    return {
        "run": asdict(settings),
        "start": start,
        "status": "diverged" if stopped else "finished",
        "stopped": stopped,
        **records.rounded(records.scores(curve, None if stopped else setup.target)),
        "target": setup.target,
        "wall_seconds": records.rounded(time.perf_counter() - started, 3),
        **{name: machine[name] for name in ("code", "libraries", "device", "date")},
        "curve": curve,
    }


def _learn(settings: Run, task: _Watched, policy: nn.Module) -> tuple[dict[str, list], str | None]:
    """Train the policy in place; its learning curve, and why it stopped early if it did."""
    setup = setup_of(settings.task)
    steps, sequences = settings.steps or setup.steps, settings.sequences or setup.sequences
    every = math.ceil(steps / (settings.evaluations or setup.evaluations))
    rule = rule_specs.make_rule(
        settings.rule,
        setup.all_advantages,
        default=setup.advantages,
        by_step=setup.by_step,
        unit=setup.unit,
        seed=settings.seed,
        step_size=settings.learning_rate,
    )
    optimizer = make_optimizer(settings.optimizer, policy, settings.learning_rate)
    task.evaluate(policy)
    try:
        table = train(
            policy,
            task,
            rule,
            optimizer,
            steps,
            settings.seed,
            sequences_per_step=sequences,
            evaluate_every=every,
            progress=False,
            measure=setup.measure,
        )
    except (FloatingPointError, ValueError, RuntimeError) as error:
        if not isinstance(error, FloatingPointError) and not _has_diverged(policy, task.last):
            raise
        return _broken_curve(task.evaluations, steps, every, sequences, setup.lowest), str(error).split("\n")[0]
    return _curve(table, task.evaluations[0]), None


def _curve(table: pd.DataFrame, first: dict[str, float]) -> dict[str, list]:
    """The table of `train`, one entry an evaluation, after one for the policy at the start."""
    window = table["return"].notna().shift(fill_value=False).cumsum()
    exact = [name for name in table if name in _TOTALS or name in first]
    how = {name: "last" if name in exact else "mean" for name in table}
    points = table.groupby(window).agg(how)
    start = dict.fromkeys(_TOTALS, 0) | first
    return {str(name): [start.get(str(name)), *points[name].tolist()] for name in points}


def _broken_curve(
    evaluations: list[dict[str, float]], steps: int, every: int, sequences: int, lowest: float
) -> dict[str, list]:
    """What a diverged run showed while it lasted, then the lowest return."""
    when = [0, *(step for step in range(1, steps + 1) if step % every == 0 or step == steps)]
    returns = [evaluation["return"] for evaluation in evaluations]
    return {
        "step": when,
        "samples": [step * sequences for step in when],
        "return": returns + [lowest] * (len(when) - len(returns)),
    }


@torch.no_grad()
def _has_diverged(policy: Any, batch: Batch | None) -> bool:
    """Whether an error can be blamed on the policy: its logits on the last batch are huge or no numbers."""
    if batch is None:
        return False
    return not bool((policy.logits(batch.observations).abs() < _LARGEST_LOGIT).all())
