"""Problems with worked solutions as D_util: margins are log-probabilities of the solutions, by brute force too."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

import castune
from castune.config import DiagnoseConfig
from castune.data.chat import ChatFormat
from castune.data.example import Example
from castune.errors import CastuneError, DataError

MARGIN = DiagnoseConfig(measure="margin", max_new_tokens=4, gradient_chunks=2)


@pytest.fixture
def problems() -> list[Example]:
    return [
        Example(id=f"p{n}", prompt=f"What is {n} + 2?", reply=f"{n} + 2 = {n + 2}, so {n + 2}.", target=str(n + 2), scoring="number")
        for n in range(4)
    ]  # fmt: skip


def solution_log_probability(model: Any, tokenizer: Any, example: Example) -> float:
    """Mean log-probability a token of the solution and the end of turn, one plain forward."""
    chat = ChatFormat(tokenizer)
    prompt, _ = chat.prompt_ids(example)
    reply = chat.reply_ids(example.reply or "")
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, *reply]])).logits[0].float().log_softmax(-1)
    at = range(len(prompt) - 1, len(prompt) + len(reply) - 1)
    return float(np.mean([logits[i, token].item() for i, token in zip(at, reply, strict=True)]))


def test_the_shift_of_every_head_by_brute_force(
    tiny_model: Callable[..., Any], tiny_tokenizer: Any, problems: list[Example], harmful: list[Example]
) -> None:
    model = tiny_model("llama")
    cmap = castune.diagnose(model, tiny_tokenizer, safety=harmful, utility=problems, config=MARGIN)
    whole = np.array([solution_log_probability(model, tiny_tokenizer, p) for p in problems])
    for (layer, head), shift in zip(cmap.heads, cmap.column("utility_shift"), strict=True):
        projection = model.model.layers[layer].self_attn.o_proj
        before = projection.weight.detach().clone()
        with torch.no_grad():
            projection.weight[:, 8 * head : 8 * head + 8] = 0
        without = np.array([solution_log_probability(model, tiny_tokenizer, p) for p in problems])
        with torch.no_grad():
            projection.weight.copy_(before)
        assert shift == pytest.approx(np.abs(without - whole).mean(), abs=1e-5)
    # Nothing was answered, so there is no accuracy; it is not zero.
    assert cmap.metadata["baseline"]["utility_accuracy"] == {
        "value": None,
        "standard_error": None,
        "n": 0,
        "unscored": 4,
    }


def test_decisions_on_problems_are_refused(
    tiny_model: Callable[..., Any], tiny_tokenizer: Any, problems: list[Example], harmful: list[Example]
) -> None:
    with pytest.raises(CastuneError, match=r"problems are measured by margins.*--measure margin"):
        castune.diagnose(tiny_model("llama"), tiny_tokenizer, safety=harmful, utility=problems)


def test_sets_that_mix_problems_and_questions_or_lack_solutions(
    tiny_model: Callable[..., Any],
    tiny_tokenizer: Any,
    problems: list[Example],
    questions: list[Example],
    harmful: list[Example],
) -> None:
    model = tiny_model("llama")
    for bad, said in (
        ([problems[0], questions[0]], "no problem with a worked solution"),
        ([questions[0], problems[0]], "no multiple-choice question"),
        ([problems[0], replace(problems[1], reply=None)], "no problem with a worked solution"),
    ):
        with pytest.raises(DataError, match=said):
            castune.diagnose(model, tiny_tokenizer, safety=harmful, utility=bad, config=MARGIN)


def test_problems_beside_questions_as_domains(
    tiny_model: Callable[..., Any],
    tiny_tokenizer: Any,
    problems: list[Example],
    questions: list[Example],
    harmful: list[Example],
) -> None:
    model = tiny_model("llama")
    both = castune.diagnose(
        model, tiny_tokenizer, safety=harmful, utility={"maths": problems, "facts": questions}, config=MARGIN
    )
    alone = castune.diagnose(model, tiny_tokenizer, safety=harmful, utility=problems, config=MARGIN)
    assert both.domains["maths"].table.equals(alone.table)
