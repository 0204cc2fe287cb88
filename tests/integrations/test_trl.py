"""trl's trainer with ISOPO's gradient: exact in float64, whatever trl does around it."""

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("trl")

from by_sequences import Reference
from peft import LoraConfig
from tiny_grpo import Run, Watched, make_config, make_model, make_prompts, make_tokenizer, relative_error, reward
from trl import GRPOTrainer

from isopo_mini.engine import NTK, FisherNormalized
from isopo_mini.integrations.trl import IsopoGRPOTrainer

pytestmark = pytest.mark.filterwarnings("default")  # what trl and transformers say of each other is not ours

EXACT = 1e-11  # a dozen layers in float64
SINGLE = 1e-6  # trl's own head, like the norms of transformers, computes in float32 whatever it is given
BOTH = pytest.mark.parametrize("transform", [NTK(0.5), FisherNormalized()], ids=["NTK", "Fisher"])
EACH_SCALE = pytest.mark.parametrize(
    "transform",
    [NTK(0.5), NTK(0.5, scale="natural"), FisherNormalized(), FisherNormalized(scale="natural")],
    ids=["NTK-gradient", "NTK-natural", "Fisher-norm", "Fisher-natural"],
)


def make_trainer(model: Any, config: Any, **options: Any) -> IsopoGRPOTrainer:
    return IsopoGRPOTrainer(
        model=model,
        reward_funcs=reward,
        args=config,
        train_dataset=make_prompts(),
        processing_class=make_tokenizer(),
        transform=NTK(0.5),
        **options,
    )


def check(run: Run, tolerance: float, steps: int) -> None:
    """Every step's gradient, parameter by parameter."""
    assert len(run.steps) == steps
    for step in run.steps:
        assert relative_error(step.gradients, step.expected) <= tolerance


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
    """The natural scale under SGD, in single precision: from a quarter of "a" to more than three quarters."""

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


# --- Which sequences share a microbatch ------------------------------------------------------------------------------


@pytest.mark.parametrize("microbatches", ["groups", "shuffled"])
def test_groups_stay_together_or_are_shuffled(microbatches: str, tmp_path: Path) -> None:
    config = make_config(tmp_path, per_device_train_batch_size=4, gradient_accumulation_steps=4)
    run = Run(Reference(NTK(0.5))).of(make_model(), config, microbatches=microbatches)
    (step,) = run.steps
    prompts = [{tuple(row.tolist()) for row in inputs["prompt_ids"]} for inputs in step.microbatches]
    assert all(len(of_one) == 1 for of_one in prompts) == (microbatches == "groups")
    assert len(set.union(*prompts)) == 4
    check(run, EXACT, steps=1)


# --- Around the gradient ---------------------------------------------------------------------------------------------


@EACH_SCALE
def test_a_loss_scale_changes_nothing(transform: Any, tmp_path: Path) -> None:
    """A GradScaler, as accelerate has one for float16: gradients are larger by its scale, the steps are the same.

    Of the loss type "grpo", whose weight is a power of two here: the scaler's scale is a number in float32.
    """
    config = make_config(tmp_path, gradient_accumulation_steps=2, max_steps=2, loss_type="grpo")

    class Scaled(Watched):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            self.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)

    run = Run(Reference(transform)).of(make_model(), config, trainer_class=Scaled, transform=transform)
    for step in run.steps:
        step.gradients = {name: value / 1024.0 for name, value in step.gradients.items()}
    check(run, EXACT, steps=2)


def test_autocast_keeps_the_direction(tmp_path: Path) -> None:
    """bfloat16 keeps 8 bits, through a dozen layers: a few percent of the gradient as a whole."""
    config = make_config(tmp_path, bf16=True)
    run = Run(Reference(NTK(0.5))).of(make_model(dtype=torch.float32), config, transform=NTK(0.5))
    (step,) = run.steps
    error = torch.cat([(step.gradients[name] - value).flatten() for name, value in step.expected.items()]).norm()
    assert error < 0.1 * torch.cat([value.flatten() for value in step.expected.values()]).norm()


def test_averages_are_saved_and_training_goes_on_from_them(tmp_path: Path) -> None:
    def config(**options: Any) -> Any:
        return make_config(tmp_path, max_steps=2, save_strategy="steps", save_steps=1, **options)

    whole = Run().of(make_model(), config())
    resumed = make_trainer(make_model(), config())
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert whole.trainer.isopo.state_dict()
    for name, value in whole.trainer.isopo.state_dict().items():
        torch.testing.assert_close(resumed.isopo.state_dict()[name], value)


def test_an_optimizer_of_the_users_own_ends_the_engines_steps(tmp_path: Path) -> None:
    model = make_model()
    own = torch.optim.SGD(model.parameters(), lr=0.01)
    config = make_config(tmp_path, max_steps=2)
    run = Run(Reference(NTK(0.5))).of(model, config, optimizers=(own, None))
    check(run, EXACT, steps=2)  # the second step has the averages of the first


def test_evaluation_is_trls(tmp_path: Path) -> None:
    run = Run().of(make_model(), make_config(tmp_path, per_device_eval_batch_size=4), eval_dataset=make_prompts(4))
    metrics = run.trainer.evaluate()
    assert torch.isfinite(torch.tensor(metrics["eval_loss"]))


def test_a_loss_outside_of_a_training_step_is_refused(tmp_path: Path) -> None:
    run = Run().of(make_model(), make_config(tmp_path))
    with pytest.raises(RuntimeError, match="expected to be called by training_step"):
        run.trainer.compute_loss(run.trainer.model, run.steps[0].microbatches[0])


@pytest.mark.parametrize("adapters", [None, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)])
def test_verify_says_whether_the_model_is_one_for_the_engine(adapters: Any, tmp_path: Path) -> None:
    trainer = make_trainer(make_model(as_it_comes=True), make_config(tmp_path), peft_config=adapters)
    errors = trainer.verify()
    assert errors.keys() == {name for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert max(errors.values()) < 1e-5
    # A model that mixes its sequences, after all of its layers, is found out.
    (last,) = [module for name, module in trainer.model.named_modules() if name.endswith("model.norm")]
    last.register_forward_hook(lambda module, inputs, output: output + output.mean(dim=0, keepdim=True))
    with pytest.raises(ValueError, match="expected autograd's gradient"):
        trainer.verify()


@pytest.mark.parametrize(
    ("options", "named", "message"),
    [
        ({"gradient_checkpointing_kwargs": {"use_reentrant": True}}, {}, "gradient_checkpointing_kwargs: .*re-enter"),
        ({"cast_lm_head_to_fp32": True}, {}, "cast_lm_head_to_fp32: .*switch it off"),
        ({"per_device_train_batch_size": 6, "num_generations": 4, "gradient_accumulation_steps": 2},
         {"microbatches": "groups"}, "microbatches: .*multiple of num_generations=4, got 6"),
        ({}, {"microbatches": "sorted"}, "microbatches: expected"),
    ],
)  # fmt: skip
def test_what_the_engine_cannot_follow_is_refused(
    options: dict[str, Any], named: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        Run().of(make_model(), make_config(tmp_path, **options), **named)
