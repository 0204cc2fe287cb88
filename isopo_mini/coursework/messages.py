"""What the grader and the process of a submission say to each other, over two pipes.

The grader's questions are pickled: the process trusts them. What it answers is not trusted, and is data only: tensors,
numbers, texts, lists, tuples and dicts, in the form of `torch.save`, read by `torch.load(weights_only=True)`, which
builds nothing else. An object that is no data stays where it is, and the answer is its number.
"""

import io
import struct
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

_LENGTH = struct.Struct(">Q")
PLAIN = (type(None), bool, int, float, str)


class NotData(Exception):
    """A value that cannot be sent, only referred to."""


def write(file: BinaryIO, content: bytes) -> None:
    """Write one message."""
    file.write(_LENGTH.pack(len(content)) + content)
    file.flush()


def read(file: BinaryIO) -> bytes:
    """Read one message.

    Raises:
        EOFError: the other side is gone.
    """
    head = file.read(_LENGTH.size)
    if len(head) < _LENGTH.size:
        raise EOFError("the other side is gone")
    return file.read(_LENGTH.unpack(head)[0])


def length(head: bytes) -> int:
    """How many bytes follow the first eight of a message."""
    return _LENGTH.unpack(head)[0]


HEAD = _LENGTH.size


def packed(answer: dict[str, Any]) -> bytes:
    """An answer as bytes."""
    buffer = io.BytesIO()
    torch.save(answer, buffer)
    return buffer.getvalue()


def unpacked(content: bytes) -> dict[str, Any]:
    """The answer that these bytes are.

    Raises:
        ValueError: they are none.
    """
    try:
        answer = torch.load(io.BytesIO(content), weights_only=True)
    except Exception as error:  # of many kinds: the bytes may be anything
        raise ValueError(f"expected data, got bytes that are none ({type(error).__name__})") from error
    if not isinstance(answer, dict):
        raise ValueError(f"expected a dict, got {type(answer).__name__}")
    return answer


def as_data(value: Any) -> Any:
    """A value without gradients, subclasses and memory shared with others.

    Raises:
        NotData: it is something else than data, or holds such a thing.
    """
    if type(value) in PLAIN:
        return value
    if isinstance(value, np.ndarray | np.generic) and value.dtype.kind in "biufc":
        return torch.as_tensor(np.array(value))
    if isinstance(value, Tensor) and value.layout == torch.strided:
        return value.detach().cpu().as_subclass(Tensor).clone()
    if isinstance(value, list | tuple):
        return type(value)(map(as_data, value)) if type(value) in (list, tuple) else tuple(map(as_data, value))
    if isinstance(value, dict) and all(type(key) in PLAIN for key in value):
        return {key: as_data(item) for key, item in value.items()}
    raise NotData(type(value).__name__)
