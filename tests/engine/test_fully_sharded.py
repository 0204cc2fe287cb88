"""FSDP2: each process keeps parts of the parameters, and the step is that of a loop over the sequences of all."""

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint
from two_processes import RANKS, SEQUENCES, join, log_prob, make_data, spawn

from isopo_mini.engine import NTK, FisherNormalized, Isopo, Transform, layer_names
from isopo_mini.policies import CausalTransformer

POSITIONS, VOCABULARY = 4, 7
DAMPING, STEPS, STEP_SIZE, MOMENTUM = 0.3, 3, 0.05, 0.9
WHOLE = 64  # a sketch at least as large as both sides of every weight is the gradient itself

Average = Callable[[str, Tensor], Tensor]
Coefficients = Callable[[Tensor, Tensor, Callable[[Tensor], Tensor]], Tensor]


# --- The reference: every sequence by itself, on the whole model, without the engine ---------------------------------


def ntk(gram: Tensor, advantages: Tensor, average: Callable[[Tensor], Tensor]) -> Tensor:
    """(K + λI)⁻¹A."""
    damping = DAMPING * average(gram.trace() / len(gram))
    return torch.linalg.solve(gram + damping * torch.eye(len(gram)).double(), advantages)


def ntk_gradient(gram: Tensor, advantages: Tensor, average: Callable[[Tensor], Tensor]) -> Tensor:
    """λ(K + λI)⁻¹A."""
    damping = DAMPING * average(gram.trace() / len(gram))
    return damping * torch.linalg.solve(gram + damping * torch.eye(len(gram)).double(), advantages)


def fisher(gram: Tensor, advantages: Tensor, average: Callable[[Tensor], Tensor]) -> Tensor:
    """A/o."""
    return advantages / gram.square().mean(dim=1).sqrt()


def fisher_natural(gram: Tensor, advantages: Tensor, average: Callable[[Tensor], Tensor]) -> Tensor:
    """A · rms(o)/o, over the mean eigenvalue."""
    norms = gram.square().mean(dim=1).sqrt()
    return advantages * norms.square().mean().sqrt() / norms / average(gram.trace() / len(gram))


class Case(NamedTuple):
    """A way to train, and what it should come to."""

    transform: Transform
    coefficients: Coefficients
    shared: bool = True  # one Gram matrix for both processes
    gram: str = "sketched"
    tied: bool = False
    reshard: bool = True
    way: str = "plain"


CASES = {
    "NTK natural": Case(NTK(DAMPING, scale="natural"), ntk),
    "NTK gradient, kept": Case(NTK(DAMPING), ntk_gradient, tied=True, reshard=False),
    "Fisher, tied": Case(FisherNormalized(), fisher, tied=True),
    "Fisher natural, kept": Case(FisherNormalized(scale="natural"), fisher_natural, reshard=False),
    "own, dense": Case(NTK(DAMPING, scale="natural"), ntk, shared=False, gram="dense", tied=True),
    "own, ghost": Case(FisherNormalized(), fisher, shared=False, gram="ghost", reshard=False),
    "checkpointed": Case(NTK(DAMPING, scale="natural"), ntk, way="checkpointed"),
    "tied in a group": Case(NTK(DAMPING, scale="natural"), ntk, tied=True, way="grouped"),
}


def make_policy(tied: bool = False) -> nn.Module:
    torch.manual_seed(0)
    return CausalTransformer(VOCABULARY, POSITIONS, width=4, layers=2, heads=2, tied_head=tied).double()


def gradients_of_loop(policy: nn.Module, tokens: Tensor, advantages: Tensor, case: Case, average: Average) -> list:
    """Σ_s c_s G_s for every parameter, from one backward pass a sequence."""
    parameters, names = list(policy.parameters()), layer_names(policy)
    rows = [torch.autograd.grad(log_prob(policy, each[None]).sum(), parameters) for each in tokens]
    of_parameters = [torch.stack(each).flatten(1) for each in zip(*rows, strict=True)]
    grams: dict[str, Tensor] = {}
    for parameter, gradients in zip(parameters, of_parameters, strict=True):
        grams[names[parameter]] = grams.get(names[parameter], 0) + gradients @ gradients.T
    c = {n: case.coefficients(gram, advantages, lambda value, n=n: average(n, value)) for n, gram in grams.items()}
    pairs = zip(parameters, of_parameters, strict=True)
    return [(c[names[parameter]] @ gradients).view_as(parameter) for parameter, gradients in pairs]


def steps_of_loop(case: Case) -> list[Tensor]:
    """The weights after the steps: one Gram matrix for all sequences, or one for each half and the mean of both."""
    policy, (tokens, advantages) = make_policy(case.tied), make_data(POSITIONS, VOCABULARY)
    optimizer = torch.optim.SGD(policy.parameters(), lr=STEP_SIZE, momentum=MOMENTUM)
    parts = 1 if case.shared else RANKS
    histories: list[dict[str, Tensor]] = [{} for _ in range(parts)]
    for step in range(STEPS):
        optimizer.zero_grad()
        shares = zip(tokens.chunk(parts), advantages.chunk(parts), histories, strict=True)
        for own, own_advantages, history in shares:

            def average(name: str, value: Tensor, history: dict = history) -> Tensor:
                history[name] = 0.9 * history[name] + 0.1 * value if name in history else value
                return history[name]

            scaled = (1 - 0.4 * step) * own_advantages / len(own)
            for parameter, gradient in zip(
                policy.parameters(), gradients_of_loop(policy, own, scaled, case, average), strict=True
            ):
                gradient = gradient / parts
                parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
        optimizer.step()
    return [parameter.detach() for parameter in policy.parameters()]


# --- The same with FSDP2 in two processes ----------------------------------------------------------------------------


def shard(policy: nn.Module, reshard: bool = True, way: str = "plain") -> nn.Module:
    """Each block by itself, and the rest together."""
    for block in policy.blocks:
        if way == "checkpointed":
            inside = block.mlp.forward
            block.mlp.forward = lambda x, inside=inside: checkpoint(inside, x, use_reentrant=False)
        fully_shard(block, reshard_after_forward=reshard)
    if way == "grouped":
        fully_shard([policy.token_embedding, policy.head], reshard_after_forward=reshard)
    return fully_shard(policy, reshard_after_forward=reshard)


def steps(case: Case, rank: int, sketch_size: int = WHOLE) -> list[Tensor]:
    """The weights after the steps of this process, gathered."""
    tokens, advantages = (values.chunk(RANKS)[rank] for values in make_data(POSITIONS, VOCABULARY))
    policy = shard(make_policy(case.tied), case.reshard, case.way)
    optimizer = torch.optim.SGD(policy.parameters(), lr=STEP_SIZE, momentum=MOMENTUM)
    group = dist.group.WORLD if case.shared else None
    isopo = Isopo(policy, case.transform, gram=case.gram, sketch_size=sketch_size, process_group=group)
    for step in range(STEPS):
        optimizer.zero_grad()
        with isopo.microbatch((1 - 0.4 * step) * advantages / len(tokens)):
            log_prob(policy, tokens).sum().backward()
        optimizer.step()
        isopo.end_step()
    return whole(policy)


def whole(policy: nn.Module) -> list[Tensor]:
    gathered = []
    for parameter in policy.parameters():
        assert isinstance(parameter, DTensor)  # a part of it, or it would not be FSDP2
        assert parameter.to_local().numel() < parameter.numel()
        gathered.append(parameter.detach().full_tensor())
    return gathered


def accumulated(rank: int) -> list[Tensor]:
    """Gradients of two microbatches of a process, of which the first keeps its gradients to itself."""
    tokens, advantages = (values.chunk(RANKS)[rank] for values in make_data(POSITIONS, VOCABULARY))
    policy = shard(make_policy())
    isopo = Isopo(policy, NTK(DAMPING))
    for last, part in enumerate((slice(0, 1), slice(1, 3))):
        policy.set_requires_gradient_sync(bool(last))
        with isopo.microbatch(advantages[part] / len(tokens)):
            log_prob(policy, tokens[part]).sum().backward()
    return [parameter.grad.full_tensor() for parameter in policy.parameters()]


def train_in_two(rank: int, port: int, folder: str) -> None:
    join(rank, port)
    results = {name: steps(case, rank) for name, case in CASES.items()}
    results["sketched"] = steps(CASES["NTK natural"], rank, sketch_size=2)
    results["accumulated"] = accumulated(rank)
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, list[Tensor]]]:
    """What both processes have at the end, by case."""
    folder = tmp_path_factory.mktemp("sharded")
    spawn(train_in_two, str(folder))
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(RANKS)]


@pytest.mark.parametrize("name", CASES)
def test_the_steps_are_those_of_a_loop_over_all_sequences(name: str, results: list[dict[str, list[Tensor]]]) -> None:
    expected = steps_of_loop(CASES[name])
    moved = [
        weight - begin.detach()
        for weight, begin in zip(expected, make_policy(CASES[name].tied).parameters(), strict=True)
    ]
    for of_rank in results:
        for found, weight, step in zip(of_rank[name], expected, moved, strict=True):
            assert (found - weight).norm() < 1e-9 * step.norm()


def test_a_shared_gram_matrix_is_another_step_than_one_for_each() -> None:
    """So that the comparison above can fail."""
    case = CASES["NTK natural"]
    shared, own = steps_of_loop(case), steps_of_loop(case._replace(shared=False))
    apart = torch.cat([(x - y).flatten() for x, y in zip(shared, own, strict=True)]).norm()
    moved = torch.cat([(x - y).flatten() for x, y in zip(shared, make_policy().parameters(), strict=True)]).norm()
    assert apart > 0.01 * moved


def test_sketches_smaller_than_the_weights_are_those_of_one_process(results: list[dict[str, list[Tensor]]]) -> None:
    policy, (tokens, advantages) = make_policy(), make_data(POSITIONS, VOCABULARY)
    optimizer = torch.optim.SGD(policy.parameters(), lr=STEP_SIZE, momentum=MOMENTUM)
    isopo = Isopo(policy, NTK(DAMPING, scale="natural"), gram="sketched", sketch_size=2)
    for step in range(STEPS):
        optimizer.zero_grad()
        with isopo.microbatch((1 - 0.4 * step) * advantages / SEQUENCES):
            log_prob(policy, tokens).sum().backward()
        optimizer.step()
        isopo.end_step()
    for of_rank in results:
        for found, weight in zip(of_rank["sketched"], policy.parameters(), strict=True):
            torch.testing.assert_close(found, weight.detach(), rtol=1e-9, atol=1e-11)


def test_microbatches_add_up_before_they_are_shared_out(results: list[dict[str, list[Tensor]]]) -> None:
    policy, (tokens, advantages) = make_policy(), make_data(POSITIONS, VOCABULARY)
    expected = [torch.zeros_like(parameter) for parameter in policy.parameters()]
    for first in (0, 1, 3, 4):  # each process has one sequence, and then two
        part = slice(first, first + 1 + first % 3)
        gradients = gradients_of_loop(
            policy, tokens[part], advantages[part] / SEQUENCES, CASES["NTK gradient, kept"], lambda _, value: value
        )
        expected = [total + gradient for total, gradient in zip(expected, gradients, strict=True)]
    for of_rank in results:
        for found, gradient in zip(of_rank["accumulated"], expected, strict=True):
            torch.testing.assert_close(found, gradient, rtol=1e-9, atol=1e-11)
