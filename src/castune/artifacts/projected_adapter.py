"""An adapter with updates projected by Safe LoRA: which of them, and between which models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from castune.artifacts.formats import read_json, typed, write_json
from castune.artifacts.records import ModelRecord, Provenance
from castune.artifacts.tune_result import Certificate

_KIND = "projected adapter"
PROJECTION_FILE = "projection.json"


@dataclass(frozen=True)
class ProjectedUpdate:
    """The update of one module, and what Safe LoRA did to it.

    Attributes:
        module: path of the module.
        cosine: of the update and its projection; None for an update of zero.
        norm: Frobenius norm of the update.
        projected_norm: of its projection.
        is_projected: whether the projection has taken its place.
        rank: how many directions alignment moved the module in; None for the fast projector, which does not tell.
    """

    module: str
    cosine: float | None
    norm: float
    projected_norm: float
    is_projected: bool
    rank: int | None


@dataclass(frozen=True)
class ProjectedAdapter:
    """A LoRA adapter of which updates that leave the alignment space are projected onto it (Safe LoRA).

    Attributes:
        certificate: the proof that nothing but what all units of its modules own is changed. A projection mixes rows,
            so that an adapter of few heads changes all of its layers afterwards.
        n_total: number of units of these kinds that the model has.
        source: the adapter it was made from: `name`, `hash` (`adapter_hash`), `r`, `alpha`.
        aligned: identity of the aligned model.
        unaligned: identity of the model before its alignment.
        threshold: updates of a lower cosine are projected; None where their number was given.
        layers: how many are projected, those of the lowest cosine; None with a threshold.
        exact: whether by the exact projector.
        updates: what was done to each module.
        model: identity of the base model.
        provenance: versions, machine, command, time.
    """

    certificate: Certificate
    n_total: int
    source: dict[str, Any]
    aligned: ModelRecord
    unaligned: ModelRecord
    threshold: float | None
    layers: int | None
    exact: bool
    updates: tuple[ProjectedUpdate, ...]
    model: ModelRecord
    provenance: Provenance

    @property
    def sources(self) -> tuple[dict[str, Any], ...]:
        """The adapters it was made from, as of a masked one."""
        return (self.source,)

    @property
    def zone(self) -> str:
        """Zone of its selection: no map chose it."""
        return "custom"

    @property
    def rule(self) -> str:
        """Which updates are projected, in words."""
        return f"cosine below {self.threshold:g}" if self.layers is None else f"the {self.layers} of lowest cosine"

    @property
    def projected(self) -> list[ProjectedUpdate]:
        """The updates that were projected."""
        return [one for one in self.updates if one.is_projected]

    @property
    def cosines(self) -> list[float]:
        """Cosines in rising order, of the updates that have one."""
        return sorted(one.cosine for one in self.updates if one.cosine is not None)

    @property
    def kept_norm(self) -> float | None:
        """Frobenius norm of the whole update over what it was before; None for an update of zero."""
        before = _norm([one.norm for one in self.updates])
        after = _norm([one.projected_norm if one.is_projected else one.norm for one in self.updates])
        return after / before if before else None

    def save(self, directory: str | Path) -> Path:
        """Write `projection.json`, and `certificate.json` before it, into an adapter directory, atomically."""
        content = asdict(self)
        del content["certificate"]  # it has a file of its own
        self.certificate.save(directory)
        path = Path(directory) / PROJECTION_FILE
        write_json(path, _KIND, content)
        return path

    @classmethod
    def load(cls, directory: str | Path) -> ProjectedAdapter:
        """Read the record, and the certificate beside it, of an adapter directory."""
        path = Path(directory) / PROJECTION_FILE
        record = read_json(path, _KIND, f"castune project ADAPTER --unaligned MODEL --out {directory}")
        return typed(path, _KIND, cls, {**record, "certificate": asdict(Certificate.load(directory))})


def _norm(parts: Sequence[float]) -> float:
    return float(sum(part**2 for part in parts) ** 0.5)
