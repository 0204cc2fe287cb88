"""One Gram matrix for the sequences of several processes: the step that one process with all of them would take.

The natural gradient lives on many sequences in one Gram matrix, and each process of a data-parallel run holds a few.
K needs only inner products, so what has to travel are not gradients of the size of the weights but their sketches: k²
numbers a sequence and a weight matrix, which every process gathers from all others inside its backward pass. Each then
computes the same K and the same coefficients, keeps those of its own sequences, and `DistributedDataParallel` or FSDP2
averages the gradients as it always does.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor

from isopo_mini.engine.layer_gradients import LayerGradients
from isopo_mini.engine.parameter_gradients import squared_lengths
from isopo_mini.geometry import gram as grams
from isopo_mini.precision import at_least_float32


@dataclass
class Ranks:
    """The processes that share Gram matrices, seen from one of them.

    Args:
        group: of `torch.distributed`; give it a timeout: a process that waits for one that has died waits that long.
        received: bytes that this process has got from the others so far.
    """

    group: Any
    received: int = field(default=0, init=False)

    @property
    def size(self) -> int:
        """R."""
        return dist.get_world_size(self.group)

    def gather(self, local: Float[Tensor, "n ..."]) -> Float[Tensor, "m ..."]:
        """The tensors of all processes, one after another in the order of their ranks."""
        parts = [torch.empty_like(local) for _ in range(self.size)]
        dist.all_gather(parts, local.contiguous(), self.group)
        self.received += (self.size - 1) * local.numel() * local.element_size()
        return torch.cat(parts)

    def own(self, values: Float[Tensor, "n ..."]) -> Float[Tensor, "m ..."]:
        """Of what was gathered, the part of this process."""
        return values.chunk(self.size)[dist.get_rank(self.group)]

    def all_advantages(self, advantages: Float[Tensor, "s"]) -> Float[Tensor, "S"]:
        """Those of all processes.

        Raises:
            ValueError: in every process: they have different numbers of sequences.
        """
        count = torch.tensor([float(len(advantages))], device=advantages.device)
        counts = self.gather(count).int().tolist()
        if len(set(counts)) > 1:
            raise ValueError(f"advantages: expected as many sequences in every process of the group, got {counts}")
        return self.gather(advantages)


@dataclass
class GatheredGradients:
    """What a transform asks of a layer, answered for the sequences of all processes.

    Args:
        local: the layer's gradients of this process.
        ranks: who else there is.
    """

    local: LayerGradients
    ranks: Ranks

    def gram(self) -> Float[Tensor, "S S"]:
        """K̂ of all sequences, from the sketches of all processes."""
        features = torch.cat([at_least_float32(part.flatten(1)) for part in self.local.sketched_parts], dim=1)
        return self.local.resources.unscaled(grams.inner_products(self.ranks.gather(features)), 2)

    def few_columns(self) -> None:
        """None: sketches are what is gathered."""
        return None

    def rows_for_products(self, iterations: int) -> None:
        """None: a process group is for sketches by their own names."""
        return None

    def norms(self) -> Float[Tensor, "S"]:
        """‖G_s‖ of all sequences."""
        return self.ranks.gather(self.local.norms())

    def rounding(self, from_gram: bool) -> Float[Tensor, "S"]:
        """Up to which ‖G_s‖ the gradients of all sequences are zero; 0 where they are no sums.

        As numbers, and gathered whatever they are: the processes may differ in how many positions they have.
        """
        rounding, part = self.local.rounding(from_gram), next(iter(self.local.parameters.values()))
        if rounding is None:
            rounding = torch.zeros_like(part.squared_sizes(squared_lengths))
        return self.ranks.gather(rounding)

    def token_overlaps(self, count: int) -> tuple[Tensor, Tensor]:
        """Not to be had: the tokens of other processes would have to travel, not their sketches.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            "norm: expected 'sequence' where Gram matrices are shared by several processes, got a token norm"
        )
