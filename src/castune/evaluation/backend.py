"""Where a model runs while it is evaluated: one interface, and transformers behind it.

All backends are given the same examples and return the same plain answers, so that the samples of an evaluation do not
tell which one it was.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, NotRequired, TypedDict, final

import numpy as np

from castune.config import EvaluateConfig
from castune.core.checksum import unchanged
from castune.core.divergence import divergences
from castune.core.generation import Reply, generate_replies
from castune.core.journal import nullable
from castune.core.losses import batches_by_length
from castune.core.modes import evaluation_mode
from castune.core.refusals import STANDARD_REFUSAL
from castune.core.scoring import question_rows, refusal_pair, reply_means, reply_rows, score_rows, shared_if_exact
from castune.data.chat import ChatFormat
from castune.data.example import Example
from castune.data.rows import Row
from castune.errors import CastuneError
from castune.evaluation.applied import require_applied
from castune.evaluation.suites import Suite

if TYPE_CHECKING:
    from peft import PeftModel
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


class Scored(TypedDict):
    """A number of one example of a continuous suite.

    Attributes:
        value: in nats per token; None where it is not finite.
        tokens: over how many.
    """

    value: float | None
    tokens: int


Answer = Scores | PlainReply | Scored | None
"""What a model answers to one example; None where a server gave nothing."""


@dataclass(frozen=True)
class Work:
    """The batches of a suite, and what answers one.

    Attributes:
        batches: numbers of the examples that are answered together. They depend on the suite and the settings alone,
            so that a run that was killed and continued measures what it would have measured without.
        answer: from a batch to an answer each, in plain JSON: scores of a suite whose choices are scored, numbers of a
            continuous one, else replies.
    """

    batches: Iterable[Sequence[int]]
    answer: Callable[[Sequence[int]], Sequence[Answer]]


class Backend(ABC):
    """A model that can be evaluated."""

    @abstractmethod
    def work(self, suite: Suite, config: EvaluateConfig) -> Work:
        """How the suite is answered."""

    def references(self, suite: Suite, config: EvaluateConfig) -> list[list[int]]:
        """Tokens of the base model's own replies to the suite's prompts, `evaluate.reference_tokens` at most.

        Raises:
            CastuneError: the base model is not at hand here.
        """
        require_log_probs([suite], config)
        raise NotImplementedError


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
    def backend(self, name: str, adapter: Path | None, strength: float = 1.0) -> AbstractContextManager[Backend]:
        """The model with the adapter in a PEFT directory, or the model itself.

        Args:
            name: of the arm.
            adapter: the directory; None for the model itself.
            strength: what the adapter's update (B A) is multiplied by; 1 alone where the weights are elsewhere.
        """


@final
class TransformersHost(Host):
    """A transformers model in this process."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        self.model, self.tokenizer = model, tokenizer

    def check(self, adapters: Mapping[str, Path | None], suites: Sequence[Suite], config: EvaluateConfig) -> None:
        """Everything can be measured here."""

    @contextmanager
    def backend(self, name: str, adapter: Path | None, strength: float = 1.0) -> Iterator[TransformersBackend]:
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
                _scale(peft_model, strength)
                with evaluation_mode(peft_model):
                    yield TransformersBackend(peft_model, self.tokenizer)
            finally:
                peft_model.unload()


def _scale(peft_model: PeftModel, strength: float) -> None:
    """Multiply the update of every adapted layer, as if its B were scaled."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    if strength != 1:
        for module in peft_model.modules():
            if isinstance(module, BaseTunerLayer):
                module.scale_layer(strength)


@final
class TransformersBackend(Backend):
    """A transformers or PEFT model in this process."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        self.model, self.tokenizer = model, tokenizer

    def work(self, suite: Suite, config: EvaluateConfig) -> Work:
        """Batches of similar lengths."""
        chat = ChatFormat(self.tokenizer, max_length=config.max_length)
        if suite.about.is_continuous:
            of_purpose = {"nll": self._likelihoods, "kl": self._divergences}.get(suite.purpose, self._margins)
            return of_purpose(chat, suite, config)
        return (self._choices if suite.is_scored(config) else self._replies)(chat, suite, config)

    def references(self, suite: Suite, config: EvaluateConfig) -> list[list[int]]:
        """The base model is this one with its adapter switched off."""
        chat = ChatFormat(self.tokenizer, max_length=config.max_length)
        prompts = [chat.prompt_ids(example, reserve=config.reference_tokens)[0] for example in suite.examples]
        with self._as_base():
            replies = generate_replies(
                self.model,
                self.tokenizer,
                prompts,
                max_new_tokens=config.reference_tokens,
                end_tokens=chat.end_tokens(self.model),
                batch_tokens=DECODED * config.batch_tokens,
            )
        return [[*reply.tokens, *([chat.end_token] if reply.finished else [])] for reply in replies]

    def _as_base(self) -> AbstractContextManager[object]:
        from peft import PeftModel

        return self.model.disable_adapter() if isinstance(self.model, PeftModel) else nullcontext()

    def _likelihoods(self, chat: ChatFormat, suite: Suite, config: EvaluateConfig) -> Work:
        rows = likelihood_rows(chat, suite)

        def answer(indices: Sequence[int]) -> list[Scored]:
            values = score_rows(self.model, [rows[index] for index in indices], batch_tokens=config.batch_tokens)
            return [_scored(-of_row.mean(), len(of_row)) for of_row in values]

        return Work(batches_by_length([len(row.ids) for row in rows], config.batch_tokens), answer)

    def _divergences(self, chat: ChatFormat, suite: Suite, config: EvaluateConfig) -> Work:
        rows = divergence_rows(chat, suite)
        vocabulary = self.model.config.get_text_config(decoder=True).vocab_size

        def answer(indices: Sequence[int]) -> list[Scored]:
            values = divergences(
                self.model,
                self._as_base,
                [rows[index] for index in indices],
                vocabulary=vocabulary,
                batch_tokens=config.batch_tokens,
            )
            return [_scored(of_row.mean(), len(of_row)) for of_row in values]

        return Work(batches_by_length([len(row.ids) for row in rows], config.batch_tokens), answer)

    def _margins(self, chat: ChatFormat, suite: Suite, config: EvaluateConfig) -> Work:
        rows_of = shared_if_exact(self.model, lambda share: margin_rows(chat, suite, config, share_prompt=share))

        def answer(indices: Sequence[int]) -> list[Scored]:
            rows = [row for index in indices for row in rows_of[index]]
            values = iter(score_rows(self.model, rows, batch_tokens=config.batch_tokens))
            found = []
            for index in indices:
                refusal, own = reply_means(rows_of[index], [next(values) for _ in rows_of[index]])
                found.append(_scored(refusal - own, sum(len(row.tokens) for row in rows_of[index])))
            return found

        return Work(choice_batches(rows_of, config.batch_tokens), answer)

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


def likelihood_rows(chat: ChatFormat, suite: Suite) -> list[Row]:
    """The rows whose NLL an `nll` suite takes: those of the loss of training."""
    return [_exact(chat.loss_row(example)) for example in suite.examples]


def divergence_rows(chat: ChatFormat, suite: Suite) -> list[Row]:
    """The rows of a `kl` suite: the base model's own replies."""
    rows = []
    for example, reply in zip(suite.examples, suite.references, strict=True):
        prompt, _ = chat.prompt_ids(example, reserve=len(reply))
        rows.append(_exact(chat.row(example, prompt, [reply])))
    return rows


def margin_rows(chat: ChatFormat, suite: Suite, config: EvaluateConfig, *, share_prompt: bool) -> list[list[Row]]:
    """The rows of each prompt of a margin suite: a refusal and the base model's own reply."""
    found = []
    for example, reply in zip(suite.examples, suite.references, strict=True):
        prompt, pair = refusal_pair(chat, example, STANDARD_REFUSAL, reply, n_tokens=config.margin_tokens)
        found.append([_exact(row) for row in reply_rows(chat, example, prompt, pair, share_prompt=share_prompt)])
    return found


def _exact(row: Row) -> Row:
    """The row with logits in float32: rounded ones would be most of a small difference."""
    return replace(row, float32_logits=True)


def _scored(value: float, n_tokens: int) -> Scored:
    return {"value": float(value) if np.isfinite(value) else None, "tokens": n_tokens}


def require_log_probs(suites: Sequence[Suite], config: EvaluateConfig) -> None:
    """Refuse what takes the weights where these are elsewhere: continuous suites, and adapters at other strengths.

    Raises:
        CastuneError: the message names the suite or the setting and says what to do.
    """
    for suite in suites:
        if suite.about.is_continuous:
            raise CastuneError(
                f"suite {suite.name}: {suite.about.metric} takes log-probabilities of given tokens, which backend "
                f"{config.backend} does not give; measure it with --backend hf, or leave it out"
            )
    if any(strength != 1 for strength in config.strengths):
        raise CastuneError(
            f"evaluate.strengths: backend {config.backend} has adapters at full strength only; use --backend hf"
        )


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
