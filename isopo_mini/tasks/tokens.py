"""Four tasks for a policy that writes tokens: addition, modular arithmetic, sorting and brackets:

    task                          prompt       answer
    Addition(digits=2)            57+68=       521.      57 + 68 = 125, least significant digit first
    ModularArithmetic(modulus=97) 57+68=       82.       57 + 68 = 28 modulo 97, least significant digit first
    Sorting(length=5)             31415=       11345.    the digits in order
    Brackets(length=7)            ([()[](=     )]).      what closes all that is open, the newest first

The vocabulary, grading, sampling and evaluation are those of `tasks.token_task.TokenTask`.
"""

from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from isopo_mini import checks
from isopo_mini.tasks.token_task import (
    BRACKETS,
    DIGITS,
    END,
    EQUALS,
    PAD,
    PLUS,
    TIMES,
    VOCABULARY,
    ZERO,
    TokenTask,
    decode,
    encode,
)

__all__ = [
    "TASKS",
    "VOCABULARY",
    "Addition",
    "Brackets",
    "ModularArithmetic",
    "Sorting",
    "decode",
    "encode",
    "make_task",
]


class Addition(TokenTask):
    """a + b for two numbers of `digits` digits, leading zeros included: `07+68=` asks for `570.`, which is 075.

    Args:
        digits: of each number, 1 to 18. The answer has one digit more, and its end.
        **options: `group_size`, `reward` and `evaluation_prompts`, as for `TokenTask`.

    Raises:
        ValueError: `digits` is out of range, or an option is.

    Example:
        >>> decode(Addition(digits=2).answers(encode("57+68=")[None])[0])
        '521.'
    """

    def __init__(self, digits: int = 2, **options: Any) -> None:
        _require_between("digits", digits, 1, 18)
        super().__init__([*[DIGITS] * digits, (PLUS,), *[DIGITS] * digits, (EQUALS,)], digits + 2, **options)
        self.digits = digits

    def prompts(
        self, num_prompts: int, *, generator: torch.Generator | None = None, device: torch.device | str = "cpu"
    ) -> Int[Tensor, "N P"]:
        """Draw prompts `(N, P)`: every digit uniform."""
        checks.require_at_least("num_prompts", num_prompts, 1)
        drawn = ZERO + torch.randint(10, (num_prompts, 2 * self.digits), generator=generator, device=device)
        return _equation(drawn[:, : self.digits], PLUS, drawn[:, self.digits :])

    def answers(self, prompts: Int[Tensor, "N P"]) -> Int[Tensor, "N L"]:
        """The sums, `(N, L)`, least significant digit first."""
        self._require_prompts(prompts)
        total = _read(prompts[:, : self.digits]) + _read(prompts[:, self.digits + 1 : -1])
        return _ended(_write(total, self.digits + 1))


class ModularArithmetic(TokenTask):
    """(a + b) mod m or (a · b) mod m, for numbers below m.

    Args:
        modulus: m, from 2 to 10⁹.
        operation: "+" or "*".
        **options: `group_size`, `reward` and `evaluation_prompts`, as for `TokenTask`.

    Raises:
        ValueError: the modulus is out of range, or the operation or an option is unknown.

    Example:
        >>> decode(ModularArithmetic(97, "*").answers(encode("50*02=")[None])[0])
        '30.'
    """

    def __init__(self, modulus: int = 97, operation: str = "+", **options: Any) -> None:
        _require_between("modulus", modulus, 2, 10**9)
        checks.require_choice("operation", operation, ("+", "*"))
        self.modulus, self.operation, self.digits = modulus, operation, len(str(modulus - 1))
        sign = (TIMES if operation == "*" else PLUS,)
        number = [DIGITS] * self.digits
        super().__init__([*number, sign, *number, (EQUALS,)], self.digits + 1, **options)

    def prompts(
        self, num_prompts: int, *, generator: torch.Generator | None = None, device: torch.device | str = "cpu"
    ) -> Int[Tensor, "N P"]:
        """Draw prompts `(N, P)`: both numbers uniform from 0 to m − 1."""
        checks.require_at_least("num_prompts", num_prompts, 1)
        drawn = torch.randint(self.modulus, (2, num_prompts), generator=generator, device=device)
        first, second = (_write(numbers, self.digits).flip(1) for numbers in drawn)
        return _equation(first, TIMES if self.operation == "*" else PLUS, second)

    def answers(self, prompts: Int[Tensor, "N P"]) -> Int[Tensor, "N L"]:
        """The results, `(N, L)`, least significant digit first."""
        self._require_prompts(prompts)
        first, second = _read(prompts[:, : self.digits]), _read(prompts[:, self.digits + 1 : -1])
        result = first * second if self.operation == "*" else first + second
        return _ended(_write(result % self.modulus, self.digits))


class Sorting(TokenTask):
    """Digits in random order, to be written in ascending order, as often as they stand there.

    Args:
        length: number of digits.
        **options: `group_size`, `reward` and `evaluation_prompts`, as for `TokenTask`.

    Example:
        >>> decode(Sorting(5).answers(encode("31415=")[None])[0])
        '11345.'
    """

    def __init__(self, length: int = 5, **options: Any) -> None:
        checks.require_at_least("length", length, 1)
        super().__init__([*[DIGITS] * length, (EQUALS,)], length + 1, **options)
        self.length = length

    def prompts(
        self, num_prompts: int, *, generator: torch.Generator | None = None, device: torch.device | str = "cpu"
    ) -> Int[Tensor, "N P"]:
        """Draw prompts `(N, P)`: every digit uniform."""
        checks.require_at_least("num_prompts", num_prompts, 1)
        drawn = ZERO + torch.randint(10, (num_prompts, self.length), generator=generator, device=device)
        return torch.cat([drawn, torch.full_like(drawn[:, :1], EQUALS)], dim=1)

    def answers(self, prompts: Int[Tensor, "N P"]) -> Int[Tensor, "N L"]:
        """The sorted digits, `(N, L)`."""
        self._require_prompts(prompts)
        return _ended(prompts[:, :-1].sort(dim=1).values)


class Brackets(TokenTask):
    """Brackets of two kinds, some still open: to be closed in the right order, the last opened first.

    Args:
        length: number of brackets in the prompt. The answer has up to as many, and its end.
        **options: `group_size`, `reward` and `evaluation_prompts`, as for `TokenTask`.

    Example:
        >>> decode(Brackets(7).answers(encode("([()[](=")[None])[0])
        ')]).____'
    """

    def __init__(self, length: int = 8, **options: Any) -> None:
        checks.require_at_least("length", length, 1)
        super().__init__([*[BRACKETS] * length, (EQUALS,)], length + 1, **options)
        self.length = length

    def prompts(
        self, num_prompts: int, *, generator: torch.Generator | None = None, device: torch.device | str = "cpu"
    ) -> Int[Tensor, "N P"]:
        """Draw prompts `(N, P)`: each bracket opens or closes with probability ½, and opens where none is open."""
        checks.require_at_least("num_prompts", num_prompts, 1)
        shape = (num_prompts, self.length)
        opens = torch.randint(2, shape, generator=generator, device=device, dtype=torch.bool)
        # "(" or "[": every other token of the four.
        opening = BRACKETS[0] + 2 * torch.randint(2, shape, generator=generator, device=device)
        prompts = torch.full((num_prompts, self.length + 1), EQUALS, device=device)
        stack, depth = torch.zeros_like(opening), torch.zeros_like(opening[:, :1])
        for place in range(self.length):
            newest = stack.gather(1, (depth - 1).clamp(min=0))
            token = opening[:, place, None].where(opens[:, place, None] | (depth == 0), newest)
            prompts[:, place] = token[:, 0]
            stack, depth = _push_or_pop(stack, depth, token)
        return prompts

    def answers(self, prompts: Int[Tensor, "N P"]) -> Int[Tensor, "N L"]:
        """The shortest closings, `(N, L)`."""
        self._require_prompts(prompts)
        stack, depth = torch.zeros_like(prompts[:, :-1]), torch.zeros_like(prompts[:, :1])
        for place in range(self.length):
            token = prompts[:, place, None]
            newest = stack.gather(1, (depth - 1).clamp(min=0)).where(depth > 0, PAD)
            wrong = _closes(token) & (token != newest)
            if wrong.any():
                text = decode(prompts[int(wrong.nonzero()[0, 0])])
                raise ValueError(f"prompts: expected brackets that close the newest open one, got {text!r}")
            stack, depth = _push_or_pop(stack, depth, token)
        places = torch.arange(self.length + 1, device=prompts.device)
        closing = stack.gather(1, (depth - 1 - places).clamp(min=0))  # from the top of the stack down
        return torch.where(places < depth, closing, torch.where(places == depth, END, PAD))


TASKS: dict[str, type[TokenTask]] = {
    "addition": Addition,
    "modular": ModularArithmetic,
    "sorting": Sorting,
    "brackets": Brackets,
}


def make_task(spec: str) -> TokenTask:
    """The task of a name and options as one writes them on a command line.

    Args:
        spec: a name of `TASKS`, then, after a colon, options with commas between them.

    Raises:
        TypeError: the task has no such option.
        ValueError: an unknown name, which lists those there are, or an option without a value.

    Example:
        >>> make_task("addition:digits=3,reward=graded").reward
        'graded'
    """
    name, _, rest = spec.partition(":")
    checks.require_choice("task", name, tuple(TASKS))
    options: dict[str, Any] = {}
    for part in filter(None, rest.split(",")):
        key, equals, value = part.partition("=")
        if not (key and equals and value):
            raise ValueError(f"task: expected options written as name=value, got {part!r}")
        options[key] = int(value) if value.isdecimal() else value
    try:
        return TASKS[name](**options)
    except TypeError as error:
        raise TypeError(f"task: {name} has no option like that in {spec!r}: {error}") from error


def _read(digits: Tensor) -> Tensor:
    """The numbers (N,) whose digits, most significant first, are these tokens (N, D)."""
    powers = torch.tensor([10**k for k in reversed(range(digits.shape[1]))], device=digits.device)
    return ((digits - ZERO) * powers).sum(dim=1)


def _write(numbers: Tensor, digits: int) -> Tensor:
    """The tokens (N, D) of numbers (N,), least significant digit first."""
    powers = torch.tensor([10**k for k in range(digits)], device=numbers.device)
    return ZERO + numbers[:, None] // powers % 10


def _equation(first: Tensor, sign: int, second: Tensor) -> Tensor:
    """Prompts `first sign second =`, (N, P)."""
    column = torch.full_like(first[:, :1], sign)
    return torch.cat([first, column, second, torch.full_like(column, EQUALS)], dim=1)


def _ended(answers: Tensor) -> Tensor:
    """Answers with the end token behind them."""
    return torch.cat([answers, torch.full_like(answers[:, :1], END)], dim=1)


def _closes(tokens: Tensor) -> Tensor:
    """True where a bracket closes: every closing bracket stands behind its opening one in the vocabulary."""
    return (tokens - BRACKETS[0]) % 2 == 1


def _push_or_pop(stack: Tensor, depth: Tensor, token: Tensor) -> tuple[Tensor, Tensor]:
    """The stacks (N, length) of awaited closing brackets, and their depths (N, 1), after one more bracket (N, 1)."""
    closes = _closes(token)
    top = depth.clamp(max=stack.shape[1] - 1)
    stack = stack.scatter(1, top, stack.gather(1, top).where(closes, token + 1))
    return stack, torch.where(closes, depth - 1, depth + 1)


def _require_between(name: str, value: int, low: int, high: int) -> None:
    """Check that a number lies in a range."""
    if not low <= value <= high:
        raise ValueError(f"{name}: expected {low} to {high}, got {value}")
