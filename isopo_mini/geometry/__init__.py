"""The subject: how a step in parameters moves the policy, and how to scale it by that.

`fisher` and `natural_gradient` are the exact objects, dense and slow. `gram` and `isopo` are the
approximation; `layerwise` computes it inside one backward pass, with a choice of `transforms`. Functions are
called by their module: `fisher.exact_fisher`, `isopo.ntk_coefficients`.
"""

from isopo_mini.geometry import fisher, gram, isopo, layerwise, natural_gradient, transforms

__all__ = ["fisher", "gram", "isopo", "layerwise", "natural_gradient", "transforms"]
