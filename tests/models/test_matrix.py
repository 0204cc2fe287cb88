"""Architectures that nobody here wrote: exact against one backward pass a sequence, or refused with a reason.

Needs the extra `models`; skipped without it. Tied and untied, left padding, gradient checkpointing, NTK and Fisher.
"""

import pytest

pytest.importorskip("transformers")
pytest.importorskip("peft")

from architectures import ARCHITECTURES
from reference import outcome

# Some of what these libraries do at import or in use is deprecated by torch or Python.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]

# Whose parameters are used in ways that no handler covers; all others need no copies.
COPIED = {
    *("Gemma", "Gemma2", "Gemma3", "Nemotron"),  # gains 1 + w
    *("Mamba", "Mamba2", "RWKV"),  # the recurrence
    *("ViT", "T5", "Gemma2, LoRA"),  # a token in front of all, relative positions, a table that is a transpose
}


@pytest.mark.parametrize("padded", [False, True], ids=["", "padded"])
@pytest.mark.parametrize("tied", [False, True], ids=["own head", "tied"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_architecture(name: str, tied: bool, padded: bool) -> None:
    """Checkpointing goes with padding, so that each is tried alone and together over the two heads."""
    found = outcome(name, tied=tied, padded=padded, checkpointing=padded != tied)
    assert found.result == ("exact, with copies" if name in COPIED else "exact"), found
