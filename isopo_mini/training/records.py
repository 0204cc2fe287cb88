"""Records of runs: one small JSON file each, and the three tables that chapters read from them.

`load_records` gives one row a run, `curves` one row an evaluation, `summary` one row a rule: the step size is picked
on the choosing seeds, and what is reported comes from other seeds only. Everything can be computed from the files
again, in any order of them.
"""

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy.integrate import trapezoid

from isopo_mini.training.statistics import bootstrap_interval
from isopo_mini.writing import write_atomically

FOLDER = "records"
PHASES = ("choose", "report")
# What is counted up to the first evaluation that reaches the target.
COSTS = ("step", "samples", "actions", "backward_passes", "seconds")
_GROUP = ["task", "optimizer", "rule"]


def scores(curve: Mapping[str, list], target: float | None = None) -> dict[str, Any]:
    """What one number can say of a learning curve.

    Args:
        curve: lists of one length; "step" and "return" at least. The first entry is before the first step.
        target: of the return.

    Returns:
        `score`, the mean "return" over the last quarter of the evaluations, the first not counted; rounded up, so at
        least one; it decides which step size is best. `final`, the last "return". `area`, the time average of
        "return" over all steps (trapezoids). `to_target`, what had been spent (see `COSTS`) at the first evaluation
        with "return" ≥ target; None when there was none.
    """
    returns, steps = np.asarray(curve["return"], dtype=float), np.asarray(curve["step"], dtype=float)
    last = max(1, math.ceil((len(returns) - 1) / 4))
    reached = np.flatnonzero(returns >= (math.inf if target is None else target))
    return {
        "score": returns[-last:].mean().item(),
        "final": returns[-1].item(),
        "area": float(trapezoid(returns, steps) / (steps[-1] - steps[0])),
        "to_target": {name: curve[name][reached[0]] for name in COSTS if name in curve} if len(reached) else None,
    }


def rounded(value: Any, digits: int = 5) -> Any:
    """Numbers cut to `digits` significant digits, inside dicts and lists too; None for NaN and infinities."""
    if isinstance(value, Mapping):
        return {key: rounded(item, digits) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(item, digits) for item in value]
    if isinstance(value, float):
        if not math.isfinite(value):
            return None
        short = float(f"{value:.{digits}g}")
        return int(short) if short.is_integer() and abs(short) < 10**digits else short
    return value


def write_record(path: Path, record: dict[str, Any]) -> None:
    """Write one run as JSON, a line a part, whole or not at all."""
    parts = [f"{json.dumps(key)}: {json.dumps(value, allow_nan=False)}" for key, value in record.items()]
    write_atomically(path, "{\n" + ",\n".join(parts) + "\n}\n")


def read_record(path: Path) -> dict[str, Any]:
    """Read one run.

    Raises:
        ValueError: the file is no record.
    """
    try:
        record = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path.name}: expected the record of a run, got no JSON ({error})") from error
    if not isinstance(record, dict) or not {"run", "score", "curve"} <= record.keys():
        raise ValueError(f"{path.name}: expected the record of a run, with run, score and curve")
    return record


def load_records(folder: str | Path) -> pd.DataFrame:
    """All runs of a result folder, one row each.

    Args:
        folder: what `--out` of the experiment was.

    Returns:
        Columns: what was run (`task`, `rule`, `learning_rate`, `seed`, `phase`, `optimizer`, `device`, `steps`, …),
        what came of it (`status`, `score`, `final`, `area`, `to_target_samples` and so on), what it cost (`samples`,
        `actions`, `backward_passes`, `seconds`, `wall_seconds`), and `curve`, a dict of lists. Sorted by rule, step
        size and seed.

    Raises:
        ValueError: there are no records, or a file is none.
    """
    paths = sorted((Path(folder) / FOLDER).glob("*.json"))
    if not paths:
        raise ValueError(f"folder: expected records in {Path(folder).name}/{FOLDER}, got none")
    return as_table(read_record(path) for path in paths)


def as_table(records: Iterable[Mapping[str, Any]]) -> pd.DataFrame:
    """The table of `load_records` from records at hand, such as a run just made."""
    rows = []
    for record in records:
        row = dict(record["run"])
        row |= {name: record[name] for name in ("status", "score", "final", "area", "target")}
        reached = record["to_target"] or {}
        row |= {f"to_target_{name}": reached.get(name, math.nan) for name in COSTS}
        spent = {name: record["curve"].get(name, [None])[-1] for name in COSTS[1:]}
        row |= {name: math.nan if value is None else value for name, value in spent.items()}
        rows.append(row | {"wall_seconds": record["wall_seconds"], "curve": record["curve"]})
    table = pd.DataFrame(rows)
    return table.sort_values([*_GROUP, "learning_rate", "seed"], kind="stable", ignore_index=True)


def curves(records: pd.DataFrame) -> pd.DataFrame:
    """One row an evaluation of a run, with the run's task, rule, step size, seed and phase.

    Its other columns are those of `loop.train`: totals so far (`samples`, `actions`, `backward_passes`, `seconds`),
    and means over the iterations since the evaluation before (`reward`, `kl`, `entropy`, the rule's own metrics).
    Step 0 is before the first update. Where a run has diverged its return is the task's lowest.
    """
    names = [*_GROUP, "learning_rate", "seed", "phase"]
    parts = [
        pd.DataFrame({name: row[name] for name in names} | row["curve"], index=range(len(row["curve"]["step"])))
        for row in records.to_dict("records")
    ]
    return pd.concat([part.dropna(axis="columns", how="all") for part in parts], ignore_index=True)


def best_learning_rates(records: pd.DataFrame) -> pd.DataFrame:
    """The step size of each rule with the highest mean score over the choosing seeds; the smaller one of two equals.

    Returns:
        `task`, `optimizer`, `rule`, `learning_rate`, `choose_score`, `choose_seeds`, and `at_edge`: "lowest" or
        "highest" when the best one is the end of its grid, so that a wider grid might do better; else "".

    Raises:
        ValueError: the step sizes of a rule were not tried with the same seeds: the grid is not finished.
    """
    rows = []
    for key, group in records[records["phase"] == "choose"].groupby(_GROUP):
        seeds = group.groupby("learning_rate")["seed"].agg(lambda values: " ".join(map(str, sorted(values))))
        if seeds.nunique() > 1:
            raise ValueError(
                f"records: expected every step size of {key[2]} with the same seeds, got {seeds.to_dict()}; "
                "the grid is not finished"
            )
        means = group.groupby("learning_rate")["score"].mean()  # sorted, so argmax takes the smaller of equals
        place = int(means.to_numpy().argmax())
        edge = {0: "lowest", len(means) - 1: "highest"}.get(place, "") if len(means) > 1 else ""
        row = dict(zip(_GROUP, key, strict=True)) | {"learning_rate": means.index[place]}
        row |= {"choose_score": means.iloc[place], "choose_seeds": len(seeds.iloc[0].split()), "at_edge": edge}
        rows.append(row)
    return pd.DataFrame(rows, columns=[*_GROUP, "learning_rate", "choose_score", "choose_seeds", "at_edge"])


def summary(records: pd.DataFrame, *, confidence: float = 0.95) -> pd.DataFrame:
    """One row a rule: its best step size by the choosing seeds, and how that did on the reporting seeds.

    Args:
        records: of `load_records`, of one folder or of several joined by `pandas.concat`.
        confidence: of the bootstrap intervals over seeds.

    Returns:
        The columns of `best_learning_rates`, then, over the reporting seeds: `seeds`, how many; `diverged` and
        `reached`, how many of them broke down or reached the target; mean and interval of the score (`score`,
        `score_low`, `score_high`) and of the area under the curve; the mean total `samples`, `actions`,
        `backward_passes` and `seconds`; `to_target_samples` and so on: the median over seeds, where a seed that never
        got there counts as infinitely late (NaN when that is the median).
        All NaN without reporting seeds; the ends of an interval are NaN for a single seed.
    """
    rows = []
    for choice in best_learning_rates(records).to_dict("records"):
        same = records["phase"] == "report"
        for name in (*_GROUP, "learning_rate"):
            same &= records[name] == choice[name]
        rows.append({str(name): value for name, value in choice.items()} | _reported(records[same], confidence))
    return pd.DataFrame(rows)


def _reported(runs: pd.DataFrame, confidence: float) -> dict[str, Any]:
    """The part of a row of `summary` that comes from the reporting seeds."""
    row: dict[str, Any] = {"seeds": len(runs), "diverged": int((runs["status"] == "diverged").sum())}
    row["reached"] = int(runs["to_target_step"].notna().sum())
    for name in ("score", "area"):
        row[name] = runs[name].mean()
        row[f"{name}_low"], row[f"{name}_high"] = math.nan, math.nan
        if len(runs) > 1:
            interval = bootstrap_interval(runs[name].to_numpy(), confidence=confidence)
            row[f"{name}_low"], row[f"{name}_high"] = interval.low.item(), interval.high.item()
    for name in COSTS[1:]:
        row[name] = runs[name].mean()
    for name in COSTS:
        middle = runs[f"to_target_{name}"].fillna(math.inf).median()
        row[f"to_target_{name}"] = middle if math.isfinite(middle) else math.nan
    return row
