"""Problems with worked solutions as D_util: margins are log-probabilities of the solutions, by brute force too."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import castune
from castune.config import DiagnoseConfig
from castune.data.chat import ChatFormat
from castune.data.example import Example
from castune.diagnosis.objectives import Objectives
from castune.diagnosis.stored import stored_measurements
from castune.errors import DataError

MARGIN = DiagnoseConfig(measure="margin", max_new_tokens=4, gradient_chunks=2)


@pytest.fixture
def problems() -> list[Example]:
    return [
        Example(id=f"p{n}", prompt=f"What is {n} + 2?", reply=f"{n} + 2 = {n + 2}, so {n + 2}.", target=str(n + 2), scoring="number")
        for n in range(4)
    ]  # fmt: skip


def solution_log_probability(model: Any, tokenizer: Any, example: Example) -> float:
    """Mean log-probability per token of the solution and the end of turn, one plain forward."""
    chat = ChatFormat(tokenizer)
    prompt, _ = chat.prompt_ids(example)
    reply = [*tokenizer(example.reply, add_special_tokens=False)["input_ids"], chat.end_token]
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


def test_solutions_beside_refusals_are_each_measured_their_own_way(
    tiny_model: Callable[..., Any],
    tiny_tokenizer: Any,
    problems: list[Example],
    questions: list[Example],
    harmful: list[Example],
    tmp_path: Path,
) -> None:
    """Tables 10 and 11 differ in the utility data alone: refusals are decisions in both."""
    model = tiny_model("llama")
    config = DiagnoseConfig(measure="decision", max_new_tokens=4, gradient_chunks=2)
    mixed = castune.diagnose(
        model, tiny_tokenizer, safety=harmful, utility=problems, config=config, out=tmp_path / "mixed"
    )
    by_margin = castune.diagnose(model, tiny_tokenizer, safety=harmful, utility=problems, config=MARGIN)
    by_decision = castune.diagnose(model, tiny_tokenizer, safety=harmful, utility=questions, config=config)
    np.testing.assert_array_equal(mixed.column("utility_shift"), by_margin.column("utility_shift"))
    np.testing.assert_array_equal(mixed.column("safety_shift"), by_decision.column("safety_shift"))
    assert mixed.metadata["measures"] == {"safety": "decision", "utility": "margin"}
    # What is stored beside it is read in the same way.
    stored_measurements(tmp_path / "mixed", mixed, "again")


def test_answers_without_every_head_by_brute_force(
    tiny_model: Callable[..., Any], tiny_tokenizer: Any, problems: list[Example], harmful: list[Example]
) -> None:
    """Every problem answered anew without every head, by plain greedy decoding, and its answer compared."""
    model, n_tokens = tiny_model("llama"), 6
    # A model of noise answers nothing: what it says without some head is made the right answer.
    chat = ChatFormat(tiny_tokenizer)

    def said(example: Example) -> str:
        ids, new = chat.prompt_ids(example, reserve=n_tokens)[0], []
        while len(new) < n_tokens:
            with torch.no_grad():
                token = int(model(torch.tensor([ids + new])).logits[0, -1].argmax())
            if token in chat.end_tokens(model):
                break
            new.append(token)
        return str(tiny_tokenizer.decode(new, skip_special_tokens=True))

    def without_each(measure: Callable[[], list[float]]) -> list[list[float]]:
        found = []
        for layer in model.model.layers:
            for head in range(4):
                weight = layer.self_attn.o_proj.weight
                before = weight.detach().clone()
                with torch.no_grad():
                    weight[:, 8 * head : 8 * head + 8] = 0
                    found.append(measure())
                    weight.copy_(before)
        return found

    def right(example: Example, text: str) -> bool:
        return bool(len(text) % 2) if example.id != "p0" else "a" in text

    def rights() -> list[float]:
        return [float(right(p, said(p))) for p in problems]

    config = DiagnoseConfig(
        measure="decision",
        max_new_tokens=4,
        gradient_chunks=2,
        problems="decision",
        solution_tokens=n_tokens,
        batch_tokens=256,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Objectives, "_is_right", lambda _, example, text: right(example, text))
        cmap = castune.diagnose(model, tiny_tokenizer, safety=harmful, utility=problems, config=config)
    answers = rights()
    shifts = [abs(np.mean(row) - np.mean(answers)) for row in without_each(rights)]
    np.testing.assert_allclose(cmap.column("utility_shift"), shifts, atol=1e-12)
    assert len(set(shifts)) > 1
    assert cmap.metadata["baseline"]["utility_accuracy"]["n"] == len(problems)
    assert cmap.metadata["measures"] == {"safety": "decision", "utility": "decision"}


def test_an_answer_that_reached_the_limit_is_read_without_its_last_sentence(
    tiny_model: Callable[..., Any], tiny_tokenizer: Any
) -> None:
    config = DiagnoseConfig(problems="decision", solution_tokens=40)
    objectives = Objectives(SimpleNamespace(model=None), tiny_tokenizer, ChatFormat(tiny_tokenizer), config)
    problem = Example(id="p", prompt="2 + 2?", reply="4", target="4", scoring="number")
    assert objectives._is_right(problem, "2 + 2 = 4. The answer is 4.")
    assert not objectives._is_right(problem, "I cannot help with that.")
    cut = "Two and two are four, so the answer is 4"
    assert len(cut) == 40
    assert not objectives._is_right(problem, cut)


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
