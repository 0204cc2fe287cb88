"""`nn.MultiheadAttention`: its projections are matrix products; the attention between them has no parameters.

PyTorch does all in one function, which wants the positions first. Here it is called with projections that change
nothing, between the ones that the engine makes: every option of masks and weights is then PyTorch's own.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from isopo_mini.engine.layer_functions import matrix_product
from isopo_mini.engine.stand_in import Copied, StandIn, register


@register(F.multi_head_attention_forward)
def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim_to_check: int,
    num_heads: int,
    in_proj_weight: Tensor | None,
    in_proj_bias: Tensor | None,
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    add_zero_attn: bool,
    dropout_p: float,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    **options: Any,
) -> Any:
    """Query `(T, S, E)`, key and value `(T', S, E)`, to `(T, S, E)` and the weights `(S, T, T')`."""
    if in_proj_weight is None or bias_k is not None or bias_v is not None or options.get("use_separate_proj_weight"):
        return NotImplemented
    if query.ndim != 3 or any(isinstance(each, (StandIn, Copied)) for each in (query, key, value)):
        return NotImplemented
    projected = {id(each): _by_sequence(each, in_proj_weight, in_proj_bias) for each in (query, key, value)}
    q, k, v = (projected[id(each)].chunk(3, dim=2)[part] for part, each in enumerate((query, key, value)))
    identity = torch.eye(embed_dim_to_check, dtype=q.dtype, device=q.device)
    attended, weights = F.multi_head_attention_forward(
        q,
        k,
        v,
        embed_dim_to_check,
        num_heads,
        identity.repeat(3, 1),
        None,
        None,
        None,
        add_zero_attn,
        dropout_p,
        identity,
        None,
        **options,
    )
    return _by_sequence(attended, out_proj_weight, out_proj_bias), weights


def _by_sequence(inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A linear layer of `(T, S, i)`, whose sequences are the second axis."""
    return matrix_product(inputs.transpose(0, 1), weight, bias).transpose(0, 1)
