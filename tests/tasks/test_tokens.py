"""Token tasks: every answer against Python's own arithmetic, sorting or a bracket reducer; grading token by token."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from isopo_mini import Batch
from isopo_mini.policies import CausalTransformer, TabularSoftmax
from isopo_mini.tasks import Addition, Brackets, ModularArithmetic, Sorting, TokenTask, make_task
from isopo_mini.tasks.token_task import END, EVALUATION_SEED, PAD, VOCABULARY, decode, encode

ALL_TASKS = [
    Addition(1),
    Addition(2),
    Addition(3),
    ModularArithmetic(7),
    ModularArithmetic(97, "*"),
    Sorting(4),
    Brackets(1),
    Brackets(6),
]
NAMES = ["addition1", "addition2", "addition3", "plus7", "times97", "sorting4", "brackets1", "brackets6"]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def small(task: TokenTask, seed: int = 0, dtype: torch.dtype = torch.float64) -> CausalTransformer:
    """A tiny policy whose weights are blown up, so that its responses depend on the prompt."""
    policy = task.make_policy(width=8, layers=1, heads=2, generator=seeded(seed))
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=seeded(seed + 1))
    return policy.to(dtype)


def rows(texts: list[str], length: int | None = None) -> Tensor:
    """Texts as padded rows of tokens."""
    length = length or max(map(len, texts))
    return torch.stack([encode(text.ljust(length, "_")) for text in texts])


def answer_text(task: TokenTask, prompt: str) -> str:
    return decode(task.answers(encode(prompt)[None])[0])


def by_hand(task: TokenTask, prompt: str, answer: str) -> bool:
    """Whether the answer (without padding) is right, by means that share nothing with the library."""
    assert answer.endswith(".")
    assert prompt.endswith("=")
    answer, question = answer[:-1], prompt[:-1]
    if isinstance(task, Addition):
        first, second = question.split("+")
        return answer == str(int(first) + int(second)).zfill(task.digits + 1)[::-1]
    if isinstance(task, ModularArithmetic):
        first, second = question.split(task.operation)
        result = (int(first) * int(second) if task.operation == "*" else int(first) + int(second)) % task.modulus
        return answer == str(result).zfill(len(first))[::-1]
    if isinstance(task, Sorting):
        return answer == "".join(sorted(question))
    # Brackets: what closes them is right when deleting neighbours that match leaves nothing, and it opens none.
    left = question + answer
    while (shorter := left.replace("()", "").replace("[]", "")) != left:
        left = shorter
    return left == "" and not set(answer) & set("([")


class TestVocabulary:
    def test_is_what_the_table_says(self) -> None:
        assert decode(torch.arange(19)) == VOCABULARY == "_.0123456789+*=()[]"
        assert (PAD, END) == (0, 1)

    @given(st.text(VOCABULARY, min_size=1))
    def test_text_survives(self, text: str) -> None:
        assert decode(encode(text)) == text

    @pytest.mark.usefixtures("unchecked")
    def test_refuses_what_is_not_in_it(self) -> None:
        with pytest.raises(ValueError, match=r"text: expected characters of _\.0123456789.*, got '-a'"):
            encode("1a-1")
        with pytest.raises(ValueError, match="tokens: expected tokens from 0 to 18, got 19"):
            decode(torch.tensor([3, 19]))
        with pytest.raises(ValueError, match="tokens: expected tokens from 0 to 18, got -1"):
            decode(torch.tensor([-1]))
        with pytest.raises(ValueError, match=r"tokens: expected shape \(T\), got \(1, 1\)"):
            decode(torch.tensor([[1]]))


class TestAnswers:
    @pytest.mark.parametrize(
        ("task", "questions"),
        [
            (Addition(2), [f"{a:02}+{b:02}=" for a in range(100) for b in range(100)]),
            (ModularArithmetic(97), [f"{a:02}+{b:02}=" for a in range(97) for b in range(97)]),
            (ModularArithmetic(97, "*"), [f"{a:02}*{b:02}=" for a in range(97) for b in range(97)]),
            (Sorting(3), ["".join(digits) + "=" for digits in itertools.product("0123456789", repeat=3)]),
        ],
        ids=["addition", "plus", "times", "sorting"],
    )
    def test_every_single_prompt(self, task: TokenTask, questions: list[str]) -> None:
        answers = task.answers(rows(questions))
        assert answers.shape == (len(questions), task.answer_length)
        assert all(by_hand(task, q, decode(a)) for q, a in zip(questions, answers, strict=True))

    def test_every_prompt_of_brackets(self) -> None:
        """All 4⁵ texts: those that a reducer finds closable get an answer, the others are refused."""
        task, closable = Brackets(5), 0
        for text in map("".join, itertools.product("()[]", repeat=5)):
            left = text
            while (shorter := left.replace("()", "").replace("[]", "")) != left:
                left = shorter
            if set(left) & set(")]"):
                with pytest.raises(ValueError, match="expected brackets that close the newest open one"):
                    answer_text(task, text + "=")
            else:
                closable += 1
                assert by_hand(task, text + "=", answer_text(task, text + "=").rstrip("_"))
        # Walks of 5 steps that stay at 0 or above: 5 with 3 steps up, 4 with 4, 1 with 5; two kinds of each step up.
        assert closable == 5 * 2**3 + 4 * 2**4 + 1 * 2**5

    @given(st.integers(1, 18), st.data())
    @settings(max_examples=30, deadline=None)
    def test_addition_of_any_size(self, digits: int, data: st.DataObject) -> None:
        first, second = (data.draw(st.integers(0, 10**digits - 1)) for _ in range(2))
        prompt = f"{first:0{digits}}+{second:0{digits}}="
        assert answer_text(Addition(digits), prompt) == f"{first + second:0{digits + 1}}"[::-1] + "."

    @given(st.integers(2, 10**9), st.sampled_from("+*"), st.data())
    @settings(max_examples=30, deadline=None)
    def test_any_modulus(self, modulus: int, operation: str, data: st.DataObject) -> None:
        first, second = (data.draw(st.integers(0, modulus - 1)) for _ in range(2))
        width = len(str(modulus - 1))
        task = ModularArithmetic(modulus, operation)
        prompt = f"{first:0{width}}{operation}{second:0{width}}="
        assert by_hand(task, prompt, answer_text(task, prompt))

    @pytest.mark.usefixtures("unchecked")
    @pytest.mark.parametrize(
        ("task", "prompt", "message"),
        [
            (Addition(2), "12*34=", r"prompts: expected one of \+ at place 2, got '12\*34='"),
            (Addition(2), "12+3==", r"prompts: expected one of 0123456789 at place 4, got '12\+3=='"),
            (Addition(2), "12+34", r"prompts: expected shape \(N P=6\), got \(1, 5\)"),
            (Sorting(2), "123", "prompts: expected one of = at place 2, got '123'"),
            (Brackets(2), "(1=", r"prompts: expected one of \(\)\[\] at place 1, got '\(1='"),
            (Brackets(2), "(]=", r"prompts: expected brackets that close the newest open one, got '\(\]='"),
            (Brackets(2), ")(=", r"prompts: expected brackets that close the newest open one, got '\)\(='"),
        ],
    )
    def test_a_prompt_of_another_task_is_refused(self, task: TokenTask, prompt: str, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            task.answers(encode(prompt)[None])

    @pytest.mark.usefixtures("unchecked")
    def test_prompts_that_are_no_tokens(self) -> None:
        with pytest.raises(TypeError, match=r"prompts: expected an int64 tensor, got torch\.float32"):
            Sorting(2).answers(torch.zeros(1, 3))
        with pytest.raises(ValueError, match="prompts: expected tokens from 0 to 18, got -3"):
            Sorting(2).answers(torch.tensor([[2, -3, 14]]))


@pytest.mark.parametrize("task", ALL_TASKS, ids=NAMES)
class TestPrompts:
    def test_drawn_prompts_have_right_answers(self, task: TokenTask) -> None:
        prompts = task.prompts(300, generator=seeded())
        assert prompts.shape == (300, task.prompt_length)
        for prompt, answer in zip(prompts, task.answers(prompts), strict=True):
            assert by_hand(task, decode(prompt), decode(answer).rstrip("_"))

    def test_the_generator_decides(self, task: TokenTask) -> None:
        first, second, third = (task.prompts(40, generator=seeded(seed)) for seed in (3, 3, 4))
        assert torch.equal(first, second)
        assert not torch.equal(first, third)

    def test_only_the_generator_is_drawn_from(self, task: TokenTask) -> None:
        policy = small(task)
        state = torch.get_rng_state()
        task.sample(policy, 8, seeded())
        task.evaluate(policy)
        assert torch.equal(torch.get_rng_state(), state)


def test_digits_are_uniform() -> None:
    prompts = Addition(2).prompts(5000, generator=seeded())
    for place in (0, 1, 3, 4):
        counts = torch.bincount(prompts[:, place] - 2, minlength=10)
        # χ² with 9 degrees of freedom: mean 9, standard deviation √18; this is over four of them away.
        assert ((counts - 500) ** 2 / 500).sum() < 27


def test_numbers_are_uniform_below_the_modulus() -> None:
    prompts = ModularArithmetic(12).prompts(6000, generator=seeded())
    for tokens in (prompts[:, :2], prompts[:, 3:5]):
        counts = torch.bincount((tokens - 2) @ torch.tensor([10, 1]), minlength=12)
        assert len(counts) == 12
        assert ((counts - 500) ** 2 / 500).sum() < 11 + 4 * math.sqrt(22)


def test_brackets_open_and_close_with_equal_probability() -> None:
    """Depth after 4 brackets is a walk reflected at 0: P(0, 2, 4) = 3/8, 4/8, 1/8, and both kinds are as frequent."""
    prompts = Brackets(4).prompts(8000, generator=seeded())
    depths = (Brackets(4).answers(prompts) != PAD).sum(dim=1) - 1
    for depth, probability in {0: 3 / 8, 2: 4 / 8, 4: 1 / 8}.items():
        share = (depths == depth).double().mean().item()
        assert abs(share - probability) < 4 * math.sqrt(probability * (1 - probability) / 8000)
    first = (prompts[:, 0] == encode("(").item()).double().mean().item()
    assert abs(first - 0.5) < 4 * math.sqrt(0.25 / 8000)


def grade(task: TokenTask, prompt: str, response: str) -> tuple[bool, float]:
    right, share = task.grade(encode(prompt)[None], encode(response)[None])
    return bool(right[0]), float(share[0])


class TestGrading:
    @pytest.mark.parametrize(
        ("response", "right", "share"),
        [
            ("521.", True, 1.0),
            ("521.__", True, 1.0),
            ("521.7+(", True, 1.0),  # nothing behind the end is looked at
            ("521", False, 3 / 4),  # the end is part of the answer
            ("5210.", False, 3 / 4),
            ("521_.", False, 3 / 4),  # padding is no end
            ("125.", False, 2 / 4),  # 2 stands at its place, and so does the end
            ("5.1.", False, 1 / 4),  # ended after the first digit
            (".", False, 0.0),
            ("_", False, 0.0),
            ("....", False, 0.0),
            ("9999.", False, 0.0),
            ("0521.", False, 0.0),
        ],
    )
    def test_of_57_plus_68(self, response: str, right: bool, share: float) -> None:
        assert grade(Addition(2), "57+68=", response) == (right, share)

    def test_of_answers_of_different_lengths(self) -> None:
        prompts = rows(["(())=", "(([[=", "([()="])
        right, share = Brackets(4).grade(prompts, rows([".____", "]]))_", "])._."]))
        assert right.tolist() == [True, False, True]
        assert share.tolist() == pytest.approx([1, 4 / 5, 1])

    @pytest.mark.parametrize("task", ALL_TASKS, ids=NAMES)
    @given(seed=st.integers(0, 1000), length=st.integers(1, 9))
    @settings(max_examples=25, deadline=None)
    def test_equals_a_loop_over_tokens(self, task: TokenTask, seed: int, length: int) -> None:
        """Right answers with a few tokens replaced by random ones, cut or padded to any length."""
        generator = seeded(seed)
        prompts = task.prompts(12, generator=generator)
        answers = task.answers(prompts)
        responses = torch.nn.functional.pad(answers, (0, 9))[:, :length]
        noise = torch.randint(len(VOCABULARY), responses.shape, generator=generator)
        responses = torch.where(torch.rand(responses.shape, generator=generator) < 0.2, noise, responses)
        right, share = task.grade(prompts, responses)
        for s in range(12):
            answer = decode(answers[s]).rstrip("_")
            response = decode(responses[s])
            response = response[: response.index(".") + 1] if "." in response else response
            matching = sum(a == b for a, b in zip(answer, response, strict=False))
            assert share[s].item() == pytest.approx(matching / len(answer), rel=1e-6)
            assert bool(right[s]) == (answer == response)
            assert bool(right[s]) == (share[s].item() == 1)

    @pytest.mark.usefixtures("unchecked")
    def test_refuses_other_shapes(self) -> None:
        task, prompts = Addition(1), encode("1+2=")[None]
        with pytest.raises(ValueError, match=r"responses: expected shape \(N=1 R\), got \(2, 3\)"):
            task.grade(prompts, torch.zeros(2, 3, dtype=torch.int64))
        with pytest.raises(TypeError, match=r"responses: expected an int64 tensor, got torch\.float32"):
            task.grade(prompts, torch.zeros(1, 3))


@pytest.mark.parametrize("task", ALL_TASKS, ids=NAMES)
class TestSampling:
    def test_groups_share_a_prompt_and_rewards_are_the_grades(self, task: TokenTask) -> None:
        policy = small(task)
        batch = task.sample(policy, 24, seeded())
        assert isinstance(batch, Batch)
        assert batch.groups.tolist() == [s // 8 for s in range(24)]
        start = task.prompt_length - 1
        prompts = torch.cat([batch.observations[:, :1], batch.actions[:, :start]], dim=1)
        assert len(prompts.unique(dim=0)) > 1 or task.prompt_length == 2
        assert torch.equal(prompts, prompts[::8].repeat_interleave(8, dim=0))
        assert not batch.mask[:, :start].any()
        for s in range(24):
            response = decode(batch.actions[s][batch.mask[s]])
            assert response.find(".") in (-1, len(response) - 1)  # nothing is acted on behind the end
            assert len(response) == task.answer_length or response.endswith(".")
            expected = by_hand(task, decode(prompts[s]), response) if response.endswith(".") else False
            assert batch.rewards[s].item() == float(expected)
        torch.testing.assert_close(batch.log_probs, policy.log_prob(batch).detach())
        assert batch.rewards.dtype == batch.log_probs.dtype == torch.float64

    def test_the_generator_decides(self, task: TokenTask) -> None:
        policy = small(task)
        first, second, third = (task.sample(policy, 16, seeded(seed)) for seed in (3, 3, 4))
        assert torch.equal(first.observations, second.observations)
        assert torch.equal(first.actions, second.actions)
        assert first.actions.shape != third.actions.shape or not torch.equal(first.actions, third.actions)

    def test_supervised_batch_holds_the_answers(self, task: TokenTask) -> None:
        prompts = task.prompts(5, generator=seeded())
        batch = task.supervised(prompts, dtype=torch.float64)
        for s, answer in enumerate(task.answers(prompts)):
            assert decode(batch.actions[s][batch.mask[s]]) == decode(answer).rstrip("_")
            read = decode(batch.observations[s]) + decode(batch.actions[s])[-1]
            assert read == decode(prompts[s]) + decode(answer)
        assert task.grade(prompts, batch.actions[:, task.prompt_length - 1 :])[0].all()


@pytest.mark.parametrize(
    "task", [ModularArithmetic(7), Sorting(2), Brackets(6)], ids=["plus7", "sorting2", "brackets6"]
)
def test_evaluation_is_what_sampling_averages_to(task: TokenTask) -> None:
    """A policy that is right now and then: its exact accuracy against 4,096 sampled responses."""
    policy = small(task, dtype=torch.float32)
    batch = task.supervised(task.prompts(256, generator=seeded()))
    optimizer = torch.optim.Adam(policy.parameters(), lr=0.03)
    for _ in range(20):
        optimizer.zero_grad()
        (-policy.log_prob(batch).sum() / 256).backward()
        optimizer.step()
    result = task.evaluate(policy)
    assert 0.05 < result["return"] < 0.95
    prompts = task.prompts(task.evaluation_prompts, generator=seeded(EVALUATION_SEED))
    sampled = policy.sample(prompts, task.answer_length, responses_per_prompt=4, end_token=END, generator=seeded(2))
    right, _ = task.grade(prompts.repeat_interleave(4, dim=0), sampled.actions[:, task.prompt_length - 1 :])
    # The standard error of a mean of 4,096 zeros and ones is at most 1/128.
    assert right.double().mean().item() == pytest.approx(result["return"], abs=4 / 128)
    greedy = policy.sample(prompts, task.answer_length, temperature=0.0, end_token=END)
    right, _ = task.grade(prompts, greedy.actions[:, task.prompt_length - 1 :])
    # Equal, but for near ties that rounding decides.
    assert right.double().mean().item() == pytest.approx(result["greedy"], abs=2.5 / 1024)


def test_graded_rewards_are_the_shares() -> None:
    tasks = Addition(2), Addition(2, reward="graded")
    policy = small(tasks[0])
    exact, graded = (task.sample(policy, 64, seeded(1)) for task in tasks)
    assert torch.equal(exact.actions, graded.actions)
    prompts = torch.cat([exact.observations[:, :1], exact.actions[:, :5]], dim=1)
    right, share = tasks[0].grade(prompts, exact.actions[:, 5:])
    assert torch.equal(exact.rewards, right.double())
    torch.testing.assert_close(graded.rewards, share.double())
    assert 0 < graded.rewards.mean() < 1


def test_a_policy_that_never_ends_and_one_that_ends_at_once() -> None:
    task = Addition(2)
    policy = small(task)
    with torch.no_grad():
        policy.head.weight.zero_()
        policy.final_norm.weight.zero_()
        policy.final_norm.bias.fill_(1.0)
        policy.head.weight[END] = 10.0  # logits 80 for the end, 0 for all else
    batch = task.sample(policy, 16)
    assert batch.actions.shape == (16, task.prompt_length)
    assert (batch.mask.sum(dim=1) == 1).all()
    assert (batch.rewards == 0).all()
    with torch.no_grad():
        policy.head.weight[END] = -10.0
    batch = task.sample(policy, 16)
    assert (batch.mask.sum(dim=1) == task.answer_length).all()
    assert (batch.rewards == 0).all()
    assert task.evaluate(policy) == {"return": pytest.approx(0, abs=1e-30), "greedy": 0.0}


def test_a_group_may_be_one_and_a_batch_one_group() -> None:
    task = Addition(1, group_size=1)
    assert task.sample(small(task), 3).groups.tolist() == [0, 1, 2]
    assert Addition(1).sample(small(task), 8).groups.tolist() == [0] * 8


def test_make_task() -> None:
    task = make_task("addition:digits=3,reward=graded,group_size=4")
    assert isinstance(task, Addition)
    assert (task.digits, task.reward, task.group_size) == (3, "graded", 4)
    assert make_task("addition").prompt_length == 6
    assert make_task("modular:operation=*").operation == "*"
    assert isinstance(make_task("sorting"), Sorting)
    assert isinstance(make_task("brackets:length=3"), Brackets)


@pytest.mark.usefixtures("unchecked")
class TestBadInput:
    @pytest.mark.parametrize(
        ("spec", "message"),
        [
            ("division", "task: expected one of addition, modular, sorting, brackets, got 'division'"),
            ("addition:digits", "task: expected options written as name=value, got 'digits'"),
            ("addition:digits=", "task: expected options written as name=value, got 'digits='"),
            ("addition:digits=0", "digits: expected 1 to 18, got 0"),
            ("addition:digits=19", "digits: expected 1 to 18, got 19"),
            ("modular:modulus=1", "modulus: expected 2 to 1000000000, got 1"),
            ("modular:operation=-", r"operation: expected one of \+, \*, got '-'"),
            ("sorting:length=0", "length: expected a finite number >= 1, got 0"),
            ("brackets:length=0", "length: expected a finite number >= 1, got 0"),
            ("sorting:group_size=0", "group_size: expected a finite number >= 1, got 0"),
            ("sorting:evaluation_prompts=0", "evaluation_prompts: expected a finite number >= 1, got 0"),
            ("sorting:reward=kind", "reward: expected one of exact, graded, got 'kind'"),
        ],
    )
    def test_options(self, spec: str, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            make_task(spec)

    def test_an_option_that_the_task_does_not_have(self) -> None:
        with pytest.raises(TypeError, match=r"task: addition has no option .*'modulus'"):
            make_task("addition:modulus=7")

    def test_sampling(self) -> None:
        task = Addition(2)
        policy = small(task)
        with pytest.raises(ValueError, match="num_sequences: expected a multiple of group_size=8, got 12"):
            task.sample(policy, 12)
        with pytest.raises(ValueError, match="num_sequences: expected a finite number >= 1, got 0"):
            task.sample(policy, 0)
        with pytest.raises(ValueError, match="num_prompts: expected a finite number >= 1, got 0"):
            task.prompts(0)

    def test_policies_that_cannot_do_it(self) -> None:
        task = Addition(2)
        for call in (task.evaluate, lambda policy: task.sample(policy, 8)):
            with pytest.raises(TypeError, match="policy: expected a CausalTransformer, got TabularSoftmax"):
                call(TabularSoftmax(2, 2))
            with pytest.raises(ValueError, match="policy: expected a vocabulary of at least 19, got 12"):
                call(CausalTransformer(12, 9, width=4, heads=1))
        with pytest.raises(ValueError, match=r"max_new_tokens: .* <= context_length=8, got 6 \+ 4 - 1"):
            task.sample(CausalTransformer(19, 8, width=4, heads=1), 8)
