"""Who acts: policies over a finite set of actions, and a Gaussian one over vectors."""

from isopo_mini.policies.categorical import CategoricalPolicy, categorical_kl, entropy, kl_divergence
from isopo_mini.policies.checkpoints import load_policy, read_origin, save_policy
from isopo_mini.policies.gaussian import GaussianPolicy
from isopo_mini.policies.mlp import MLP
from isopo_mini.policies.pretrained import PretrainedPolicy, load_smollm2
from isopo_mini.policies.sampling import Sampled
from isopo_mini.policies.softmax import LinearSoftmax, TabularSoftmax, softmax_fisher
from isopo_mini.policies.token_policy import TokenPolicy
from isopo_mini.policies.transformer import CausalTransformer

__all__ = [
    "MLP",
    "CategoricalPolicy",
    "CausalTransformer",
    "GaussianPolicy",
    "LinearSoftmax",
    "PretrainedPolicy",
    "Sampled",
    "TabularSoftmax",
    "TokenPolicy",
    "categorical_kl",
    "entropy",
    "kl_divergence",
    "load_policy",
    "load_smollm2",
    "read_origin",
    "save_policy",
    "softmax_fisher",
]
