"""Saved policies: what comes back is what was saved, equal policies make equal files, wrong files are refused."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from isopo_mini.policies import CausalTransformer, TabularSoftmax, load_policy, read_origin, save_policy


def small(tied_head: bool = False, dtype: torch.dtype = torch.float32, seed: int = 0) -> CausalTransformer:
    generator = torch.Generator().manual_seed(seed)
    return CausalTransformer(7, 5, width=8, layers=1, heads=2, tied_head=tied_head, generator=generator).to(dtype)


@pytest.mark.parametrize("tied_head", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_what_comes_back_is_what_was_saved(tmp_path: Path, tied_head: bool, dtype: torch.dtype) -> None:
    policy = small(tied_head, dtype)
    save_policy(policy, tmp_path / "new" / "a.safetensors", task="addition", accuracy=0.2, seed=3)
    loaded = load_policy(tmp_path / "new" / "a.safetensors")
    assert [name for name, _ in loaded.named_parameters()] == [name for name, _ in policy.named_parameters()]
    for name, value in policy.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)
        assert loaded.state_dict()[name].dtype == dtype
    assert (loaded.head.weight is loaded.token_embedding.weight) == tied_head
    assert (loaded.heads, loaded.width, loaded.context_length, loaded.vocabulary_size) == (2, 8, 5, 7)
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    tokens = torch.tensor([[1, 2, 3, 4, 5]])
    assert torch.equal(loaded.logits(tokens), policy.logits(tokens))


def test_origin_is_kept_beside_the_configuration(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_policy(small(), path, task="addition", accuracy=0.2, seed=3)
    origin = read_origin(path)
    sizes = {"vocabulary_size": 7, "context_length": 5, "width": 8, "layers": 1, "heads": 2, "tied_head": False}
    assert origin == {"configuration": sizes, "task": "addition", "accuracy": 0.2, "seed": 3}


def test_equal_policies_make_equal_files(tmp_path: Path) -> None:
    for name, seed in [("a", 0), ("b", 0), ("c", 1)]:
        save_policy(small(seed=seed), tmp_path / name, task="addition", seed=0, note="x", more="y")
    first, second, third = ((tmp_path / name).read_bytes() for name in "abc")
    assert first == second != third


def test_twice_is_once_and_uses_nobodys_random_numbers(tmp_path: Path) -> None:
    path, states = tmp_path / "a.safetensors", []
    for _ in range(2):
        save_policy(small(), path, task="addition")
        states.append({found.name: found.read_bytes() for found in tmp_path.iterdir()})
    assert states[0] == states[1]
    generator = torch.get_rng_state()
    save_policy(load_policy(path), path, task="addition")
    assert torch.equal(torch.get_rng_state(), generator)
    assert path.read_bytes() == states[0]["a.safetensors"]


def test_a_crash_while_writing_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.safetensors"
    save_policy(small(), path)
    before = path.read_bytes()

    def crash(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", crash)
    with pytest.raises(KeyboardInterrupt):
        save_policy(small(seed=1), path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["a.safetensors"]


class Wider(CausalTransformer):
    """What it adds would be lost in a file."""


def saved(path: Path, state: dict[str, torch.Tensor], **changes: object) -> Path:
    """A file with these tensors and a configuration with some changes."""
    configuration = {"vocabulary_size": 7, "context_length": 5, "width": 8, "layers": 1, "heads": 2}
    origin = {"configuration": configuration | {"tied_head": False} | changes}
    save_file(state, path, metadata={"isopo_mini": json.dumps(origin)})
    return path


@pytest.mark.usefixtures("unchecked")
class TestErrors:
    def test_no_file(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match=r"path: expected a \.safetensors file, got .*nothing, which does"):
            load_policy(tmp_path / "nothing")

    def test_files_of_other_programs(self, tmp_path: Path) -> None:
        path = tmp_path / "a"
        torch.save(small().state_dict(), path)
        with pytest.raises(ValueError, match="expected a file that save_policy wrote, got SafetensorError"):
            load_policy(path)
        save_file(small().state_dict(), path)
        with pytest.raises(ValueError, match=r"expected a file that save_policy wrote, got KeyError\('isopo_mini'\)"):
            load_policy(path)
        for text in ("no json", "[]", "{}", '{"configuration": 3}'):
            save_file(small().state_dict(), path, metadata={"isopo_mini": text})
            with pytest.raises(ValueError, match="expected a file that save_policy wrote"):
                load_policy(path)

    def test_tensors_of_another_policy(self, tmp_path: Path) -> None:
        path, state = tmp_path / "a", small().state_dict()
        with pytest.raises(ValueError, match=r"tensor token_embedding.weight: expected shape \(9, 8\), got \(7, 8\)"):
            load_policy(
                saved(path, {k: v for k, v in state.items() if k != "head.weight"}, vocabulary_size=9, tied_head=True)
            )
        with pytest.raises(ValueError, match=r"a: has no tensor blocks\.1\."):
            load_policy(saved(path, state, layers=2))
        with pytest.raises(ValueError, match=r"a: has an unknown tensor extra"):
            load_policy(saved(path, state | {"extra": torch.zeros(2)}))
        with pytest.raises(ValueError, match=r"a: has an unknown tensor head\.weight"):
            load_policy(saved(path, state, tied_head=True))

    def test_configurations_that_are_none(self, tmp_path: Path) -> None:
        state = small().state_dict()
        with pytest.raises(ValueError, match=r"expected the sizes of a CausalTransformer, got .*'heads': 3"):
            load_policy(saved(tmp_path / "a", state, heads=3))
        with pytest.raises(ValueError, match=r"expected the sizes of a CausalTransformer, got .*'colour': 1"):
            load_policy(saved(tmp_path / "a", state, colour=1))

    def test_dtypes(self, tmp_path: Path) -> None:
        state = small().state_dict()
        mixed = state | {"head.weight": state["head.weight"].double()}
        with pytest.raises(ValueError, match=r"one floating-point dtype, got \['torch.float32', 'torch.float64'\]"):
            load_policy(saved(tmp_path / "a", mixed))
        whole = {name: value.long() for name, value in state.items()}
        with pytest.raises(ValueError, match=r"one floating-point dtype, got \['torch.int64'\]"):
            load_policy(saved(tmp_path / "a", whole))

    @pytest.mark.parametrize("configuration", [{"lr": 1e-3}, {"vocabulary_size": 7, "heads": 4}, None])
    def test_the_sizes_are_the_policys_own(self, tmp_path: Path, configuration: object) -> None:
        """Other sizes that fit the tensors would load as another network: four heads are not two."""
        with pytest.raises(ValueError, match=r"origin: expected any name but configuration, .*, got configuration="):
            save_policy(small(), tmp_path / "a", task="addition", configuration=configuration)
        assert os.listdir(tmp_path) == []

    def test_what_could_not_be_loaded_is_not_saved(self, tmp_path: Path) -> None:
        mixed, longer, strange = small(), small(), small()
        mixed.head.double()
        longer.context_length = 6
        strange.register_buffer("extra", torch.zeros(2))
        for policy, message in [
            (mixed, r"policy: expected tensors of one floating-point dtype, got \['torch.float32', 'torch.float64'\]"),
            (longer, r"policy: tensor position_embedding\.weight: expected shape \(6, 8\), got \(5, 8\)"),
            (strange, "policy: has an unknown tensor extra"),
        ]:
            with pytest.raises(ValueError, match=message):
                save_policy(policy, tmp_path / "a")
        assert os.listdir(tmp_path) == []

    def test_other_policies_cannot_be_saved(self, tmp_path: Path) -> None:
        with pytest.raises(TypeError, match="policy: expected a CausalTransformer, got TabularSoftmax"):
            save_policy(TabularSoftmax(2, 2), tmp_path / "a")
        with pytest.raises(TypeError, match="policy: expected a CausalTransformer, got Wider"):
            save_policy(Wider(7, 5, width=8, layers=1, heads=2), tmp_path / "a")
        with pytest.raises(TypeError, match="not JSON serializable"):
            save_policy(small(), tmp_path / "a", generator=torch.Generator())
        assert os.listdir(tmp_path) == []


def test_loading_reads_numbers_and_never_unpickles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_policy(small(), tmp_path / "a")

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("unpickled")

    monkeypatch.setattr(torch, "load", refuse)
    monkeypatch.setattr("pickle.Unpickler", refuse)
    load_policy(tmp_path / "a")
    assert set(load_file(tmp_path / "a")) == set(small().state_dict())
