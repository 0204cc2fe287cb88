"""Models that nobody here wrote, with two tiny layers: made from configuration classes, nothing is downloaded."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import peft
import torch
import torch.nn as nn
import transformers
from torch import Tensor
from torch.overrides import TorchFunctionMode

S, T, WORDS = 4, 6, 37
PADDING = (0, 2, 0, 1)  # positions on the left of each sequence
IMAGE = 8


@dataclass(frozen=True)
class Architecture:
    """A configuration class and what it is told beside the size.

    Args:
        config: its name in `transformers`.
        model: the class of the model, by name; the causal language model of the configuration by default.
        options: further options of the configuration.
        kind: what the model reads, a key of `OBJECTIVES`.
        size: replaces the options that say how large the model is.
        adapted: the layers that get a low-rank update of `peft`, all else being frozen; none by default.
    """

    config: str
    options: dict[str, Any]
    kind: str = "causal"
    model: str = "AutoModelForCausalLM"
    size: dict[str, Any] | None = None
    adapted: tuple[str, ...] = ()


SIZE: dict[str, Any] = {
    "vocab_size": WORDS,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
SIZE_OF_GPT2 = {
    "vocab_size": WORDS,
    "n_embd": 16,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 32,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}

ARCHITECTURES: dict[str, Architecture] = {
    "Llama": Architecture("LlamaConfig", {}),
    "Qwen2": Architecture("Qwen2Config", {}),
    "Qwen3": Architecture("Qwen3Config", {"head_dim": 4}),
    "Mistral": Architecture("MistralConfig", {}),
    "Ministral": Architecture("MinistralConfig", {"head_dim": 4}),
    "Phi": Architecture("PhiConfig", {}),
    "Phi3": Architecture("Phi3Config", {}),
    "GPTNeoX": Architecture("GPTNeoXConfig", {}),
    "OLMo": Architecture("OlmoConfig", {}),
    "OLMo2": Architecture("Olmo2Config", {}),
    "SmolLM3": Architecture("SmolLM3Config", {}),
    "Granite": Architecture("GraniteConfig", {}),
    "GLM": Architecture("GlmConfig", {"head_dim": 4}),
    "Helium": Architecture("HeliumConfig", {"head_dim": 4}),
    "Starcoder2": Architecture("Starcoder2Config", {}),
    "StableLM": Architecture("StableLmConfig", {}),
    "Cohere": Architecture("CohereConfig", {"use_qk_norm": True}),
    "Cohere2": Architecture("Cohere2Config", {}),
    "Gemma": Architecture("GemmaConfig", {"head_dim": 4}),
    "Gemma2": Architecture("Gemma2Config", {"head_dim": 4}),
    "Gemma3": Architecture("Gemma3TextConfig", {"head_dim": 4}),
    "Nemotron": Architecture("NemotronConfig", {}),
    "Bloom": Architecture("BloomConfig", {"n_layer": 2, "n_head": 4}),
    "Falcon": Architecture("FalconConfig", {}),
    "OPT": Architecture("OPTConfig", {"ffn_dim": 24, "word_embed_proj_dim": 16}),
    "GPT2": Architecture("GPT2Config", {}, size=SIZE_OF_GPT2),
    "GPTNeo": Architecture(
        "GPTNeoConfig",
        {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]], "window_size": 4},
    ),
    "GPTJ": Architecture("GPTJConfig", {"rotary_dim": 4}, size=SIZE_OF_GPT2),
    "CodeGen": Architecture("CodeGenConfig", {"rotary_dim": 4}, size=SIZE_OF_GPT2),
    "GPTBigCode": Architecture("GPTBigCodeConfig", {}, size=SIZE_OF_GPT2),
    "MPT": Architecture(
        "MptConfig", {}, size={"vocab_size": WORDS, "d_model": 16, "n_layers": 2, "n_heads": 4, "max_seq_len": 32}
    ),
    "Mixtral": Architecture("MixtralConfig", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "Qwen2-MoE": Architecture("Qwen2MoeConfig", dict(shared_expert_intermediate_size=16, **EXPERTS)),
    "Qwen3-MoE": Architecture("Qwen3MoeConfig", dict(head_dim=4, **EXPERTS)),
    "OLMoE": Architecture("OlmoeConfig", {"num_experts": 4, "num_experts_per_tok": 2}),
    "Mamba": Architecture("MambaConfig", {"state_size": 4, "time_step_rank": 4}),
    "Mamba2": Architecture(
        "Mamba2Config", {"num_heads": 4, "head_dim": 8, "state_size": 4, "n_groups": 1, "chunk_size": 8}
    ),
    "RWKV": Architecture("RwkvConfig", {"attention_hidden_size": 16, "context_length": 32}),
    "BERT": Architecture("BertConfig", {}, "masked", "BertForMaskedLM"),
    "RoBERTa": Architecture("RobertaConfig", {}, "masked", "RobertaForMaskedLM"),
    "DistilBERT": Architecture(
        "DistilBertConfig",
        {},
        "masked",
        "DistilBertForMaskedLM",
        {"vocab_size": WORDS, "dim": 16, "hidden_dim": 24, "n_layers": 2, "n_heads": 4, "max_position_embeddings": 32},
    ),
    "ViT": Architecture(
        "ViTConfig", {"image_size": IMAGE, "patch_size": 4, "num_labels": WORDS}, "image", "ViTForImageClassification"
    ),
    "T5": Architecture(
        "T5Config",
        {},
        "pairs",
        "T5ForConditionalGeneration",
        {
            "vocab_size": WORDS,
            "d_model": 16,
            "d_kv": 4,
            "d_ff": 24,
            "num_layers": 2,
            "num_heads": 4,
            "decoder_start_token_id": 0,
        },
    ),
    "BART": Architecture(
        "BartConfig",
        {},
        "pairs",
        "BartForConditionalGeneration",
        {
            "vocab_size": WORDS,
            "d_model": 16,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 24,
            "decoder_ffn_dim": 24,
            "max_position_embeddings": 32,
            "decoder_start_token_id": 0,
            "forced_eos_token_id": None,
            "pad_token_id": 0,
            "bos_token_id": 0,
            "eos_token_id": 1,
        },
    ),
    "Llama, LoRA": Architecture("LlamaConfig", {}, adapted=("q_proj", "v_proj", "down_proj", "lm_head")),
    "Gemma2, LoRA": Architecture("Gemma2Config", {"head_dim": 4}, adapted=("q_proj", "o_proj", "embed_tokens")),
    "GPT2, LoRA": Architecture("GPT2Config", {}, size=SIZE_OF_GPT2, adapted=("c_attn", "c_proj")),
}


class DoublePrecision(TorchFunctionMode):
    """What a model does in single precision by hand, norms and softmaxes, it does in double: all digits count here."""

    def __torch_function__(self, func: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Called by PyTorch in place of every function."""
        if func is Tensor.float:
            func = Tensor.double
        double = [torch.float64 if leaf is torch.float32 else leaf for leaf in args]
        kwargs = {key: torch.float64 if leaf is torch.float32 else leaf for key, leaf in (kwargs or {}).items()}
        return func(*double, **kwargs)


def build(name: str, *, tied: bool = False, checkpointing: bool = False) -> nn.Module:
    """The model in double precision, without dropout. Every parameter has another random value, gains and biases too.

    Raises:
        ValueError: the architecture has no gradient checkpointing.
    """
    architecture = ARCHITECTURES[name]
    torch.manual_seed(1)
    size = SIZE if architecture.size is None else architecture.size
    options = {**size, **architecture.options, "tie_word_embeddings": tied}
    config = getattr(transformers, architecture.config)(**options)
    for key, value in vars(config).items():
        if "drop" in key and isinstance(value, float):
            setattr(config, key, 0.0)
    config._attn_implementation = "eager"
    config._experts_implementation = "eager"
    if architecture.model.startswith("Auto"):
        model = getattr(transformers, architecture.model).from_config(config)
    else:
        model = getattr(transformers, architecture.model)(config)
    if architecture.adapted:
        lora = peft.LoraConfig(r=2, target_modules=list(architecture.adapted), fan_in_fan_out="n_embd" in size)
        model = peft.get_peft_model(model, lora)
    model = model.double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    if checkpointing:
        model.gradient_checkpointing_enable(
            gradient_checkpointing_kwargs={"use_reentrant": False, "context_fn": _recomputed_in_double}
        )
        model.train()  # without dropout, all that it changes is that the layers recompute
    return model


def _recomputed_in_double() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """Backpropagation leaves the modes that were on: what is recomputed has to be told again."""
    return nullcontext(), DoublePrecision()


# --- What is differentiated: log π of some sequences of a fixed batch -----------------------------------------------


def _tokens(seed: int = 2) -> Tensor:
    return torch.randint(2, WORDS, (S, T), generator=torch.Generator().manual_seed(seed))


def _chosen(logits: Tensor, targets: Tensor, mask: Tensor) -> Tensor:
    """Σ_t m_t log π(target_t), one a sequence."""
    log_probs = logits.log_softmax(-1).gather(-1, targets[..., None])[..., 0]
    return log_probs.masked_fill(~mask, 0.0).sum(dim=-1)


def _mask(padded: bool) -> Tensor:
    padding = torch.tensor(PADDING if padded else (0,) * S)
    return torch.arange(T)[None] >= padding[:, None]


def _causal(model: nn.Module, rows: slice, padded: bool) -> Tensor:
    tokens, mask = _tokens()[rows], _mask(padded)[rows]
    given = {"attention_mask": mask.long()} if padded else {}
    logits = model(input_ids=tokens.masked_fill(~mask, 0), use_cache=False, **given).logits
    return _chosen(logits[:, :-1], tokens[:, 1:], mask[:, :-1])


def _masked(model: nn.Module, rows: slice, padded: bool) -> Tensor:
    tokens, mask = _tokens()[rows], _mask(padded)[rows]
    logits = model(input_ids=tokens.masked_fill(~mask, 0), attention_mask=mask.long()).logits
    return _chosen(logits, _tokens(3)[rows], mask)


def _image(model: nn.Module, rows: slice, padded: bool) -> Tensor:
    pixels = torch.randn(S, 3, IMAGE, IMAGE, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    logits = model(pixel_values=pixels[rows]).logits
    return _chosen(logits[:, None], _tokens()[rows, :1], torch.ones(1, 1, dtype=torch.bool))


def _pairs(model: nn.Module, rows: slice, padded: bool) -> Tensor:
    tokens, mask, targets = _tokens()[rows], _mask(padded)[rows], _tokens(3)[rows]
    logits = model(
        input_ids=tokens.masked_fill(~mask, 0), attention_mask=mask.long(), decoder_input_ids=targets, use_cache=False
    ).logits
    return _chosen(logits[:, :-1], targets[:, 1:], torch.ones_like(targets[:, 1:], dtype=torch.bool))


OBJECTIVES: dict[str, Callable[[nn.Module, slice, bool], Tensor]] = {
    "causal": _causal,
    "masked": _masked,
    "image": _image,
    "pairs": _pairs,
}


def log_probs(name: str, model: nn.Module, rows: slice, padded: bool = False) -> Tensor:
    """log π of the chosen sequences, one each."""
    return OBJECTIVES[ARCHITECTURES[name].kind](model, rows, padded)
