"""trl's trainer with ISOPO's gradient: exact in float64, whatever trl does around it."""

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("trl")

from by_sequences import Reference
from peft import LoraConfig
from tiny_grpo import EXACT, SINGLE, Run, check, make_config, make_model, make_prompts, make_tokenizer, relative_error
from trl import GRPOTrainer

from isopo_mini.engine import NTK, FisherNormalized
from isopo_mini.integrations.trl import IsopoGRPOTrainer

pytestmark = pytest.mark.filterwarnings("default")  # what trl and transformers say of each other is not ours

BOTH = pytest.mark.parametrize("transform", [NTK(0.5), FisherNormalized()], ids=["NTK", "Fisher"])
EACH_SCALE = pytest.mark.parametrize(
    "transform",
    [NTK(0.5), NTK(0.5, scale="natural"), FisherNormalized(), FisherNormalized(scale="natural")],
    ids=["NTK-gradient", "NTK-natural", "Fisher-norm", "Fisher-natural"],
)


# --- Exact -----------------------------------------------------------------------------------------------------------


@EACH_SCALE
def test_the_gradient_is_isopos_of_trls_objective(transform: Any, tmp_path: Path) -> None:
    """Two optimizer steps of two microbatches; the second step has moving averages, which its end has folded."""
    config = make_config(tmp_path, gradient_accumulation_steps=2, max_steps=2)
    run = Run(Reference(transform)).of(make_model(), config, transform=transform)
    check(run, EXACT, steps=2)


def test_the_signs_of_the_advantages_may_be_given_to_the_loss(tmp_path: Path) -> None:
    """On policy the loss is linear in A: the same gradient from the scores and A, without any sign."""
    transform = NTK(0.5, scale="natural")
    run = Run(Reference(transform, signed=False)).of(make_model(), make_config(tmp_path), transform=transform)
    check(run, EXACT, steps=1)


def test_a_sequence_without_advantage_keeps_its_row_of_k(tmp_path: Path) -> None:
    """A = 0, exactly: its coefficient is not zero, since the others would move it. A sign of 0 would take it away."""

    def halves(completions: list[str], **_: Any) -> list[float]:
        return [(1.0, 0.0, -1.0, 0.0)[index % 4] for index in range(len(completions))]

    run = Run(Reference(NTK(0.5))).of(make_model(), make_config(tmp_path), reward_funcs=halves)
    assert int((run.steps[0].microbatches[0]["advantages"] == 0).sum()) == 2
    check(run, EXACT, steps=1)


@BOTH
@pytest.mark.parametrize(("kind", "tied"), [("llama", True), ("qwen2", False), ("qwen2", True)])
def test_tied_heads_and_biases(kind: str, tied: bool, transform: Any, tmp_path: Path) -> None:
    run = Run(Reference(transform)).of(make_model(kind, tied), make_config(tmp_path), transform=transform)
    assert ("lm_head.weight" in run.steps[0].gradients) != tied
    check(run, EXACT, steps=1)


def test_checkpointing_is_trls_default_and_changes_nothing(tmp_path: Path) -> None:
    runs = [
        Run(Reference(NTK(0.5))).of(make_model(), make_config(tmp_path, gradient_checkpointing=active))
        for active in (True, False)
    ]
    assert runs[0].trainer.model.is_gradient_checkpointing
    for run in runs:
        check(run, EXACT, steps=1)


@BOTH
@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_models_as_they_come(kind: str, transform: Any, tmp_path: Path) -> None:
    """With the norms of transformers, which compute in float32 in a model of float64."""
    config = make_config(tmp_path, gradient_accumulation_steps=2)
    run = Run(Reference(transform)).of(make_model(kind, as_it_comes=True), config, transform=transform)
    check(run, SINGLE, steps=1)


@BOTH
def test_lora(transform: Any, tmp_path: Path) -> None:
    """The head is frozen and stays trl's. The second factors begin at zero; here they do not, so that all move."""
    adapters = LoraConfig(r=2, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False)
    config = make_config(tmp_path, gradient_accumulation_steps=2, max_steps=2, learning_rate=1e-3)
    run = Run(Reference(transform)).of(make_model(), config, transform=transform, peft_config=adapters)
    assert all("lora" in name for name in run.steps[0].gradients)
    check(run, SINGLE, steps=2)


@EACH_SCALE
def test_off_policy(transform: Any, tmp_path: Path) -> None:
    """Every batch twice, with steps so long that the clip acts on both signs in the second iteration."""
    config = make_config(tmp_path, num_iterations=2, max_steps=4, epsilon=0.02, learning_rate=0.1)
    run = Run(Reference(transform)).of(make_model(), config, transform=transform)
    history = run.trainer.state.log_history
    assert history[1]["clip_ratio/low_mean"] > 0
    assert history[1]["clip_ratio/high_mean"] > 0
    assert history[1]["clip_ratio/region_mean"] < 1
    check(run, EXACT, steps=4)


@pytest.mark.parametrize(
    "options",
    [
        {"loss_type": "grpo"},
        {"loss_type": "grpo", "importance_sampling_level": "sequence"},
        {"loss_type": "bnpo"},
        {"loss_type": "dr_grpo"},
        {"loss_type": "cispo", "epsilon_high": 1.05},
        {"loss_type": "dapo", "temperature": 0.7, "epsilon_high": 0.03},
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_loss_types(options: dict[str, Any], tmp_path: Path) -> None:
    config = make_config(tmp_path, gradient_accumulation_steps=2, num_iterations=2, max_steps=2, **options)
    run = Run(Reference(FisherNormalized())).of(make_model(), config, transform=FisherNormalized())
    check(run, EXACT, steps=2)


@BOTH
def test_kl_and_entropy_are_not_multiplied_by_coefficients(transform: Any, tmp_path: Path) -> None:
    """Their gradient is added as it is. The policy has left its reference, so that the KL has one."""
    model = make_model()
    model.save_pretrained(tmp_path / "reference")
    model.config._name_or_path = str(tmp_path / "reference")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    config = make_config(tmp_path, gradient_accumulation_steps=2, max_steps=2, beta=0.3, entropy_coef=0.2)
    run = Run(Reference(transform)).of(model, config, transform=transform)
    assert run.trainer.state.log_history[0]["kl"] > 1e-3
    check(run, SINGLE, steps=2)
    # With the KL in the engine's own backward pass it would be another gradient: the test can fail.
    run.trainer.args.beta = 0.0
    without = run.reference(run.trainer, run.steps[-1].microbatches)  # type: ignore[misc]
    assert relative_error(run.steps[-1].gradients, without) > 1e-2


def test_five_lines_learn(tmp_path: Path) -> None:
    """The natural scale under SGD, in single precision: from a quarter of "a" to most of it."""

    def share_of_a(completions: list[str], **_: Any) -> list[float]:
        return [text.count("a") / 5 for text in completions]

    config = make_config(tmp_path, max_steps=25, learning_rate=5.0, per_device_train_batch_size=16)
    trainer = IsopoGRPOTrainer(
        model=make_model(dtype=torch.float32, as_it_comes=True),
        reward_funcs=share_of_a,
        args=config,
        train_dataset=make_prompts(64),
        processing_class=make_tokenizer(),
        transform=NTK(1.0, scale="natural"),
    )
    trainer.train()
    rewards = [line["reward"] for line in trainer.state.log_history if "reward" in line]
    assert sum(rewards[:5]) / 5 < 0.4
    assert sum(rewards[-5:]) / 5 > 0.7


# --- trl's, where ISOPO is REINFORCE ---------------------------------------------------------------------------------


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "dr_grpo", "bnpo", "cispo", "sapo", "vespo", "luspo"])
def test_large_damping_is_trls_own_gradient_and_metrics_are_trls(loss_type: str, tmp_path: Path) -> None:
    """c = |A| up to 1e-9: the gradient of the unchanged trainer, in every loss type, with its entropy bonus."""
    options: dict[str, Any] = {"loss_type": loss_type, "entropy_coef": 0.1, "top_entropy_quantile": 0.8}
    options |= {"epsilon_high": 5.0} if loss_type == "cispo" else {}
    options |= {"importance_sampling_level": "sequence"} if loss_type == "luspo" else {}
    config = make_config(tmp_path, gradient_accumulation_steps=2, num_iterations=2, max_steps=2, **options)
    ours = Run().of(make_model(), config, trainer_class=IsopoGRPOTrainer, transform=NTK(1e9))
    theirs = Run().of(make_model(), config, trainer_class=GRPOTrainer)
    for mine, other in zip(ours.steps, theirs.steps, strict=True):
        assert relative_error(mine.gradients, other.gradients) <= SINGLE
    for mine, other in zip(ours.trainer.state.log_history[:2], theirs.trainer.state.log_history[:2], strict=True):
        timed = {"step_time"}
        assert mine.keys() == other.keys()
        expected = {name: other[name] for name in other.keys() - timed}
        assert {name: mine[name] for name in expected} == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_an_adaptive_entropy_bonus_adapts_once_a_step(tmp_path: Path) -> None:
    """The controller of trl sees each microbatch once, though its loss is computed three times."""
    config = make_config(
        tmp_path,
        gradient_accumulation_steps=2,
        max_steps=3,
        use_adaptive_entropy=True,
        entropy_target=10.0,  # never reached: the coefficient grows by a delta a step
        entropy_coef=0.1,
        entropy_coef_delta=0.05,
    )
    ours = Run().of(make_model(), config, trainer_class=IsopoGRPOTrainer, transform=NTK(1e9))
    theirs = Run().of(make_model(), config, trainer_class=GRPOTrainer)
    for mine, other in zip(ours.steps, theirs.steps, strict=True):
        assert relative_error(mine.gradients, other.gradients) <= SINGLE
    coefficients = [[line["entropy_coef"] for line in run.trainer.state.log_history[:3]] for run in (ours, theirs)]
    assert coefficients[0] == coefficients[1] == pytest.approx([0.15, 0.2, 0.25])
