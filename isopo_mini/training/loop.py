"""`train`: sample, step, measure, again; what comes back is a table."""

import math
import time
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import pandas as pd
import torch
from torch import Tensor, nn
from torch.distributions import Distribution
from tqdm.auto import tqdm

from isopo_mini import checks
from isopo_mini.batch import Batch
from isopo_mini.rules.protocol import UpdateRule as UpdateRule
from isopo_mini.rules.repeatable import repeatable
from isopo_mini.training import diagnostics

COLUMNS = ("step", "samples", "actions", "backward_passes", "seconds", "reward", "entropy", "kl")


@runtime_checkable
class Task(Protocol):
    """Where batches come from."""

    def sample(self, policy: Any, num_sequences: int, generator: torch.Generator | None = None) -> Batch:
        """Let the policy act: `num_sequences` sequences with their rewards, drawn with `generator` only."""

    def evaluate(self, policy: Any) -> dict[str, float]:
        """How good the policy is, exact where possible. "return" is the number to maximise."""


def train(
    policy: nn.Module,
    task: Task,
    rule: UpdateRule,
    optimizer: torch.optim.Optimizer,
    steps: int,
    seed: int,
    *,
    sequences_per_step: int = 64,
    evaluate_every: int = 1,
    progress: bool = True,
    measure: bool = True,
) -> pd.DataFrame:
    """Train the policy in place: `steps` times sample a batch, let the rule use it once, and measure.

    Args:
        policy: has `logits(observations)`, or `distribution(observations)` as a `GaussianPolicy` has; its parameters
            are changed. Two evaluations must agree, here and in every rule, so dropout must be off; call
            `policy.eval()` first.
        task: see `Task`.
        rule: see `UpdateRule`.
        optimizer: of the policy's parameters.
        steps: number of iterations.
        seed: of everything that is sampled. The same seed, policy and rule give the same table on one machine,
            the column "seconds" apart.
        sequences_per_step: sequences S in every batch.
        evaluate_every: evaluate after every so many iterations, and after the last; NaN in between.
        progress: show a bar, once the run has lasted two seconds and unless the environment says TQDM_DISABLE=1.
        measure: entropy and KL, which take two more forward passes of everything; NaN without.

    Returns:
        One row an iteration:

        - `step`: 1 to `steps`; `samples`, `actions`: sequences and real actions sampled so far;
        - `backward_passes`: the rule's, summed so far (NaN when it reports none); `seconds`: spent so far in
          sampling and updating, without what is measured here;
        - `reward`: of the batch, mean over its sequences (of the sum over time, where rewards are one a step);
        - `entropy`: of the policy that sampled the batch; `kl`: KL(before ‖ after) of this iteration, exact over
          actions, both averaged over the batch's real positions;
        - the rule's metrics under their names, then what `task.evaluate` says of the policy after the iteration.

    Raises:
        TypeError: the task or rule lacks a method, or one returns something else than it should.
        ValueError: a count is below 1, the optimizer holds no trainable parameter of the policy, two columns have one
            name, or the policy's logits are random, as under dropout in training mode; names the module.
        FloatingPointError: a parameter is not finite after a step; says which and when.
    """
    for name, count in {
        "steps": steps,
        "sequences_per_step": sequences_per_step,
        "evaluate_every": evaluate_every,
    }.items():
        checks.require_at_least(name, count, 1)
    _require_methods("task", task, "sample", "evaluate")
    _require_methods("rule", rule, "step")
    device = _require_optimized(policy, optimizer)
    generator = torch.Generator(device).manual_seed(seed)
    rows: list[dict[str, float]] = []
    samples, actions, backward_passes, seconds = 0, 0, 0.0, 0.0
    numbers = range(1, steps + 1)
    # Without `disable=`, which would win over the variable TQDM_DISABLE of whoever runs this.
    for step in tqdm(numbers, desc=type(rule).__name__, delay=2) if progress else numbers:
        started = _now(device)
        batch = task.sample(policy, sequences_per_step, generator=generator)
        seconds += _now(device) - started
        if not isinstance(batch, Batch):
            raise TypeError(f"task.sample: expected it to return a Batch, got {type(batch).__name__}")
        before = _distribution(policy, batch) if measure else None
        started = _now(device)
        metrics = _numbers("rule.step", rule.step(policy, batch, optimizer))
        seconds += _now(device) - started
        _require_finite_parameters(policy, step)
        samples += len(batch)
        actions += int(batch.mask.sum())
        backward_passes += metrics.pop("backward_passes", math.nan)
        row: dict[str, float] = {
            "step": step,
            "samples": samples,
            "actions": actions,
            "backward_passes": backward_passes,
            "seconds": seconds,
            "reward": batch.total_rewards().mean().item(),
            **_moved(policy, batch, before),
        }
        _add(row, "rule.step", metrics)
        if step % evaluate_every == 0 or step == steps:
            _add(row, "task.evaluate", _numbers("task.evaluate", task.evaluate(policy)))
        rows.append(row)
    return pd.DataFrame(rows)


@torch.no_grad()
def _distribution(policy: Any, batch: Batch) -> Tensor | Distribution:
    """What the policy does at the batch's observations, without gradient: its distribution, or else its logits."""
    if hasattr(policy, "distribution"):
        repeatable(policy, lambda: policy.log_prob(batch))
        return policy.distribution(batch.observations)
    return repeatable(policy, lambda: policy.logits(batch.observations))


def _moved(policy: Any, batch: Batch, before: Tensor | Distribution | None) -> dict[str, float]:
    """Entropy before a step and KL(before ‖ after), over the batch's real positions; NaN if nothing was measured."""
    if before is None:
        return {"entropy": math.nan, "kl": math.nan}
    after = _distribution(policy, batch)
    if isinstance(before, Distribution):
        kl = torch.distributions.kl_divergence(before, after)  # type: ignore[arg-type]
        return {"entropy": before.entropy()[batch.mask].mean().item(), "kl": kl[batch.mask].mean().item()}
    return {
        "entropy": diagnostics.entropy(before, batch.mask).item(),
        "kl": diagnostics.kl_divergence(before, after, batch.mask).item(),  # type: ignore[arg-type]
    }


def _now(device: torch.device) -> float:
    """Seconds on a clock, once the device has finished what it was given."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()


def _require_optimized(policy: nn.Module, optimizer: torch.optim.Optimizer) -> torch.device:
    """Check that the optimizer changes this policy, and not a copy of it; return the policy's device."""
    trainable = [value for value in policy.parameters() if value.requires_grad]
    if not trainable:
        raise ValueError("policy: expected at least one trainable parameter, got none")
    optimized = {id(value) for group in optimizer.param_groups for value in group["params"]}
    if not any(id(value) in optimized for value in trainable):
        raise ValueError("optimizer: expected parameters of the policy, got none of them")
    return trainable[0].device


def _require_methods(name: str, value: object, *methods: str) -> None:
    """Check that an object can do what the loop asks of it."""
    for method in methods:
        if not callable(getattr(value, method, None)):
            raise TypeError(
                f"{name}: expected an object with {' and '.join(methods)}, got {type(value).__name__} without {method}"
            )


def _numbers(source: str, values: object) -> dict[str, float]:
    """Check that metrics are a dict of numbers; return them as floats."""
    if not isinstance(values, Mapping):
        raise TypeError(f"{source}: expected it to return a dict of numbers, got {type(values).__name__}")
    try:
        return {name: float(value) for name, value in values.items()}
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{source}: expected it to return a dict of numbers, got {values!r}") from error


def _add(row: dict[str, float], source: str, values: dict[str, float]) -> None:
    """Put metrics into the row. A name that is there already would hide a number, so it is an error."""
    taken = sorted(row.keys() & values.keys())
    if taken:
        raise ValueError(f"{source}: expected names that no other column has, got {', '.join(taken)}")
    row.update(values)


def _require_finite_parameters(policy: nn.Module, step: int) -> None:
    """Stop at the step that broke the policy and not where the damage shows."""
    named = list(policy.named_parameters())
    # One answer for all parameters: a GPU is waited for once a step.
    finite = torch.stack([torch.isfinite(value.detach()).all() for _, value in named])
    if not finite.all():
        name = named[int((~finite).nonzero()[0])][0]
        raise FloatingPointError(
            f"{name}: expected finite numbers, got inf or nan after step {step}; try a smaller step size"
        )
