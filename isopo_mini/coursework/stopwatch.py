"""How long a submission takes, whatever else the machine is doing: seconds of the processor, not of the clock."""

import time
from typing import Protocol, runtime_checkable

PATIENCE = 4.0  # as many times what is allowed, on the clock: for who waits, and needs no processor


@runtime_checkable
class Measured(Protocol):
    """What a stopwatch is held on."""

    def processor_seconds(self) -> float:
        """Of the processor, since its start, by it and by all that it has started."""


class Stopwatch:
    """Counts the seconds of the processor, or a quarter of those of the clock where that is more.

    A busy machine makes nobody's function slow, so it costs no marks; and who sleeps comes to an end as well.

    Args:
        measured: whose seconds they are.
        allowed: how many it has.
    """

    def __init__(self, measured: Measured, allowed: float) -> None:
        self.measured, self.allowed = measured, allowed
        self.before, self.began = measured.processor_seconds(), time.monotonic()

    def seconds(self) -> float:
        """Since the stopwatch was made; never more than on the clock, though two processors may have been busy."""
        on_the_clock = time.monotonic() - self.began
        used = self.measured.processor_seconds() - self.before
        return max(min(used, on_the_clock), on_the_clock / PATIENCE)

    def left(self) -> float:
        """Of those that are allowed; not positive when none are."""
        return self.allowed - self.seconds()
