"""`make gpu`: what it runs is there, and a part that fails or takes too long does not take the others with it."""

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from isopo_mini.experiments.setups import setup_of
from isopo_mini.rules.rule_specs import parse

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def gpu() -> ModuleType:
    """benchmarks/gpu.py as a module."""
    spec = importlib.util.spec_from_file_location("gpu", ROOT / "benchmarks/gpu.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_what_it_runs_is_there(gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    commands = gpu.parts("cuda", tmp_path)
    for name, command in commands.items():
        module = command[2] if command[1] == "-m" else None
        assert importlib.util.find_spec(module) if module else Path(command[1]).exists(), name
        assert command[-1 - command[::-1].index("--device") + 1] == "cuda"  # the last one counts
    assert "warm start of addition-large" in commands
    assert setup_of("addition-large").steps >= 100
    for rule in gpu.LARGE:
        parse(rule.partition("/")[0])


def test_the_warm_start_is_made_once(gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights/addition_large.safetensors").touch()
    assert "warm start of addition-large" not in gpu.parts("cuda", tmp_path)


def test_the_others_go_on(gpu: ModuleType) -> None:
    def program(code: str) -> list[str]:
        return [sys.executable, "-c", code]

    became = gpu.run_all(
        {"bad": program("raise SystemExit(3)"), "good": program(""), "long": program("import time; time.sleep(600)")}
        | {"after": program("")},
        seconds=5.0,
    )
    assert became.pop("good").startswith("done in")
    assert became == {
        "bad": "failed with status 3",
        "long": "stopped: the time was up",
        "after": "not begun: the time is up",
    }


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so() -> None:
    done = subprocess.run([sys.executable, ROOT / "benchmarks/gpu.py"], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "expected a GPU that PyTorch can use, found none" in done.stderr
