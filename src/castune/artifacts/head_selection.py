"""Which heads are trained, and how they were chosen."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from castune.artifacts.files import parsed, read_json, write_json

_KIND = "head selection"


@dataclass(frozen=True)
class HeadSelection:
    """A set of heads of one model.

    Attributes:
        heads: sorted (layer, head) pairs.
        zone: safe | risky | random | layer-matched | all | bucket | custom.
        fraction: the share of all heads that was asked for; None for a bucket.
        buckets: number of equal buckets, and `bucket` (1: highest conflict) of them; else None.
        score: the score heads were sorted by: conflict | gradient | sensitivity.
        seed: seed of a random or layer-matched selection, else None.
        n_total: number of heads the selection was made from.
        model_fingerprint: the model the heads belong to.
        conflict_map_hash: hash of the map's table the selection was made from, None for a custom one.
    """

    heads: tuple[tuple[int, int], ...]
    zone: str
    fraction: float | None
    buckets: int | None
    bucket: int | None
    score: str
    seed: int | None
    n_total: int
    model_fingerprint: str
    conflict_map_hash: str | None

    def __post_init__(self) -> None:
        heads = tuple(sorted((int(layer), int(head)) for layer, head in self.heads))
        if len(set(heads)) != len(heads):
            raise ValueError("a head is selected twice")
        object.__setattr__(self, "heads", heads)

    @classmethod
    def custom(cls, heads: Iterable[tuple[int, int]], *, n_total: int, model_fingerprint: str) -> HeadSelection:
        """Heads chosen by hand, from no conflict map.

        Args:
            heads: (layer, head) pairs.
            n_total: number of heads of the model.
            model_fingerprint: the model (`core.provenance.fingerprint`).
        """
        return cls(
            heads=tuple(heads),
            zone="custom",
            fraction=None,
            buckets=None,
            bucket=None,
            score="conflict",
            seed=None,
            n_total=n_total,
            model_fingerprint=model_fingerprint,
            conflict_map_hash=None,
        )

    @property
    def layers(self) -> tuple[int, ...]:
        """Layers that hold a selected head, sorted."""
        return tuple(sorted({layer for layer, _ in self.heads}))

    def heads_of(self, layer: int) -> tuple[int, ...]:
        """Selected heads of a layer, sorted."""
        return tuple(head for owner, head in self.heads if owner == layer)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON content."""
        return {**asdict(self), "heads": [list(pair) for pair in self.heads]}

    def save(self, path: str | Path) -> Path:
        """Write `selection.json` (or the given file), atomically. Returns the file."""
        path = _file(path)
        write_json(path, _KIND, self.to_json())
        return path

    @classmethod
    def load(cls, path: str | Path) -> HeadSelection:
        """Read a selection from its file or its directory."""
        path = _file(path)
        record = read_json(path, _KIND, f"castune select {path.parent}")
        fields = cls.__dataclass_fields__
        return parsed(path, _KIND, lambda: cls(**{name: record[name] for name in fields}))


def _file(path: str | Path) -> Path:
    path = Path(path)
    return path if path.suffix == ".json" else path / "selection.json"
