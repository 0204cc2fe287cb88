"""`Batch`: what goes in comes out, cut and selected row by row, and what is wrong is refused by name."""

import dataclasses
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from isopo_mini import Batch

FIELDS = [field.name for field in dataclasses.fields(Batch)]


def make_tensors(sequences: int = 3, positions: int = 4, seed: int = 0) -> dict[str, Any]:
    """The fields of a batch with features of length 2, rewards by time step, and sequences of different lengths."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, positions + 1, (sequences,), generator=generator)
    return {
        "observations": torch.randn(sequences, positions, 2, generator=generator),
        "actions": torch.randint(0, 5, (sequences, positions), generator=generator),
        "mask": torch.arange(positions) < lengths[:, None],
        "rewards": torch.randn(sequences, positions, generator=generator),
        "log_probs": -torch.rand(sequences, positions, generator=generator),
        "groups": torch.randint(0, 2, (sequences,), generator=generator),
    }


def make_batch(sequences: int = 3, positions: int = 4, seed: int = 0) -> Batch:
    return Batch(**make_tensors(sequences, positions, seed))


def assert_same(batch: Batch, expected: dict[str, Any]) -> None:
    for name in FIELDS:
        value, wanted = getattr(batch, name), expected[name]
        torch.testing.assert_close(value, wanted, rtol=0.0, atol=0.0, equal_nan=True, msg=name)


SHAPES = {"sequences": st.integers(1, 7), "positions": st.integers(1, 5), "seed": st.integers(0, 99)}


class TestWhatIsAccepted:
    @given(observed=st.lists(st.integers(1, 3), max_size=2), **SHAPES)
    @settings(max_examples=30, deadline=None)
    def test_observations_of_any_shape_behind_sequences_and_positions(
        self, observed: list[int], sequences: int, positions: int, seed: int
    ) -> None:
        tensors = make_tensors(sequences, positions, seed)
        tensors["observations"] = torch.zeros(sequences, positions, *observed)
        batch = Batch(**tensors)
        assert len(batch) == sequences
        assert_same(batch, tensors)

    def test_one_reward_a_sequence_and_no_groups(self) -> None:
        tensors = make_tensors() | {"rewards": torch.ones(3, dtype=torch.float64), "groups": None}
        assert_same(Batch(**tensors), tensors)

    def test_state_indices_as_observations(self) -> None:
        tensors = make_tensors() | {"observations": torch.zeros(3, 4, dtype=torch.int64)}
        assert_same(Batch(**tensors), tensors)

    def test_a_mask_may_start_with_a_prompt(self) -> None:
        tensors = make_tensors() | {"mask": torch.tensor([[False, False, True, True]]).expand(3, 4)}
        assert_same(Batch(**tensors), tensors)

    @pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
    def test_padding_may_hold_anything(self, number: float) -> None:
        tensors = make_tensors()
        tensors["mask"][:, 2:] = False
        tensors["log_probs"][:, 2:] = number
        tensors["actions"][:, 2:] = -1
        assert_same(Batch(**tensors), tensors)

    @pytest.mark.parametrize("number", [math.nan, math.inf])
    def test_padding_may_hold_any_reward(self, number: float) -> None:
        tensors = make_tensors()
        tensors["mask"][:, 2:] = False
        tensors["rewards"][:, 2:] = number
        assert_same(Batch(**tensors), tensors)

    def test_double_precision_stays(self) -> None:
        tensors = make_tensors() | {"log_probs": torch.zeros(3, 4, dtype=torch.float64)}
        assert Batch(**tensors).log_probs.dtype == torch.float64


class TestFrozen:
    @pytest.mark.parametrize("name", FIELDS)
    def test_a_field_cannot_be_replaced(self, name: str) -> None:
        batch = make_batch()
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(batch, name, getattr(batch, name))

    def test_a_batch_is_equal_to_itself_only(self) -> None:
        """Comparing fields would compare tensors, which have no single truth value."""
        batch = make_batch()
        assert batch == batch
        assert batch != make_batch()
        assert len({batch, batch}) == 1


class TestParts:
    def test_select_takes_rows_in_the_order_asked_for(self) -> None:
        tensors = make_tensors()
        rows = torch.tensor([2, 0, 2])
        assert_same(Batch(**tensors).select(rows), {name: value[[2, 0, 2]] for name, value in tensors.items()})

    def test_select_by_bool_is_select_by_the_indices_of_the_true_ones(self) -> None:
        tensors = make_tensors()
        keep = torch.tensor([True, False, True])
        assert_same(Batch(**tensors).select(keep), {name: value[[0, 2]] for name, value in tensors.items()})

    def test_no_groups_stay_none(self) -> None:
        batch = Batch(**make_tensors() | {"groups": None})
        assert batch.select(torch.tensor([1])).groups is None
        assert batch.to("cpu").groups is None

    def test_to_moves_every_tensor(self) -> None:
        tensors = make_tensors()
        devices = ["cpu", *([torch.accelerator.current_accelerator()] if torch.accelerator.is_available() else [])]
        for device in devices:
            moved = Batch(**tensors).to(device)
            assert {getattr(moved, name).device.type for name in FIELDS} == {torch.device(device).type}
            assert_same(moved.to("cpu"), tensors)

    @given(size=st.integers(1, 9), **SHAPES)
    @settings(max_examples=30, deadline=None)
    def test_microbatches_end_to_end_are_the_batch(self, size: int, sequences: int, positions: int, seed: int) -> None:
        tensors = make_tensors(sequences, positions, seed)
        parts = list(Batch(**tensors).microbatches(size))
        assert [len(part) for part in parts[:-1]] == [size] * (math.ceil(sequences / size) - 1)
        assert sum(len(part) for part in parts) == sequences
        for name, value in tensors.items():
            assert torch.equal(torch.cat([getattr(part, name) for part in parts]), value)

    @pytest.mark.parametrize("size", [None, 3, 4])
    def test_a_batch_that_fits_is_its_own_microbatch(self, size: int | None) -> None:
        batch = make_batch()
        assert [part is batch for part in batch.microbatches(size)] == [True]

    @given(**SHAPES)
    @settings(max_examples=30, deadline=None)
    def test_as_steps_makes_every_real_position_a_sequence(self, sequences: int, positions: int, seed: int) -> None:
        tensors = make_tensors(sequences, positions, seed)
        steps = Batch(**tensors).as_steps()
        real = [(s, t) for s in range(sequences) for t in range(positions) if tensors["mask"][s, t]]
        assert len(steps) == len(real)
        for n, (s, t) in enumerate(real):
            assert torch.equal(steps.observations[n, 0], tensors["observations"][s, t])
            assert steps.actions[n, 0] == tensors["actions"][s, t]
            assert steps.log_probs[n, 0] == tensors["log_probs"][s, t]
            assert steps.rewards[n] == tensors["rewards"][s, t]
            assert steps.groups is not None
            assert steps.groups[n] == tensors["groups"][s]
        assert steps.mask.all()

    @given(**SHAPES)
    @settings(max_examples=30, deadline=None)
    def test_as_tokens_gives_every_real_position_a_row_with_its_context(
        self, sequences: int, positions: int, seed: int
    ) -> None:
        tensors = make_tensors(sequences, positions, seed)
        tokens = Batch(**tensors).as_tokens()
        real = [(s, t) for s in range(sequences) for t in range(positions) if tensors["mask"][s, t]]
        assert len(tokens) == len(real)
        for n, (s, t) in enumerate(real):
            assert torch.equal(tokens.observations[n], tensors["observations"][s])
            assert torch.equal(tokens.actions[n], tensors["actions"][s])
            assert tokens.mask[n].nonzero().tolist() == [[t]]
            assert tokens.rewards[n] == tensors["rewards"][s, t]

    def test_the_tokens_of_a_sequence_share_its_reward(self) -> None:
        tensors = make_tensors() | {"rewards": torch.tensor([1.0, 2.0, 3.0])}
        tensors["mask"] = torch.tensor(
            [[True, False, False, False], [True, True, False, False], [False, True, True, True]]
        )
        assert Batch(**tensors).as_tokens().rewards.tolist() == [1.0, 2.0, 2.0, 3.0, 3.0, 3.0]

    def test_total_rewards_are_those_of_real_steps(self) -> None:
        tensors = make_tensors()
        tensors["mask"] = torch.tensor([[True, True, False, False]]).repeat(3, 1)
        tensors["rewards"] = torch.tensor([[1.0, 2.0, math.nan, 8.0]]).repeat(3, 1)
        assert Batch(**tensors).total_rewards().tolist() == [3.0, 3.0, 3.0]
        assert Batch(**tensors | {"rewards": torch.tensor([1.0, 2.0, 3.0])}).total_rewards().tolist() == [1.0, 2.0, 3.0]

    def test_as_steps_without_groups(self) -> None:
        assert Batch(**make_tensors() | {"groups": None}).as_steps().groups is None


def with_entry(values: Tensor, row: int, column: int, entry: float) -> Tensor:
    values = values.clone()
    values[row, column] = entry
    return values


# name of the field, what is passed, the error, its message
BAD: list[tuple[str, Any, type[Exception], str]] = [
    ("actions", [[0, 1]], TypeError, r"actions: expected a tensor of shape \(S T\), got list"),
    ("actions", torch.zeros(3, dtype=torch.int64), ValueError, r"actions: expected shape \(S T\), got \(3,\)"),
    (
        "actions",
        torch.zeros(0, 4, dtype=torch.int64),
        ValueError,
        r"actions: expected at least one entry along every axis, got shape \(0, 4\)",
    ),
    ("actions", torch.zeros(3, 4), TypeError, "actions: expected an int64 tensor, got torch.float32"),
    (
        "actions",
        torch.zeros(3, 4, dtype=torch.int32),
        TypeError,
        "actions: expected an int64 tensor, got torch.int32",
    ),
    ("mask", None, TypeError, r"mask: expected a tensor of shape \(S T\), got NoneType"),
    ("mask", torch.ones(3, 5).bool(), ValueError, r"mask: expected shape \(S=3 T=4\), got \(3, 5\)"),
    ("mask", torch.ones(3, 4), TypeError, "mask: expected a bool tensor, got torch.float32"),
    (
        "mask",
        torch.tensor([[True] * 4, [False] * 4, [False] * 4]),
        ValueError,
        "mask: expected at least one True a sequence, got none in sequence 1",
    ),
    ("log_probs", torch.zeros(3), ValueError, r"log_probs: expected shape \(S=3 T=4\), got \(3,\)"),
    (
        "log_probs",
        torch.zeros(3, 4, dtype=torch.int64),
        TypeError,
        "log_probs: expected a floating-point tensor, got torch.int64",
    ),
    (
        "log_probs",
        with_entry(torch.zeros(3, 4), 1, 0, -math.inf),
        ValueError,
        r"log_probs: expected finite numbers, got -inf at index \(1, 0\)",
    ),
    ("rewards", 1.0, TypeError, r"rewards: expected a tensor of shape \(S\) or \(S T\), got float"),
    ("rewards", torch.zeros(4), ValueError, r"rewards: expected shape \(S=3\), got \(4,\)"),
    ("rewards", torch.zeros(3, 1), ValueError, r"rewards: expected shape \(S=3 T=4\), got \(3, 1\)"),
    (
        "rewards",
        torch.zeros(3, dtype=torch.int64),
        TypeError,
        "rewards: expected a floating-point tensor, got torch.int64",
    ),
    (
        "rewards",
        torch.tensor([0.0, 0.0, math.nan]),
        ValueError,
        r"rewards: expected finite numbers, got nan at index \(2,\)",
    ),
    (
        "rewards",
        with_entry(torch.zeros(3, 4), 2, 0, math.inf),
        ValueError,
        r"rewards: expected finite numbers, got inf at index \(2, 0\)",
    ),
    ("observations", "states", TypeError, "observations: expected a tensor, got str"),
    (
        "observations",
        torch.zeros(3, 2),
        ValueError,
        r"observations: expected shape \(S=3 T=4 \.\.\.\), got \(3, 2\)",
    ),
    (
        "observations",
        with_entry(torch.zeros(3, 4), 0, 0, math.nan),
        ValueError,
        r"observations: expected finite numbers, got nan at index \(0, 0\)",
    ),
    ("groups", torch.zeros(3, 1, dtype=torch.int64), ValueError, r"groups: expected shape \(S=3\), got \(3, 1\)"),
    ("groups", torch.zeros(3), TypeError, "groups: expected an int64 tensor, got torch.float32"),
]


@pytest.mark.usefixtures("unchecked")
class TestErrors:
    @pytest.mark.parametrize(
        ("name", "value", "error", "message"), BAD, ids=[f"{name}-{i}" for i, (name, *_) in enumerate(BAD)]
    )
    def test_the_field_is_named_with_what_was_expected_and_what_came(
        self, name: str, value: Any, error: type[Exception], message: str
    ) -> None:
        with pytest.raises(error, match=f"^{message}$"):
            Batch(**make_tensors() | {name: value})

    @pytest.mark.parametrize("name", [name for name in FIELDS if name != "actions"])
    def test_another_device(self, name: str) -> None:
        tensors = make_tensors()
        with pytest.raises(ValueError, match=rf"^{name}: expected device cpu \(that of actions\), got meta$"):
            Batch(**tensors | {name: tensors[name].to("meta")})

    @pytest.mark.parametrize("size", [0, -2])
    def test_microbatches_of_less_than_one(self, size: int) -> None:
        with pytest.raises(ValueError, match=f"^size: expected at least 1, got {size}$"):
            list(make_batch().microbatches(size))

    def test_observations_are_finite_in_padding_too(self) -> None:
        """They go through the policy with the others, and a nan that is masked later leaves nan gradients."""
        tensors = make_tensors()
        tensors["mask"][:, 2:] = False
        tensors["observations"][0, 3, 1] = math.nan
        with pytest.raises(ValueError, match=r"^observations: expected finite numbers, got nan at index \(0, 3, 1\)$"):
            Batch(**tensors)

    def test_selecting_nothing(self) -> None:
        with pytest.raises(ValueError, match=r"^actions: expected at least one entry along every axis"):
            make_batch().select(torch.zeros(3, dtype=torch.bool))

    def test_steps_need_rewards_by_time_step(self) -> None:
        batch = Batch(**make_tensors() | {"rewards": torch.zeros(3)})
        message = r"^rewards: expected one a time step \(S T\) to cut a batch into steps, got one a sequence \(S\)$"
        with pytest.raises(ValueError, match=message):
            batch.as_steps()
