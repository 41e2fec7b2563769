"""One unit: a query head, or another part of a layer that is diagnosed, chosen and trained as one."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

QUERY_HEAD = "q_head"


class Unit(NamedTuple):
    """A unit of a model. Units sort by kind, query heads first and the others by name, then by layer and index.

    Attributes:
        kind: one of `castune.names.KINDS`, in the singular.
        layer: the decoder layer.
        index: its number among the units of this kind in the layer.
    """

    kind: str
    layer: int
    index: int  # type: ignore[assignment]  # hides the method of tuples, which nobody needs here

    @classmethod
    def head(cls, layer: int, head: int) -> Unit:
        """A query head."""
        return cls(QUERY_HEAD, layer, head)

    @property
    def is_head(self) -> bool:
        """Whether it is a query head: the units of the paper."""
        return self.kind == QUERY_HEAD

    @property
    def place(self) -> tuple[str, int]:
        """Kind and layer: units of one place are ablated together."""
        return self.kind, self.layer

    def __str__(self) -> str:
        return f"{self.kind} {self.layer}.{self.index}"

    # A tuple has all four already, in another order.
    def __lt__(self, other: tuple[Any, ...]) -> bool:
        return _order(self) < _order(other)

    def __le__(self, other: tuple[Any, ...]) -> bool:
        return _order(self) <= _order(other)

    def __gt__(self, other: tuple[Any, ...]) -> bool:
        return _order(self) > _order(other)

    def __ge__(self, other: tuple[Any, ...]) -> bool:
        return _order(self) >= _order(other)


def _order(unit: tuple[Any, ...]) -> tuple[Any, ...]:
    return (unit[0] != QUERY_HEAD, *unit)


def joined(heads: Iterable[tuple[int, int]], others: Iterable[tuple[str, int, int]] = ()) -> tuple[Unit, ...]:
    """Units from (layer, head) pairs of query heads and (kind, layer, index) of others."""
    return (*(Unit.head(*head) for head in heads), *(Unit(*one) for one in others))


def heads_of(units: Iterable[Unit]) -> tuple[tuple[int, int], ...]:
    """(layer, head) of the query heads among some units, in their order."""
    return tuple((one.layer, one.index) for one in units if one.is_head)


def layers_of(units: Iterable[Unit]) -> tuple[int, ...]:
    """Layers that hold one of some units, sorted."""
    return tuple(sorted({one.layer for one in units}))


def only_heads(units: Iterable[Unit]) -> bool:
    """Whether there is no unit of another kind than query heads among some."""
    return all(one.is_head for one in units)
