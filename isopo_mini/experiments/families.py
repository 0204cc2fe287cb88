"""Rules as they are written on a command line: with alternatives, optimizers and step sizes.

What differs in nothing but such choices is one family, of which the best member is the method.
"""

import itertools
from collections.abc import Sequence

from isopo_mini import checks
from isopo_mini.rules import rule_specs
from isopo_mini.rules.optimizers import OPTIMIZERS


def parse_rules(
    rules: Sequence[str], learning_rates: Sequence[float], optimizers: Sequence[str] = ("adamw",)
) -> tuple[dict[str, list[float]], dict[str, list[str]]]:
    """Step sizes of every rule: those after its `@`, or else those of `--learning-rates`; and the families.

    With several optimizers, or its own after a `/`, a rule is there once for each, as `rule/optimizer`.

    Raises:
        ValueError: a rule is unknown, comes twice, or has no step sizes.

    Example:
        >>> parse_rules(["ntk", "trpo@0.001,0.01"], [0.1])
        ({'ntk': [0.1], 'trpo': [0.001, 0.01]}, {'ntk': ['ntk'], 'trpo': ['trpo']})
        >>> parse_rules(["ntk:damping=1|10/sgd@0.1"], [])[1]
        {'ntk:damping=1|10': ['ntk:damping=1/sgd', 'ntk:damping=10/sgd']}
    """
    step_sizes: dict[str, list[float]] = {}
    families: dict[str, list[str]] = {}
    for text in rules:
        described, _, sizes = text.partition("@")
        family, _, own = described.partition("/")
        names = own.split("|") if own else list(optimizers) if len(optimizers) > 1 else []
        for name in names:
            checks.require_choice("optimizer", name, OPTIMIZERS)
        try:
            numbers = [float(size) for size in sizes.split(",")] if sizes else list(learning_rates)
        except ValueError:
            raise ValueError(f"rules: expected numbers after the @ of {described}, got {sizes!r}") from None
        for rule in _alternatives(family):
            rule_specs.parse(rule)
            for label in [f"{rule}/{name}" for name in names] or [rule]:
                if label in step_sizes:
                    raise ValueError(f"rules: expected every rule once, got {label} twice")
                if not numbers:
                    raise ValueError(
                        f"rules: expected step sizes for {label}, by --learning-rates or {label}@0.01,0.03"
                    )
                step_sizes[label] = numbers
                families.setdefault(family, []).append(label)
    return step_sizes, families


def _alternatives(family: str) -> list[str]:
    """All that `name:option=1|2,other=3|4` stands for."""
    name, colon, rest = family.partition(":")
    options = []
    for part in rest.split(",") if rest else []:
        option, equals, values = part.partition("=")
        options.append([option + equals + value for value in values.split("|")])
    return [name + colon + ",".join(chosen) for chosen in itertools.product(*options)]
