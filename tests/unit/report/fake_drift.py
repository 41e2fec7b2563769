"""A drift as it is measured, with numbers that can be recognised in the page."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from castune.artifacts.drift_result import ColumnDrift, DriftResult, HeadChange, StepDrift, ZoneOverlap

COLUMNS = ("optimization_conflict", "utility_shift", "safety_shift", "functional_sensitivity", "conflict_score")


def make_column(corrected: float | None = 0.912, **changes: Any) -> ColumnDrift:
    ends = (None, None) if corrected is None else (corrected - 0.061, corrected + 0.043)
    values = {
        "spearman": 0.934, "reliability_first": 0.64, "reliability_now": 0.49, "ceiling": 0.56, "corrected": corrected,
        "corrected_low": ends[0], "corrected_high": ends[1],
    }  # fmt: skip
    return ColumnDrift(**{**values, **changes})


def make_step(step: int, column: ColumnDrift, n_changes: int = 3, **changes: Any) -> StepDrift:
    heads = [HeadChange(i // 9, i % 9, "safe", "risky" if i == 0 else "middle", 0.111, 1.777) for i in range(n_changes)]
    values: dict[str, Any] = {
        "step": step,
        "adapter_hash": f"a{step}-b",
        "map_hash": f"m{step}",
        "changed_rows": 64,
        "columns": dict.fromkeys(COLUMNS, column),
        "zones": {
            "safe": ZoneOverlap(67, 51, 16.6259, 0.37, 0.39, 0.38),
            "risky": ZoneOverlap(68, 49, 17.1, None, None, None),
        },
        "changes": tuple(heads),
        "reselected": {"heads": 68, "kept": 52, "by_chance": 17.125},
        "baseline": {
            "utility_accuracy": {"value": 0.5123, "standard_error": 0.05, "n": 80, "unscored": 0},
            "refusal_rate": {"value": None, "standard_error": None, "n": 0, "unscored": 64},
        },
    }
    return StepDrift(**{**values, **changes})


def make_drift(steps: Sequence[StepDrift], arm: str = "safe") -> DriftResult:
    return DriftResult(
        arm=arm,
        steps=tuple(steps),
        first_map_hash="first",
        adapter_hash="a-b",
        n={"heads": 270, "utility": 80, "safety": 64},
        settings={"measure": "margin"},
        seed=21,
        n_splits=50,
        n_resamples=200,
        baseline={},
        model={"fingerprint": "0123456789abcdef"},
        seconds=812.0,
        provenance={},
    )
