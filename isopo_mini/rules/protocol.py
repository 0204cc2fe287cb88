"""What a rule is to `training.loop.train` and to whoever wraps one."""

from typing import Any, Protocol, runtime_checkable

import torch

from isopo_mini.batch import Batch


@runtime_checkable
class UpdateRule(Protocol):
    """How one batch changes the policy."""

    def step(self, policy: Any, batch: Batch, optimizer: torch.optim.Optimizer) -> dict[str, float]:
        """Use one batch, in one or several optimizer steps; return metrics.

        The metric "backward_passes" counts in units of the batch: 1 when every sequence went through one backward
        pass, in microbatches or not; 4 after four epochs. Other names are free, except those in `COLUMNS`. What a
        rule draws itself, minibatches or sketches, it draws from a generator it was given when it was made.
        """
