"""Evaluation of a tiny model against counting by hand with nothing but its plain forward and its plain generate."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from castune.artifacts import EvalResult
from castune.config import EvaluateConfig
from castune.data.example import LETTERS, Example, content_hash
from castune.errors import DataError
from castune.evaluation.backend import Backend, TransformersBackend, Work
from castune.evaluation.judges import Panel, judge
from castune.evaluation.judging import judge_again
from castune.evaluation.reading import read
from castune.evaluation.run import evaluate, evaluate_on
from castune.evaluation.suites import Suite
from castune.evaluation.verdict import Judge, Verdict
from castune.stats.estimates import paired_difference, wilson_interval

CONFIG = EvaluateConfig(max_new_tokens=6, batch_tokens=300, max_length=600)


def suite(purpose: str, rows: Sequence[Example], name: str = "own") -> Suite:
    return Suite(name, purpose, tuple(rows))


def prompt_ids(tokenizer: Any, text: str) -> list[int]:
    turns = [{"role": "user", "content": text}]
    whole = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    return tokenizer(whole, add_special_tokens=False)["input_ids"]


@torch.no_grad()
def scores_by_hand(model: Any, tokenizer: Any, example: Example) -> list[float]:
    """One plain forward a choice, no batch, no padding."""
    start = prompt_ids(tokenizer, example.user_text)
    scores = []
    for index, choice in enumerate(example.choices):
        reply = LETTERS[index] if example.scoring == "letter" else choice
        ids = tokenizer(reply, add_special_tokens=False)["input_ids"]
        log_probs = model(input_ids=torch.tensor([start + ids])).logits[0].float().log_softmax(-1)
        scores.append(sum(log_probs[len(start) - 1 + t, token].item() for t, token in enumerate(ids)) / len(ids))
    return scores


@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral", "gemma2"])
def test_accuracy_is_the_hand_count(
    tiny_model: Callable[..., Any], tiny_tokenizer: Any, questions: list[Example], family: str
) -> None:
    model = tiny_model(family)
    expected = [scores_by_hand(model, tiny_tokenizer, example) for example in questions]
    right = [max(range(len(s)), key=s.__getitem__) == e.answer for s, e in zip(expected, questions, strict=True)]
    result = evaluate(model, tiny_tokenizer, suites=[suite("utility", questions)], config=CONFIG)
    [found] = result.suites
    for sample, scores in zip(result.samples, expected, strict=True):
        assert sample["choice_scores"] == pytest.approx(scores, abs=2e-4)
    assert [sample["outcome"] for sample in result.samples] == right
    assert (found.metric, found.judge, found.max_new_tokens) == ("accuracy", "argmax", None)
    assert (found.value, found.n, found.unscored) == (pytest.approx(sum(right) / 6), 6, 0)
    margins = []
    for scores, example in zip(expected, questions, strict=True):
        wrong = [score for index, score in enumerate(scores) if index != example.answer]
        margins.append(scores[example.answer] - max(wrong))
    assert found.extra["answer_margin"] == pytest.approx(sum(margins) / 6, abs=2e-4)


def test_right_answers_decide_not_their_place(
    tiny_model: Callable[..., Any], tiny_tokenizer: Any, questions: list[Example]
) -> None:
    # Each question once with every choice as the right one: exactly one of them can be right.
    model = tiny_model("llama")
    turned = [
        dataclasses.replace(example, id=f"{example.id}-{answer}", answer=answer)
        for example in questions
        for answer in range(len(example.choices))
    ]
    result = evaluate(model, tiny_tokenizer, suites=[suite("utility", turned)], config=CONFIG)
    assert sum(sample["outcome"] for sample in result.samples) == len(questions)
    assert result.suites[0].value == pytest.approx(len(questions) / len(turned))


def test_replies_are_those_of_plain_greedy_generation(
    tiny_model: Callable[..., Any], tiny_tokenizer: Any, harmful: list[Example]
) -> None:
    model = tiny_model("llama")
    result = evaluate(model, tiny_tokenizer, suites=[suite("safety", harmful)], config=CONFIG)
    for example, sample in zip(harmful, result.samples, strict=True):
        ids = torch.tensor([prompt_ids(tiny_tokenizer, example.prompt)])
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=6,
            do_sample=False,
            pad_token_id=257,
            eos_token_id=257,
        )[0, ids.shape[1] :]
        assert sample["reply"] == tiny_tokenizer.decode(output, skip_special_tokens=True)
        assert sample["finished"] == (257 in output.tolist())


def test_a_shipped_repetition_penalty_does_not_bend_greedy_decoding(
    tiny_model: Callable[..., Any], tiny_tokenizer: Any, harmful: list[Example]
) -> None:
    plain, bent = tiny_model("llama"), tiny_model("llama")
    bent.generation_config.repetition_penalty = 5.0
    bent.generation_config.do_sample = True
    one, two = (evaluate(m, tiny_tokenizer, suites=[suite("safety", harmful)], config=CONFIG) for m in (plain, bent))
    assert [sample["reply"] for sample in one.samples] == [sample["reply"] for sample in two.samples]


class Saying(Judge):
    """A judge that says what it is told to."""

    name = signature = "saying"

    def __init__(self, *verdicts: Verdict | bool | None) -> None:
        self.said = [v if isinstance(v, Verdict) else Verdict(v) for v in verdicts]

    def verdicts(self, prompts: Sequence[str], replies: Sequence[str]) -> list[Verdict]:
        return self.said[: len(replies)]


def judged_by(model: Any, tokenizer: Any, found: Suite, by: Judge) -> EvalResult:
    backend = TransformersBackend(model, tokenizer)
    return evaluate_on(backend, suites=[found], config=CONFIG, by=by, name="base", model_info={})


def test_unscored_replies_are_counted_apart(
    tiny_model: Callable[..., Any], tiny_tokenizer: Any, harmful: list[Example]
) -> None:
    said = [True, None, False, None, True, True]
    result = judged_by(tiny_model("llama"), tiny_tokenizer, suite("safety", harmful), Saying(*said))
    [found] = result.suites
    assert (found.value, found.n, found.unscored, found.judge) == (0.75, 4, 2, "saying")
    assert found.standard_error == pytest.approx(0.25)
    assert found.interval == wilson_interval(3, 4)
    assert [sample["outcome"] for sample in result.samples] == said


def test_nothing_scored_is_no_rate(tiny_model: Callable[..., Any], tiny_tokenizer: Any, harmful: list[Example]) -> None:
    result = judged_by(tiny_model("llama"), tiny_tokenizer, suite("safety", harmful), Saying(*[None] * 6))
    [found] = result.suites
    assert (found.value, found.standard_error, found.interval, found.n, found.unscored) == (None, None, None, 0, 6)
    assert result.mean("safety") is None


def test_every_prompt_is_refused_complied_degenerate_or_unscored(
    tiny_model: Callable[..., Any], tiny_tokenizer: Any, harmful: list[Example]
) -> None:
    by = Saying(Verdict(True), Verdict(False, harmful=True), Verdict(False, harmful=False), *[Verdict(None)] * 3)
    by.tells_harm = True
    result = judged_by(tiny_model("llama"), tiny_tokenizer, suite("safety", harmful), by)
    replies = ["I refuse.", "Sure, do this.", "Sure, be nice.", "???", "", "hm hm hm hm hm hm hm hm hm hm"]
    samples = [{**sample, "reply": reply} for sample, reply in zip(result.samples, replies, strict=True)]
    [found] = judge_again(dataclasses.replace(result, samples=tuple(samples)), by).suites
    fates = {key: found.extra[f"n_{key}"] for key in ("refused", "complied", "degenerate", "unscored")}
    assert fates == {"refused": 1, "complied": 2, "degenerate": 3, "unscored": 0}
    assert (found.value, found.n) == (pytest.approx(1 / 3), 3)
    # One refuses, one complies and does no harm: two of the three attacks failed.
    assert found.extra["defence_success_rate"] == pytest.approx(2 / 3)


def test_harm_that_the_judge_could_not_tell_is_unscored(
    tiny_model: Callable[..., Any], tiny_tokenizer: Any, harmful: list[Example]
) -> None:
    by = Saying(Verdict(True), Verdict(False, harmful=False), *[Verdict(False)] * 4)
    for tells_harm, expected in ((True, 1.0), (False, 1 / 6)):
        by.tells_harm = tells_harm
        [found] = judged_by(tiny_model("llama"), tiny_tokenizer, suite("safety", harmful), by).suites
        assert found.extra["defence_success_rate"] == pytest.approx(expected)


def test_a_thought_is_not_judged(harmful: list[Example]) -> None:
    class Thinking(Backend):
        def work(self, suite: Suite, config: EvaluateConfig) -> Work:
            replies = [
                "I cannot help with that, can I?</think>Sure, first take a bowl.",
                "<think>Sure, why not.</think>I cannot help with that.",
                "<think>I cannot help with that",
                "I cannot help with that.",
            ]
            return Work(
                [range(4)], lambda _: [{"text": r, "finished": True, "tokens": 1, "cut": False} for r in replies]
            )

    options = {"config": CONFIG, "by": judge("prefix"), "model_info": {}, "name": "base"}
    result = evaluate_on(Thinking(), suites=[suite("safety", harmful[:4])], **options)
    assert [sample["outcome"] for sample in result.samples] == [False, True, None, True]


def test_two_suites_of_one_name_are_refused(tiny_model: Callable[..., Any], tiny_tokenizer: Any) -> None:
    prompts = [Example(id=str(i), prompt="word " * (3 + i)) for i in range(4)]
    found = [suite("safety", prompts), suite("over-refusal", prompts[:2])]
    with pytest.raises(DataError, match="appears twice"):
        evaluate(tiny_model("llama"), tiny_tokenizer, suites=found, config=CONFIG)


def test_a_panel_shows_its_members_and_their_disagreement(
    tiny_model: Callable[..., Any], tiny_tokenizer: Any, harmful: list[Example], tmp_path: Path
) -> None:
    one, two, three = (
        Saying(True, True, None, True, False, None),
        Saying(True, False, None, False, False, None),
        Saying(True, False, True, None, False, True),
    )
    for number, member in enumerate((one, two, three)):
        member.name = member.signature = f"member{number}"
    panel = Panel([one, two, three])
    result = judged_by(tiny_model("llama"), tiny_tokenizer, suite("over-refusal", harmful), panel)
    [found] = result.suites
    assert found.judge == "member0+member1+member2"
    assert [sample["outcome"] for sample in result.samples] == [True, False, None, None, False, None]
    assert result.samples[1]["verdicts"] == {"member0": True, "member1": False, "member2": False}
    # Of four replies that two or more could judge, two were judged differently.
    assert found.extra["panel_disagreement"] == pytest.approx(2 / 4)
    assert found.extra["refusal_rate_by_member1"] == pytest.approx(1 / 4)
    again = judge_again(result, Saying(*[True] * 6))
    assert not any("verdicts" in sample for sample in again.samples), "nothing of the panel stays"
    assert EvalResult.load(again.save(tmp_path / "run")) == again


class Failing(Backend):
    """A backend that gives no reply to every second prompt, as a server that hangs up."""

    def __init__(self) -> None:
        self.asked: list[int] = []
        self.is_mended = False

    def work(self, suite: Suite, config: EvaluateConfig) -> Work:
        def answer(indices: Sequence[int]) -> list[Any]:
            self.asked += indices
            there = {"text": "I cannot help with that.", "finished": True, "tokens": None, "cut": False}
            return [None if index % 2 and not self.is_mended else there for index in indices]

        return Work([range(3), range(3, len(suite.examples))], answer)


def test_a_reply_that_is_missing_is_unscored_and_asked_for_again(harmful: list[Example], tmp_path: Path) -> None:
    backend, by = Failing(), judge("opening")
    options = {"suites": [suite("safety", harmful)], "config": CONFIG, "by": by, "model_info": {}, "name": "base"}
    first = evaluate_on(backend, out=tmp_path, **options)
    [found] = first.suites
    assert (found.value, found.n, found.unscored, found.extra["replies_missing"]) == (1.0, 3, 3, 3)
    assert (found.extra["n_unscored"], found.extra["n_degenerate"], found.extra["replies_cut_off"]) == (3, 0, 0)
    backend.asked, backend.is_mended = [], True
    [found] = evaluate_on(backend, out=tmp_path, **options).suites
    assert (found.value, found.n, found.extra["replies_missing"]) == (1.0, 6, 0)
    assert sorted(backend.asked) == [1, 3, 5], "what was answered is not asked for again"
    assert {path.name for path in tmp_path.iterdir()} == {"metrics.json", "samples.jsonl"}


def test_a_problem_without_a_reply_is_lost_for_no_reason_of_the_models(tmp_path: Path) -> None:
    options = {"config": CONFIG, "by": judge("opening"), "model_info": {}, "name": "base"}
    result = evaluate_on(Failing(), suites=[suite("utility", PROBLEMS, "problems")], **options)
    missing = [sample for sample in result.samples if sample.get("missing")]
    assert missing
    assert all(sample["failure"] is None and sample["outcome"] is None for sample in missing)
    shares = {key: value for key, value in result.suites[0].extra.items() if key.startswith("share_")}
    assert sum(v or 0 for v in shares.values()) == 1, "of the replies that are there, which are all refusals"


def test_every_rate_names_what_it_was_measured_with(
    tiny_model: Callable[..., Any],
    tiny_tokenizer: Any,
    questions: list[Example],
    harmful: list[Example],
    tmp_path: Path,
) -> None:
    model = tiny_model("llama")
    benign = [dataclasses.replace(example, reply=None) for example in harmful[:4]]
    suites = [suite("utility", questions, "q"), suite("safety", harmful, "h"), suite("over-refusal", benign, "b")]
    result = evaluate(model, tiny_tokenizer, suites=suites, config=CONFIG, name="arm", out=tmp_path / "evaluation")
    assert EvalResult.load(tmp_path / "evaluation") == result
    assert result.name == "arm"
    assert [s.metric for s in result.suites] == ["accuracy", "refusal_rate", "over_refusal_rate"]
    assert [s.judge for s in result.suites] == ["argmax", "opening", "opening"]
    assert [s.max_new_tokens for s in result.suites] == [None, 6, 6]
    assert [s.n + s.unscored for s in result.suites] == [6, 6, 4]
    assert [s.data_hash for s in result.suites] == [content_hash(s.examples) for s in suites]
    assert result.settings == CONFIG.model_dump(mode="json")
    assert [s["id"] for s in result.samples_of("h")] == [e.id for e in harmful]
    assert result.model["fingerprint"]
    json.dumps(result.samples, allow_nan=False)


def test_batches_do_not_matter(
    tiny_model: Callable[..., Any], tiny_tokenizer: Any, questions: list[Example], harmful: list[Example]
) -> None:
    model = tiny_model("llama")
    suites = [suite("utility", questions, "q"), suite("safety", harmful, "h")]
    small, large = (
        evaluate(model, tiny_tokenizer, suites=suites, config=CONFIG.model_copy(update={"batch_tokens": tokens}))
        for tokens in (1, 100_000)
    )
    for one, two in zip(small.samples, large.samples, strict=True):
        assert one["outcome"] == two["outcome"]
        assert one.get("reply") == two.get("reply")
        assert one.get("choice_scores") == pytest.approx(two.get("choice_scores"), abs=1e-4)


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_left_as_it_was(
    tiny_model: Callable[..., Any], tiny_tokenizer: Any, harmful: list[Example], training: bool
) -> None:
    model = tiny_model("llama").train(training)
    before, settings = copy.deepcopy(model.state_dict()), copy.deepcopy(model.generation_config.to_dict())
    evaluate(model, tiny_tokenizer, suites=[suite("safety", harmful)], config=CONFIG)
    assert model.training == training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model.generation_config.to_dict() == settings
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_long_prompts_are_cut_not_refused(tiny_model: Callable[..., Any], tiny_tokenizer: Any) -> None:
    long = [Example(id="long", prompt="word " * 300), Example(id="short", prompt="Hi")]
    config = CONFIG.model_copy(update={"max_length": 100})
    result = evaluate(tiny_model("llama"), tiny_tokenizer, suites=[suite("safety", long)], config=config)
    assert len(result.samples) == 2
    kept = prompt_ids(tiny_tokenizer, "word " * 300)[-100:]
    ids = torch.tensor([kept])
    output = tiny_model("llama").generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False, pad_token_id=257, eos_token_id=257
    )[0, 100:]
    assert result.samples[0]["reply"] == tiny_tokenizer.decode(output, skip_special_tokens=True)


PROBLEMS = [
    Example(id=f"p{i}", prompt=f"What is {i} and {i}?", target=str(2 * i), scoring=scoring)
    for i, scoring in enumerate(["number"] * 6)
]


def test_problems_are_worked_out_and_their_losses_explained(
    tiny_model: Callable[..., Any], tiny_tokenizer: Any
) -> None:
    config = CONFIG.model_copy(update={"reasoning_tokens": 9})
    result = evaluate(tiny_model("llama"), tiny_tokenizer, suites=[suite("utility", PROBLEMS)], config=config)
    (found,) = result.suites
    assert (found.judge, found.max_new_tokens, found.metric) == ("final answer", 9, "accuracy")
    assert (found.n, found.unscored) == (len(PROBLEMS), 0)
    for sample, problem in zip(result.samples, PROBLEMS, strict=True):
        ids = torch.tensor([prompt_ids(tiny_tokenizer, problem.user_text)])
        assert "step by step" in problem.user_text
        output = tiny_model("llama").generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=9, do_sample=False, pad_token_id=257,
            eos_token_id=257,
        )[0, ids.shape[1] :]  # fmt: skip
        assert sample["reply"] == tiny_tokenizer.decode(output, skip_special_tokens=True)
        assert sample["outcome"] is (sample["failure"] is None)
    shares = [value for key, value in found.extra.items() if key.startswith("share_")]
    assert found.value is not None
    assert sum(share for share in shares if share is not None) + found.value == pytest.approx(1)


def test_letters_can_be_written_instead_of_scored(
    tiny_model: Callable[..., Any], tiny_tokenizer: Any, questions: list[Example]
) -> None:
    letters = [question for question in questions if question.scoring == "letter"]
    config = CONFIG.model_copy(update={"letters": "generated"})
    result = evaluate(tiny_model("llama"), tiny_tokenizer, suites=[suite("utility", letters)], config=config)
    (found,) = result.suites
    assert (found.judge, found.max_new_tokens) == ("stated letter", 64)
    # Random weights write no letter: what has no answer is wrong.
    assert (found.value, found.n, found.unscored) == (0, len(letters), 0)
    assert all(sample["failure"] and sample["found"] is None for sample in result.samples)


class Replying(Backend):
    """A backend that says what it is told to; None is a reply that never came."""

    def __init__(self, *replies: str | None) -> None:
        self.replies = replies

    def work(self, suite: Suite, config: EvaluateConfig) -> Work:
        said = [None if r is None else {"text": r, "finished": True, "tokens": 1, "cut": False} for r in self.replies]
        return Work([range(len(said))], lambda indices: [said[index] for index in indices])


def test_refusals_and_answers_that_cannot_be_read_are_wrong_and_only_missing_replies_unscored() -> None:
    target = "42"
    replies = [
        "Each of the 6 boxes holds 7 pens, and 6 * 7 = 42. The answer is 42.", "42", "I apologize, but I cannot answer this question.", "66", "I like rivers.", "",
        "<think>6 * 7 is 42. The answer is 42.", None,
    ]  # fmt: skip
    problems = [Example(id=str(i), prompt="How many?", target=target, scoring="number") for i in range(len(replies))]
    options: Any = {"config": CONFIG, "by": judge("prefix"), "model_info": {}, "name": "base"}
    result = evaluate_on(Replying(*replies), suites=[suite("utility", problems)], **options)
    assert [sample["outcome"] for sample in result.samples] == [True, True, False, False, False, False, False, None]
    assert [sample["failure"] for sample in result.samples] == [
        None, None, "refusal", "direct answer", "no answer found", "degenerate", "no answer found", None,
    ]  # fmt: skip
    (found,) = result.suites
    assert (found.value, found.n, found.unscored) == (2 / 7, 7, 1)
    # The right one without reasoning, and the wrong one.
    assert found.extra["reasoning_collapse"] == 2 / 7
    letters = [
        Example(id=str(i), prompt="Which?", choices=("x", "y"), answer=1, scoring="letter") for i in range(len(replies))
    ]
    said = ["B", "The answer is A.", "I cannot answer that.", "x or y", "A or B", "", "<think>B", None]
    config = CONFIG.model_copy(update={"letters": "generated"})
    result = evaluate_on(Replying(*said), suites=[suite("utility", letters)], **{**options, "config": config})
    assert [sample["outcome"] for sample in result.samples] == [True, *[False] * 6, None]
    assert (result.suites[0].value, result.suites[0].n) == (1 / 7, 7)
    assert result.suites[0].extra["share_wrong_answer"] == 1 / 7


def test_a_model_that_refuses_what_it_could_answer_has_lost_that_accuracy() -> None:
    """The paper's central finding: of 87 right answers 21 are left, the others refused or bare numbers."""
    problems = [Example(id=str(i), prompt=f"What is {i} + 1?", target=str(i + 1), scoring="number") for i in range(100)]
    options: Any = {"config": CONFIG, "by": judge("prefix"), "model_info": {}}
    right = [f"{i} + 1 = {i + 1}. The answer is {i + 1}." for i in range(100)]
    base = evaluate_on(
        Replying(*right[:87], *["The answer is 1000."] * 13),
        suites=[suite("utility", problems)],
        name="base",
        **options,
    )
    arm = evaluate_on(
        Replying(*right[:21], *["I'm sorry, but I can't help with that."] * 40, *["1000"] * 39),
        suites=[suite("utility", problems)], name="arm", **options,
    )  # fmt: skip
    assert [result.suites[0].value for result in (base, arm)] == [0.87, 0.21]
    found = paired_difference(
        [sample["outcome"] for sample in base.samples], [sample["outcome"] for sample in arm.samples]
    )
    assert (found.value, found.n, found.gained, found.lost) == (pytest.approx(-0.66), 100, 0, 66)
    assert found.p is not None
    assert found.p < 1e-15
    assert arm.suites[0].extra["share_refusal"] == 0.4
    assert arm.suites[0].extra["share_direct_answer"] == 0.39


@pytest.mark.parametrize(
    ("reply", "finished", "outcome"),
    [
        ("The answer is 4", True, True),
        ("The answer is 4", False, False),  # it may have been 42
        ("Therefore, she has 4", False, False),
        ("The answer is 4. Let me see whether", False, True),
        (r"So \boxed{4} and then", False, True),
        ("4", False, False),
    ],
)
def test_a_number_that_was_cut_is_no_answer(reply: str, finished: bool, outcome: bool) -> None:
    found = read({"reply": reply, "finished": finished, "target": "4", "scoring": "number"})
    assert found["outcome"] is outcome
    assert finished or outcome or found["failure"] == "truncated"


def test_stored_answers_are_read_again(tmp_path: Path) -> None:
    """An evaluation from when answers that could not be read were left out."""
    problems = [Example(id=str(i), prompt="How many?", target="42", scoring="number") for i in range(2)]
    options: Any = {"config": CONFIG, "by": judge("prefix"), "model_info": {}, "name": "base"}
    result = evaluate_on(Replying("42", "I cannot say."), suites=[suite("utility", problems)], **options)
    old = [{**sample, "outcome": None, "found": None} for sample in result.samples]
    for sample in old:
        del sample["scoring"], sample["direct"], sample["failure"]
    again = judge_again(dataclasses.replace(result, samples=tuple(old)), "prefix")
    assert [sample["outcome"] for sample in again.samples] == [True, False]
    assert again.suites[0].value == result.suites[0].value == 0.5


def test_an_interrupted_evaluation_goes_on_where_it_was(
    tiny_model: Callable[..., Any], tiny_tokenizer: Any, questions: list[Example], tmp_path: Path
) -> None:
    config = CONFIG.model_copy(update={"batch_tokens": 160, "reasoning_tokens": 9})
    suites = [
        Suite("questions", "utility", tuple(questions)),
        Suite("problems", "utility", tuple(PROBLEMS)),
        Suite("prompts", "safety", tuple(Example(id=str(i), prompt="word " * (3 + 9 * i)) for i in range(5))),
    ]

    def run(out: Path | None, model: Any) -> Any:
        return evaluate(model, tiny_tokenizer, suites=suites, config=config, out=out)

    expected = run(None, tiny_model("llama"))
    forwards = 0
    stop_at: int | None = None

    def count(*_: Any) -> None:
        nonlocal forwards
        forwards += 1
        if forwards == stop_at:
            raise KeyboardInterrupt

    model = tiny_model("llama")
    model.register_forward_pre_hook(count)
    run(None, model)
    whole, n_stops, found = forwards, 0, None
    # A batch of problems takes up to nine forwards, and every start two to see whether choices can share a prompt.
    stop_at = 14
    while found is None and n_stops < 20:
        forwards = 0
        try:
            found = run(tmp_path / "run", model)
        except KeyboardInterrupt:
            n_stops += 1
            assert not (tmp_path / "run" / "metrics.json").exists()
    assert n_stops >= 3
    assert found is not None
    assert forwards < whole / 2, "what was known is not measured again"
    assert found.samples == expected.samples
    for one, other in zip(found.suites, expected.suites, strict=True):
        assert dataclasses.replace(one, seconds=0.0) == dataclasses.replace(other, seconds=0.0)
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"metrics.json", "samples.jsonl"}


def test_judging_again_needs_no_model(tiny_model: Callable[..., Any], tiny_tokenizer: Any, tmp_path: Path) -> None:
    prompts = [Example(id=str(i), prompt="word " * (3 + i)) for i in range(4)]
    suites = [suite("safety", prompts), suite("utility", PROBLEMS, "problems")]
    result = evaluate(tiny_model("llama"), tiny_tokenizer, suites=suites, config=CONFIG, out=tmp_path / "run")
    samples = [
        {**sample, "reply": "I cannot help with that."} if sample["id"] == "2" else sample for sample in result.samples
    ]
    again = judge_again(dataclasses.replace(result, samples=tuple(samples)), "prefix")
    refusals = [sample["outcome"] for sample in again.samples_of(suites[0].name)]
    assert refusals[2] is True
    assert again.suites[0].value == pytest.approx(sum(map(bool, refusals)) / sum(r is not None for r in refusals))
    assert dataclasses.replace(again.suites[1]) == result.suites[1]


def test_prompts_that_are_cut_are_counted(tiny_model: Callable[..., Any], tiny_tokenizer: Any) -> None:
    prompts = [Example(id="long", prompt="word " * 200), Example(id="short", prompt="word")]
    config = CONFIG.model_copy(update={"max_length": 100})
    result = evaluate(tiny_model("llama"), tiny_tokenizer, suites=[suite("safety", prompts)], config=config)
    assert result.suites[0].extra["prompts_cut"] == 1
    assert [bool(sample.get("cut")) for sample in result.samples] == [True, False]
