"""An adapter at another strength: of which one, and how strong."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from castune.artifacts.formats import read_json, typed, write_json
from castune.artifacts.records import ModelRecord, Provenance
from castune.artifacts.tune_result import Certificate

_KIND = "scaled adapter"
SCALE_FILE = "scale.json"


@dataclass(frozen=True)
class ScaledAdapter:
    """A LoRA adapter whose update is another one's times a number.

    Attributes:
        certificate: the proof that nothing but the selection is changed.
        zone: zone of the selection.
        n_total: number of heads the selection was made from.
        source: the adapter it was made from: `name`, `hash` (`adapter_hash`), `r`, `alpha`.
        strength: what its update was multiplied by.
        target: what the strength was chosen for: `purpose` and `value`. None where it was given.
        model: identity of the base model.
        provenance: versions, machine, command, time.
    """

    certificate: Certificate
    zone: str
    n_total: int
    source: dict[str, Any]
    strength: float
    target: dict[str, Any] | None
    model: ModelRecord
    provenance: Provenance

    def save(self, directory: str | Path) -> Path:
        """Write `scale.json`, and `certificate.json` before it, into an adapter directory, atomically."""
        content = asdict(self)
        del content["certificate"]  # it has a file of its own
        self.certificate.save(directory)
        path = Path(directory) / SCALE_FILE
        write_json(path, _KIND, content)
        return path

    @classmethod
    def load(cls, directory: str | Path) -> ScaledAdapter:
        """Read the record, and the certificate beside it, of an adapter directory."""
        path = Path(directory) / SCALE_FILE
        record = read_json(path, _KIND, f"castune dial RUN --strength S --export {directory}")
        return typed(path, _KIND, cls, {**record, "certificate": asdict(Certificate.load(directory))})
