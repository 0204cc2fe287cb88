"""One batch, one change of the policy: every rule has `step(policy, batch, optimizer)` and returns metrics.

`one_step` has REINFORCE, the natural gradient and the two variants of ISOPO, `old_policy` the clipped losses and TRPO,
`rank_one` the natural gradient of one sampled score; all are made of `rule_parts`. `kl_steps` makes the steps of any of
them as long as a given KL. `rule_specs` names rules in a line of text, `optimizers` the optimizers and their step
sizes. A policy whose log-probabilities are random is refused by `repeatable`.
"""

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
from isopo_mini.rules.rank_one import RankOneNaturalGradient
from isopo_mini.rules.rule_parts import batch_advantages, centred_advantages, standardised_advantages

__all__ = [
    "ClippedSurrogate",
    "ExactFisherIsopo",
    "FisherNormalizedIsopo",
    "KLTargeted",
    "LayerScaledReinforce",
    "LayerwiseIsopo",
    "NaturalGradient",
    "NtkIsopo",
    "RankOneNaturalGradient",
    "Reinforce",
    "TrustRegion",
    "batch_advantages",
    "centred_advantages",
    "standardised_advantages",
]
