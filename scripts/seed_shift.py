"""Other random numbers for the same chapter: a constant is added to every seed that a program sets.

`make portable` installs this in a kernel before the first cell, so that no chapter needs a line for it. A chapter's
claim must hold under other seeds, or say that it is about one.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch


def shifted(seed: Any, shift: int) -> Any:
    """The seed plus the shift; of several numbers the first one moves; None stays, it is random anyway."""
    if isinstance(seed, int | np.integer):
        return int(seed) + shift
    if isinstance(seed, Sequence) and len(seed) and isinstance(seed[0], int | np.integer):
        return [int(seed[0]) + shift, *seed[1:]]
    return seed


def install(shift: int) -> None:
    """Shift the seeds of `torch.manual_seed`, `torch.Generator` and `numpy.random.default_rng` in this process."""
    manual_seed, generator, default_rng = torch.manual_seed, torch.Generator, np.random.default_rng

    class Generator(generator):  # type: ignore[misc, valid-type]
        """A generator whose seeds are shifted."""

        def manual_seed(self, seed: int) -> "Generator":
            super().manual_seed(shifted(seed, shift))
            return self

    torch.manual_seed = lambda seed: manual_seed(shifted(seed, shift))  # type: ignore[assignment]
    torch.random.manual_seed = torch.manual_seed  # type: ignore[assignment]
    torch.Generator = Generator  # type: ignore[misc]
    np.random.default_rng = lambda seed=None: default_rng(shifted(seed, shift))  # type: ignore[assignment]
