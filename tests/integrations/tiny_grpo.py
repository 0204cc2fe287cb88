"""A GRPO run small enough for references in float64: a random Llama or Qwen2, seven words, and a reward."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    TrainerCallback,
)
from trl import GRPOConfig

from isopo_mini.engine import NTK
from isopo_mini.integrations.trl import IsopoGRPOTrainer

WORDS = ["<pad>", "<eos>", "<unk>", "a", "b", "c", "d"]
EXACT = 1e-11  # a dozen layers in float64
SINGLE = 1e-6  # trl's own head, like the norms of transformers, computes in float32 whatever it is given
SIZES: dict[str, Any] = {
    "vocab_size": len(WORDS),
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": None,
    "initializer_range": 0.1,
}


def make_model(
    kind: str = "llama", tied: bool = False, dtype: torch.dtype = torch.float64, as_it_comes: bool = False
) -> Any:
    """A random model. Its norms are PyTorch's: those of transformers compute in float32 whatever they are given."""
    torch.manual_seed(1)
    if kind == "llama":
        model: Any = LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=tied))
    else:
        model = Qwen2ForCausalLM(Qwen2Config(**SIZES, tie_word_embeddings=tied))
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child).__name__.endswith("RMSNorm") and not as_it_comes:
                setattr(module, name, nn.RMSNorm(SIZES["hidden_size"], eps=1e-6))
    return model.to(dtype)


def make_tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", padding_side="left"
    )


def make_prompts(count: int = 16) -> Dataset:
    """Prompts of two to four words, so that there is padding on the left.

    Not one word: an answer of one word to it has a single query with a single key, so that its true gradient in the
    projections of queries and keys is zero, and a Fisher norm of rounding errors.
    """
    texts = [" ".join(WORDS[3 + (index + place) % 4] for place in range(2 + index % 3)) for index in range(count)]
    return Dataset.from_dict({"prompt": texts})


def reward(completions: list[str], **_: Any) -> list[float]:
    """More for every "a", less for every "b", and a little for length: rarely the same twice in a group."""
    return [text.count("a") - 0.7 * text.count("b") + 0.1 * len(text) for text in completions]


def make_config(folder: Path | str, **options: Any) -> GRPOConfig:
    defaults: dict[str, Any] = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 1,
        "num_generations": 4,
        "max_completion_length": 5,
        "max_steps": 1,
        "learning_rate": 0.05,
        "optim": "sgd",
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 1,
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
        "seed": 3,
    }
    return GRPOConfig(**{**defaults, **options})


def make_trainer(model: Any, config: Any, **options: Any) -> IsopoGRPOTrainer:
    """A trainer of the tiny model, not run yet."""
    return IsopoGRPOTrainer(
        model=model,
        reward_funcs=reward,
        args=config,
        train_dataset=make_prompts(),
        processing_class=make_tokenizer(),
        transform=NTK(0.5),
        **options,
    )


@dataclass
class Step:
    """What one optimizer step was made of, while the parameters were still those of its gradients."""

    microbatches: list[dict[str, Any]]
    gradients: dict[str, Tensor]
    expected: dict[str, Tensor]


class Watched(IsopoGRPOTrainer):
    """Notes every microbatch that trl computes a loss of."""

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        self.seen = [*getattr(self, "seen", []), inputs]
        return super()._compute_loss(model, inputs)


@dataclass
class Run:
    """A training, with the gradients of every step and what a reference says that they should be."""

    reference: Callable[[Any, list[dict[str, Any]]], dict[str, Tensor]] | None = None
    steps: list[Step] = field(default_factory=list)
    trainer: Any = None

    def of(self, model: Any, config: GRPOConfig, *, trainer_class: Any = Watched, **options: Any) -> "Run":
        options.setdefault("reward_funcs", reward)
        options.setdefault("train_dataset", make_prompts())
        if issubclass(trainer_class, IsopoGRPOTrainer):
            options.setdefault("transform", NTK(0.5))
        self.trainer = trainer_class(model=model, args=config, processing_class=make_tokenizer(), **options)
        run = self

        class Look(TrainerCallback):
            def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
                run._look()

        self.trainer.add_callback(Look())
        self.trainer.train()
        return self

    def _look(self) -> None:
        model = self.trainer.model
        found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        seen = getattr(self.trainer, "seen", [])
        expected = self.reference(self.trainer, seen) if self.reference else {}
        self.steps.append(Step(seen, found, expected))
        self.trainer.seen = []


def relative_error(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """‖found − expected‖/‖expected‖ of the largest error of any parameter, in units of that parameter's own norm."""
    assert found.keys() == expected.keys()
    largest = max(float(value.norm()) for value in expected.values())
    assert largest > 0
    return max(
        float((found[name] - value).norm()) / max(float(value.norm()), 1e-6 * largest)
        for name, value in expected.items()
    )


def check(run: Run, tolerance: float, steps: int) -> None:
    """Every step's gradient, parameter by parameter."""
    assert len(run.steps) == steps
    for step in run.steps:
        assert relative_error(step.gradients, step.expected) <= tolerance
