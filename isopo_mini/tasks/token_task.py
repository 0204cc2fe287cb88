"""`TokenTask`: prompts with one right answer, which a policy writes token by token. `tasks.tokens` has the tasks.

All tasks share one vocabulary, one token a character, so that a policy may move from one task to another:

    token   character    meaning
    0       _            padding: what stands after the end
    1       .            end of the response; it is an action, and part of the answer
    2-11    0123456789   digits
    12-13   +*           plus and times
    14      =            the end of every prompt
    15-18   ()[]         brackets

A response is right when it is the answer and then the end token. All prompts of a task have one length.
Numbers in answers are written *least significant digit first*, in the order in which carries arise.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from isopo_mini import checks
from isopo_mini.batch import Batch
from isopo_mini.policies.transformer import CausalTransformer

VOCABULARY = "_.0123456789+*=()[]"
PAD, END, ZERO, PLUS, TIMES, EQUALS = (VOCABULARY.index(character) for character in "_.0+*=")
DIGITS = tuple(range(ZERO, ZERO + 10))
BRACKETS = tuple(VOCABULARY.index(character) for character in "()[]")
EVALUATION_SEED = 20_000


def encode(text: str) -> Int[Tensor, "T"]:
    """The tokens of a text.

    Raises:
        ValueError: a character is not in the vocabulary.

    Example:
        >>> encode("12+34=").tolist()
        [3, 4, 12, 5, 6, 14]
    """
    unknown = sorted(set(text) - set(VOCABULARY))
    if unknown:
        raise ValueError(f"text: expected characters of {VOCABULARY}, got {''.join(unknown)!r}")
    return torch.tensor([VOCABULARY.index(character) for character in text], dtype=torch.int64)


def decode(tokens: Int[Tensor, "T"]) -> str:
    """The text of some tokens.

    Raises:
        ValueError: the tokens are no `(T,)`, or one is not in the vocabulary.

    Example:
        >>> decode(torch.tensor([8, 6, 2, 1, 0]))
        '640._'
    """
    checks.require_shape("tokens", tokens, "T")
    checks.require_integer("tokens", tokens)
    _require_tokens("tokens", tokens)
    return "".join(VOCABULARY[token] for token in tokens.tolist())


class TokenTask:
    """Sampling, grading and exact evaluation. A task of `tasks.tokens` adds `prompts` and `answers`.

    Args:
        template: the tokens that may stand at each of the P places of a prompt.
        answer_length: tokens L of the longest answer, the end token included; no response gets more.
        group_size: responses drawn to every prompt of a batch.
        reward: "exact": 1 for the right response, else 0; "graded": the share of the answer's tokens, its end
            included, that stand at their place in the response.
        evaluation_prompts: number of prompts that `evaluate` asks: the same each time, drawn as those for training.

    Raises:
        ValueError: a number is below 1, or `reward` is unknown.
    """

    def __init__(
        self,
        template: list[tuple[int, ...]],
        answer_length: int,
        *,
        group_size: int = 8,
        reward: str = "exact",
        evaluation_prompts: int = 1024,
    ) -> None:
        for name, size in {"group_size": group_size, "evaluation_prompts": evaluation_prompts}.items():
            checks.require_at_least(name, size, 1)
        checks.require_choice("reward", reward, ("exact", "graded"))
        self.prompt_length, self.answer_length = len(template), answer_length
        self.group_size, self.reward, self.evaluation_prompts = group_size, reward, evaluation_prompts
        self._allowed = torch.zeros(len(template), len(VOCABULARY), dtype=torch.bool)  # (P, V)
        for place, tokens in enumerate(template):
            self._allowed[place, list(tokens)] = True

    def prompts(
        self, num_prompts: int, *, generator: torch.Generator | None = None, device: torch.device | str = "cpu"
    ) -> Int[Tensor, "N P"]:
        """Draw prompts, `(N, P)`, with `generator` on `device` only."""
        raise NotImplementedError(f"{type(self).__name__} does not define prompts")

    def answers(self, prompts: Int[Tensor, "N P"]) -> Int[Tensor, "N L"]:
        """The right answers with their end token, padded, `(N, L)`.

        Raises:
            ValueError: a prompt is not one of this task.
        """
        raise NotImplementedError(f"{type(self).__name__} does not define answers")

    def grade(
        self, prompts: Int[Tensor, "N P"], responses: Int[Tensor, "N R"]
    ) -> tuple[Bool[Tensor, "N"], Float[Tensor, "N"]]:
        """Compare responses with the answers, place by place.

        Args:
            prompts: `(N, P)`.
            responses: `(N, R)`, of any length R. What stands after a response's first end token is not looked at.

        Returns:
            Whether each response is right, `(N,)`, and the share of its answer's tokens that it has, `(N,)`, which
            is 1 exactly when it is right.

        Raises:
            TypeError: no int64 tensors.
            ValueError: shapes disagree, or a prompt is not one of this task.
        """
        answers = self.answers(prompts)
        checks.require_shape("responses", responses, "N R", {"N": len(prompts)})
        checks.require_integer("responses", responses)
        written = torch.full_like(answers, PAD)
        width = min(responses.shape[1], answers.shape[1])
        written[:, :width] = responses[:, :width]
        ended_before = (written == END).cumsum(dim=1) - (written == END).long() > 0
        counts = answers != PAD
        share = ((written == answers) & counts & ~ended_before).sum(dim=1) / counts.sum(dim=1)
        return share == 1, share

    def sample(self, policy: CausalTransformer, num_sequences: int, generator: torch.Generator | None = None) -> Batch:
        """Draw `num_sequences / group_size` prompts, and `group_size` responses of the policy to each.

        Args:
            policy: who answers.
            num_sequences: S, a multiple of `group_size`.
            generator: source of randomness on the policy's device; torch's global one when None.

        Returns:
            Observations, actions, mask and log_probs `(S, T)`, rewards and groups `(S,)`. The sequences of a group
            stand together; groups are numbered from 0.

        Raises:
            TypeError: the policy cannot sample tokens.
            ValueError: S is no multiple of the group size, or the policy is too small for the task.
        """
        device = self._require_policy(policy)
        prompts = self.prompts(number_of_groups(num_sequences, self.group_size), generator=generator, device=device)
        sampled = policy.sample(
            prompts,
            self.answer_length,
            responses_per_prompt=self.group_size,
            end_token=END,
            pad_token=PAD,
            generator=generator,
        )
        every_prompt = prompts.repeat_interleave(self.group_size, dim=0)
        right, share = self.grade(every_prompt, sampled.actions[:, self.prompt_length - 1 :])
        rewards = right if self.reward == "exact" else share
        groups = torch.arange(len(prompts), device=device).repeat_interleave(self.group_size)
        return sampled.with_rewards(rewards.to(sampled.log_probs.dtype), groups)

    def supervised(self, prompts: Int[Tensor, "N P"], *, dtype: torch.dtype = torch.float32) -> Batch:
        """The batch whose responses are the right answers: every reward is 1, every log-probability 0.

        `policy.log_prob` of it is what a supervised loss needs, and its sum over time log π(answer | prompt).
        """
        answers = self.answers(prompts)
        tokens = torch.cat([prompts, answers], dim=1)
        mask = torch.zeros_like(tokens, dtype=torch.bool)
        mask[:, self.prompt_length :] = answers != PAD
        zeros = torch.zeros(tokens.shape[0], tokens.shape[1] - 1, dtype=dtype, device=tokens.device)
        return Batch(tokens[:, :-1], tokens[:, 1:], mask[:, 1:], torch.ones_like(zeros[:, 0]), zeros)

    @torch.no_grad()
    def evaluate(self, policy: CausalTransformer) -> dict[str, float]:
        """How often the policy is right on the evaluation prompts, without sampling any response.

        Returns:
            - `return`: accuracy at temperature 1, the mean over prompts of π(answer | prompt), exactly;
            - `greedy`: accuracy of always taking the most probable token.
        """
        device = self._require_policy(policy)
        generator = torch.Generator().manual_seed(EVALUATION_SEED)
        batch = self.supervised(self.prompts(self.evaluation_prompts, generator=generator).to(device))
        logits = policy.logits(batch.observations)
        log_probs = logits.log_softmax(dim=-1).gather(-1, batch.actions.unsqueeze(-1)).squeeze(-1)
        greedy = (logits.argmax(dim=-1) == batch.actions) | ~batch.mask
        return {
            "return": log_probs.masked_fill(~batch.mask, 0.0).sum(dim=1).exp().mean().item(),
            "greedy": greedy.all(dim=1).double().mean().item(),
        }

    def make_policy(
        self, width: int = 64, layers: int = 2, heads: int = 4, *, generator: torch.Generator | None = None
    ) -> CausalTransformer:
        """A new `CausalTransformer` with this vocabulary and just the context that prompts and answers need."""
        context = self.prompt_length + self.answer_length - 1  # the last token is never read
        return CausalTransformer(len(VOCABULARY), context, width, layers, heads, generator=generator)

    def _require_prompts(self, prompts: Tensor) -> None:
        """Check that every place of every prompt holds a token that may stand there."""
        checks.require_shape("prompts", prompts, "N P", {"P": self.prompt_length})
        checks.require_integer("prompts", prompts)
        _require_tokens("prompts", prompts)
        places = torch.arange(self.prompt_length, device=prompts.device)
        wrong = ~self._allowed.to(prompts.device)[places, prompts]
        if wrong.any():
            row, place = wrong.nonzero()[0].tolist()
            may = "".join(VOCABULARY[token] for token in self._allowed[place].nonzero()[:, 0].tolist())
            raise ValueError(f"prompts: expected one of {may} at place {place}, got {decode(prompts[row])!r}")

    def _require_policy(self, policy: CausalTransformer) -> torch.device:
        """Check that the policy can do this task; return its device."""
        if not isinstance(policy, CausalTransformer):
            raise TypeError(f"policy: expected a CausalTransformer, got {type(policy).__name__}")
        if policy.vocabulary_size < len(VOCABULARY):
            raise ValueError(
                f"policy: expected a vocabulary of at least {len(VOCABULARY)}, got {policy.vocabulary_size}"
            )
        return policy.head.weight.device


def number_of_groups(num_sequences: int, group_size: int) -> int:
    """How many groups of this size there are.

    Raises:
        ValueError: there is no sequence, or the last group would not be whole.
    """
    checks.require_at_least("num_sequences", num_sequences, 1)
    if num_sequences % group_size:
        raise ValueError(f"num_sequences: expected a multiple of group_size={group_size}, got {num_sequences}")
    return num_sequences // group_size


def _require_tokens(name: str, tokens: Tensor) -> None:
    """Check that all tokens are in the vocabulary."""
    outside = (tokens < 0) | (tokens >= len(VOCABULARY))
    if outside.any():
        raise ValueError(f"{name}: expected tokens from 0 to {len(VOCABULARY) - 1}, got {int(tokens[outside][0])}")
