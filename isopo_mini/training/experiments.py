"""Compare update rules on a task: a grid of runs in parallel processes, one record a run, and a summary of them.

    python -m isopo_mini.training.experiments bandit --rules reinforce ntk:damping=0.1 grpo \\
        --learning-rates 0.01 0.03 0.1 --seeds 0 1 2 --report-seeds 100 101 102 103 104 --out results/bandit

First every rule is run with every step size and every seed of `--seeds`; then every rule with the one step size that
had the best mean score is run with the seeds of `--report-seeds`, and only those are reported. A rule with step sizes
of its own is written `rule@0.01,0.03`. Rules are those of `rule_specs`, tasks those of `setups`.

A command that was stopped, by whatever means, continues when it is given again, and ends with the same table (its
seconds apart); a folder made with other settings is refused. `--extend` continues it with more rules, step sizes or
seeds.

Times are of use only when the machine does nothing else: give `--processes 1` when seconds are what you compare.
"""

import argparse
import multiprocessing
import os
import sys
import threading
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from tqdm.auto import tqdm

from isopo_mini import checks
from isopo_mini.training import records, rule_specs
from isopo_mini.training.optimizers import OPTIMIZERS
from isopo_mini.training.provenance import provenance, write_table
from isopo_mini.training.record_files import VARIED, claim
from isopo_mini.training.runs import Run, run
from isopo_mini.training.setups import SETUPS


def grid(
    task: str,
    step_sizes: dict[str, list[float]],
    seeds: Iterable[int],
    phase: str = "choose",
    **settings: Any,
) -> list[Run]:
    """All runs of every rule with each of its step sizes and every seed.

    Args:
        task: a name of `setups.SETUPS`.
        step_sizes: of every rule.
        seeds: for all of them.
        phase: `"choose"` or `"report"`.
        **settings: others of `Run`.

    Raises:
        ValueError: a setting is wrong, or two runs would have one record.
    """
    seeds = list(seeds)
    runs = [
        Run(task, rule, step_size, seed, phase, **settings)
        for seed in seeds  # outermost, so that a grid cut short has tried everything once
        for rule, sizes in step_sizes.items()
        for step_size in sizes
    ]
    names = [one.file_name for one in runs]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"grid: expected every rule, step size and seed once, got {twice} twice")
    return runs


def run_all(runs: Sequence[Run], folder: Path, processes: int = 1) -> None:
    """Run what has no record yet in `folder`, and write the records there.

    Args:
        runs: see `grid`.
        folder: results; records go into a folder of their own inside it.
        processes: how many runs at a time, each in a process with one thread; 1 is this process. With more, a script
            must call this under `if __name__ == "__main__":`, because each process imports it anew.

    Raises:
        RuntimeError: runs failed with an error of their own, or a process died. All others have their records then.
    """
    checks.require_at_least("processes", processes, 1)
    (folder / records.FOLDER).mkdir(parents=True, exist_ok=True)
    missing = [one for one in runs if not _is_recorded(one, folder)]
    failed: dict[str, BaseException] = {}
    with tqdm(total=len(runs), initial=len(runs) - len(missing), desc="runs", delay=2) as bar:
        if processes == 1:
            for one in missing:
                _attempt(one, folder, failed)
                bar.update()
        else:
            # Not forked: a process that has used threads or a GPU cannot be copied safely.
            context = multiprocessing.get_context("spawn")
            started = context.Event()
            pool = ProcessPoolExecutor(processes, context, _start_worker, (started,))
            try:
                waiting = {pool.submit(run_and_record, one, folder): one for one in missing}
                for done in as_completed(waiting):
                    if (error := done.exception()) is not None:
                        failed[waiting[done].file_name] = error
                    bar.update()
            finally:
                pool.shutdown(cancel_futures=True)  # on Ctrl-C, not another run is started
    if failed:
        name, error = next(iter(failed.items()))
        advice = ""
        if isinstance(error, BrokenProcessPool):
            advice = "; start the same command again" if started.is_set() else f"; {_GUARD}"
        raise RuntimeError(
            f"{len(failed)} of {len(runs)} runs failed, first {name}: {str(error).rstrip('.')}{advice}"
        ) from error


def run_and_record(one: Run, folder: Path) -> None:
    """Run, and write the record."""
    records.write_record(folder / records.FOLDER / one.file_name, run(one))


def _attempt(one: Run, folder: Path, failed: dict[str, BaseException]) -> None:
    """Run and record; an error is kept for the end, so that one bad run does not stop a night's others."""
    try:
        run_and_record(one, folder)
    except Exception as error:
        failed[one.file_name] = error


# Why no process of several ever started.
_GUARD = (
    "no process got as far as to start. Each of them imports the program anew, so a script must call this under "
    '`if __name__ == "__main__":`, and a program from standard input cannot have processes. Mend that, or give '
    "processes=1"
)


def _start_worker(started: Any) -> None:
    """One thread for the work, and one that ends this process when its parent has died, even by SIGKILL."""
    started.set()
    torch.set_num_threads(1)
    parent = multiprocessing.parent_process()

    def follow() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def _is_recorded(one: Run, folder: Path) -> bool:
    """Whether the folder has this run's record. Another run's under its name is an error."""
    path = folder / records.FOLDER / one.file_name
    if not path.exists():
        return False
    if (found := records.read_record(path)["run"]) != asdict(one):
        raise ValueError(f"{path.name}: expected the record of {asdict(one)}, got that of {found}")
    return True


def compare(
    folder: Path,
    task: str,
    step_sizes: dict[str, list[float]],
    seeds: Sequence[int],
    report_seeds: Sequence[int] = (),
    *,
    processes: int = 1,
    extend: bool = False,
    **settings: Any,
) -> pd.DataFrame:
    """Choose a step size for every rule, run it on fresh seeds, and write records, configuration and summary.

    Args:
        folder: where to; made when it does not exist, continued when it was made with the same settings.
        task: a name of `setups.SETUPS`.
        step_sizes: of every rule.
        seeds: to choose the step size with.
        report_seeds: to report; none of `seeds`.
        processes: see `run_all`.
        extend: allow an existing folder to get more rules, step sizes or seeds.
        **settings: others of `Run`: `optimizer`, `device`, `sequences`, `steps`, `evaluations`.

    Returns:
        `records.summary`, also written as `summary.csv` with its provenance.

    Raises:
        ValueError: a setting is wrong, or the folder was made with others.
        RuntimeError: see `run_all`.
    """
    checks.require_at_least("processes", processes, 1)
    if both := sorted(set(seeds) & set(report_seeds)):
        raise ValueError(f"report_seeds: expected none of the seeds that choose the step size, got {both}")
    step_sizes = {rule: sorted(sizes) for rule, sizes in step_sizes.items()}
    first = grid(task, step_sizes, sorted(seeds), **settings)
    if not first:
        raise ValueError("grid: expected at least one rule, step size and seed, got an empty grid")
    shared = {name: value for name, value in asdict(first[0]).items() if name not in VARIED}
    config = shared | {"step_sizes": step_sizes, "seeds": sorted(seeds), "report_seeds": sorted(report_seeds)}
    claim(folder, config, extend)
    run_all(first, folder, processes)
    choices = records.best_learning_rates(records.load_records(folder))
    best = dict(zip(choices["rule"], choices["learning_rate"], strict=True))
    chosen = {rule: [best[rule]] for rule in step_sizes}
    run_all(grid(task, chosen, sorted(report_seeds), "report", **settings), folder, processes)
    table = records.summary(records.load_records(folder))
    write_table(folder / "summary.csv", table, provenance(shared["device"], configuration=config))
    return table


def parse_rules(rules: Sequence[str], learning_rates: Sequence[float]) -> dict[str, list[float]]:
    """Step sizes of every rule: those after its `@`, or else those of `--learning-rates`.

    Raises:
        ValueError: a rule is unknown, comes twice, or has no step sizes.

    Example:
        >>> parse_rules(["ntk", "trpo@0.001,0.01"], [0.1])
        {'ntk': [0.1], 'trpo': [0.001, 0.01]}
    """
    step_sizes: dict[str, list[float]] = {}
    for text in rules:
        rule, _, own = text.partition("@")
        rule_specs.parse(rule)
        if rule in step_sizes:
            raise ValueError(f"rules: expected every rule once, got {rule} twice")
        try:
            step_sizes[rule] = [float(size) for size in own.split(",")] if own else list(learning_rates)
        except ValueError:
            raise ValueError(f"rules: expected numbers after the @ of {rule}, got {own!r}") from None
        if not step_sizes[rule]:
            raise ValueError(f"rules: expected step sizes for {rule}, by --learning-rates or {rule}@0.01,0.03")
    return step_sizes


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    tasks = "\n".join(f"  {name:16s}{setup.description}" for name, setup in SETUPS.items())
    rules = "\n".join(f"  {name:16s}{', '.join(rule_specs.options_of(name))}" for name in rule_specs.RULES)
    parser = argparse.ArgumentParser(
        prog="python -m isopo_mini.training.experiments",
        description=__doc__,
        epilog=f"tasks:\n{tasks}\n\nrules and their options:\n{rules}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("task", help="see below")
    parser.add_argument("--rules", nargs="+", required=True, help="such as reinforce ntk:damping=0.1 trpo@0.001,0.01")
    parser.add_argument("--learning-rates", nargs="+", type=float, default=[], help="step sizes that every rule tries")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="to choose the step size (0 1 2)")
    parser.add_argument("--report-seeds", nargs="*", type=int, default=[], help="to report at the best step size")
    parser.add_argument("--optimizer", choices=OPTIMIZERS, default="adamw")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="runs at a time (all cores)")
    parser.add_argument("--out", type=Path, required=True, help="folder for records, configuration and summary")
    parser.add_argument("--extend", action="store_true", help="add rules, step sizes or seeds to an existing folder")
    for name in ("sequences", "steps", "evaluations"):
        parser.add_argument(f"--{name}", type=int, help="other than the task's")
    given = vars(parser.parse_args(arguments))
    try:
        step_sizes = parse_rules(given.pop("rules"), given.pop("learning_rates"))
        table = compare(given.pop("out"), given.pop("task"), step_sizes, given.pop("seeds"), **given)
    except (ValueError, RuntimeError) as error:
        sys.exit(f"error: {error}")
    shown = "rule learning_rate at_edge choose_score seeds diverged score score_low score_high"
    print(table[shown.split()].to_string(index=False, float_format="%.4g"))
    if (table["at_edge"] != "").any():
        print("at_edge: the best step size is the end of its grid; a wider one (--extend) might do better.")


if __name__ == "__main__":
    main()
