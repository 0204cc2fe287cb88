"""Where batches come from. A task has `sample(policy, num_sequences)` and `evaluate(policy)`.

`isopo_mini.tasks.warm_start`, which is also a command, is imported by name.
"""

from isopo_mini.tasks import bandit, cartpole, token_task, tokens
from isopo_mini.tasks.bandit import Bandit, ContextualBandit
from isopo_mini.tasks.cartpole import CartPole, Episodes
from isopo_mini.tasks.token_task import TokenTask
from isopo_mini.tasks.tokens import Addition, Brackets, ModularArithmetic, Sorting, make_task

__all__ = [
    "Addition",
    "Bandit",
    "Brackets",
    "CartPole",
    "ContextualBandit",
    "Episodes",
    "ModularArithmetic",
    "Sorting",
    "TokenTask",
    "bandit",
    "cartpole",
    "make_task",
    "token_task",
    "tokens",
]
