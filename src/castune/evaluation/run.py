"""`evaluate`: accuracy, refusals and over-refusals of one model. A run that was killed goes on where it was."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict, cast

from castune.artifacts import EvalResult
from castune.artifacts.records import ModelRecord
from castune.artifacts.samples import (
    ChoiceSample,
    LetterSample,
    NumberSample,
    ProblemSample,
    ReplySample,
    Sample,
    is_reply,
)
from castune.config import EvaluateConfig
from castune.core.journal import Journal
from castune.core.progress import progress
from castune.core.provenance import model_record, provenance
from castune.core.scoring import answer_margin, is_correct
from castune.data.example import Example, content_hash
from castune.evaluation.backend import Answer, Backend, PlainReply, Scored, Scores, TransformersHost
from castune.evaluation.judges import judge
from castune.evaluation.judging import judge_of, judged
from castune.evaluation.measure import answers, finite, with_references
from castune.evaluation.metrics import suite_result
from castune.evaluation.reading import read
from castune.evaluation.suites import Suite, check_names, load_suite
from castune.evaluation.verdict import Judge

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    suites: Sequence[str | Suite] | None = None,
    config: EvaluateConfig | None = None,
    name: str = "base",
    out: str | Path | None = None,
    model_info: ModelRecord | None = None,
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
    with TransformersHost(model, tokenizer).backend(name, None) as backend:
        return evaluate_on(
            backend,
            suites=[
                load_suite(suite, limit=config.limit, seed=config.seed) if isinstance(suite, str) else suite
                for suite in (config.suites if suites is None else suites)
            ],
            config=config,
            by=judge(config.judge),
            name=name,
            out=out,
            model_info=model_info or model_record(model, tokenizer),
        )


def evaluate_on(
    backend: Backend,
    *,
    suites: Sequence[Suite],
    config: EvaluateConfig,
    by: Judge,
    name: str,
    model_info: ModelRecord,
    out: str | Path | None = None,
    references: Mapping[str, Sequence[Sequence[int]]] | None = None,
) -> EvalResult:
    """Evaluate a model wherever it runs.

    Args:
        backend: where it runs.
        suites: loaded suites.
        config: settings.
        by: the judge, whatever `config` names.
        name: name of this arm, for the record.
        model_info: identity of the model, for the record.
        out: directory to write `samples.jsonl` and `metrics.json` into.
        references: the base model's own replies as tokens, by suite (`references_of`); generated where absent.
    """
    check_names(suites)
    record = provenance(config.seed)
    hashes = [content_hash(suite.examples) for suite in suites]
    # The judge decides afterwards, on what is kept; what else is measured changes nothing here.
    settings = config.model_dump(mode="json")
    measured_by = {key: value for key, value in settings.items() if key not in ("judge", "strengths")}
    key = [model_info, measured_by, hashes, record["versions"]["castune"], record["rules"]]
    journal = Journal.of(None if out is None else Path(out), key)
    suites = [with_references(backend, suite, config, journal, (references or {}).get(suite.name)) for suite in suites]
    cost = sum(len(suite.examples) * suite.cost(config) for suite in suites)
    with progress(f"evaluating {name}", cost) as advance:
        found = [answers(backend, suite, config, journal, advance) for suite in suites]
    of_suites = [judged(_samples(suite, given.values, config), by) for suite, given in zip(suites, found, strict=True)]
    results = [
        suite_result(
            samples,
            judge=judge_of(samples, by),
            max_new_tokens=None if suite.is_scored(config) else suite.reply_tokens(config),
            data_hash=data_hash,
            seconds=given.seconds,
        )
        for suite, samples, given, data_hash in zip(suites, of_suites, found, hashes, strict=True)
    ]
    samples = [sample for of_suite in of_suites for sample in of_suite]
    n_missing = sum(is_reply(sample) and sample.get("missing", False) for sample in samples)
    if n_missing:
        logger.warning("%s: %d replies are missing and unscored; the same command asks for them again", name, n_missing)
    result = EvalResult(
        name=name,
        suites=tuple(results),
        samples=tuple(samples),
        settings={**config.model_dump(mode="json"), "judge": by.name},
        model=model_info,
        provenance=record,
    )
    if out is not None:
        result.save(out)
        if not n_missing:
            journal.remove()
    return result


def _samples(suite: Suite, answers: Sequence[Answer], config: EvaluateConfig) -> list[Sample]:
    """A plain record an example; of prompts without an outcome, which is the judge's."""
    both = list(zip(suite.examples, answers, strict=True))
    if suite.about.is_continuous:
        references = suite.references or (None,) * len(both)
        return [
            _number_sample(suite, example, cast("Scored | None", answer), reference)
            for (example, answer), reference in zip(both, references, strict=True)
        ]
    if suite.is_scored(config):
        return [_choice_sample(suite, example, cast("Scores | None", answer)) for example, answer in both]
    return [_reply_sample(suite, example, cast("PlainReply | None", answer)) for example, answer in both]


class _About(TypedDict):
    suite: str
    id: str
    purpose: str
    group: str | None
    prompt: str


def _about(suite: Suite, example: Example) -> _About:
    return {
        "suite": suite.name,
        "id": example.id,
        "purpose": suite.purpose,
        "group": example.group,
        "prompt": example.prompt,
    }


def _choice_sample(suite: Suite, example: Example, found: Scores | None) -> ChoiceSample:
    scores = finite(found)
    return {
        **_about(suite, example),
        "choices": list(example.choices),
        "choice_scores": [None if score is None else round(score, 6) for score in found or []],
        "answer": example.answer,
        # Scores that are not finite decide nothing: the example is unscored.
        "margin": None if scores is None else answer_margin(example, scores),
        "outcome": None if scores is None else is_correct(example, scores),
    }


def _number_sample(
    suite: Suite, example: Example, found: Scored | None, reference: Sequence[int] | None
) -> NumberSample:
    sample: NumberSample = {
        **_about(suite, example),
        "outcome": None if found is None else found["value"],
        "scored_tokens": None if found is None else found["tokens"],
    }
    if reference is not None:
        sample["reference"] = list(reference)
    return sample


def _reply_sample(suite: Suite, example: Example, found: PlainReply | None) -> Sample:
    sample = cast(ReplySample, {**_about(suite, example), "reply": "", "finished": False, "tokens": None})
    if found is None:
        # A server gave none: nothing is known of what the model would have said.
        sample["missing"] = True
    else:
        sample |= {"reply": found["text"], "finished": found["finished"], "tokens": found["tokens"]}
        if found["cut"]:
            sample["cut"] = True
        # Where it is not known whether the chat template opened the reasoning (a server's), the key is absent.
        if found.get("in_thought"):
            sample["in_thought"] = True
    if example.is_question:
        return read(cast(LetterSample, {**sample, "choices": list(example.choices), "answer": example.answer}))
    if example.is_problem:
        return read(cast(ProblemSample, {**sample, "target": str(example.target), "scoring": str(example.scoring)}))
    return {**sample, "outcome": None}
