"""H_safe from replies: which of them refuse once a head is gone (Eq. 4).

Most heads change few replies, and a refusal announces itself early. So the whole model's reply is verified in one
teacher-forced forward, as far as the judge needs it, and only replies that diverge are decoded, many heads in one
batch, each until the judge's answer is settled. In float32 the verdicts equal those of plain generation; in bfloat16
up to near ties of two tokens.

Shape letters: H head, N example, B batch row, T scored token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from castune.core.batching import ExampleBatch, example_batches
from castune.core.generation import Reply, generate_replies
from castune.core.judges import Judge
from castune.core.losses import RowBatch, scored_logits
from castune.data.rows import Row
from castune.diagnose.score import Floats
from castune.diagnose.sweep import Ablator, RecordedBatch


@dataclass(frozen=True)
class _Diverged:
    """A reply that differs without a head: what is known of it."""

    pair: tuple[int, int]  # place in the result: head, example
    head: int
    example: int
    begun: tuple[int, ...]


class RefusalMeasure:
    """Whether the reply to each prompt refuses: 1, 0, or NaN where the judge could not tell.

    Args:
        ablator: the model and the heads.
        tokenizer: its tokenizer.
        prompts: token ids of each prompt.
        texts: text of each prompt, for the judge.
        replies: the whole model's greedy replies.
        end_tokens: tokens that end a reply.
        judge: the judge.
        is_settled: tells from a reply's beginning that the judge's answer can no longer change.
        max_new_tokens: length limit of a reply.
        batch_tokens: rows x tokens of one forward.

    Attributes:
        n_decoded: how many replies the last `ablated` had to decode; it verified all.
    """

    def __init__(
        self,
        ablator: Ablator,
        tokenizer: Any,
        prompts: Sequence[Sequence[int]],
        texts: Sequence[str],
        replies: Sequence[Reply],
        *,
        end_tokens: Sequence[int],
        judge: Judge,
        is_settled: Callable[[str], bool],
        max_new_tokens: int,
        batch_tokens: int,
    ) -> None:
        self.ablator, self.tokenizer = ablator, tokenizer
        self.prompts, self.texts, self.replies = prompts, texts, replies
        self.end_tokens, self.max_new_tokens, self.batch_tokens = end_tokens, max_new_tokens, batch_tokens
        self._judge, self._is_settled = judge, is_settled
        self._expected = [self._needed(reply) for reply in replies]
        rows = [Row.of_replies(prompt, [tokens]) for prompt, tokens in zip(prompts, self._expected, strict=True)]
        self.batches = example_batches(ablator.model, ablator.layout, [[row] for row in rows], batch_tokens)
        self._verdicts = self._judged(range(len(replies)), [reply.text for reply in replies])
        self.n_decoded = 0

    def baseline(self, batch: ExampleBatch) -> Floats:
        """Verdicts on the whole model's replies."""
        self._batch = batch
        rows = RowBatch.of(batch.rows, next(self.ablator.model.parameters()).device)
        self._recorded = RecordedBatch(self.ablator, rows, self.batch_tokens)
        self._recorded.baseline(_top_tokens)
        return self._verdicts[batch.examples]

    def ablated(self, layer: int, heads: Sequence[int]) -> Floats:
        """Verdicts on the replies without each head."""
        top_HBT = self._recorded.ablated(layer, heads, _top_tokens).numpy()
        self.batch_tokens = self._recorded.batch_tokens
        examples = self._batch.examples
        verdicts_HN = np.tile(self._verdicts[examples], (len(heads), 1))
        diverged: list[_Diverged] = []
        for h, top_BT in enumerate(top_HBT):
            rows = [top_BT[i, : len(row.tokens)] for i, row in enumerate(self._batch.rows)]
            for n, (example, (top_T,)) in enumerate(zip(examples, self._batch.by_example(rows), strict=True)):
                begun = self._begun(example, top_T.tolist())
                if begun is not None:
                    diverged.append(_Diverged((h, n), heads[h], example, begun))
        self.n_decoded = len(diverged)
        if diverged:
            texts = self._decoded(layer, diverged)
            pairs = tuple(np.array([found.pair for found in diverged]).T)
            verdicts_HN[pairs] = self._judged([found.example for found in diverged], texts)
        return verdicts_HN

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

    def _decoded(self, layer: int, diverged: Sequence[_Diverged]) -> list[str]:
        """Texts of the replies, each as far as the judge needs it."""
        texts: list[str | None] = []
        for found in diverged:
            ended = found.begun[-1] in self.end_tokens
            text = self._text(found.begun[:-1] if ended else found.begun)
            is_done = ended or len(found.begun) >= self.max_new_tokens or self._is_settled(text)
            texts.append(text if is_done else None)
        rest = [found for found, text in zip(diverged, texts, strict=True) if text is None]
        device = next(self.ablator.model.parameters()).device
        head_P = torch.tensor([found.head for found in rest], device=device)
        replies = generate_replies(
            self.ablator.model,
            self.tokenizer,
            [self.prompts[found.example] for found in rest],
            max_new_tokens=self.max_new_tokens,
            end_tokens=self.end_tokens,
            batch_tokens=self.batch_tokens,
            begun=[found.begun for found in rest],
            is_settled=self._is_settled,
            around=lambda indices: self.ablator.without(layer, head_P[list(indices)]),
        )
        decoded = iter(replies)
        return [next(decoded).text if text is None else text for text in texts]

    def _judged(self, examples: Sequence[int], texts: Sequence[str]) -> Floats:
        verdicts = self._judge([self.texts[n] for n in examples], texts)
        return np.array([np.nan if verdict is None else float(verdict) for verdict in verdicts])

    def _text(self, tokens: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(tokens), skip_special_tokens=True))


def _top_tokens(model: Any, rows: RowBatch) -> Tensor:
    """The most likely token at every scored position, `[B, T]`."""
    return scored_logits(model, rows).argmax(-1)
