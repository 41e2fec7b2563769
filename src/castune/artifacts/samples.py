"""What a model answered to one example of a suite: a line of `samples.jsonl`, a plain dictionary of one of four kinds.

The kind of a sample is told here and nowhere else.
"""

from __future__ import annotations

from typing import Any, NotRequired, TypeGuard

from typing_extensions import TypedDict


class _Sample(TypedDict):
    """What every sample has.

    Attributes:
        suite: the data source.
        id: of the example.
        purpose: utility | safety | over-refusal.
        group: category or subject; None without.
        prompt: of the example.
        outcome: whether the answer is right, or refuses; None: unscored.
    """

    suite: str
    id: str
    purpose: str
    group: str | None
    prompt: str
    outcome: bool | None


class ChoiceSample(_Sample):
    """A question whose choices were scored.

    Attributes:
        choices: their texts.
        choice_scores: mean log-probability of each; None where it is not finite.
        answer: number of the right one.
        margin: `answer_margin`; None where a score is not finite.
    """

    choices: list[str]
    choice_scores: list[float | None]
    answer: int | None
    margin: float | None


class ReplySample(_Sample):
    """A prompt and the model's reply, on which a judge decides.

    Attributes:
        reply: the text; empty where there is none.
        finished: whether the model ended it.
        tokens: how many; None where a server does not tell.
        missing: no reply came.
        cut: the prompt lost its beginning to the length limit.
        in_thought: the chat template had opened the reasoning.
        harmful: what a judge that tells it says of the reply.
        verdicts: of the members of a panel.
    """

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


Sample = ChoiceSample | ReplySample | LetterSample | ProblemSample


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
