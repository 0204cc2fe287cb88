"""A causal decoder as policy: the observation is the tokens read so far, the action is the next token.

One file, read top to bottom: attention, block, model, then sampling with a key-value cache. It is GPT-2 with
two things left out. There is no dropout, because log π must be one number for importance ratios and scores
to mean anything. There is no attention mask: sequences are padded on the right, a position only looks left,
so no real position ever sees padding.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from isopo_mini import checks
from isopo_mini.policies.token_policy import Reader, TokenPolicy


class Attention(nn.Module):
    """Causal multi-head self-attention: softmax(QKᵀ/√d) V, where position t sees positions ≤ t."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.output = nn.Linear(width, width)

    def forward(self, x: Float[Tensor, "S T D"], cache: Tensor | None = None, start: int = 0) -> Tensor:
        """`(S, T, D)`. With a cache `(2, S, H, C, d)`, x begins at position `start`; the rest is cached."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # each (S, H, T, d)
        if cache is not None:
            end = start + x.shape[1]
            cache[0, :, :, start:end], cache[1, :, :, start:end] = k, v
            k, v = cache[:, :, :, :end].to(q.dtype)  # the dtype differs only under autocast
        # A single query is the newest position and sees all keys; is_causal would show it the first key only.
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=q.shape[2] > 1)
        return self.output(mixed.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)): normalising first keeps the residual path clean."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Float[Tensor, "S T D"], cache: Tensor | None = None, start: int = 0) -> Tensor:
        x = x + self.attention(self.attention_norm(x), cache, start)
        return x + self.mlp(self.mlp_norm(x))


class CausalTransformer(TokenPolicy):
    """A pre-norm causal decoder with learned positions, initialised like GPT-2.

    It has layers·(12D² + 13D) + (V + C)·D + 2D parameters, and V·D more when the head is not tied.

    Args:
        vocabulary_size: number of tokens V, which are the actions.
        context_length: most positions C the policy can read.
        width: size D of the residual stream.
        layers: number of blocks.
        heads: attention heads; must divide `width`.
        tied_head: the head and the token embedding are one parameter.
        generator: source of the initial weights; torch's global one when None.

    Raises:
        ValueError: a size is below 1, or `heads` does not divide `width`.

    Note:
        On a CPU, `scaled_dot_product_attention` picks a fused kernel that knows neither `torch.func.vmap` nor
        forward-mode derivatives. Inside `torch.nn.attention.sdpa_kernel(SDPBackend.MATH)` both work.
    """

    def __init__(
        self,
        vocabulary_size: int,
        context_length: int,
        width: int = 64,
        layers: int = 2,
        heads: int = 4,
        tied_head: bool = False,
        *,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        sizes = {"vocabulary_size": vocabulary_size, "context_length": context_length}
        for name, size in dict(sizes, width=width, layers=layers, heads=heads).items():
            checks.require_at_least(name, size, 1)
        if width % heads:
            raise ValueError(f"heads: expected a divisor of width={width}, got {heads}")
        self.vocabulary_size, self.context_length = vocabulary_size, context_length
        self.width, self.heads = width, heads
        self.token_embedding = nn.Embedding(vocabulary_size, width)
        self.position_embedding = nn.Embedding(context_length, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.final_norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary_size, bias=False)
        if tied_head:
            self.head.weight = self.token_embedding.weight
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif "norm" not in name:
                # 2·layers branches add up on the residual path: scaled so that the sum is as large as one.
                ends_branch = name.endswith(("attention.output.weight", "mlp.2.weight"))
                std = 0.02 / (2 * layers) ** 0.5 if ends_branch else 0.02
                nn.init.normal_(parameter, std=std, generator=generator)

    def logits(self, observations: Int[Tensor, "S T"]) -> Float[Tensor, "S T V"]:
        """Unnormalised log-probabilities of the token after each position.

        Args:
            observations: tokens, int64 `(S, T)`, padded on the right with any token; T ≤ `context_length`.

        Returns:
            `(S, T, V)`. Position t depends on `observations[:, : t + 1]` only.

        Raises:
            TypeError: the observations are no int64 tensor.
            ValueError: they are not `(S, T)`, empty, or longer than the context.
        """
        sizes = checks.require_shape("observations", observations, "S T")
        checks.require_integer("observations", observations)
        checks.require_not_empty("observations", observations)
        if (length := sizes["T"]) > self.context_length:
            raise ValueError(f"observations: expected T <= context_length={self.context_length}, got T={length}")
        return self.head(self._hidden(observations))

    def _hidden(self, tokens: Tensor, cache: Tensor | None = None, start: int = 0) -> Tensor:
        """The normalised residual stream (S, T, D) at positions start, start + 1, …"""
        positions = torch.arange(start, start + tokens.shape[1], device=tokens.device)
        # Expanded to (S, T) although (T,) would broadcast: per-sequence gradients are read off a layer's
        # input and output, so the input of every layer needs the sequence axis first.
        x = self.token_embedding(tokens) + self.position_embedding(positions.expand(tokens.shape))
        for index, block in enumerate(self.blocks):
            x = block(x, None if cache is None else cache[index], start)
        return self.final_norm(x)

    @property
    def head_weight(self) -> Float[Tensor, "V D"]:
        """See `TokenPolicy`."""
        return self.head.weight

    def new_reader(self, rows: int, length: int) -> Reader:
        """See `TokenPolicy`."""
        return _Cached(self, rows, length)


class _Cached:
    """Keeps keys and values, `(layers, 2, N, H, C, d)`. See `token_policy.Reader`."""

    remembers = True

    def __init__(self, policy: CausalTransformer, rows: int, length: int) -> None:
        self.policy = policy
        weight = policy.head.weight
        shape = (len(policy.blocks), 2, rows, policy.heads, length, policy.width // policy.heads)
        self.cache = torch.empty(shape, device=weight.device, dtype=weight.dtype)

    def read(self, tokens: Int[Tensor, "N t"], start: int) -> Float[Tensor, "N V"]:
        return self.policy.head(self.policy._hidden(tokens, self.cache, start)[:, -1])

    def repeat(self, copies: int) -> None:
        self.cache = self.cache.repeat_interleave(copies, dim=2)
