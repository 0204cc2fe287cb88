"""Where batches come from. A task has `sample(policy, num_sequences)` and `evaluate(policy)`.

`isopo_mini.tasks.warm_start`, which is also a command, is imported by name.
"""

from isopo_mini.tasks import acrobot, bandit, cartpole, lqr, mdp, occupancy, pendulum, slow_chain, token_task, tokens
from isopo_mini.tasks.acrobot import Acrobot
from isopo_mini.tasks.bandit import Bandit, ContextualBandit
from isopo_mini.tasks.cartpole import CartPole, Episodes
from isopo_mini.tasks.lqr import LinearQuadratic
from isopo_mini.tasks.lqr_minimum import local_minimum
from isopo_mini.tasks.mdp import MDP, npg_step
from isopo_mini.tasks.mdp_evaluation import evaluate_many
from isopo_mini.tasks.mdp_instances import random_mdp
from isopo_mini.tasks.mdp_rollouts import sample_action_values
from isopo_mini.tasks.occupancy import solve_linear_program
from isopo_mini.tasks.pendulum import Pendulum
from isopo_mini.tasks.reasoning import ReasoningTask
from isopo_mini.tasks.slow_chain import SlowChain
from isopo_mini.tasks.token_task import TokenTask
from isopo_mini.tasks.tokens import Addition, Brackets, ModularArithmetic, Sorting, make_task

__all__ = [
    "MDP",
    "Acrobot",
    "Addition",
    "Bandit",
    "Brackets",
    "CartPole",
    "ContextualBandit",
    "Episodes",
    "LinearQuadratic",
    "ModularArithmetic",
    "Pendulum",
    "ReasoningTask",
    "SlowChain",
    "Sorting",
    "TokenTask",
    "acrobot",
    "bandit",
    "cartpole",
    "evaluate_many",
    "local_minimum",
    "lqr",
    "make_task",
    "mdp",
    "npg_step",
    "occupancy",
    "pendulum",
    "random_mdp",
    "sample_action_values",
    "slow_chain",
    "solve_linear_program",
    "token_task",
    "tokens",
]
