"""H_gen and H_safe: what each head's absence does to scores and replies (Eqs. 3-4).

Both sweeps return one outcome a head and example, and the baseline's. Heads are ablated one at a time; scoring
resumes from the recorded residual of the ablated layer where the model allows it.

Shape letters: H head, N example, K head width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from castune.core.ablation import ablate, mean_head_outputs, record_residuals, resume_from
from castune.core.generation import generate_replies
from castune.core.heads import HeadId, HeadLayout
from castune.core.judges import Judge
from castune.core.losses import RowBatch, batches_by_length
from castune.core.progress import Advance, no_progress
from castune.core.scoring import score_batch
from castune.data.chat import ChatFormat
from castune.data.example import Example
from castune.data.rows import Row
from castune.diagnose.score import Floats


@dataclass(frozen=True)
class Outcomes:
    """Outcomes of the examples of one set: 0/1 decisions (NaN: unscored) or margins."""

    baseline_N: Floats
    ablated_HN: Floats


@dataclass(frozen=True)
class Ablator:
    """A model with the heads to ablate and what to put in their place."""

    model: Any
    layout: HeadLayout
    heads: Sequence[HeadId]
    resumable: bool
    replacements: dict[int, Tensor] | None = None  # layer -> [H, K]; None: zero

    def without(self, head: HeadId) -> AbstractContextManager[None]:
        """The model without `head`, inside a `with` block."""
        filling = None if self.replacements is None else self.replacements[head.layer]
        return ablate(self.model, self.layout, head.layer, head.head, filling)

    @property
    def work_per_row(self) -> float:
        """Decoder layers run for one row over the whole sweep; the unit of progress."""
        n_layers = self.layout.n_layers
        if not self.resumable:
            return n_layers * (1 + len(self.heads))
        return n_layers + sum(n_layers - head.layer for head in self.heads)


def sweep_rows(
    ablator: Ablator, rows: Sequence[Row], *, batch_tokens: int, advance: Advance = no_progress
) -> tuple[list[Floats], list[list[Floats]]]:
    """Token log-probabilities of `rows` for the whole model, and without each head: `[row]`, `[head][row]`.

    Prompt batches are the outer loop, so only one batch's residuals are kept in memory.
    """
    model, layout = ablator.model, ablator.layout
    baseline: list[Floats] = [np.empty(0)] * len(rows)
    ablated: list[list[Floats]] = [[np.empty(0)] * len(rows) for _ in ablator.heads]
    for indices in batches_by_length([len(row.ids) for row in rows], batch_tokens):
        batch = [rows[i] for i in indices]
        residuals: dict[int, Tensor] = {}
        with record_residuals(model, layout, residuals) if ablator.resumable else nullcontext():
            _store(baseline, indices, score_batch(model, batch))
        advance(layout.n_layers * len(indices))
        for number, head in enumerate(ablator.heads):
            start = (
                resume_from(model, layout, head.layer, residuals[head.layer]) if ablator.resumable else nullcontext()
            )
            with start, ablator.without(head):
                _store(ablated[number], indices, score_batch(model, batch))
            advance((layout.n_layers - head.layer if ablator.resumable else layout.n_layers) * len(indices))
    return baseline, ablated


def scored_outcomes(
    ablator: Ablator,
    rows_of: Sequence[Sequence[Row]],
    outcome: Callable[[int, Sequence[Floats]], float],
    *,
    batch_tokens: int,
    advance: Advance = no_progress,
) -> Outcomes:
    """Outcomes that follow from token log-probabilities.

    Args:
        ablator: the model and the heads.
        rows_of: the rows of each example.
        outcome: example number and the log-probabilities of its rows -> decision or margin.
        batch_tokens: rows x tokens of one forward.
        advance: progress, in decoder layers x rows.
    """
    flat = [row for rows in rows_of for row in rows]
    ends = np.cumsum([len(rows) for rows in rows_of])
    baseline, ablated = sweep_rows(ablator, flat, batch_tokens=batch_tokens, advance=advance)

    def reduce(values: list[Floats]) -> Floats:
        return np.array([float(outcome(n, values[end - len(rows_of[n]) : end])) for n, end in enumerate(ends)])

    return Outcomes(reduce(baseline), np.array([reduce(values) for values in ablated]))


def refusal_outcomes(
    ablator: Ablator,
    tokenizer: Any,
    chat: ChatFormat,
    examples: Sequence[Example],
    judge: Judge,
    *,
    max_new_tokens: int,
    batch_tokens: int,
    advance: Advance = no_progress,
) -> Outcomes:
    """Whether each reply refuses, for the whole model and without each head: greedy generation, then the judge."""
    prompts = [chat.prompt_ids(example, reserve=max_new_tokens)[0] for example in examples]
    end_tokens = chat.end_tokens(ablator.model)

    def refusals() -> Floats:
        replies = generate_replies(
            ablator.model,
            tokenizer,
            prompts,
            max_new_tokens=max_new_tokens,
            end_tokens=end_tokens,
            batch_tokens=batch_tokens,
            advance=advance,
        )
        verdicts = judge([e.prompt for e in examples], [reply.text for reply in replies])
        return np.array([np.nan if verdict is None else float(verdict) for verdict in verdicts])

    baseline = refusals()
    ablated = []
    for head in ablator.heads:
        with ablator.without(head):
            ablated.append(refusals())
    return Outcomes(baseline, np.array(ablated))


def mean_replacements(
    model: nn.Module, layout: HeadLayout, rows: Sequence[Row], *, batch_tokens: int
) -> dict[int, Tensor]:
    """Mean output of every head over the calibration tokens, for mean ablation."""

    def forwards() -> Iterator[Tensor]:
        for indices in batches_by_length([len(row.ids) for row in rows], batch_tokens):
            batch = RowBatch.of([rows[i] for i in indices], next(model.parameters()).device)
            with torch.no_grad():
                model(input_ids=batch.ids_BS, logits_to_keep=1, use_cache=False)
            yield batch.real_BS

    return mean_head_outputs(model, layout, forwards)


def _store(values: list[Floats], indices: Sequence[int], batch: Sequence[Floats]) -> None:
    for index, value in zip(indices, batch, strict=True):
        values[index] = value
