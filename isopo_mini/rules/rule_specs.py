"""Update rules by name: `"ntk:damping=0.1,microbatch_size=32"` is a rule, and its text is its label in every table.

A specification is a name of `RULES` and options: those of the rule's class, those of its loss for the clipped
surrogates, and five of every rule or of most:

- `advantages=`: a name of the task's `advantages`. Without it a rule takes what its paper defines (GRPO and its
  relatives), and all others take the same, the task's.
- `entropy=β`: an entropy bonus as a part of the advantages, see `rule_parts.with_entropy`.
- `unit=`: what gets one advantage, `sequence`, `step` or `token`.
- `reuse=K`: a one-step rule applied K times to the same batch, which is stale from the second time on.
- `step=kl`: the step size is not the optimizer's learning rate but δ, in nats a position: see `kl_steps.KLTargeted`.
  Not of TRPO, whose step size is such a δ anyway.

Records are filed under specifications, so what one means never changes, though a class's default may: `"ntk"` has exact
Gram matrices, as it had when the book's records were made, and `"ntk:gram=fast"` is what `NtkIsopo()` does. Only an
estimate may be made in another way.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from isopo_mini import checks
from isopo_mini.batch import Batch
from isopo_mini.objectives.losses import LOSSES
from isopo_mini.rules.kl_steps import KLTargeted
from isopo_mini.rules.old_policy import ClippedSurrogate, TrustRegion
from isopo_mini.rules.one_step import (
    ExactFisherIsopo,
    FisherNormalizedIsopo,
    LayerScaledReinforce,
    LayerwiseIsopo,
    NaturalGradient,
    NtkIsopo,
    Reinforce,
)
from isopo_mini.rules.protocol import UpdateRule
from isopo_mini.rules.rank_one import RankOneNaturalGradient
from isopo_mini.rules.rule_parts import Advantages, with_entropy


@dataclass(frozen=True)
class NamedRule:
    """What a name stands for.

    Args:
        make: the rule's class.
        defaults: options of the class that this name gives.
        advantages: the name of the advantages that the method defines; None for the task's.
        by_step: works by time steps where the task has them: with their advantages, and in the task's unit.
        step_size: the option that the step size is given to; None when it is the optimizer's learning rate.
    """

    make: Callable[..., UpdateRule]
    defaults: Mapping[str, Any]
    advantages: str | None = None
    by_step: bool = False
    step_size: str | None = None


def _surrogate(loss: str, advantages: str | None = None, by_step: bool = False) -> NamedRule:
    """A clipped loss with four epochs a batch: with one alone it would be REINFORCE."""
    return NamedRule(ClippedSurrogate, {"loss": loss, "epochs": 4}, advantages, by_step)


RULES: dict[str, NamedRule] = {
    "reinforce": NamedRule(Reinforce, {}),
    "layer_scaled": NamedRule(LayerScaledReinforce, {}),
    "fisher": NamedRule(FisherNormalizedIsopo, {"gram": "auto"}),
    "ntk": NamedRule(NtkIsopo, {"gram": "auto"}),
    "exact_fisher": NamedRule(ExactFisherIsopo, {}),
    "npg": NamedRule(NaturalGradient, {"solver": "cg", "damping": 0.1, "max_iterations": 20, "tolerance": 1e-3}),
    "rank_one": NamedRule(RankOneNaturalGradient, {}),
    "trpo": NamedRule(TrustRegion, {}, by_step=True, step_size="max_kl"),
    "ppo": _surrogate("ppo", by_step=True),
    "grpo": _surrogate("grpo", "std"),
    "dr_grpo": _surrogate("dr_grpo", "centred"),
    "dapo": _surrogate("dapo", "std"),
    "gspo": _surrogate("gspo", "std"),
    "cispo": _surrogate("cispo", by_step=True),
    "copg": _surrogate("copg", by_step=True),
}


@dataclass
class Reuse:
    """A one-step rule applied `times` times to the same batch: nothing corrects for the policy having moved.

    Args:
        rule: makes one step a batch.
        times: K; K times the rule's backward passes are counted. The other metrics are means over the K.
    """

    rule: UpdateRule
    times: int

    def __post_init__(self) -> None:
        checks.require_at_least("reuse", self.times, 1)

    def step(self, policy: Any, batch: Batch, optimizer: torch.optim.Optimizer) -> dict[str, float]:
        """Use the batch K times."""
        every = [self.rule.step(policy, batch, optimizer) for _ in range(self.times)]
        metrics = {name: sum(metrics[name] for metrics in every) for name in every[0]}
        return {name: value if name == "backward_passes" else value / self.times for name, value in metrics.items()}


def parse(spec: str) -> tuple[str, dict[str, Any]]:
    """The name and the options of a specification; numbers, `true`, `false` and `none` become what they say.

    Raises:
        ValueError: the name is unknown, or an option is not of the form `name=value`, is unknown, or comes twice.

    Example:
        >>> parse("ntk:damping=0.1,microbatch_size=32,gram=sketched")
        ('ntk', {'damping': 0.1, 'microbatch_size': 32, 'gram': 'sketched'})
    """
    name, _, rest = spec.partition(":")
    if name not in RULES:
        raise ValueError(f"rule: expected one of {', '.join(RULES)}, got {name!r}")
    options: dict[str, Any] = {}
    known = options_of(name)
    for part in rest.split(",") if rest else []:
        option, equals, value = part.partition("=")
        if not equals or option not in known or option in options:
            raise ValueError(
                f"rule: expected {name}:option=value,… with each option once, of {', '.join(known)}; got {part!r}"
            )
        options[option] = _value(value)
    return name, options


def options_of(name: str) -> list[str]:
    """The options that a rule of `RULES` takes."""
    named = RULES[name]
    taken = _keywords(named.make) | {"entropy"}
    if named.make in (NtkIsopo, FisherNormalizedIsopo, LayerScaledReinforce):
        taken |= _keywords(LayerwiseIsopo)
    if named.make is ClippedSurrogate:
        taken |= _keywords(LOSSES[named.defaults["loss"]], only=True)
    elif named.step_size is None:
        taken |= {"reuse"}
    if named.step_size is None:
        taken |= {"step"}
    return sorted(taken - {"loss", "transform", named.step_size})


def make_rule(
    spec: str,
    advantages: Mapping[str, Advantages],
    *,
    default: str,
    by_step: str | None = None,
    unit: str = "sequence",
    seed: int = 0,
    step_size: float | None = None,
) -> UpdateRule:
    """The rule of a specification for one task.

    Args:
        spec: see the module.
        advantages: the task's, by name.
        default: which of them a rule takes that defines none itself.
        by_step: the same for rules whose unit is the time step; None for the same ones.
        unit: of the rules that have one and are not told otherwise.
        seed: of what the rule itself draws.
        step_size: for the rules that do not leave it to the optimizer; with `step=kl`, δ.

    Raises:
        ValueError: the specification is not one, or the rule refuses the value of an option.
    """
    name, options = parse(spec)
    named = RULES[name]
    known = options_of(name)
    options = dict(named.defaults) | options
    reuse, step, entropy = options.pop("reuse", 1), options.pop("step", "rate"), options.pop("entropy", 0)
    checks.require_choice("step", step, ("rate", "kl"))
    if "unit" in known and named.advantages is None:
        options.setdefault("unit", unit)
    if "seed" in known:
        options.setdefault("seed", seed)
    if named.step_size is not None and step_size is not None:
        options[named.step_size] = step_size
    stepwise = by_step if by_step and (named.by_step or options.get("unit") == "step") else None
    chosen = options.pop("advantages", named.advantages or stepwise or default)
    checks.require_choice("advantages", chosen, tuple(advantages))
    function = with_entropy(advantages[chosen], entropy) if entropy else advantages[chosen]
    rule = named.make(advantages=function, **options)
    if reuse != 1:
        rule = Reuse(rule, reuse)
    return KLTargeted(rule, step_size if step_size is not None else 0.01) if step == "kl" else rule


def _keywords(function: Callable[..., Any], *, only: bool = False) -> set[str]:
    """The names of a function's arguments; with `only`, of those that are given by name only."""
    parameters = inspect.signature(function).parameters.values()
    skipped = {inspect.Parameter.VAR_KEYWORD} | ({inspect.Parameter.POSITIONAL_OR_KEYWORD} if only else set())
    return {parameter.name for parameter in parameters if parameter.kind not in skipped}


def _value(text: str) -> Any:
    """What the text of an option stands for."""
    words = {"true": True, "false": False, "none": None}
    if text.lower() in words:
        return words[text.lower()]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
