"""The subject: how a step in parameters moves the policy, and how to scale it by that.

`fisher` and `natural_gradient` are the exact objects, dense and slow. `gram` and `isopo` are the
approximation, and `layerwise` computes it inside one backward pass. Functions are called by their module:
`fisher.exact_fisher`, `isopo.ntk_coefficients`.
"""

__all__ = ["fisher", "gram", "isopo", "layerwise", "natural_gradient"]
