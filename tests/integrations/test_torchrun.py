"""The command as a user gives it: two processes take the steps of one, or end together."""

import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from isopo_mini.experiments.setups import start_weights

MODULE = "isopo_mini.integrations.torchrun"


def torchrun(processes: int, out: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command += ["-m", MODULE, "--steps", "2", "--sequences", "16", *options, "--out", str(out)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)


def weights(out: Path) -> Tensor:
    return torch.cat([value.flatten().double() for value in load_file(out.with_suffix(".safetensors")).values()])


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("torchrun")
    made = {"one": (1, []), "two": (2, []), "two, own": (2, ["--own"])}
    for name, (processes, options) in made.items():
        result = torchrun(processes, folder / f"{name}.csv", *options)
        assert result.returncode == 0, result.stderr
    return {name: folder / f"{name}.csv" for name in made}


def test_two_processes_take_the_steps_of_one(runs: dict[str, Path]) -> None:
    start = weights(start_weights("addition.safetensors", "addition"))
    one, two, own = (weights(path) for path in runs.values())
    moved = (one - start).norm()
    assert (two - one).norm() < 1e-5 * moved
    assert (own - one).norm() > 0.1 * moved  # without the shared Gram matrix it is another step


def test_the_table_says_what_travelled(runs: dict[str, Path]) -> None:
    one, two, own = (pd.read_csv(path) for path in runs.values())
    assert (one["bytes"] == 0).all()
    assert (own["bytes"] == 0).all()
    assert two["bytes"].nunique() == 1
    assert 1e5 < two["bytes"].iloc[0] < 1e6
    pd.testing.assert_series_equal(one["reward"], two["reward"])


def test_what_cannot_be_shared_out_ends_all(tmp_path: Path) -> None:
    result = torchrun(3, tmp_path / "table.csv")
    assert result.returncode != 0
    assert "sequences: expected a multiple of the 3 processes, got 16" in result.stderr
    assert not (tmp_path / "table.csv").exists()
