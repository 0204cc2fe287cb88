"""Memory that the layers of a model share one after another."""

import math

import torch
from torch import Tensor


class Workspace:
    """Memory for the G_s and for factors with weights or signs, used again by every layer.

    Fresh pages cost the CPU more than the arithmetic. It keeps as much as the largest layer took.
    """

    def __init__(self) -> None:
        self._buffers: dict[torch.dtype, Tensor] = {}
        self._used = 0

    def start_layer(self) -> None:
        """What earlier layers took is free again."""
        self._used = 0

    def take(self, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """Uninitialised memory of the given shape, with the dtype and device of `like`."""
        taken = self.lend(shape, like)
        self._used += taken.numel()
        return taken

    def lend(self, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """The same, for no longer than until memory is asked for again."""
        if like.device.type != "cpu":  # the allocator of a GPU keeps its memory already
            return torch.empty(shape, dtype=like.dtype, device=like.device)
        end = self._used + math.prod(shape)
        buffer = self._buffers.get(like.dtype)
        if buffer is None or buffer.numel() < end:
            buffer = self._buffers[like.dtype] = torch.empty(end, dtype=like.dtype)
        return buffer[self._used : end].view(shape)
