"""What several tests of the engine watch."""

import pytest
from torch import Tensor

from isopo_mini.engine.layer_gradients import LayerGradients


@pytest.fixture
def columns_taken(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """For every layer that was asked, in the order of backpropagation: was GᵀG taken for GGᵀ?"""
    taken: list[bool] = []
    actual = LayerGradients.few_columns

    def watched(self: LayerGradients) -> Tensor | None:
        taken.append((found := actual(self)) is not None)
        return found

    monkeypatch.setattr(LayerGradients, "few_columns", watched)
    return taken
