"""Where a number came from: code, seed, device and library versions, written beside it, whole or not at all."""

import json
import os
import platform
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pandas as pd
import torch

import isopo_mini


def provenance(device: str | torch.device = "cpu", **settings: Any) -> dict[str, Any]:
    """What a reader needs to judge and repeat a measurement.

    Args:
        device: where it ran.
        **settings: what the measurement was asked to do, such as seeds; kept as they are.

    Returns:
        A dict that JSON can hold: the command, settings, code version, libraries, device, threads and the day.
    """
    device = torch.device(device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    return {
        "command": " ".join(["python", *_relative(sys.orig_argv[1:])]),
        "settings": settings,
        "code": {"isopo_mini": isopo_mini.__version__, "commit": _commit()},
        "libraries": {"python": platform.python_version(), "torch": torch.__version__, "pandas": pd.__version__},
        "device": {"type": device.type, "name": name, "threads": torch.get_num_threads()},
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
    }


def write_table(path: Path, table: pd.DataFrame, record: dict[str, Any]) -> None:
    """Write `path` (CSV) and its provenance beside it (`.json`), each whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path.with_suffix(".json"), json.dumps(record, indent=2) + "\n")
    write_atomically(path, table.to_csv(index=False))


def write_atomically(path: Path, text: str) -> None:
    """Write to a temporary file in the same folder, then rename: a killed process leaves the old file or the new."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _commit() -> str:
    """The commit the package's folder is at, with a plus when it has changed since; "unknown" outside a checkout."""
    folder = Path(isopo_mini.__file__).parent
    try:
        commit = _git(folder, "rev-parse", "--short=12", "HEAD")
        return commit + ("+" if _git(folder, "status", "--porcelain", "--", ".") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _git(folder: Path, *arguments: str) -> str:
    """The output of a git command."""
    result = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=True)
    return result.stdout.strip()


def _relative(arguments: list[str]) -> list[str]:
    """Command-line arguments with absolute paths cut to their last part: a machine's folders are nobody's business."""
    return [Path(argument).name if os.path.isabs(argument) else argument for argument in arguments]


def _processor() -> str:
    """The processor's name as the system states it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
