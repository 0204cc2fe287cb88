"""What an experiment is about, by name: a task, a policy for it, and how long to train on how much.

One setup fixes all that the rules have in common, so that they differ in nothing but themselves.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

import isopo_mini
from isopo_mini.batch import Batch
from isopo_mini.objectives.advantages import leave_one_out
from isopo_mini.objectives.values import episode_advantages
from isopo_mini.policies import MLP, CausalTransformer, GaussianPolicy
from isopo_mini.policies.checkpoints import load_policy, read_origin
from isopo_mini.policies.pretrained import PretrainedPolicy, load_smollm2
from isopo_mini.rules.rule_parts import (
    Advantages,
    batch_advantages,
    centred_advantages,
    standardised_advantages,
)
from isopo_mini.tasks import Acrobot, CartPole, ContextualBandit, Pendulum, TokenTask, make_task
from isopo_mini.tasks.bandit_instances import FEATURES, MEAN_REWARDS
from isopo_mini.tasks.reasoning import ReasoningTask
from isopo_mini.training.loop import Task


def leave_one_out_advantages(batch: Batch) -> Tensor:
    """A_s = R_s − mean of the others of its group, or of the batch where there are no groups."""
    if batch.groups is None:
        return batch_advantages(batch)
    return leave_one_out(batch.total_rewards(), batch.groups)


# What `advantages=` of a rule may name on every task.
ADVANTAGES: dict[str, Advantages] = {
    "batch": batch_advantages,
    "centred": centred_advantages,
    "leave_one_out": leave_one_out_advantages,
    "std": standardised_advantages,
}


@dataclass(frozen=True)
class Setup:
    """A task with all that every rule shares on it.

    Args:
        description: one line for the list of tasks.
        make: the task and a fresh policy on a device. The policy draws from torch's global generator, which the
            caller seeds; the task is the same every time.
        sequences: S in every batch.
        steps: batches in a run.
        target: the return at which the task counts as solved.
        advantages: name of the advantages that a rule takes which defines none itself.
        by_step: the same for rules whose unit is the time step.
        unit: of the rules that have one and are not told otherwise.
        more_advantages: those that only this task has, by name.
        evaluations: points of a learning curve, at most, beside the one before the first step.
        lowest: what the return cannot be below: the score of a run that broke down.
        measure: whether `train` measures entropy and KL, which costs two forward passes a batch.
    """

    description: str
    make: Callable[[torch.device], tuple[Task, nn.Module]]
    sequences: int
    steps: int
    target: float
    advantages: str = "std"
    by_step: str | None = None
    unit: str = "sequence"
    more_advantages: Mapping[str, Advantages] = field(default_factory=dict)
    evaluations: int = 20
    lowest: float = 0.0
    measure: bool = True

    @property
    def all_advantages(self) -> dict[str, Advantages]:
        """`ADVANTAGES` and those of this task alone."""
        return ADVANTAGES | dict(self.more_advantages)


def bandit(device: torch.device) -> tuple[ContextualBandit, MLP]:
    """16 contexts seen through 8 features, 5 arms that pay 1 with a probability; a network with 32 hidden units."""
    means = torch.tensor(MEAN_REWARDS, dtype=torch.float32)
    features = torch.tensor(FEATURES, dtype=torch.float32)
    task = ContextualBandit(means.to(device), noise="bernoulli", features=features.to(device))
    return task, MLP(8, 5, hidden=(32,)).to(device)


def cartpole(device: torch.device) -> tuple[CartPole, MLP]:
    """CartPole-v1 with a network of 64 hidden units; `evaluate` plays 128 episodes."""
    return CartPole(evaluation_episodes=128), MLP(4, 2, hidden=(64,)).to(device)


def acrobot(device: torch.device) -> tuple[Acrobot, MLP]:
    """Acrobot-v1 with a network of 64 hidden units; rewards a tenth, `evaluate` plays 128 plain episodes."""
    return Acrobot(reward_scale=0.1), MLP(6, 3, hidden=(64,)).to(device)


def pendulum(device: torch.device) -> tuple[Pendulum, GaussianPolicy]:
    """Pendulum-v1 with a Gaussian policy of 64 hidden units; rewards a tenth, `evaluate` plays 64 plain episodes."""
    return Pendulum(reward_scale=0.1), GaussianPolicy(3, 1, hidden=(64,)).to(device)


def tokens(device: torch.device, *, task: str, weights: str) -> tuple[TokenTask, CausalTransformer]:
    """A task of `tasks.tokens` with a policy that starts from saved weights, the same for every seed."""
    return make_task(task), load_policy(start_weights(weights, task), device=device)


def language(device: torch.device) -> tuple[ReasoningTask, PretrainedPolicy]:
    """Sums of two one-digit numbers, after one that is solved, for SmolLM2-135M: all its weights are trained."""
    policy, tokenizer = load_smollm2(device=device)
    return ReasoningTask(tokenizer, "chain_sum", min_terms=2, max_terms=2, min_digits=1, max_digits=1), policy


# Where weights may be: in the package, however it was installed, and under the folder that the command is given in.
SHIPPED, MADE = Path(isopo_mini.__file__).parent / "data", Path("weights")
# Options of the command that makes the weights, where they are not its defaults.
WARM_START_OPTIONS = {"addition_large.safetensors": "--width 256 --layers 4 --heads 8 --device cuda "}


def start_weights(name: str, task: str) -> Path:
    """The file of weights that an experiment starts from: the one that is part of the package, or one made here.

    Args:
        name: of the file.
        task: what its policy must have learned, with options as in `"addition:digits=3"`.

    Returns:
        Its path.

    Raises:
        ValueError: it is in neither place; says with which command it is made, and where. Or it is of another task.
    """
    for folder in (SHIPPED, MADE):
        path = folder / name
        if path.exists():
            if (found := read_origin(path).get("task")) != task:
                raise ValueError(f"weights: expected those of {task} in {path}, got those of {found}")
            return path
    raise ValueError(
        f"weights: expected {name} in the package, or in {MADE}/ of the working directory, got neither; make it with "
        f"python -m isopo_mini.tasks.warm_start {task} {WARM_START_OPTIONS.get(name, '')}--out {MADE / name}"
    )


def token_setup(
    description: str,
    task: str,
    *,
    weights: str | None = None,
    sequences: int = 256,
    steps: int = 60,
    target: float = 0.5,
) -> Setup:
    """A token task from saved weights, those of the task's name if no other, with groups of eight answers a prompt."""
    make = partial(tokens, task=task, weights=f"{weights or task}.safetensors")
    return Setup(f"{description}, {sequences // 8} prompts x 8 answers", make, sequences, steps, target)


SETUPS: dict[str, Setup] = {
    "bandit": Setup(
        "contextual bandit: 16 contexts, 5 arms, small network",
        bandit,
        sequences=64,
        steps=100,
        target=0.8,
        advantages="batch",
    ),
    "cartpole": Setup(
        "CartPole-v1: 16 episodes a batch, network of 64; unit and advantages by time step",
        cartpole,
        sequences=16,
        steps=60,
        target=475.0,
        by_step="gae",
        unit="step",
        more_advantages={"gae": episode_advantages(discount=0.99, trace_decay=0.95)},
        evaluations=30,
    ),
    "acrobot": Setup(
        "Acrobot-v1: 16 episodes a batch, network of 64; unit and advantages by time step",
        acrobot,
        sequences=16,
        steps=30,
        target=-100.0,
        by_step="gae",
        unit="step",
        more_advantages={"gae": episode_advantages(discount=0.99, trace_decay=0.95)},
        evaluations=15,
        lowest=-500.0,
    ),
    "pendulum": Setup(
        "Pendulum-v1: 8 episodes a batch, a Gaussian policy; unit and advantages by time step",
        pendulum,
        sequences=8,
        steps=60,
        target=-300.0,
        by_step="gae",
        unit="step",
        more_advantages={"gae": episode_advantages(discount=0.95, trace_decay=0.9)},
        evaluations=20,
        lowest=-2000.0,
    ),
    "addition": token_setup("two-digit addition from 20 % accuracy: transformer of width 64", "addition", steps=120),
    "sorting": token_setup(
        "sorting five digits from 20 % accuracy, right 96 % of the time greedily: what is missing is to be sure",
        "sorting",
        target=0.8,
    ),
    "modular": token_setup("addition modulo 97 from 20 % accuracy: transformer of width 64", "modular"),
    "addition-large": token_setup(
        "three-digit addition from 20 % accuracy, for a GPU: width 256, 4 layers",
        "addition:digits=3",
        weights="addition_large",
        sequences=512,
        steps=200,
    ),
    "language": Setup(
        "SmolLM2-135M on sums of reasoning-gym, 4 prompts x 8 answers; needs the extra `language`",
        language,
        sequences=32,
        steps=12,
        target=0.8,
        evaluations=3,
        measure=False,
    ),
}


def setup_of(task: str) -> Setup:
    """The setup with this name.

    Raises:
        ValueError: there is none; says which there are.
    """
    if task not in SETUPS:
        raise ValueError(f"task: expected one of {', '.join(SETUPS)}, got {task!r}")
    return SETUPS[task]
