"""The warm start stops at the accuracy it was asked for; the command writes what it says; the shipped weights hold."""

from pathlib import Path

import pytest
import torch

from isopo_mini.policies import load_policy, read_origin
from isopo_mini.tasks import Sorting, make_task
from isopo_mini.tasks.warm_start import main, supervised_warm_start

DATA = Path(__file__).resolve().parent.parent.parent / "isopo_mini" / "data"
TASK = Sorting(2)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def start(until_accuracy: float, seed: int = 0, **options: object) -> tuple[torch.nn.Module, dict[str, float]]:
    """Two digits to sort, which a small policy learns in a second."""
    policy = TASK.make_policy(width=16, layers=1, heads=2, generator=seeded(seed))
    options = {"learning_rate": 1e-2, "batch_size": 64, "generator": seeded(seed), "progress": False} | options
    return policy, supervised_warm_start(policy, TASK, until_accuracy, **options)


@pytest.mark.parametrize("until_accuracy", [0.1, 0.3, 0.6])
def test_stops_at_the_accuracy(until_accuracy: float) -> None:
    """A whole step is worth up to several percent; 1/256 of one is not worth half a percent."""
    policy, result = start(until_accuracy)
    assert until_accuracy <= result["return"] < until_accuracy + 0.005
    assert result["steps"] > 1
    assert TASK.evaluate(policy) == {"return": result["return"], "greedy": result["greedy"]}


def test_more_accuracy_takes_more_steps_along_one_path() -> None:
    steps = [start(accuracy)[1]["steps"] for accuracy in (0.1, 0.3, 0.6)]
    assert steps == sorted(steps)
    assert steps[0] < steps[-1]


def test_the_seed_decides() -> None:
    (first, _), (second, _), (other, _) = start(0.1), start(0.1), start(0.1, seed=1)
    assert torch.equal(first.head.weight, second.head.weight)
    assert not torch.equal(first.head.weight, other.head.weight)


def test_a_policy_that_is_good_enough_stays_as_it_is() -> None:
    policy, result = start(0.3)
    before = policy.head.weight.clone()
    again = supervised_warm_start(policy, TASK, 0.3, progress=False)
    assert again == {"steps": 0.0, "return": result["return"], "greedy": result["greedy"]}
    assert torch.equal(policy.head.weight, before)


def test_a_gradient_that_was_left_is_not_used_and_none_is_left() -> None:
    policies = [TASK.make_policy(width=16, layers=1, heads=2, generator=seeded()) for _ in range(2)]
    for parameter in policies[1].parameters():
        parameter.grad = torch.full_like(parameter, 1e3)
    for policy in policies:
        supervised_warm_start(policy, TASK, 0.1, learning_rate=1e-2, generator=seeded(), progress=False)
        assert all(parameter.grad is None for parameter in policy.parameters())
    assert torch.equal(policies[0].head.weight, policies[1].head.weight)


def test_gives_up_and_says_how_far_it_came() -> None:
    with pytest.raises(RuntimeError, match=r"until_accuracy: expected 0\.9 within max_steps=2, reached 0\.\d\d\d"):
        start(0.9, max_steps=2)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"until_accuracy": 0.0}, "until_accuracy: expected a number above 0 and at most 1, got 0"),
        ({"until_accuracy": 20.0}, "until_accuracy: expected a number above 0 and at most 1, got 20"),
        ({"learning_rate": 0.0}, "learning_rate: expected a finite number > 0, got 0"),
        ({"batch_size": 0}, "batch_size: expected a finite number >= 1, got 0"),
        ({"max_steps": 0}, "max_steps: expected a finite number >= 1, got 0"),
    ],
)
def test_bad_input(changes: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        start(**({"until_accuracy": 0.5} | changes))


def test_the_command_writes_what_it_says(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a.safetensors"
    sizes = "--width 16 --layers 1 --heads 2 --learning-rate 0.01 --batch-size 64"
    main(["sorting:length=2", "--accuracy", "0.1", "--seed", "5", "--out", str(path), *sizes.split()])
    origin = read_origin(path)
    assert capsys.readouterr().out.startswith(f"{path}: sorting:length=2 after {origin['steps']} steps, right 10.")
    assert origin["seed"] == 5
    assert origin["configuration"]["width"] == 16
    reached = make_task(origin["task"]).evaluate(load_policy(path))
    assert reached["return"] == pytest.approx(origin["accuracy"], abs=1e-4)  # written with four digits
    assert reached["greedy"] == pytest.approx(origin["greedy_accuracy"], abs=1e-4)


def test_the_command_given_twice_is_the_command_given_once(tmp_path: Path) -> None:
    arguments = f"sorting:length=2 --accuracy 0.05 --width 16 --layers 1 --heads 2 --out {tmp_path / 'a.safetensors'}"
    states = []
    for _ in range(2):
        main([*arguments.split(), "--learning-rate", "0.01", "--batch-size", "64"])
        states.append({path.name: path.read_bytes() for path in tmp_path.iterdir()})
    assert states[0] == states[1]


def test_the_command_lists_the_tasks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["division", "--out", str(tmp_path / "a")])
    assert "expected one of addition, modular, sorting, brackets, got 'division'" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("path", sorted(DATA.glob("*.safetensors")), ids=lambda path: path.name)
def test_shipped_weights_have_the_accuracy_they_state(path: Path) -> None:
    origin, policy = read_origin(path), load_policy(path)
    result = make_task(origin["task"]).evaluate(policy)
    # Another processor adds in another order: that moves probabilities by millionths, and an argmax hardly ever.
    assert result["return"] == pytest.approx(origin["accuracy"], abs=2e-4)
    assert result["greedy"] == pytest.approx(origin["greedy_accuracy"], abs=5e-3)
    assert 0.19 < result["return"] < 0.21
    assert {"seed", "steps", "learning_rate", "batch_size", "torch"} <= origin.keys()


def test_there_are_weights_to_ship() -> None:
    assert (DATA / "addition.safetensors").is_file()
