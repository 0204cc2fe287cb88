"""The chain of chapter 13: its rows against all of its states written out, its optimum, and what rounding would do."""

import re

import numpy as np
import pytest
import torch

from isopo_mini.tasks.slow_chain import FORWARD, GAMBLE, SlowChain


def random_logits(levels: int, seed: int, scale: float = 1.0) -> np.ndarray:
    return scale * np.random.default_rng(seed).normal(size=(2 * levels, 3))


@pytest.mark.parametrize("gamble", [True, False])
@pytest.mark.parametrize(("levels", "copies"), [(3, 1), (5, 3), (4, 6)])
def test_rows_stand_for_all_states(levels: int, copies: int, gamble: bool) -> None:
    """V, visits and the gradient of every single state, by the library's linear systems, are those of the rows."""
    chain = SlowChain(levels, copies, discount=0.9, gamble=gamble)
    rows = chain.evaluate(random_logits(levels, seed=levels))
    mdp, row = chain.written_out()
    assert len(row) == mdp.num_states == chain.num_states
    torch.testing.assert_close(mdp.initial_probs, torch.full_like(mdp.initial_probs, 1 / chain.num_states))
    booster = row < 0
    probs = torch.from_numpy(rows.probs)[row]
    probs[booster] = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)
    np.testing.assert_allclose(mdp.values(probs)[~booster], rows.values[row[~booster]], atol=1e-14)
    visits = mdp.visitation(probs)[~booster] / (1 - chain.discount)
    together = np.bincount(row[~booster], weights=visits)
    np.testing.assert_allclose(together[1:], rows.visits[1:], rtol=1e-12)
    gradient = (rows.visits / chain.multiplicity)[:, None] * rows.probs * rows.advantages
    np.testing.assert_allclose(mdp.logit_gradient(probs)[~booster], gradient[row[~booster]], atol=1e-15)
    assert mdp.logit_gradient(probs)[booster].abs().max() < 1e-15  # nothing to learn there


def test_evaluate_agrees_with_the_lumped_process() -> None:
    """Two ways to the same numbers: one pass up and down the chain, and linear systems."""
    chain = SlowChain(8, 100, discount=0.95)
    rows, mdp = chain.evaluate(random_logits(8, seed=0)), chain.lumped()
    probs = torch.from_numpy(rows.probs)
    np.testing.assert_allclose(mdp.values(probs), rows.values, atol=1e-14)
    np.testing.assert_allclose(mdp.visitation(probs) / 0.05, rows.visits, rtol=1e-10)
    advantages = np.where(chain.exists, mdp.advantages(probs), 0)
    np.testing.assert_allclose(np.where(chain.exists, rows.advantages, 0), advantages, atol=1e-14)


@pytest.mark.parametrize("levels", [4, 6, 10])
def test_forward_is_best_everywhere(levels: int) -> None:
    """V*(s) = γ^(2s), by policy iteration on all states, and no level is near it before it is learned."""
    chain = SlowChain(levels, 2, discount=1 - 0.25 / levels)
    mdp, row = chain.written_out()
    best = mdp.policy_iteration()
    for s in range(1, levels + 1):
        torch.testing.assert_close(
            best.values[row == s], torch.full_like(best.values[row == s], mdp.discount ** (2 * s))
        )
        assert (best.probs[row == s].argmax(dim=1) == FORWARD).all()
    assert mdp.discount ** (2 * levels) - chain.thresholds[levels] > 0.15


def test_small_differences_are_exact() -> None:
    """What the gamble gains over exit is proportional to π_fwd of its gate, down to 1e-30; Q − Q says 0 or rounding."""
    chain, logits = SlowChain(4, 10, discount=0.93), np.zeros((8, 3))
    gained = {}
    for chance in (1e-2, 1e-30):
        logits[4 + 2, FORWARD] = np.log(chance / (1 - chance))  # the gate to level 2
        advantages = chain.evaluate(logits).advantages[4]
        gained[chance] = advantages[GAMBLE] - advantages[0]
        _, over_exit = chain._values(chain.evaluate(logits).probs.tolist())
        gained[chance, "alone"] = over_exit[4, GAMBLE]
    assert gained[1e-2] == pytest.approx(gained[1e-2, "alone"])
    assert gained[1e-30, "alone"] == pytest.approx(1e-28 * gained[1e-2, "alone"], rel=1e-12)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"levels": 2}, "levels: expected a finite number >= 3, got 2"),
        ({"levels": 3, "copies": 0.5}, "copies: expected a finite number >= 1, got 0.5"),
        ({"levels": 3, "discount": 1.0}, "discount: expected a number < 1, got 1.0"),
        ({"levels": 3, "discount": 0.0}, "discount: expected a finite number > 0, got 0.0"),
    ],
)
def test_errors(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        SlowChain(**arguments)


def test_only_whole_numbers_can_be_written_out() -> None:
    with pytest.raises(ValueError, match="copies: expected a whole number"):
        SlowChain(3, 2.5).written_out()


@pytest.mark.usefixtures("unchecked")
def test_logits_have_a_row_for_each_kind_of_state() -> None:
    """A row for all would be repeated in silence."""
    with pytest.raises(ValueError, match=re.escape("logits: expected shape (6, 3), got (1, 3)")):
        SlowChain(3).evaluate(np.zeros((1, 3)))
