"""The record of a drift: written and read as it is, and refused where it is damaged."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from castune.artifacts.drift_result import ColumnDrift, DriftResult, HeadChange, StepDrift, ZoneOverlap
from castune.errors import ArtifactError

NAMES = ("optimization_conflict", "utility_shift", "safety_shift", "functional_sensitivity", "conflict_score")


def make_result() -> DriftResult:
    column = ColumnDrift(0.9, 0.64, 0.36, 0.48, 0.95, 0.9, 1.01)
    unknown = ColumnDrift(None, None, None, None, None, None, None)
    step = StepDrift(
        step=25,
        adapter_hash="a-b",
        map_hash="m",
        changed_rows=64,
        columns={**dict.fromkeys(NAMES, column), "safety_shift": unknown},
        zones={"safe": ZoneOverlap(3, 2, 0.75, 0.5, 0.6, 0.4), "risky": ZoneOverlap(3, 0, 0.75, None, None, None)},
        changes=(HeadChange(0, 1, "safe", "risky", 0.2, 1.4), HeadChange(2, 3, "middle", "safe", 0.9, 0.1)),
        reselected=None,
        baseline={"utility_accuracy": None},
    )
    return DriftResult(
        arm="safe", steps=(step,), first_map_hash="f", adapter_hash="a-b", n={"heads": 12, "utility": 4, "safety": 4},
        settings={"measure": "margin"}, seed=21, n_splits=50, n_resamples=200, baseline={}, model={}, seconds=1.5,
        provenance={},
    )  # fmt: skip


def test_saved_and_loaded_it_is_the_same(tmp_path: Path) -> None:
    result = make_result()
    assert result.save(tmp_path) == tmp_path / "drift.json"
    assert DriftResult.load(tmp_path) == DriftResult.load(tmp_path / "drift.json") == result


def test_what_is_seen_follows_from_the_interval() -> None:
    one, unknown = (make_result().steps[0].columns[name] for name in ("conflict_score", "safety_shift"))
    assert (one.is_seen, unknown.is_seen, unknown.expected) == (False, None, None)
    assert one.expected == (pytest.approx(0.456), pytest.approx(0.432), pytest.approx(0.4848))
    assert ColumnDrift(0.9, 0.64, 0.36, 0.48, 0.95, 0.9, 0.99).is_seen


def damage(*path: Any, value: Any) -> Callable[[dict[str, Any]], None]:
    def apply(record: Any) -> None:
        for key in path[:-1]:
            record = record[key]
        if value is ...:
            del record[path[-1]]
        else:
            record[path[-1]] = value

    return apply


@pytest.mark.parametrize(
    "apply",
    [
        damage("steps", value=[]),
        damage("steps", value="none"),
        damage("steps", value=[[]]),
        damage("steps", 0, "step", value=...),
        damage("steps", 0, "step", value="soon"),
        damage("steps", 0, "columns", value=[]),
        damage("steps", 0, "columns", "conflict_score", value=3),
        damage("steps", 0, "columns", "conflict_score", "corrected", value="high"),
        damage("steps", 0, "zones", "safe", value=...),
        damage("steps", 0, "zones", "safe", "kept", value=4),
        damage("steps", 0, "changes", 0, "now", value="<b>"),
        damage("steps", 0, "changes", 0, "now", value="safe"),
        damage("steps", 0, "changes", 0, "score_now", value=None),
        damage("n", value=12),
        damage("provenance", value=...),
        damage("kind", value="tune result"),
        damage("schema_version", value=2),
    ],
)
def test_a_damaged_record_is_one_clear_error(tmp_path: Path, apply: Callable[[dict[str, Any]], None]) -> None:
    path = make_result().save(tmp_path)
    record = json.loads(path.read_text())
    # Damage that came with a new digest: every field is looked at.
    del record["digest"]
    apply(record)
    path.write_text(json.dumps(record))
    with pytest.raises(ArtifactError) as error:
        DriftResult.load(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_numbers_that_are_none_are_not_written(tmp_path: Path) -> None:
    for value in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="finite"):
            ColumnDrift(value, None, None, None, None, None, None)
    with pytest.raises(ArtifactError, match="castune drift RUN"):
        DriftResult.load(tmp_path)
