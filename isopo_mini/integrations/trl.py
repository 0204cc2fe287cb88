"""`IsopoGRPOTrainer`: trl's `GRPOTrainer`, its objective and its metrics, with ISOPO's gradient in `.grad`.

    from isopo_mini.engine import NTK
    from isopo_mini.integrations.trl import IsopoGRPOTrainer

    trainer = IsopoGRPOTrainer(model=model, reward_funcs=reward, args=config, train_dataset=data, transform=NTK(1.0))
    trainer.train()

Every loss type of trl is a sum over the sequences of a microbatch, w · Σ_s |A_s| ℓ_s(sign A_s), with a weight w that
they share: 1 over the number of sequences, or of tokens, and of accumulated microbatches. What one sequence has of its
own is ℓ_s, its mean over tokens (`grpo`, `sapo`) or its sum (all others). So trl's loss is given the signs, for its
clip goes by them, and the engine gets |A|. With G_s = ∇ℓ_s, `.grad` holds w · Σ_s c_s G_s: trl's gradient if c = |A|.
To give the sign to the loss and not to the engine changes neither variant: K becomes DKD with D = diag(sign A), norms
stay as they are. A sequence with A = 0 counts as positive, so that its row of K is there.

KL, entropy bonus and the load balance of experts belong to no sequence's advantage. Where one is switched on, the rest
of trl's loss, which is the loss at A = 0, goes back in a pass of its own, before the engine's.
"""

import os
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from trl import GRPOTrainer
from trl.trainer import grpo_trainer

from isopo_mini import checks
from isopo_mini.engine import Isopo, Transform, verify
from isopo_mini.integrations.lm_head import open_lm_head

MICROBATCHES = ("shuffled", "groups")


class IsopoGRPOTrainer(GRPOTrainer):
    """trl's `GRPOTrainer` whose backward pass leaves ISOPO's gradient.

    Args:
        arguments: those of `GRPOTrainer`, by position or by name.
        transform: `NTK(…)`, `FisherNormalized(…)` or `LayerScaled()`. Its scale decides the optimizer.
            `NTK(scale="gradient")`, the default there, belongs under AdamW, trl's default. `FisherNormalized()` and
            `scale="natural"` are steps of a length of their own and belong under SGD: `GRPOConfig(optim="sgd",
            max_grad_norm=0.0, learning_rate=…)`; clipping by the norm would undo that length, and Adam the scale.
        microbatches: which sequences share a microbatch, and with it a Gram matrix. `"shuffled"`: as trl deals them, at
            random over the generation batch. `"groups"`: the answers to one prompt stay together, in the order in which
            they were generated; `per_device_train_batch_size` must then be a multiple of `num_generations`.
        isopo_options: further arguments of `Isopo`, such as `{"gram": "fast"}` for a step that costs little more
            than trl's own.
        options: see `arguments`.

    Raises:
        ValueError: an option of trl that the engine cannot follow (liger kernels, re-entrant checkpoints, DeepSpeed,
            FSDP, a trained head in float32), an unknown loss type, groups that do not fit a microbatch, or advantages
            that are not one a sequence.
        UnhandledParameterError: see `Isopo.microbatch`, whose errors about the model are raised here too.

    Each rank of `DistributedDataParallel` transforms its own microbatch; the gradients are averaged as always.
    With one of the terms of the module's last paragraph a microbatch costs two forward and two backward passes.
    Metrics and the loss that is logged are trl's own. The moving averages go into trl's checkpoints and come back.
    """

    def __init__(
        self,
        *arguments: Any,
        transform: Transform,
        microbatches: str = "shuffled",
        isopo_options: dict[str, Any] | None = None,
        **options: Any,
    ) -> None:
        checks.require_choice("microbatches", microbatches, MICROBATCHES)
        super().__init__(*arguments, **options)
        self.microbatches = microbatches
        self.isopo = Isopo(self.model, transform, **(isopo_options or {}))
        self._until_backward: ExitStack | None = None  # what the end of a training step closes
        self._scores: list[Any] = []  # what the model said in this training step, without its graph
        self._repeating = False
        self._stepping: Any = None  # the optimizer whose steps end the engine's
        self._refuse_what_the_engine_cannot_follow()
        base = self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model
        open_lm_head(base, self.temperature)

    # --- One microbatch ----------------------------------------------------------------------------------------------

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """trl's, which calls `compute_loss` and then goes back; the engine's block is open in between."""
        with ExitStack() as stack, _replaced(self, _until_backward=stack, _scores=[]):
            return super().training_step(model, inputs, num_items_in_batch)

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        """trl's loss, with another gradient; in evaluation trl's loss."""
        if not torch.is_grad_enabled():
            return super()._compute_loss(model, inputs)
        if self._until_backward is None:
            raise RuntimeError(
                "compute_loss: expected to be called by training_step, which closes the engine's block after the "
                "backward pass, got another caller; switch gradients off, or call training_step"
            )
        advantages = inputs["advantages"]
        checks.require_shape("advantages", advantages, "S")
        if self.beta != 0.0 or self._entropy_bonus_enabled or self.aux_loss_enabled:
            self._go_back_at_zero_advantages(model, inputs)
        given = advantages.abs().to(torch.promote_types(advantages.dtype, self.model.dtype))
        block = self.isopo.microbatch(given, self._attention_mask(inputs), loss_scale=self._shared_weight(inputs))
        self._until_backward.enter_context(block)
        signs = torch.ones_like(advantages).masked_fill(advantages < 0, -1.0)
        with _replaced(
            self, beta=0.0, _entropy_bonus_enabled=False, aux_loss_enabled=False, _metrics=_metrics_to_forget()
        ):
            loss = super()._compute_loss(model, {**inputs, "advantages": signs})
        # What trl would have said of the same log-probabilities: its metrics, and the value of its loss.
        with torch.no_grad(), _replaced(self, _repeating=True):
            value = super()._compute_loss(model, inputs)
        return loss + (value - loss.detach())

    def _go_back_at_zero_advantages(self, model: Any, inputs: dict[str, Any]) -> None:
        """The gradient of all terms that no advantage multiplies, added to `.grad`.

        What adapts the entropy bonus waits for the pass that counts. Ranks exchange their gradients after the engine's
        backward pass, which finds this one in `.grad`.
        """
        at_zero = {**inputs, "advantages": torch.zeros_like(inputs["advantages"])}
        adapting = {
            name: getattr(self, name) for name in ("entropy_coef", "_last_world_entropy", "_entropy_window_stats")
        }
        with self.accelerator.no_sync(model):
            with _replaced(self, _metrics=_metrics_to_forget(), **adapting):
                loss = super()._compute_loss(model, at_zero)
            self.accelerator.backward(loss)

    def _shared_weight(self, inputs: dict[str, Any]) -> float:
        """w of the module's docstring, which is what trl divides the sum over the sequences by."""
        sequences, accumulated = len(inputs["advantages"]), self.current_gradient_accumulation_steps
        if self.loss_type in ("grpo", "sapo", "luspo"):
            return 1 / (sequences * accumulated)
        if self.loss_type == "dr_grpo":
            return 1 / (sequences * self.max_completion_length * accumulated)
        if self.loss_type == "bnpo":
            tokens = float((inputs["completion_mask"] * inputs.get("tool_mask", 1)).sum())
            return 1 / (max(tokens, 1.0) * accumulated)
        if self.loss_type in ("cispo", "dapo", "vespo"):
            tokens = max(float(inputs["num_items_in_batch"]), 1.0) * accumulated / self.args.steps_per_generation
            return self.accelerator.num_processes / tokens
        raise ValueError(
            f"loss_type: expected one whose weight over the sequences is known, got '{self.loss_type}'; choose "
            f"'grpo', 'dapo', 'dr_grpo', 'bnpo', 'cispo', 'sapo', 'vespo' or 'luspo'"
        )

    @staticmethod
    def _attention_mask(inputs: dict[str, Any]) -> Tensor:
        """The positions that are not padding, `(S, T)`."""
        return torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1).bool()

    def _get_per_token_logps_and_entropies(self, *arguments: Any, **options: Any) -> Any:
        """trl's. The first answer of a training step is kept for the pass that only computes values."""
        if self._repeating:
            return self._scores[0]
        scores = super()._get_per_token_logps_and_entropies(*arguments, **options)
        if torch.is_grad_enabled():
            self._scores.append(tuple(None if score is None else score.detach() for score in scores))
        return scores

    def verify(self, num_sequences: int = 4, length: int = 8) -> dict[str, float]:
        """Does the engine get this model right? `engine.verify`, on random tokens, scored as in training.

        Half of the tokens are the prompt, the first sequence's begins with padding. Run it once, before `train`.

        Args:
            num_sequences: S, at least 2.
            length: of every sequence, in tokens, at least 4.

        Returns:
            The relative error of every parameter's gradient.

        Raises:
            ValueError: engine and autograd differ; the error says for which parameters and by how much.
            UnhandledParameterError: a parameter is used in a way that no handler covers.
        """
        checks.require_at_least("length", length, 4)
        generator = torch.Generator().manual_seed(0)
        vocabulary = self.model.config.get_text_config().vocab_size
        tokens = torch.randint(vocabulary, (num_sequences, length), generator=generator).to(self.accelerator.device)
        attention = torch.ones_like(tokens)
        attention[0, : length // 4] = 0

        def log_probs(count: int) -> Tensor:
            model, kept = self.model, length - length // 2
            return super(IsopoGRPOTrainer, self)._get_per_token_logps_and_entropies(
                model, tokens[:count], attention[:count], kept
            )[0]

        return verify(self.model, log_probs, num_sequences)

    # --- The training around it --------------------------------------------------------------------------------------

    def _prepare_inputs(self, generation_batch: Any) -> dict[str, Any]:
        """trl's, which shuffles what it has generated; here only if `microbatches` says so."""
        if self.microbatches == "shuffled":
            return super()._prepare_inputs(generation_batch)
        with _replaced(grpo_trainer, shuffle_sequence_dict=lambda sequences: sequences):
            return super()._prepare_inputs(generation_batch)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """trl's; every step that it takes, and no step that a loss scaler skips, ends the engine's step."""
        optimizer = super().create_optimizer(model)
        if self._stepping is not optimizer:
            self._stepping = optimizer
            optimizer.register_step_post_hook(lambda *_: self.isopo.end_step())
        return optimizer

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """trl's, and this rank's moving averages beside it."""
        super()._save_optimizer_and_scheduler(output_dir)
        os.makedirs(output_dir, exist_ok=True)
        save_file(self.isopo.state_dict(), self._averages_file(output_dir))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """trl's, and this rank's moving averages if they were saved."""
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and os.path.exists(self._averages_file(checkpoint)):
            self.isopo.load_state_dict(load_file(self._averages_file(checkpoint)))

    def _averages_file(self, folder: str) -> str:
        return os.path.join(folder, f"isopo_{self.accelerator.process_index}.safetensors")

    def _refuse_what_the_engine_cannot_follow(self) -> None:
        """Options that would be an error in the first backward pass, or a step of another kind, are one here."""
        head = self.model.get_output_embeddings()
        trained_head = head is not None and any(parameter.requires_grad for parameter in head.parameters())
        checkpointing = (self.args.gradient_checkpointing and self.args.gradient_checkpointing_kwargs) or {}
        of_a_group = self.args.per_device_train_batch_size % self.num_generations
        for refused, option, advice in (
            (self.args.use_liger_kernel, "use_liger_kernel", "its kernels hide the parameters; switch it off"),
            (
                checkpointing.get("use_reentrant"),
                "gradient_checkpointing_kwargs",
                "a checkpoint must not re-enter the backward pass; set {'use_reentrant': False}",
            ),
            (
                self.args.cast_lm_head_to_fp32 and trained_head,
                "cast_lm_head_to_fp32",
                "a trained head is used in its own precision; switch it off",
            ),
            (self.is_deepspeed_enabled, "deepspeed", "its gradients do not go through autograd; use DDP"),
            (self.is_fsdp_enabled, "fsdp", "the parameters of a rank are parts of them; use DDP"),
            (
                self.microbatches == "groups" and of_a_group,
                "microbatches",
                f"whole groups need per_device_train_batch_size to be a multiple of num_generations="
                f"{self.num_generations}, got {self.args.per_device_train_batch_size}",
            ),
        ):
            if refused:
                raise ValueError(f"{option}: {advice}")


def _metrics_to_forget() -> dict[str, Any]:
    """Where a pass of trl's loss leaves its metrics if they are not trl's."""
    return {"train": defaultdict(list), "eval": defaultdict(list)}


@contextmanager
def _replaced(owner: Any, **values: Any) -> Iterator[None]:
    """Other values for some attributes inside the `with` block, and the former ones after it."""
    former = {name: getattr(owner, name) for name in values}
    try:
        for name, value in values.items():
            setattr(owner, name, value)
        yield
    finally:
        for name, value in former.items():
            setattr(owner, name, value)
