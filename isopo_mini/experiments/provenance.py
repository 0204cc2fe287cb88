"""Where a number came from: code, seed, device and library versions, written beside it, whole or not at all."""

import hashlib
import json
import os
import platform
import subprocess
import sys
import tomllib
from datetime import UTC, datetime
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import nn

import isopo_mini
from isopo_mini.writing import write_together


def provenance(device: str | torch.device = "cpu", **settings: Any) -> dict[str, Any]:
    """What a reader needs to judge and repeat a measurement.

    Args:
        device: where it ran.
        **settings: what the measurement was asked to do, such as seeds; kept as they are.

    Returns:
        A dict that JSON can hold: the command, settings, code (version, commit, and `source_hash`), libraries, device,
        threads and the day.
    """
    device = torch.device(device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    return {
        "command": " ".join(["python", *_relative(sys.orig_argv[1:])]),
        "settings": settings,
        "code": {"isopo_mini": isopo_mini.__version__, "commit": _commit(), "source": source_hash()},
        "libraries": {"python": platform.python_version()} | {name: version(name) for name in _LIBRARIES},
        "device": {"type": device.type, "name": name, "threads": torch.get_num_threads()},
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
    }


# Whose numbers these are, beside ours.
_LIBRARIES = ("torch", "numpy", "scipy", "pandas", "gymnasium")


@lru_cache
def source_hash() -> str:
    """Twelve digits that change with any source file of the package, committed or not."""
    folder = Path(isopo_mini.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        digest.update(path.relative_to(folder).as_posix().encode())
        digest.update(path.read_bytes().replace(b"\r\n", b"\n"))
    return digest.hexdigest()[:12]


def weights_hash(policy: nn.Module) -> str:
    """Twelve digits that change with any parameter or buffer of a policy."""
    digest = hashlib.sha256()
    for name, value in policy.state_dict().items():
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:12]


def write_table(path: Path, table: pd.DataFrame, record: dict[str, Any]) -> None:
    """Write `path` (CSV) and its provenance beside it (`.json`), each whole, and neither before both are complete.

    Raises:
        ValueError: `path` is the one of the provenance.
    """
    if path.suffix == ".json":
        raise ValueError(f"path: expected a table's name, such as {path.stem}.csv, got {path.name}: its provenance's")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_together({path: table.to_csv(index=False), path.with_suffix(".json"): json.dumps(record, indent=2) + "\n"})


def _commit() -> str:
    """The commit of this package's repository, with a plus when the package has changed since.

    "unknown" where the folder of the package is not one of isopo_mini's own checkouts: installed into an environment,
    it may well lie inside a repository, but that one's commit says nothing of this code.
    """
    folder = Path(isopo_mini.__file__).parent
    try:
        _git(folder, "ls-files", "--error-unmatch", "__init__.py", "../pyproject.toml")
        project = tomllib.loads((folder.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        if project["name"] != "isopo_mini":
            return "unknown"
        commit = _git(folder, "rev-parse", "--short=12", "HEAD")
        return commit + ("+" if _git(folder, "status", "--porcelain", "--", ".") else "")
    except (OSError, subprocess.CalledProcessError, tomllib.TOMLDecodeError, KeyError):
        return "unknown"


# Inside a hook, git names that repository by these, which would win over the folder a command is run in.
_OTHERS = ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_COMMON_DIR", "GIT_PREFIX", "GIT_OBJECT_DIRECTORY")


def _git(folder: Path, *arguments: str) -> str:
    """The output of a git command about the repository that holds a folder."""
    environment = {name: value for name, value in os.environ.items() if name not in _OTHERS}
    result = subprocess.run(
        ["git", *arguments], cwd=folder, env=environment, capture_output=True, encoding="utf-8", check=True
    )
    return result.stdout.strip()


def _relative(arguments: list[str]) -> list[str]:
    """Command-line arguments with absolute paths cut to their last part: a machine's folders are nobody's business."""
    return [_cut(argument) for argument in arguments]


def _cut(argument: str) -> str:
    """One argument: a path, or `--option=path`."""
    option, equals, value = argument.partition("=")
    if equals and option.startswith("-"):
        return option + equals + _cut(value)
    return Path(argument).name if os.path.isabs(argument) else argument


def _processor() -> str:
    """The processor's name as the system states it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
