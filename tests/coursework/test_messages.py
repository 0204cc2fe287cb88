"""What comes back from a submission is data, whatever the submission makes of it."""

import io
import os
import pickle

import numpy as np
import pytest
import torch

from isopo_mini.coursework import messages


@pytest.mark.parametrize(
    "value",
    [3, 2.5, "text", None, True, [1, (2, "x")], {"a": torch.ones(2), 3: None}, torch.ones(2, 3), float("nan"), 10**30],
)
def test_data_comes_back_as_it_was(value: object) -> None:
    got = messages.unpacked(messages.packed({"data": messages.as_data(value)}))["data"]
    assert repr(got) == repr(value)


def test_arrays_and_gradients_become_plain_tensors() -> None:
    assert torch.equal(messages.as_data(np.arange(3.0)), torch.arange(3, dtype=torch.float64))
    assert not messages.as_data(torch.ones(2, requires_grad=True) * 2).requires_grad
    assert type(messages.as_data(torch.nn.Parameter(torch.ones(2)))) is torch.Tensor
    view = torch.zeros(10**6)[:1]
    assert len(messages.packed({"data": messages.as_data(view)})) < 10**4, "only what is seen is sent"


class Number(float):
    """Looks like a number."""


@pytest.mark.parametrize("value", [object(), Number(3.0), [print], {"a": Number(1.0)}, np.array([print]), range(3)])
def test_what_is_no_data_stays(value: object) -> None:
    with pytest.raises(messages.NotData):
        messages.as_data(value)


class Attack:
    """What a submission might write into its pipe."""

    def __reduce__(self):
        return os.mkdir, ("attacked",)


def test_no_answer_runs_code(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    buffer = io.BytesIO()
    torch.save({"data": Attack()}, buffer)
    for content in (buffer.getvalue(), pickle.dumps({"data": Attack()}), b"", b"x" * 100):
        with pytest.raises(ValueError, match="expected data"):
            messages.unpacked(content)
    assert list(tmp_path.iterdir()) == []
    buffer = io.BytesIO()
    torch.save(3, buffer)
    with pytest.raises(ValueError, match="expected a dict, got int"):
        messages.unpacked(buffer.getvalue())
