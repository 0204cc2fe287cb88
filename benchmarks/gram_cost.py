"""What the Gram matrices cost in time and memory, against forming every sequence's gradient.

    python benchmarks/gram_cost.py [--device cuda] [--rounds 15] [--out results/gram_cost.csv]

Time: an MLP 8→256→4 and N=64 samples, all layers' Gram matrices by the engine, against `torch.func.vmap(grad)` and JJᵀ.
Two more rows say what could be had: one forward and backward pass alone, which any engine has to make, and the
formula derived by hand for this one network. Opacus, BackPACK and JAX stand beside it where `.[benchmarks]` installed
them.
Memory: a transformer of width 512, S=64: the most that lives at once in one step beyond parameters, gradients and data,
counted from the tensors' storages.
"""

import argparse
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from other_libraries import by_other_libraries
from timing import ratio, rounds_of
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import one_hot
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from isopo_mini.engine import NTK, Isopo, gram_matrices
from isopo_mini.experiments.provenance import provenance, write_table
from isopo_mini.policies import MLP, CausalTransformer

SAMPLES = 64
SEQUENCES, POSITIONS, WIDTH, LAYERS, VOCABULARY = 64, 16, 512, 2, 16


class PeakMemory(TorchDispatchMode):
    """Bytes of the storages made inside it: how many live now, and the most that lived at once."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                storage = leaf.untyped_storage()
                if storage._cdata not in given and storage._cdata not in self._known:
                    self._count(storage)
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        self._known.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)

        def freed() -> None:
            self._known.discard(key)
            self.live -= size

        weakref.finalize(storage, freed)


def per_sample_gradients(policy: nn.Module, log_prob: Callable[..., Tensor], *data: Tensor) -> list[Tensor]:
    """Every sample's gradient of every parameter, `(N, *shape)` each."""
    parameters = {name: parameter.detach() for name, parameter in policy.named_parameters()}

    def of_one(parameters: dict[str, Tensor], *one: Tensor) -> Tensor:
        logits = functional_call(policy, parameters, (one[0][None],))
        return log_prob(logits, *[part[None] for part in one[1:]]).sum()

    return list(vmap(grad(of_one), (None, *[0] * len(data)))(parameters, *data).values())


def chosen_log_probs(logits: Tensor, actions: Tensor) -> Tensor:
    """log π of the actions."""
    return logits.log_softmax(-1).gather(-1, actions.unsqueeze(-1)).squeeze(-1)


def time_of_gram_matrices(rounds: int, device: torch.device) -> list[dict[str, object]]:
    """The engine's Gram matrices of an MLP against JJᵀ."""
    torch.manual_seed(0)
    policy = MLP(8, 4, hidden=(256,)).to(device)
    observations, actions = torch.randn(SAMPLES, 8, device=device), torch.randint(0, 4, (SAMPLES,), device=device)

    def by_vmap() -> Tensor:
        rows = torch.cat(
            [g.flatten(1) for g in per_sample_gradients(policy, chosen_log_probs, observations, actions)], 1
        )
        return rows @ rows.T

    def by_engine() -> Tensor:
        grams = gram_matrices(policy, lambda: chosen_log_probs(policy(observations), actions))
        return torch.stack(list(grams.values())).sum(dim=0)

    def forward_and_backward() -> None:
        policy.zero_grad()
        chosen_log_probs(policy(observations), actions).sum().backward()

    @torch.no_grad()
    def by_hand() -> Tensor:
        """K = (XXᵀ + 1) ∘ (ΔΔᵀ), layer by layer, with Δ the gradient at the layer's output."""
        first, _, last = policy.layers
        hidden = torch.tanh(first(observations))
        last_delta = one_hot(actions, 4) - last(hidden).softmax(-1)
        first_delta = (last_delta @ last.weight) * (1.0 - hidden.square())
        return sum((x @ x.T + 1.0) * (d @ d.T) for x, d in ((observations, first_delta), (hidden, last_delta)))

    data = (observations, actions)
    others = by_other_libraries(policy, chosen_log_probs, *data) if device.type == "cpu" else {}
    for gram in (by_engine, by_hand, *others.values()):  # the same matrix, in float32
        torch.testing.assert_close(gram(), by_vmap(), rtol=1e-4, atol=1e-5)
    methods = {"engine": by_engine, "forward and backward alone": forward_and_backward, "by hand": by_hand} | others
    seconds = rounds_of(methods | {"vmap": by_vmap}, 20 * rounds, device, "Gram matrices")
    return [
        {
            "what": "time of all layers' Gram matrices, MLP 8-256-4, N=64",
            "reference": "vmap(grad) and its product",
            "method": name,
            "reference over method": round(ratio(seconds, "vmap", name), 2),
        }
        for name in methods
    ]


def memory_of_a_step(device: torch.device) -> list[dict[str, object]]:
    """Peak memory of one step, three ways against all per-sequence gradients at once."""
    torch.manual_seed(0)
    policy = CausalTransformer(VOCABULARY, POSITIONS, width=WIDTH, layers=LAYERS, heads=4).to(device)
    tokens = torch.randint(0, VOCABULARY, (SEQUENCES, POSITIONS), device=device)
    actions = torch.randint(0, VOCABULARY, (SEQUENCES, POSITIONS), device=device)
    for parameter in policy.parameters():
        parameter.grad = torch.zeros_like(parameter)

    def materialised() -> None:
        with sdpa_kernel(SDPBackend.MATH):  # the fused kernel does not know vmap
            gradients = per_sample_gradients(policy, chosen_log_probs, tokens, actions)
        sum(g.flatten(1) @ g.flatten(1).T for g in gradients)

    def step(gram: str) -> Callable[[], None]:
        def run() -> None:
            with Isopo(policy, NTK(1.0), gram=gram).microbatch(torch.ones(SEQUENCES, device=device)):
                chosen_log_probs(policy(tokens), actions).sum().backward()

        return run

    def peak(run: Callable[[], None]) -> float:
        with PeakMemory() as memory:
            run()
        return memory.peak / 2**20

    reference = peak(materialised)
    rows = []
    for gram in ("dense", "ghost", "sketched", "signs"):
        used = peak(step(gram))
        rows.append(
            {
                "what": f"peak MiB of a step, transformer S={SEQUENCES} T={POSITIONS} d={WIDTH}",
                "reference": f"all per-sequence gradients ({reference:.0f} MiB)",
                "method": f"{gram} ({used:.0f} MiB)",
                "reference over method": round(reference / used, 2),
            }
        )
    return rows


def main() -> None:
    """Measure, print, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, help="write a CSV and its provenance here")
    options = parser.parse_args()
    device = torch.device(options.device)
    table = pd.DataFrame([*time_of_gram_matrices(options.rounds, device), *memory_of_a_step(device)])
    print(table.to_string(index=False))
    if options.out:
        write_table(options.out, table, provenance(device, rounds=options.rounds))


if __name__ == "__main__":
    main()
