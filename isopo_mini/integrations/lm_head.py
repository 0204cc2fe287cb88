"""trl's LM head in the open: the same log-probabilities, by functions that the engine can watch.

trl scores tokens in one `autograd.Function` that reads the head's weight and never forms the logits. The gradient of
that weight is then one sum over all tokens, in which no sequence can be told from another. The engine needs the two
factors of each sequence's gradient, and the left one, ∂ℓ/∂logits, has the logits' size. So a head that is trained goes
through logits; one that is frozen, as with LoRA, keeps trl's function and its memory.
"""

import functools
import types
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor
from trl.trainer.utils import FusedCausalLMOutput

from isopo_mini.engine.stand_in import StandIn
from isopo_mini.precision import at_least_float32

IGNORED = -100  # the label of a token that is not scored


def open_lm_head(model: Any, temperature: float) -> None:
    """Make the head that trl has added to `model` go through logits while an engine's block is open and watches it.

    Args:
        model: a causal language model after `trl.trainer.utils.add_fused_lm_head`.
        temperature: what trl divides the logits by.
    """
    fused = model.forward

    @functools.wraps(type(model).forward)  # `generate` reads the signature
    def forward(self: Any, *args: Any, fused_lm_head: bool = False, labels: Tensor | None = None, **kwargs: Any) -> Any:
        if not fused_lm_head or labels is None or not _is_watched(self.get_output_embeddings()):
            return fused(*args, fused_lm_head=fused_lm_head, labels=labels, **kwargs)
        positions = _first_scored_from_the_end(labels)
        outputs = fused(*args, **kwargs, use_cache=False, logits_to_keep=positions + 1)
        logits = at_least_float32(outputs.logits[:, -positions - 1 : -1]) / temperature  # each predicts the next token
        log_probs, entropies = scores_of(logits, labels[:, -positions:])
        missing = labels.shape[1] - 1 - positions
        return FusedCausalLMOutput(
            log_probs=F.pad(log_probs, (missing, 0)),
            entropy=F.pad(entropies, (missing, 0)),
            label_mask=labels[:, 1:] != IGNORED,
            aux_loss=getattr(outputs, "aux_loss", None),
        )

    model.forward = types.MethodType(forward, model)


def scores_of(
    logits: Float[Tensor, "S T V"], labels: Int[Tensor, "S T"]
) -> tuple[Float[Tensor, "S T"], Float[Tensor, "S T"]]:
    """log π of the labels, and the entropy, both zero where a label is ignored.

    The entropy is without gradient and in single precision, as trl's is: trl compares it with a quantile of itself.
    """
    scored: Bool[Tensor, "S T"] = labels != IGNORED
    normalizers = logits.logsumexp(dim=-1)
    log_probs = logits.gather(-1, labels.clamp(min=0)[..., None])[..., 0] - normalizers
    with torch.no_grad():
        entropies = normalizers - (logits * (logits - normalizers[..., None]).exp()).sum(dim=-1)
        entropies = entropies.float()
    return log_probs.masked_fill(~scored, 0.0), entropies.masked_fill(~scored, 0.0)


def _is_watched(head: Any) -> bool:
    """Does a stand-in keep the place of the head's weight or bias?"""
    return any(isinstance(getattr(head, name, None), StandIn) for name in ("weight", "bias"))


def _first_scored_from_the_end(labels: Int[Tensor, "S T"]) -> int:
    """How many positions from the end the first scored token is; at least one, so that the logits are never empty."""
    scored = (labels[:, 1:] != IGNORED).any(dim=0).nonzero()
    return labels.shape[1] - 1 - int(scored[0]) if len(scored) else 1
