"""trl's trainer with ISOPO's gradient: exact, whatever trl does around it."""

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("trl")

from by_sequences import Reference
from tiny_grpo import Run, make_config, make_model, relative_error

from isopo_mini.engine import NTK, FisherNormalized

pytestmark = pytest.mark.filterwarnings("default")

TRANSFORMS = [
    NTK(0.5),
    NTK(0.5, scale="natural"),
    FisherNormalized(),
    FisherNormalized(scale="natural"),
]
EACH = pytest.mark.parametrize("transform", TRANSFORMS, ids=lambda t: f"{type(t).__name__}-{t.scale}")


def check(run: Run, tolerance: float, steps: int = 1) -> None:
    assert len(run.steps) == steps
    for step in run.steps:
        assert relative_error(step.gradients, step.expected) <= tolerance


@EACH
def test_gradient_is_isopo_of_trls_objective(transform: Any, tmp_path: Path) -> None:
    """Two optimizer steps of two accumulated microbatches; the second has moving averages from the first."""
    config = make_config(tmp_path, gradient_accumulation_steps=2, max_steps=2)
    run = Run(Reference(transform)).of(make_model(), config, transform=transform)
    check(run, 1e-9, steps=2)
