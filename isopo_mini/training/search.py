"""Which step sizes to try next: one search for every rule and optimizer, so that none is better tuned than another.

A search starts from a few step sizes that lie far apart. Then the double and the half of the best one are tried, and
so on, until both of them are known not to be better. A best one at the edge of what was tried cannot end it.
"""

import math
from collections.abc import Iterable, Sequence

import pandas as pd

from isopo_mini.training import records
from isopo_mini.training.record_files import split_label

FACTOR = 2.0
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
