"""Suites: a data source and what it measures (`castune.purposes`)."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from castune.config import EvaluateConfig
from castune.core.answer_equality import require_math_verify
from castune.core.answers import require_readable
from castune.data.example import Example
from castune.data.sources import examples, purpose_of, source_name
from castune.errors import DataError
from castune.purposes import PURPOSES, Purpose

# Length limits of worked answers in the paper (Section 4.1).
_REASONING_TOKENS = {"gsm8k": 1024, "math": 2048}
_USUAL_REASONING_TOKENS = 1024
# Enough for "The answer is (B) ..." where letters are not scored but written.
_LETTER_TOKENS = 64
# Tokens that are decoded in the time of scoring a question.
_SCORED_AS_DECODED = 16
# What a suite is called that is measured otherwise than its source is by itself: the source's name and this.
_SUFFIXES = {"nll": "nll", "kl": "kl", "safety-margin": "margin", "over-refusal-margin": "margin"}
_MARGINS = {"safety": "safety-margin", "over-refusal": "over-refusal-margin"}


@dataclass(frozen=True)
class Suite:
    """Examples with one purpose.

    `utility`: multiple-choice questions or problems, accuracy. `safety`: harmful prompts, refusal rate. `over-refusal`:
    benign prompts, refusal rate. `nll`: right answers, worked solutions or replies, their negative log-likelihood.
    `kl`: harmless prompts, the divergence from the base model on its own replies. `safety-margin` and
    `over-refusal-margin`: harmful and benign prompts, a refusal's log-probability against that of the base model's
    reply.

    Attributes:
        name: of the suite.
        purpose: what it measures.
        examples: on what.
        references: where it is measured on the base model's own replies: their tokens, an example each; empty before
            they are known.
    """

    name: str
    purpose: str
    examples: tuple[Example, ...]
    references: tuple[tuple[int, ...], ...] = ()

    @property
    def about(self) -> Purpose:
        """How its number is to be read."""
        return PURPOSES[self.purpose]

    def with_references(self, references: Sequence[Sequence[int]]) -> Suite:
        """The suite with the base model's own replies, as tokens."""
        return replace(self, references=tuple(map(tuple, references)))

    def is_scored(self, config: EvaluateConfig) -> bool:
        """Whether what is given is scored; else replies are generated."""
        if self.about.is_continuous:
            return True
        first = self.examples[0]
        return first.is_question and not (first.scoring == "letter" and config.letters == "generated")

    def reply_tokens(self, config: EvaluateConfig) -> int:
        """Length limit of generated replies."""
        first = self.examples[0]
        if first.is_question:
            return _LETTER_TOKENS
        if first.is_problem:
            return config.reasoning_tokens or _REASONING_TOKENS.get(self.name, _USUAL_REASONING_TOKENS)
        return config.max_new_tokens

    def cost(self, config: EvaluateConfig) -> float:
        """About what an example takes, against one whose choices are scored: for the time that is left."""
        return 1.0 if self.is_scored(config) else 1.0 + self.reply_tokens(config) / _SCORED_AS_DECODED


def load_suite(
    source: str, *, limit: int | None = None, seed: int = 0, read: Callable[..., list[Example]] = examples
) -> Suite:
    """A suite from a data source.

    Args:
        source: a named source, or `purpose:path` for own data, for example `over-refusal:benign.jsonl`. A source of
            multiple-choice questions needs no purpose. `nll:`, `kl:` and `margin:` measure a named source so, too:
            `margin:starter-safety-eval`. `#500` at its end draws so many examples, whatever `limit` says.
        limit: examples to draw; the subset depends on `seed` alone.
        seed: seed of the subset.
        read: what reads the data, called as `examples` is.

    Raises:
        DataError: see `examples`; or the purpose is unknown or does not fit the data.
    """
    if own := re.fullmatch(r"(.+)#(\d+)", source):
        source, limit = own[1], int(own[2])
    prefix, _, rest = source.partition(":")
    purpose, path = (prefix, rest) if prefix in (*PURPOSES, "margin") else (purpose_of(source), source)
    if purpose == "margin":
        purpose = _MARGINS.get(purpose_of(path) or "")
        if purpose is None:
            raise DataError(f"{source}: say of what prompts, as {' or '.join(_MARGINS.values())}:{path}")
    found = read(path, limit=limit, seed=seed)
    if purpose is None and all(map(_has_answer, found)):
        purpose = "utility"
    if purpose not in PURPOSES:
        raise DataError(f"{source}: say what it measures, as PURPOSE:{path} with one of {', '.join(PURPOSES)}")
    _check_kinds(source, purpose, found)
    is_mixed = len({(example.is_question, example.scoring) for example in found}) > 1
    if purpose == "utility" and is_mixed and any(e.is_problem for e in found):
        raise DataError(f"{source}: a suite of problems holds nothing else, and is scored one way")
    if purpose == "utility" and found[0].scoring == "boxed":
        require_math_verify()  # now, not after hours of generation
    for example in found if purpose == "utility" else ():
        if example.is_problem:
            require_readable(str(example.target), str(example.scoring), f"{source}: example {example.id!r}")
    name = source_name(path)
    is_own = purpose == purpose_of(path)
    return Suite(name if is_own or purpose not in _SUFFIXES else f"{name}-{_SUFFIXES[purpose]}", purpose, tuple(found))


def _has_answer(example: Example) -> bool:
    return example.is_question or example.is_problem


def _check_kinds(source: str, purpose: str, found: Sequence[Example]) -> None:
    """Refuse examples that cannot be measured so."""
    with_answers = sum(map(_has_answer, found))
    if purpose == "utility" and with_answers < len(found):
        raise DataError(
            f"{source}: utility suites hold multiple-choice questions (prompt, choices, answer) or problems "
            "(prompt, answer)"
        )
    if purpose == "nll":
        bare = next((example for example in found if example.right_reply is None), None)
        if bare is not None:
            raise DataError(
                f"{source}: example {bare.id!r} has nothing whose likelihood could be measured; nll suites hold "
                "multiple-choice questions, problems with worked solutions or prompts with replies"
            )
    elif purpose not in ("utility", "kl") and with_answers:
        raise DataError(f"{source}: {purpose} suites hold prompts, found multiple-choice questions or problems")


def load_suites(
    sources: Sequence[str],
    *,
    limit: int | None = None,
    seed: int = 0,
    read: Callable[..., list[Example]] = examples,
) -> list[Suite]:
    """All suites, loaded before anything is computed, so that a bad source fails at once.

    Raises:
        DataError: see `load_suite`; or two sources are one suite, whose samples would be mixed up.
    """
    suites = [load_suite(source, limit=limit, seed=seed, read=read) for source in sources]
    check_names(suites)
    return suites


def check_names(suites: Sequence[Suite]) -> None:
    """Refuse two suites of one name: samples and results belong to a suite by its name."""
    names = [suite.name for suite in suites]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise DataError(f"suite {twice} appears twice (another limit or revision is still the same suite); drop one")
