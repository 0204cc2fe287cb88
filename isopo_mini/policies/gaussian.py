"""A policy over vectors of real numbers: a Gaussian around what a network says.

π(a|o) = N(a; μ(o), diag σ²). The spread σ is a parameter of its own, the same at every observation.
"""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributions import Independent, Normal

from isopo_mini import checks
from isopo_mini.batch import Batch
from isopo_mini.policies.mlp import perceptron
from isopo_mini.precision import at_least_float32


class GaussianPolicy(nn.Module):
    """Independent Gaussians, with a multilayer perceptron for their means and one log σ for each component.

    Actions are not squashed: an environment that takes no more than so much clips them, and log π stays that of the
    action that was drawn.

    Args:
        num_features: length d of an observation.
        num_actions: length k of an action.
        hidden: width of each hidden layer; `()` gives means that are linear in the observation.
        activation: makes the activation that follows each hidden layer.
        log_std: where every log σ starts.

    Raises:
        ValueError: a width is below 1, or `log_std` is not finite.

    Example:
        >>> import torch
        >>> policy = GaussianPolicy(3, 2)
        >>> policy.distribution(torch.zeros(5, 4, 3)).mean.shape
        torch.Size([5, 4, 2])
        >>> actions, log_probs = policy.sample_actions(torch.zeros(5, 3))
        >>> actions.shape, log_probs.shape
        (torch.Size([5, 2]), torch.Size([5]))

    Source: R. J. Williams, *Simple statistical gradient-following algorithms for connectionist reinforcement
    learning*, Machine Learning 8 (1992), section 6.
    """

    def __init__(
        self,
        num_features: int,
        num_actions: int,
        hidden: Sequence[int] = (64,),
        activation: Callable[[], nn.Module] = nn.Tanh,
        *,
        log_std: float = 0.0,
    ) -> None:
        super().__init__()
        self.mean = perceptron(num_features, num_actions, hidden, activation)
        self.log_std = nn.Parameter(torch.full((num_actions,), float(log_std)))
        checks.require_finite("log_std", self.log_std)

    def distribution(self, observations: Float[Tensor, "... d"]) -> Independent:
        """π(·|o) at every observation, with batch axes `(...)` and actions of length k, in at least single precision.

        Raises:
            TypeError: the observations have another dtype than the weights.
            ValueError: their last axis is not d.
        """
        checks.require_layer_input("observations", observations, self.mean[0].weight)  # type: ignore[arg-type]
        mean = at_least_float32(self.mean(observations))
        # Without torch's own checks: a run that diverges is told so by `train`, with the name of the parameter.
        return Independent(Normal(mean, self.log_std.to(mean).exp().expand_as(mean), validate_args=False), 1)

    def forward(self, observations: Float[Tensor, "... d"]) -> Float[Tensor, "... k"]:
        """μ(o), the most probable action."""
        return self.distribution(observations).mean

    def log_prob(self, batch: Batch) -> Float[Tensor, "S T"]:
        """log π(a_st | o_st) of the batch's actions `(S, T, k)`, differentiable; 0 where `batch.mask` is False.

        What padding holds is never looked at.

        Raises:
            ValueError: the actions are not floating `(S, T, k)`, as those of a `CategoricalPolicy` are not.
        """
        sizes = checks.require_shape("batch.mask", batch.mask, "S T") | {"k": len(self.log_std)}
        checks.require_shape("batch.actions", batch.actions, "S T k", sizes)
        actions = batch.actions.masked_fill(~batch.mask.unsqueeze(-1), 0.0)
        return self.distribution(batch.observations).log_prob(actions).masked_fill(~batch.mask, 0.0)

    @torch.no_grad()
    def sample_actions(
        self, observations: Float[Tensor, "... d"], *, generator: torch.Generator | None = None
    ) -> tuple[Float[Tensor, "... k"], Float[Tensor, "..."]]:
        """Draw one action at every observation.

        Args:
            observations: `(..., d)`.
            generator: source of randomness, on the policy's device; torch's global one when None.

        Returns:
            The actions `(..., k)` and their log-probability densities `(...)`, without gradient.
        """
        distribution = self.distribution(observations)
        mean = distribution.mean
        noise = torch.randn(mean.shape, generator=generator, dtype=mean.dtype, device=mean.device)
        actions = mean + distribution.stddev * noise
        return actions, distribution.log_prob(actions)
