"""The sweep over all heads: which work there is, which of it is done, and who does the rest.

A piece of work is a layer with all its heads (or units of another kind) on one batch of examples, or several layers
where a measure wants more rows together than one has. What is measured there is a `Measure`'s affair:
log-probabilities (`ablate.py`) or replies (`decode.py`).

Shape letters: H head, N example.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Protocol

import numpy as np

from castune.artifacts import Unit
from castune.core.batching import ExampleBatch
from castune.core.flops import ForwardFlops
from castune.core.journal import Journal, Record, nullable
from castune.core.memory import return_freed_memory
from castune.core.progress import progress
from castune.core.shards import Shard
from castune.diagnosis.ablator import Ablator
from castune.diagnosis.score import Floats


@dataclass(frozen=True)
class Outcomes:
    """Outcomes of the examples of one set: 0/1 decisions (NaN: unscored) or margins."""

    baseline_N: Floats
    ablated_HN: Floats
    n_decoded: int = 0
    """How many of the ablated replies differed from the whole model's and had to be decoded."""


class Measure(Protocol):
    """What a sweep measures.

    Attributes:
        batches: examples that are measured together; all examples are in one of them.
        unit_tokens: rows x tokens that a unit should have; layers are put together until it has.
        n_decoded: replies that the last `ablated` had to decode.
    """

    @property
    def batches(self) -> Sequence[ExampleBatch]: ...  # noqa: D102

    @property
    def unit_tokens(self) -> int: ...  # noqa: D102

    @property
    def n_decoded(self) -> int: ...  # noqa: D102

    def baseline(self, batch: ExampleBatch) -> Floats:
        """Outcomes `[N]` of the whole model on a batch; keeps what `ablated` resumes from."""

    def ablated(self, heads: Sequence[Unit]) -> Floats:
        """Outcomes `[H, N]` of the batch of the last `baseline`, without each of `heads`, which lie layer by layer."""


@dataclass(frozen=True)
class Work:
    """All heads of some layers on one batch of examples; `heads` are their numbers."""

    batch: int
    heads: tuple[int, ...]


def units_of(heads: Sequence[Unit], batches: Sequence[ExampleBatch], unit_tokens: int) -> list[Work]:
    """The work of a sweep, batch by batch: layers one after the other, together until a piece has `unit_tokens`."""
    units: list[Work] = []
    for number, batch in enumerate(batches):
        together: list[int] = []
        for _, of_layer in groupby(range(len(heads)), key=lambda n: heads[n].place):
            together += of_layer
            if len(together) * batch.n_tokens >= unit_tokens:
                units.append(Work(number, tuple(together)))
                together = []
        if together:
            units.append(Work(number, tuple(together)))
    return units


def sweep(
    name: str,
    ablator: Ablator,
    measure: Measure,
    *,
    journal: Journal,
    shard: Shard,
) -> Outcomes | None:
    """Outcomes of all examples, for the whole model and without each head.

    What the journal holds is not measured again, and the outcome does not depend on how the work was split.

    Args:
        name: of the example set, in the journal.
        ablator: the model and the heads.
        measure: what is measured.
        journal: where results go.
        shard: which share of the work is this process's.

    Returns:
        The outcomes; None while other shares are missing.
    """
    units = units_of(ablator.heads, measure.batches, measure.unit_tokens)
    flops = ForwardFlops.of(ablator.model, ablator.layout)

    def cost(unit: Work) -> float:
        batch, layers = measure.batches[unit.batch], [ablator.heads[number].layer for number in unit.heads]
        return sum(batch.flops(flops, first_layer=ablator.first_layer(layer)) for layer in layers)

    known = _Known(name, ablator.heads, sum(len(batch.examples) for batch in measure.batches))
    known.read(journal)
    todo = [
        unit for unit in shard.share(units, cost) if not known.has(unit.heads, measure.batches[unit.batch].examples)
    ]
    recorded = None
    with progress(f"ablations, {name}", sum(map(cost, todo))) as advance:
        for unit in todo:
            batch = measure.batches[unit.batch]
            if recorded != unit.batch:
                return_freed_memory()
                values_N = measure.baseline(batch)
                recorded = unit.batch
                known.add(journal, [], batch.examples, values_N[None], 0)
            values_HN = measure.ablated([ablator.heads[number] for number in unit.heads])
            known.add(journal, unit.heads, batch.examples, values_HN, measure.n_decoded)
            advance(cost(unit))
    shard.wait()
    if shard.count > 1:
        known.read(journal)
    return known.outcomes()


@dataclass
class _Known:
    """Outcomes so far. Row 0 is the whole model, row 1 + i the i-th head."""

    name: str
    heads: Sequence[Unit]
    n_examples: int

    def __post_init__(self) -> None:
        shape = (1 + len(self.heads), self.n_examples)
        self.values, self.is_known = np.full(shape, np.nan), np.zeros(shape, dtype=bool)
        self.n_decoded: dict[tuple[tuple[int, ...], tuple[int, ...]], int] = {}
        self.row_of = {str(head): 1 + i for i, head in enumerate(self.heads)}

    def has(self, numbers: Sequence[int], examples: Sequence[int]) -> bool:
        rows = [0, *(1 + number for number in numbers)]
        return bool(self.is_known[np.ix_(rows, examples)].all())

    def add(
        self,
        journal: Journal,
        numbers: Sequence[int],
        examples: Sequence[int],
        values_HN: Floats,
        n_decoded: int,
    ) -> None:
        record = {
            "set": self.name,
            # None of them: the whole model.
            "heads": [str(self.heads[number]) for number in numbers],
            "examples": list(examples),
            "values": [nullable(values_N) for values_N in values_HN],
            "decoded": n_decoded,
        }
        journal.append(record)
        self._fill(record)

    def read(self, journal: Journal) -> None:
        for record in journal.records():
            if record.get("set") == self.name:
                self._fill(record)

    def outcomes(self) -> Outcomes | None:
        if not self.is_known.all():
            return None
        return Outcomes(self.values[0], self.values[1:], sum(self.n_decoded.values()))

    def _fill(self, record: Record) -> None:
        examples, values_HN = record["examples"], np.array(record["values"], dtype=float)
        rows = [self.row_of[head] for head in record["heads"]] or [0]
        self.n_decoded[tuple(rows), tuple(examples)] = record["decoded"]
        self.values[np.ix_(rows, examples)] = values_HN
        self.is_known[np.ix_(rows, examples)] = True
