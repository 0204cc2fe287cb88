"""A chain on which softmax policy gradients wait for ever longer, with a uniform start over all of its states.

Reconstructed from memory, and simplified, after Li, Wei, Chi, Gu and Chen, *Softmax policy gradient methods can take
exponential time to converge*, arXiv 2102.11270. Chapter 13 of the book explains it. Levels s = 1 … H, gates
s = 1 … H−1 between them, thresholds τ_s = ½γ^(2s/3), rewards r_s = ½γ^(2s/3 + 5/6), p = 0.3 (1 − γ):

| state | exit (0) | forward (1) | gamble (2) |
|---|---|---|---|
| level 1, 2 | end, −γ^(2s) | end, γ^(2s) | |
| level s ≥ 3 | end, r_s + γ²p τ_(s−2) | gate s−1, 0 | gate s−2 with probability p, else end; r_s |
| gate s | end, γτ_s | level s, 0 | |
| booster | the one state that it leads to, 0 | as exit | |

Levels 1 and 2 are M copies each, every other level and every gate is one state. M boosters lead into each level s ≥ 3
and each gate, whatever one does there: they let a start that is uniform over all states, the end included, begin in a
level or gate about as often as in all copies together. Copies start alike and stay alike, and boosters learn nothing,
so that 2H rows describe the whole process: row 0 is the end, row s a level, row H + s a gate.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from isopo_mini import checks
from isopo_mini.tasks.mdp import MDP

EXIT, FORWARD, GAMBLE = 0, 1, 2


class Rows(NamedTuple):
    """What `SlowChain.evaluate` finds, a row for each of the 2H kinds of states."""

    probs: np.ndarray  # π, (2H, 3)
    values: np.ndarray  # V, (2H,)
    visits: np.ndarray  # d/(1−γ), of a row's states together, (2H,)
    advantages: np.ndarray  # A, (2H, 3)


@dataclass(frozen=True, eq=False)
class SlowChain:
    """See the module.

    Args:
        levels: H, at least 3.
        copies: M, at least 1. A whole number for `written_out`; for the other methods as large as one likes.
        discount: γ, above 0 and below 1. The optimum is to go forward if (1 − γ)H is small, say at most ½.
        gamble: whether levels s ≥ 3 have their third action.

    Raises:
        ValueError: an argument is out of range.

    Example:
        >>> chain = SlowChain(levels=5, copies=3, discount=0.9)
        >>> chain.num_states, len(chain.written_out()[0].rewards)
        (35, 35)
    """

    levels: int
    copies: float = 1
    discount: float = 0.93
    gamble: bool = True

    def __post_init__(self) -> None:
        checks.require_at_least("levels", self.levels, 3)
        checks.require_at_least("copies", self.copies, 1)
        checks.require_positive("discount", self.discount)
        if self.discount >= 1:
            raise ValueError(f"discount: expected a number < 1, got {self.discount}")

    @cached_property
    def thresholds(self) -> Float[np.ndarray, "thresholds"]:
        """τ_s at index s; level s is learned when V(s) is at least that."""
        return 0.5 * self.discount ** (2 * np.arange(self.levels + 1) / 3)

    @property
    def num_states(self) -> float:
        """How many states there are: 1 + 2M + (2H − 3)(1 + M)."""
        return 1 + 2 * self.copies + (2 * self.levels - 3) * (1 + self.copies)

    @cached_property
    def multiplicity(self) -> Float[np.ndarray, "rows"]:
        """How many states a row stands for, boosters not counted: M for levels 1 and 2, else 1."""
        many = np.ones(2 * self.levels)
        many[[1, 2]] = self.copies
        return many

    @cached_property
    def exists(self) -> Bool[np.ndarray, "rows 3"]:
        """Which actions there are."""
        there = np.zeros((2 * self.levels, 3), dtype=bool)
        there[:, EXIT] = True
        there[1:, FORWARD] = True
        there[3 : self.levels + 1, GAMBLE] = self.gamble
        return there

    @cached_property
    def start(self) -> Float[np.ndarray, "rows"]:
        """Where the first step begins, in rows; what starts in a booster counts γ in the row that it leads to."""
        start = np.full(2 * self.levels, 1 + self.discount * self.copies)
        start[[1, 2]] = self.copies
        start /= self.num_states
        start[0] = 1 - start[1:].sum()  # the end; where a booster's rest goes does not matter, for nothing comes of it
        return start

    def lumped(self) -> MDP:
        """The 2H rows as a process: V, the visits and J of the whole one, boosters left out. See `exists`."""
        levels, gamma = self.levels, self.discount
        size, p = 2 * levels, 0.3 * (1 - gamma)
        transitions, rewards = np.zeros((size, 3, size)), np.zeros((size, 3))
        transitions[:, :, 0] = 1  # what is not said below ends
        leads, tau = np.eye(size), self.thresholds
        for s in range(1, levels):
            rewards[s, :GAMBLE] = -(gamma ** (2 * s)), gamma ** (2 * s)
            rewards[levels + s, EXIT] = gamma * tau[s]
            transitions[levels + s, FORWARD] = leads[s]
        for s in range(3, levels + 1):
            rewards[s] = self._exit_rewards[s], 0, self._gamble_rewards[s]
            transitions[s, FORWARD] = leads[levels + s - 1]
            transitions[s, GAMBLE] = p * leads[levels + s - 2] + (1 - p) * leads[0]
        tensors = map(torch.from_numpy, (transitions, rewards, self.start))
        return MDP(*tensors, discount=gamma)

    def written_out(self) -> tuple[MDP, Int[Tensor, "S"]]:
        """All states, one by one, and the row of each; −1 for a booster.

        Raises:
            ValueError: M is not a whole number.
        """
        if self.copies != int(self.copies):
            raise ValueError(f"copies: expected a whole number, got {self.copies}")
        copies, small = int(self.copies), self.lumped()
        many = torch.from_numpy(self.multiplicity).long()
        row = torch.arange(2 * self.levels).repeat_interleave(many)
        boosted = torch.arange(3, 2 * self.levels).repeat_interleave(copies)
        inner, size = len(row), len(row) + len(boosted)
        transitions = torch.zeros(size, 3, size, dtype=torch.float64)
        transitions[:inner, :, :inner] = small.transitions[row][:, :, row] / many[row]  # to each copy as often
        first = torch.searchsorted(row, boosted)  # the one state of its row
        transitions[torch.arange(inner, size), :, first] = 1
        rewards = torch.cat([small.rewards[row], torch.zeros(len(boosted), 3, dtype=torch.float64)])
        return MDP(transitions, rewards, discount=self.discount), torch.cat([row, torch.full_like(boosted, -1)])

    def evaluate(self, logits: Float[np.ndarray, "rows 3"]) -> Rows:
        """π, V, d/(1−γ) and A without a difference of two Q that nearly agree.

        The gamble of level s is worth γ²p π_fwd(gate s−2) (V(s−2) − τ_(s−2)) more than exit. As long as a level is not
        learned, π_fwd falls as 1/time; beyond a time of 1e16 the same number, found as Q − Q, is rounding.

        Raises:
            ValueError: `logits` is not `(2H, 3)`.
        """
        if np.shape(logits) != self.exists.shape:
            raise ValueError(f"logits: expected shape {self.exists.shape}, got {np.shape(logits)}")
        scores = np.where(self.exists, logits, -np.inf)
        probs = np.exp(scores - scores.max(axis=1, keepdims=True))
        probs /= probs.sum(axis=1, keepdims=True)
        pi = probs.tolist()
        values, over_exit = self._values(pi)
        differences = over_exit[:, :, None] - over_exit[:, None, :]
        advantages = (differences @ probs[:, :, None])[:, :, 0]  # Σ_b π_b (Q_a − Q_b)
        return Rows(probs, values, self._visits(pi), advantages)

    @cached_property
    def _gamble_rewards(self) -> list[float]:
        """r_s at index s."""
        return (0.5 * self.discount ** (2 * np.arange(self.levels + 1) / 3 + 5 / 6)).tolist()

    @cached_property
    def _exit_rewards(self) -> list[float]:
        """At s ≥ 3: r_s and what the gamble is worth on average when its gate exits."""
        p = 0.3 * (1 - self.discount)
        later = self.discount**2 * p * np.r_[0, 0, self.thresholds[:-2]]
        return (self._gamble_rewards + later).tolist()

    def _values(self, pi: list[list[float]]) -> tuple[np.ndarray, np.ndarray]:
        """V, `(2H,)`, and Q − Q(exit), `(2H, 3)`, from the first level up."""
        levels, gamma = self.levels, self.discount
        tau, p = self.thresholds.tolist(), 0.3 * (1 - self.discount)
        values, over_exit = [0.0] * (2 * levels), [[0.0, 0.0, 0.0] for _ in pi]
        for s in range(1, levels + 1):
            if s < 3:
                exit_value, forward, gamble = -(gamma ** (2 * s)), 2 * gamma ** (2 * s), 0.0
            else:
                exit_value = self._exit_rewards[s]
                forward = gamma * values[levels + s - 1] - exit_value
                gamble = gamma**2 * p * pi[levels + s - 2][FORWARD] * (values[s - 2] - tau[s - 2])
            over_exit[s] = [0.0, forward, gamble]
            values[s] = exit_value + pi[s][FORWARD] * forward + pi[s][GAMBLE] * gamble
            if s < levels:
                gate, more = levels + s, gamma * (values[s] - tau[s])
                over_exit[gate] = [0.0, more, 0.0]
                values[gate] = gamma * tau[s] + pi[gate][FORWARD] * more
        return np.array(values), np.array(over_exit)

    def _visits(self, pi: list[list[float]]) -> np.ndarray:
        """d/(1−γ), `(2H,)`, from the last level down; the end's is what the others leave."""
        levels, gamma, p = self.levels, self.discount, 0.3 * (1 - self.discount)
        visits = self.start.tolist()
        for s in range(levels, 0, -1):
            if s < levels:
                visits[s] += gamma * pi[levels + s][FORWARD] * visits[levels + s]
            if s > 2:
                visits[levels + s - 1] += gamma * pi[s][FORWARD] * visits[s]
                visits[levels + s - 2] += gamma * p * pi[s][GAMBLE] * visits[s]
        visits[0] = 1 / (1 - gamma) - sum(visits[1:])
        return np.array(visits)
