"""A multilayer perceptron over feature vectors."""

from collections.abc import Callable, Sequence
from itertools import pairwise

from jaxtyping import Float
from torch import Tensor, nn

from isopo_mini import checks
from isopo_mini.policies.categorical import CategoricalPolicy


def perceptron(
    num_features: int, num_actions: int, hidden: Sequence[int], activation: Callable[[], nn.Module]
) -> nn.Sequential:
    """Linear layers of these widths with an activation between them.

    Raises:
        ValueError: a width is below 1.
    """
    widths = [num_features, *hidden, num_actions]
    names = ["num_features", *(f"hidden[{i}]" for i in range(len(hidden))), "num_actions"]
    for name, width in zip(names, widths, strict=True):
        checks.require_at_least(name, width, 1)
    layers: list[nn.Module] = []
    for i, (inputs, outputs) in enumerate(pairwise(widths)):
        layers += [activation()] * (i > 0) + [nn.Linear(inputs, outputs)]
    return nn.Sequential(*layers)


class MLP(CategoricalPolicy):
    """Linear layers with an activation between them; the last one gives the logits.

    Args:
        num_features: length d of an observation.
        num_actions: number of actions A.
        hidden: width of each hidden layer; `()` gives a linear policy with bias.
        activation: makes the activation that follows each hidden layer.

    Example:
        >>> import torch
        >>> MLP(4, 2, hidden=(16,)).logits(torch.zeros(5, 3, 4)).shape
        torch.Size([5, 3, 2])
    """

    def __init__(
        self,
        num_features: int,
        num_actions: int,
        hidden: Sequence[int] = (64,),
        activation: Callable[[], nn.Module] = nn.Tanh,
    ) -> None:
        super().__init__()
        self.num_features = num_features
        self.layers = perceptron(num_features, num_actions, hidden, activation)

    def logits(self, observations: Float[Tensor, "... d"]) -> Float[Tensor, "... A"]:
        """The network's output for every feature vector, `(..., d)` → `(..., A)`.

        Raises:
            TypeError: the observations have another dtype than the weights, such as NumPy's float64.
            ValueError: their last axis is not d.
        """
        checks.require_layer_input("observations", observations, self.layers[0].weight)  # type: ignore[arg-type]
        return self.layers(observations)
