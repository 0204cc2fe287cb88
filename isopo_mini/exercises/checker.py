"""The checker itself."""

import copy
from collections.abc import Callable, Iterable, Mapping
from difflib import get_close_matches
from importlib import import_module
from typing import Any

from isopo_mini.exercises.comparing import difference, shown
from isopo_mini.exercises.exercise import Exercise
from isopo_mini.exercises.hints import hint, outcomes

PARTS = ("foundations", "isopo", "experiments", "neighbours", "beyond", "bug_hunts")


def check(
    function: Callable[..., Any],
    reference: Callable[..., Any] | str,
    cases: Iterable[tuple[Any, ...]] = (),
    *,
    mistakes: Mapping[str, Callable[..., Any]] | None = None,
    rtol: float = 1e-4,
    atol: float = 1e-6,
) -> bool | None:
    """Print whether `function` agrees with `reference` on every case, or the first case where it does not.

    Where it does not, a hint follows if the answers are those of a known mistake in every case: one of `mistakes`, or
    a slip that any exercise knows (the sign, a factor, the transpose, the shape, zeros, nan).

    Nothing is ever raised because of what the function does, so a page with unfilled exercises still builds. Whole
    numbers are equal or not, alone, in lists, tuples and dicts, and in tensors and arrays of integers; the tolerances
    are for all others. Which of the two a number is, the reference decides.

    Args:
        function: what the reader wrote. Returning None or raising NotImplementedError means: not filled in yet.
        reference: what is right, as a function; or the name of an exercise of the book, which brings its own cases,
            mistakes and tolerance.
        cases: the arguments of each case, as a tuple. All functions get their own copy.
        mistakes: from a hint to a function that makes the mistake of which the hint speaks.
        rtol: tolerated relative difference of numbers and of tensor entries.
        atol: tolerated absolute difference.

    Returns:
        True when all cases agree. None otherwise, so that a notebook shows the printed lines and nothing below them.

    Raises:
        ValueError: there are no cases, which would pass everything; or no exercise has this name; or a named one is
            given cases or mistakes.

    Example:
        >>> check(lambda x: 2 * x, lambda x: x + x, [(1.0,), (-3.0,)])
        <lambda>: passed, 2 of 2 cases.
        True
        >>> check(lambda x: x**2, lambda x: x + x, [(1.0,)], mistakes={"A square.": lambda x: x * x})
        <lambda>: case 1 of 1 differs. Scalars are not close!
          input:    1.0
          expected: 2.0
          got:      1.0
          hint:     A square.
    """
    cases = list(cases)
    if isinstance(reference, str):
        if cases or mistakes:
            raise ValueError(f"cases, mistakes: expected none, since exercise '{reference}' brings its own")
        return _checked(function, named(reference), rtol)
    if not cases:
        raise ValueError("cases: expected at least one, got none")
    return _checked(function, Exercise(reference, lambda: cases, mistakes or {}, atol=atol), rtol)


def every_exercise() -> dict[str, Exercise]:
    """All exercises of the book that have a checker, by name."""
    found: dict[str, Exercise] = {}
    for part in PARTS:  # loaded when the first exercise is checked, and not by `import isopo_mini.exercises`
        found |= import_module(f"isopo_mini.exercises.{part}").EXERCISES
    return found


def named(name: str) -> Exercise:
    """The exercise of this name.

    Raises:
        ValueError: there is none.
    """
    exercises = every_exercise()
    if name not in exercises:
        near = get_close_matches(name, exercises, n=1) or sorted(exercises)
        raise ValueError(
            f"reference: expected a function or the name of an exercise, such as '{near[0]}', got {name!r}"
        )
    return exercises[name]


def _checked(function: Callable[..., Any], exercise: Exercise, rtol: float) -> bool | None:
    """`check`, for an exercise."""
    cases, atol = exercise.cases(), exercise.atol
    name = getattr(function, "__name__", "your function")
    expected = [_measured(exercise.reference, exercise)(*copy.deepcopy(case)) for case in cases]
    answers = outcomes(_measured(function, exercise), cases)
    for number, (case, answer, right) in enumerate(zip(cases, answers, expected, strict=True), start=1):
        if isinstance(answer, NotImplementedError) or (answer is None and right is not None):
            print(f"{name}: not filled in yet.")
            return None
        raised = isinstance(answer, BaseException)
        differs = "" if raised else difference(answer, right, rtol, atol)
        if raised:
            print(f"{name}: case {number} of {len(cases)} raised {type(answer).__name__}: {answer}")
            print(f"  input:    {shown(case)}")
        elif differs:
            print(f"{name}: case {number} of {len(cases)} differs. {differs}")
            print(f"  input:    {shown(case)}\n  expected: {shown(right)}\n  got:      {shown(answer)}")
        if raised or differs:
            known = {said: outcomes(_measured(wrong, exercise), cases) for said, wrong in exercise.mistakes.items()}
            if said := hint(answers, expected, known, rtol, atol):
                print(f"  hint:     {said}")
            return None
    print(f"{name}: passed, {len(cases)} of {len(cases)} cases.")
    return True


def _measured(function: Callable[..., Any], exercise: Exercise) -> Callable[..., Any]:
    """The function, followed by the exercise's measure of its answer; None, which is no answer, stays."""

    def run(*case: Any) -> Any:
        answer = function(*case)
        return None if answer is None else exercise.measure(answer)

    return run
