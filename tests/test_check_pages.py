"""Built pages load nothing from another host: what the checker notices, and what it lets pass."""

from pathlib import Path

import check_pages
import pytest

LOADS = {
    "script": '<script src="https://cdn.example/require.js"></script>',
    "capitals": '<SCRIPT SRC="HTTPS://cdn.example/require.js"></SCRIPT>',
    "style sheet": '<link rel="stylesheet" href="//cdn.example/a.css">',
    "alternate style sheet": '<link rel="alternate stylesheet" href="//cdn.example/a.css">',
    "connection made ahead": '<link rel="preconnect" href="https://cdn.example">',
    "picture": '<img src="https://cdn.example/a.png" alt="A line.">',
    "picture in sizes": '<img src="a.png" srcset="a.png 1x, https://cdn.example/b.png 2x" alt="A line.">',
    "poster": '<video src="a.mp4" poster="https://cdn.example/a.jpg"></video>',
    "sound": '<audio src="https://cdn.example/a.mp3"></audio>',
    "object": '<object data="https://cdn.example/a.svg"></object>',
    "drawing": '<svg><image xlink:href="https://cdn.example/a.png"/></svg>',
    "base": '<base href="https://cdn.example/">',
    "frame": '<iframe src="https://cdn.example/"></iframe>',
    "page in a page": """<iframe srcdoc='<script src="https://cdn.example/a.js"></script>'></iframe>""",
    "css import": '<style>@import url("https://cdn.example/css");</style>',
    "css import of a text": "<style>@import 'https://cdn.example/css';</style>",
    "font": "<style>@font-face { src: local(a), url(//cdn.example/a.woff2) }</style>",
    "style attribute": '<p style="background: url(https://cdn.example/a.png)">',
    "module": '<script type="module">import "https://cdn.example/x.js"</script>',
    "module with names": '<script type="module">import {a, b} from "https://cdn.example/x.js"</script>',
    "module re-exported": "<script type='module'>export * from 'https://cdn.example/x.js'</script>",
    "module when needed": "<script>const d3 = await import(`https://cdn.example/x.js`)</script>",
    "map of modules": '<script type="importmap">{"imports": {"three": "https://cdn.example/three.js"}}</script>',
    "what Plotly leaves": '<script>require.config({paths: {plotly: ["https://cdn.example/plotly-2.min"]}})</script>',
    "its other name": "<script>requirejs.config({paths: {'plotly': 'https://cdn.example/plotly'}});</script>",
    "require": '<script>require(["jquery", "https://cdn.example/x.js"], function ($, x) {})</script>',
    "fetch": '<script>fetch("https://cdn.example/data.json").then(draw)</script>',
    "fetch of a constant": '<script>const data = "https://cdn.example/";\nfetch(data + "a.json")</script>',
    "request": '<script>request.open("GET", "https://cdn.example/data.json")</script>',
    "worker": '<script>importScripts("https://cdn.example/x.js")</script>',
    "socket": '<script>new WebSocket("wss://cdn.example/live")</script>',
    "tag made by a script": '<script>tag.src = "https://cdn.example/x.js"</script>',
    "tag in a text": """<script>page.innerHTML = '<img src="https://cdn.example/a.png">'</script>""",
    "attribute made by a script": '<script>tag.setAttribute("src", "https://cdn.example/x.js")</script>',
    "table": '<script>d3.csv("https://cdn.example/a.csv")</script>',
    "event": """<body onload="fetch('https://cdn.example/x')">""",
}


@pytest.mark.parametrize("name", LOADS)
def test_what_is_loaded_from_elsewhere_is_noticed(name: str) -> None:
    (complaint,) = check_pages.complaints(LOADS[name])
    assert "cdn.example" in complaint.lower()
    assert "loads" in complaint


@pytest.mark.parametrize("html", ['<img src="../_images/a.png" alt="../_images/a.png">', '<img src="a.png">'])
def test_a_picture_without_words_is_noticed(html: str) -> None:
    assert check_pages.complaints(html) == [f"picture {html.split(chr(34))[1]} has no alt text"]


PASSES = {
    "link": '<a href="https://arxiv.org">paper</a>',
    "local files": '<script src="../_static/a.js"></script><img src="a.png" alt="A line."><link href="a.css">',
    "where it was first": '<link rel="canonical" href="https://book.example/">',
    "style of its own": "<style>p { background: url(data:image/png;base64,//8A) } @import 'a.css';</style>",
    "namespaces": '<svg xmlns="http://www.w3.org/2000/svg"></svg><style>@namespace url(http://www.w3.org/1999/a);</style>',
    "namespace in a script": '<script>document.createElementNS("http://www.w3.org/2000/svg", "g")</script>',
    "link made by a script": '<script>button.onclick = () => open("https://arxiv.org"); fetch("data.json")</script>',
    "link in a text": """<script>p.innerHTML = '<a href="https://arxiv.org">paper</a>'</script>""",
    "modules of its own": '<script type="module">import {a} from "./a.js"; import "../b.js"</script>',
    "loaded on a click only": '<script>const THEBE = "https://unpkg.example/thebe.js"; let selector = ".cell"</script>',
    "comment": '<script>// import "https://cdn.example/x.js"\n/* fetch("https://cdn.example/") */ run()</script>',
    "comment in a style": "<style>/* url(https://cdn.example/a.css) */</style>",
    "data": '<script type="application/ld+json">{"@context": "https://schema.example", "src": "//a.example"}</script>',
    "code that is shown": "<pre>import x from &quot;https://cdn.example/x.js&quot;</pre>",
}


@pytest.mark.parametrize("name", PASSES)
def test_what_loads_nothing_passes(name: str) -> None:
    assert check_pages.complaints(PASSES[name]) == []


def test_a_constant_stands_for_its_value_only_where_it_is_loaded() -> None:
    script = '<script>const paper = "https://arxiv.example/";\nconst own = "a.js";\nimport(own); open(paper)</script>'
    assert check_pages.complaints(script) == []
    assert check_pages.complaints(script.replace("import(own)", "import(paper)")) == [
        "<script> loads https://arxiv.example/"
    ]


def test_style_sheets_and_scripts_beside_the_pages_are_read_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "_static").mkdir()
    (tmp_path / "index.html").write_text(
        '<link rel="stylesheet" href="_static/book.css"><script src="_static/a.js">', encoding="utf-8"
    )
    style, script = tmp_path / "_static" / "book.css", tmp_path / "_static" / "a.js"
    style.write_text("p { color: black }", encoding="utf-8")
    script.write_text('const paper = "https://arxiv.example/"; import "./b.js";', encoding="utf-8")
    assert check_pages.main(tmp_path) == 0
    assert capsys.readouterr().out.startswith("1 pages load nothing from another host")
    style.write_text('@import "https://fonts.example/css";', encoding="utf-8")
    script.write_text('import "https://cdn.example/b.js";', encoding="utf-8")
    assert check_pages.main(tmp_path) == 1
    printed = capsys.readouterr().out.splitlines()
    assert printed == [
        f"{script.relative_to(tmp_path)}: loads https://cdn.example/b.js",
        f"{style.relative_to(tmp_path)}: loads https://fonts.example/css",
    ]


def test_a_book_without_its_first_page_is_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert check_pages.main(tmp_path) == 1
    assert "no index.html" in capsys.readouterr().out


def chapter(number: str, *sidebar: str) -> str:
    """A page as the theme writes it, and a sidebar."""
    lines = "".join(
        f'<li class="toctree-l1 current active"><a class="reference internal" {line}</a>' for line in sidebar
    )
    link = '<a class="headerlink" href="#a-title">#</a>'
    return f"<ul>{lines}</ul>\n<h1>A title</h1>\n<h1>{number}A title{link}</h1>"


def test_the_number_of_a_chapter_is_that_of_its_file() -> None:
    five = '<span class="section-number">5. </span>'
    fine = chapter(five, 'href="#">5. Here', 'href="../a/12_b.html">12. There', 'href="map.html">The map')
    assert check_pages.number_complaints("05_a.html", fine) == []
    assert check_pages.number_complaints("map.html", chapter("")) == []
    assert check_pages.number_complaints("06_a.html", chapter(five)) == [
        "06_a.html is called chapter 5, and its name says 6"
    ]
    assert check_pages.number_complaints("06_a.html", chapter("")) == [
        "06_a.html is called chapter nothing, and its name says 6"
    ]
    assert check_pages.number_complaints("map.html", chapter("", 'href="map.html">20. The map')) == [
        "map.html is called chapter 20, and its name says nothing"
    ]
