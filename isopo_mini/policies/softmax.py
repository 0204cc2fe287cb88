"""The two policies whose gradients fit on paper: a table of logits, and logits linear in features."""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from isopo_mini import checks
from isopo_mini.policies.categorical import CategoricalPolicy
from isopo_mini.precision import at_least_float32


def softmax_fisher(probs: Float[Tensor, "*B A"]) -> Float[Tensor, "*B A A"]:
    """Fisher matrix of a softmax in its logits, diag π − ππᵀ, singular as it must be: its rows sum to zero.

    Each diagonal entry is minus the sum of its row's other entries. Written as π − π² it would lose its digits where
    one action takes nearly all the probability, and with them the direction in which nothing changes: a constant
    added to all logits.

    Args:
        probs: π, probabilities along the last axis, `(..., A)`.

    Returns:
        `(..., A, A)`, in at least single precision, differentiable.

    Raises:
        TypeError: not a floating-point tensor.
    """
    checks.require_shape("probs", probs, "... A")
    checks.require_floating("probs", probs)
    probs = at_least_float32(probs)
    diagonal = torch.eye(probs.shape[-1], dtype=torch.bool, device=probs.device)
    others = (-probs[..., :, None] * probs[..., None, :]).masked_fill(diagonal, 0.0)
    return others - torch.diag_embed(others.sum(dim=-1))


class TabularSoftmax(CategoricalPolicy):
    """One free logit for every state and action: π(a|o) = exp θ_oa / Σ_b exp θ_ob.

    The table is an `nn.Embedding` called `table`; it starts at zero, the uniform policy.

    Args:
        num_states: number of states (contexts of a bandit).
        num_actions: number of actions A.

    Example:
        >>> import torch
        >>> TabularSoftmax(2, 3).logits(torch.tensor([0, 1, 1])).shape
        torch.Size([3, 3])
    """

    def __init__(self, num_states: int, num_actions: int) -> None:
        checks.require_at_least("num_states", num_states, 1)
        checks.require_at_least("num_actions", num_actions, 1)
        super().__init__()
        self.table = nn.Embedding(num_states, num_actions)
        nn.init.zeros_(self.table.weight)

    @classmethod
    def from_probs(cls, probs: Float[Tensor, "states A"]) -> "TabularSoftmax":
        """The tabular policy that has exactly these probabilities: θ = log probs.

        Args:
            probs: strictly positive, one row a state, rows summing to 1, `(states, A)`.

        Raises:
            ValueError: a probability is not positive, or a row does not sum to 1.

        Example:
            >>> import torch
            >>> TabularSoftmax.from_probs(torch.tensor([[0.25, 0.75]])).logits(torch.tensor([0])).exp()
            tensor([[0.2500, 0.7500]], grad_fn=<ExpBackward0>)
        """
        checks.require_shape("probs", probs, "states A")
        checks.require_floating("probs", probs)
        checks.require_not_empty("probs", probs)
        checks.require_finite("probs", probs)
        if (probs <= 0).any():
            raise ValueError(f"probs: expected probabilities > 0, got {probs.min().item():g}")
        worst = (probs.sum(dim=1) - 1).abs().max().item()
        if worst > 1e-4:
            raise ValueError(f"probs: expected rows that sum to 1, got a row that is off by {worst:g}")
        policy = cls(*probs.shape).to(device=probs.device, dtype=probs.dtype)
        with torch.no_grad():
            policy.table.weight.copy_(probs.log())
        return policy

    def logits(self, observations: Int[Tensor, "..."]) -> Float[Tensor, "... A"]:
        """θ_o for every state index, `(...)` → `(..., A)`."""
        checks.require_integer("observations", observations)
        return self.table(observations)


class LinearSoftmax(CategoricalPolicy):
    """Logits linear in the features of the observation: π(a|o) ∝ exp(w_a · o). No bias.

    Args:
        num_features: length d of an observation.
        num_actions: number of actions A.
    """

    def __init__(self, num_features: int, num_actions: int) -> None:
        checks.require_at_least("num_features", num_features, 1)
        checks.require_at_least("num_actions", num_actions, 1)
        super().__init__()
        self.linear = nn.Linear(num_features, num_actions, bias=False)

    def logits(self, observations: Float[Tensor, "... d"]) -> Float[Tensor, "... A"]:
        """W o for every feature vector, `(..., d)` → `(..., A)`.

        Raises:
            TypeError: the observations have another dtype than the weights, such as NumPy's float64.
            ValueError: their last axis is not d.
        """
        checks.require_layer_input("observations", observations, self.linear.weight)
        return self.linear(observations)
