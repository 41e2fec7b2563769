"""Batches of examples whose rows are run together, packed where that saves tokens.

Prompts begin alike (chat template, system prompt, instruction). Where the model scores trees exactly
(`can_share_prompts`), several examples become one row that runs this prefix once.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from castune.core.flops import ForwardFlops
from castune.core.heads import HeadLayout
from castune.core.losses import SCORED_MULTIPLE, batches_by_length, room_with_gradients
from castune.core.scoring import can_share_prompts
from castune.data.rows import Row, shared_prefix
from castune.errors import CastuneError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Floats = NDArray[np.float64]

# Attention over masked trees takes this many times its arithmetic, compared with matrix products: the default model
# in bfloat16 on CPU ran 190, 580 and 1,620 tokens a row at 1349, 1089 and 706 tokens a second.
_ATTENTION_OVERHEAD = 2
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

    @property
    def length(self) -> int:
        """Tokens of the longest row, to which the others are padded."""
        return max(len(row.ids) for row in self.rows)

    @property
    def n_tokens(self) -> int:
        """Tokens the model is given, padding included."""
        return len(self.rows) * self.length

    @property
    def n_scored(self) -> int:
        """Scored positions, padding included."""
        most = max(len(row.tokens) for row in self.rows)
        return len(self.rows) * -(-most // SCORED_MULTIPLE) * SCORED_MULTIPLE

    def flops(self, flops: ForwardFlops, *, first_layer: int = 0) -> float:
        """FLOPs of running all rows once, from `first_layer` on."""
        return flops.forward(n_rows=len(self.rows), length=self.length, n_scored=self.n_scored, first_layer=first_layer)

    def by_example(self, values: Sequence[NDArray[Any]]) -> list[list[NDArray[Any]]]:
        """Values of the scored tokens of `rows`, as those of each example's original rows, `[example][row]`."""
        found: dict[int, list[NDArray[Any]]] = {example: [] for example in self.examples}
        for row_values, parts in zip(values, self.parts, strict=True):
            start = 0
            for example, n_tokens in parts:
                found[example].append(row_values[start : start + n_tokens])
                start += n_tokens
        return [found[example] for example in self.examples]


def example_batches(
    model: PreTrainedModel,
    layout: HeadLayout,
    rows_of: Sequence[Sequence[Row]],
    batch_tokens: int,
    *,
    packed: bool = True,
    differentiated: bool = False,
) -> list[ExampleBatch]:
    """Batches of at most `batch_tokens` rows x tokens, longest examples first; the rows of an example stay together.

    Args:
        model: the model, in evaluation mode.
        layout: its head layout.
        rows_of: the rows of each example.
        batch_tokens: limit of a batch; an example beyond it is a batch of its own.
        packed: let examples share a row where that saves work. Not where a row must be one example's.
        differentiated: leave room for the gradients of what is scored (`room_with_gradients`).
    """
    # A unit is what must stay together: one example, or several that share a row.
    alone = [[n] for n in range(len(rows_of))]
    units = _packed_units(model, layout, rows_of, batch_tokens) if packed else alone
    unit_rows: list[list[Row]] = []
    unit_parts: list[list[list[tuple[int, int]]]] = []
    for unit in units:
        originals = [(n, row) for n in unit for row in rows_of[n]]
        if len(unit) > 1:
            unit_rows.append([Row.packed([row for _, row in originals])])
            unit_parts.append([[(n, len(row.tokens)) for n, row in originals]])
        else:
            unit_rows.append([row for _, row in originals])
            unit_parts.append([[(n, len(row.tokens))] for n, row in originals])
    # A unit of several rows takes as much room as one row of all their padded lengths.
    room = [
        len(rows) * max(room_with_gradients(row) if differentiated else len(row.ids) for row in rows)
        for rows in unit_rows
    ]
    return [
        ExampleBatch(
            [n for i in batch for n in units[i]],
            [row for i in batch for row in unit_rows[i]],
            [parts for i in batch for parts in unit_parts[i]],
        )
        for batch in batches_by_length(room, batch_tokens)
    ]


@torch.no_grad()
def tuned_batch_tokens(model: PreTrainedModel) -> int:
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


def _seconds(model: PreTrainedModel, ids: Tensor) -> float:
    started = time.perf_counter()
    model(input_ids=ids, logits_to_keep=1, use_cache=False).logits[0, 0, 0].item()  # waits for the device
    return time.perf_counter() - started


def _packed_units(
    model: PreTrainedModel, layout: HeadLayout, rows_of: Sequence[Sequence[Row]], batch_tokens: int
) -> list[list[int]]:
    """Which examples to put into one row, so that the least work is done; each alone where the model takes no trees."""
    order = sorted(range(len(rows_of)), key=lambda n: (-max(len(row.ids) for row in rows_of[n]), n))
    alone = [[n] for n in order]
    if len(rows_of) < 2 or any(len(rows) > 1 for rows in rows_of):
        return alone
    prefix = shared_prefix([row for rows in rows_of for row in rows])
    rests = {n: len(rows_of[n][0].ids) - prefix for n in order}
    rest = float(np.mean(list(rests.values())))
    flops = ForwardFlops.of(model, layout)

    def work(n_packed: int) -> float:
        """What a packed example costs: its tokens, and its share of the attention over the whole row."""
        tokens, length = prefix / n_packed + rest, prefix + n_packed * rest
        return tokens * (sum(flops.token_L) + _ATTENTION_OVERHEAD * sum(flops.pair_L) * length)

    best = min(range(1, min(_MOST_PACKED, len(rows_of)) + 1), key=work)
    room = min(prefix + best * rest, batch_tokens) - prefix
    units: list[list[int]] = []
    left = 0.0
    for n in order:
        if units and rests[n] <= left:
            units[-1].append(n)
            left -= rests[n]
        else:
            units.append([n])
            left = room - rests[n]
    longest = max((prefix + sum(rests[n] for n in unit) for unit in units if len(unit) > 1), default=0)
    return units if longest and can_share_prompts(model, longest=longest) else alone
