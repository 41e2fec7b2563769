"""Inner products of partial gradients for every utility domain, out of the journal or measured (Eq. 2).

Shape letters: H head (all heads of the model in one axis), C gradient chunk.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from castune.artifacts import Unit
from castune.config import DiagnoseConfig
from castune.core.journal import Journal
from castune.core.progress import progress
from castune.core.units import UnitLayout
from castune.data.rows import Row
from castune.diagnosis.gradients import gradient_passes, gram_matrices, partial_gradients
from castune.diagnosis.score import Floats

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Gram:
    """Inner products of partial gradients; the first `n_safety` belong to the safety loss."""

    products_HCC: Floats
    n_safety: int


def measure_grams(
    model: PreTrainedModel,
    layout: UnitLayout,
    units: Sequence[Unit],
    rows: Mapping[str, Sequence[Row]],
    config: DiagnoseConfig,
    journal: Journal,
) -> dict[str, Gram]:
    """The Gram matrices by utility objective; those that the journal lacks are measured and put into it.

    Held at once are the partial gradients of the safety loss and of one utility set, for as many projections as fit
    into `config.gradient_memory`; the others come in further passes over the examples.

    Args:
        model: the model, in evaluation mode.
        layout: where the units are.
        units: the units that are measured.
        rows: one row an example, by objective: `safety`, whose gradients are measured once, and those of utility.
        config: settings, `batch_tokens` a number.
        journal: of the diagnosis.
    """
    grams = journaled_grams(journal)
    todo = [objective for objective in rows if objective != "safety" and objective not in grams]
    if not todo:
        return grams
    assert config.batch_tokens != "auto"
    options: dict[str, Any] = {"n_chunks": config.gradient_chunks, "batch_tokens": config.batch_tokens}
    limit = config.gradient_memory * 1e9
    passes = gradient_passes(model, layout, units, n_chunks=2 * config.gradient_chunks, limit=limit)
    found: dict[str, Floats] = {}
    with progress("gradients", len(passes) * sum(len(rows[name]) for name in ("safety", *todo))) as advance:
        for number, paths in enumerate(passes, start=1):
            safety = partial_gradients(model, paths, rows["safety"], advance=advance, **options)
            for objective in todo:
                chunks = [*safety, *partial_gradients(model, paths, rows[objective], advance=advance, **options)]
                products_HCC = gram_matrices(layout, units, chunks)
                found[objective] = found[objective] + products_HCC if objective in found else products_HCC
                del chunks  # as large as all these projections many times over, and the next domain's come
                if number == len(passes):
                    gram = grams[objective] = Gram(found[objective], len(safety))
                    journal.append(
                        {"gram": gram.products_HCC.tolist(), "n_safety": gram.n_safety, "objective": objective}
                    )
            del safety
    return grams


def journaled_grams(journal: Journal) -> dict[str, Gram]:
    """The Gram matrices in the journal, by objective."""
    return {
        record["objective"]: Gram(np.array(record["gram"]), record["n_safety"])
        for record in journal.records()
        if "objective" in record
    }
