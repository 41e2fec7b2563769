"""Which heads, and units of other kinds, are trained, and how they were chosen."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from castune.artifacts.formats import read_json, typed, write_json
from castune.artifacts.unit import QUERY_HEAD, Unit, heads_of, joined, layers_of, only_heads
from castune.errors import ArtifactError
from castune.names import SCORES, ZONES, units_counted

SELECTION_FILE = "selection.json"
_KIND = "head selection"


@dataclass(frozen=True)
class _Written:
    """Units as they stand in the file: query heads apart from the others."""

    heads: tuple[tuple[int, int], ...]
    units: tuple[tuple[str, int, int], ...] = ()


@dataclass(frozen=True)
class HeadSelection:
    """A set of heads of one model, and of units of other kinds.

    Attributes:
        units: the selected units, sorted.
        zone: safe | risky | random | layer-matched | all | bucket | custom.
        fraction: the share of all heads (of all units of each kind) that was asked for; None for a bucket.
        buckets: number of equal buckets, and `bucket` (1: highest conflict) of them; else None.
        score: the score heads were sorted by: conflict | gradient | sensitivity.
        seed: seed of a random or layer-matched selection, else None.
        n_total: number of heads, and units of other kinds, the selection was made from.
        model_fingerprint: the model the heads belong to.
        conflict_map_hash: hash of the map's table the selection was made from, None for a custom one.
        mlp_groups: into how many groups the neurons of a layer are cut; None without such groups.
    """

    units: tuple[Unit, ...]
    zone: str
    fraction: float | None
    buckets: int | None
    bucket: int | None
    score: str
    seed: int | None
    n_total: int
    model_fingerprint: str
    conflict_map_hash: str | None
    mlp_groups: int | None = None

    def __post_init__(self) -> None:
        units = tuple(sorted(Unit(str(kind), int(layer), int(index)) for kind, layer, index in self.units))
        if len(set(units)) != len(units):
            raise ValueError("a head is selected twice")
        if any(one.kind == "mlp_group" for one in units) != (self.mlp_groups is not None):
            raise ValueError("groups of neurons and `mlp_groups`, how many there are in a layer, go together")
        object.__setattr__(self, "units", units)

    @classmethod
    def custom(
        cls,
        heads: Iterable[tuple[int, int]],
        *,
        n_total: int,
        model_fingerprint: str,
        units: Iterable[tuple[str, int, int]] = (),
        mlp_groups: int | None = None,
    ) -> HeadSelection:
        """Heads, and units of other kinds, chosen by hand, from no conflict map.

        Args:
            heads: (layer, head) pairs of query heads.
            n_total: number of heads of the model; with other units of all units of these kinds.
            model_fingerprint: the model (`core.provenance.fingerprint`).
            units: (kind, layer, index) of units of other kinds.
            mlp_groups: how many groups of neurons a layer has, where there are such units.
        """
        return cls(
            units=joined(heads, units),
            zone="custom",
            fraction=None,
            buckets=None,
            bucket=None,
            score="conflict",
            seed=None,
            n_total=n_total,
            model_fingerprint=model_fingerprint,
            conflict_map_hash=None,
            mlp_groups=mlp_groups,
        )

    @property
    def heads(self) -> tuple[tuple[int, int], ...]:
        """Sorted (layer, head) pairs of the selected query heads."""
        return heads_of(self.units)

    @property
    def only_heads(self) -> bool:
        """Whether no unit of another kind than query heads is selected."""
        return only_heads(self.units)

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of unit that are selected, query heads first."""
        return tuple(dict.fromkeys(one.kind for one in self.units))

    @property
    def counted(self) -> str:
        """How many units of each kind are selected, in words."""
        return units_counted(Counter(one.kind for one in self.units) or {QUERY_HEAD: 0})

    @property
    def layers(self) -> tuple[int, ...]:
        """Layers that hold a selected unit, sorted."""
        return layers_of(self.units)

    def heads_of(self, layer: int) -> tuple[int, ...]:
        """Selected heads of a layer, sorted."""
        return tuple(head for owner, head in self.heads if owner == layer)

    def joined(self, others: Iterable[HeadSelection]) -> HeadSelection:
        """With everything that others select too; how the first was chosen is kept, for the record."""
        every = (self, *others)
        return replace(self, units=tuple({one for selection in every for one in selection.units}))

    def to_json(self) -> dict[str, Any]:
        """Plain JSON content: query heads first, and at the end units of other kinds where there are any."""
        content = asdict(self)
        del content["units"], content["mlp_groups"]
        content = {"heads": [list(head) for head in self.heads], **content}
        if self.only_heads:
            return content
        others = [list(one) for one in self.units if not one.is_head]
        return {**content, "units": others, "mlp_groups": self.mlp_groups}

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
        written = typed(path, _KIND, _Written, record)
        selection = typed(path, _KIND, cls, {**record, "units": joined(written.heads, written.units)})
        # They become names of directories: a file that came from elsewhere must not lead to others.
        if selection.zone not in (*ZONES, "bucket", "custom") or selection.score not in SCORES:
            raise ArtifactError(
                f"{path}: damaged {_KIND}: zone {selection.zone!r} by score {selection.score!r}; zones are "
                f"{', '.join(ZONES)}, bucket, custom, scores {', '.join(SCORES)}"
            )
        return selection


def _file(path: str | Path) -> Path:
    path = Path(path)
    return path if path.suffix == ".json" else path / SELECTION_FILE
