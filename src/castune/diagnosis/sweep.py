"""The sweep over all heads: which work there is, which of it is done, and who does the rest.

A piece of work is a layer with all its heads (or units of another kind) on one batch of examples, or several layers
where a measure wants more rows together than one has. What is measured there is a `Measure`'s affair:
log-probabilities (`ablate.py`) or replies (`decode.py`).

Shape letters: H head, N example.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from castune.core.ablation import ablate_at, record_residuals, resume_from
from castune.core.batching import ExampleBatch
from castune.core.flops import ForwardFlops
from castune.core.heads import HeadLayout
from castune.core.journal import Journal, Record, nullable
from castune.core.losses import RowBatch
from castune.core.memory import return_freed_memory
from castune.core.progress import progress
from castune.core.shards import Shard
from castune.core.units import Site, Unit, UnitLayout
from castune.diagnosis.score import Floats
from castune.errors import CastuneError

logger = logging.getLogger(__name__)

T = TypeVar("T")
Read = Callable[[Any, RowBatch], T]
"""Runs the model on rows and keeps what is wanted of its output, one entry a row."""


@dataclass(frozen=True)
class Outcomes:
    """Outcomes of the examples of one set: 0/1 decisions (NaN: unscored) or margins."""

    baseline_N: Floats
    ablated_HN: Floats
    n_decoded: int = 0
    """How many of the ablated replies differed from the whole model's and had to be decoded."""


@dataclass(frozen=True)
class Ablator:
    """A model with the heads, or units of other kinds, to ablate and what to put in their place."""

    model: Any
    layout: HeadLayout
    heads: Sequence[Unit]
    resumable: bool
    replacements: dict[Site, Tensor] | None = None  # [W] each; None: zero
    units: UnitLayout | None = None
    """Where the units are; of query heads alone `layout` tells."""

    def without(self, layer: int, heads: int | Tensor, kind: str = "q_head") -> AbstractContextManager[None]:
        """The model without a unit of `layer`, or without `heads[b]` in batch row b, inside a `with` block."""
        site = (self.units or UnitLayout(self.layout)).site(kind, layer)
        return ablate_at(self.model, site, heads, None if self.replacements is None else self.replacements[site])

    @contextmanager
    def without_each(self, heads: Sequence[Unit]) -> Iterator[None]:
        """The model without `heads[b]` in batch row b, of whatever layers and kinds they are."""
        with ExitStack() as stack:
            for kind, layer in sorted({place_of(head) for head in heads}):
                of_row = torch.tensor([head.number if place_of(head) == (kind, layer) else -1 for head in heads])
                stack.enter_context(self.without(layer, of_row, kind))
            yield

    def first_layer(self, layer: int) -> int:
        """The decoder layer at which a forward with a head of `layer` ablated begins."""
        return layer if self.resumable else 0


def place_of(head: Unit) -> tuple[str, int]:
    """Kind and layer of a unit: those of one place are ablated together."""
    return head.kind, head.layer


def distinct(units: UnitLayout, heads: Sequence[Unit]) -> tuple[list[Unit], list[int]]:
    """The units that are ablated, and for each of all units which of them is ablated in its place.

    Without a head's columns of the output projection the model is the same as without the head, and without the only
    group of neurons the same as without the MLP: it is measured once.
    """
    first: dict[tuple[str, bool, int, int], int] = {}
    swept: list[Unit] = []
    twins = []
    for one in heads:
        site = units.site(*place_of(one))
        place = (site.path, site.is_output, *site.spans[one.number])
        if place not in first:
            first[place] = len(swept)
            swept.append(one)
        twins.append(first[place])
    return swept, twins


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
        for _, of_layer in groupby(range(len(heads)), key=lambda n: place_of(heads[n])):
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
        self.row_of = {tuple(head): 1 + i for i, head in enumerate(self.heads)}

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
            "heads": [list(self.heads[number]) for number in numbers],
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
        heads, examples = [tuple(head) for head in record["heads"]], record["examples"]
        values_HN = np.array(record["values"], dtype=float)
        rows = [self.row_of[head] for head in heads] or [0]
        self.n_decoded[tuple(rows), tuple(examples)] = record["decoded"]
        self.values[np.ix_(rows, examples)] = values_HN
        self.is_known[np.ix_(rows, examples)] = True


def part_size(n_rows: int, length: int, batch_tokens: int) -> int:
    """How many of `n_rows` rows the next forward takes: parts of equal size, for a small last one is slow."""
    n_parts = -(-n_rows // max(1, batch_tokens // length))
    return -(-n_rows // n_parts)


class RecordedBatch:
    """One batch of rows with its residuals: runs again with heads ablated, many heads in one forward.

    Args:
        ablator: the model and the heads.
        rows: the rows.
        batch_tokens: rows x tokens of one forward; halved for good where memory does not suffice.
    """

    def __init__(self, ablator: Ablator, rows: RowBatch, batch_tokens: int) -> None:
        self.ablator, self.rows, self.batch_tokens = ablator, rows, batch_tokens
        self._residuals: dict[int, Tensor] = {}

    def baseline(self, read: Read[Tensor]) -> Tensor:
        """`read` of every row for the whole model, `[B, ...]`; records the residuals."""
        return torch.cat([values.cpu() for _, values in self.baseline_parts(read)])

    def ablated(self, layer: int, heads: Sequence[int], read: Read[Tensor], kind: str = "q_head") -> Tensor:
        """`read` of every row without each of `heads`, `[H, B, ...]`. Needs `baseline` first where resumable."""
        values = torch.cat([values.cpu() for _, values in self.ablated_parts(layer, heads, read, kind)])
        of_heads: Tensor = values.unflatten(0, (len(heads), len(self.rows.ids_BS)))
        return of_heads

    def baseline_parts(self, read: Read[T]) -> Iterator[tuple[Tensor, T]]:
        """The same forward by forward: numbers of rows, and what was read. All have to be taken."""
        parts: list[dict[int, Tensor]] = []

        def forward(row_b: Tensor) -> T:
            residuals: dict[int, Tensor] = {}
            recording = record_residuals(self.ablator.model, self.ablator.layout, residuals)
            with recording if self.ablator.resumable else nullcontext():
                values = read(self.ablator.model, self.rows.rows(row_b))
            parts.append(residuals)
            return values

        yield from self._in_parts(torch.arange(len(self.rows.ids_BS)), forward)
        layers = parts[0].keys()
        self._residuals = {layer: torch.cat([part[layer] for part in parts]) for layer in layers}

    def ablated_parts(
        self, layer: int, heads: Sequence[int], read: Read[T], kind: str = "q_head"
    ) -> Iterator[tuple[Tensor, T]]:
        """The same forward by forward: numbers of pairs of head and row, rows innermost, and what was read."""
        n_rows = len(self.rows.ids_BS)
        device = self.rows.ids_BS.device
        head_P = torch.tensor(heads, device=device).repeat_interleave(n_rows)
        row_P = torch.arange(n_rows, device=device).repeat(len(heads))

        def forward(pair_p: Tensor) -> T:
            pair_p = pair_p.to(device)
            rows = self.rows.rows(row_P[pair_p])
            start: AbstractContextManager[None] = nullcontext()
            if self.ablator.resumable:
                residual_BSD = self._residuals[layer]
                residual_PSD = residual_BSD[row_P[pair_p].to(residual_BSD.device)]
                start = resume_from(self.ablator.model, self.ablator.layout, layer, residual_PSD)
            with start, self.ablator.without(layer, head_P[pair_p], kind):
                return read(self.ablator.model, rows)

        yield from self._in_parts(torch.arange(len(head_P)), forward)

    def _in_parts(self, index: Tensor, forward: Callable[[Tensor], T]) -> Iterator[tuple[Tensor, T]]:
        length = self.rows.ids_BS.shape[1]
        done = 0
        while done < len(index):
            size = part_size(len(index) - done, length, self.batch_tokens)
            part = index[done : done + size]
            try:
                with torch.no_grad():
                    values = forward(part)
            except torch.OutOfMemoryError:
                torch.cuda.empty_cache()
                if size == 1:
                    raise CastuneError(
                        f"out of memory on a single row of {length} tokens; lower max_length or use a smaller dtype"
                    ) from None
                self.batch_tokens = size // 2 * length
                logger.warning("out of memory: going on with %d tokens a forward", self.batch_tokens)
            else:
                done += size
                yield part, values
                del values  # May hold a cache, which must not outlive the next forward.
