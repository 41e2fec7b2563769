"""What is refused before anything is computed: examples no template or vocabulary takes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from castune.config import DiagnoseConfig, EvaluateConfig, TuneConfig
from castune.core.loading import LoadedModel
from castune.data.example import Example, Message
from castune.errors import DataError
from castune.evaluation.suites import Suite
from castune.steps.readiness import calibration_tokens, require_ready, suite_tokens, training_tokens

ALIGN = [Example(id=f"a{n}", prompt=f"Say {n}.", reply=f"{n}!", rejected="no") for n in range(3)]


def everything(tokenizer: Any, safety: list[Example], utility: list[Example], align: list[Example]) -> list[Any]:
    suites = [Suite("prompts", "safety", tuple(safety)), Suite("questions", "utility", tuple(utility[:3]))]
    return [
        calibration_tokens(tokenizer, DiagnoseConfig(), safety, utility),
        training_tokens(tokenizer, [TuneConfig(), TuneConfig(method="dpo")], align),
        suite_tokens(tokenizer, EvaluateConfig(), suites),
    ]


def test_good_data_is_ready(
    tiny_model: Callable[..., Any], tiny_tokenizer: Any, harmful: list[Example], questions: list[Example]
) -> None:
    sets = everything(tiny_tokenizer, harmful, questions, ALIGN)
    require_ready(LoadedModel(tiny_model("llama"), tiny_tokenizer), *sets)


@pytest.mark.parametrize("where", ["safety", "utility", "training data", "suite"])
def test_a_conversation_that_the_template_refuses_is_named_whatever_set_it_is_in(
    tiny_model: Callable[..., Any], tiny_tokenizer: Any, harmful: list[Example], questions: list[Example], where: str
) -> None:
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('No system turns') }}{% endif %}"
        + tokenizer.chat_template
    )
    system = (Message("system", "Be brief."),)
    sets: dict[str, list[Any]] = {"safety": harmful, "utility": questions, "training data": ALIGN, "suite": []}
    bad = replace((sets[where] or harmful)[-1], id="the-bad-one", history=system)
    sets[where] = [*sets[where][:-1], bad]
    found = everything(tokenizer, sets["safety"], sets["utility"], sets["training data"])
    if where == "suite":
        found.append(suite_tokens(tokenizer, EvaluateConfig(), [Suite("s", "safety", (harmful[0], bad))]))
    with pytest.raises(DataError, match="'the-bad-one'.*refuses this conversation.*No system turns"):
        require_ready(LoadedModel(tiny_model("llama"), tokenizer), *found)


def test_a_token_without_an_embedding_is_named(
    tiny_model: Callable[..., Any], tiny_tokenizer: Any, harmful: list[Example], questions: list[Example]
) -> None:
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.add_tokens(["zebra"])
    model = tiny_model("llama", vocab_size=len(tiny_tokenizer))
    # As some models are shipped: a token more than the embedding has rows, which no text holds.
    require_ready(LoadedModel(model, tokenizer), *everything(tokenizer, harmful, questions, ALIGN))
    bad = [*ALIGN, Example(id="z", prompt="A zebra?", reply="Yes.", rejected="No.")]
    with pytest.raises(DataError, match="training data: example 'z' contains token 'zebra'.*only 258 embeddings"):
        require_ready(LoadedModel(model, tokenizer), *everything(tokenizer, harmful, questions, bad))
