"""KL divergence of a model from another one on the same rows, token by token.

Shape letters: B batch row, T scored token, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from castune.core.losses import RowBatch, batches_by_length, run_batches, scored_logits
from castune.data.rows import Row

Floats = NDArray[np.float64]

# Logits of one side that are held at once, 0.27 GB in float32, and as much again three or four times over.
_MOST_LOGITS = 1 << 26


@torch.no_grad()
def divergences(
    model: nn.Module,
    as_reference: Callable[[], AbstractContextManager[object]],
    rows: Sequence[Row],
    *,
    vocabulary: int,
    batch_tokens: int,
) -> list[Floats]:
    """KL(reference || model) in nats at every scored position of every row, over the whole vocabulary.

    Args:
        model: the model.
        as_reference: makes the model the reference while the context is open (an adapter switched off, say).
        rows: what both are given.
        vocabulary: how many logits a position has.
        batch_tokens: rows x tokens of one forward.
    """
    device = next(model.parameters()).device
    # A row's logits count like tokens, so that long replies make small batches.
    per_token = max(1, _MOST_LOGITS // batch_tokens)
    lengths = [max(len(row.ids), -(-len(row.tokens) * vocabulary // per_token)) for row in rows]

    def measured(indices: list[int]) -> list[Floats]:
        batch = RowBatch.of([rows[i] for i in indices], device)
        with as_reference():
            reference_BTV = scored_logits(model, batch).log_softmax(-1)
        kl_BT = nn.functional.kl_div(
            scored_logits(model, batch).log_softmax(-1), reference_BTV, reduction="none", log_target=True
        ).sum(-1)
        values = kl_BT.double().cpu().numpy()
        return [values[place, : len(rows[i].tokens)] for place, i in enumerate(indices)]

    found: list[Floats] = [np.empty(0)] * len(rows)
    for indices, values in run_batches(batches_by_length(lengths, batch_tokens), measured):
        for index, value in zip(indices, values, strict=True):
            found[index] = value
    return found
