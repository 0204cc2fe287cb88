"""Optimizers by name: which parameter goes where, and that nothing moves without a gradient."""

import copy

import pytest
import torch

from isopo_mini.policies import MLP, CausalTransformer, LinearSoftmax, TabularSoftmax
from isopo_mini.rules.optimizers import OPTIMIZERS, Together, hidden_matrices, make_optimizer


def fill_gradients(policy: torch.nn.Module, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in policy.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def names_of(policy: torch.nn.Module, parameters: list[torch.nn.Parameter]) -> set[str]:
    wanted = {id(parameter) for parameter in parameters}
    return {name for name, parameter in policy.named_parameters() if id(parameter) in wanted}


class TestHiddenMatrices:
    def test_of_a_network_all_but_the_last(self) -> None:
        policy = MLP(4, 2, hidden=(8, 6))
        assert names_of(policy, hidden_matrices(policy)) == {"layers.0.weight", "layers.2.weight"}
        assert hidden_matrices(LinearSoftmax(4, 2)) == []
        assert hidden_matrices(TabularSoftmax(4, 2)) == []

    @pytest.mark.parametrize("tied_head", [False, True])
    def test_of_a_transformer_neither_embeddings_nor_head(self, tied_head: bool) -> None:
        policy = CausalTransformer(11, 8, width=16, layers=2, heads=2, tied_head=tied_head)
        parts = ("attention.qkv", "attention.output", "mlp.0", "mlp.2")
        expected = {f"blocks.{block}.{part}.weight" for block in (0, 1) for part in parts}
        assert names_of(policy, hidden_matrices(policy)) == expected

    def test_frozen_ones_are_left_out(self) -> None:
        policy = MLP(4, 2, hidden=(8, 6))
        policy.layers[0].weight.requires_grad_(False)
        assert names_of(policy, hidden_matrices(policy)) == {"layers.2.weight"}


def test_sgd_is_plain() -> None:
    policy = MLP(4, 2)
    before = [parameter.detach().clone() for parameter in policy.parameters()]
    optimizer = make_optimizer("sgd", policy, 0.1)
    fill_gradients(policy)
    for _ in range(2):  # twice: momentum would show
        optimizer.step()
    for old, parameter in zip(before, policy.parameters(), strict=True):
        # Two subtractions of numbers near 1 in single precision.
        torch.testing.assert_close(parameter, old - 0.2 * parameter.grad, rtol=0, atol=3e-7)


def test_momentum_by_hand_over_three_steps() -> None:
    """m₁ = g₁; m₂ = .9m₁ + g₂; m₃ = .9m₂ + g₃; and θ loses η(m₁ + m₂ + m₃). Neither dampened nor Nesterov's."""
    policy = MLP(4, 2).double()
    start = [parameter.detach().clone() for parameter in policy.parameters()]
    optimizer = make_optimizer("momentum", policy, 0.1)
    gradients = []
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        for parameter in policy.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        gradients.append([parameter.grad for parameter in policy.parameters()])
        optimizer.step()
    for old, parameter, first, second, third in zip(start, policy.parameters(), *gradients, strict=True):
        moved = (1 + 0.9 + 0.81) * first + (1 + 0.9) * second + third
        torch.testing.assert_close(parameter, old - 0.1 * moved, rtol=0, atol=1e-14)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_without_a_gradient_nothing_moves(name: str) -> None:
    """Weight decay would move every weight here."""
    policy = MLP(4, 2, hidden=(8, 6))
    before = [parameter.detach().clone() for parameter in policy.parameters()]
    optimizer = make_optimizer(name, policy, 0.1)
    for parameter in policy.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for old, parameter in zip(before, policy.parameters(), strict=True):
        assert torch.equal(parameter, old)


def test_muon_makes_matrices_orthogonal_and_leaves_the_rest_to_adamw() -> None:
    policy = MLP(16, 2, hidden=(16,))
    with_adamw = MLP(16, 2, hidden=(16,))
    with_adamw.load_state_dict(policy.state_dict())
    before = policy.layers[0].weight.detach().clone()
    for model, name in ((policy, "muon"), (with_adamw, "adamw")):
        optimizer = make_optimizer(name, model, 0.01)
        fill_gradients(model)
        optimizer.step()
    for (name, parameter), other in zip(policy.named_parameters(), with_adamw.parameters(), strict=True):
        assert torch.equal(parameter, other) == (name != "layers.0.weight"), name
    moved = torch.linalg.svdvals((policy.layers[0].weight - before).detach())
    # Five Newton–Schulz steps bring singular values to between about 0.7 and 1.2; those of a random square matrix
    # spread over orders of magnitude. The scale is 0.2 √(larger side): an entry then moves as with AdamW.
    scaled = moved / (0.01 * 0.2 * 4)
    assert scaled.min() > 0.4
    assert scaled.max() < 1.4
    assert torch.linalg.svdvals(policy.layers[0].weight.grad).min() < 0.1 * policy.layers[0].weight.grad.norm() / 4


class TestTogether:
    def test_clears_and_schedules_every_part(self) -> None:
        policy = MLP(4, 2)
        optimizer = make_optimizer("muon", policy, 0.1)
        assert isinstance(optimizer, Together)
        fill_gradients(policy)
        optimizer.zero_grad()
        assert all(parameter.grad is None for parameter in policy.parameters())
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 0.0)
        before = [parameter.detach().clone() for parameter in policy.parameters()]
        fill_gradients(policy)
        optimizer.step()  # the schedule has set every learning rate to 0
        scheduler.step()
        for old, parameter in zip(before, policy.parameters(), strict=True):
            assert torch.equal(parameter, old)

    def test_continues_from_a_saved_state(self) -> None:
        policies = [MLP(4, 2), MLP(4, 2)]
        policies[1].load_state_dict(policies[0].state_dict())
        first, second = (make_optimizer("muon", policy, 0.1) for policy in policies)
        fill_gradients(policies[0], seed=1)
        first.step()
        policies[1].load_state_dict(policies[0].state_dict())
        second.load_state_dict(copy.deepcopy(first.state_dict()))
        for policy, optimizer in zip(policies, (first, second), strict=True):
            fill_gradients(policy, seed=2)
            optimizer.step()
        for one, other in zip(*(policy.parameters() for policy in policies), strict=True):
            assert torch.equal(one, other)


@pytest.mark.usefixtures("unchecked")
def test_errors() -> None:
    with pytest.raises(ValueError, match=r"^optimizer: expected one of sgd, momentum, adamw, muon, got 'adam'$"):
        make_optimizer("adam", MLP(4, 2), 0.1)
    with pytest.raises(ValueError, match="learning_rate"):
        make_optimizer("sgd", MLP(4, 2), 0.0)
    with pytest.raises(ValueError, match="hidden matrix for muon, got TabularSoftmax without; use sgd"):
        make_optimizer("muon", TabularSoftmax(2, 3), 0.1)
    with pytest.raises(ValueError, match="policy: expected at least one trainable parameter, got none"):
        make_optimizer("sgd", MLP(4, 2).requires_grad_(False), 0.1)
