"""The work of an evaluation, from shapes and lengths alone: nothing is run.

Batches are made by the evaluation's own code, so padding and forwards are those that will be run. Unknown beforehand is
how long replies get: `REPLY_TOKENS`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from castune.config import EvaluateConfig
from castune.core.batching import ExampleBatch
from castune.core.generation import ROUND
from castune.core.losses import batches_by_length
from castune.core.scoring import question_rows
from castune.data.chat import ChatFormat
from castune.data.rows import Row
from castune.errors import CastuneError
from castune.evaluation.backend import (
    DECODED,
    choice_batches,
    divergence_rows,
    likelihood_rows,
    margin_rows,
    reply_batches,
)
from castune.evaluation.suites import Suite
from castune.plan.shape import ModelShape
from castune.plan.speed import Sample
from castune.plan.work import Size, Work, forward

# Assumed mean lengths of replies, within their limit: worked answers of a model of 7 to 8 billion parameters about
# twice as long as the data's own solutions; letters with a sentence around them; refusals and answers to prompts.
REPLY_TOKENS = {"gsm8k": 200, "math": 500}
_WORKED_TOKENS, _LETTER_TOKENS, _PROMPT_TOKENS = 200, 16, 150
# Tokens of keys and values of the batch with which decoding is timed here.
_TIMED_CONTEXT = 8192


@dataclass(frozen=True)
class SuiteWork:
    """Work of one suite, and what it is timed on."""

    work: Work
    sample: Sample


def reply_tokens(suite: Suite, config: EvaluateConfig) -> int:
    """Assumed tokens of a reply in the mean."""
    first = suite.examples[0]
    usual = _LETTER_TOKENS if first.is_question else _WORKED_TOKENS if first.is_problem else _PROMPT_TOKENS
    return min(suite.reply_tokens(config), REPLY_TOKENS.get(suite.name, usual))


def suite_work(
    shape: ModelShape, chat: ChatFormat, suite: Suite, config: EvaluateConfig, *, reply: int | None = None
) -> SuiteWork:
    """The work of one suite on one model, by transformers in one process.

    Args:
        shape: of the model.
        chat: the model's tokenizer and template, with the evaluation's `max_length`.
        suite: the suite.
        config: settings.
        reply: tokens of a reply in the mean; assumed when absent (`reply_tokens`).
    """
    if reply is not None and reply < 1:
        raise CastuneError(f"replies of {reply} tokens: accepted: at least 1")
    if suite.is_scored(config):
        return _scored_work(shape, chat, suite, config)
    limit = suite.reply_tokens(config)
    mean = min(limit, reply or reply_tokens(suite, config))
    # A reply leaves its batch at the end of a round.
    decoded = min(limit, mean + ROUND // 2)
    prompts = [chat.prompt_ids(example)[0] for example in suite.examples]
    work, batches = Work(), []
    for together in reply_batches(prompts, limit, config.batch_tokens):
        lengths = [len(prompts[i]) + limit for i in together]
        batches += [[together[i] for i in part] for part in batches_by_length(lengths, DECODED * config.batch_tokens)]
    for batch in batches:
        length = max(len(prompts[i]) for i in batch)
        prefill = forward(shape.flops, Size(len(batch), length, len(batch)))
        # The longest reply of a batch is taken to reach the limit, unless all are as long as the mean.
        n_decoded = len(batch) * decoded
        work += replace(prefill, steps=limit, step_tokens=n_decoded, context=n_decoded * (length + (decoded + 1) / 2))
    middle = sorted(prompts, key=len)[len(prompts) // 2]
    return SuiteWork(work, _reply_sample(middle, mean, max(map(len, batches)), config))


def _reply_sample(prompt: Sequence[int], reply: int, n_replies: int, config: EvaluateConfig) -> Sample:
    """A forward over a prompt, and decoding at a reply's middle, of as many replies as can be held here."""
    context = (list(prompt) * (1 + reply // len(prompt)))[: len(prompt) + reply // 2]
    return Sample(
        batch_tokens=config.batch_tokens,
        batches=[_batch([Row.of_replies(prompt, [prompt[-1:]])])],
        prompt=context,
        n_replies=max(2, min(n_replies, _TIMED_CONTEXT // len(context))),
    )


def _scored_work(shape: ModelShape, chat: ChatFormat, suite: Suite, config: EvaluateConfig) -> SuiteWork:
    rows_of = _scored_rows(chat, suite, config)
    batches: list[list[Row]] = []
    for together in choice_batches(rows_of, config.batch_tokens):
        rows = [row for i in together for row in rows_of[i]]
        lengths = [len(row.ids) for row in rows]
        batches += [[rows[i] for i in part] for part in batches_by_length(lengths, config.batch_tokens)]
    # A divergence takes the base model's logits beside the arm's.
    forwards = 2 if suite.purpose == "kl" else 1
    work = sum((forward(shape.flops, Size.of(batch)) for batch in batches), Work()) * forwards
    middle = batches[len(batches) // 2]
    return SuiteWork(work, Sample(batch_tokens=config.batch_tokens, batches=[_batch(middle)]))


def _scored_rows(chat: ChatFormat, suite: Suite, config: EvaluateConfig) -> list[list[Row]]:
    """Rows of each example. The base model's own replies are taken to be as long as they may be.

    They are generated once, whatever the number of arms, and not counted. Prompts are taken to be shared, as all
    architectures but a few let them be.
    """
    if suite.about.against_base:
        prompts = [chat.prompt_ids(example, reserve=config.reference_tokens)[0] for example in suite.examples]
        suite = suite.with_references([ids[-1:] * config.reference_tokens for ids in prompts])
        if suite.purpose != "kl":
            return margin_rows(chat, suite, config, share_prompt=True)
        return [[row] for row in divergence_rows(chat, suite)]
    if suite.purpose == "nll":
        return [[row] for row in likelihood_rows(chat, suite)]
    return [question_rows(chat, example, share_prompt=True) for example in suite.examples]


def _batch(rows: Sequence[Row]) -> ExampleBatch:
    return ExampleBatch(list(range(len(rows))), list(rows), [[(n, len(row.tokens))] for n, row in enumerate(rows)])
