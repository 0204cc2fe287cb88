"""Random finite Markov decision processes, for claims that should hold of any."""

import numpy as np
import torch

from isopo_mini import checks
from isopo_mini.tasks.mdp import MDP


def random_mdp(num_states: int, num_actions: int, *, discount: float, seed: int, concentration: float = 1.0) -> MDP:
    """A random process: Dirichlet rows P(·|s, a), rewards uniform in [0, 1], a uniform first state.

    Args:
        num_states: S.
        num_actions: A.
        discount: γ.
        seed: of NumPy's generator; the same seed gives the same process.
        concentration: of the Dirichlet law. Small: an action leads almost surely to one state; large: nearly
            uniform.
    """
    checks.require_at_least("num_states", num_states, 1)
    checks.require_at_least("num_actions", num_actions, 1)
    checks.require_positive("concentration", concentration)
    generator = np.random.default_rng(seed)
    rows = generator.dirichlet(np.full(num_states, concentration), (num_states, num_actions))
    rewards = generator.uniform(size=(num_states, num_actions))
    return MDP(torch.from_numpy(rows), torch.from_numpy(rewards), discount=discount)
