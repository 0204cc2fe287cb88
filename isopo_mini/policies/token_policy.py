"""Policies whose actions are tokens: how they continue a prompt, with what they have read in memory or without."""

from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from isopo_mini import checks
from isopo_mini.policies.categorical import CategoricalPolicy
from isopo_mini.policies.sampling import Sampled, check_prompts, tempered_log_probs


@runtime_checkable
class Reader(Protocol):
    """A policy that reads rows of tokens, and may remember what it has read of them."""

    remembers: bool

    def read(self, tokens: Int[Tensor, "N t"], start: int) -> Float[Tensor, "N V"]:
        """Read tokens that stand at the places start, start + 1, …; what comes next has these logits.

        A reader that remembers has read all that stand before, and is not shown them again.
        """

    def repeat(self, copies: int) -> None:
        """From now on there are `copies` rows, one after the other, for every one so far. Asked of who remembers."""


class TokenPolicy(CategoricalPolicy):
    """A causal policy over a vocabulary: the observation is the tokens so far, the action is the next one.

    A subclass defines `logits`, `head_weight`, `new_reader`, and sets `context_length`, the most positions that it
    reads.
    """

    context_length: int

    @property
    def head_weight(self) -> Float[Tensor, "V D"]:
        """Of the output layer. Its first axis is the vocabulary, and its device the policy's."""
        raise NotImplementedError(f"{type(self).__name__} does not define head_weight")

    def new_reader(self, rows: int, length: int) -> Reader:
        """One that has read nothing yet, and will have read `length` tokens of each of the rows in the end."""
        raise NotImplementedError(f"{type(self).__name__} does not define new_reader(rows, length)")

    # no_grad and not inference_mode: what is sampled here is differentiated through later.
    @torch.no_grad()
    def sample(
        self,
        prompts: Int[Tensor, "N P"],
        max_new_tokens: int,
        prompt_lengths: Int[Tensor, "N"] | None = None,
        *,
        responses_per_prompt: int = 1,
        end_token: int | None = None,
        pad_token: int = 0,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
        use_cache: bool = True,
    ) -> Sampled:
        """Continue every prompt, one token at a time, until its end token or `max_new_tokens`.

        All rows advance together. While a row is still inside its prompt, its next token is the prompt's;
        after that it is drawn. The same generator gives the same tokens with and without the cache, unless a
        draw falls within rounding error of the border between two tokens.

        Args:
            prompts: tokens, int64 `(N, P)`, padded on the right.
            max_new_tokens: most tokens to draw in a row.
            prompt_lengths: length of each prompt, int64 `(N,)`, from 1 to P; P for all when None.
            responses_per_prompt: rows for every prompt, one after the other, so that S = N · this. With the cache, a
                prompt is read once, up to the length of the shortest of all, and not in every row.
            end_token: token that ends a row. It counts as an action. None: every row gets `max_new_tokens`.
            pad_token: token written after a row has ended.
            temperature: logits are divided by it; 0 takes the most probable token.
            generator: source of randomness, on the policy's device; torch's global one when None.
            use_cache: keep keys and values instead of computing those of all earlier tokens again.

        Returns:
            What a `Batch` needs, with T just long enough for the longest row. `log_probs` belong to the
            distribution that was drawn from, softmax(logits / temperature): at temperature 1 they equal
            `policy.log_prob(batch)`, at another temperature they do not; at 0 they are all 0.

        Raises:
            TypeError: prompts or lengths are no int64 tensors.
            ValueError: a shape, length, token or temperature is out of range, or the context is too short.
        """
        checks.require_at_least("max_new_tokens", max_new_tokens, 1)
        checks.require_at_least("responses_per_prompt", responses_per_prompt, 1)
        checks.require_at_least("temperature", temperature, 0)
        weight = self.head_weight
        lengths = check_prompts(prompts, prompt_lengths, len(weight), weight)
        for name, token in [("pad_token", pad_token), ("end_token", 0 if end_token is None else end_token)]:
            if not 0 <= token < len(weight):
                raise ValueError(f"{name}: expected a token from 0 to {len(weight) - 1}, got {token}")
        first, longest = int(lengths.min()), int(lengths.max())
        total = longest + max_new_tokens
        if total - 1 > self.context_length:  # the last token is never read
            raise ValueError(
                f"max_new_tokens: expected longest prompt + max_new_tokens - 1 <= context_length="
                f"{self.context_length}, got {longest} + {max_new_tokens} - 1"
            )
        inside = torch.arange(longest, device=weight.device) < lengths[:, None]
        tokens = torch.full((len(prompts), total), pad_token, device=weight.device)
        tokens[:, :longest] = prompts[:, :longest].where(inside, pad_token)
        tokens = tokens.repeat_interleave(responses_per_prompt, dim=0)  # (S, total)
        lengths = lengths.repeat_interleave(responses_per_prompt)
        mask = torch.zeros_like(tokens, dtype=torch.bool)
        log_probs = torch.zeros_like(tokens, dtype=torch.promote_types(weight.dtype, torch.float32))
        last = lengths + max_new_tokens  # where a row stops; its end token brings that forward
        reader = self.new_reader(len(prompts), total - 1) if use_cache else _Forgetful(self)
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


class _Forgetful:
    """Reads everything again for every token."""

    remembers = False

    def __init__(self, policy: TokenPolicy) -> None:
        self.policy = policy

    def read(self, tokens: Int[Tensor, "N t"], start: int) -> Float[Tensor, "N V"]:
        return self.policy.logits(tokens)[:, -1]

    def repeat(self, copies: int) -> None:
        """There is nothing to repeat."""
