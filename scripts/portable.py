"""Does every claim of the book hold on other processors and with other seeds? And by how much?

    python scripts/portable.py                                   # make portable: all chapters, all settings
    python scripts/portable.py --settings ordinary seeds+1000    # some of the settings
    python scripts/portable.py --chapters book/isopo/*.ipynb     # some of the chapters
    python scripts/portable.py --update --chapters …              # some of the chapters, in place of their old rows
    python scripts/portable.py --changed                         # what .ci/run does: see `changed`

It runs the chapters (`execute_chapters.py`), prints every assert that does not hold with both sides, and every claim
that holds by luck, and fails when there is one. All claims go to a table: of a whole run to `results/portability`,
which the book shows, of any other to `_build/margins.csv`. After a chapter has changed, `--update` runs it under all
settings and puts its rows in the place of the old ones.
"""

import argparse
import json
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import build_book
import numpy as np
import pandas as pd
from chapter_records import ROOT, Record, chapters, code_cells, failure_report
from claim_rewriting import claims_in
from execute_chapters import SETTINGS, Setting, execute_all

from isopo_mini.experiments.provenance import provenance, write_table

TABLE = ROOT / "results" / "portability" / "claims.csv"
DRAFT = ROOT / "_build" / "margins.csv"
LEFT = 0.15  # of the larger side
STANDARD_ERRORS = 3.0
MOVES = 1e-6  # relative; a smaller change from setting to setting is rounding


def standard_error(records: list[Record]) -> float:
    """How much a claim's distance scatters: over the seeds, or over the processors where that is more."""
    by_shift: dict[int, list[float]] = defaultdict(list)
    for record in records:
        by_shift[SETTINGS[record["setting"]].shift].append(record["distance"])
    over_seeds = [float(np.mean(distances)) for distances in by_shift.values()]
    over_processors = by_shift[0]
    return max((float(np.std(x, ddof=1)) for x in (over_seeds, over_processors) if len(x) > 1), default=0.0)


def margin(records: list[Record]) -> Record:
    """One claim over all settings: its tightest measurement, and whether it holds by luck.

    A claim that comes out the same everywhere is exact. One that moves must keep 15 % of the larger side as distance,
    or three standard errors; where one side is 0, there is no larger side to speak of, and it must be three. A theorem
    (`certain`) may come as near as it likes.
    """
    first = records[0]
    row = {name: first[name] for name in ("chapter", "cell", "claim")} | {"held": all(r["held"] for r in records)}
    measured = [record for record in records if "distance" in record and np.isfinite(record["distance"])]
    if not measured:
        return row | {"settings": len(records), "moves": False, "thin": False}
    worst = min(measured, key=lambda record: record["slack"])
    distances = np.array([record["distance"] for record in measured])
    moves = bool(np.ptp(distances) > MOVES * np.abs(distances).max())
    error = standard_error(measured)
    errors = float(distances.mean() / error) if error > 0 else np.inf
    relative = worst["slack"] if worst["left"] and worst["right"] else 0.0
    row |= {name: worst[name] for name in ("compared", "left", "sign", "right", "slack", "setting")}
    row |= {"settings": len(records), "moves": moves, "standard_errors": errors}
    by_luck = moves and relative < LEFT and errors < STANDARD_ERRORS
    return row | {"thin": by_luck and not first["certain"]}


def margins(records: list[Record]) -> pd.DataFrame:
    """One row a claim."""
    groups: dict[tuple, list[Record]] = defaultdict(list)
    for record in records:
        if "claim" in record:
            groups[record["chapter"], record["cell"], record["line"], record["claim"]].append(record)
    return pd.DataFrame([margin(group) for group in groups.values()])


def told(row: pd.Series) -> str:
    """A claim in two lines: where and what; both sides, the limit's share that is left, in which setting."""
    text = f"{row.chapter} [{row['cell']}]  {row.claim}"
    if pd.isna(row.get("left")):
        return text
    sides = f"{row.left:.6g} {row.sign} {row.right:.6g}"
    return f"{text}\n      {sides}, {row.slack:.1%} left, {row.standard_errors:.1f} standard errors ({row.setting})"


def changed(root: Path = ROOT) -> tuple[list[Path], Setting]:
    """What a commit is tried with: the chapters changed since the last tag, or else one; and one perturbed setting.

    The commit's number (how many there are before it) chooses, so that in time everything is tried. Where no version
    has been tagged yet, every chapter counts as changed.
    """

    def git(*words: str) -> list[str]:
        command = ["git", *words]
        found = subprocess.run(command, cwd=root, capture_output=True, encoding="utf-8", check=False)
        return found.stdout.split()

    every, tag = chapters(root / "book"), git("describe", "--tags", "--abbrev=0")
    number = int((git("rev-list", "--count", "HEAD") or ["0"])[0])
    perturbed = [setting for setting in SETTINGS.values() if setting.name != "ordinary"]
    setting = perturbed[number % len(perturbed)]
    if not tag:
        return every, setting
    names = set(git("diff", "--name-only", tag[0], "--", "book"))
    found = [path for path in every if path.relative_to(root).as_posix() in names]
    return found or [every[number % len(every)]], setting


def run(chosen: list[Path], settings: list[Setting], jobs: int | None) -> tuple[list[Record], pd.DataFrame]:
    """Every record, and one row a setting: how many chapters, asserts and failures, and how long they took."""
    records: list[Record] = []
    rows = []
    for setting in settings:
        found, seconds = execute_all(chosen, setting, jobs)
        records += found
        failed = sum("error" in record or not record["held"] for record in found)
        row = {"setting": setting.name, "chapters": len(seconds), "asserts": len(found), "failed": failed}
        rows.append(row | {"seconds": round(sum(seconds.values()))})
    return records, pd.DataFrame(rows)


def report(records: list[Record], table: pd.DataFrame, settings: list[Setting]) -> bool:
    """Print what is wrong; True when nothing is."""
    broken = [record for record in records if "error" in record]
    lost, thin = table[~table["held"]], table[table["thin"] & table["held"]]
    if broken:
        again = "python scripts/portable.py --chapters {chapter} --settings " + " ".join(s.name for s in settings)
        print("\nThese cells failed:\n\n" + failure_report(broken, again))
    for title, rows in (("These claims do not hold everywhere", lost), ("These hold by luck", thin)):
        if len(rows):
            print(f"\n{title} ({len(rows)}):\n\n" + "\n".join(told(row) for _, row in rows.iterrows()))
    counts = f"{len(lost)} do not hold everywhere, {len(thin)} hold by luck, {len(broken)} cells failed"
    print(f"\n{len(table)} asserts: {counts}")
    return not (len(lost) or len(thin) or broken)


def updated(table: pd.DataFrame, old: pd.DataFrame) -> pd.DataFrame:
    """The old table with the rows of some chapters replaced by new ones, in the order of chapters."""
    rest = old[~old["chapter"].isin(table["chapter"])]
    return pd.concat([rest, table]).sort_values("chapter", kind="stable", ignore_index=True)


def not_measured(root: Path = ROOT) -> dict[str, set[str]]:
    """The claims of each chapter that are not in the table, because they came or changed since it was made."""
    path = root / TABLE.relative_to(ROOT)
    table = pd.read_csv(path) if path.exists() else pd.DataFrame({"chapter": [], "claim": []})
    measured = table.groupby("chapter")["claim"].agg(set).to_dict()
    found: dict[str, set[str]] = {}
    for chapter in chapters(root / "book"):
        name = chapter.relative_to(root).as_posix()
        said = set().union(*map(claims_in, code_cells(chapter))) - measured.get(name, set())
        if said:
            found[name] = said
    return found


def main() -> int:
    """Run, print, and say by the exit status whether every claim held and none by luck."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chapters", nargs="+", type=Path, help="notebooks; all when left out")
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS), metavar="SETTING")
    parser.add_argument("--update", action="store_true", help="replace these chapters' rows in the whole table")
    parser.add_argument("--changed", action="store_true", help="one setting, on what changed since the last tag")
    parser.add_argument("--jobs", type=int, help="chapters at a time; as many as there are cores when left out")
    options = parser.parse_args()
    chosen = [path.resolve() for path in options.chapters or chapters(ROOT / "book")]
    settings = [SETTINGS[name] for name in options.settings]
    if options.changed:
        chosen, setting = changed()
        settings = [setting]
        print(f"Trying {len(chosen)} chapters under the setting {setting.name}: {setting.environment or 'other seeds'}")
    records, overview = run(chosen, settings, options.jobs)
    table = margins(records)
    print("\n" + overview.to_string(index=False))
    good = report(records, table, settings)
    if options.changed and (new := not_measured()):
        counts = "\n".join(f"  {chapter}: {len(said)}" for chapter, said in new.items())
        print(f"\nNot measured under every setting yet (--update --chapters … does it):\n{counts}")
    every_setting = set(overview["setting"]) == set(SETTINGS)
    origin = provenance(runs=overview.to_dict("records"))
    if options.update:
        if not every_setting or any("error" in record for record in records):
            sys.exit("Nothing is updated: expected every setting, and cells that do not fail")
        origin = json.loads(TABLE.with_suffix(".json").read_text(encoding="utf-8")) | {"updated": origin}
        write_table(TABLE, updated(table, pd.read_csv(TABLE)), origin)
    else:
        write_table(TABLE if every_setting and not options.chapters else DRAFT, table, origin)
    return not good


if __name__ == "__main__":
    build_book.say_what_the_screen_can()
    sys.exit(main())
