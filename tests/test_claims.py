"""The recorder of claims: rewritten asserts do what Python's do, and note both sides."""

import ast
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import claims
import numpy as np
import pandas as pd
import pytest
import torch
from claim_rewriting import RECORDER, Rewriter
from hypothesis import given, settings
from hypothesis import strategies as st

NAMES = {"np": np, "torch": torch, "math": math, "pd": pd}


def run(source: str, survey: bool = False, **names: Any) -> claims.Recorder:
    """Execute the source with rewritten asserts; the recorder holds what they compared."""
    recorder = claims.Recorder(folder=None, survey=survey)
    tree = Rewriter().visit(ast.parse(source))
    exec(compile(tree, "cell", "exec"), NAMES | names | {RECORDER: recorder})
    return recorder


def only(recorder: claims.Recorder) -> dict[str, Any]:
    (claim,) = recorder.claims.values()
    return claim.as_record()


@pytest.mark.parametrize(
    ("source", "left", "sign", "right", "slack"),
    [
        ("assert 0.6 < x", 0.6, "<", 0.8, 0.25),
        ("assert x > 0.6", 0.8, ">", 0.6, 0.25),
        ("assert -1 < x < 1", 0.8, "<", 1.0, 0.2),
        ("assert x / 2 < 0.5 < 0.6 < x", 0.4, "<", 0.5, 0.2),  # 0.5 < 0.6 measures nothing
        ("assert (np.array([0.1, 0.4]) < 0.5).all()", 0.4, "<", 0.5, 0.2),
        ("assert (torch.tensor([0.25, 0.375]) < 0.5).all()", 0.375, "<", 0.5, 0.25),
        ("assert (pd.Series([0.1, 0.4]) < 0.5).all()", 0.4, "<", 0.5, 0.2),
        ("assert all(a < 0.5 for a in (0.1, 0.7, 0.4) if a < 0.6)", 0.4, "<", 0.5, 0.2),
        ("assert any(a < 0.5 for a in (0.7, 0.4))", 0.4, "<", 0.5, 0.2),
        ("assert np.any(np.array([0.7, 0.4]) < 0.5)", 0.4, "<", 0.5, 0.2),
        ("assert x > 0.9 or x < 1", 0.8, "<", 1.0, 0.2),
        ("assert not x > 1", 0.8, "<=", 1.0, 0.2),
        ("assert not (np.array([0.1, 0.4]) > 0.5).any()", 0.4, "<=", 0.5, 0.2),
        ("assert x < 1 if x > 0.5 else x > 1", 0.8, "<", 1.0, 0.2),
        ("assert x > 0", 0.8, ">", 0.0, 1.0),
        ("assert np.isclose(1.0, 1.5, rtol=1.0)", 1 / 3, "<=", 1.0, 2 / 3),
        ("assert np.allclose([1.0, 2.0], [1.0, 2.5], rtol=0, atol=1)", 0.5, "<=", 1.0, 0.5),
        ("assert torch.allclose(torch.ones(2), torch.ones(2) * 2, 1.0, 0.0)", 0.5, "<=", 1.0, 0.5),
        ("assert math.isclose(1.0, 2.0, rel_tol=1.0)", 0.5, "<=", 1.0, 0.5),
        ("np.testing.assert_allclose(1.0, 2.0, rtol=1.0)", 0.5, "<=", 1.0, 0.5),
        ("torch.testing.assert_close(torch.tensor(1.0), torch.tensor(2.0), rtol=1.0, atol=0.0)", 0.5, "<=", 1.0, 0.5),
    ],
)
def test_the_comparison_that_decides_is_noted(source: str, left: float, sign: str, right: float, slack: float) -> None:
    record = only(run(source, x=0.8))
    assert record["held"]
    assert record["sign"] == sign
    assert [record[name] for name in ("left", "right", "slack")] == pytest.approx([left, right, slack])


def test_a_message_can_say_that_a_claim_is_a_theorem() -> None:
    assert only(run("assert 0.3 < 0.4, 'always: the triangle inequality'"))["certain"]
    assert not only(run("assert 0.3 < 0.4, 'measured'"))["certain"]


def test_what_holds_no_numbers_is_let_be() -> None:
    leaf = torch.ones(1, requires_grad=True)
    tests = ["{1} <= {1, 2}", "'a' < 'b'", "[[1], [2, 3]] < [[4]]"]
    source = "\n".join(["torch.testing.assert_close((x, x), (x, x))", *[f"assert {test}" for test in tests]])
    assert all("left" not in claim.as_record() for claim in run(source, x=leaf).claims.values())


def test_a_loop_keeps_its_tightest_pass() -> None:
    record = only(run("for a in (0.1, 0.4, 0.2):\n    assert a < 0.5"))
    assert (record["times"], record["left"], record["line"]) == (3, 0.4, 2)


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("assert x < 0.5, 'the gap closes'", "the gap closes\nx < 0.5\n  left side:  0.8\n  right side: 0.5"),
        ("assert x < 1 and x < 0.5", "x < 0.5\n  left side:  0.8\n  right side: 0.5"),
        ("assert [1, 2] == list('ab')", "[1, 2] == list('ab')\n  left side:  [1, 2]\n  right side: ['a', 'b']"),
        ("assert x == 0.5", "x == 0.5\n  left side:  0.8\n  right side: 0.5"),
        ("assert float('nan') < 0.5", "float('nan') < 0.5\n  left side:  nan\n  right side: 0.5"),
        ("assert x is None", "x is None"),
    ],
)
def test_a_failing_assert_says_both_sides(source: str, said: str) -> None:
    with pytest.raises(AssertionError) as caught:
        run(source, x=0.8)
    assert str(caught.value) == said


def test_in_a_survey_a_failing_assert_is_noted_and_the_cell_goes_on() -> None:
    source = "assert x < 0.5\nnp.testing.assert_allclose(x, 1.0)\nassert x < 1"
    held = [claim.as_record()["held"] for claim in run(source, survey=True, x=0.8).claims.values()]
    assert held == [False, False, True]


@given(st.lists(st.floats(width=32), min_size=1, max_size=4), st.lists(st.floats(width=32), min_size=1, max_size=4))
@settings(derandomize=True, max_examples=50)
def test_rewriting_changes_no_verdict(a: list[float], b: list[float]) -> None:
    """Whatever the numbers, NaN and infinities among them."""
    tests = [
        "a[0] < b[0]", "a[0] <= b[0] <= 1", "not a[0] > b[0]", "a == b", "a[0] < b[0] or a[0] > 1", "a < b",
        "all(x >= y for x in a for y in b)", "any(x >= y for x in a for y in b)",
        "(np.array(a)[:, None] < np.array(b)).all()", "not (np.array(a)[:, None] < np.array(b)).any()",
        "np.allclose(a[0], b[0])", "math.isclose(a[0], b[0])",
    ]  # fmt: skip
    for test in tests:
        with np.errstate(all="ignore"):
            plain = bool(eval(test, NAMES | {"a": a, "b": b}))
            recorder = run(f"assert {test}", survey=True, a=a, b=b)
        record = only(recorder)
        assert record["held"] == plain, test
        if "slack" in record and not np.isnan([*a, *b]).any():
            assert (record["slack"] >= 0) == plain or record["slack"] == 0, test


def test_a_kernel_writes_its_claims_and_what_a_cell_died_of(tmp_path: Path) -> None:
    recorder = claims.Recorder(tmp_path, survey=False)
    recorder.before_cell(None)
    recorder.start(1, "1 < 2")
    recorder.finish(None, recorder.compare("1 < 2", ("<",), (True,), False, False, 1, 2))
    info = SimpleNamespace(raw_cell="assert 1 < 2\n1 / 0")
    recorder.after_cell(SimpleNamespace(info=info, error_before_exec=None, error_in_exec=ZeroDivisionError("by 0")))
    (file,) = tmp_path.iterdir()
    first, second = (json.loads(line) for line in file.read_text(encoding="utf-8").splitlines())
    assert (first["claim"], first["slack"], first["source"]) == ("1 < 2", 0.5, info.raw_cell)
    assert (second["error"], second["message"]) == ("ZeroDivisionError", "by 0")
