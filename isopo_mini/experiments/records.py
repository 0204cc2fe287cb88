"""Records of runs, and the three tables that chapters read from them; `record_files` has the files.

`load_records` gives one row a run, `curves` one row an evaluation, `summary` one row a rule: the step size is picked
on the choosing seeds, and what is reported comes from other seeds only. Everything can be computed from the files
again, in any order of them.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import scipy  # its parts load themselves when they are used: they take half a second

from isopo_mini.experiments.record_files import FINALISTS, by_rule_and_optimizer, read_configuration, read_records
from isopo_mini.experiments.record_files import FOLDER as FOLDER
from isopo_mini.experiments.record_files import read_record as read_record
from isopo_mini.experiments.record_files import write_record as write_record
from isopo_mini.experiments.statistics import t_interval

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

    Raises:
        ValueError: there are fewer than two entries, or a return is not finite: where a run has broken down it is the
            task's lowest.
    """
    returns, steps = np.asarray(curve["return"], dtype=float), np.asarray(curve["step"], dtype=float)
    if len(returns) != len(steps) or len(returns) < 2:
        raise ValueError(f"curve: expected two or more returns, one a step, got {len(returns)} for {len(steps)} steps")
    if not np.isfinite(returns).all():
        place = int(np.flatnonzero(~np.isfinite(returns))[0])
        raise ValueError(f"curve: expected finite returns, got {curve['return'][place]} at step {curve['step'][place]}")
    last = max(1, math.ceil((len(returns) - 1) / 4))
    reached = np.flatnonzero(returns >= (math.inf if target is None else target))
    return {
        "score": returns[-last:].mean().item(),
        "final": returns[-1].item(),
        "area": float(scipy.integrate.trapezoid(returns, steps) / (steps[-1] - steps[0])),
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


def load_records(folder: str | Path) -> pd.DataFrame:
    """All runs of a result folder, one row each.

    Args:
        folder: what `--out` of the experiment was.

    Returns:
        Columns: what was run (`task`, `rule`, `learning_rate`, `seed`, `phase`, `optimizer`, `device`, `steps`, …),
        what came of it (`status`, `score`, `final`, `area`, `to_target_samples` and so on), what it cost (`samples`,
        `actions`, `backward_passes`, `seconds`, `wall_seconds`), and `curve`, a dict of lists; `finalist`, False for
        what a screening left behind. Sorted by rule, step size and seed.

    Raises:
        ValueError: there are no records, or a file is none of this experiment's; names it. See `record_files`.
    """
    folder = Path(folder)
    table = as_table(read_records(folder))
    config = read_configuration(folder) or {}
    if FINALISTS in config:  # the other runs were a screening's, with fewer seeds
        sizes = by_rule_and_optimizer(config[FINALISTS], config)
        keys = zip(table["rule"], table["optimizer"], table["learning_rate"], strict=True)
        table["finalist"] = [size in sizes.get((rule, optimizer), ()) for rule, optimizer, size in keys]
    return table


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
        rows.append(row | {"wall_seconds": record["wall_seconds"], "finalist": True, "curve": record["curve"]})
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
        "highest" when the best one is the end of its grid, so that a wider grid might do better; else "". Without a
        row for what a screening left behind.

    Raises:
        ValueError: the step sizes of a rule were not tried with the same seeds: the grid is not finished. A run is
            there twice. A score is not finite; that of a run that broke down is its task's lowest return, and a mean
            over the other seeds would choose what breaks down.
    """
    choosing = _sound(records, "choose")
    rows = []
    for key, everything in choosing.groupby(_GROUP):
        group = everything[everything["finalist"]] if "finalist" in everything else everything
        if group.empty:
            continue
        seeds = group.groupby("learning_rate")["seed"].agg(lambda values: " ".join(map(str, sorted(values))))
        if seeds.nunique() > 1:
            raise ValueError(
                f"records: expected every step size of {key[2]} with the same seeds, got {seeds.to_dict()}; "
                "the grid is not finished"
            )
        means = group.groupby("learning_rate")["score"].mean()  # sorted, so argmax takes the smaller of equals
        place = int(means.to_numpy().argmax())
        tried = sorted(everything["learning_rate"].unique())
        edge = {tried[0]: "lowest", tried[-1]: "highest"}.get(means.index[place], "") if len(tried) > 1 else ""
        row = dict(zip(_GROUP, key, strict=True)) | {"learning_rate": means.index[place]}
        row |= {"choose_score": means.iloc[place], "choose_seeds": len(seeds.iloc[0].split()), "at_edge": edge}
        rows.append(row)
    return pd.DataFrame(rows, columns=[*_GROUP, "learning_rate", "choose_score", "choose_seeds", "at_edge"])


def summary(records: pd.DataFrame, *, confidence: float = 0.95) -> pd.DataFrame:
    """One row a rule: its best step size by the choosing seeds, and how that did on the reporting seeds.

    Args:
        records: of `load_records`, of one folder or of several joined by `pandas.concat`.
        confidence: of the t intervals over seeds.

    Returns:
        The columns of `best_learning_rates`, then, over the reporting seeds: `seeds`, how many; `diverged` and
        `reached`, how many of them broke down or reached the target; mean and interval of the score (`score`,
        `score_low`, `score_high`) and of the area under the curve; the mean total `samples`, `actions`,
        `backward_passes` and `seconds`; `to_target_samples` and so on: the median over seeds, where a seed that never
        got there counts as infinitely late (NaN when that is the median).
        All NaN without reporting seeds; the ends of an interval are NaN for a single seed.

    Raises:
        ValueError: see `best_learning_rates`; it holds for the reporting seeds too.
    """
    reporting = _sound(records, "report")
    rows = []
    for _, choice in best_learning_rates(records).iterrows():
        rows.append(choice.to_dict() | _reported(reports_of(reporting, choice), confidence))
    return pd.DataFrame(rows)


def best_members(records: pd.DataFrame, method_of: Callable[[str], str | None]) -> pd.DataFrame:
    """Of every method the member that the choosing seeds prefer, among those that were reported.

    Args:
        records: of `load_records`.
        method_of: of which method a rule is one choice; None for a rule to be left out.

    Returns:
        Rows of `summary`, by method, the highest `score` first.

    Raises:
        ValueError: see `summary`; or none of the rules was reported.
    """
    table = summary(records)
    table = table.assign(method=table["rule"].map(method_of)).dropna(subset="method")
    table = table[table["seeds"] > 0]
    if table.empty:
        raise ValueError("records: expected runs of the phase 'report' of at least one method, got none")
    best = table.loc[table.groupby("method")["choose_score"].idxmax()]
    return best.set_index("method").sort_values("score", ascending=False)


def reports_of(records: pd.DataFrame, member: pd.Series) -> pd.DataFrame:
    """The reporting runs of a row of `summary` or `best_members`, in the order of their seeds."""
    same = records["phase"] == "report"
    for name in (*_GROUP, "learning_rate"):
        same &= records[name] == member[name]
    return records[same].sort_values("seed", ignore_index=True)


def _sound(records: pd.DataFrame, phase: str) -> pd.DataFrame:
    """The runs of a phase, once it is sure that each is there once and has its numbers."""
    runs = records[records["phase"] == phase]
    twice = runs[runs.duplicated([*_GROUP, "learning_rate", "seed"])]
    if len(twice):
        raise ValueError(f"records: expected every run once, got {_named(twice)} twice")
    for name in ("score", "area") if phase == "report" else ("score",):
        bad = runs[~np.isfinite(runs[name].astype(float))]
        if len(bad):
            raise ValueError(
                f"records: expected finite numbers, got {name} {bad[name].iloc[0]} of {_named(bad)}; "
                "that of a run that broke down is its task's lowest return"
            )
    return runs


def _named(runs: pd.DataFrame) -> str:
    """Which run the first of these is."""
    first = runs.iloc[0]
    return f"{first['rule']}, step size {first['learning_rate']:g}, seed {first['seed']} ({first['phase']})"


def _reported(runs: pd.DataFrame, confidence: float) -> dict[str, Any]:
    """The part of a row of `summary` that comes from the reporting seeds."""
    row: dict[str, Any] = {"seeds": len(runs), "diverged": int((runs["status"] == "diverged").sum())}
    row["reached"] = int(runs["to_target_step"].notna().sum())
    for name in ("score", "area"):
        row[name] = runs[name].mean()
        row[f"{name}_low"], row[f"{name}_high"] = math.nan, math.nan
        if len(runs) > 1:
            interval = t_interval(runs[name].to_numpy(), confidence=confidence)
            row[f"{name}_low"], row[f"{name}_high"] = interval.low.item(), interval.high.item()
    for name in COSTS[1:]:
        row[name] = runs[name].mean()
    for name in COSTS:
        middle = runs[f"to_target_{name}"].fillna(math.inf).median()
        row[f"to_target_{name}"] = middle if math.isfinite(middle) else math.nan
    return row
