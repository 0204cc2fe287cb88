"""The optimizer that takes the step an update rule left in `.grad`: SGD, SGD with momentum, AdamW or Muon, by name.

An update rule mixes sequences, an optimizer rescales parameters; any pair of them can be combined. All are made
without weight decay: it would move the policy even where every advantage is zero.
"""

from typing import Any

import torch
from torch import nn

from isopo_mini import checks

OPTIMIZERS = ("sgd", "momentum", "adamw", "muon")


class Together(torch.optim.Optimizer):
    """Several optimizers that step as one. Their parameter groups are shared, so a scheduler reaches all of them.

    Args:
        optimizers: of disjoint parameters.
    """

    def __init__(self, *optimizers: torch.optim.Optimizer) -> None:
        self.optimizers = optimizers
        super().__init__([group for optimizer in optimizers for group in optimizer.param_groups], {})

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Let every optimizer step."""
        for optimizer in self.optimizers:
            optimizer.step()

    def state_dict(self) -> dict[str, Any]:
        """The state of every optimizer, in order."""
        return {"optimizers": [optimizer.state_dict() for optimizer in self.optimizers]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Give every optimizer its state back."""
        for optimizer, state in zip(self.optimizers, state_dict["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        self.param_groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]


def hidden_matrices(policy: nn.Module) -> list[nn.Parameter]:
    """What Muon is for: the trainable weights of all `nn.Linear` layers but the last, which gives the logits.

    A weight that is also an embedding's, or the last layer's, is left out. What is left for another optimizer are
    embeddings, biases, gains, and that last layer.
    """
    linear = [module for module in policy.modules() if isinstance(module, nn.Linear)]
    others = [module for module in policy.modules() if isinstance(module, nn.Embedding)] + linear[-1:]
    elsewhere = {id(module.weight) for module in others}
    inside = {id(module.weight) for module in linear} - elsewhere
    return [parameter for parameter in policy.parameters() if id(parameter) in inside and parameter.requires_grad]


def make_optimizer(name: str, policy: nn.Module, learning_rate: float) -> torch.optim.Optimizer:
    """The optimizer `name` of all trainable parameters of the policy.

    Args:
        name: `"sgd"`: θ ← θ − ηg; `"momentum"`: m ← 0.9m + g, θ ← θ − ηm; `"adamw"`: β = (0.9, 0.999); `"muon"`:
            `torch.optim.Muon` for the `hidden_matrices`, with steps scaled to the size of AdamW's, and AdamW for all
            other parameters.
        policy: whose parameters change.
        learning_rate: η, one for all parameters.

    Raises:
        ValueError: the name is unknown, the learning rate is not positive, the policy has nothing to train, or, for
            Muon, no hidden matrix.

    Source: Loshchilov & Hutter, *Decoupled weight decay regularization*, arXiv 1711.05101; K. Jordan, *Muon: an
    optimizer for hidden layers in neural networks* (2024); the scale of its steps is Moonshot's, arXiv 2502.16982.
    """
    checks.require_choice("optimizer", name, OPTIMIZERS)
    checks.require_positive("learning_rate", learning_rate)
    trainable = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    if not trainable:
        raise ValueError("policy: expected at least one trainable parameter, got none")
    if name in ("sgd", "momentum"):
        return torch.optim.SGD(trainable, lr=learning_rate, momentum=0.9 if name == "momentum" else 0.0)
    if name == "adamw":
        return torch.optim.AdamW(trainable, lr=learning_rate, weight_decay=0.0, fused=True)
    matrices = hidden_matrices(policy)
    if not matrices:
        raise ValueError(
            f"optimizer: expected a policy with a hidden matrix for muon, got {type(policy).__name__} without; "
            "use sgd, momentum or adamw"
        )
    chosen = {id(parameter) for parameter in matrices}
    rest = [parameter for parameter in trainable if id(parameter) not in chosen]
    muon = torch.optim.Muon(matrices, lr=learning_rate, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
    return Together(muon, torch.optim.AdamW(rest, lr=learning_rate, weight_decay=0.0, fused=True)) if rest else muon
