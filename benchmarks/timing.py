"""Timing several things against each other in one process, so that a ratio means something on a busy machine."""

import time
from collections.abc import Callable
from statistics import median

import torch
from tqdm.auto import tqdm


def rounds_of(
    steps: dict[str, Callable[[], object]], rounds: int, device: torch.device, label: str
) -> dict[str, list[float]]:
    """Seconds of every step in every round. A round runs each once, so that slow moments hit all alike."""
    for step in steps.values():  # warm up twice: memory is allocated, kernels are chosen
        step()
        step()
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in tqdm(range(rounds), desc=label, leave=False):
        for name, step in steps.items():
            seconds[name].append(_seconds(step, device))
    return seconds


def ratio(seconds: dict[str, list[float]], name: str, reference: str) -> float:
    """Median over the rounds of this step's time over the reference's in the same round."""
    return median(a / b for a, b in zip(seconds[name], seconds[reference], strict=True))


def _seconds(step: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize(device)
        start.record()
        step()
        end.record()
        torch.cuda.synchronize(device)
        return start.elapsed_time(end) / 1e3
    started = time.perf_counter()
    step()
    return time.perf_counter() - started
