"""Where batches come from. A task has `sample(policy, num_sequences)` and `evaluate(policy)`."""

from isopo_mini.tasks import bandit
from isopo_mini.tasks.bandit import Bandit, ContextualBandit

__all__ = ["Bandit", "ContextualBandit", "bandit"]
