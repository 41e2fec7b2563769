"""The default model by lm-eval's protocol and by castune's, on the same prompts: one question at a time."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model

import castune
from castune.artifacts.lm_eval_result import LmEvalResult
from castune.data.example import LETTERS, Example
from castune.evaluation.lm_eval import lm_eval_results
from castune.evaluation.suites import Suite

pytest.importorskip("lm_eval")

import lm_eval.evaluator

pytestmark = pytest.mark.real

N = 24


@pytest.fixture(scope="module")
def questions() -> list[Example]:
    """Four choices each, the letter of the right one asked for."""
    found = [example for example in castune.examples("starter-utility-eval") if len(example.choices) == 4][:N]
    assert len(found) == N
    return [dataclasses.replace(example, scoring="letter") for example in found]


@pytest.fixture
def folder(questions: list[Example], tmp_path: Path) -> Path:
    """castune's prompt as a task of lm-eval."""
    file = tmp_path / "questions.jsonl"
    rows = [{"user_text": example.user_text, "answer": example.answer} for example in questions]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "task": "castune_letters", "output_type": "multiple_choice", "dataset_path": "json", "test_split": "test",
        "dataset_kwargs": {"data_files": {"test": str(file)}, "cache_dir": str(tmp_path / "cache")},
        "doc_to_text": "user_text", "doc_to_choice": list(LETTERS[:4]), "doc_to_target": "answer",
        "target_delimiter": "", "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        "metadata": {"version": 1},
    }  # fmt: skip
    (tmp_path / "task.yaml").write_text(yaml.safe_dump(task))
    return tmp_path


@pytest.fixture
def letters_of(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[LmEvalResult, np.ndarray]]:
    """The result, and the log-likelihoods of the letters of every question."""
    evaluate, kept = lm_eval.evaluator.evaluate, []

    def evaluate_and_look(*args: Any, **settings: Any) -> Any:
        found = evaluate(*args, **{**settings, "log_samples": True})
        rows = sorted(found["samples"]["castune_letters"], key=lambda row: row["doc_id"])
        kept.append(np.array([[score for score, _ in row["filtered_resps"]] for row in rows]))
        return found

    monkeypatch.setattr(lm_eval.evaluator, "evaluate", evaluate_and_look)

    def measured(model: Any, tokenizer: Any, n: int) -> tuple[LmEvalResult, np.ndarray]:
        result = lm_eval_results(
            model, tokenizer, tasks=["castune_letters"], include_path=folder, apply_chat_template=True, limit=n
        )
        return result, kept[-1]

    return measured


def assert_protocols_agree(
    model: Any, tokenizer: Any, questions: list[Example], letters_of: Callable[..., tuple[LmEvalResult, np.ndarray]]
) -> np.ndarray:
    """Returns the log-probabilities of the letters."""
    n = len(questions)
    result, found_NC = letters_of(model, tokenizer, n)
    ours = castune.evaluate(model, tokenizer, suites=[Suite("own", "utility", tuple(questions))])
    scores_NC = np.array([sample["choice_scores"] for sample in ours.samples])
    # lm-eval scores the newline before the letter too, which is one number a question.
    newline_NC = found_NC - scores_NC
    np.testing.assert_allclose(newline_NC, newline_NC.mean(1, keepdims=True).repeat(4, 1), rtol=0, atol=1e-4)
    right = [bool(row.argmax() == example.answer) for row, example in zip(found_NC, questions, strict=True)]
    assert right == [sample["outcome"] for sample in ours.samples]

    [score], [suite] = result.tasks, ours.suites
    assert 0 < sum(right) < n
    assert score.value == suite.value == sum(right) / n
    assert score.standard_error == pytest.approx(suite.standard_error)
    assert score.n == suite.n == n
    return scores_NC


@pytest.mark.slow
def test_letters_of_both_protocols_agree_one_by_one(
    default_model: tuple[Any, Any],
    questions: list[Example],
    letters_of: Callable[..., tuple[LmEvalResult, np.ndarray]],
    all_threads: None,
) -> None:
    model, tokenizer = default_model
    base_NC = assert_protocols_agree(model, tokenizer, questions, letters_of)

    torch.manual_seed(1)
    # Strong enough that other letters win.
    lora = LoraConfig(r=4, lora_alpha=32, target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    adapted = get_peft_model(model, lora)
    try:
        adapted_NC = assert_protocols_agree(adapted, tokenizer, questions[:8], letters_of)
    finally:
        adapted.unload()
        for parameter in model.parameters():
            parameter.requires_grad_(True)
    assert np.abs(adapted_NC - base_NC[:8]).max() > 0.1
    assert (adapted_NC.argmax(1) != base_NC[:8].argmax(1)).any()
