"""What `castune repair` tried, and what it kept."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from castune.artifacts.formats import read_json, typed, write_json
from castune.artifacts.records import ModelRecord, Provenance, Settings

REPAIR_FILE = "repair.json"
_KIND = "repair"


@dataclass(frozen=True)
class Tried:
    """An adapter that was evaluated, beside the one that is repaired.

    Attributes:
        name: of it.
        kind: source | effects (units dropped by inspect's numbers) | risky (those of highest conflict score) | random |
            weaker (nothing dropped, the update multiplied so that it is as large as that of a candidate) | safe-lora
            (nothing dropped, updates projected by Safe LoRA).
        dropped: how many units are dropped.
        strength: what the update is multiplied by.
        predicted: to first order, change of the mean losses by objective; empty after a projection.
        safety: refusal rate; None where a suite has no scored prompt.
        kept: share of the gain in refusals; None where there is no gain, or nothing is scored.
        kept_interval: 95 %; None where it is not known.
        costs: by purpose (`castune.purposes`), what it costs above base, and its standard error.
        saved: what it costs less than the source by the cost that decides, and the standard error.
        n: scored examples by purpose, those of safety too; empty in records of before.
        too_few: why it is not comparable, in words, where far fewer examples are scored than of the source; else empty.
    """

    name: str
    kind: str
    dropped: int
    strength: float
    predicted: dict[str, float]
    safety: float | None
    kept: float | None
    kept_interval: tuple[float, float] | None
    costs: dict[str, tuple[float, float | None]]
    saved: tuple[float, float | None] | None
    n: dict[str, int] = field(default_factory=dict)
    too_few: str = ""


@dataclass(frozen=True)
class RepairResult:
    """What `castune repair` tried, and what it kept.

    Attributes:
        adapter: what was repaired: name, hash.
        model: identity of the base model.
        settings: the resolved `RepairConfig`.
        cost: the purpose whose cost decides.
        base_safety: refusal rate of the base model, on the suites that candidates are chosen by.
        suites: these suites.
        tried: on these suites: the source, candidates, and what they are compared with.
        chosen: name of the candidate that was taken; None where none was.
        reason: why, in a sentence.
        dropped: units that it drops, as [kind, layer, index].
        arm: name of the arm that was made of it; None without one.
        confirmed_on: suites that decided on nothing.
        confirmed: on these, the source, what was taken, and what it is compared with.
        provenance: versions, machine, command, time.
        judge: what decided on refusals; empty in records of before.
    """

    adapter: dict[str, str]
    model: ModelRecord
    settings: Settings
    cost: str
    base_safety: float
    suites: tuple[str, ...]
    tried: tuple[Tried, ...]
    chosen: str | None
    reason: str
    dropped: tuple[tuple[str, int, int], ...]
    arm: str | None
    confirmed_on: tuple[str, ...]
    confirmed: tuple[Tried, ...]
    provenance: Provenance
    judge: str = ""

    def to_json(self) -> dict[str, Any]:
        """Plain JSON content."""
        return asdict(self)

    def save(self, directory: str | Path) -> Path:
        """Write `repair.json`, atomically. Returns the file."""
        path = Path(directory) / REPAIR_FILE
        write_json(path, _KIND, self.to_json())
        return path

    @classmethod
    def load(cls, directory: str | Path) -> RepairResult:
        """Read it from its directory."""
        path = Path(directory) / REPAIR_FILE
        return typed(path, _KIND, cls, read_json(path, _KIND, "castune repair RUN"))
