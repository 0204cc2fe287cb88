"""Which architectures the engine gets right, by a handler or by copies, and which it refuses and why.

    python scripts/model_table.py results/models.csv

Needs the extra `models`: tiny models from the configuration classes of `transformers`; nothing is downloaded.
"""

import argparse
import sys
import warnings
from importlib.metadata import version
from pathlib import Path

import pandas as pd
import torch
from tqdm.auto import tqdm

from isopo_mini.experiments.provenance import provenance, write_table

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "models"))
from architectures import ARCHITECTURES, S, T
from reference import Outcome, outcome

ORDER = ("exact", "exact, with copies", "refused", "wrong")


def row(name: str) -> dict[str, object]:
    """One architecture: the worst of what was tried, with tied and untied heads, padding and checkpointing."""
    found = [
        outcome(name, tied=tied, padded=padded, checkpointing=checkpointing)
        for tied in (False, True)
        for padded in (False, True)
        for checkpointing in (False, True)
    ]
    worst: Outcome = max(found, key=lambda each: (ORDER.index(each.result), each.error))
    return {
        "architecture": name,
        "result": worst.result,
        "largest_error": max(each.error for each in found),
        "copied_parameters": max(len(each.copied) for each in found),
        "functions": " ".join(sorted({function for each in found for function in each.functions})),
        "why": worst.refused,
        "tried": len(found),
    }


def main() -> None:
    """Write the table and its provenance."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path)
    parser.add_argument("--only", nargs="*", choices=list(ARCHITECTURES), default=list(ARCHITECTURES))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    table = pd.DataFrame([row(name) for name in tqdm(arguments.only)])
    record = provenance(sequences=S, positions=T, transforms=["NTK", "Fisher"])
    record["libraries"] |= {name: version(name) for name in ("transformers", "peft")}
    write_table(arguments.path, table, record)
    print(table.to_string(index=False))


if __name__ == "__main__":
    main()
