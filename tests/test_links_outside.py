"""The weekly check follows links: one that leads nowhere fails and is named, one that leads somewhere does not."""

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import links_outside
import nbformat
import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent


class Handler(BaseHTTPRequestHandler):
    """A site with one page."""

    def do_GET(self) -> None:
        self.send_response(200 if self.path == "/here" else 404)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_GET

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture
def site() -> Iterator[str]:
    with ThreadingHTTPServer(("localhost", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://localhost:{server.server_address[1]}"
        server.shutdown()


def write_page(folder: Path, text: str) -> None:
    """A chapter whose cell fails when it is executed."""
    cells = [nbformat.v4.new_markdown_cell(f"# Links\n\n{text}"), nbformat.v4.new_code_cell("raise RuntimeError")]
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3"}, "language_info": {"name": "python"}}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=kernel), folder / "page.ipynb")


def test_a_link_that_leads_nowhere_fails(site: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "_config.yml").write_text(yaml.safe_dump({"sphinx": {"config": {"language": "en"}}}), encoding="utf-8")
    (tmp_path / "_toc.yml").write_text(yaml.safe_dump({"format": "jb-book", "root": "page"}), encoding="utf-8")
    write_page(tmp_path, f"[One]({site}/here), [a DOI](https://doi.org/10.1000/182).")
    assert links_outside.check(tmp_path) == 0
    write_page(tmp_path, f"[One]({site}/here), [another]({site}/gone).")
    assert links_outside.check(tmp_path) == 1
    assert f"{site}/gone" in capsys.readouterr().out


def test_the_book_is_followed_as_it_is_written() -> None:
    config = links_outside.configuration(ROOT)
    assert config["execute"] == {"execute_notebooks": "off"}
    assert config["sphinx"]["local_extensions"]["claims_page"] == str(ROOT / "scripts")
    assert ("/OWNER/" in links_outside.sync_address.read_address(ROOT).url) == (
        len(config["sphinx"]["config"]["linkcheck_ignore"]) > 1
    )
