"""Decisions about replies: which of them refuse (Eq. 4), or are right, once a head is gone.

Most heads change few replies, and a refusal announces itself early. So the whole model's reply is verified in one
teacher-forced forward, as far as the judge needs it, and only replies that diverge are decoded: many heads in one
batch, from the keys and values of that forward on, each until the judge's answer is settled. In float32 the verdicts
equal those of plain generation; in bfloat16 up to near ties of two tokens.

Shape letters: H head, N example, B batch row, T scored token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor
from transformers import Cache, DynamicCache

from castune.artifacts import Unit
from castune.core.batching import ExampleBatch, example_batches
from castune.core.continuation import Context, KeysValues, cache_of, can_continue, context_of, read_keys_values
from castune.core.generation import Reply, ReplyText, generate_replies
from castune.core.losses import RowBatch, scored_logits
from castune.data.rows import Row
from castune.diagnosis.ablator import Ablator, RecordedBatch
from castune.diagnosis.score import Floats

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# A step of decoding reads all weights, however few rows it has. Keys and values take much less memory than what a
# forward computes on the way, so more rows fit.
DECODED_TOKENS = 4


@dataclass(frozen=True)
class _Diverged:
    """A reply that differs without a head: what is known of it."""

    pair: tuple[int, int]  # place in the result: head, example
    head: Unit
    example: int
    begun: tuple[int, ...]
    text: str
    is_done: bool
    context: Context | None


class ReplyMeasure:
    """What a judge says of the reply to each prompt: 1, 0, or NaN where it could not tell.

    Of harmful prompts whether it refuses (Eq. 4), of problems whether its final answer is right (Eq. 3).

    Args:
        ablator: the model and the heads.
        tokenizer: its tokenizer.
        prompts: token ids of each prompt.
        texts: what the judge is told of each prompt: its text, say.
        replies: the whole model's greedy replies.
        end_tokens: tokens that end a reply.
        judge: from these and the texts of replies to True, False, or None each.
        is_settled: tells from a reply's beginning that the judge's answer can no longer change.
        max_new_tokens: length limit of a reply.
        batch_tokens: rows x tokens of one forward.

    Attributes:
        n_decoded: how many replies the last `ablated` had to decode; it verified all.
    """

    def __init__(
        self,
        ablator: Ablator,
        tokenizer: PreTrainedTokenizerBase,
        prompts: Sequence[Sequence[int]],
        texts: Sequence[str],
        replies: Sequence[Reply],
        *,
        end_tokens: Sequence[int],
        judge: Callable[[Sequence[str], Sequence[str]], list[bool | None]],
        is_settled: Callable[[str], bool],
        max_new_tokens: int,
        batch_tokens: int,
    ) -> None:
        self.ablator, self.tokenizer = ablator, tokenizer
        self.prompts, self.texts, self.replies = prompts, texts, replies
        self.end_tokens, self.max_new_tokens, self.batch_tokens = end_tokens, max_new_tokens, batch_tokens
        self._judge, self._is_settled, self._text_of = judge, is_settled, ReplyText(tokenizer)
        self._continues = can_continue(ablator.model, ablator.layout)
        self._expected = [self._needed(reply) for reply in replies]
        rows = [Row.of_replies(prompt, [tokens]) for prompt, tokens in zip(prompts, self._expected, strict=True)]
        self.batches = example_batches(ablator.model, ablator.layout, [[row] for row in rows], batch_tokens)
        self._verdicts = self._judged(range(len(replies)), [reply.text for reply in replies])
        self.n_decoded = 0
        # Decoding is slow in small batches.
        self.unit_tokens = self._decoded_tokens

    def baseline(self, batch: ExampleBatch) -> Floats:
        """Verdicts on the whole model's replies."""
        self._batch = batch
        rows = RowBatch.of(batch.rows, next(self.ablator.model.parameters()).device)
        self._recorded = RecordedBatch(self.ablator, rows, self.batch_tokens)
        # Where each row's keys and values are, for the layers below an ablated head.
        self._below: list[tuple[KeysValues, int]] = []
        for row_b, (_, recorded) in self._recorded.baseline_parts(self._top_tokens):
            self._below += [(recorded, b) for b in range(len(row_b))]
        return self._verdicts[batch.examples]

    def ablated(self, heads: Sequence[Unit]) -> Floats:
        """Verdicts on the replies without each head."""
        verdicts_HN = np.tile(self._verdicts[self._batch.examples], (len(heads), 1))
        self.n_decoded = 0
        waiting: list[_Diverged] = []

        def settle() -> None:
            if waiting:
                pairs = tuple(np.array([found.pair for found in waiting]).T)
                verdicts_HN[pairs] = self._judged([found.example for found in waiting], self._decoded(waiting))
                self.n_decoded += len(waiting)
                waiting.clear()

        first = 0
        for _, found in groupby(heads, key=lambda head: head.place):
            of_place = [*found]
            for pair_p, (top_PT, recorded) in self._recorded.ablated_parts(of_place, self._top_tokens):
                for p, (pair, top_T) in enumerate(zip(pair_p.tolist(), top_PT.tolist(), strict=True)):
                    h, row = divmod(pair, len(self._batch.rows))
                    found_here = (recorded, p), self._below[row]
                    waiting += self._diverged(first + h, heads[first + h], row, top_T, found_here)
                # Contexts are copies: the cache they came from must not outlive its forward.
                del recorded, found_here
                if sum(map(self._room, waiting)) > self._decoded_tokens:
                    settle()
            first += len(of_place)
        settle()
        self.batch_tokens = self._recorded.batch_tokens
        return verdicts_HN

    def _diverged(
        self, h: int, head: Unit, row: int, top: Sequence[int], places: Sequence[tuple[KeysValues, int]]
    ) -> Iterator[_Diverged]:
        """The replies of a row that differ without a head, from the most likely token at its scored positions."""
        start = 0
        for example, n_tokens in self._batch.parts[row]:
            begun = self._begun(example, top[start : start + n_tokens])
            if begun is not None:
                ended = begun[-1] in self.end_tokens
                text = self._text(begun[:-1] if ended else begun)
                is_done = ended or len(begun) >= self.max_new_tokens or self._is_settled(text)
                context = None
                if self._continues and not is_done:
                    position = self._batch.rows[row].positions[start + len(begun) - 1]
                    context = context_of(self._batch.rows[row], position, places)
                pair = (h, self._batch.examples.index(example))
                yield _Diverged(pair, head, example, begun, text, is_done, context)
            start += n_tokens

    @property
    def _decoded_tokens(self) -> int:
        """Limit of rows x tokens of a batch of replies that are decoded."""
        return self.batch_tokens * (DECODED_TOKENS if self._continues else 1)

    def _room(self, found: _Diverged) -> int:
        return 0 if found.is_done else len(self.prompts[found.example]) + self.max_new_tokens

    def _top_tokens(self, model: PreTrainedModel, rows: RowBatch) -> tuple[Tensor, KeysValues]:
        """The most likely token at every scored position, `[B, T]`, and the keys and values if they are of use."""
        if not self._continues:
            return scored_logits(model, rows).argmax(-1).cpu(), []
        cache = DynamicCache()
        top_BT = scored_logits(model, rows, cache).argmax(-1).cpu()
        return top_BT, read_keys_values(cache, self.ablator.layout.n_layers)

    def _needed(self, reply: Reply) -> list[int]:
        """The tokens of the whole model's reply that settle the judge's answer, else all with the end of the turn."""
        for n in range(1, len(reply.tokens) + 1):
            if self._is_settled(self._text(reply.tokens[:n])):
                return list(reply.tokens[:n])
        return [*reply.tokens, *(self.end_tokens[:1] if reply.finished else [])]

    def _begun(self, example: int, top: Sequence[int]) -> tuple[int, ...] | None:
        """The reply's tokens up to and with the first that differs from the whole model's; None where none does."""
        for t, (expected, found) in enumerate(zip(self._expected[example], top, strict=True)):
            if expected != found and not (expected in self.end_tokens and found in self.end_tokens):
                return (*self._expected[example][:t], found)
        return None

    def _decoded(self, diverged: Sequence[_Diverged]) -> list[str]:
        """Texts of the replies, each as far as the judge needs it."""
        rest = [found for found in diverged if not found.is_done]

        def recorded(indices: Sequence[int]) -> Cache:
            return cache_of(self.ablator.model, [context for i in indices if (context := rest[i].context) is not None])

        replies = generate_replies(
            self.ablator.model,
            self.tokenizer,
            [self.prompts[found.example] for found in rest],
            max_new_tokens=self.max_new_tokens,
            end_tokens=self.end_tokens,
            batch_tokens=self._decoded_tokens,
            begun=[found.begun for found in rest],
            recorded=recorded if self._continues else None,
            is_settled=self._is_settled,
            around=lambda indices: self.ablator.without_each([rest[i].head for i in indices]),
        )
        decoded = iter(replies)
        return [found.text if found.is_done else next(decoded).text for found in diverged]

    def _judged(self, examples: Sequence[int], texts: Sequence[str]) -> Floats:
        verdicts = self._judge([self.texts[n] for n in examples], texts)
        return np.array([np.nan if verdict is None else float(verdict) for verdict in verdicts])

    def _text(self, tokens: Sequence[int]) -> str:
        return self._text_of(tokens)
