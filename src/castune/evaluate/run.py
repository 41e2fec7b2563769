"""`evaluate`: accuracy, refusals and over-refusals of one model."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from castune.artifacts import EvalResult, SuiteResult
from castune.config import EvaluateConfig
from castune.core.generation import generate_replies
from castune.core.judges import judge as judge_named
from castune.core.modes import evaluation_mode
from castune.core.progress import progress
from castune.core.provenance import model_record, provenance
from castune.core.scoring import (
    answer_margin,
    choice_scores,
    is_correct,
    question_rows,
    score_rows,
    shared_if_exact,
)
from castune.data.chat import ChatFormat
from castune.data.example import content_hash
from castune.evaluate.stats import estimate
from castune.evaluate.suites import Suite, load_suite

Sample = dict[str, Any]


def evaluate(
    model: Any,
    tokenizer: Any,
    *,
    suites: Sequence[str | Suite] | None = None,
    config: EvaluateConfig | None = None,
    name: str = "base",
    out: str | Path | None = None,
    model_info: dict[str, Any] | None = None,
) -> EvalResult:
    """Evaluate a model, 0-shot and greedy, through its own chat template.

    Args:
        model: a transformers or PEFT model.
        tokenizer: its tokenizer, with a chat template.
        suites: sources or loaded suites; `config.suites` when absent.
        config: settings.
        name: name of this arm, for the record.
        out: directory to write `samples.jsonl` and `metrics.json` into.
        model_info: identity of the model, for the record; computed when absent.

    Returns:
        Every rate with n, standard error, unscored count and judge, and all samples.
    """
    config = config or EvaluateConfig()
    chat = ChatFormat(tokenizer, max_length=config.max_length)
    loaded = [
        load_suite(suite, limit=config.limit, seed=config.seed) if isinstance(suite, str) else suite
        for suite in (config.suites if suites is None else suites)
    ]
    results: list[SuiteResult] = []
    samples: list[Sample] = []
    with (
        evaluation_mode(model),
        progress(f"evaluating {name}", sum(len(suite.examples) for suite in loaded)) as advance,
    ):
        for suite in loaded:
            started = time.perf_counter()
            measure = _questions if suite.purpose == "utility" else _replies
            found = measure(model, tokenizer, chat, suite, config)
            results.append(_result(suite, found, config, time.perf_counter() - started))
            samples += found
            advance(len(suite.examples))
    result = EvalResult(
        name=name,
        suites=tuple(results),
        samples=tuple(samples),
        settings=config.model_dump(mode="json"),
        model=model_info or model_record(model),
        provenance=provenance(config.seed),
    )
    if out is not None:
        result.save(out)
    return result


def _questions(model: Any, _tokenizer: Any, chat: ChatFormat, suite: Suite, config: EvaluateConfig) -> list[Sample]:
    rows_of = shared_if_exact(model, lambda share: [question_rows(chat, e, share_prompt=share) for e in suite.examples])
    values = iter(score_rows(model, [row for rows in rows_of for row in rows], batch_tokens=config.batch_tokens))
    samples = []
    for example, rows in zip(suite.examples, rows_of, strict=True):
        scores = choice_scores(chat, example, [next(values) for _ in rows])
        samples.append(
            {
                "suite": suite.name,
                "id": example.id,
                "purpose": suite.purpose,
                "group": example.group,
                "prompt": example.prompt,
                "choices": list(example.choices),
                # Scores that are not finite decide nothing: the example is unscored.
                "choice_scores": [round(float(score), 6) if np.isfinite(score) else None for score in scores],
                "answer": example.answer,
                "margin": answer_margin(example, scores) if np.isfinite(scores).all() else None,
                "outcome": is_correct(example, scores) if np.isfinite(scores).all() else None,
            }
        )
    return samples


def _replies(model: Any, tokenizer: Any, chat: ChatFormat, suite: Suite, config: EvaluateConfig) -> list[Sample]:
    prompts = [chat.prompt_ids(example, reserve=config.max_new_tokens)[0] for example in suite.examples]
    replies = generate_replies(
        model,
        tokenizer,
        prompts,
        max_new_tokens=config.max_new_tokens,
        end_tokens=chat.end_tokens(model),
        batch_tokens=config.batch_tokens,
    )
    verdicts = judge_named(config.judge)([e.prompt for e in suite.examples], [reply.text for reply in replies])
    return [
        {
            "suite": suite.name,
            "id": example.id,
            "purpose": suite.purpose,
            "group": example.group,
            "prompt": example.prompt,
            "reply": reply.text,
            "finished": reply.finished,
            "outcome": verdict,
        }
        for example, reply, verdict in zip(suite.examples, replies, verdicts, strict=True)
    ]


def _result(suite: Suite, samples: Sequence[Sample], config: EvaluateConfig, seconds: float) -> SuiteResult:
    is_utility = suite.purpose == "utility"
    rate = estimate([sample["outcome"] for sample in samples])
    extra: dict[str, float | None] = {}
    if is_utility:
        margin = estimate([sample["margin"] for sample in samples])
        extra = {"answer_margin": margin.value, "answer_margin_standard_error": margin.standard_error}
    metric = {"utility": "accuracy", "safety": "refusal_rate", "over-refusal": "over_refusal_rate"}[suite.purpose]
    return SuiteResult(
        suite=suite.name,
        purpose=suite.purpose,
        metric=metric,
        value=rate.value,
        standard_error=rate.standard_error,
        n=rate.n,
        unscored=rate.unscored,
        judge="argmax" if is_utility else config.judge,
        max_new_tokens=None if is_utility else config.max_new_tokens,
        extra=extra,
        data_hash=content_hash(suite.examples),
        seconds=round(seconds, 2),
    )
