"""Every exercise with a checker, as the book prints it: the solution passes, and what is wrong is told apart."""

import ast
import json
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sync_address
import torch

from isopo_mini.exercises import check
from isopo_mini.exercises.checker import every_exercise

ROOT = Path(__file__).resolve().parent.parent
EXERCISES = every_exercise()
FINE, STUB = "passed, ", "not filled in yet."

# What may happen to the book's own solution on its way through a student's hands: in its text, one thing is replaced,
# and a hint with this beginning must follow.
SLIPS: dict[str, list[tuple[str, str, str]]] = {
    "reinforce_loss": [
        ("log_probs * mask", "log_probs", "The mask is missing"),
        (
            "-(advantages * sequence_log_probs).mean()",
            "-(advantages * log_probs * mask).sum() / len(mask)",
            "log_probs *",
        ),
        (".mean()", ".sum()", "This is the sum over sequences"),
    ],
    "fisher_product": [
        ("(v - pi @ v)", "v", "This is diag(π) v."),
        ("pi @ v", "v.mean()", "The plain mean of v"),
    ],
    "weighted_dual": [
        ("weights.sqrt()", "weights", "The weights stand in the rows where"),
        ("root * A", "A", "The rows carry √w, but"),
    ],
    "gspo_objective": [
        ("((log_pi - log_old) * mask)", "(log_pi - log_old)", ""),  # a mixture that no hint is about
        (" / mask.sum(1)", "", "s is the ratio of the whole sequences"),
        ("torch.minimum(s * A, s.clamp(1 - eps, 1 + eps) * A)", "s.clamp(1 - eps, 1 + eps) * A", "The minimum with"),
    ],
    "published_step": [
        ("lengths.norm() / ", "1 / ", "The denominator of (6) is missing"),
        (" / len(c)", "", "This is the sum over sequences"),
        ("-torch.einsum", "torch.einsum", "The sign"),
    ],
    "shared_coefficients": [
        ("gram * counts", "gram * counts[:, None]", "These are the coefficients of the transpose"),
        ("gram * counts", "gram", "These are the coefficients when each"),
        ("damping * torch.linalg", "torch.linalg", "The factor λ is missing"),
    ],
    "isopo_by_hand": [
        ("rho * K.trace() / len(K)", "rho", "λ is ρ itself"),
        ("rho * K.trace() / len(K)", "rho * K.mean()", "λ is made of the mean of all entries"),
        ("rho * K.trace() / len(K)", "rho * K.trace()", "λ is ρ tr K:"),
        ("c = damping * ", "c = ", "The factor λ is missing in c"),
        (" - pi", " - pi\n    g2 = advantages[:, None, None] * g2", "The advantages are in the loss and in c"),
        ('"s,soi->oi", c', '"s,soi->oi", advantages', "This is REINFORCE"),
        ('"s,soi->oi", c', '"s,soi->oi", c / len(c)', "This is the mean over sequences"),
    ],
    "orthogonalise": [
        ("range(40)", "range(1)", "This is one iteration"),
        ("range(40)", "range(0)", "This is M over its norm"),
    ],
    "cosine_in_logits": [
        ("v - (pi * v).sum(-1, keepdim=True)", "v", "Nothing is centred"),
        ("v - (pi * v).sum(-1, keepdim=True)", "v - v.mean(-1, keepdim=True)", "The mean over arms is a plain one"),
        ("d * pi * centred(v)", "pi * centred(v)", "All contexts count alike"),
    ],
    "to_come": [
        ("last_value if truncated else 0.0", "last_value", "The value of the last state is added although"),
        ("last_value if truncated else 0.0", "0.0", "A truncated episode would have gone on"),
        ("if truncated", "if not truncated", "The two ends are exchanged"),
    ],
    "response_log_probs": [
        (".masked_fill(~mask, 0.0)", "", "The prompt counts too"),
        ("-losses", "losses", "These are the losses"),
        (".sum(dim=1)", ".sum(dim=1) / mask.sum(1)", "This is the mean over the response"),
    ],
    "chosen": [
        ("filled = [0 if score != score else score for", "filled = [score for", ""),  # nan is below nothing
        (", size\n", ", -size\n", "Of two equal means the larger"),
        (
            "[0 if score != score else score for score in tried[size]]",
            "[s for s in tried[size] if s == s]",
            "Runs that",
        ),
    ],
    "predict": [
        ("(eta * gap)", "gap", "The step size η is missing"),
        ("k + math", "math", "This counts from"),
        ("math.log(", "math.log10(", "The logarithm is to base 10"),
    ],
    "swapped_limit": [
        (" - limit(0.0)", "", "The others count 1/β more, as they must."),
        ("later / beta", "later", "The first reward is missed, as it must be."),
        ("later / beta", "limit(beta)", "This is the right program's limit"),
    ],
    "descent": [
        ("[-0.35 * second, -1.0, good, good]", "[1.0, 0.0, 0.0, 0.0]", "A bandit on which the step is right"),
        ("[1 - eps, second, rare, rare]", "[1 - eps, second, rare, 0.0]", "Every arm needs a positive probability"),
        ("[1 - eps, second, rare, rare]", "[1 - eps, second, rare]", "Give four probabilities"),
    ],
    "cosh_step": [
        ("torch.arcsinh(torch.sinh(theta) - lam * u)", "torch.sinh(theta) - lam * u", "This is the step in the mirror"),
        ("- lam", "+ lam", "This step goes along u"),
        ("torch.arcsinh(torch.sinh(theta) - lam * u)", "theta - lam * u", "This is the gradient step"),
    ],
    "best_baseline": [
        ("p * (scores**2)", "(scores**2)", "The rewards are weighted by squared lengths"),
        (" / square.sum()", "", "The weights are not divided"),
        ("(scores**2).sum(1)", "1", "This is the mean reward"),
    ],
    "policy_iteration": [
        ("s.R + ", "", "The cost of the control"),
        ("@ P @ s.A", "@ P @ (s.A - s.B @ K)", "The new gain is greedy from A"),
        ("s.value_matrix(K)", "s.Q", "This is greedy for the next cost alone"),
    ],
    "modulus": [
        ("return sigma - 1 + np.sqrt(sigma**2 - sigma)", "return np.sqrt(sigma - 1)", "This holds for complex roots"),
        ("- 1 + np", "- 1 - np", "For σ > 1 this is the smaller"),
        ("np.sqrt(1 - sigma)", "1 - sigma", "For σ < 1 this is the real part"),
    ],
    "packed_gradients": [
        ("y[mask].T @ x[mask]", "x[mask].T @ y[mask]", "Each gradient is transposed"),
        ("y[mask].T @ x[mask]", "y.T @ x", "Every sequence gets"),
        ("segments == s", "segments.sort().values == s", "The positions of a sequence are taken"),
    ],
    "rank_step": [
        ("c[first : first + sizes[rank]]", "c[: sizes[rank]]", "The coefficients are those that stand first"),
        ("len(sizes) * ", "", "DDP takes the mean over the ranks"),
        ('->oi", own', '->oi", advantages[first : first + sizes[rank]]', "The advantages weigh"),
    ],
}


class Printed:
    """An exercise as its chapter prints it: the text of the stub and of the solution, with the imports they need."""

    def __init__(self, cells: list[ast.Module], sources: list[str]) -> None:
        self.cells, self.sources = cells, sources
        self.imports = [node for cell in cells for node in cell.body if isinstance(node, ast.Import | ast.ImportFrom)]
        self.double = any("set_default_dtype(torch.float64)" in source for source in sources)

    def text(self, name: str) -> str:
        """The definition of this function."""
        found = [
            ast.get_source_segment(source, node)
            for cell, source in zip(self.cells, self.sources, strict=True)
            for node in cell.body
            if isinstance(node, ast.FunctionDef) and node.name == name
        ]
        (text,) = found
        assert text is not None
        return text

    def function(self, name: str, text: str) -> Callable[..., Any]:
        """The function that the text defines, where the chapter's imports that it needs are there."""
        used = {node.id for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Name)}
        needed = [
            node for node in self.imports if used & {(alias.asname or alias.name).split(".")[0] for alias in node.names}
        ]
        names: dict[str, Any] = {}
        exec("\n".join([*map(ast.unparse, needed), text]), names)
        return names[name]


@cache
def checks() -> dict[str, tuple[Path, Printed]]:
    """Where each name is checked, from all notebooks; every call of a checker must be one that we understand."""
    found: dict[str, tuple[Path, Printed]] = {}
    for path in sync_address.notebooks(ROOT):
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        sources = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
        printed = Printed([ast.parse(source) for source in sources], sources)
        for name in {name for source in sources for _, name in checked(source, checkers_of(sources))}:
            assert name not in found, f"{name} is checked in two chapters"
            found[name] = path, printed
    return found


def checkers_of(sources: list[str]) -> set[str]:
    """How a chapter calls the checker: some have a `check` of their own, for something else."""
    imported = any("from isopo_mini.exercises import check" in source for source in sources)
    return {"check", "exercises.check"} if imported else {"exercises.check"}


def checked(source: str, checkers: set[str]) -> list[tuple[str, str]]:
    """(function, exercise) of every call of the checker; the exercise is empty when it is not given by its name."""
    calls = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in checkers:
            function, *rest = node.args
            named = len(rest) == 1 and isinstance(rest[0], ast.Constant)
            calls.append((ast.unparse(function), ast.literal_eval(rest[0]) if named else ""))
    return calls


@pytest.fixture(autouse=True)
def _default_dtype() -> Any:
    before = torch.get_default_dtype()
    yield
    torch.set_default_dtype(before)


def said(name: str, function: Callable[..., Any], capsys: pytest.CaptureFixture[str]) -> str:
    """What the checker prints."""
    torch.set_default_dtype(torch.float64 if checks()[name][1].double else torch.float32)  # as in the chapter
    passes = check(function, name)
    out = capsys.readouterr().out
    assert (passes is True) == (FINE in out)
    return out


def hint_in(out: str) -> str:
    """The hint, or nothing."""
    match = re.search(r"(?m)^  hint:     (.*)$", out)
    return match.group(1) if match else ""


def test_the_book_and_the_library_have_the_same_exercises() -> None:
    assert set(checks()) == set(EXERCISES)
    assert set(SLIPS) == set(EXERCISES), "each with slips of its own solution"


@pytest.mark.parametrize("path", sync_address.notebooks(ROOT), ids=lambda path: path.stem)
def test_a_stub_is_checked_where_it_stands_and_shows_nothing_else(path: Path) -> None:
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    sources = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    checkers = checkers_of(sources)
    for source in sources:
        assert "" not in {name for _, name in checked(source, checkers)}, "the reference stands beside the exercise"
        if "your turn" in source:
            stub, call = ast.parse(source).body  # and no reference, no cases
            assert isinstance(stub, ast.FunctionDef)
            assert checked(ast.unparse(call), checkers) == [(stub.name, stub.name)]


@pytest.mark.parametrize("name", EXERCISES)
def test_the_printed_solution_passes_and_the_stub_is_not_filled_in(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    printed = checks()[name][1]
    solution = printed.function(f"{name}_solution", printed.text(f"{name}_solution"))
    assert FINE in said(name, solution, capsys)
    assert said(name, printed.function(name, printed.text(name)), capsys) == f"{name}: {STUB}\n"


def zeros(value: Any) -> Any:
    """As many zeros."""
    if isinstance(value, tuple):
        return tuple(zeros(item) for item in value)
    return torch.zeros_like(value) if isinstance(value, torch.Tensor) else np.zeros_like(value)


@pytest.mark.parametrize("name", EXERCISES)
def test_zeros_do_not_pass(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    out = said(name, lambda *case: zeros(EXERCISES[name].reference(*case)), capsys)
    assert FINE not in out
    assert STUB not in out
    assert hint_in(out) != "" or name == "chosen"


@pytest.mark.parametrize("name", EXERCISES)
def test_every_known_mistake_gets_the_hint_that_is_about_it(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    mistakes = EXERCISES[name].mistakes
    assert len(mistakes) >= 2
    for hint, wrong in mistakes.items():
        assert hint_in(said(name, wrong, capsys)) == hint


@pytest.mark.parametrize(("name", "slip"), [(name, slip) for name, slips in SLIPS.items() for slip in slips])
def test_a_slip_in_the_printed_solution_is_named(
    name: str, slip: tuple[str, str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    right, wrong, hint = slip
    printed = checks()[name][1]
    text = printed.text(f"{name}_solution")
    assert text.count(right) == 1
    out = said(name, printed.function(f"{name}_solution", text.replace(right, wrong)), capsys)
    assert FINE not in out
    assert hint_in(out).startswith(hint)
    assert (hint == "") == (hint_in(out) == "")


@pytest.mark.parametrize("name", EXERCISES)
def test_at_least_two_slips_of_the_printed_solution_are_told_apart(name: str) -> None:
    assert len({hint for _, _, hint in SLIPS[name] if hint}) >= 2
