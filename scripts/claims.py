"""What a chapter claims: every comparison in its asserts, with both sides. An IPython extension.

While it is loaded, the asserts of a cell are rewritten before they run (`claim_rewriting.py`). Each comparison is then
made by `Recorder.compare`, which notes the two sides and gives back what Python would have given. So a failing assert
can say what it compared, and a claim that holds can say by how much.

Where it writes, and whether a failing assert stops the chapter, is said in the environment:

    CLAIMS_RECORDS   a folder; every kernel writes one file of JSON lines there, a line each claim or failure
    CLAIMS_SURVEY    when set, an assert that fails is noted and the chapter goes on
    CLAIMS_SHIFT     added to every seed; see `seed_shift.py`
"""

import json
import linecache
import operator
import os
import textwrap
import traceback
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from claim_comparisons import OPPOSITE, Comparison, binding_entry, worst_error
from claim_rewriting import RECORDER, Rewriter

FUNCTIONS: dict[str, Callable[[Any, Any], Any]] = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
    "==": operator.eq,
}


@dataclass
class Claim:
    """One assert of a cell, over all the times that it ran."""

    line: int
    text: str
    certain: bool = False  # a theorem or an identity: however near its sides, they cannot pass each other
    times: int = 0
    held: bool = True
    tightest: Comparison | None = None
    unequal: str = ""  # both sides of an `==` that failed
    comparisons: list[Comparison] = field(default_factory=list)  # of the run in progress

    def close(self, held: bool) -> None:
        """The assert has run once more: keep its tightest comparison, or that of its first failure."""
        deciding = [comparison for comparison in self.comparisons if not comparison.one_suffices]
        several = [comparison for comparison in self.comparisons if comparison.one_suffices]
        deciding += [max(several, key=lambda comparison: comparison.slack)] if several else []
        self.comparisons = []
        self.times += 1
        if not self.held:
            return
        if not held:
            self.held, self.tightest = False, None
        known = [self.tightest] if self.tightest else []
        self.tightest = min(known + deciding, key=lambda comparison: comparison.slack, default=None)

    def as_record(self) -> dict[str, Any]:
        """What is written to the file."""
        record: dict[str, Any] = {"line": self.line, "claim": self.text, "certain": self.certain}
        record |= {"times": self.times, "held": self.held}
        if self.tightest is not None:
            found = self.tightest
            record |= {"compared": found.text, "left": found.left, "sign": found.sign, "right": found.right}
            record |= {"distance": found.distance, "slack": found.slack}
        return record

    def sides(self) -> str:
        """Both sides, for the message of a failing assert."""
        found = self.tightest
        if self.unequal or found is None:
            return self.unequal or self.text
        return f"{found.text}\n  left side:  {found.left:.6g}\n  right side: {found.right:.6g}"


class Recorder:
    """Called by the rewritten asserts; keeps what they compared until the cell has run."""

    def __init__(self, folder: Path | None, survey: bool) -> None:
        self.path = folder / f"{uuid.uuid4().hex}.jsonl" if folder else None
        self.survey = survey
        self.claims: dict[tuple[int, str], Claim] = {}
        self.open: list[Claim] = []
        self.failed: Claim | None = None

    def start(self, line: int, text: str, certain: bool = False) -> None:
        """An assert is about to be evaluated."""
        self.open.append(self.claims.setdefault((line, text), Claim(line, text, certain)))

    def finish(self, _: None, value: Any) -> bool:
        """It has been evaluated; what `assert` is to see."""
        claim = self.open.pop()
        held = bool(value)
        claim.close(held)
        if not held:
            self.failed = claim
        return held or self.survey

    def explain(self, message: Any = None) -> str:
        """The message of an assert that has failed: the author's own, and both sides."""
        said = self.failed.sides() if self.failed else ""
        return said if message is None else f"{message}\n{said}"

    def compare(
        self,
        text: str,
        signs: tuple[str, ...],
        measured: tuple[bool, ...],
        negated: bool,
        one_suffices: bool,
        *operands: Any,
    ) -> Any:
        """`a < b`, or a chain of comparisons, with the value that Python gives it."""
        result: Any = True
        for sign, noted, (left, right) in zip(signs, measured, pairwise(operands), strict=True):
            claimed = OPPOSITE.get(sign, sign) if negated else sign
            found = binding_entry(text, left, claimed, right, one_suffices) if noted else None
            if found is not None and self.open:
                self.open[-1].comparisons.append(found)
            this = FUNCTIONS[sign](left, right)
            if sign == "==" and this is False and self.open:
                self.open[-1].unequal = f"{text}\n  left side:  {left!r:.200}\n  right side: {right!r:.200}"
            result = this if len(signs) == 1 else result and this
        return result

    def close(self, text: str, function: Callable, *args: Any, **kwargs: Any) -> Any:
        """`allclose(a, b)` and its like: the worst error, in units of the tolerance, is less than 1."""
        error = worst_error(function, args, kwargs) if len(args) >= 2 else None
        if error is not None and self.open:
            self.open[-1].comparisons.append(Comparison(text, error, "<=", 1.0))
        return function(*args, **kwargs)

    def assert_close(self, line: int, text: str, function: Callable, *args: Any, **kwargs: Any) -> None:
        """`assert_allclose(a, b)` and its like, which is a claim of its own."""
        self.start(line, text)
        try:
            self.close(text, function, *args, **kwargs)
        except AssertionError:
            self.finish(None, False)
            if not self.survey:
                raise
        else:
            self.finish(None, True)

    def write(self, record: dict[str, Any]) -> None:
        """Append one line to this kernel's file."""
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")

    def before_cell(self, _: Any) -> None:
        """Forget the cell before."""
        self.claims, self.open, self.failed = {}, [], None

    def after_cell(self, result: Any) -> None:
        """Write down what the cell claimed, and what it died of."""
        source = result.info.raw_cell
        for claim in self.claims.values():
            self.write({"source": source, **claim.as_record()})
        error = result.error_before_exec or result.error_in_exec
        if error is None:
            return
        message = str(error).strip() or "(no message)"
        self.write(
            {"source": source, "error": type(error).__name__, "message": message, "failing": failing_code(error)}
        )


def failing_code(error: BaseException) -> str:
    """The statement of a cell that raised the error; the deepest one where cells call each other's functions."""
    this_kernel = f"ipykernel_{os.getpid()}"  # in the names that it gives to its cells
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if this_kernel in frame.filename]
    if not frames:
        return getattr(error, "text", None) or ""
    first, last = frames[-1].lineno or 1, frames[-1].end_lineno or frames[-1].lineno or 1
    return textwrap.dedent("".join(linecache.getlines(frames[-1].filename)[first - 1 : last])).strip()


def load_ipython_extension(shell: Any) -> None:
    """Called by IPython when a kernel starts."""
    folder = os.environ.get("CLAIMS_RECORDS")
    recorder = Recorder(Path(folder) if folder else None, bool(os.environ.get("CLAIMS_SURVEY")))
    shell.user_ns_hidden[RECORDER] = shell.user_ns[RECORDER] = recorder
    shell.ast_transformers.append(Rewriter())
    shell.events.register("pre_run_cell", recorder.before_cell)
    shell.events.register("post_run_cell", recorder.after_cell)
    if shift := int(os.environ.get("CLAIMS_SHIFT", "0")):
        import seed_shift

        seed_shift.install(shift)
