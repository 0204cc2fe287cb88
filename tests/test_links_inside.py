"""Links of built pages: what the checker notices, and what it lets pass."""

from pathlib import Path

import links_inside
import pytest

PASSES = ["b.html", "b.html#here", "#own", "#", "../index.html", "sub%20dir/c.html", "b.html?highlight=x#here", "a.png"]
PASSES += ["https://arxiv.org/abs/2512.23353", "//arxiv.org", "mailto:someone@example.org", "data:image/png;base64,AA"]
FAILS = {
    "d.html": "there is no such file",
    "b.html#there": "the page has no such place",
    "#other": "the page has no such place",
    "b.html#Here": "the page has no such place",
    "../../b.html": "leads out of the book",
    "/b.html": "leads out of the book",
    "https://": "not an address of another host",
    "https://arxiv/abs": "not an address of another host",
    "htps://arxiv.org": "not an address of another host",
    "https://arxiv.org/a b": "it has a blank",
    "https://[arxiv.org": "not an address",
    "sub": "there is no such file",
}


@pytest.fixture
def page(tmp_path: Path) -> Path:
    """A small book, and its page a.html, which is empty yet."""
    folder = tmp_path / "html" / "book"
    (folder / "sub dir").mkdir(parents=True)
    (folder / "sub").mkdir()
    (tmp_path / "b.html").write_text("", encoding="utf-8")
    (folder.parent / "index.html").write_text("", encoding="utf-8")
    (folder / "b.html").write_text('<h1 id="here">B</h1>', encoding="utf-8")
    (folder / "sub dir" / "c.html").write_text("", encoding="utf-8")
    (folder / "a.png").write_bytes(b"")
    return folder / "a.html"


@pytest.mark.parametrize("link", PASSES)
def test_what_leads_somewhere_passes(page: Path, link: str) -> None:
    page.write_text(f'<a href="{link}">link</a><p id="own"></p>', encoding="utf-8")
    assert links_inside.complaints(page.parents[1]) == []


@pytest.mark.parametrize("link", FAILS)
def test_what_leads_nowhere_is_noticed_once(page: Path, link: str, capsys: pytest.CaptureFixture[str]) -> None:
    page.write_text(f'<a href="{link}">link</a><a href="{link}">link</a><p id="own"></p>', encoding="utf-8")
    (said,) = links_inside.complaints(page.parents[1])
    assert said.startswith("book/a.html: ")
    assert link in said
    assert FAILS[link] in said
    assert links_inside.main(page.parents[1]) == 1
    assert capsys.readouterr().out == f"{said}\n"


def test_pictures_and_scripts_are_looked_for_too(page: Path) -> None:
    page.write_text('<img src="no.png"><script src="no.js"></script>', encoding="utf-8")
    assert len(links_inside.complaints(page.parents[1])) == 2
