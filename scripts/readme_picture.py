"""Draw the README's picture: the figure of the book's first page, made by running that page's cells up to it.

python scripts/readme_picture.py    # writes book/_static/first_figure.png and its alt text into README.md
"""

import json
import re
from pathlib import Path
from typing import Any
from unittest.mock import patch

import matplotlib
from matplotlib import pyplot as plt
from whole_files import write_whole

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "book" / "index.ipynb"
PICTURE = ROOT / "book" / "_static" / "first_figure.png"


def cells_up_to_the_figure(notebook: dict[str, Any]) -> tuple[list[str], str]:
    """The code cells that make the first figure, the last of them drawing it, and its alt text."""
    sources = []
    for cell in notebook["cells"]:
        if cell["cell_type"] != "code":
            continue
        sources.append("".join(cell["source"]))
        alt = cell["metadata"].get("mystnb", {}).get("image", {}).get("alt")
        if alt:
            return sources, alt
    raise ValueError("notebook: expected a cell with a figure, that is with mystnb.image.alt, got none")


def draw(sources: list[str], path: Path) -> None:
    """Run the cells and save the figure they leave open."""
    matplotlib.use("Agg")
    plt.close("all")
    namespace: dict[str, Any] = {}
    with patch.object(plt, "show"):  # it would close the figure
        for source in sources:
            exec(source, namespace)
        plt.gcf().savefig(path, dpi=160, metadata={"Software": None})
    plt.close("all")


def with_alt(readme: str, alt: str) -> str:
    """The README with the picture's alt text replaced."""
    return re.sub(rf"!\[[^]]*\]\({PICTURE.relative_to(ROOT)}\)", f"![{alt}]({PICTURE.relative_to(ROOT)})", readme)


def main() -> None:
    """Write the picture and its alt text."""
    sources, alt = cells_up_to_the_figure(json.loads(PAGE.read_text(encoding="utf-8")))
    draw(sources, PICTURE)
    readme = ROOT / "README.md"
    write_whole(readme, with_alt(readme.read_text(encoding="utf-8"), alt))
    print(f"{PICTURE.relative_to(ROOT)}: {PICTURE.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
