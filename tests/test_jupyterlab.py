"""JupyterLab serves the chapters with their solutions folded: it is started, and asked what it would open."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest
import sync_address

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sync_address.notebooks(ROOT)
PATIENCE = 600  # seconds: what takes longer to start on a busy machine hangs


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a JupyterLab on the book, with nobody's settings."""
    home = tmp_path_factory.mktemp("jupyter")
    folders = {f"JUPYTER_{name}_DIR": str(home / name.lower()) for name in ("CONFIG", "DATA", "RUNTIME")}
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--port=0", "--IdentityProvider.token="]
    command += [f"--ServerApp.root_dir={ROOT / 'book'}", "--allow-root"]
    with (home / "log").open("w", encoding="utf-8") as log:
        server = subprocess.Popen(command, env=os.environ | folders, stdout=log, stderr=log)
        try:
            yield started(server, home)
        finally:
            server.terminate()
            server.wait(PATIENCE)


def started(server: subprocess.Popen[bytes], home: Path) -> str:
    """Wait for the file in which a server says where it listens."""
    for _ in range(10 * PATIENCE):
        for file in (home / "runtime").glob("jpserver-*.json"):
            if text := file.read_text(encoding="utf-8"):
                return str(json.loads(text)["url"])
        if server.poll() is not None:
            break
        time.sleep(0.1)
    pytest.fail((home / "log").read_text(encoding="utf-8"))


def answer(address: str) -> str:
    with urlopen(address, timeout=PATIENCE) as response:
        assert response.status == 200
        return str(response.read().decode("utf-8"))


def test_the_page_of_jupyterlab_is_there(lab: str) -> None:
    assert "jupyter-config-data" in answer(f"{lab}lab")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_solution_arrives_folded_and_what_teaches_does_not(lab: str, path: Path) -> None:
    served = json.loads(answer(f"{lab}api/contents/{path.relative_to(ROOT / 'book').as_posix()}?content=1"))
    assert served["format"] == "json"
    cells: list[dict[str, Any]] = served["content"]["cells"]
    for cell in cells:
        if cell["cell_type"] != "code":
            continue
        hidden = cell["metadata"].get("jupyter", {})
        solution = cell["source"].startswith("# @title Solution\n")
        assert hidden.get("source_hidden", False) == hidden.get("outputs_hidden", False) == solution
        assert solution == ("hide-cell" in cell["metadata"].get("tags", []))
