"""The subject, as pure functions: how a step in parameters moves the policy, and how to scale it by that.

`fisher` and `natural_gradient` are the exact objects, dense and slow. `gram` and `isopo` are the approximation; the
engine (`isopo_mini.engine`) computes it inside one backward pass. Functions are called by their module:
`fisher.exact_fisher`, `isopo.ntk_coefficients`.
"""

from isopo_mini.geometry import fisher, gram, isopo, natural_gradient
from isopo_mini.old_names import attributes_of

__all__ = ["fisher", "gram", "isopo", "natural_gradient"]

__getattr__ = attributes_of(__name__)
