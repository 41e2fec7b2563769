"""Work of evaluations: what is counted is what is run, and it grows as it should."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from shapes import counting, shape_of

from castune.config import EvaluateConfig
from castune.data.chat import ChatFormat
from castune.data.example import Example
from castune.errors import CastuneError
from castune.evaluation.run import evaluate
from castune.evaluation.suites import Suite
from castune.plan.evaluation import suite_work


def suites_of(questions: list[Example], harmful: list[Example]) -> list[Suite]:
    prompts = tuple(replace(example, reply=None) for example in harmful)
    letters = tuple(example for example in questions if example.scoring == "letter")
    return [Suite("questions", "utility", letters), Suite("prompts", "safety", prompts)]


def test_the_counted_evaluation_is_the_one_that_runs(
    questions: list[Example], harmful: list[Example], tiny_model: Callable[..., Any], tiny_tokenizer: Any
) -> None:
    model = tiny_model("llama")
    config = EvaluateConfig(batch_tokens=700, max_new_tokens=12, max_length=400)
    chat = ChatFormat(tiny_tokenizer, max_length=config.max_length)
    for suite in suites_of(questions, harmful):
        with counting(model) as forwards:
            result = evaluate(model, tiny_tokenizer, suites=[suite], config=config)
        work = suite_work(shape_of(model.config), chat, suite, config, reply=12).work
        # What looks for the heads and tries shared prompts is shorter than any prompt here.
        whole = [size for size in forwards if size[1] > 8]
        steps = [size for size in forwards if size[1] == 1]
        assert work.forwards == len(whole)
        assert work.tokens == sum(n_rows * length for n_rows, length in whole)
        if suite.name == "prompts":
            # A random model ends few replies by itself. The first token comes of the forward over the prompts.
            assert work.steps - work.forwards == len(steps)
            assert work.step_tokens >= sum(sample["tokens"] for sample in result.samples)
        else:
            assert work.steps == work.step_tokens == 0


def test_evaluations_grow_with_what_they_do(
    questions: list[Example], harmful: list[Example], tiny_model: Callable[..., Any], tiny_tokenizer: Any
) -> None:
    shape, chat = shape_of(tiny_model("llama").config), ChatFormat(tiny_tokenizer)
    config = EvaluateConfig(batch_tokens=300, max_new_tokens=64)
    scored, generated = suites_of(questions, harmful)
    usual = suite_work(shape, chat, generated, config).work
    longer = suite_work(shape, chat, generated, EvaluateConfig(batch_tokens=300, max_new_tokens=128)).work
    shorter = suite_work(shape, chat, generated, config, reply=10).work
    more = replace(generated, examples=tuple(replace(e, id=f"{e.id}{k}") for e in generated.examples for k in "ab"))
    doubled = suite_work(shape, chat, more, config).work
    assert longer.steps >= 2 * usual.steps
    assert shorter.steps == usual.steps
    assert shorter.step_tokens < usual.step_tokens < longer.step_tokens
    assert doubled.step_tokens == 2 * usual.step_tokens
    letters = suite_work(shape, chat, scored, EvaluateConfig(letters="generated")).work
    assert letters.steps > 0 == suite_work(shape, chat, scored, config).work.steps
    with pytest.raises(CastuneError, match="at least 1"):
        suite_work(shape, chat, generated, config, reply=0)
