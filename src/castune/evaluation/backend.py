"""Where a model runs while it is evaluated: one interface, and transformers behind it.

All backends are given the same examples and return the same plain answers, so that the samples of an evaluation do not
tell which one it was.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NotRequired, TypedDict, final

from castune.config import EvaluateConfig
from castune.core.checksum import unchanged
from castune.core.generation import Reply, generate_replies
from castune.core.journal import nullable
from castune.core.losses import batches_by_length
from castune.core.modes import evaluation_mode
from castune.core.scoring import question_rows, reply_means, score_rows, shared_if_exact
from castune.data.chat import ChatFormat
from castune.data.example import Example
from castune.data.rows import Row
from castune.evaluation.applied import require_applied
from castune.evaluation.suites import Suite

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# A decoding step computes one token a row and reads all weights, so rows x length may be far larger than in a forward
# over whole rows: what fills up are keys and values. The prompts, which do run as whole rows, are held to less.
DECODED, PROMPTS = 16, 4


Scores = list[float | None]
"""Of a question's choices; None where one is not finite."""


class PlainReply(TypedDict):
    """A reply as it is kept.

    Attributes:
        text: the reply.
        finished: whether the model ended it.
        tokens: how many; None where a server does not tell.
        cut: its prompt lost its beginning to the length limit.
        in_thought: the chat template had opened the reasoning.
    """

    text: str
    finished: bool
    tokens: int | None
    cut: bool
    in_thought: NotRequired[bool]


Answer = Scores | PlainReply | None
"""What a model answers to one example; None where a server gave nothing."""


@dataclass(frozen=True)
class Work:
    """The batches of a suite, and what answers one.

    Attributes:
        batches: numbers of the examples that are answered together. They depend on the suite and the settings alone,
            so that a run that was killed and continued measures what it would have measured without.
        answer: from a batch to an answer each, in plain JSON: scores of a suite whose choices are scored, else replies.
    """

    batches: Iterable[Sequence[int]]
    answer: Callable[[Sequence[int]], Sequence[Answer]]


class Backend(ABC):
    """A model that can be evaluated."""

    @abstractmethod
    def work(self, suite: Suite, config: EvaluateConfig) -> Work:
        """How the suite is answered."""


class Host(ABC):
    """A model and its adapters: a backend each, for as long as it is evaluated."""

    @abstractmethod
    def check(self, adapters: Mapping[str, Path | None], suites: Sequence[Suite], config: EvaluateConfig) -> None:
        """Refuse what cannot be measured here, before anything is.

        Args:
            adapters: what will be asked for, by the names of the arms.
            suites: what will be measured.
            config: settings.

        Raises:
            CastuneError: the message names the suite or the arm and says what to do.
        """

    @abstractmethod
    def backend(self, name: str, adapter: Path | None) -> AbstractContextManager[Backend]:
        """The model with the adapter in a PEFT directory, or the model itself.

        Args:
            name: of the arm.
            adapter: the directory; None for the model itself.
        """


@final
class TransformersHost(Host):
    """A transformers model in this process."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        self.model, self.tokenizer = model, tokenizer

    def check(self, adapters: Mapping[str, Path | None], suites: Sequence[Suite], config: EvaluateConfig) -> None:
        """Everything can be measured here."""

    @contextmanager
    def backend(self, name: str, adapter: Path | None) -> Iterator[TransformersBackend]:
        """The adapter is read back from disk, as any user of it would."""
        if adapter is None:
            with unchanged(self.model, "evaluating"), evaluation_mode(self.model):
                yield TransformersBackend(self.model, self.tokenizer)
            return
        from peft import PeftModel

        with unchanged(self.model, "evaluating"):
            peft_model = PeftModel.from_pretrained(self.model, adapter)
            try:
                require_applied(peft_model, adapter)
                with evaluation_mode(peft_model):
                    yield TransformersBackend(peft_model, self.tokenizer)
            finally:
                peft_model.unload()


@final
class TransformersBackend(Backend):
    """A transformers or PEFT model in this process."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        self.model, self.tokenizer = model, tokenizer

    def work(self, suite: Suite, config: EvaluateConfig) -> Work:
        """Batches of similar lengths."""
        chat = ChatFormat(self.tokenizer, max_length=config.max_length)
        return (self._choices if suite.is_scored(config) else self._replies)(chat, suite, config)

    def _choices(self, chat: ChatFormat, suite: Suite, config: EvaluateConfig) -> Work:
        rows_of = shared_if_exact(
            self.model, lambda share: [question_rows(chat, e, share_prompt=share) for e in suite.examples]
        )

        def answer(indices: Sequence[int]) -> list[Scores]:
            rows = [row for index in indices for row in rows_of[index]]
            values = iter(score_rows(self.model, rows, batch_tokens=config.batch_tokens))
            return [
                nullable(reply_means(rows_of[index], [next(values) for _ in rows_of[index]]).tolist())
                for index in indices
            ]

        return Work(choice_batches(rows_of, config.batch_tokens), answer)

    def _replies(self, chat: ChatFormat, suite: Suite, config: EvaluateConfig) -> Work:
        max_new_tokens = suite.reply_tokens(config)
        prompts, cut = zip(*(chat.prompt_ids(example) for example in suite.examples), strict=True)
        most = DECODED * config.batch_tokens

        def answer(indices: Sequence[int]) -> list[PlainReply]:
            replies = generate_replies(
                self.model,
                self.tokenizer,
                [prompts[index] for index in indices],
                max_new_tokens=max_new_tokens,
                end_tokens=chat.end_tokens(self.model),
                batch_tokens=most,
            )
            return [plain_reply(reply, cut[index], chat) for index, reply in zip(indices, replies, strict=True)]

        return Work(reply_batches(prompts, max_new_tokens, config.batch_tokens), answer)


def choice_batches(rows_of: Sequence[Sequence[Row]], batch_tokens: int) -> Iterator[list[int]]:
    """Numbers of the questions that are scored together, from the rows of each."""
    return batches_by_length([sum(len(row.ids) for row in rows) for rows in rows_of], batch_tokens)


def reply_batches(prompts: Sequence[Sequence[int]], max_new_tokens: int, batch_tokens: int) -> Iterator[list[int]]:
    """Numbers of the prompts that are answered together."""
    lengths = [max(len(prompt) + max_new_tokens, len(prompt) * DECODED // PROMPTS) for prompt in prompts]
    return batches_by_length(lengths, DECODED * batch_tokens)


def probes(suites: Sequence[Suite], n: int) -> list[Example]:
    """`n` examples on which an adapter that has an effect shows it: prompts before problems before questions.

    One letter, all that a question may be answered with, often survives a training.
    """
    examples = [example for suite in suites for example in suite.examples[:n]]
    return sorted(examples, key=lambda example: 2 * example.is_question + example.is_problem)[:n]


def plain_reply(reply: Reply, cut: bool, chat: ChatFormat) -> PlainReply:
    """A reply as it is kept."""
    kept: PlainReply = {
        "text": reply.text,
        "finished": reply.finished,
        "tokens": len(reply.tokens),
        "cut": cut,
    }
    if chat.opens_thought:
        kept["in_thought"] = True
    return kept
