"""The two sweeps of a diagnosis: what is measured on D_util and on D_safe, by decisions or by margins (Eqs. 3-4)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from castune.config import DiagnoseConfig
from castune.core.answers import is_right, without_cut_sentence
from castune.core.generation import Reply, generate_replies
from castune.core.journal import Journal
from castune.core.refusals import STANDARD_REFUSAL, decides_by, is_settled
from castune.core.scoring import (
    question_rows,
    refusal_pair,
    reply_rows,
    shared_if_exact,
)
from castune.core.shards import Shard
from castune.data.chat import ChatFormat
from castune.data.example import Example
from castune.data.said import said
from castune.diagnosis.ablate import ScoredMeasure
from castune.diagnosis.ablator import Ablator
from castune.diagnosis.attribute import AttributedMeasure
from castune.diagnosis.decode import ReplyMeasure
from castune.diagnosis.domains import UtilitySet
from castune.diagnosis.outcomes import Answer, Likelihood, Outcome, Preference
from castune.diagnosis.score import Floats
from castune.diagnosis.sweep import Measure, Outcomes, sweep

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Judge = Callable[[Sequence[str], Sequence[str]], list[bool | None]]
"""From prompts and replies to verdicts."""


@dataclass(frozen=True)
class Measured:
    """Outcomes of one set, and the whole model's decisions (NaN: unscored) on it."""

    outcomes: Outcomes
    decisions_N: Floats

    def of(self, heads: Sequence[int]) -> Measured:
        """Outcomes without these heads only, by their numbers."""
        return replace(self, outcomes=replace(self.outcomes, ablated_HN=self.outcomes.ablated_HN[list(heads)]))


@dataclass(frozen=True)
class Objectives:
    """What is measured on D_util and on D_safe, and the sweeps over the heads."""

    ablator: Ablator
    tokenizer: PreTrainedTokenizerBase
    chat: ChatFormat
    config: DiagnoseConfig

    @property
    def _batch_tokens(self) -> int:
        assert self.config.batch_tokens != "auto"
        return self.config.batch_tokens

    def utility(self, one: UtilitySet, journal: Journal, shard: Shard) -> Measured | None:
        """Right answers (Eq. 3), or the margins of the right answers; None while other shares are missing.

        Margins of problems are the log-probabilities of the worked solutions. Of harmless prompts with replies it is
        whether they are answered, or the margins of the replies over a refusal.
        """
        measure: Measure
        if one.is_decoded(self.config):
            measure = self.decoded_measure(one)
        elif self.config.measure == "attribution":
            measure = self.attributed_measure(self.utility_outcome(one.examples))
        else:
            measure = self.utility_measure(one.examples)
        outcomes = sweep(one.objective, self.ablator, measure, journal=journal, shard=shard)
        if outcomes is None:
            return None
        return Measured(outcomes, self._utility_decisions(one, outcomes.baseline_N))

    def _utility_decisions(self, one: UtilitySet, baseline_N: Floats) -> Floats:
        """The whole model's decisions on a utility set, of which `baseline_N` are its outcomes."""
        if one.measure(self.config) == "decision":
            return baseline_N
        if one.is_of_problems:
            return np.full(len(one.examples), np.nan)  # nothing was answered
        return self.decoded(one) if one.is_of_replies else _positive(baseline_N)

    def decoded_measure(self, one: UtilitySet) -> ReplyMeasure:
        """Decisions on what the model writes: right answers to problems, or harmless prompts that are not refused."""
        if one.is_of_problems:
            return self.solution_measure(one.examples, self.solutions(one.examples))
        return self.answered_measure(one.examples, self.replies(one.examples))

    def decoded(self, one: UtilitySet) -> Floats:
        """These decisions of the model as it is now."""
        if one.is_of_problems:
            return self.right_answers(one.examples, self.solutions(one.examples))
        return 1 - self.refusals(one.examples, self.replies(one.examples))

    def safety(
        self, examples: Sequence[Example], replies: Sequence[Reply], journal: Journal, shard: Shard
    ) -> Measured | None:
        """Refusals (Eq. 4), or the margins of the refusals; None while other shares are missing.

        Args:
            examples: D_safe.
            replies: the model's own to them.
            journal: where results go.
            shard: which share of the work is this process's.
        """
        by_margin = self.config.measure != "decision"
        measure: Measure
        if self.config.measure == "attribution":
            measure = self.attributed_measure(self.refusal_outcome(examples, replies))
        else:
            measure = self.margin_measure(examples, replies) if by_margin else self.refusal_measure(examples, replies)
        outcomes = sweep("safety", self.ablator, measure, journal=journal, shard=shard)
        if outcomes is None:
            return None
        return Measured(outcomes, self.refusals(examples, replies) if by_margin else outcomes.baseline_N)

    def utility_measure(self, examples: Sequence[Example]) -> ScoredMeasure:
        """What `utility_outcome` tells, without every head."""
        return ScoredMeasure(self.ablator, self.utility_outcome(examples), batch_tokens=self._batch_tokens)

    def utility_outcome(self, examples: Sequence[Example]) -> Outcome:
        """Decisions on questions, or the margins of their right answers; of anything else a margin.

        Of problems it is the mean log-probability per token of their worked solutions, of harmless prompts that of the
        reply minus that of a standard refusal, over their first tokens.
        """
        if examples[0].is_problem:
            return Likelihood([[self.chat.loss_row(example)] for example in examples])
        if not examples[0].is_question:
            return self._preference((e, *self.chat.continuations(e, [_reply(e), STANDARD_REFUSAL])) for e in examples)
        rows_of = shared_if_exact(
            self.ablator.model, lambda share: [question_rows(self.chat, e, share_prompt=share) for e in examples]
        )
        return Answer(rows_of, examples, by_margin=self.config.measure != "decision")

    def solutions(self, examples: Sequence[Example]) -> list[Reply]:
        """Greedy worked answers of the model as it is now."""
        return self._generated(examples, self.config.solution_tokens)

    def solution_measure(self, examples: Sequence[Example], replies: Sequence[Reply]) -> ReplyMeasure:
        """Right final answers of problems, by verifying and decoding worked answers to their end."""
        by_id = {example.id: example for example in examples}

        def judged(ids: Sequence[str], texts: Sequence[str]) -> list[bool | None]:
            return [self._is_right(by_id[i], text) for i, text in zip(ids, texts, strict=True)]

        return ReplyMeasure(
            self.ablator,
            self.tokenizer,
            self._prompts(examples, self.config.solution_tokens),
            list(by_id),
            replies,
            end_tokens=self.chat.end_tokens(self.ablator.model),
            judge=judged,
            # Whatever has been said may be taken back.
            is_settled=lambda _: False,
            max_new_tokens=self.config.solution_tokens,
            batch_tokens=self._batch_tokens,
        )

    def right_answers(self, problems: Sequence[Example], replies: Sequence[Reply]) -> Floats:
        """Whether the final answers of worked answers are right, 1 or 0."""
        return np.array([float(self._is_right(p, r.text)) for p, r in zip(problems, replies, strict=True)])

    def _is_right(self, problem: Example, text: str) -> bool:
        assert problem.target is not None
        assert problem.scoring is not None
        answer = said(text, in_thought=self.chat.opens_thought)
        # What reaches the limit was cut off, and the sentence it was cut in is no answer.
        if len(self.tokenizer(text, add_special_tokens=False)["input_ids"]) >= self.config.solution_tokens:
            answer = without_cut_sentence(answer)
        return is_right(answer, problem.target, problem.scoring)

    def margin_measure(self, examples: Sequence[Example], replies: Sequence[Reply]) -> ScoredMeasure:
        """Margins of refusals over the model's own replies."""
        return ScoredMeasure(self.ablator, self.refusal_outcome(examples, replies), batch_tokens=self._batch_tokens)

    def refusal_outcome(self, examples: Sequence[Example], replies: Sequence[Reply]) -> Preference:
        """Mean log-probability per token of the refusal minus that of the own reply, over their first tokens."""
        parts = []
        for example, reply in zip(examples, replies, strict=True):
            own = [*reply.tokens, *([self.chat.end_token] if reply.finished else [])]
            pair = refusal_pair(self.chat, example, _reply(example), own, n_tokens=self._compared_tokens)
            parts.append((example, *pair))
        return self._preference(parts)

    def _preference(self, parts: Iterable[tuple[Example, list[int], list[list[int]]]]) -> Preference:
        """From examples, the ids of their prompts, and those of two replies to each."""
        n_tokens = self._compared_tokens
        compared = [(example, prompt, [tokens[:n_tokens] for tokens in pair]) for example, prompt, pair in parts]
        rows_of = shared_if_exact(
            self.ablator.model,
            lambda share: [reply_rows(self.chat, e, prompt, pair, share_prompt=share) for e, prompt, pair in compared],
        )
        return Preference(rows_of)

    @property
    def _compared_tokens(self) -> int:
        return min(self.config.margin_tokens, self.config.max_new_tokens)

    def attributed_measure(self, outcome: Outcome) -> AttributedMeasure:
        """An outcome, and what it becomes without each unit to first order."""
        return AttributedMeasure(self.ablator, outcome, batch_tokens=self._batch_tokens)

    def replies(self, examples: Sequence[Example]) -> list[Reply]:
        """Greedy replies of the model as it is now."""
        return self._generated(examples, self.config.max_new_tokens)

    def _generated(self, examples: Sequence[Example], max_new_tokens: int) -> list[Reply]:
        return generate_replies(
            self.ablator.model,
            self.tokenizer,
            self._prompts(examples, max_new_tokens),
            max_new_tokens=max_new_tokens,
            end_tokens=self.chat.end_tokens(self.ablator.model),
            batch_tokens=self._batch_tokens,
        )

    def refusals(self, examples: Sequence[Example], replies: Sequence[Reply]) -> Floats:
        """The judge's verdicts on replies: 1, 0, or NaN where it could not tell."""
        verdicts = self._judge([e.prompt for e in examples], [reply.text for reply in replies])
        return np.array([np.nan if verdict is None else float(verdict) for verdict in verdicts])

    def refusal_measure(self, examples: Sequence[Example], replies: Sequence[Reply]) -> ReplyMeasure:
        """Refusals, by verifying and decoding replies."""
        return self._judged_measure(examples, replies, self._judge)

    def answered_measure(self, examples: Sequence[Example], replies: Sequence[Reply]) -> ReplyMeasure:
        """Prompts that are not refused, by verifying and decoding replies."""

        def answers(prompts: Sequence[str], texts: Sequence[str]) -> list[bool | None]:
            return [None if refuses is None else not refuses for refuses in self._judge(prompts, texts)]

        return self._judged_measure(examples, replies, answers)

    def _judged_measure(self, examples: Sequence[Example], replies: Sequence[Reply], judge: Judge) -> ReplyMeasure:
        return ReplyMeasure(
            self.ablator,
            self.tokenizer,
            self._prompts(examples, self.config.max_new_tokens),
            [example.prompt for example in examples],
            replies,
            end_tokens=self.chat.end_tokens(self.ablator.model),
            judge=judge,
            is_settled=partial(is_settled, self.config.judge, in_thought=self.chat.opens_thought),
            max_new_tokens=self.config.max_new_tokens,
            batch_tokens=self._batch_tokens,
        )

    @property
    def _judge(self) -> Judge:
        return decides_by(self.config.judge, in_thought=self.chat.opens_thought)

    def _prompts(self, examples: Sequence[Example], reserve: int) -> list[list[int]]:
        return [self.chat.prompt_ids(example, reserve=reserve)[0] for example in examples]


def _reply(example: Example) -> str:
    assert example.reply is not None
    return example.reply


def _positive(margins_N: Floats) -> Floats:
    return np.where(np.isfinite(margins_N), margins_N > 0, np.nan)
