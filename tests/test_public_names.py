"""The names that coursework and other programs call: they exist, take what they took, and say what they do."""

import importlib
import inspect
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import isopo_mini
from isopo_mini import Batch, engine, experiments, geometry, objectives, policies, rules, tasks, training
from isopo_mini.policies import MLP, TabularSoftmax
from isopo_mini.tasks import ContextualBandit

API_PAGES = sorted((Path(__file__).resolve().parent.parent / "book" / "appendix" / "api").glob("*.md"))
API = "\n".join(page.read_text(encoding="utf-8") for page in API_PAGES)
PUBLIC_MODULES = re.findall(r"automodule:: (\S+)", API)

# What may be called, and the arguments in their order. More may follow if they have defaults.
CONTRACT: dict[str, str] = {
    "Batch": "observations actions mask rewards log_probs groups",
    "policies.CategoricalPolicy.logits": "self observations",
    "policies.CategoricalPolicy.log_prob": "self batch",
    "policies.softmax_fisher": "probs",
    "geometry.fisher.score_matrix": "policy observations actions",
    "geometry.fisher.exact_fisher": "policy observations weights",
    "geometry.fisher.empirical_fisher": "scores",
    "geometry.fisher.fisher_vector_product": "policy observations vector",
    "geometry.fisher.squared_length": "policy observations vector weights mask",
    "geometry.natural_gradient.solve": "fisher gradient damping",
    "geometry.natural_gradient.solve_singular": "fisher gradient cutoff",
    "geometry.natural_gradient.solve_dual": "scores advantages damping",
    "geometry.natural_gradient.solve_cg": "fvp gradient damping max_iterations tolerance",
    "geometry.natural_gradient.solve_rank_one": "score vector damping",
    "geometry.isopo.ntk_coefficients": "gram advantages damping scale",
    "geometry.isopo.fisher_norms": "gram",
    "geometry.isopo.participation_ratio": "gram",
    "geometry.isopo.damping_share": "gram damping",
    "geometry.isopo.normalized_coefficients": "norms advantages power",
    "geometry.gram.dense": "left right",
    "geometry.gram.ghost": "left right",
    "geometry.gram.sketched": "left right sketch",
    "engine.Isopo": "model transform",
    "engine.Isopo.microbatch": "self advantages",
    "engine.Isopo.end_step": "self",
    "engine.gram_matrices": "model log_probs",
    "engine.register": "functions",
    "engine.verify": "model log_probs num_sequences",
    "engine.NTK": "damping scale",
    "engine.FisherNormalized": "norm",
    "engine.LayerScaled": "",
    "objectives.advantages.group_advantages": "rewards groups scale eps",
    "objectives.advantages.leave_one_out": "rewards groups",
    "objectives.advantages.discounted_returns": "rewards mask discount bootstrap",
    "objectives.advantages.gae": "rewards values mask discount trace_decay bootstrap",
    "objectives.losses.reinforce": "log_probs old_log_probs advantages mask aggregate",
    "objectives.losses.ppo": "log_probs old_log_probs advantages mask clip_low clip_high aggregate",
    "objectives.losses.grpo": "log_probs old_log_probs advantages mask clip_low clip_high aggregate",
    "objectives.losses.dr_grpo": "log_probs old_log_probs advantages mask clip_low clip_high aggregate",
    "objectives.losses.dapo": "log_probs old_log_probs advantages mask clip_low clip_high aggregate",
    "objectives.losses.gspo": "log_probs old_log_probs advantages mask clip_low clip_high aggregate",
    "objectives.losses.cispo": "log_probs old_log_probs advantages mask clip_low clip_high aggregate",
    "objectives.losses.copg": "log_probs old_log_probs advantages mask clip_low clip_high aggregate",
    "objectives.kl.estimate": "log_probs reference_log_probs kind",
    "objectives.values.fitted_values": "batch discount",
    "objectives.values.episode_advantages": "discount trace_decay",
    "tasks.bandit.ContextualBandit.sample": "self policy num_sequences generator",
    "tasks.bandit.ContextualBandit.evaluate": "self policy",
    "tasks.evaluate_many": "transitions probs rewards discount",
    "tasks.local_minimum": "system gain max_steps tolerance",
    "tasks.solve_linear_program": "mdp constraints",
    "tasks.cartpole.CartPole": "max_steps",
    "tasks.cartpole.CartPole.sample": "self policy num_sequences generator",
    "tasks.cartpole.CartPole.evaluate": "self policy",
    "tasks.tokens.Addition": "digits",
    "tasks.tokens.Addition.sample": "self policy num_sequences generator",
    "tasks.tokens.Addition.evaluate": "self policy",
    "rules.Reinforce.step": "self policy batch optimizer",
    "rules.NaturalGradient.step": "self policy batch optimizer",
    "rules.NtkIsopo.step": "self policy batch optimizer",
    "rules.FisherNormalizedIsopo.step": "self policy batch optimizer",
    "rules.LayerScaledReinforce.step": "self policy batch optimizer",
    "rules.ExactFisherIsopo.step": "self policy batch optimizer",
    "rules.ClippedSurrogate.step": "self policy batch optimizer",
    "rules.TrustRegion.step": "self policy batch optimizer",
    "rules.KLTargeted": "rule kl",
    "rules.KLTargeted.step": "self policy batch optimizer",
    "experiments.statistics.t_interval": "values axis",
    "experiments.statistics.paired_difference": "one other",
    "experiments.statistics.probability_of_improvement": "one other",
    "experiments.statistics.interquartile_mean": "values",
    "experiments.statistics.performance_profile": "values thresholds",
    "experiments.statistics.bootstrap_interval": "values axis",
    "training.loop.train": "policy task rule optimizer steps seed",
    "rules.optimizers.make_optimizer": "name policy learning_rate",
    "experiments.runs.Run": "task rule learning_rate seed",
    "experiments.runs.run": "settings",
    "experiments.records.load_records": "folder",
    "experiments.records.as_table": "records",
    "experiments.records.curves": "records",
    "experiments.records.summary": "records",
}

DEFAULTS = {
    ("Batch", "groups"): None,
    ("geometry.fisher.exact_fisher", "weights"): None,
    ("geometry.isopo.ntk_coefficients", "scale"): "gradient",
    ("geometry.isopo.normalized_coefficients", "power"): 1.0,
    ("engine.NTK", "scale"): "gradient",
    ("engine.FisherNormalized", "scale"): "norm",
    ("rules.NtkIsopo", "scale"): "gradient",
    ("rules.FisherNormalizedIsopo", "scale"): "norm",
    ("objectives.advantages.group_advantages", "scale"): "std",
}


def find(name: str) -> Any:
    """`isopo_mini.<name>`, by attribute after attribute."""
    found: Any = isopo_mini
    for part in name.split("."):
        found = getattr(found, part)
    return found


@pytest.mark.parametrize("name", CONTRACT)
def test_is_called_with_the_arguments_of_the_contract(name: str) -> None:
    parameters = list(inspect.signature(find(name)).parameters.values())
    promised = CONTRACT[name].split()
    assert [parameter.name for parameter in parameters[: len(promised)]] == promised
    for parameter in parameters[len(promised) :]:
        assert parameter.default is not parameter.empty or parameter.kind in (
            parameter.VAR_POSITIONAL,
            parameter.VAR_KEYWORD,
        ), f"{parameter.name} needs a default"


@pytest.mark.parametrize(("name", "argument"), DEFAULTS)
def test_defaults_of_the_contract(name: str, argument: str) -> None:
    assert inspect.signature(find(name)).parameters[argument].default == DEFAULTS[name, argument]


def test_what_comes_back_has_the_shape_of_the_contract() -> None:
    """One small policy through all of it: N = 6 samples, A = 3 actions, P parameters."""
    bandit = ContextualBandit(torch.rand(2, 3), features=torch.randn(2, 4))
    policy = MLP(4, 3, hidden=(5,))
    batch = bandit.sample(policy, 6)
    (n, p) = (6, sum(parameter.numel() for parameter in policy.parameters()))
    observations, actions = batch.observations[:, 0], batch.actions[:, 0]
    assert policy.logits(batch.observations).shape == (n, 1, 3)
    assert policy.log_prob(batch).shape == (n, 1)
    fisher, solvers, isopo = geometry.fisher, geometry.natural_gradient, geometry.isopo
    scores = fisher.score_matrix(policy, observations, actions)
    assert scores.shape == (n, p)
    matrix = fisher.exact_fisher(policy, observations, torch.ones(n))
    assert matrix.shape == fisher.empirical_fisher(scores).shape == (p, p)
    gradient = scores.T @ batch.rewards / n

    def product(vector: Tensor) -> Tensor:
        return fisher.fisher_vector_product(policy, observations, vector)

    direction, convergence = solvers.solve_cg(product, gradient, 0.1, 50, 1e-4)
    assert convergence.converged
    for solved in (
        product(gradient),
        direction,
        solvers.solve(matrix, gradient, 0.1),
        solvers.solve_dual(scores, batch.rewards, 0.1),
        solvers.solve_rank_one(scores[0], gradient, 0.1),
    ):
        assert solved.shape == (p,)
    gram = scores @ scores.T
    for coefficients in (
        isopo.ntk_coefficients(gram, batch.rewards, 0.1),
        isopo.fisher_norms(gram),
        isopo.normalized_coefficients(isopo.fisher_norms(gram), batch.rewards),
        objectives.advantages.group_advantages(batch.rewards, actions, "none"),
        objectives.advantages.leave_one_out(batch.rewards, actions),
    ):
        assert coefficients.shape == (n,)
    left, right = torch.randn(n, 2, 4), torch.randn(n, 2, 5)
    sketch = geometry.gram.draw_sketch(3, 4, 5, like=right)
    for way, extra in ((geometry.gram.dense, ()), (geometry.gram.ghost, ()), (geometry.gram.sketched, (sketch,))):
        assert way(left, right, *extra).shape == (n, n)


@pytest.mark.parametrize(
    "rule",
    [
        "Reinforce",
        "NaturalGradient",
        "NtkIsopo",
        "FisherNormalizedIsopo",
        "LayerScaledReinforce",
        "ClippedSurrogate",
        "TrustRegion",
    ],
)
def test_a_rule_runs_with_its_defaults_and_training_returns_one_row_an_iteration(rule: str) -> None:
    policy = TabularSoftmax(2, 3)
    table = training.loop.train(
        policy,
        tasks.ContextualBandit(torch.rand(2, 3)),
        getattr(rules, rule)(),
        torch.optim.SGD(policy.parameters(), lr=0.1),
        2,
        0,
    )
    assert len(table) == 2
    assert {"step", "samples", "return", "kl", "gradient_norm"} <= set(table.columns)


# Commands, and what is loaded by name with the library that it is for.
NOT_LOADED = {
    "isopo_mini.tasks.warm_start",
    "isopo_mini.integrations.torchrun",
    "isopo_mini.coursework.agreement",
    "isopo_mini.coursework.contest",
}
ROOMS = [isopo_mini, engine, experiments, geometry, objectives, policies, rules, tasks, training]


class TestPackages:
    def test_the_top_level_is_what_it_says(self) -> None:
        rooms = ["engine", "experiments", "geometry", "objectives", "policies", "rules", "tasks", "training"]
        assert isopo_mini.__all__ == ["Batch", *rooms]
        assert isopo_mini.Batch is Batch

    @pytest.mark.parametrize("package", ROOMS)
    def test_all_names_what_is_there_and_nothing_twice(self, package: Any) -> None:
        assert len(package.__all__) == len(set(package.__all__)) > 0
        assert [name for name in package.__all__ if not hasattr(package, name)] == []

    def test_one_import_makes_every_room_available(self) -> None:
        """In a process of its own, since other tests have imported more."""
        rooms = sorted({name for name in PUBLIC_MODULES if name.count(".") > 1} - NOT_LOADED)
        program = "import isopo_mini\n" + "\n".join(rooms)
        subprocess.run([sys.executable, "-W", "error", "-c", program], check=True)

    @pytest.mark.parametrize(
        ("line", "without"),
        [
            ("import isopo_mini", {"torch", "pandas"}),
            ("import isopo_mini.engine", {"pandas", "scipy", "gymnasium", "safetensors", "matplotlib"}),
            ("from isopo_mini.rules import NtkIsopo", {"pandas", "scipy", "gymnasium", "matplotlib"}),
            ("import isopo_mini.experiments.command", {"matplotlib"}),
        ],
    )
    def test_a_room_loads_what_it_needs(self, line: str, without: set[str]) -> None:
        """Of the libraries that are slow to load: whoever wants the engine does not wait for those of experiments."""
        program = f"{line}\nimport sys\nprint(*[name for name in {sorted(without)} if name in sys.modules])"
        result = subprocess.run([sys.executable, "-W", "error", "-c", program], capture_output=True, text=True)
        assert (result.stdout, result.stderr) == ("\n", "")


def public_callables() -> Iterator[tuple[str, Callable[..., Any]]]:
    """Every public function, class and method that a public module defines itself or a package exports.

    Not `forward`: what a module does when it is called is what its class's docstring says.
    """
    for module_name in PUBLIC_MODULES:
        module = importlib.import_module(module_name)
        exported = getattr(module, "__all__", ())
        for name, value in vars(module).items():
            own = getattr(value, "__module__", None) == module_name or name in exported
            if name.startswith("_") or not own or not callable(value):
                continue
            yield f"{module_name}.{name}", value
            if inspect.isclass(value):
                for method_name, method in vars(value).items():
                    method = getattr(method, "__func__", method)  # what a classmethod wraps
                    if inspect.isfunction(method) and not method_name.startswith("_") and method_name != "forward":
                        yield f"{module_name}.{name}.{method_name}", method


PUBLIC = dict(public_callables())


@pytest.mark.parametrize("name", PUBLIC_MODULES)
def test_module_has_a_docstring(name: str) -> None:
    assert len(inspect.getdoc(importlib.import_module(name)) or "") > 20


@pytest.mark.parametrize("name", PUBLIC)
def test_docstring_says_what_it_does_and_knows_its_arguments(name: str) -> None:
    value = PUBLIC[name]
    docstring = inspect.cleandoc(value.__doc__ or "")
    first = docstring.split("\n")[0]
    assert len(first) > 10, "a docstring begins with one line that says what it does"
    assert not first.startswith(f"{value.__name__}("), "this is what dataclasses write for those that say nothing"
    arguments = re.search(r"(?ms)^Args:\n(.*?)(?=^\S|\Z)", docstring)
    if arguments is None:
        return
    stated = [
        argument.strip(" *")
        for line in re.findall(r"(?m)^    ([*\w, ]+):", arguments.group(1))
        for argument in line.split(",")
    ]
    assert stated
    taken = set(inspect.signature(value).parameters)
    if hasattr(value, "__dataclass_fields__"):
        taken |= set(value.__dataclass_fields__)
    assert [argument for argument in stated if argument not in taken] == []


def test_the_docstring_test_sees_what_there_is() -> None:
    assert len(PUBLIC) > 80
    assert {"isopo_mini.batch.Batch.select", "isopo_mini.policies.softmax.TabularSoftmax.from_probs"} <= set(PUBLIC)
