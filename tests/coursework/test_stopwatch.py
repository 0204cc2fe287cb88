"""Seconds of the processor are counted, or a quarter of those of the clock, and never more than of the clock."""

import pytest

from isopo_mini.coursework import stopwatch
from isopo_mini.coursework.stopwatch import Stopwatch


class Process:
    """Has used so much of the processor before it is looked at."""

    def __init__(self, used: float) -> None:
        self.used = used

    def processor_seconds(self) -> float:
        return self.used


@pytest.mark.parametrize(
    ("clock", "processor", "counted"),
    [
        (10.0, 10.0, 10.0),  # an idle machine
        (10.0, 4.0, 4.0),  # a busy one
        (10.0, 20.0, 10.0),  # two processors at a time
        (10.0, 0.0, 2.5),  # asleep
        (10.0, -5.0, 2.5),  # what it had started is gone, and its seconds with it
    ],
)
def test_what_counts(clock: float, processor: float, counted: float, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(stopwatch.time, "monotonic", lambda: now[0])
    process = Process(used=7.0)
    watch = Stopwatch(process, allowed=6.0)
    assert (watch.seconds(), watch.left()) == (0.0, 6.0)
    now[0] += clock
    process.used += processor
    assert watch.seconds() == counted
    assert watch.left() == 6.0 - counted
