"""The triangle of policies over three arms: one step of four rules, at one price in KL, and where many steps lead."""

import matplotlib.pyplot as plt
import torch
from jaxtyping import Float
from torch import Tensor

from isopo_mini import checks, plotting
from isopo_mini.explorables.page import Explorable
from isopo_mini.geometry import fisher, isopo, natural_gradient
from isopo_mini.objectives import losses
from isopo_mini.policies import TabularSoftmax
from isopo_mini.tasks import Bandit

CLIP = 0.2  # PPO's ε, on both sides
CLIPPED_STEPS = 10  # how often PPO uses one batch
STEP_SIZE, PATH_STEPS = 0.2, 75  # of the paths
# The book's name of each rule, and whose colour and line it has.
STYLES = {
    "Policy gradient": "REINFORCE",
    "Natural gradient": "Natural gradient",
    "ISOPO (Fisher)": "ISOPO (Fisher)",
    "PPO": "PPO",
}


def simplex_steps(
    probs: Float[Tensor, "3"], rewards: Float[Tensor, "3"], price: float
) -> dict[str, Float[Tensor, "3"]]:
    """The policy after one step of each rule, with every expectation exact.

    The policy gradient, the natural gradient and ISOPO (Fisher) are made as long as ½ dᵀFd = `price` allows. PPO takes
    ten steps on its clipped objective, each with a tenth of the step size of the policy gradient above.

    Args:
        probs: π, positive.
        rewards: the mean reward of each arm. Where all are equal, nothing moves.
        price: in nats, positive.

    Returns:
        π' by the name of the rule, each `(3,)`, in double precision.

    Raises:
        ValueError: a shape is wrong, or the price is not positive.
    """
    checks.require_shape("probs", probs, "3")
    checks.require_shape("rewards", rewards, "3")
    checks.require_positive("price", price)
    bandit, policy = _start(probs, rewards)
    fisher_matrix, after = bandit.logit_fisher(policy), {}
    sizes = {}
    for name, direction in _directions(policy, bandit).items():
        squared = (direction @ fisher_matrix @ direction).item()
        sizes[name] = (2 * price / squared) ** 0.5 if squared > 0 else 0.0
        after[name] = _moved(probs, sizes[name] * direction)
    after["PPO"] = _clipped(probs, bandit, sizes["Policy gradient"] / CLIPPED_STEPS)[-1]
    return after


def simplex_paths(probs: Float[Tensor, "3"], rewards: Float[Tensor, "3"]) -> dict[str, Float[Tensor, "steps 3"]]:
    """The policies on the way of 75 steps θ ← θ + 0.2 d of each rule's direction d, with every expectation exact.

    For PPO one step is ten, of the same size, on one batch.

    Args:
        probs: π at the start, positive.
        rewards: the mean reward of each arm.

    Returns:
        By the name of the rule, `(76, 3)`, the start included.
    """
    paths = {name: [probs.double()] for name in STYLES}
    for _ in range(PATH_STEPS):
        for name, path in paths.items():
            bandit, policy = _start(path[-1], rewards)
            if name == "PPO":
                path.append(_clipped(path[-1], bandit, STEP_SIZE)[-1])
            else:
                path.append(_moved(path[-1], STEP_SIZE * _directions(policy, bandit)[name]))
    return {name: torch.stack(path) for name, path in paths.items()}


def simplex(probs: Float[Tensor, "3"], rewards: Float[Tensor, "3"], price: float = 0.03) -> Explorable:
    """Draw policy, ellipse, arrows and paths, and return the same as a picture to move.

    Args:
        probs: π at the start, positive, `(3,)`.
        rewards: the mean reward of each arm at the start, from 0 to 1, `(3,)`.
        price: of one step, in nats.
    """
    _, ax = plt.subplots(figsize=(6.0, 5.4))
    plotting.simplex_axes(ax, tuple(f"r = {reward:g}" for reward in rewards.tolist()))  # type: ignore[arg-type]
    ring = probs + _ellipse(probs, price)
    ax.plot(*plotting.simplex_xy(ring).T, color="#555555", linewidth=1, label=f"½ dᵀFd = {price:g} nats")
    paths, bandit = simplex_paths(probs, rewards), _start(probs, rewards)[0]
    for name, after in simplex_steps(probs, rewards, price).items():
        style = plotting.method_style(STYLES[name]) | {"label": name}
        ax.plot(*plotting.simplex_xy(paths[name]).T, **style | {"linewidth": 1.2})
        # The logarithm of π'/π is the step, up to what moves nothing. Its end in the tangent plane is on the ellipse.
        step = (after / probs).log()
        end = after if name == "PPO" else probs + bandit.logit_fisher(_start(probs, rewards)[1]) @ step
        arrow = {"arrowstyle": "-|>", "color": style["color"], "linewidth": 2.5, "shrinkA": 0, "shrinkB": 0}
        tip, foot = (tuple(plotting.simplex_xy(point).tolist()) for point in (end, probs))
        ax.annotate("", tip, foot, arrowprops=arrow)
    ax.plot(*plotting.simplex_xy(probs), "o", color="#333333", zorder=3)
    ax.legend(loc="upper left", fontsize="small")
    plt.show()
    data = {"probs": probs.tolist(), "rewards": rewards.tolist(), "price": price}
    return Explorable("simplex", "drag the policy, the rewards and the price of a step.", data)


def _start(probs: Tensor, rewards: Tensor) -> tuple[Bandit, TabularSoftmax]:
    """The bandit and the policy, in double precision."""
    return Bandit(rewards.double()), TabularSoftmax.from_probs(probs.double()[None])


def _directions(policy: TabularSoftmax, bandit: Bandit) -> dict[str, Tensor]:
    """What each rule adds to the logits, but for the step size, `(3,)`."""
    gradient, matrix = bandit.policy_gradient(policy), bandit.logit_fisher(policy)
    observations, arms, probs = bandit.every_pull(policy)
    scores = fisher.score_matrix(policy, observations, arms)
    norms = isopo.exact_fisher_norms(scores, matrix)
    coefficients = isopo.normalized_coefficients(norms, bandit.advantages(policy)[0])
    return {
        "Policy gradient": gradient,
        "Natural gradient": natural_gradient.solve_singular(matrix, gradient),
        "ISOPO (Fisher)": (probs * coefficients) @ scores,
    }


def _clipped(probs: Tensor, bandit: Bandit, step_size: float) -> list[Tensor]:
    """The policies on the way of PPO's steps from π_old = `probs`: −Σ_a π_old(a) min(r_a A_a, clip(r_a) A_a)."""
    advantages = bandit.advantages(TabularSoftmax.from_probs(probs.double()[None]))[0]
    old, mask = probs.double().log()[:, None], torch.ones(3, 1, dtype=torch.bool)
    logits, path = probs.double().log(), []
    for _ in range(CLIPPED_STEPS):
        logits.requires_grad_()
        log_probs = logits.log_softmax(0)[:, None]
        # A minimum of two numbers, times π_old > 0, is the minimum of both times π_old. The mean is over three arms.
        weighted = 3 * probs.double() * advantages
        loss, _ = losses.ppo(log_probs, old, weighted, mask, clip_low=CLIP, clip_high=CLIP)
        (gradient,) = torch.autograd.grad(loss, logits)
        logits = (logits - step_size * gradient).detach()
        path.append(logits.softmax(0))
    return path


def _moved(probs: Tensor, step: Tensor) -> Tensor:
    """π ∝ π e^d."""
    return (probs.double().log() + step).softmax(0)


def _ellipse(probs: Tensor, price: float) -> Float[Tensor, "points 3"]:
    """All changes v of the probabilities with ½ Σ_a v_a²/π_a = `price`: a circle at right angles to √π, times √π."""
    frame = torch.linalg.svd(probs.sqrt()[None])[2][1:]
    angle = torch.linspace(0, 2 * torch.pi, 200, dtype=probs.dtype)
    return (2 * price) ** 0.5 * probs.sqrt() * (torch.stack([angle.cos(), angle.sin()], dim=1) @ frame)
