"""How the conflict map of a model changes while an arm is trained."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from castune.artifacts.formats import read_json, typed, write_json
from castune.artifacts.records import ModelRecord, Provenance, Settings

_KIND = "conflict drift"
DRIFT_FILE = "drift.json"
ZONES = ("risky", "middle", "safe")


@dataclass(frozen=True)
class ColumnDrift:
    """How one column of a later map goes with the same column of the first one. None is undefined.

    Attributes:
        spearman: Spearman correlation over heads of the two maps, which are measured on the same examples and have
            part of their noise in common.
        reliability_first: predicted reliability of the first map (split halves, Spearman-Brown).
        reliability_now: that of the later map.
        ceiling: sqrt(reliability_first * reliability_now): what maps of an unchanged model, each measured on examples
            of its own, would have for a correlation.
        corrected: the correlation without the noise of either map; 1 is no drift. From halves of the examples that
            share none: across the two maps, over what halves of one map agree.
        corrected_low: end of its 95 % bootstrap interval over the examples.
        corrected_high: the other end.
    """

    spearman: float | None
    reliability_first: float | None
    reliability_now: float | None
    ceiling: float | None
    corrected: float | None
    corrected_low: float | None
    corrected_high: float | None

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value is not None and not (isinstance(value, int | float) and math.isfinite(value)):
                raise ValueError(f"{name} is {value!r}, not a finite number")

    @property
    def is_seen(self) -> bool | None:
        """Whether there is drift beyond measurement noise: the interval ends below 1. None if it cannot be told."""
        return None if self.corrected_high is None else self.corrected_high < 1

    @property
    def expected(self) -> tuple[float, float, float] | None:
        """The correlation of maps that are each measured on examples of their own, with its interval."""
        value, low, high, ceiling = self.corrected, self.corrected_low, self.corrected_high, self.ceiling
        if value is None or low is None or high is None or ceiling is None:
            return None
        return value * ceiling, low * ceiling, high * ceiling


@dataclass(frozen=True)
class ZoneOverlap:
    """How much of a zone, a quarter of the heads, is the same in both maps.

    Attributes:
        size: heads of the zone, in both maps.
        kept: heads that are in it in both.
        by_chance: what two random zones of that size would share, on average.
        halves_across: mean Jaccard overlap of the zones of halves that share no example: one of the first map, the
            other of the later one. None where there are no zones.
        halves_first: that of two halves of the first map.
        halves_now: that of two halves of the later map.
    """

    size: int
    kept: int
    by_chance: float
    halves_across: float | None
    halves_first: float | None
    halves_now: float | None

    def __post_init__(self) -> None:
        if not 0 <= int(self.kept) <= int(self.size):
            raise ValueError(f"{self.kept} of {self.size} heads kept")


@dataclass(frozen=True)
class HeadChange:
    """A head that is in another zone than in the first map: `risky`, `middle` or `safe`."""

    layer: int
    head: int
    before: str
    now: str
    score_before: float
    score_now: float

    def __post_init__(self) -> None:
        if self.before not in ZONES or self.now not in ZONES or self.before == self.now:
            raise ValueError(f"a change from zone {self.before!r} to {self.now!r}")
        if not (math.isfinite(self.score_before) and math.isfinite(self.score_now)):
            raise ValueError(f"scores {self.score_before!r}, {self.score_now!r}")


@dataclass(frozen=True)
class StepDrift:
    """One adapter of an arm, and the map of the model with it.

    Attributes:
        step: optimiser steps of the adapter.
        adapter_hash: hash of the adapter.
        map_hash: hash of the map.
        changed_rows: query rows that the adapter changes in the dtype of the model.
        columns: by column of the map.
        zones: `safe` and `risky`.
        changes: heads that changed zone; from risky to safe and from safe to risky first.
        reselected: of the arm's heads, how many the same rule would choose from this map: `heads`, `kept`, `by_chance`.
            None for heads that no map decides on.
        baseline: utility accuracy and refusal rate of the whole model.
    """

    step: int
    adapter_hash: str
    map_hash: str
    changed_rows: int
    columns: dict[str, ColumnDrift]
    zones: dict[str, ZoneOverlap]
    changes: tuple[HeadChange, ...]
    reselected: dict[str, float] | None
    baseline: dict[str, Any]

    def __post_init__(self) -> None:
        if self.zones.keys() != {"safe", "risky"}:
            raise ValueError(f"zones are {', '.join(self.zones)}, not safe and risky")


@dataclass(frozen=True)
class DriftResult:
    """The drift of one arm.

    Attributes:
        arm: the arm.
        steps: in order; the last one is that of the finished adapter.
        first_map_hash: hash of the run's own map, which all are compared with.
        adapter_hash: hash of the finished adapter.
        n: `heads`, `utility` and `safety` examples.
        settings: of the diagnoses.
        seed: of splits and resamples.
        n_splits: random halves of the corrected correlation.
        n_resamples: of its interval.
        baseline: utility accuracy and refusal rate of the model before training.
        model: identity of the model before training.
        seconds: wall time of all maps together.
        provenance: versions, machine, command, time.
    """

    arm: str
    steps: tuple[StepDrift, ...]
    first_map_hash: str
    adapter_hash: str
    n: dict[str, int]
    settings: Settings
    seed: int
    n_splits: int
    n_resamples: int
    baseline: dict[str, Any]
    model: ModelRecord
    seconds: float
    provenance: Provenance

    def __post_init__(self) -> None:
        if not self.steps:
            raise ValueError("no steps")

    def save(self, path: str | Path) -> Path:
        """Write `drift.json` into a directory (or to the given file), atomically. Returns the file."""
        path = _file(path)
        write_json(path, _KIND, asdict(self))
        return path

    @classmethod
    def load(cls, path: str | Path) -> DriftResult:
        """Read a result from its file or its directory.

        Raises:
            ArtifactError: missing, damaged, of another kind or schema version.
        """
        path = _file(path)
        record = read_json(path, _KIND, "castune drift RUN")
        return typed(path, _KIND, cls, record)


def _file(path: str | Path) -> Path:
    path = Path(path)
    return path if path.suffix == ".json" else path / DRIFT_FILE
