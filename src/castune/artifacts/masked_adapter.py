"""An adapter made from others: whose, how they were combined, and what of them was kept."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from castune.artifacts.formats import read_json, typed, write_json
from castune.artifacts.records import ModelRecord, Provenance
from castune.artifacts.tune_result import Certificate

_KIND = "masked adapter"
MASK_FILE = "mask.json"


@dataclass(frozen=True)
class MaskedAdapter:
    """Plain LoRA adapters, combined where there are several, and cut down to what the selected units own.

    Attributes:
        certificate: the proof that nothing else is changed.
        zone: zone of the selection.
        n_total: number of heads, and units of other kinds, the selection was made from.
        sources: of each adapter: `name`, `hash` (`adapter_hash`), `r`, `alpha`.
        combination: linear | ties; None for one adapter.
        weights: weight of each adapter; None for one adapter.
        density: share of the values TIES keeps; None where there is none.
        dropped: how many modules of each name the sources adapt and the result does not.
        unadapted_layers: layers with a part of a selected unit that no source adapts; that part is the base's.
        model: identity of the base model.
        provenance: versions, machine, command, time.
    """

    certificate: Certificate
    zone: str
    n_total: int
    sources: tuple[dict[str, Any], ...]
    combination: str | None
    weights: tuple[float, ...] | None
    density: float | None
    dropped: dict[str, int]
    unadapted_layers: tuple[int, ...]
    model: ModelRecord
    provenance: Provenance

    def save(self, directory: str | Path) -> Path:
        """Write `mask.json`, and `certificate.json` before it, into an adapter directory, atomically."""
        content = asdict(self)
        del content["certificate"]  # it has a file of its own
        self.certificate.save(directory)
        path = Path(directory) / MASK_FILE
        write_json(path, _KIND, content)
        return path

    @classmethod
    def load(cls, directory: str | Path) -> MaskedAdapter:
        """Read the record, and the certificate beside it, of an adapter directory."""
        path = Path(directory) / MASK_FILE
        record = read_json(path, _KIND, f"castune mask ADAPTER --out {directory}")
        return typed(path, _KIND, cls, {**record, "certificate": asdict(Certificate.load(directory))})
