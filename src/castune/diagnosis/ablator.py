"""A model without some of its units: which are ablated, and a batch of rows run again without each of them.

Shape letters: B batch row, S sequence position, D model width, H unit, P pair of unit and row, W channel.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from castune.artifacts import Unit
from castune.core.ablation import ablate_at, record_residuals, resume_from
from castune.core.heads import HeadLayout
from castune.core.losses import RowBatch
from castune.core.units import Site, UnitLayout
from castune.errors import CastuneError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

T = TypeVar("T")
Read = Callable[[Any, RowBatch], T]
"""Runs the model on rows and keeps what is wanted of its output, one entry a row."""


@dataclass(frozen=True)
class Ablator:
    """A model with the units to ablate and what to put in their place."""

    model: PreTrainedModel
    units: UnitLayout
    """Where they are."""
    heads: Sequence[Unit]
    """Which they are."""
    resumable: bool
    replacements: dict[Site, Tensor] | None = None  # [W] each; None: zero

    @property
    def layout(self) -> HeadLayout:
        """Where attention and decoder layers are."""
        return self.units.heads

    def without(self, place: tuple[str, int], indices: int | Tensor) -> AbstractContextManager[None]:
        """The model without one unit of a place, or without unit `indices[b]` in batch row b, inside a `with` block."""
        site = self.units.site(*place)
        return ablate_at(self.model, site, indices, None if self.replacements is None else self.replacements[site])

    @contextmanager
    def without_each(self, heads: Sequence[Unit]) -> Iterator[None]:
        """The model without `heads[b]` in batch row b, of whatever layers and kinds they are."""
        with ExitStack() as stack:
            for place in sorted({head.place for head in heads}):
                of_row = torch.tensor([head.index if head.place == place else -1 for head in heads])
                stack.enter_context(self.without(place, of_row))
            yield

    def first_layer(self, layer: int) -> int:
        """The decoder layer at which a forward with a head of `layer` ablated begins."""
        return layer if self.resumable else 0


def distinct(units: UnitLayout, heads: Sequence[Unit]) -> tuple[list[Unit], list[int]]:
    """The units that are ablated, and for each of all units which of them is ablated in its place.

    Without a head's columns of the output projection the model is the same as without the head, and without the only
    group of neurons the same as without the MLP: it is measured once.
    """
    first: dict[tuple[str, bool, int, int], int] = {}
    swept: list[Unit] = []
    twins = []
    for one in heads:
        site = units.site(*one.place)
        place = (site.path, site.is_output, *site.spans[one.index])
        if place not in first:
            first[place] = len(swept)
            swept.append(one)
        twins.append(first[place])
    return swept, twins


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

    def ablated(self, heads: Sequence[Unit], read: Read[Tensor]) -> Tensor:
        """`read` of every row without each of `heads`, which are of one place, `[H, B, ...]`.

        Needs `baseline` first where resumable.
        """
        values = torch.cat([values.cpu() for _, values in self.ablated_parts(heads, read)])
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

    def ablated_parts(self, heads: Sequence[Unit], read: Read[T]) -> Iterator[tuple[Tensor, T]]:
        """The same forward by forward: numbers of pairs of head and row, rows innermost, and what was read."""
        n_rows = len(self.rows.ids_BS)
        device = self.rows.ids_BS.device
        place, layer = heads[0].place, heads[0].layer
        head_P = torch.tensor([head.index for head in heads], device=device).repeat_interleave(n_rows)
        row_P = torch.arange(n_rows, device=device).repeat(len(heads))

        def forward(pair_p: Tensor) -> T:
            pair_p = pair_p.to(device)
            rows = self.rows.rows(row_P[pair_p])
            start: AbstractContextManager[None] = nullcontext()
            if self.ablator.resumable:
                residual_BSD = self._residuals[layer]
                residual_PSD = residual_BSD[row_P[pair_p].to(residual_BSD.device)]
                start = resume_from(self.ablator.model, self.ablator.layout, layer, residual_PSD)
            with start, self.ablator.without(place, head_P[pair_p]):
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
                logger.warning("out of memory: continuing with %d tokens per forward pass", self.batch_tokens)
            else:
                done += size
                yield part, values
                del values  # May hold a cache, which must not outlive the next forward.
