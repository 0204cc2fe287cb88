"""What trl does around the gradient: which sequences share a microbatch, loss scales, checkpoints, what is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("trl")

from by_sequences import Reference
from peft import LoraConfig
from tiny_grpo import EXACT, Run, Watched, check, make_config, make_model, make_prompts, make_trainer

from isopo_mini.engine import NTK, FisherNormalized

pytestmark = pytest.mark.filterwarnings("default")  # what trl and transformers say of each other is not ours

EACH_SCALE = pytest.mark.parametrize(
    "transform",
    [NTK(0.5), NTK(0.5, scale="natural"), FisherNormalized(), FisherNormalized(scale="natural")],
    ids=["NTK-gradient", "NTK-natural", "Fisher-norm", "Fisher-natural"],
)


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
