"""What sampling tokens needs beside the model: the loop, the record it returns, its checks, the temperature."""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from isopo_mini import checks
from isopo_mini.batch import Batch
from isopo_mini.precision import at_least_float32


@dataclass(frozen=True, eq=False)
class Sampled:
    """What `CausalTransformer.sample` drew: all of a `Batch` but the rewards.

    Row s holds prompt, response, padding. `actions[s, t]` is the token that follows `observations[s, t]`.
    `mask` is True where it belongs to the response, the end token included; `log_probs` is 0 elsewhere.
    """

    observations: Int[Tensor, "S T"]
    actions: Int[Tensor, "S T"]
    mask: Bool[Tensor, "S T"]
    log_probs: Float[Tensor, "S T"]

    def responses(self) -> list[Tensor]:
        """The drawn tokens of each row, without prompt and padding, the end token included."""
        return [actions[mask] for actions, mask in zip(self.actions, self.mask, strict=True)]

    def with_rewards(self, rewards: Tensor, groups: Tensor | None = None) -> Batch:
        """The `Batch` of these sequences and their rewards, `(S,)` or `(S, T)`."""
        return Batch(self.observations, self.actions, self.mask, rewards, self.log_probs, groups)


@runtime_checkable
class Reader(Protocol):
    """A model that reads rows of tokens, and may remember what it has read of them."""

    remembers: bool

    def read(self, tokens: Int[Tensor, "N t"], start: int) -> Float[Tensor, "N V"]:
        """Read tokens that stand at the places start, start + 1, …; what comes next has these logits.

        A reader that remembers has read all that stand before, and is not shown them again.
        """

    def repeat(self, copies: int) -> None:
        """From now on there are `copies` rows, one after the other, for every one so far. Asked of who remembers."""


# no_grad and not inference_mode: what is sampled here is differentiated through later.
@torch.no_grad()
def continue_prompts(
    reader: Reader,
    prompts: Int[Tensor, "N P"],
    lengths: Int[Tensor, "N"],
    max_new_tokens: int,
    *,
    responses_per_prompt: int,
    end_token: int | None,
    pad_token: int,
    temperature: float,
    dtype: torch.dtype,
    generator: torch.Generator | None,
) -> Sampled:
    """Continue every prompt, one token at a time: see `CausalTransformer.sample`, whose arguments these are.

    All rows advance together. While a row is still inside its prompt, its next token is the prompt's; after that it
    is drawn. By a reader that remembers, a prompt is read once, up to the length of the shortest of all, and not in
    every row.

    Args:
        reader: has read nothing yet.
        lengths: of the prompts, as `check_prompts` returns them.
        dtype: of the log-probabilities.
    """
    first, longest = int(lengths.min()), int(lengths.max())
    total = longest + max_new_tokens
    inside = torch.arange(longest, device=prompts.device) < lengths[:, None]
    tokens = torch.full((len(prompts), total), pad_token, device=prompts.device)
    tokens[:, :longest] = prompts[:, :longest].where(inside, pad_token)
    tokens = tokens.repeat_interleave(responses_per_prompt, dim=0)  # (S, total)
    lengths = lengths.repeat_interleave(responses_per_prompt)
    mask = torch.zeros_like(tokens, dtype=torch.bool)
    log_probs = torch.zeros_like(tokens, dtype=dtype)
    last = lengths + max_new_tokens  # where a row stops; its end token brings that forward
    for position in range(first, total):
        # Who remembers reads first the part that lies inside every prompt, then one token at a time.
        start = 0 if position == first or not reader.remembers else position - 1
        copies = responses_per_prompt if position == first and reader.remembers else 1
        logits = reader.read(tokens[::copies, start:position], start)  # (S, V)
        if copies > 1:  # every row goes its own way from here
            logits = logits.repeat_interleave(copies, dim=0)
            reader.repeat(copies)
        all_log_probs = tempered_log_probs(logits, temperature)
        drawn = torch.multinomial(all_log_probs.exp(), 1, generator=generator)  # (S, 1)
        acting = (lengths <= position) & (position < last)
        mask[:, position] = acting
        tokens[:, position] = torch.where(acting, drawn[:, 0], tokens[:, position])
        log_probs[:, position] = all_log_probs.gather(1, drawn)[:, 0].where(acting, 0.0)
        if end_token is not None:
            last = torch.where(acting & (drawn[:, 0] == end_token), position + 1, last)
            if bool((last <= position + 1).all()):
                break
    end = position + 1
    return Sampled(tokens[:, : end - 1], tokens[:, 1:end], mask[:, 1:end], log_probs[:, 1:end])


def check_options(
    max_new_tokens: int, responses_per_prompt: int, temperature: float, **tokens: tuple[int, int]
) -> None:
    """Check what `sample` of a policy is given beside prompts.

    Args:
        max_new_tokens: at least 1.
        responses_per_prompt: at least 1.
        temperature: at least 0.
        **tokens: a token and the size of its vocabulary, by name.
    """
    checks.require_at_least("max_new_tokens", max_new_tokens, 1)
    checks.require_at_least("responses_per_prompt", responses_per_prompt, 1)
    checks.require_at_least("temperature", temperature, 0)
    for name, (token, size) in tokens.items():
        if not 0 <= token < size:
            raise ValueError(f"{name}: expected a token from 0 to {size - 1}, got {token}")


def tempered_log_probs(logits: Float[Tensor, "... A"], temperature: float) -> Float[Tensor, "... A"]:
    """log softmax(logits / temperature); at temperature 0 its limit, all mass on the largest logit.

    Returns:
        `(..., A)`, in at least single precision.

    Raises:
        ValueError: the temperature is negative or not finite.
    """
    checks.require_at_least("temperature", temperature, 0)
    logits = at_least_float32(logits)
    if temperature == 0:
        return torch.zeros_like(logits).scatter(-1, logits.argmax(-1, keepdim=True), 1.0).log()
    # Measured from the largest, so that a division by a tiny temperature overflows to −∞ only.
    return ((logits - logits.amax(dim=-1, keepdim=True)) / temperature).log_softmax(dim=-1)


def check_prompts(
    prompts: Tensor, prompt_lengths: Tensor | None, vocabulary_size: int, weight: Tensor
) -> Int[Tensor, "S"]:
    """Check prompts `(S, P)` for a policy with this vocabulary, on the device of `weight`.

    Returns:
        The prompt lengths `(S,)`: those given, or P for all.

    Raises:
        TypeError: prompts or lengths are no int64 tensors.
        ValueError: a shape, device, length or token is wrong. What lies behind a prompt is not looked at.
    """
    sizes = checks.require_shape("prompts", prompts, "S P")
    checks.require_integer("prompts", prompts)
    checks.require_not_empty("prompts", prompts)
    checks.require_same_device("prompts", prompts, "the policy", weight)
    lengths = torch.full_like(prompts[:, 0], sizes["P"]) if prompt_lengths is None else prompt_lengths
    checks.require_shape("prompt_lengths", lengths, "S", sizes)
    checks.require_integer("prompt_lengths", lengths)
    checks.require_same_device("prompt_lengths", lengths, "the policy", weight)
    if lengths.min() < 1 or lengths.max() > sizes["P"]:
        raise ValueError(f"prompt_lengths: expected 1 to P={sizes['P']}, got {lengths.tolist()}")
    tokens = prompts[torch.arange(sizes["P"], device=prompts.device) < lengths[:, None]]
    if tokens.min() < 0 or tokens.max() >= vocabulary_size:
        raise ValueError(
            f"prompts: expected tokens from 0 to {vocabulary_size - 1}, "
            f"got values from {int(tokens.min())} to {int(tokens.max())}"
        )
    return lengths
