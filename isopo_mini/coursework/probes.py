"""What the tests of the second assignment do with a layer that a student wrote, where that layer is."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from isopo_mini.coursework.remote import where_it_lives


@where_it_lives
def gradients(
    layer: Any,
    weights: Sequence[Tensor],
    inputs: Float[Tensor, "S T i"],
    actions: Int[Tensor, "S T"],
    advantages: Float[Tensor, "S"],
    damping: float,
) -> list[Tensor]:
    """What one backward pass of Σ log π leaves in a network made of a student's layers, tanh between them.

    Args:
        layer: a `torch.autograd.Function` with the arguments x, weight, advantages, damping.
        weights: of each layer, the last one's for the logits.
        inputs: x of the first layer.
        actions: whose log-probabilities are summed.
        advantages: A.
        damping: λ.

    Returns:
        The gradient of each weight, then that of the inputs.
    """
    x = inputs.detach().clone().requires_grad_()
    leaves = [weight.detach().clone().requires_grad_() for weight in weights]
    hidden = x
    for leaf in leaves[:-1]:
        hidden = layer.apply(hidden, leaf, advantages, damping).tanh()
    logits = layer.apply(hidden, leaves[-1], advantages, damping)
    logits.log_softmax(dim=-1).gather(-1, actions.unsqueeze(-1)).sum().backward()
    return [leaf.grad if leaf.grad is not None else torch.zeros_like(leaf) for leaf in (*leaves, x)]
