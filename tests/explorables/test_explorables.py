"""The numbers of the pictures one can move, against closed forms and against the steps themselves; and their places."""

import json
import re
from collections.abc import Iterator

import matplotlib.pyplot as plt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from isopo_mini import explorables
from isopo_mini.policies import softmax_fisher

REWARDS = torch.tensor([1.0, 0.7, 0.0]).double()


def policies() -> st.SearchStrategy[Tensor]:
    """Policies over three arms with no probability below about 0.01."""
    number = st.floats(0.02, 1.0)
    return st.tuples(number, number, number).map(lambda x: torch.tensor(x).double() / sum(x))


@pytest.fixture(autouse=True)
def _figures_are_closed() -> Iterator[None]:
    plt.switch_backend("agg")
    yield
    plt.close("all")


@settings(max_examples=15, deadline=None)
@given(probs=policies(), price=st.floats(1e-4, 0.06))
def test_one_step_costs_its_price_and_the_natural_one_gains_most(probs: Tensor, price: float) -> None:
    after = explorables.simplex_steps(probs, REWARDS, price)
    fisher = softmax_fisher(probs[None])[0]
    first_order = {}
    for name in ("Policy gradient", "Natural gradient", "ISOPO (Fisher)"):
        step = (after[name] / probs).log()
        assert (0.5 * step @ fisher @ step).item() == pytest.approx(price, rel=1e-6)
        first_order[name] = (fisher @ step @ REWARDS).item()
    best = first_order.pop("Natural gradient")
    assert max(first_order.values()) <= best * (1 + 1e-9)
    advantages = REWARDS - probs @ REWARDS
    step = (after["Natural gradient"] / probs).log()
    eta = (step - step.mean()) @ (advantages - advantages.mean()) / (advantages - advantages.mean()).square().sum()
    torch.testing.assert_close(step - step.mean(), eta * (advantages - advantages.mean()), rtol=1e-6, atol=1e-8)


def test_ppo_goes_with_the_policy_gradient_until_it_clips() -> None:
    probs = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
    short = explorables.simplex_steps(probs, REWARDS, 1e-8)  # no ratio gets anywhere
    step = {name: (short[name] / probs).log() for name in ("PPO", "Policy gradient")}
    assert torch.cosine_similarity(*step.values(), dim=0) > 1 - 1e-6
    assert step["PPO"].norm() / step["Policy gradient"].norm() == pytest.approx(1.0, abs=1e-3)
    # A long step: arms leave the range one after the other and are then left alone, so the policy stays near.
    long = explorables.simplex_steps(probs, REWARDS, 0.5)
    divergence = {name: probs @ (probs / long[name]).log() for name in step}
    assert divergence["PPO"] < 0.3 * divergence["Policy gradient"]


def test_the_natural_gradients_path_is_known_and_equal_rewards_move_nothing() -> None:
    probs = torch.tensor([0.1, 0.6, 0.3], dtype=torch.float64)
    path = explorables.simplex_paths(probs, REWARDS)["Natural gradient"]
    # Every step multiplies π_a by e^{0.2 r_a}, whatever the policy: after 75 of them by e^{15 r_a}.
    known = (probs.log() + 15 * REWARDS).softmax(0)
    torch.testing.assert_close(path[-1], known, rtol=1e-6, atol=1e-12)
    for name, still in explorables.simplex_paths(probs, torch.ones(3).double()).items():
        assert (still - probs).abs().max() < 1e-12, name
    for name, after in explorables.simplex_steps(probs, torch.ones(3).double(), 0.03).items():
        assert (after - probs).abs().max() < 1e-12, name


@pytest.mark.parametrize("rho", [1e3, 1.0, 1e-3])
def test_lengths_and_angles_are_those_of_the_steps_themselves(rho: float) -> None:
    scores = torch.randn(5, 4).double()
    scores = torch.cat([scores, scores])  # repeated: K has half its rank at most
    gram, advantages = scores @ scores.T, torch.randn(10).double()
    numbers = explorables.damping_numbers(gram, advantages, rho)
    damping = rho * gram.trace().item() / 10
    fisher = scores.T @ scores
    reinforce, natural = scores.T @ advantages, torch.linalg.pinv(fisher, hermitian=True) @ scores.T @ advantages
    step = torch.linalg.solve(fisher + damping * torch.eye(4).double(), reinforce)
    expected = {
        "damping": damping,
        "gradient_length": (damping * step.norm() / reinforce.norm()).item(),
        "natural_length": (step.norm() / natural.norm()).item(),
        "cosine_reinforce": torch.cosine_similarity(step, reinforce, dim=0).item(),
        "cosine_natural": torch.cosine_similarity(step, natural, dim=0).item(),
    }
    assert numbers == pytest.approx(expected, rel=1e-9)


def test_the_place_on_the_page_holds_the_same_floats_and_no_text_ends_its_script() -> None:
    data = {"numbers": [1 / 3, 1e-17, 0.1], "</script>": "<b>"}
    place = explorables.Explorable("kind", "says.", data)
    html = place._repr_html_()
    (text,) = re.findall(r'<script type="application/json">(.*?)</script>', html)
    assert json.loads(text) == data
    assert 'data-explorable="kind"' in html
    assert f"<p>{place}</p>" in html
    with pytest.raises(ValueError, match="not JSON compliant"):
        explorables.Explorable("kind", "says.", {"number": float("nan")})._repr_html_()


def test_the_still_pictures_are_drawn_from_the_same_numbers() -> None:
    probs = torch.tensor([0.1, 0.6, 0.3], dtype=torch.float64)
    triangle = explorables.simplex(probs, REWARDS)
    assert triangle.data == {"probs": probs.tolist(), "rewards": REWARDS.tolist(), "price": 0.03}
    assert len(plt.gca().texts) == 3 + 4  # corners and arrows
    scores = torch.randn(6, 3).double()
    gram, advantages = scores @ scores.T, torch.randn(6).double()
    layers = explorables.damping({"one": gram, "two": 2 * gram}, advantages)
    assert layers.data["grams"] == {"one": gram.tolist(), "two": (2 * gram).tolist()}
    drawn = dict(zip(*reversed(plt.gca().get_legend_handles_labels()), strict=True))
    rho, length = drawn["length, gradient scale"].get_data()
    assert length[30] == pytest.approx(explorables.damping_numbers(gram, advantages, float(rho[30]))["gradient_length"])


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.ones(2), REWARDS, 0.1), r"probs: expected shape \(3,?\)"),
        ((torch.ones(3) / 3, torch.ones(2), 0.1), "rewards: expected shape"),
        ((torch.ones(3) / 3, REWARDS, 0.0), "price: expected"),
    ],
)
def test_bad_input_is_named(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        explorables.simplex_steps(*arguments)
