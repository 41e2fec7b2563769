"""What a model answered to one example of a suite: a line of `samples.jsonl`, a plain dictionary of one of five kinds.

The kind of a sample is told here and nowhere else.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NotRequired, TypeGuard

from typing_extensions import TypedDict


class _Sample(TypedDict):
    """What every sample has.

    Attributes:
        suite: the data source.
        id: of the example.
        purpose: of the suite (`castune.purposes`).
        group: category or subject; None without.
        prompt: of the example.
    """

    suite: str
    id: str
    purpose: str
    group: str | None
    prompt: str


class ChoiceSample(_Sample):
    """A question whose choices were scored.

    Attributes:
        outcome: whether the right one was chosen; None: unscored.
        choices: their texts.
        choice_scores: mean log-probability of each; None where it is not finite.
        answer: number of the right one.
        margin: `answer_margin`; None where a score is not finite.
    """

    outcome: bool | None
    choices: list[str]
    choice_scores: list[float | None]
    answer: int | None
    margin: float | None


class NumberSample(_Sample):
    """An example that was measured in nats.

    Attributes:
        outcome: nats per token; None: unscored.
        scored_tokens: over how many tokens.
        reference: tokens of the base model's own reply, where it was measured against that.
    """

    outcome: float | None
    scored_tokens: int | None
    reference: NotRequired[list[int]]


class ReplySample(_Sample):
    """A prompt and the model's reply, on which a judge decides.

    Attributes:
        outcome: whether it refuses, or the answer is right; None: unscored.
        reply: the text; empty where there is none.
        finished: whether the model ended it.
        tokens: how many; None where a server does not tell.
        missing: no reply came.
        cut: the prompt lost its beginning to the length limit.
        in_thought: the chat template had opened the reasoning.
        harmful: what a judge that tells it says of the reply.
        verdicts: of the members of a panel.
    """

    outcome: bool | None
    reply: str
    finished: bool
    tokens: int | None
    missing: NotRequired[bool]
    cut: NotRequired[bool]
    in_thought: NotRequired[bool]
    harmful: NotRequired[bool | None]
    verdicts: NotRequired[dict[str, bool | None]]


class AnswerSample(ReplySample):
    """A reply that is read for an answer.

    Attributes:
        found: the answer; None where none can be read.
        failure: why it is not right, one of `castune.evaluation.failures.FAILURES`.
    """

    found: NotRequired[str | None]
    failure: NotRequired[str | None]


class LetterSample(AnswerSample):
    """A question that was answered in words; `choices` and `answer` as in `ChoiceSample`."""

    choices: list[str]
    answer: int | None


class ProblemSample(AnswerSample):
    """A problem that was worked out.

    Attributes:
        target: the right answer.
        scoring: number | boxed; absent from samples of before it was kept.
        direct: an answer without the steps to it.
    """

    target: str
    scoring: NotRequired[str]
    direct: NotRequired[bool]


Sample = ChoiceSample | NumberSample | ReplySample | LetterSample | ProblemSample


def is_number(sample: Any) -> TypeGuard[NumberSample]:
    """Whether it was measured in nats."""
    return "scored_tokens" in sample


def is_choice(sample: Any) -> TypeGuard[ChoiceSample]:
    """Whether choices were scored."""
    return "choice_scores" in sample


def is_reply(sample: Any) -> TypeGuard[ReplySample]:
    """Whether the model replied in words, to whatever."""
    return "reply" in sample


def is_letter(sample: Any) -> TypeGuard[LetterSample]:
    """Whether a question was answered in words."""
    return "reply" in sample and "choices" in sample


def is_problem(sample: Any) -> TypeGuard[ProblemSample]:
    """Whether a problem was worked out."""
    return "reply" in sample and "target" in sample


def references_of(samples: Iterable[Sample]) -> dict[str, list[list[int]]]:
    """The base model's own replies, as tokens, by the suites that were measured on them."""
    found: dict[str, list[list[int]]] = {}
    for sample in samples:
        if is_number(sample) and "reference" in sample:
            found.setdefault(sample["suite"], []).append(sample["reference"])
    return found
