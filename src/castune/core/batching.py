"""Batches of examples whose rows are run together, packed where that saves tokens.

Prompts begin alike (chat template, system prompt, instruction). Where the model scores trees exactly
(`can_share_prompts`), several examples become one row that runs this prefix once.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from castune.core.losses import batches_by_length
from castune.core.scoring import can_share_prompts
from castune.data.rows import Row, shared_prefix
from castune.errors import CastuneError

Floats = NDArray[np.float64]

# Attention over masked trees costs this many times its arithmetic, compared with matrix products (measured on CPU).
_ATTENTION_OVERHEAD = 3
_MOST_PACKED = 16
# Beyond these, a batch's residuals and logits outgrow what speed could still be won.
_MOST_TOKENS_CPU, _MOST_TOKENS, _TUNING_LENGTH = 4096, 65536, 128


@dataclass(frozen=True)
class ExampleBatch:
    """Examples that are run together.

    Attributes:
        examples: their numbers.
        rows: what the model is given.
        parts: for each of `rows`, the example and the number of scored tokens of every original row in it.
    """

    examples: list[int]
    rows: list[Row]
    parts: list[list[tuple[int, int]]]

    def by_example(self, values: Sequence[NDArray[Any]]) -> list[list[NDArray[Any]]]:
        """Values of the scored tokens of `rows`, as those of each example's original rows, `[example][row]`."""
        found: dict[int, list[NDArray[Any]]] = {example: [] for example in self.examples}
        for row_values, parts in zip(values, self.parts, strict=True):
            start = 0
            for example, n_tokens in parts:
                found[example].append(row_values[start : start + n_tokens])
                start += n_tokens
        return [found[example] for example in self.examples]


def example_batches(model: Any, rows_of: Sequence[Sequence[Row]], batch_tokens: int) -> list[ExampleBatch]:
    """Batches of at most `batch_tokens` rows x tokens, longest examples first; the rows of an example stay together.

    Args:
        model: the model, in evaluation mode.
        rows_of: the rows of each example.
        batch_tokens: limit of a batch; an example beyond it is a batch of its own.
    """
    n_packed = _packing(model, rows_of, batch_tokens)
    # A unit is what must stay together: one example, or several that share a row.
    order = sorted(range(len(rows_of)), key=lambda n: (-max(len(row.ids) for row in rows_of[n]), n))
    units = [order[start : start + n_packed] for start in range(0, len(order), n_packed)]
    unit_rows: list[list[Row]] = []
    unit_parts: list[list[list[tuple[int, int]]]] = []
    for unit in units:
        originals = [(n, row) for n in unit for row in rows_of[n]]
        if n_packed > 1:
            unit_rows.append([Row.packed([row for _, row in originals])])
            unit_parts.append([[(n, len(row.tokens)) for n, row in originals]])
        else:
            unit_rows.append([row for _, row in originals])
            unit_parts.append([[(n, len(row.tokens))] for n, row in originals])
    # A unit of several rows takes as much room as one row of all their padded lengths.
    room = [len(rows) * max(len(row.ids) for row in rows) for rows in unit_rows]
    return [
        ExampleBatch(
            [n for i in batch for n in units[i]],
            [row for i in batch for row in unit_rows[i]],
            [parts for i in batch for parts in unit_parts[i]],
        )
        for batch in batches_by_length(room, batch_tokens)
    ]


@torch.no_grad()
def tuned_batch_tokens(model: Any) -> int:
    """The number of tokens in a forward at which this model runs about fastest on its device.

    The smallest power of two that comes within a tenth of the best, so that noise rarely changes it.
    """
    device = next(model.parameters()).device
    speeds: dict[int, float] = {}
    most = _MOST_TOKENS_CPU if device.type == "cpu" else _MOST_TOKENS
    n_tokens = 512
    while n_tokens <= most:
        ids = torch.zeros(n_tokens // _TUNING_LENGTH, _TUNING_LENGTH, dtype=torch.long, device=device)
        try:
            seconds = min(_seconds(model, ids) for _ in range(2))
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            break
        speeds[n_tokens] = n_tokens / seconds
        if speeds[n_tokens] < 0.7 * max(speeds.values()):
            break
        n_tokens *= 2
    if not speeds:
        raise CastuneError("out of memory on 512 tokens: this model needs another device or a smaller dtype")
    return next(n for n, speed in speeds.items() if speed >= 0.9 * max(speeds.values()))


def _seconds(model: Any, ids: Tensor) -> float:
    started = time.perf_counter()
    model(input_ids=ids, logits_to_keep=1, use_cache=False).logits[0, 0, 0].item()  # waits for the device
    return time.perf_counter() - started


def _packing(model: Any, rows_of: Sequence[Sequence[Row]], batch_tokens: int) -> int:
    """How many examples to put into one row, so that the least work is done; 1 where the model takes no trees."""
    if len(rows_of) < 2 or any(len(rows) > 1 for rows in rows_of):
        return 1
    rows = [row for rows in rows_of for row in rows]
    prefix = shared_prefix(rows)
    rest = float(np.mean([len(row.ids) for row in rows])) - prefix
    config = model.config.get_text_config(decoder=True)
    weights = sum(p.numel() for p in model.parameters()) - config.vocab_size * config.hidden_size
    attention = 2 * _ATTENTION_OVERHEAD * config.num_hidden_layers * config.hidden_size / max(weights, 1)

    def work(n_packed: int) -> float:
        length = prefix + n_packed * rest
        return (prefix / n_packed + rest) * (1 + attention * length)

    choices = [k for k in range(1, _MOST_PACKED + 1) if prefix + k * rest <= batch_tokens and k <= len(rows)]
    best = min(choices or [1], key=work)
    longest = max(len(row.ids) for row in rows)
    if best > 1 and can_share_prompts(model, longest=prefix + best * (longest - prefix)):
        return best
    return 1
