"""A policy that has learned a task only so far: where reinforcement learning begins.

    python -m isopo_mini.tasks.warm_start addition --accuracy 0.2 --out weights/addition.safetensors

From scratch a policy is almost never right, so it is almost never rewarded. It is first shown answers, and stopped by
*accuracy*, not after so many steps: two-digit addition is right 5 % of the time after some 300 steps and 80 % after
150 more, and which steps those are depends on the seed and on the library's version.
"""

import argparse

import torch
from torch import Tensor
from tqdm.auto import tqdm

from isopo_mini import checks
from isopo_mini.policies.checkpoints import save_policy
from isopo_mini.policies.transformer import CausalTransformer
from isopo_mini.tasks.token_task import TokenTask
from isopo_mini.tasks.tokens import TASKS, make_task


def supervised_warm_start(
    policy: CausalTransformer,
    task: TokenTask,
    until_accuracy: float,
    *,
    learning_rate: float = 1e-3,
    batch_size: int = 256,
    max_steps: int = 5000,
    generator: torch.Generator | None = None,
    progress: bool = True,
) -> dict[str, float]:
    """Train the policy in place on right answers until `task.evaluate` says that it has the accuracy.

    Minimises −mean over tokens of log π(answer token | prompt, answer so far) with AdamW, on fresh prompts. The last
    step is shortened until it only just reaches the accuracy: near 20 % a whole step is worth several percent.

    Args:
        policy: its parameters are changed.
        task: gives prompts, answers and the evaluation.
        until_accuracy: sampled accuracy at temperature 1 at which to stop, above 0 and at most 1.
        learning_rate: of AdamW.
        batch_size: prompts a step.
        max_steps: give up after so many.
        generator: source of the prompts, on the policy's device; torch's global one when None.
        progress: show a bar, once it has lasted two seconds and unless the environment says TQDM_DISABLE=1.

    Returns:
        `steps` taken, and what `task.evaluate` says at the end: `return`, `greedy`.

    Raises:
        ValueError: an argument is out of range.
        RuntimeError: the accuracy was not reached in `max_steps`; says how far it came.
    """
    if not 0 < until_accuracy <= 1:
        raise ValueError(f"until_accuracy: expected a number above 0 and at most 1, got {until_accuracy}")
    checks.require_positive("learning_rate", learning_rate)
    checks.require_at_least("batch_size", batch_size, 1)
    checks.require_at_least("max_steps", max_steps, 1)
    result = task.evaluate(policy)
    if result["return"] >= until_accuracy:
        return {"steps": 0.0, **result}
    device, dtype = policy.head.weight.device, policy.head.weight.dtype
    optimizer = torch.optim.AdamW(policy.parameters(), lr=learning_rate)
    optimizer.zero_grad()  # of what a caller left
    numbers = range(1, max_steps + 1)
    # Without `disable=`, which would win over the variable TQDM_DISABLE of whoever runs this.
    for step in tqdm(numbers, desc="warm start", delay=2) if progress else numbers:
        batch = task.supervised(task.prompts(batch_size, generator=generator, device=device), dtype=dtype)
        log_probs = policy.log_prob(batch)
        (-log_probs.sum() / batch.mask.sum()).backward()
        before = [parameter.detach().clone() for parameter in policy.parameters()]
        optimizer.step()
        optimizer.zero_grad()  # so that nothing is left for a caller to take for its own
        # The batch says for nothing how often the policy is right about it; only near the goal is it evaluated.
        near = log_probs.detach().sum(dim=1).exp().mean().item() >= until_accuracy / 2
        if near and task.evaluate(policy)["return"] >= until_accuracy:
            return {"steps": float(step), **_shorten_step(policy, task, before, until_accuracy)}
    reached = task.evaluate(policy)["return"]
    raise RuntimeError(f"until_accuracy: expected {until_accuracy} within max_steps={max_steps}, reached {reached:.3f}")


@torch.no_grad()
def _shorten_step(
    policy: CausalTransformer, task: TokenTask, before: list[Tensor], until_accuracy: float
) -> dict[str, float]:
    """Move the policy back towards its parameters `before`, by bisection; return what `task.evaluate` says there."""
    after = [parameter.clone() for parameter in policy.parameters()]

    def at(share: float) -> dict[str, float]:
        for parameter, start, end in zip(policy.parameters(), before, after, strict=True):
            parameter.copy_(torch.lerp(start, end, share))
        return task.evaluate(policy)

    low, high = 0.0, 1.0
    for _ in range(8):
        middle = (low + high) / 2
        low, high = (low, middle) if at(middle)["return"] >= until_accuracy else (middle, high)
    return at(high)


def main(arguments: list[str] | None = None) -> None:
    """The command: see the module."""
    parser = argparse.ArgumentParser(
        prog="python -m isopo_mini.tasks.warm_start",
        description="Show a transformer right answers until it has an accuracy, and save it as .safetensors.",
    )
    parser.add_argument("task", help=f"one of {', '.join(TASKS)}, with options as in addition:digits=3")
    parser.add_argument("--accuracy", type=float, default=0.2, help="where to stop: accuracy at temperature 1")
    parser.add_argument("--out", required=True, help="the file to write")
    parser.add_argument("--seed", type=int, default=0, help="of weights and prompts")
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--max-steps", type=int, default=5000)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args(arguments)
    try:
        task = make_task(options.task)
    except (TypeError, ValueError) as error:
        parser.error(str(error))
    # The same first weights on every device, and prompts from that device's own generator.
    policy = task.make_policy(
        options.width, options.layers, options.heads, generator=torch.Generator().manual_seed(options.seed)
    ).to(options.device)
    reached = supervised_warm_start(
        policy,
        task,
        options.accuracy,
        learning_rate=options.learning_rate,
        batch_size=options.batch_size,
        max_steps=options.max_steps,
        generator=torch.Generator(options.device).manual_seed(options.seed),
    )
    save_policy(
        policy,
        options.out,
        task=options.task,
        accuracy=round(reached["return"], 4),
        greedy_accuracy=round(reached["greedy"], 4),
        steps=int(reached["steps"]),
        seed=options.seed,
        learning_rate=options.learning_rate,
        batch_size=options.batch_size,
        torch=torch.__version__,
    )
    print(
        f"{options.out}: {options.task} after {reached['steps']:.0f} steps, right {reached['return']:.1%} of the time "
        f"at temperature 1, {reached['greedy']:.1%} greedily"
    )


if __name__ == "__main__":
    main()
