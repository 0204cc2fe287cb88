"""Compare update rules on a task: a grid of runs in parallel processes, one record a run, and a summary of them.

    python -m isopo_mini.experiments bandit --rules reinforce ntk:damping=0.1 grpo \\
        --learning-rates 0.01 0.03 0.1 --seeds 0 1 2 --report-seeds 100 101 102 103 104 --out results/bandit

First every rule is run with every step size and every seed of `--seeds`; then every rule with the one step size that
had the best mean score is run with the seeds of `--report-seeds`, and only those are reported. Rules are those of
`rule_specs`, tasks those of `setups`.

A rule may have step sizes and an optimizer of its own: `rule/sgd@0.01,0.03`; otherwise it is run with all that are
given for every rule. `|` stands between alternatives: `ntk:damping=1|10/sgd|adamw@0.1,0.3` are four. What differs in
nothing but such choices is one family, and `--report best` reports the best of each family alone.

With `--search` the step sizes are where a search starts, which ends when the double and the half of the best one are
known not to be better. With `--screen 1` it is made with the first seed alone, and what is best of each family then is
tried with all of them. See `search`.

A command that was stopped, by whatever means, continues when it is given again, and ends with the same table (its
seconds apart); a folder made with other settings or other code is refused. `--extend` continues it with more rules,
step sizes or seeds. The same command may run several times at once, here or on other machines that see the folder;
`--cluster` runs it on a Dask cluster, whose workers see the folder under the same path and have one thread each.

Times are of use only when the machine does nothing else: give `--processes 1` when seconds are what you compare.
"""

import argparse
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Executor
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd

from isopo_mini import checks
from isopo_mini.experiments import records, search
from isopo_mini.experiments.families import parse_rules as parse_rules
from isopo_mini.experiments.pool import run_all as run_all
from isopo_mini.experiments.provenance import provenance, source_hash, write_table
from isopo_mini.experiments.record_files import (
    FINALISTS,
    VARIED,
    claim,
    read_configuration,
    require_same_code,
    split_label,
)
from isopo_mini.experiments.runs import Run
from isopo_mini.experiments.setups import SETUPS
from isopo_mini.rules import rule_specs
from isopo_mini.rules.optimizers import OPTIMIZERS


def grid(
    task: str,
    step_sizes: dict[str, list[float]],
    seeds: Iterable[int],
    phase: str = "choose",
    optimizer: str = "adamw",
    **settings: Any,
) -> list[Run]:
    """All runs of every rule with each of its step sizes and every seed.

    Args:
        task: a name of `setups.SETUPS`.
        step_sizes: of every rule, or of every `"rule/optimizer"`.
        seeds: for all of them.
        phase: `"choose"` or `"report"`.
        optimizer: of the rules that name none.
        **settings: others of `Run`.

    Raises:
        ValueError: a setting is wrong, or two runs would have one record.
    """
    seeds = list(seeds)
    labels = {text: split_label(text, optimizer) for text in step_sizes}
    runs = [
        Run(task, labels[text][0], step_size, seed, phase, labels[text][1], **settings)
        for seed in seeds  # outermost, so that a grid cut short has tried everything once
        for text, sizes in step_sizes.items()
        for step_size in sizes
    ]
    names = [one.file_name for one in runs]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"grid: expected every rule, step size and seed once, got {twice} twice")
    return runs


def compare(
    folder: Path,
    task: str,
    step_sizes: dict[str, list[float]],
    seeds: Sequence[int],
    report_seeds: Sequence[int] = (),
    *,
    processes: int = 1,
    executor: Executor | None = None,
    families: dict[str, list[str]] | None = None,
    report: Sequence[str] = ("all",),
    searching: bool = False,
    screen: int | None = None,
    extend: bool = False,
    mixed_code: bool = False,
    optimizer: str = "adamw",
    **settings: Any,
) -> pd.DataFrame:
    """Choose a step size for every rule, run it on fresh seeds, and write records, configuration and summary.

    Args:
        folder: where to; made when it does not exist, continued when it was made with the same settings.
        task: a name of `setups.SETUPS`.
        step_sizes: of every rule, or of every `"rule/optimizer"`.
        seeds: to choose the step size with.
        report_seeds: to report; none of `seeds`.
        processes, executor: see `pool.run_all`.
        families: those keys of `step_sizes` that are choices of one method, by its name.
        report: which keys of `step_sizes` to report; `"all"`, and `"best"` for the best one of every family.
        searching: take `step_sizes` as the start of a search, see `search`.
        screen: how many of the seeds the search is made with; all when None.
        extend: allow an existing folder to get more rules, step sizes or seeds.
        mixed_code: allow records that other code has made.
        optimizer: of the rules that name none.
        **settings: others of `Run`: `device`, `sequences`, `steps`, `evaluations`.

    Returns:
        `records.summary`, also written as `summary.csv` with its provenance.

    Raises:
        ValueError: a setting is wrong, or the folder was made with others.
        RuntimeError: see `pool.run_all`.
    """
    checks.require_at_least("processes", processes, 1)
    if both := sorted(set(seeds) & set(report_seeds)):
        raise ValueError(f"report_seeds: expected none of the seeds that choose the step size, got {both}")
    families = families or {text: [text] for text in step_sizes}
    if unknown := sorted(set(report) - {"all", "best"} - set(step_sizes)):
        raise ValueError(f"report: expected all, best, or one of {', '.join(step_sizes)}; got {unknown[0]}")
    shared = settings | {"optimizer": optimizer}
    sizes = {text: sorted(some) for text, some in step_sizes.items()}
    first = grid(task, sizes, sorted(seeds), **shared)
    if not first:
        raise ValueError("grid: expected at least one rule, step size and seed, got an empty grid")
    common = {name: value for name, value in asdict(first[0]).items() if name not in VARIED} | {"optimizer": optimizer}
    config = common | {"seeds": sorted(seeds), "report_seeds": sorted(report_seeds)}
    if screen is not None:
        checks.require_at_least("screen", screen, 1)
        config["screen"] = screen
    if searching:
        config["searching"] = True
        for text, some in ((read_configuration(folder) or {}).get("step_sizes", {})).items():
            if text in sizes:  # what the search has come to before
                sizes[text] = sorted({*sizes[text], *some})
    if not mixed_code:
        require_same_code(folder, source_hash())

    def choosing_runs(sizes: dict[str, list[float]], seeds: Sequence[int], **more: Any) -> pd.DataFrame:
        """Make the folder that of these step sizes, run what is missing of them, and read all there is."""
        claim(folder, config | {"step_sizes": sizes} | more, extend, growing=searching or bool(more))
        run_all(grid(task, more.get(FINALISTS, sizes), seeds, **shared), folder, processes, executor)
        return records.load_records(folder)

    screening = sorted(seeds)[:screen]
    for _ in range(search.ROUNDS if searching else 1):
        runs = choosing_runs(sizes, screening)
        screened = runs[runs["seed"].isin(screening)].assign(finalist=True)
        wanted = search.refined(screened, sizes, optimizer) if searching else {}
        if not wanted:
            break
        sizes = {text: sorted([*some, *wanted.get(text, ())]) for text, some in sizes.items()}
    if screen is not None:
        finalists = search.finalists(screened, sizes, families, optimizer, report)
        runs = choosing_runs(sizes, sorted(seeds), **{FINALISTS: finalists})
    best = search.chosen(runs, families, optimizer, report)
    run_all(grid(task, best, sorted(report_seeds), "report", **shared), folder, processes, executor)
    table = records.summary(records.load_records(folder))
    origin = provenance(common["device"], configuration=read_configuration(folder))
    write_table(folder / "summary.csv", table, origin)
    return table


@contextmanager
def cluster(address: str | None) -> Iterator[Executor | None]:
    """The executor of a Dask cluster; None without an address.

    Raises:
        ValueError: Dask is not installed, or a worker has more than one thread: a run sets its process's own.
    """
    if address is None:
        yield None
        return
    try:
        from distributed import Client
    except ImportError:
        raise ValueError("cluster: expected Dask; install it with pip install 'isopo_mini[cluster]'") from None
    with Client(address) as client:
        if any(threads > 1 for threads in client.nthreads().values()):
            raise ValueError("cluster: expected workers with one thread each; start them with --nthreads 1")
        yield client.get_executor(pure=False, retries=0)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    tasks = "\n".join(f"  {name:16s}{setup.description}" for name, setup in SETUPS.items())
    rules = "\n".join(f"  {name:16s}{', '.join(rule_specs.options_of(name))}" for name in rule_specs.RULES)
    parser = argparse.ArgumentParser(
        prog="python -m isopo_mini.experiments",
        description=__doc__,
        epilog=f"tasks:\n{tasks}\n\nrules and their options:\n{rules}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("task", help="see below")
    parser.add_argument("--rules", nargs="+", required=True, help="such as reinforce ntk:damping=0.1 trpo@0.001,0.01")
    parser.add_argument("--learning-rates", nargs="+", type=float, default=[], help="step sizes that every rule tries")
    parser.add_argument("--search", action="store_true", help="search on from these step sizes, by factors of two")
    parser.add_argument("--screen", type=int, metavar="N", help="search with the first N of the seeds")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="to choose the step size (0 1 2)")
    parser.add_argument("--report-seeds", nargs="*", type=int, default=[], help="to report at the best step size")
    parser.add_argument("--report", nargs="+", default=["all"], help="all, best (of each family), or rules (all)")
    parser.add_argument("--optimizer", nargs="+", choices=OPTIMIZERS, default=["adamw"], help="those every rule tries")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="runs at a time (all cores)")
    parser.add_argument("--cluster", metavar="ADDRESS", help="of a Dask scheduler, such as tcp://10.0.0.1:8786")
    parser.add_argument("--out", type=Path, required=True, help="folder for records, configuration and summary")
    parser.add_argument("--extend", action="store_true", help="add rules, step sizes or seeds to an existing folder")
    parser.add_argument("--mixed-code", action="store_true", help="continue what other code has begun")
    for name in ("sequences", "steps", "evaluations"):
        parser.add_argument(f"--{name}", type=int, help="other than the task's")
    given = vars(parser.parse_args(arguments))
    try:
        optimizers = given.pop("optimizer")
        step_sizes, families = parse_rules(given.pop("rules"), given.pop("learning_rates"), optimizers)
        with cluster(given.pop("cluster")) as executor:
            table = compare(
                given.pop("out"),
                given.pop("task"),
                step_sizes,
                given.pop("seeds"),
                executor=executor,
                families=families,
                searching=given.pop("search"),
                optimizer=optimizers[0],
                **given,
            )
    except (ValueError, RuntimeError) as error:
        sys.exit(f"error: {error}")
    shown = "rule optimizer learning_rate at_edge choose_score seeds diverged score score_low score_high"
    print(table[shown.split()].to_string(index=False, float_format="%.4g"))
    if (table["at_edge"] != "").any():
        print("at_edge: the best step size is the end of its grid; a wider one (--search, --extend) might do better.")
