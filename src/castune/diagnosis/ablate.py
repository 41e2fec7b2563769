"""H_gen and H_safe from log-probabilities: accuracy, and the margins of both sets (Eqs. 3-4).

Shape letters: H head, N example, B batch row, T scored token.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby

import numpy as np
import torch
from torch import Tensor, nn

from castune.artifacts import Unit
from castune.config import DiagnoseConfig
from castune.core.ablation import site_means
from castune.core.batching import ExampleBatch, example_batches
from castune.core.losses import RowBatch, batches_by_length, token_log_probs
from castune.core.units import Site, UnitLayout
from castune.data.rows import Row
from castune.diagnosis.ablator import Ablator, RecordedBatch
from castune.diagnosis.outcomes import Outcome
from castune.diagnosis.score import Floats


class ScoredMeasure:
    """Outcomes that follow from token log-probabilities.

    Args:
        ablator: the model and the heads.
        outcome: the rows of the examples, and how an outcome follows.
        batch_tokens: rows x tokens of one forward.
    """

    n_decoded = 0
    unit_tokens = 0

    def __init__(self, ablator: Ablator, outcome: Outcome, *, batch_tokens: int) -> None:
        self.ablator, self.outcome, self.batch_tokens = ablator, outcome, batch_tokens
        self.batches = example_batches(ablator.model, ablator.layout, outcome.rows_of, batch_tokens)

    def baseline(self, batch: ExampleBatch) -> Floats:
        """Outcomes of the whole model."""
        self._batch = batch
        rows = RowBatch.of(batch.rows, next(self.ablator.model.parameters()).device)
        self._recorded = RecordedBatch(self.ablator, rows, self.batch_tokens)
        return self._outcomes(self._batch, self._recorded.baseline(token_log_probs))

    def ablated(self, heads: Sequence[Unit]) -> Floats:
        """Outcomes without each head."""
        outcomes: list[Floats] = []
        for _, of_place in groupby(heads, key=lambda head: head.place):
            values_HBT = self._recorded.ablated([*of_place], token_log_probs)
            outcomes += [self._outcomes(self._batch, values_BT) for values_BT in values_HBT]
        self.batch_tokens = self._recorded.batch_tokens
        return np.array(outcomes)

    def _outcomes(self, batch: ExampleBatch, values_BT: Tensor) -> Floats:
        values = values_BT.double().numpy()
        by_example = batch.by_example([values[i, : len(row.tokens)] for i, row in enumerate(batch.rows)])
        found = zip(batch.examples, by_example, strict=True)
        return np.array([float(self.outcome(example, values)) for example, values in found])


def replacements(
    model: nn.Module, layout: UnitLayout, units: Iterable[Unit], rows: Iterable[Row], config: DiagnoseConfig
) -> dict[Site, Tensor] | None:
    """What is put in the place of units: None for zero, or their means over the calibration tokens, `rows`."""
    if config.ablation == "zero":
        return None
    assert config.batch_tokens != "auto"
    batch_tokens, rows = config.batch_tokens, list(rows)

    def forwards() -> Iterator[Tensor]:
        for indices in batches_by_length([len(row.ids) for row in rows], batch_tokens):
            batch = RowBatch.of([rows[i] for i in indices], next(model.parameters()).device)
            with torch.no_grad():
                model(input_ids=batch.ids_BS, logits_to_keep=1, use_cache=False)
            yield batch.real_BS

    return site_means(model, dict.fromkeys(layout.site(*one.place) for one in units), forwards)
