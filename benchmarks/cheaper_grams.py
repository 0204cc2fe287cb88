"""What else could make K cheaper, and what it loses: the ways that were tried and not taken, beside those that were.

    python benchmarks/cheaper_grams.py [--rounds 7] [--out results/cheaper_grams.csv]

One batch of two-digit addition, 256 answers, from the policy that its experiments start with. Every way has the same
transform, the NTK in its natural scale, and differs in what it takes for a layer's K. *near* is the cosine between the
changes of log π(y_s) along its step and along the exact one, for several ρ, a mean over draws; *ms* is what K and c of
all layers take.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, median

import pandas as pd
import torch
from torch import Tensor
from tqdm.auto import tqdm

from isopo_mini.engine import Isopo
from isopo_mini.engine.layer_gradients import LayerGradients
from isopo_mini.engine.parameter_gradients import MatrixGradients, VectorGradients
from isopo_mini.engine.transforms import MovingAverages
from isopo_mini.experiments.provenance import provenance, write_table
from isopo_mini.experiments.setups import setup_of
from isopo_mini.geometry import gram as grams
from isopo_mini.geometry.isopo import mean_eigenvalue, over_scale
from isopo_mini.geometry.ntk_solvers import iterations_for, solve_ntk, solve_ntk_by_products, solve_ntk_in_single

SIZE = 32  # of every projection or choice that has one
DRAWS = 4
DAMPINGS = (1.0, 0.1, 0.01)

Features = Callable[[LayerGradients, torch.Generator], list[Tensor]]


def gradients_of(part: MatrixGradients | VectorGradients, layer: LayerGradients) -> Tensor:
    """G_s of one parameter."""
    return part.form(layer.resources.workspace) if isinstance(part, MatrixGradients) else part.form()


def every_gradient(layer: LayerGradients, _: torch.Generator) -> list[Tensor]:
    """The G_s themselves."""
    return [gradients_of(part, layer) for part in layer.parameters.values()]


def some_rows(layer: LayerGradients, generator: torch.Generator) -> list[Tensor]:
    """The same random rows of every G_s, in place of a product with a random matrix."""
    chosen = []
    for part in layer.parameters.values():
        gradients = gradients_of(part, layer)
        rows = gradients.shape[1]
        if rows > SIZE:
            index = torch.randperm(rows, generator=generator)[:SIZE]
            gradients = gradients[:, index] * (rows / SIZE) ** 0.5
        chosen.append(gradients)
    return chosen


def some_tokens(layer: LayerGradients, generator: torch.Generator) -> list[Tensor]:
    """Gradients of a random half of the positions, the same for all sequences."""
    chosen = []
    for part in layer.parameters.values():
        given = (
            part.pairs
            if isinstance(part, MatrixGradients)
            else list(zip(part.output_gradients, part.factors, strict=True))
        )
        total = None
        for left, right in given:
            positions = left.shape[1]
            count = max(1, positions // 2)
            index = torch.randperm(positions, generator=generator)[:count]
            if isinstance(part, MatrixGradients):
                found = grams.per_sequence_gradients(left[:, index], right[:, index], part.rows)
            else:
                found = (left[:, index] if right is None else left[:, index] * right[:, index]).sum(dim=1)
            found = found * (positions / count)
            total = found if total is None else total + found
        chosen.append(total)
    return chosen


def in_bfloat16(layer: LayerGradients, generator: torch.Generator) -> list[Tensor]:
    """The G_s, rounded to eight bits of mantissa."""
    return [gradients.bfloat16().to(gradients.dtype) for gradients in every_gradient(layer, generator)]


def projected(kind: str, size: int = SIZE, one_sided: bool = False) -> Features:
    """Ĝ_s = P G_s Qᵀ; with `one_sided` only the longer side is projected."""

    def features(layer: LayerGradients, generator: torch.Generator) -> list[Tensor]:
        found = []
        for part in layer.parameters.values():
            if isinstance(part, VectorGradients):
                found.append(part.form())
                continue
            sketch = grams.draw_sketch(size, part.rows, part.columns, part.rights[0], generator, kind)
            if one_sided:
                keeps_left = part.rows <= part.columns
                sketch = grams.Sketch(None if keeps_left else sketch.left, sketch.right if keeps_left else None)
            short = sketch.left is None and sketch.right is None
            found.append(gradients_of(part, layer) if short else part.sketched(sketch))
        return found

    return features


def direct(rows: Tensor, advantages: Tensor, ratio: float) -> tuple[Tensor, Tensor]:
    """λ(K + λI)⁻¹A and λ for K = GGᵀ, by the solver that the engine takes."""
    gram = grams.inner_products(rows)
    damping = ratio * mean_eigenvalue(gram)
    solver = solve_ntk_in_single if rows.dtype == torch.float32 else solve_ntk
    return solver(gram, advantages, damping), damping


def products(rows: Tensor, advantages: Tensor, ratio: float) -> tuple[Tensor, Tensor]:
    """The same without K, by as many products with G as the engine would take."""
    damping = ratio * torch.linalg.vector_norm(rows, dim=1).square().mean()
    return solve_ntk_by_products(rows, advantages, damping, iterations_for(ratio, len(rows))), damping


@dataclass
class Estimated:
    """The NTK transform in its natural scale, with another K, or another way to c."""

    features: Features
    ratio: float
    solve: Callable[[Tensor, Tensor, float], tuple[Tensor, Tensor]] = direct
    from_first: bool = False  # c of the layer that backpropagation comes by first, for all
    generator: torch.Generator = field(default_factory=torch.Generator)
    seconds: float = 0.0
    first: Tensor | None = None

    def coefficients(self, layer: LayerGradients, advantages: Tensor, averages: MovingAverages) -> Tensor:
        """(K + λI)⁻¹A."""
        started = time.perf_counter()
        rows = torch.cat([part.flatten(1) for part in self.features(layer, self.generator)], dim=1)
        c, damping = self.solve(rows, advantages, self.ratio)
        self.first = c if self.first is None else self.first
        self.seconds += time.perf_counter() - started
        return over_scale(self.first if self.from_first else c, damping)


WAYS: dict[str, dict] = {
    "exact": {"features": every_gradient},
    "signs, k = 32": {"features": projected("signs")},
    "Gaussian, k = 32": {"features": projected("gaussian")},
    "signs, k = 16": {"features": projected("signs", 16)},
    "signs on the longer side, k = 16": {"features": projected("signs", 16, one_sided=True)},
    "32 random rows": {"features": some_rows},
    "half of the tokens": {"features": some_tokens},
    "products of bfloat16": {"features": in_bfloat16},
    "signs, k = 32, c by products": {"features": projected("signs"), "solve": products},
    "c of the last layer for all": {"features": every_gradient, "from_first": True},
}


class Trial:
    """One batch and what a step does to it."""

    def __init__(self) -> None:
        setup = setup_of("addition")
        torch.manual_seed(0)
        task, self.policy = setup.make(torch.device("cpu"))
        self.batch = task.sample(self.policy, setup.sequences, generator=torch.Generator().manual_seed(0))
        rewards = self.batch.total_rewards()
        self.advantages = rewards - rewards.mean()

    def log_probs(self) -> Tensor:
        """log π(y_s)."""
        return self.policy.log_prob(self.batch).sum(dim=1)

    @contextmanager
    def in_double(self) -> Iterator[None]:
        """Cosines are of what the ways lose, not of rounding."""
        self.policy.double()
        try:
            yield
        finally:
            self.policy.float()

    def step(self, transform: object, layers: str = "separate") -> list[Tensor]:
        """Σ_s c_s G_s of every parameter."""
        self.policy.zero_grad()
        like = next(self.policy.parameters())
        with Isopo(self.policy, transform, layers=layers).microbatch(self.advantages.to(like.dtype)):
            self.log_probs().sum().backward()
        return [parameter.grad for parameter in self.policy.parameters()]

    @torch.no_grad()
    def moved(self, step: list[Tensor]) -> Tensor:
        """How fast each log π(y_s) changes along the step, up to a factor."""
        reach = 1e-5 / torch.cat([part.flatten() for part in step]).norm()
        ends = []
        for far in (reach, -2 * reach, reach):
            for parameter, part in zip(self.policy.parameters(), step, strict=True):
                parameter += far * part
            ends.append(self.log_probs())
        return ends[0] - ends[1]

    def near(self, options: dict, ratio: float, layers: str = "separate") -> float:
        """Mean cosine with what the exact step does."""
        truth = self.moved(self.step(Estimated(every_gradient, ratio)))
        found = []
        for seed in range(DRAWS):
            transform = Estimated(ratio=ratio, generator=torch.Generator().manual_seed(seed), **options)
            found.append(torch.cosine_similarity(self.moved(self.step(transform, layers)), truth, dim=0).item())
        return mean(found)

    def milliseconds(self, options: dict) -> float:
        """Of K and c of all layers, in one step."""
        transform = Estimated(ratio=1.0, **options)
        self.step(transform)
        transform.seconds, transform.first = 0.0, None
        self.step(transform)
        return 1e3 * transform.seconds


def main() -> None:
    """Measure, print, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, help="write a CSV and its provenance here")
    options = parser.parse_args()
    trial = Trial()
    times: dict[str, list[float]] = {name: [] for name in WAYS}
    for _ in tqdm(range(options.rounds), desc="time", leave=False):
        for name, way in WAYS.items():
            times[name].append(trial.milliseconds(way))
    rows = []
    with trial.in_double():
        for name, way in tqdm(WAYS.items(), desc="accuracy", leave=False):
            near = {f"near, ρ = {ratio:g}": round(trial.near(way, ratio), 4) for ratio in DAMPINGS}
            rows.append({"way": name, "ms": round(median(times[name]), 1)} | near)
        near = {f"near, ρ = {ratio:g}": round(trial.near(WAYS["exact"], ratio, "together"), 4) for ratio in DAMPINGS}
    table = pd.DataFrame([*rows, {"way": "one c for the whole model"} | near])
    print(table.to_string(index=False))
    if options.out:
        write_table(options.out, table, provenance(torch.device("cpu"), rounds=options.rounds, draws=DRAWS))


if __name__ == "__main__":
    main()
