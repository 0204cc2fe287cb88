"""Check built pages: nothing is loaded from another host, pictures say what they show, chapters are numbered right.

    python scripts/check_pages.py _build/html

Looked at are the tags that load something, style sheets and `style=`, scripts in a page and `onload=` and the like,
pages inside pages (`srcdoc`), and the style sheets and scripts beside the pages. A link that a reader may follow loads
nothing. Of a script only what stands where it is loaded is seen: `import`, `fetch`, `require`, `.src =` and their like,
with the address itself or a constant of that value. An address that a program puts together is beyond this.
"""

import re
import sys
from concurrent.futures import ProcessPoolExecutor
from html.parser import HTMLParser
from pathlib import Path

# The attributes by which a tag loads something.
LOADS = {
    **dict.fromkeys(("script", "iframe", "frame", "source", "track", "embed", "audio", "input"), ("src", "srcset")),
    "img": ("src", "srcset"),
    "video": ("src", "poster"),
    "object": ("data",),
    "link": ("href", "imagesrcset"),
    "base": ("href",),
    "image": ("href", "xlink:href"),  # of a drawing, as the next
    "use": ("href", "xlink:href"),
}
# What `rel=` of a <link> may say without making a browser load anything.
NOT_LOADED = {
    "next",
    "prev",
    "index",
    "search",
    "canonical",
    "author",
    "copyright",
    "license",
    "help",
    "alternate",
    "me",
}

ADDRESS = r"""(?:https?:|wss?:)?//[\w\[][^\s"'`<>)]*"""
QUOTED = rf"""\\?["'`]\s*({ADDRESS})"""
IN_STYLE = re.compile(rf"""(?:url\(\s*["']?|@import\s+["'])\s*({ADDRESS})""", re.IGNORECASE)
CALLS = (
    r"(?:import|fetch|importScripts|require|getScript|getJSON|sendBeacon|Worker|EventSource|WebSocket|Request"
    r"|\.(?:get|json|csv|tsv|text|load|ajax|addModule))"
)
IN_SCRIPT = re.compile(
    rf"""(?:
        \b(?:import|from)\s*                            # import "…", import x from "…"
        |{CALLS}\s*\(\s*                                # fetch("…"), new Worker("…"), d3.csv("…")
        |\.open\s*\([^,()]*,\s*                         # request.open("GET", "…")
        |\bsrc\s*=\s*                                   # script.src = "…", also in a text that becomes a page
        |\.setAttribute\s*\(\s*["']src["']\s*,\s*       # image.setAttribute("src", "…")
    ){QUOTED}""",
    re.VERBOSE,
)
# require(["…", "…"], …), and where RequireJS is told what its names stand for.
LISTS = re.compile(
    r"\b(?:require|requirejs|define)\s*\(\s*(\[[^\]]*\])|\b(?:require|requirejs)\.config\s*\((.*?)\)", re.DOTALL
)
CONSTANT = re.compile(rf"\b(?:const|let|var)\s+(\w{{3,}})\s*=\s*{QUOTED}")
COMMENT = re.compile(r"(?ms)(?<![^\s;{}(,])/\*.*?\*/|(?<![^\s;{}(,])//[^\n]*")
SCRIPT_TYPES = {"", "module", "text/javascript", "application/javascript", "text/ecmascript"}

# The number of a chapter: of its file, in its title, and in a line of the sidebar.
FILE_NUMBER = re.compile(r"0*(\d+)_.*")
# The title that can be linked to; the theme prints another, without a number, on paper alone.
TITLE = re.compile(r'<h1>\s*(?:<span class="section-number">(\d+)\.)?[^\n]*class="headerlink"')
IN_SIDEBAR = re.compile(r'<li class="toctree-l1[^>]*><a class="[^"]*" href="([^"]+)">(?:(\d+)\.)?')


def loaded_by_tag(tag: str, attributes: dict[str, str]) -> list[str]:
    """The addresses of other hosts that a tag loads by its attributes."""
    rels = set(attributes.get("rel", "").lower().split())
    if rels and rels <= NOT_LOADED:
        return []
    found = []
    for name in LOADS.get(tag, ()):
        value = attributes.get(name, "")
        parts = value.split(",") if name.endswith("srcset") else [value]
        found += [match[0] for part in parts if (match := re.match(ADDRESS, part.strip(), re.IGNORECASE))]
    return found


def loaded_by_style(css: str) -> list[str]:
    """The addresses of other hosts that a style sheet loads."""
    return IN_STYLE.findall(re.sub(r"(?s)/\*.*?\*/|@namespace[^;]*;", "", css))


def loaded_by_script(code: str) -> list[str]:
    """The addresses of other hosts that a script loads, as far as that can be seen."""
    code = COMMENT.sub("", code)
    constants = dict(CONSTANT.findall(code))
    if constants:
        code = re.sub(rf"\b(?:{'|'.join(constants)})\b", lambda name: f'"{constants[name[0]]}"', code)
    found = IN_SCRIPT.findall(code)
    for listed, configured in LISTS.findall(code):
        found += re.findall(QUOTED, listed or configured)
    return found


class Page(HTMLParser):
    """Collects what a page loads and which of its pictures lack a description."""

    def __init__(self) -> None:
        super().__init__()
        self.complaints: list[str] = []
        self.inside: tuple[str, str] = ("", "")  # the tag whose text is being read, and its type
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note one tag."""
        found = {name: value or "" for name, value in attrs}
        self._note(f"<{tag}>", loaded_by_tag(tag, found))
        for name, value in found.items():
            if name == "style":
                self._note(f"style of <{tag}>", loaded_by_style(value))
            if name.startswith("on"):
                self._note(f"{name} of <{tag}>", loaded_by_script(value))
            if name == "srcdoc":
                self.complaints += [f"inside <{tag}>: {complaint}" for complaint in complaints(value)]
        if tag == "img" and (not found.get("alt", "").strip() or re.search(r"\.(png|svg|jpg)$", found["alt"])):
            self.complaints.append(f"picture {found.get('src', '')} has no alt text")
        if tag in ("script", "style"):
            self.inside, self.text = (tag, found.get("type", "").lower()), ""

    def handle_data(self, data: str) -> None:
        """Collect the text of a script or style sheet."""
        if self.inside[0]:
            self.text += data

    def handle_endtag(self, tag: str) -> None:
        """Look at the script or style sheet that ends here."""
        inside, kind = self.inside
        if tag != inside:
            return
        if tag == "style":
            self._note("<style>", loaded_by_style(self.text))
        elif kind == "importmap":
            self._note("<script>", re.findall(QUOTED, self.text))
        elif kind in SCRIPT_TYPES:
            self._note("<script>", loaded_by_script(self.text))
        self.inside = ("", "")

    def _note(self, where: str, addresses: list[str]) -> None:
        """Complain of each of these."""
        self.complaints += [f"{where} loads {address}" for address in addresses]


def complaints(html: str) -> list[str]:
    """What is wrong with one page."""
    page = Page()
    page.feed(html)
    page.close()
    return page.complaints


def number_complaints(name: str, html: str) -> list[str]:
    """Where a page, or the sidebar on it, gives a chapter another number than its file's name begins with."""
    titles = [(name, title[1]) for title in TITLE.finditer(html)]
    titles += [(Path(link[1]).name, link[2]) for link in IN_SIDEBAR.finditer(html) if link[1] != "#"]
    return [
        f"{file} is called chapter {number or 'nothing'}, and its name says {expected or 'nothing'}"
        for file, number in titles
        if (expected := FILE_NUMBER.sub(r"\1", file) if FILE_NUMBER.match(file) else None) != number
    ]


def file_complaints(path: Path) -> list[str]:
    """What is wrong with a page, or with a style sheet or script that pages may load."""
    text = path.read_text(encoding="utf-8", errors="replace")
    if path.suffix == ".html":
        return complaints(text) + number_complaints(path.name, text)
    addresses = loaded_by_style(text) if path.suffix == ".css" else loaded_by_script(text)
    return [f"loads {address}" for address in addresses]


def main(root: Path) -> int:
    """Check every page under `root` and what lies beside it; print what is wrong and return the exit status."""
    pages = sorted(path for path in root.rglob("*.html") if "_static" not in path.parts)
    beside = sorted(path for suffix in ("css", "js", "mjs") for path in root.rglob(f"*.{suffix}"))
    files = [*pages, *beside]
    with ProcessPoolExecutor() as pool:
        found = pool.map(file_complaints, files, chunksize=4)
        wrong = [
            f"{path.relative_to(root)}: {each}" for path, of_file in zip(files, found, strict=True) for each in of_file
        ]
    wrong += [f"{root}: no index.html"] if not (root / "index.html").exists() else []
    print(
        "\n".join(wrong)
        if wrong
        else f"{len(pages)} pages load nothing from another host, and every picture has alt text"
    )
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
