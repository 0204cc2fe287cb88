"""Build one chapter as a page of its own, in seconds: `make draft CHAPTER=book/foundations/01_….ipynb`.

The page is as strict as in the whole book, with one exception: links to chapters that are not built along
lead nowhere and are let through.
"""

import argparse
from pathlib import Path

import build_book
import yaml

ROOT = Path(__file__).resolve().parent.parent
BIBLIOGRAPHY = "book/appendix/references"


def build(chapter: Path) -> Path:
    """Build the chapter and return its page; a failing cell or a warning ends the program."""
    page = chapter.resolve().relative_to(ROOT).with_suffix("")
    folder = ROOT / "_build" / "draft" / page.name
    folder.mkdir(parents=True, exist_ok=True)
    config = build_book.configuration(ROOT)
    config["sphinx"]["config"]["suppress_warnings"] = ["myst.xref_missing"]
    toc = {"format": "jb-book", "root": page.as_posix(), "chapters": [{"file": BIBLIOGRAPHY}]}
    if page.as_posix() == BIBLIOGRAPHY:
        del toc["chapters"]
    (folder / "_config.yml").write_text(yaml.safe_dump(config), encoding="utf-8")
    (folder / "_toc.yml").write_text(yaml.safe_dump(toc), encoding="utf-8")
    where = ["--config", str(folder / "_config.yml"), "--toc", str(folder / "_toc.yml"), "--path-output", str(folder)]
    status = build_book.build(ROOT, jobs=1, options=where, records=folder / "claims")
    if status:
        raise SystemExit(status)
    return folder / "_build" / "html" / page.with_suffix(".html")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("chapter", type=Path)
    arguments = parser.parse_args()
    if not arguments.chapter.is_file():
        parser.error(f"{arguments.chapter}: no such file")
    print(f"The page is at {build(arguments.chapter).relative_to(ROOT)}")
