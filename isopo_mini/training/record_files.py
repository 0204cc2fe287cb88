"""The files of an experiment's folder: one record a run, and the configuration that says which runs are its own.

Whatever else lies in the folder of records would be counted along: a copy of a record makes one seed weigh double, one
of another experiment changes which step size is best. So everything that is read is first held against what this
folder is about, and what does not belong there is an error that names the file.
"""

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from isopo_mini.writing import is_unfinished, write_atomically

FOLDER = "records"
CONFIGURATION = "config.json"
# What a configuration lists, where a record has one of the list; all else they have in common.
VARIED = ("rule", "learning_rate", "seed", "phase")
SEEDS = {"choose": "seeds", "report": "report_seeds"}
_RUN = ("task", "rule", "learning_rate", "seed", "phase", "optimizer")
_PARTS = ("run", "status", "score", "final", "area", "target", "to_target", "wall_seconds", "curve")


def file_name(rule: str, learning_rate: float, seed: int) -> str:
    """Of a record: rule, step size and seed, in characters that every file system takes."""
    safe = re.sub(r"[^\w.=+-]", "_", rule)
    return f"{safe}__{learning_rate:g}__{seed}.json"


def write_record(path: Path, record: Mapping[str, Any]) -> None:
    """Write one run as JSON, a line a part, whole or not at all."""
    parts = [f"{json.dumps(key)}: {json.dumps(value, allow_nan=False)}" for key, value in record.items()]
    write_atomically(path, "{\n" + ",\n".join(parts) + "\n}\n")


def read_record(path: Path) -> dict[str, Any]:
    """Read one run.

    Raises:
        ValueError: the file is no record, or has a score that is no number.
    """
    try:
        record = json.loads(path.read_text())
    except ValueError as error:  # no JSON, or no text
        raise ValueError(f"{path.name}: expected the record of a run, got no JSON ({error})") from error
    if not isinstance(record, dict) or not {"run", "score", "curve"} <= record.keys():
        raise ValueError(f"{path.name}: expected the record of a run, with run, score and curve")
    named = record["run"] if isinstance(record["run"], dict) else {}
    if missing := [name for name in _PARTS if name not in record] + [name for name in _RUN if name not in named]:
        raise ValueError(f"{path.name}: expected the record of a run, got one without {', '.join(missing)}")
    for name in ("score", "final", "area"):
        if not isinstance(record[name], int | float) or not math.isfinite(record[name]):
            raise ValueError(f"{path.name}: expected a finite {name}, got {record[name]}")
    return record


def read_records(folder: Path) -> list[dict[str, Any]]:
    """All records of an experiment's folder, by file name.

    Raises:
        ValueError: there are none; or a file is no record, does not have its run's name, or is of a run that the
            folder's configuration, where there is one, does not name.
    """
    paths = sorted((folder / FOLDER).glob("*.json"))
    if not paths:
        raise ValueError(f"folder: expected records in {folder.name}/{FOLDER}, got none")
    config = read_configuration(folder)
    found = []
    for path in paths:
        record = read_record(path)
        _require_own(path, record["run"], config)
        found.append(record)
    return found


def read_configuration(folder: Path) -> dict[str, Any] | None:
    """What the experiment of a folder is about; None when nothing says so.

    Raises:
        ValueError: a file of that name is something else.
    """
    path = folder / CONFIGURATION
    if not path.exists():
        return None
    try:
        config = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path.name}: expected the configuration of an experiment, got no JSON ({error})") from error
    if not isinstance(config, dict) or not {"step_sizes", *SEEDS.values()} <= config.keys():
        raise ValueError(f"{path.name}: expected the configuration of an experiment, with step_sizes and seeds")
    return config


def claim(folder: Path, config: Mapping[str, Any], extend: bool) -> None:
    """Make the folder this configuration's, or make sure that it is.

    Raises:
        ValueError: it is another's, or somebody else's altogether.
    """
    path = folder / CONFIGURATION
    old = read_configuration(folder)
    if old is not None:
        different = sorted(name for name in old.keys() | config.keys() if old.get(name) != config.get(name))
        if different and not (extend and _contains(config, old)):
            name = different[0]
            raise ValueError(
                f"out: expected a folder with this configuration, got {folder.name} with another "
                f"{', '.join(different)} ({name}: {old.get(name)} there, {config.get(name)} here); "
                "choose another folder, or add rules, step sizes and seeds to it with --extend"
            )
    elif folder.exists() and not all(is_unfinished(found, path) for found in folder.iterdir()):
        raise ValueError(f"out: expected a new folder or one of an experiment, got {folder.name} without config.json")
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(config, indent=2) + "\n")


def _contains(config: Mapping[str, Any], old: Mapping[str, Any]) -> bool:
    """Whether a configuration has all of an older one and differs only in having more."""
    varied = ("step_sizes", *SEEDS.values())
    if {**config, **dict.fromkeys(varied)} != {**old, **dict.fromkeys(varied)}:
        return False
    more_sizes = all(set(sizes) <= set(config["step_sizes"].get(rule, ())) for rule, sizes in old["step_sizes"].items())
    return more_sizes and all(set(old[name]) <= set(config[name]) for name in SEEDS.values())


def _require_own(path: Path, run: Mapping[str, Any], config: Mapping[str, Any] | None) -> None:
    """Check that a record has its own name and belongs to the experiment."""
    name = file_name(run["rule"], run["learning_rate"], run["seed"])
    if path.name != name:
        raise ValueError(f"{path.name}: expected {name}, the name of the run that it records; move it elsewhere")
    for field, own in _own(run, config).items() if config is not None else ():
        value = run[field]
        if value not in own:
            allowed = ", ".join(map(str, own)) or "none"
            raise ValueError(
                f"{path.name}: expected a run of this folder's experiment, with {field} {allowed}, got {value}; "
                "move it elsewhere"
            )


def _own(run: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, list[Any]]:
    """What each field of a run may be in an experiment with this configuration."""
    shared = {field: [config.get(field)] for field in run if field not in VARIED}
    step_sizes = config["step_sizes"]
    seeds = config[SEEDS[run["phase"]]] if run["phase"] in SEEDS else []
    varied = {"phase": list(SEEDS), "rule": list(step_sizes), "seed": seeds}
    return shared | varied | {"learning_rate": step_sizes.get(run["rule"], [])}
