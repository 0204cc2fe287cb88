"""The lines that chapter 20 shows for trl are lines that run."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("trl")

from tiny_grpo import make_config, make_model, make_prompts, make_tokenizer, reward

BOOK = Path(__file__).resolve().parents[2] / "book"
pytestmark = pytest.mark.filterwarnings("default")


def test_the_chapters_lines_run(tmp_path: Path) -> None:
    cells = json.loads((BOOK / "beyond" / "20_real_models.ipynb").read_text(encoding="utf-8"))["cells"]
    text = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    (lines,) = re.findall(r"```python\n(.*?IsopoGRPOTrainer.*?)```", text, flags=re.S)
    names: dict[str, Any] = {
        "model": make_model(),
        "reward": reward,
        "config": make_config(tmp_path),
        "data": make_prompts(),
    }
    # What a model of one's own needs beside the chapter's lines: a pretrained one brings its tokenizer.
    names["tokenizer"] = make_tokenizer()
    exec(lines.replace("model=model,", "model=model, processing_class=tokenizer,"), names)
    assert names["trainer"].state.global_step == 1
