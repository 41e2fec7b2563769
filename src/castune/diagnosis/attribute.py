"""H_gen and H_safe to first order: the margins of both sets without every unit, from one backward pass a batch.

Shape letters: H head (all units in one axis), N example, B batch row, T scored token.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from castune.artifacts import Unit
from castune.core.attribution import attributed, taped
from castune.core.batching import ExampleBatch, example_batches
from castune.core.losses import RowBatch, run_batches, token_log_probs
from castune.diagnosis.ablator import Ablator
from castune.diagnosis.gradients import only_these_require_grad
from castune.diagnosis.outcomes import Outcome
from castune.diagnosis.score import Floats


class AttributedMeasure:
    """Margins, and to first order what they become without each unit.

    Args:
        ablator: the model and the units.
        outcome: the rows of the examples, and how a margin follows.
        batch_tokens: rows x tokens of one forward and backward.
    """

    n_decoded = 0
    # All layers come from one backward pass.
    unit_tokens = sys.maxsize

    def __init__(self, ablator: Ablator, outcome: Outcome, *, batch_tokens: int) -> None:
        self.ablator, self.outcome, self.batch_tokens = ablator, outcome, batch_tokens
        self.batches = example_batches(
            ablator.model, ablator.layout, outcome.rows_of, batch_tokens, packed=False, differentiated=True
        )
        self._row_of = {head: number for number, head in enumerate(ablator.heads)}
        self._sites = {head.place: ablator.units.site(*head.place) for head in ablator.heads}

    def baseline(self, batch: ExampleBatch) -> Floats:
        """Margins of the whole model; keeps what they become without each unit."""
        margins, changes = [], []
        # Halves of a batch that does not fit keep the order of its examples.
        for _, (margin_N, change_HN) in run_batches([list(batch.examples)], self._attributed):
            margins.append(margin_N)
            changes.append(change_HN)
        baseline_N = np.concatenate(margins)
        self._ablated_HN = baseline_N + np.concatenate(changes, axis=1)
        return baseline_N

    def ablated(self, heads: Sequence[Unit]) -> Floats:
        """Margins without each unit."""
        return np.asarray(self._ablated_HN[[self._row_of[head] for head in heads]])

    def _attributed(self, examples: list[int]) -> tuple[Floats, Floats]:
        """Margins `[N]` of some examples, and their changes `[H, N]`."""
        model, rows_of = self.ablator.model, [self.outcome.rows_of[n] for n in examples]
        owner_B = torch.tensor([i for i, rows in enumerate(rows_of) for _ in rows])
        batch = RowBatch.of([row for rows in rows_of for row in rows], next(model.parameters()).device)
        with torch.enable_grad(), only_these_require_grad(model, []), taped(model, self._sites.values()) as tape:
            values_BT = token_log_probs(model, batch)
            margin_N, weights_BT = self._read(examples, values_BT.detach())
            effects = attributed(tape, (values_BT * weights_BT).sum(1), self.ablator.replacements)
        change_HN = np.empty((len(self.ablator.heads), len(examples)))
        # To the CPU once a site: a head at a time would wait for the device as often.
        by_site = {site: effect_BU.double().cpu() for site, effect_BU in effects.items()}
        for head, row in self._row_of.items():
            change_B = by_site[self._sites[head.place]][:, head.index]
            change_HN[row] = torch.zeros(len(examples), dtype=torch.float64).index_add_(0, owner_B, change_B).numpy()
        return margin_N, change_HN

    def _read(self, examples: Sequence[int], values_BT: Tensor) -> tuple[Floats, Tensor]:
        """Margins, and their derivatives by every scored token's log-probability."""
        values = values_BT.double().cpu().numpy()
        weights = np.zeros(values.shape)
        margins, row = [], 0
        for n in examples:
            rows = self.outcome.rows_of[n]
            of_rows = [values[row + i, : len(one.tokens)] for i, one in enumerate(rows)]
            margins.append(self.outcome(n, of_rows))
            if np.isfinite(margins[-1]):
                for i, by_token in enumerate(self.outcome.derivative(n, of_rows)):
                    weights[row + i, : len(by_token)] = by_token
            row += len(rows)
        return np.array(margins), torch.tensor(weights).to(values_BT)
