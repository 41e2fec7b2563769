"""What an adapter's update does to several losses: unit by unit to first order, and as a whole exactly."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

import numpy as np
import torch

from castune.artifacts import Unit
from castune.core.losses import RowBatch, batches_by_length, reply_nll, run_batches
from castune.core.progress import progress
from castune.core.units import UnitLayout
from castune.core.updates import Effects, Floats, Update, first_order_effects
from castune.data.rows import Row
from castune.diagnosis.gradients import partial_gradients, passes_over

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def measure_effects(
    model: PreTrainedModel,
    layout: UnitLayout,
    units: Sequence[Unit],
    updates: Mapping[str, Update],
    rows: Mapping[str, Sequence[Row]],
    *,
    n_chunks: int,
    batch_tokens: int,
    gradient_memory: float,
) -> dict[str, Effects]:
    """First-order changes of the mean loss of several sets along an update; one backward a set and pass.

    Args:
        model: the base model, in evaluation mode.
        layout: where the units are.
        units: the units.
        updates: what the adapter adds, by module path.
        rows: one row an example, by set.
        n_chunks: parts of each set whose gradients are kept apart, for standard errors.
        batch_tokens: rows x tokens of one forward and backward.
        gradient_memory: gigabytes that these may take together; what does not fit is measured in further passes.
    """
    passes = passes_over(model, updates, n_chunks=n_chunks, limit=gradient_memory * 1e9)
    found: dict[str, Effects] = {}
    with progress("gradients", len(passes) * sum(map(len, rows.values()))) as advance:
        for name, of_set in rows.items():
            for paths in passes:
                chunks = partial_gradients(
                    model, paths, of_set, n_chunks=n_chunks, batch_tokens=batch_tokens, advance=advance
                )
                effects = first_order_effects(layout, units, chunks, updates)
                found[name] = found[name] + effects if name in found else effects
                del chunks  # as large as these projections many times over
    return found


@torch.no_grad()
def example_losses(model: PreTrainedModel, rows: Sequence[Row], *, batch_tokens: int) -> Floats:
    """The loss of every example, `[N]`."""
    device = next(model.parameters()).device
    losses_N = np.empty(len(rows))

    def run(batch: list[int]) -> Floats:
        return reply_nll(model, RowBatch.of([rows[n] for n in batch], device)).double().cpu().numpy()

    for batch, found in run_batches(batches_by_length([len(row.ids) for row in rows], batch_tokens), run):
        losses_N[batch] = found
    return losses_N


def exact_changes(
    model: PreTrainedModel,
    adapted: AbstractContextManager[PreTrainedModel],
    rows: Mapping[str, Sequence[Row]],
    *,
    batch_tokens: int,
) -> dict[str, Floats]:
    """What the adapter changes in the loss of every example, `[N]` by set.

    Args:
        model: the base model, in evaluation mode.
        adapted: gives the model with the adapter inside its block, and the base again afterwards.
        rows: one row an example, by set.
        batch_tokens: rows x tokens of one forward.
    """
    before = {name: example_losses(model, of_set, batch_tokens=batch_tokens) for name, of_set in rows.items()}
    with adapted as peft_model:
        return {
            name: example_losses(peft_model, of_set, batch_tokens=batch_tokens) - before[name]
            for name, of_set in rows.items()
        }
