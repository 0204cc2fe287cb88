"""The whole book as one PDF, from the pages that `make book` has built: solutions at the end, links inside the file.

    python scripts/make_pdf.py [--chromium PATH]    # writes _build/isopo.pdf

The pages are put one behind the other into `_build/html/print.html`, which Chromium prints when MathJax has set the
formulas. Nothing is loaded from elsewhere. Debian and Ubuntu have the browser as `chromium`; Chrome serves as well.
"""

import argparse
import posixpath
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from urllib.parse import urlsplit

import yaml
from bs4 import BeautifulSoup, Tag
from whole_files import write_whole

ROOT = Path(__file__).resolve().parent.parent
HTML = ROOT / "_build" / "html"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
PATIENCE = 600_000  # milliseconds for the formulas, by Chromium's own clock, which stands still while it computes
# What is of use on a screen only, and the folded cells that are no solution: setting up, drawing.
NOT_PRINTED = (
    "script, a.headerlink, .toctree-wrapper, button, .tag_setup, details.hide.above-input, .explorable-controls"
)
# As on the pages themselves: only what Sphinx marks as a formula is one.
FORMULAS = 'window.MathJax = {options: {processHtmlClass: "tex2jax_process|mathjax_process|math|output_area"}}'
STYLE = """
@page { size: A4; margin: 18mm 16mm; }
html { font-size: 10.5pt; }
body { background: #fff; color: #000; }
main { max-width: none; }
section.page { break-before: page; }
img { max-width: 100%; height: auto; }
h1, h2, h3 { break-after: avoid; }
.cell_output, .math, tr, dt { break-inside: avoid; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; font-size: 8.5pt; }
.pst-scrollable-table-container, .text_html, div.math { overflow: visible !important; }
table { font-size: 8.5pt; max-width: 100%; }
td code, td code .pre { white-space: normal !important; overflow-wrap: anywhere !important; }
"""


def pages(root: Path = ROOT) -> list[str]:
    """Every page of the book in its order, as `_toc.yml` has it."""
    toc = yaml.safe_load((root / "_toc.yml").read_text(encoding="utf-8"))
    files = [toc["root"]]
    for part in toc["parts"]:
        for page in part["chapters"]:
            files += [page["file"], *(section["file"] for section in page.get("sections", []))]
    return files


def name(page: str, place: str = "") -> str:
    """What a place of a page is called in the one file, where every page has a Figure 1."""
    return page.replace("/", ".") + (f"--{place}" if place else "")


def article(page: str, html: str, known: set[str]) -> Tag:
    """A page's text, with names and links that hold in the one file."""
    text = BeautifulSoup(html, "html.parser").select_one("article")
    if text is None:
        raise ValueError(f"{page}: expected a built page with an <article>, got none")
    for part in text.select(NOT_PRINTED):
        part.decompose()
    for part in text.select("[id]"):
        part["id"] = name(page, str(part["id"]))
    folder = posixpath.dirname(page)
    for picture in text.select("img[src]"):
        picture["src"] = posixpath.normpath(posixpath.join(folder, str(picture["src"])))
    for link in text.select("a[href]"):
        address = urlsplit(str(link["href"]))
        if address.scheme or address.netloc:
            continue
        path = posixpath.normpath(posixpath.join(folder, address.path)) if address.path else f"{page}.html"
        target = path.removesuffix(".html")
        if target in known:
            link["href"] = "#" + name(target, address.fragment)
        else:
            del link["href"]  # the source code's pages are not printed
    text.name = "section"
    text["class"] = "page bd-article"
    text["id"] = name(page)
    return text


def take_solutions(text: Tag) -> list[Tag]:
    """Take what is folded out of a page, unfolded, and leave a word in its place."""
    taken = []
    for folded in text.select("details"):
        folded.name = "div"
        for summary in folded.select("summary"):
            summary.decompose()
        exercise = folded.find_previous("h3")
        if exercise is not None:
            heading = BeautifulSoup("<h3></h3>", "html.parser").h3
            heading.string = exercise.get_text()  # type: ignore[union-attr]
            folded.insert(0, heading)  # type: ignore[arg-type]
        place = BeautifulSoup("<p><em>The solution stands at the end of the book.</em></p>", "html.parser")
        folded.replace_with(place)
        taken.append(folded)
    return taken


def one_page(root: Path = ROOT, html: Path = HTML) -> str:
    """The book as one page of HTML."""
    files = pages(root)
    body, solutions = [], ["<section class='page bd-article' id='solutions'><h1>Solutions</h1>"]
    for page in files:
        text = article(page, (html / f"{page}.html").read_text(encoding="utf-8"), set(files))
        title = text.find("h1")
        taken = take_solutions(text)
        if taken:
            solutions.append(f"<h2>{title.get_text() if title else page}</h2>")
            solutions += [f"<hr />{solution}" for solution in taken]
        body.append(str(text))
    sheets = "".join(
        f'<link rel="stylesheet" href="_static/{sheet}" />'
        for sheet in ("styles/theme.css", "styles/pydata-sphinx-theme.css", "pygments.css", "book.css")
    )
    return (
        '<!DOCTYPE html><html lang="en" data-theme="light"><head><meta charset="utf-8" />'
        f"<title>ISOPO from scratch</title>{sheets}<style>{STYLE}</style>"
        f"<script>{FORMULAS}</script>"
        '<script defer src="_static/mathjax/tex-chtml.js"></script></head>'
        f'<body><main class="bd-content">{"".join(body)}{"".join(solutions)}</section></main></body></html>'
    )


def print_page(browser: str, page: Path, pdf: Path) -> None:
    """Let Chromium print a page, without a profile of anybody."""
    with tempfile.TemporaryDirectory() as profile:
        options = [f"--user-data-dir={profile}", "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run"]
        options += ["--disable-background-networking", "--disable-sync", "--disable-component-update"]
        options += ["--allow-file-access-from-files", "--no-pdf-header-footer"]
        options += [f"--virtual-time-budget={PATIENCE}", "--generate-pdf-document-outline", f"--print-to-pdf={pdf}"]
        subprocess.run([browser, *options, page.as_uri()], check=True, stderr=subprocess.DEVNULL)


def main() -> int:
    """Write the PDF; the exit status says whether there was a browser and a built book."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chromium", help="the browser, when it is not found by its name")
    browser = parser.parse_args().chromium or next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        print("No Chromium was found: install it, or say where it is with --chromium")
        return 1
    if not (HTML / "index.html").exists():
        print("There is no book yet: type make book first")
        return 1
    page, pdf = HTML / "print.html", ROOT / "_build" / "isopo.pdf"
    write_whole(page, one_page())
    try:
        print_page(browser, page, pdf)
    finally:
        page.unlink()
    print(f"The book is at {pdf.relative_to(ROOT)}, {pdf.stat().st_size / 1e6:.1f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
