"""Which heads, and units of other kinds, are trained, and how they were chosen."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from castune.artifacts.files import read_json, typed, write_json
from castune.errors import ArtifactError
from castune.names import SCORES, ZONES

SELECTION_FILE = "selection.json"
_KIND = "head selection"
# Fields that only selections with units of other kinds than query heads have.
_OF_UNITS = ("units", "mlp_groups")


@dataclass(frozen=True)
class HeadSelection:
    """A set of heads of one model, and of units of other kinds.

    Attributes:
        heads: sorted (layer, head) pairs.
        zone: safe | risky | random | layer-matched | all | bucket | custom.
        fraction: the share of all heads (of all units of each kind) that was asked for; None for a bucket.
        buckets: number of equal buckets, and `bucket` (1: highest conflict) of them; else None.
        score: the score heads were sorted by: conflict | gradient | sensitivity.
        seed: seed of a random or layer-matched selection, else None.
        n_total: number of heads, and units of other kinds, the selection was made from.
        model_fingerprint: the model the heads belong to.
        conflict_map_hash: hash of the map's table the selection was made from, None for a custom one.
        units: sorted (kind, layer, number) of the units that are no query heads (`castune.core.units`).
        mlp_groups: into how many groups the neurons of a layer are cut; None without such groups.
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
    units: tuple[tuple[str, int, int], ...] = ()
    mlp_groups: int | None = None

    def __post_init__(self) -> None:
        heads = tuple(sorted((int(layer), int(head)) for layer, head in self.heads))
        units = tuple(sorted((str(kind), int(layer), int(number)) for kind, layer, number in self.units))
        if len(set(heads)) != len(heads) or len(set(units)) != len(units):
            raise ValueError("a head is selected twice")
        if any(kind == "q_head" for kind, _, _ in units):
            raise ValueError("query heads are selected by `heads`, not by `units`")
        if any(kind == "mlp_group" for kind, _, _ in units) != (self.mlp_groups is not None):
            raise ValueError("groups of neurons and `mlp_groups`, how many there are in a layer, go together")
        object.__setattr__(self, "heads", heads)
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
            heads: (layer, head) pairs.
            n_total: number of heads of the model; with other units of all units of these kinds.
            model_fingerprint: the model (`core.provenance.fingerprint`).
            units: (kind, layer, number) triples.
            mlp_groups: how many groups of neurons a layer has, where there are such units.
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
            units=tuple(units),
            mlp_groups=mlp_groups,
        )

    @property
    def all_units(self) -> tuple[tuple[str, int, int], ...]:
        """(kind, layer, number) of everything selected, query heads first."""
        return (*(("q_head", layer, head) for layer, head in self.heads), *self.units)

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of unit that are selected, query heads first."""
        return tuple(dict.fromkeys(kind for kind, _, _ in self.all_units))

    @property
    def counted(self) -> str:
        """How many units of each kind are selected, in words."""
        numbers = Counter(kind for kind, _, _ in self.all_units)
        return (
            ", ".join(f"{n} {'heads' if kind == 'q_head' else f'{kind}s'}" for kind, n in numbers.items()) or "0 heads"
        )

    @property
    def layers(self) -> tuple[int, ...]:
        """Layers that hold a selected head, or a selected unit of another kind, sorted."""
        return tuple(sorted({layer for _, layer, _ in self.all_units}))

    def heads_of(self, layer: int) -> tuple[int, ...]:
        """Selected heads of a layer, sorted."""
        return tuple(head for owner, head in self.heads if owner == layer)

    def joined(self, others: Iterable[HeadSelection]) -> HeadSelection:
        """With everything that others select too; how the first was chosen is kept, for the record."""
        every = (self, *others)
        return replace(
            self,
            heads=tuple(sorted({head for one in every for head in one.heads})),
            units=tuple(sorted({one for selection in every for one in selection.units})),
        )

    def to_json(self) -> dict[str, Any]:
        """Plain JSON content; of a selection of query heads alone that of before there were other units."""
        content = {**asdict(self), "heads": [list(pair) for pair in self.heads]}
        others = {name: content.pop(name) for name in _OF_UNITS}
        return {**content, **others, "units": [list(one) for one in self.units]} if self.units else content

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
        selection = typed(path, _KIND, cls, record)
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
