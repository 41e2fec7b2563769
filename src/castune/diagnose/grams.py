"""Inner products of partial gradients for every utility domain, out of the journal or measured (Eq. 2).

Shape letters: H head (all heads of the model in one axis), C gradient chunk.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from castune.config import DiagnoseConfig
from castune.core.heads import HeadId, HeadLayout
from castune.core.journal import Journal
from castune.core.progress import progress
from castune.data.rows import Row
from castune.diagnose.gradients import gram_matrices, partial_gradients
from castune.diagnose.score import Floats


@dataclass(frozen=True)
class Gram:
    """Inner products of partial gradients; the first `n_safety` belong to the safety loss."""

    products_HCC: Floats
    n_safety: int


def measure_grams(
    model: Any,
    layout: HeadLayout,
    heads: Sequence[HeadId],
    rows: Mapping[str, Sequence[Row]],
    config: DiagnoseConfig,
    journal: Journal,
) -> dict[str, Gram]:
    """The Gram matrices by utility objective; those that the journal lacks are measured and put into it.

    Args:
        model: the model, in evaluation mode.
        layout: its head layout.
        heads: heads whose layers are measured.
        rows: one row an example, by objective: `safety`, whose gradients are measured once, and those of utility.
        config: settings, `batch_tokens` a number.
        journal: of the diagnosis.
    """
    grams = journaled_grams(journal)
    todo = [objective for objective in rows if objective != "safety" and objective not in grams]
    if not todo:
        return grams
    layers = sorted({head.layer for head in heads})
    assert config.batch_tokens != "auto"
    options: dict[str, Any] = {"n_chunks": config.gradient_chunks, "batch_tokens": config.batch_tokens}
    with progress("gradients", sum(len(rows[objective]) for objective in ("safety", *todo))) as advance:
        safety = partial_gradients(model, layout, layers, rows["safety"], advance=advance, **options)
        for objective in todo:
            chunks = [*safety, *partial_gradients(model, layout, layers, rows[objective], advance=advance, **options)]
            gram = grams[objective] = Gram(gram_matrices(layout, layers, chunks), len(safety))
            del chunks  # as large as the model's query projections many times over, and the next domain's come
            journal.append({"gram": gram.products_HCC.tolist(), "n_safety": gram.n_safety, "objective": objective})
    return grams


def journaled_grams(journal: Journal) -> dict[str, Gram]:
    """The Gram matrices in the journal, by objective."""
    return {
        record["objective"]: Gram(np.array(record["gram"]), record["n_safety"])
        for record in journal.records()
        if "objective" in record
    }
