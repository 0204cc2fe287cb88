"""Where the masters are, and what the assignments are called."""

from pathlib import Path

MASTERS = Path(__file__).resolve().parent.parent.parent / "coursework"
NAMES = sorted(path.stem for path in MASTERS.glob("*.ipynb"))
