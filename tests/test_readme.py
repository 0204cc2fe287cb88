"""The README's code runs and does what the text around it says; its picture is the first page's."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import readme_picture
import torch
import yaml

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"(?ms)^```python\n(.*?)^```$", README)


@pytest.fixture(scope="module")
def after_both_blocks() -> dict[str, Any]:
    """What is defined once a reader has typed in both blocks, one after the other."""
    namespace: dict[str, Any] = {}
    for block in BLOCKS:
        exec(block, namespace)
    return namespace


def test_there_are_two_blocks_short_enough_to_type() -> None:
    assert len(BLOCKS) == 2
    assert max(len(block.splitlines()) for block in BLOCKS) <= 12
    assert max(len(line) for block in BLOCKS for line in block.splitlines()) <= 100


def test_the_first_block_learns_what_the_readme_says(after_both_blocks: dict[str, Any]) -> None:
    table, bandit = after_both_blocks["table"], after_both_blocks["bandit"]
    said = re.search(r"rises from (\S+) to (\S+) of at most (\S+)\.\n", README)
    assert said is not None
    reached = table["return"].iloc[0], table["return"].iloc[-1], bandit.optimum
    # Another version of torch may draw and round differently; the story must stay.
    assert [float(number) for number in said.groups()] == pytest.approx(reached, abs=0.03)
    assert table["samples"].iloc[-1] == 6400


def test_the_first_block_prints_two_rows(capsys: pytest.CaptureFixture[str]) -> None:
    exec(BLOCKS[0].replace("steps=100", "steps=2"), {})
    header, *rows = capsys.readouterr().out.splitlines()
    assert header.split() == ["samples", "reward", "entropy", "kl", "return"]
    assert len(rows) == 2


def test_the_second_block_leaves_the_formula_in_grad(after_both_blocks: dict[str, Any]) -> None:
    """Of the last layer, whose scores can be written down: −Σ c_s G_s with c = λ(K + λI)⁻¹A and λ = tr K/S."""
    model, features = after_both_blocks["model"], after_both_blocks["features"]
    actions, advantages = after_both_blocks["actions"], after_both_blocks["advantages"]
    fresh = torch.nn.Sequential(
        *[type(layer)(*sizes) for layer, sizes in zip(model, [(8, 32), (), (32, 4)], strict=True)]
    )
    fresh.load_state_dict(model.state_dict())
    after_both_blocks["model"] = fresh
    exec(re.sub(r"(?m)^(model|features, actions, advantages|torch\.optim).*\n", "", BLOCKS[1]), after_both_blocks)
    hidden = torch.relu(fresh[0](features)).detach()
    errors = torch.eye(4)[actions] - fresh[2](hidden).softmax(dim=-1).detach()  # ∂ log π/∂ logits
    scores = torch.cat([(errors[:, :, None] * hidden[:, None, :]).flatten(1), errors], dim=1).double()
    gram = scores @ scores.T
    damping = gram.trace() / 64
    coefficients = damping * torch.linalg.solve(gram + damping * torch.eye(64).double(), advantages.double())
    computed = torch.cat([fresh[2].weight.grad.flatten(), fresh[2].bias.grad])
    # The engine works in single precision here.
    torch.testing.assert_close(computed.double(), -coefficients @ scores, rtol=1e-4, atol=1e-4)


def test_the_picture_is_small_and_says_what_the_first_page_says() -> None:
    _, alt = readme_picture.cells_up_to_the_figure(json.loads(readme_picture.PAGE.read_text(encoding="utf-8")))
    assert readme_picture.with_alt(README, alt) == README, "run python scripts/readme_picture.py"
    assert f"![{alt}]({readme_picture.PICTURE.relative_to(ROOT)})" in README
    assert readme_picture.PICTURE.read_bytes().startswith(b"\x89PNG")
    assert 10_000 < readme_picture.PICTURE.stat().st_size < 150_000


def test_the_first_page_links_every_other_page() -> None:
    """A chapter that is added to the table of contents belongs on the map, with its claim."""
    page = readme_picture.PAGE.read_text(encoding="utf-8")
    toc = yaml.safe_load((ROOT / "_toc.yml").read_text(encoding="utf-8"))
    pages = [entry["file"].removeprefix("book/") for part in toc["parts"] for entry in part["chapters"]]
    assert [name for name in pages if f"]({name}.ipynb)" not in page and f"]({name}.md)" not in page] == []


def test_the_script_draws_the_last_cell_it_is_given(tmp_path: Path) -> None:
    page = {
        "cells": [
            {"cell_type": "markdown", "metadata": {}, "source": ["# Title"]},
            {
                "cell_type": "code",
                "metadata": {},
                "source": ["from matplotlib import pyplot as plt\n", "size = (2, 1)"],
            },
            {
                "cell_type": "code",
                "metadata": {"mystnb": {"image": {"alt": "A line."}}},
                "source": ["plt.figure(figsize=size)\n", "plt.plot([0, 1])\n", "plt.show()"],
            },
            {"cell_type": "code", "metadata": {}, "source": ["raise RuntimeError"]},
        ]
    }
    sources, alt = readme_picture.cells_up_to_the_figure(page)
    assert alt == "A line."
    readme_picture.draw(sources, tmp_path / "a.png")
    header = (tmp_path / "a.png").read_bytes()[16:24]
    assert (int.from_bytes(header[:4]), int.from_bytes(header[4:])) == (320, 160)
    with pytest.raises(ValueError, match=r"^notebook: expected a cell with a figure"):
        readme_picture.cells_up_to_the_figure({"cells": page["cells"][:2]})
