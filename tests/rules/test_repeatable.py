"""Random log-probabilities are refused by every rule and by `train`, with the name of the module that drew them."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from isopo_mini import rules
from isopo_mini.batch import Batch
from isopo_mini.policies import CategoricalPolicy
from isopo_mini.rules import ClippedSurrogate, batch_advantages
from isopo_mini.rules.repeatable import log_prob, repeatable
from isopo_mini.rules.rule_specs import RULES, make_rule
from isopo_mini.tasks import ContextualBandit
from isopo_mini.training.loop import train


class Network(CategoricalPolicy):
    """Four features, three actions, and a module in the middle that may be random."""

    def __init__(self, middle: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 16), nn.Sequential(nn.Tanh(), middle), nn.Linear(16, 3))

    def logits(self, observations: Tensor) -> Tensor:
        return self.layers(observations)


class Attention(nn.Module):
    """Dropout as in nanoGPT: a number handed to the attention, no module of its own."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        heads = x.reshape(-1, 2, 2, 4)
        dropout = self.dropout if self.training else 0.0
        return F.scaled_dot_product_attention(heads, heads, heads, dropout_p=dropout).reshape(x.shape)


class Noise(nn.Module):
    """Random in any mode."""

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.randn_like(x)


class DrawsInVain(nn.Module):
    """Uses the generator, and nothing of what it draws."""

    def forward(self, x: Tensor) -> Tensor:
        torch.rand(3)
        return x


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cells = nn.GRU(16, 16, num_layers=2, dropout=0.3)

    def forward(self, x: Tensor) -> Tensor:
        return self.cells(x)[0]


TASK = ContextualBandit(
    torch.rand(6, 3, generator=torch.Generator().manual_seed(0)),
    features=torch.randn(6, 4, generator=torch.Generator().manual_seed(1)),
)
RANDOM: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "dropout": (lambda: nn.Dropout(0.5), r"layers\.1\.1 \(Dropout, in training mode\)"),
    "alpha dropout": (lambda: nn.AlphaDropout(0.2), r"layers\.1\.1 \(AlphaDropout, in training mode\)"),
    "random slopes": (nn.RReLU, r"layers\.1\.1 \(RReLU, in training mode\)"),
    "attention": (lambda: Attention(0.1), r"layers\.1\.1 \(Attention, in training mode\)"),
    "recurrent": (Recurrent, r"layers\.1\.1\.cells \(GRU, in training mode\)"),
    "noise": (Noise, r"layers\.1\.1 \(Noise, in training mode\)"),
}
STEADY = [lambda: nn.Dropout(0.0), lambda: nn.Dropout(0.5).eval(), lambda: Attention(0.0), nn.ReLU, DrawsInVain]


def sampled(policy: Network) -> Batch:
    return TASK.sample(policy, 8, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("name", RANDOM)
def test_the_module_that_drew_is_named(name: str) -> None:
    middle, named = RANDOM[name]
    policy = Network(middle())
    batch = sampled(policy)
    with pytest.raises(ValueError, match=rf"policy: expected the same log-probabilities .* random ones from {named};"):
        log_prob(policy, batch)


@pytest.mark.parametrize("middle", STEADY)
def test_what_is_not_random_passes(middle: Callable[[], nn.Module]) -> None:
    policy = Network(middle())
    batch = sampled(policy)
    assert torch.equal(log_prob(policy, batch), policy.log_prob(batch))


def test_randomness_outside_all_modules_is_the_policys_own() -> None:
    class Own(Network):
        def logits(self, observations: Tensor) -> Tensor:
            return F.dropout(self.layers(observations), 0.5, self.training)

    policy = Own(nn.Tanh())
    with pytest.raises(ValueError, match=r"got random ones from Own itself; call policy\.eval\(\)"):
        repeatable(policy, lambda: policy.logits(torch.ones(5, 4)))


def test_no_hook_is_left_and_gradients_flow_in_evaluation_mode() -> None:
    policy = Network(nn.Dropout(0.5))
    batch = sampled(policy)
    with pytest.raises(ValueError, match="Dropout"):
        log_prob(policy, batch)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in policy.modules())
    log_prob(policy.eval(), batch).sum().backward()
    assert all(parameter.grad is not None and parameter.grad.norm() > 0 for parameter in policy.parameters())


def every_rule() -> dict[str, Any]:
    """All rules that have a name, and the variants that evaluate the policy in another way."""
    made: dict[str, Any] = {name: make_rule(name, {"batch": batch_advantages}, default="batch") for name in _NAMED}
    made["natural gradient, dense"] = rules.NaturalGradient(0.1)
    made["natural gradient, dual"] = rules.NaturalGradient(0.1, fisher="empirical", solver="dual")
    made["REINFORCE, microbatches"] = rules.Reinforce(microbatch_size=3)
    made["ISOPO, microbatches"] = rules.NtkIsopo(microbatch_size=3)
    return made


_NAMED = [name for name in RULES if RULES[name].advantages is None]


@pytest.mark.parametrize("name", every_rule())
def test_every_rule_refuses_and_changes_nothing(name: str) -> None:
    policy, rule = Network(nn.Dropout(0.5)), every_rule()[name]
    batch, before = sampled(policy), [parameter.clone() for parameter in policy.parameters()]
    optimizer = torch.optim.SGD(policy.parameters(), lr=1.0)
    with pytest.raises(ValueError, match=r"got random ones from layers\.1\.1 \(Dropout, in training mode\)"):
        rule.step(policy, batch, optimizer)
    assert all(torch.equal(parameter, start) for parameter, start in zip(policy.parameters(), before, strict=True))
    rule.step(policy.eval(), batch, optimizer)  # the same rule, the same batch
    assert not all(torch.equal(p, start) for p, start in zip(policy.parameters(), before, strict=True))


def test_train_refuses_too_and_in_evaluation_mode_nothing_moves_without_a_step() -> None:
    """A step size of 1e-12 leaves the policy where it is: KL 0, ratio 1, nothing clipped."""
    policy = Network(nn.Dropout(0.5))
    optimizer = torch.optim.SGD(policy.parameters(), lr=1e-12)

    class Nothing:
        def step(self, policy: nn.Module, batch: Batch, optimizer: torch.optim.Optimizer) -> dict[str, float]:
            return {}

    with pytest.raises(ValueError, match=r"got random ones from layers\.1\.1 \(Dropout, in training mode\)"):
        train(policy, TASK, Nothing(), optimizer, 1, 0, progress=False)
    table = train(policy.eval(), TASK, ClippedSurrogate("ppo", epochs=2), optimizer, 3, 0, progress=False)
    assert table["kl"].abs().max() < 1e-12
    assert table["ratio_mean"].tolist() == pytest.approx([1.0] * 3, abs=1e-6)
    assert (table["clip_fraction"] == 0).all()
