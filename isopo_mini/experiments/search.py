"""Which step sizes to try next: one search for every rule and optimizer, so that none is better tuned than another.

A search starts from a few step sizes that lie far apart. Then the double and the half of the best one are tried, and
so on, until both of them are known not to be better. A best one at the edge of what was tried cannot end it.

Where there are many optimizers and options, a *screening* does this with few seeds. What comes out best of each family
then is tried with all of them: its finalists, at their best step sizes and the two beside, and one of them is chosen.
"""

import math
from collections.abc import Iterable, Sequence

import pandas as pd

from isopo_mini.experiments import records
from isopo_mini.experiments.record_files import split_label

FACTOR = 2.0
# Members of a family that are tried with all seeds after a screening.
FINALISTS = 2
# Doublings are no longer tried beyond this: of a rule that learns nothing, every step size is the best.
ROUNDS = 12
_SAME = 0.02  # relative; step sizes are written with few digits


def refined(runs: pd.DataFrame, step_sizes: dict[str, list[float]], optimizer: str) -> dict[str, list[float]]:
    """The step sizes that the search wants to know next.

    Args:
        runs: `records.load_records`; all of `step_sizes` with the same seeds.
        step_sizes: what was tried, by `"rule"` or `"rule/optimizer"`.
        optimizer: of those that name none.

    Returns:
        New step sizes by the same texts; those whose search has ended are left out.
    """
    best = _choices(runs, step_sizes, optimizer)["learning_rate"]
    more = {}
    for text, tried in step_sizes.items():
        wanted = [float(f"{best[text] * factor:.4g}") for factor in (1 / FACTOR, FACTOR)]
        missing = [size for size in wanted if not any(math.isclose(size, one, rel_tol=_SAME) for one in tried)]
        if missing:
            more[text] = missing
    return more


def finalists(
    runs: pd.DataFrame,
    step_sizes: dict[str, list[float]],
    families: dict[str, list[str]],
    optimizer: str,
    wanted: Sequence[str],
) -> dict[str, list[float]]:
    """After a screening: what is to be tried with all seeds.

    Args:
        runs: `records.load_records`, as far as the screening's seeds go.
        step_sizes, families, optimizer: as for `refined` and `chosen`.
        wanted: members that are tried whatever the screening says.

    Returns:
        The best members of every family and those wanted, each with its best step size, the one below and above.
    """
    choices = _choices(runs, step_sizes, optimizer)
    best = [
        text
        for members in families.values()
        for text in choices.loc[members, "choose_score"].sort_values(kind="stable").index[::-1][:FINALISTS]
    ]
    found = {}
    for text, tried in step_sizes.items():
        if text in best or text in wanted or "all" in wanted:
            place = sorted(tried).index(choices["learning_rate"].to_dict()[text])
            found[text] = sorted(tried)[max(0, place - 1) : place + 2]
    return found


def chosen(
    runs: pd.DataFrame, families: dict[str, list[str]], optimizer: str, wanted: Sequence[str]
) -> dict[str, list[float]]:
    """The best step size of whatever is to be reported.

    Args:
        runs: `records.load_records`.
        families: `"rule"` or `"rule/optimizer"`, those that are choices of one method together.
        optimizer: of those that name none.
        wanted: some of them; `"all"`; `"best"` for the one of every family with the highest mean score.
    """
    table = records.best_learning_rates(runs)
    in_it = set(zip(table["rule"], table["optimizer"], strict=True))  # after a screening, its finalists only
    families = {
        name: [text for text in members if split_label(text, optimizer) in in_it] for name, members in families.items()
    }
    texts = [text for members in families.values() for text in members]
    choices = _choices(runs, texts, optimizer)
    best = [choices.loc[members, "choose_score"].idxmax() for members in families.values()]
    some = [text for text in texts if "all" in wanted or text in wanted or ("best" in wanted and text in best)]
    return {text: [choices["learning_rate"].to_dict()[text]] for text in some}


def _choices(runs: pd.DataFrame, texts: Iterable[str], optimizer: str) -> pd.DataFrame:
    """The rows of `records.best_learning_rates`, by text."""
    table = records.best_learning_rates(runs).set_index(["rule", "optimizer"])
    texts = list(texts)
    return table.loc[[split_label(text, optimizer) for text in texts]].set_axis(pd.Index(texts))
