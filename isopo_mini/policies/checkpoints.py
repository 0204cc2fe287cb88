"""A transformer policy in one `.safetensors` file: weights, the sizes to rebuild it, and where it came from.

The format holds numbers and text only, so that reading a file never runs code from it, as unpickling would.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from isopo_mini.policies.transformer import CausalTransformer
from isopo_mini.writing import write_atomically

# One entry with everything as JSON: the format keeps several entries in no order, and equal policies should make
# equal files.
ENTRY = "isopo_mini"


def save_policy(policy: CausalTransformer, path: str | Path, **origin: Any) -> None:
    """Write a policy, whole or not at all: a killed process leaves the old file or the new.

    What is written is what `load_policy` reads back; anything that it would refuse is refused here.

    Args:
        policy: the weights are written in their dtype; a tied head is written once.
        path: of the file; its folder is made if it is not there.
        **origin: what a reader should know: task, accuracy, seed, command. Anything that JSON can hold, under any name
            but `configuration`, which holds the policy's sizes.

    Raises:
        TypeError: the policy is no `CausalTransformer` but something else, a class derived from it included, which
            would come back without what it adds; or JSON cannot hold the origin.
        ValueError: the origin has a `configuration`, or the tensors are not those that a policy of these sizes has.
    """
    if type(policy) is not CausalTransformer:
        raise TypeError(f"policy: expected a CausalTransformer, got {type(policy).__name__}")
    if "configuration" in origin:
        raise ValueError(
            "origin: expected any name but configuration, which holds the policy's sizes, "
            f"got configuration={origin['configuration']!r}"
        )
    state = {name: value.contiguous() for name, value in policy.state_dict().items()}
    tied = policy.head.weight is policy.token_embedding.weight
    if tied:
        del state["head.weight"]
    configuration = {
        "vocabulary_size": policy.vocabulary_size,
        "context_length": policy.context_length,
        "width": policy.width,
        "layers": len(policy.blocks),
        "heads": policy.heads,
        "tied_head": tied,
    }
    _rebuilt("policy", configuration, state)
    content = save(state, metadata={ENTRY: json.dumps({"configuration": configuration, **origin})})
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, content)


def load_policy(path: str | Path, *, device: torch.device | str = "cpu") -> CausalTransformer:
    """Rebuild a policy that `save_policy` wrote.

    Args:
        path: of the file.
        device: where its weights shall live.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no file of `save_policy`, or its tensors are not those of the policy it describes.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     save_policy(CausalTransformer(19, 9), f"{folder}/small.safetensors", task="addition")
        ...     policy, origin = load_policy(f"{folder}/small.safetensors"), read_origin(f"{folder}/small.safetensors")
        >>> policy.context_length, origin["task"]
        (9, 'addition')
    """
    configuration = read_origin(path)["configuration"]
    with safe_open(path, framework="pt", device=str(device)) as file:
        state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    policy = _rebuilt(str(path), configuration, state)
    dtype = next(iter(state.values())).dtype
    policy.to(device=device, dtype=dtype).load_state_dict(state, strict=not configuration["tied_head"])
    return policy


def _rebuilt(source: str, configuration: dict[str, Any], state: dict[str, Tensor]) -> CausalTransformer:
    """A new policy of these sizes, once it is sure that the tensors are its own."""
    try:
        # Its first weights are thrown away, so the caller's random numbers are not used up for them.
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            policy = CausalTransformer(**configuration)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{source}: expected the sizes of a CausalTransformer, got {configuration}") from error
    expected = dict(policy.state_dict())
    if configuration["tied_head"]:
        del expected["head.weight"]
    for complaint, names in {"has no": expected.keys() - state, "has an unknown": state.keys() - expected}.items():
        if names:
            raise ValueError(f"{source}: {complaint} tensor {min(names)}")
    for name, value in state.items():
        if value.shape != expected[name].shape:
            raise ValueError(
                f"{source}: tensor {name}: expected shape {tuple(expected[name].shape)}, got {tuple(value.shape)}"
            )
    dtypes = {value.dtype for value in state.values()}
    if len(dtypes) != 1 or not next(iter(dtypes)).is_floating_point:
        raise ValueError(f"{source}: expected tensors of one floating-point dtype, got {sorted(map(str, dtypes))}")
    return policy


def read_origin(path: str | Path) -> dict[str, Any]:
    """What `save_policy` wrote beside the weights: `configuration`, and the origin it was given.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no file of `save_policy`.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"path: expected a .safetensors file, got {path}, which does not exist")
    try:
        with safe_open(path, framework="pt") as file:
            origin = json.loads((file.metadata() or {})[ENTRY])
        if not isinstance(origin["configuration"], dict):
            raise TypeError("configuration")
        return origin
    except (SafetensorError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: expected a file that save_policy wrote, got {error!r}") from error
