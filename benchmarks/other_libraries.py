"""The same Gram matrices by libraries for per-example gradients, where they are installed: `pip install .[benchmarks]`.

Each gives a function without arguments that returns the sum of all layers' Gram matrices of an MLP, `(N, N)`.
"""

import copy
import warnings
from collections.abc import Callable
from importlib.util import find_spec

import torch
from torch import Tensor, nn

from isopo_mini.policies import MLP

# Opacus and BackPACK hook the first layer, whose inputs ask for no gradient.
warnings.filterwarnings("ignore", message="Full backward hook is firing")


def by_other_libraries(
    policy: MLP, log_probs: Callable[[Tensor, Tensor], Tensor], observations: Tensor, actions: Tensor
) -> dict[str, Callable[[], Tensor]]:
    """By name; without those that are not installed.

    Args:
        policy: of one hidden layer.
        log_probs: from logits and actions.
        observations: `(N, features)`.
        actions: `(N,)`.
    """
    makers = {
        "opacus, per-sample gradients": ("opacus", _opacus),
        "BackPACK, batch gradients": ("backpack", _backpack),
    }
    data = (observations, actions)
    found = {name: make(policy, log_probs, *data) for name, (module, make) in makers.items() if find_spec(module)}
    return found | ({"JAX, jit of vmap(grad)": _jax(policy, *data)} if find_spec("jax") else {})


def _product(gradients: list[Tensor]) -> Tensor:
    """JJᵀ of per-sample gradients, `(N, …)` each."""
    rows = torch.cat([gradient.flatten(1) for gradient in gradients], dim=1)
    return rows @ rows.T


def _opacus(policy: MLP, log_probs: Callable, observations: Tensor, actions: Tensor) -> Callable[[], Tensor]:
    from opacus import GradSampleModule

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it advises a later PyTorch
        watched = GradSampleModule(copy.deepcopy(policy.layers), loss_reduction="sum")

    def run() -> Tensor:
        watched.zero_grad()
        log_probs(watched(observations), actions).sum().backward()
        return _product([parameter.grad_sample for parameter in watched.parameters()])

    return run


def _backpack(policy: MLP, log_probs: Callable, observations: Tensor, actions: Tensor) -> Callable[[], Tensor]:
    from backpack import backpack, extend
    from backpack.extensions import BatchGrad

    layers: nn.Module = extend(copy.deepcopy(policy.layers))

    def run() -> Tensor:
        layers.zero_grad()
        with backpack(BatchGrad()):
            log_probs(layers(observations), actions).sum().backward()
        return _product([parameter.grad_batch for parameter in layers.parameters()])

    return run


def _jax(policy: MLP, observations: Tensor, actions: Tensor) -> Callable[[], Tensor]:
    import jax
    import jax.numpy as jnp

    first, last = policy.layers[0], policy.layers[-1]
    weights = [jnp.asarray(tensor.detach().numpy()) for layer in (first, last) for tensor in (layer.weight, layer.bias)]
    inputs, chosen = jnp.asarray(observations.numpy()), jnp.asarray(actions.numpy())

    def log_prob(weights: list, seen: object, action: object) -> object:
        first_weight, first_bias, last_weight, last_bias = weights
        logits = last_weight @ jnp.tanh(first_weight @ seen + first_bias) + last_bias
        return jax.nn.log_softmax(logits)[action]

    @jax.jit
    def gram(weights: list, inputs: object, chosen: object) -> object:
        gradients = jax.vmap(jax.grad(log_prob), (None, 0, 0))(weights, inputs, chosen)
        rows = jnp.concatenate([gradient.reshape(len(gradient), -1) for gradient in gradients], axis=1)
        return rows @ rows.T

    return lambda: torch.from_dlpack(gram(weights, inputs, chosen).block_until_ready())
