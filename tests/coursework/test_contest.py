"""The contest of the third assignment: digits with other names change nothing, and the budget cannot be passed."""

import copy

import pytest
import torch

from isopo_mini.coursework import contest
from isopo_mini.coursework.submission import Submission
from isopo_mini.tasks.token_task import DIGITS, VOCABULARY


def test_a_renamed_policy_says_the_same_about_renamed_answers() -> None:
    task, policy = contest.start()
    names = contest.renaming(torch.Generator().manual_seed(3))
    assert sorted(names.tolist()) == list(range(len(VOCABULARY)))
    assert [int(names[token]) for token in range(len(VOCABULARY)) if token not in DIGITS] == [
        token for token in range(len(VOCABULARY)) if token not in DIGITS
    ]
    batch = task.sample(policy, 16, generator=torch.Generator().manual_seed(0))
    renamed = copy.deepcopy(policy)
    renamed.load_state_dict(contest.renamed_weights(policy.state_dict(), names))
    theirs = copy.copy(batch)
    object.__setattr__(theirs, "observations", names[batch.observations])
    object.__setattr__(theirs, "actions", names[batch.actions])
    torch.testing.assert_close(renamed.log_prob(theirs), policy.log_prob(batch))
    back = contest.renamed_weights(renamed.state_dict(), names.argsort())
    assert all(torch.equal(back[name], value) for name, value in policy.state_dict().items())


class Idle:
    """Learns nothing, and counts what it is shown."""

    def __init__(self, policy) -> None:
        self.policy, self.shown = policy, 0

    def learn(self, batch) -> None:
        self.shown += len(batch)


def test_who_learns_nothing_ends_where_it_began() -> None:
    learners = []
    record = contest.play(lambda policy: learners.append(Idle(policy)) or learners[0], seed=1, batches=2)
    assert learners[0].shown == 2 * contest.RESPONSES == record["curve"]["samples"][-1]
    assert record["final"] == record["curve"]["return"][0] == pytest.approx(contest.START, abs=0.01)


class Knowing(Idle):
    """Would know the answers if digits had their own names: it looks whether any right answer is right arithmetic."""

    def learn(self, batch) -> None:
        right = batch.select(batch.rewards == 1)
        task, _ = contest.start()
        shares = [
            task.grade(o[None, :6], a[None, 5:])[1] for o, a in zip(right.observations, right.actions, strict=True)
        ]
        self.shares = getattr(self, "shares", []) + [float(share) for share in shares]


def test_knowing_arithmetic_does_not_help() -> None:
    learners = []
    contest.play(lambda policy: learners.append(Knowing(policy)) or learners[0], seed=1, batches=2)
    shares = learners[0].shares
    assert len(shares) > 20
    assert sum(shares) / len(shares) < 0.7, "the right answers are not those of arithmetic"


def break_with_nan(policy) -> None:
    policy.head.weight.data[0, 0] = float("nan")


def break_by_size(policy) -> None:
    policy.head.weight = torch.nn.Parameter(torch.zeros(3, 3))


def break_by_more(policy) -> None:
    policy.more = torch.nn.Linear(2, 2)


@pytest.mark.parametrize(
    ("how", "said"),
    [(break_with_nan, "finite numbers in head.weight"), (break_by_size, "of shape"), (break_by_more, "got another")],
)
def test_a_broken_policy_is_refused(how, said: str) -> None:
    class Breaking(Idle):
        def learn(self, batch) -> None:
            how(self.policy)

    with pytest.raises(ValueError, match=said):
        contest.play(Breaking, seed=1, batches=1)


@pytest.mark.parametrize("environment", [{}, Submission([])])
def test_the_contest_is_played_once(environment, monkeypatch: pytest.MonkeyPatch) -> None:
    played = []
    monkeypatch.setattr(contest, "play", lambda _, seed: played.append(seed) or {"final": seed / 1000})
    assert [contest.result(environment, Idle, (101, 102)) for _ in range(3)] == [pytest.approx(0.1015)] * 3
    assert played == [101, 102]
    assert len(environment.get("noted_contest")) == 2
