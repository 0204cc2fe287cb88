"""The files of an experiment's folder: one record a run, and the configuration that says which runs are its own.

While runs are made, each leaves a file in `records`. Then all of them become lines of one file, `records.jsonl`, to
which lines are added and in which none is changed.

Whatever else lies in the folder of records would be counted along: a copy of a record makes one seed weigh double, one
of another experiment changes which step size is best. So everything that is read is first held against what this
folder is about, and what does not belong there is an error that names the file.
"""

import json
import math
import re
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from isopo_mini.experiments.leases import lease, sweep
from isopo_mini.writing import is_unfinished, write_atomically

FOLDER = "records"
PACKED = "records.jsonl"
CONFIGURATION = "config.json"
# What a configuration lists, where a record has one of the list; all else they have in common.
VARIED = ("rule", "learning_rate", "seed", "phase")
FINALISTS = "finalists"
SEEDS = {"choose": "seeds", "report": "report_seeds"}
_RUN = ("task", "rule", "learning_rate", "seed", "phase", "optimizer")
_PARTS = ("run", "status", "score", "final", "area", "target", "to_target", "wall_seconds", "code", "curve")


def file_name(rule: str, optimizer: str, learning_rate: float, seed: int) -> str:
    """Of a record: rule, optimizer, step size and seed, in characters that every file system takes."""
    safe = re.sub(r"[^\w.=+-]", "_", rule)
    return f"{safe}__{optimizer}__{learning_rate:g}__{seed}.json"


def write_record(path: Path, record: Mapping[str, Any]) -> None:
    """Write one run as a line of JSON, whole or not at all."""
    write_atomically(path, json.dumps(record, allow_nan=False) + "\n")


def read_record(path: Path) -> dict[str, Any]:
    """Read one run.

    Raises:
        ValueError: the file is no record, or has a score that is no number.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path.name}: expected the record of a run, got no JSON ({error})") from error
    return _parse(text, path.name)


def read_records(folder: Path) -> list[dict[str, Any]]:
    """All records of an experiment's folder, by file name.

    Raises:
        ValueError: there are none; or one is no record, does not have its run's name, is there twice, or is of a run
            that the folder's configuration, where there is one, does not name.
    """
    found = _loose(folder)
    for name, record in _packed(folder).items():
        if found.setdefault(name, record) != record:
            raise ValueError(f"{name}: expected what {PACKED} has of this run, got another record")
    if not found:
        raise ValueError(f"folder: expected records in {folder.name}/{PACKED} or {folder.name}/{FOLDER}, got none")
    config = read_configuration(folder)
    for name, record in found.items():
        _require_own(name, record["run"], config)
    return [found[name] for name in sorted(found)]


def recorded(folder: Path) -> dict[str, dict[str, Any]]:
    """The settings of every run that has a record, by its file name."""
    # Loose ones first: while they are packed they are in both places, and never in none.
    return {name: record["run"] for name, record in (_loose(folder) | _packed(folder)).items()}


def is_recorded(folder: Path, name: str) -> bool:
    """Whether the run of this file name has a record; quick enough to be asked before every run."""
    if (folder / FOLDER / name).exists():
        return True
    path = folder / PACKED
    if not path.exists():
        return False
    state = path.stat()
    return name in _names_of(path, state.st_mtime_ns, state.st_size)


@lru_cache(maxsize=1)
def _names_of(path: Path, changed: int, size: int) -> frozenset[str]:
    """The file names in a packed file, as long as it is as it was."""
    return frozenset(_packed(path.parent))


def pack(folder: Path) -> None:
    """Make lines of `records.jsonl` of all loose records. Whoever is killed on the way leaves them in both places.

    A process that was killed between a run's record and the end of its lease has left the lease: nobody asks for that
    run again, so it goes here.
    """
    with lease(folder, "pack") as ours:
        if not ours:
            return
        loose, packed = _loose(folder), _packed(folder)
        if loose:
            lines = [json.dumps(record, allow_nan=False) for record in (packed | loose).values()]
            write_atomically(folder / PACKED, "".join(f"{line}\n" for line in lines))
            for name in loose:
                (folder / FOLDER / name).unlink()
        sweep(folder, packed.keys() | loose.keys())


def _loose(folder: Path) -> dict[str, dict[str, Any]]:
    """The records that have a file of their own, by its name."""
    found = {}
    for path in sorted((folder / FOLDER).glob("*.json")):
        record = read_record(path)
        name = name_of(record["run"])
        if path.name != name:
            raise ValueError(f"{path.name}: expected {name}, the name of the run that it records; move it elsewhere")
        found[name] = record
    return found


def _packed(folder: Path) -> dict[str, dict[str, Any]]:
    """The records in `records.jsonl`, in its order."""
    path = folder / PACKED
    found: dict[str, dict[str, Any]] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines() if path.exists() else (), start=1):
        record = _parse(line, f"{PACKED}, line {number}")
        name = name_of(record["run"])
        if name in found:
            raise ValueError(f"{PACKED}, line {number}: expected every run once, got {name} twice")
        found[name] = record
    return found


def name_of(run: Mapping[str, Any]) -> str:
    """The file name of a run's settings."""
    return file_name(run["rule"], run["optimizer"], run["learning_rate"], run["seed"])


def _parse(text: str, place: str) -> dict[str, Any]:
    """The record that a text is."""
    try:
        record = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{place}: expected the record of a run, got no JSON ({error})") from error
    if not isinstance(record, dict) or not {"run", "score", "curve"} <= record.keys():
        raise ValueError(f"{place}: expected the record of a run, with run, score and curve")
    named = record["run"] if isinstance(record["run"], dict) else {}
    if missing := [name for name in _PARTS if name not in record] + [name for name in _RUN if name not in named]:
        raise ValueError(f"{place}: expected the record of a run, got one without {', '.join(missing)}")
    for name in ("score", "final", "area"):
        if not isinstance(record[name], int | float) or not math.isfinite(record[name]):
            raise ValueError(f"{place}: expected a finite {name}, got {record[name]}")
    return record


def read_configuration(folder: Path) -> dict[str, Any] | None:
    """What the experiment of a folder is about; None when nothing says so.

    Raises:
        ValueError: a file of that name is something else.
    """
    path = folder / CONFIGURATION
    if not path.exists():
        return None
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path.name}: expected the configuration of an experiment, got no JSON ({error})") from error
    if not isinstance(config, dict) or not {"step_sizes", *SEEDS.values()} <= config.keys():
        raise ValueError(f"{path.name}: expected the configuration of an experiment, with step_sizes and seeds")
    return config


def claim(folder: Path, config: Mapping[str, Any], extend: bool, growing: bool = False) -> None:
    """Make the folder this configuration's, or make sure that it is.

    Args:
        folder: of the experiment.
        config: what it is about.
        extend: allow more rules, step sizes and seeds than it had.
        growing: allow more step sizes.

    Raises:
        ValueError: it is another's, or somebody else's altogether.
    """
    path = folder / CONFIGURATION
    old = read_configuration(folder)
    if old is not None:
        names = (old.keys() | config.keys()) - {FINALISTS}  # which follow from the runs
        different = sorted(name for name in names if old.get(name) != config.get(name))
        allowed = extend or (growing and different == ["step_sizes"])
        if different and not (allowed and _contains(config, old)):
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


def require_same_code(folder: Path, source: str) -> None:
    """Check that all records come from the code of this hash, see `provenance.source_hash`.

    Raises:
        ValueError: they do not; a comparison of rules would then be one of programs too.
    """
    for name, record in (_loose(folder) | _packed(folder)).items():
        if (found := record["code"].get("source", "unknown")) != source:
            raise ValueError(
                f"{name}: expected a record of this code ({source}), got one of {found}, commit "
                f"{record['code'].get('commit', 'unknown')}; choose another folder, check that commit out, or allow it "
                "with --mixed-code"
            )


def _contains(config: Mapping[str, Any], old: Mapping[str, Any]) -> bool:
    """Whether a configuration has all of an older one and differs only in having more."""
    varied = ("step_sizes", FINALISTS, *SEEDS.values())
    if {**config, **dict.fromkeys(varied)} != {**old, **dict.fromkeys(varied)}:
        return False
    more_sizes = all(set(sizes) <= set(config["step_sizes"].get(rule, ())) for rule, sizes in old["step_sizes"].items())
    return more_sizes and all(set(old[name]) <= set(config[name]) for name in SEEDS.values())


def _require_own(name: str, run: Mapping[str, Any], config: Mapping[str, Any] | None) -> None:
    """Check that a record belongs to the experiment."""
    for field, own in _own(run, config).items() if config is not None else ():
        value = run[field]
        if value not in own:
            allowed = ", ".join(map(str, own)) or "none"
            raise ValueError(
                f"{name}: expected a run of this folder's experiment, with {field} {allowed}, got {value}; "
                "move it elsewhere"
            )


def _own(run: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, list[Any]]:
    """What each field of a run may be in an experiment with this configuration."""
    shared = {field: [config.get(field)] for field in run if field not in (*VARIED, "optimizer")}
    sizes = by_rule_and_optimizer(config["step_sizes"], config)
    seeds = config[SEEDS[run["phase"]]] if run["phase"] in SEEDS else []
    varied = {"phase": list(SEEDS), "rule": list(dict.fromkeys(rule for rule, _ in sizes)), "seed": seeds}
    varied["optimizer"] = [optimizer for rule, optimizer in sizes if rule == run["rule"]]
    return shared | varied | {"learning_rate": sizes.get((run["rule"], run["optimizer"]), [])}


def by_rule_and_optimizer(
    step_sizes: Mapping[str, list[float]], config: Mapping[str, Any]
) -> dict[tuple[str, str], list[float]]:
    """Step sizes that a configuration has by label, by what the label says."""
    return {split_label(text, config.get("optimizer")): sizes for text, sizes in step_sizes.items()}


def split_label(text: str, default: str | None) -> tuple[str, str]:
    """Rule and optimizer of `"rule/optimizer"`, or of `"rule"` with the experiment's own."""
    rule, _, optimizer = text.partition("/")
    return rule, optimizer or str(default)
