"""Tasks by name: what each fixes is there, fits together, and starts where it says."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch

from isopo_mini.batch import Batch
from isopo_mini.experiments import setups
from isopo_mini.experiments.setups import SETUPS, SHIPPED, leave_one_out_advantages, setup_of, start_weights
from isopo_mini.objectives.advantages import leave_one_out
from isopo_mini.policies import CausalTransformer
from isopo_mini.rules.rule_parts import UNITS, batch_advantages
from isopo_mini.tasks import ContextualBandit, warm_start
from isopo_mini.training.loop import Task

ROOT = Path(__file__).resolve().parent.parent.parent
CPU = torch.device("cpu")
# Weights that are made on the machine that needs them, and those of a package: see tests/models/test_language.py.
ELSEWHERE = {"addition-large", "language"}
AT_HAND = [name for name in SETUPS if name not in ELSEWHERE]


@pytest.mark.parametrize("name", SETUPS)
def test_names_that_a_setup_uses_exist(name: str) -> None:
    setup = setup_of(name)
    assert {setup.advantages, setup.by_step or setup.advantages} <= set(setup.all_advantages)
    assert setup.unit in UNITS
    assert setup.lowest < setup.target


@pytest.mark.parametrize("name", AT_HAND)
def test_task_and_policy_fit_together_and_the_seed_decides_the_policy(name: str) -> None:
    setup = setup_of(name)
    returns = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        task, policy = setup.make(CPU)
        assert isinstance(task, Task)
        returns.append(task.evaluate(policy)["return"])
    assert returns[0] == returns[1]
    # Weights that are loaded are the same for all seeds.
    assert (returns[0] == returns[2]) == (name in ("addition", "sorting", "modular"))
    assert setup.lowest < returns[0] < setup.target  # there is something to learn
    batch = task.sample(policy, 16, generator=torch.Generator().manual_seed(0))
    for option, function in setup.all_advantages.items():
        shape = function(batch).shape
        assert shape == (batch.mask.shape if option == setup.by_step else batch.mask.shape[:1])


def test_the_target_of_the_bandit_can_be_reached() -> None:
    task, _ = setups.bandit(CPU)
    assert isinstance(task, ContextualBandit)
    assert setup_of("bandit").target < task.optimum - 0.02


@pytest.mark.parametrize("name", ["addition", "sorting", "modular"])
def test_tokens_start_from_one_in_five(name: str) -> None:
    task, policy = setup_of(name).make(CPU)
    assert task.evaluate(policy)["return"] == pytest.approx(0.2, abs=0.02)


def test_leave_one_out_is_within_groups_where_there_are_any() -> None:
    rewards, groups = torch.tensor([1.0, 3.0, 8.0, 2.0]), torch.tensor([0, 0, 1, 1])
    zeros = torch.zeros(4, 1, dtype=torch.int64)
    grouped = Batch(zeros, zeros, zeros == 0, rewards, torch.zeros(4, 1), groups)
    torch.testing.assert_close(leave_one_out_advantages(grouped), leave_one_out(rewards, groups))
    torch.testing.assert_close(leave_one_out_advantages(grouped), torch.tensor([-2.0, 2.0, 6.0, -6.0]))
    alone = Batch(zeros, zeros, zeros == 0, rewards, torch.zeros(4, 1))
    torch.testing.assert_close(leave_one_out_advantages(alone), batch_advantages(alone))


def test_errors() -> None:
    with pytest.raises(ValueError, match=f"task: expected one of {', '.join(SETUPS)}, got 'additions'"):
        setup_of("additions")


class TestWeights:
    """Without the repository, what `pip install` gives is the package and its data, wherever a command is given."""

    def test_what_is_installed_can_run_the_experiment(self, tmp_path: Path) -> None:
        """Only what `pyproject.toml` says goes along."""
        installed, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
        globs = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"][
            "package-data"
        ]["isopo_mini"]
        for pattern in ["**/*.py", *globs]:
            for path in (ROOT / "isopo_mini").glob(pattern):
                copy = installed / path.relative_to(ROOT)
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, copy)
        elsewhere.mkdir()
        options = "--rules reinforce --learning-rates 0.001 --seeds 0 --steps 1 --processes 1 --out out"
        command = [sys.executable, "-m", "isopo_mini.experiments", "addition", *options.split()]
        environment = os.environ | {"PYTHONPATH": str(installed), "TQDM_DISABLE": "1", "OMP_NUM_THREADS": "1"}
        result = subprocess.run(command, cwd=elsewhere, env=environment, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr
        assert "reinforce" in result.stdout
        assert len((elsewhere / "out" / "records.jsonl").read_text(encoding="utf-8").splitlines()) == 1

    def test_the_command_that_the_error_names_makes_what_is_missing(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """With other sizes and less accuracy than it says, to be done at once."""
        monkeypatch.chdir(tmp_path)
        make = SETUPS["addition-large"].make
        with pytest.raises(
            ValueError, match=r"addition_large\.safetensors in the package, or in weights/ of"
        ) as caught:
            make(CPU)
        program, said = str(caught.value).split("make it with ")[1].split(" ", 3)[2:]
        assert program == "isopo_mini.tasks.warm_start"
        fast = re.sub("--width 256 --layers 4 --heads 8 --device cuda", "--width 8 --layers 1 --heads 2", said)
        warm_start.main([*fast.split(), "--accuracy", "1e-9"])
        task, policy = make(CPU)
        assert isinstance(policy, CausalTransformer)
        assert 1e-9 < task.evaluate(policy)["return"] < 0.01

    def test_weights_of_another_task_are_not_taken(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        (tmp_path / "weights").mkdir()
        shutil.copy(SHIPPED / "addition.safetensors", tmp_path / "weights" / "addition_large.safetensors")
        with pytest.raises(
            ValueError, match=r"expected those of addition:digits=3 in weights.*, got those of addition$"
        ):
            SETUPS["addition-large"].make(CPU)

    def test_the_packages_own_come_first(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        (tmp_path / "weights").mkdir()
        (tmp_path / "weights" / "addition.safetensors").write_text("somebody's", encoding="utf-8")
        assert start_weights("addition.safetensors", "addition") == SHIPPED / "addition.safetensors"
