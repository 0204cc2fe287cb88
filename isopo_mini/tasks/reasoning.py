"""Questions with verifiable answers from `reasoning-gym`, for a language model: see `ReasoningTask`.

python -m pip install "isopo_mini[language]"
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from isopo_mini import checks
from isopo_mini.batch import Batch
from isopo_mini.policies.pretrained import require_packages
from isopo_mini.policies.sampling import Sampled
from isopo_mini.policies.token_policy import TokenPolicy
from isopo_mini.tasks.token_task import number_of_groups

# Question i of a generator with seed n is drawn with seed n + i: so these, to train on, to be asked at evaluations, and
# the examples that prompts show, share no seed. Of few kinds of questions some come up in all three nevertheless.
QUESTIONS = 1_000_000
TRAINING_SEED, EVALUATION_SEED, EXAMPLE_SEED = 0, 2 * QUESTIONS, 4 * QUESTIONS


def after_colon(question: str) -> str:
    """`4 - 1 =` of "State the final answer to the following arithmetic problem: 4 - 1 ="."""
    return question.rpartition(":")[2].strip()


# What is left of the questions of a generator that says much around them; all of any other's.
SHORTENED: dict[str, Callable[[str], str]] = {"chain_sum": after_colon}


class ReasoningTask:
    """A generator of `reasoning-gym`: its questions, after solved examples, and its own verifier's verdict as reward.

    A prompt shows examples and then the question, one line each; the answer is the rest of that line:

        8 - 8 = 0
        4 - 1 =

    Many verifiers pay a part of the reward for a long text that holds the answer somewhere; a model that is paid so
    learns to chatter. So the reward is 1 where the verifier's score reaches `threshold`, and else 0.

    Args:
        tokenizer: of the policy.
        name: of the generator.
        examples: solved ones in front of every question, always the same; without any, a small model does not know
            what is wanted of it.
        shorten: what is left of the generator's question, on one line; None for what `SHORTENED` says of it.
        max_new_tokens: most tokens of an answer, the line break that ends it included.
        group_size: answers drawn to every question of a batch.
        evaluation_prompts: questions that `evaluate` asks, the same each time.
        threshold: of the verifier's score, from 0 to 1.
        **configuration: of the generator.

    Raises:
        ImportError: `reasoning-gym` is missing.
        ValueError: a number is out of range, there is no such generator, a line break is not one token, or a question
            takes several lines.
    """

    def __init__(
        self,
        tokenizer: Any,
        name: str = "chain_sum",
        *,
        examples: int = 1,
        shorten: Callable[[str], str] | None = None,
        max_new_tokens: int = 6,
        group_size: int = 8,
        evaluation_prompts: int = 64,
        threshold: float = 1.0,
        **configuration: Any,
    ) -> None:
        require_packages("ReasoningTask", "reasoning_gym")
        import reasoning_gym
        from reasoning_gym.factory import DATASETS

        checks.require_choice("name", name, tuple(sorted(DATASETS)))
        checks.require_at_least("examples", examples, 0)
        for count_name, count in {
            "max_new_tokens": max_new_tokens,
            "group_size": group_size,
            "evaluation_prompts": evaluation_prompts,
        }.items():
            checks.require_at_least(count_name, count, 1)
        if not isinstance(threshold, int | float) or not 0 < threshold <= 1:
            raise ValueError(f"threshold: expected a number above 0, up to 1, got {threshold!r}")
        ends = tokenizer.encode("\n", add_special_tokens=False)
        if len(ends) != 1:
            raise ValueError(f"tokenizer: expected one token for a line break, which ends an answer, got {ends}")
        self.tokenizer, self.end_token = tokenizer, ends[0]
        self.shorten, self.threshold = shorten or SHORTENED.get(name, str.strip), threshold
        self.max_new_tokens, self.group_size = max_new_tokens, group_size

        def questions(size: int, seed: int) -> Any:
            return reasoning_gym.create_dataset(name, size=size, seed=seed, **configuration)

        self.training = questions(QUESTIONS, TRAINING_SEED)
        self.evaluation = questions(evaluation_prompts, EVALUATION_SEED)
        shown = questions(max(examples, 1), EXAMPLE_SEED)
        lines = [f"{self.shorten(shown[i]['question'])} {shown[i]['answer']}\n" for i in range(examples)]
        for line in lines or [f"{self.shorten(shown[0]['question'])}\n"]:
            if "\n" in line[:-1]:
                raise ValueError(f"shorten: expected question and answer on one line, got {line!r}")
        self.preamble = "".join(lines)

    def sample(self, policy: TokenPolicy, num_sequences: int, generator: torch.Generator | None = None) -> Batch:
        """Draw `num_sequences / group_size` questions, and `group_size` answers of the policy to each.

        Args:
            policy: who answers.
            num_sequences: S, a multiple of `group_size`.
            generator: source of randomness on the policy's device; torch's global one when None.

        Returns:
            Observations, actions, mask and log_probs `(S, T)`, rewards and groups `(S,)`; a group stands together.

        Raises:
            ValueError: S is no multiple of the group size.
        """
        groups, device = number_of_groups(num_sequences, self.group_size), policy.head_weight.device
        drawn = torch.randint(QUESTIONS, (groups,), generator=generator, device=device)
        entries = [self.training[index] for index in drawn.tolist()]
        sampled = self._ask(policy, entries, self.group_size, generator)
        rewards = self.grade([entry for entry in entries for _ in range(self.group_size)], sampled)
        return sampled.with_rewards(
            rewards.to(sampled.log_probs), torch.arange(groups, device=device).repeat_interleave(self.group_size)
        )

    def evaluate(self, policy: TokenPolicy) -> dict[str, float]:
        """How often the policy is right on the evaluation's questions.

        Returns:
            - `return`: of four answers drawn to each, with the same random numbers every time;
            - `greedy`: of the answer of most probable tokens.
        """
        entries = [self.evaluation[index] for index in range(len(self.evaluation))]
        generator = torch.Generator(policy.head_weight.device).manual_seed(EVALUATION_SEED)
        drawn = self._ask(policy, entries, 4, generator)
        return {
            "return": self.grade([entry for entry in entries for _ in range(4)], drawn).mean().item(),
            "greedy": self.grade(entries, self._ask(policy, entries, 1, generator, temperature=0.0)).mean().item(),
        }

    def answers(self, sampled: Sampled) -> list[str]:
        """The text of every answer up to the line break, which may be a part of a token."""
        texts = [self.tokenizer.decode(tokens.tolist()) for tokens in sampled.responses()]
        return [text.strip().partition("\n")[0].strip() for text in texts]

    def grade(self, entries: Sequence[dict[str, Any]], sampled: Sampled) -> Float[Tensor, "S"]:
        """1 for every answer whose score reaches the threshold, else 0; one entry of the generator for each."""
        scores = [
            self.training.score_answer(answer, entry)
            for answer, entry in zip(self.answers(sampled), entries, strict=True)
        ]
        return (torch.tensor(scores, dtype=torch.float64) >= self.threshold).double()

    def prompt(self, entry: dict[str, Any]) -> str:
        """What the policy reads before it answers."""
        return self.preamble + self.shorten(entry["question"])

    def _ask(
        self,
        policy: TokenPolicy,
        entries: Sequence[dict[str, Any]],
        answers: int,
        generator: torch.Generator | None,
        temperature: float = 1.0,
    ) -> Sampled:
        """The policy's answers to these questions."""
        prompts, lengths = self._padded([self.prompt(entry) for entry in entries], policy.head_weight.device)
        return policy.sample(
            prompts,
            self.max_new_tokens,
            lengths,
            responses_per_prompt=answers,
            end_token=self.end_token,
            pad_token=self.end_token,
            temperature=temperature,
            generator=generator,
        )

    def _padded(self, texts: Sequence[str], device: torch.device) -> tuple[Int[Tensor, "N P"], Int[Tensor, "N"]]:
        """Tokens of the texts, padded on the right, and how many there are of each."""
        rows = [torch.tensor(self.tokenizer.encode(text, add_special_tokens=False)) for text in texts]
        lengths = torch.tensor([len(row) for row in rows], device=device)
        padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=self.end_token)
        return padded.to(device), lengths
