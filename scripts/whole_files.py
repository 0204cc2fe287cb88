"""Write a text whole or not at all, for scripts that run before the package is installed."""

import os
from pathlib import Path


def write_whole(path: Path, text: str) -> None:
    """Write beside the file, then rename: whoever is interrupted in between leaves the old file."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        beside.write_text(text, encoding="utf-8")
        os.replace(beside, path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
