"""Results of a run beside the same results made again: bit for bit first, then by what they decide."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from castune.artifacts import ConflictMap, EvalResult, TuneResult
from castune.artifacts.conflict_map import SCHEMA
from castune.artifacts.fingerprints import same_model
from castune.artifacts.tune_result import ADAPTER_WEIGHTS, adapter_hash

Outcome = Literal["same", "close", "different", "not compared"]


_COLUMNS = ("optimization_conflict", "utility_shift", "safety_shift", "functional_sensitivity", "conflict_score")


@dataclass(frozen=True)
class Comparison:
    """A result of the run beside the same result made again.

    Attributes:
        what: the result.
        outcome: `same`: bit for bit. `close`: it decides the same (heads, outcomes of examples) by numbers that differ.
            `different`: it decides otherwise. `not compared`: it was not made again.
        detail: by how much, or why not.
    """

    what: str
    outcome: Outcome
    detail: str


def compare_maps(cmap: ConflictMap, again: ConflictMap) -> Comparison:
    """Two conflict maps of the same run: every column, then the order of heads by conflict and their buckets."""
    what = "conflict map"
    if not same_model(cmap.fingerprint, again.fingerprint):
        return Comparison(what, "different", f"model {cmap.fingerprint}, now {again.fingerprint}")
    if cmap.units != again.units:
        return Comparison(what, "different", f"{len(cmap)} units, now {len(again)}")
    if all(cmap.table[name].equals(again.table[name]) for name in SCHEMA.names):
        return Comparison(what, "same", f"{len(cmap)} heads, every column bit for bit")
    moved = sum(
        one != other
        for one, other in zip(cmap.table["bucket"].to_pylist(), again.table["bucket"].to_pylist(), strict=True)
    )
    largest = max((_largest_change(cmap.column(name), again.column(name)), name) for name in _COLUMNS)
    detail = f"largest relative change {largest[0]:.2g} ({largest[1]}); {moved} of {len(cmap)} heads in another bucket"
    return Comparison(what, "different" if moved else "close", detail)


def _largest_change(one: np.ndarray[Any, Any], other: np.ndarray[Any, Any]) -> float:
    """Largest difference in units of the column's own spread; infinite where a value is there on one side only."""
    if (np.isnan(one) != np.isnan(other)).any():
        return float("inf")
    known = ~np.isnan(one)
    spread = float(np.std(one[known])) if known.any() else 0.0
    gap = float(np.max(np.abs(one[known] - other[known]), initial=0.0))
    return gap / spread if spread else (0.0 if gap == 0 else float("inf"))


def compare_adapters(what: str, one: tuple[Path, TuneResult], other: tuple[Path, TuneResult]) -> Comparison:
    """Two trainings of the same arm: weights bit for bit, then losses."""
    from safetensors.torch import load_file

    if adapter_hash(one[0]) == adapter_hash(other[0]):
        return Comparison(what, "same", f"{one[1].steps} steps, every weight bit for bit")
    weights = [load_file(path / ADAPTER_WEIGHTS) for path, _ in (one, other)]
    if weights[0].keys() != weights[1].keys():
        return Comparison(what, "different", "adapts other layers")
    gap = sum(float((weights[0][name].float() - weights[1][name].float()).square().sum()) for name in weights[0])
    size = sum(float(tensor.float().square().sum()) for tensor in weights[0].values())
    share = (gap / size) ** 0.5 if size else float(gap > 0)
    losses = [result.losses[-1][1] if result.losses else float("nan") for _, result in (one, other)]
    detail = f"weights differ by {share:.2g} of their norm; last loss {losses[0]:.4f}, now {losses[1]:.4f}"
    return Comparison(what, "close" if one[1].steps == other[1].steps and share < 0.1 else "different", detail)


def compare_evaluations(name: str, before: EvalResult, after: EvalResult) -> Iterator[Comparison]:
    """Two evaluations of the same arm, a comparison a suite: replies and scores, then outcomes."""
    theirs = {suite.suite: suite for suite in after.suites}
    for suite in before.suites:
        what = f"{suite.suite} of {name}"
        other = theirs.get(suite.suite)
        if other is None or other.data_hash != suite.data_hash:
            yield Comparison(what, "not compared", "the suite's examples have changed")
            continue
        pairs = list(zip(before.samples_of(suite.suite), after.samples_of(suite.suite), strict=True))
        if all(one == two for one, two in pairs):
            yield Comparison(what, "same", f"{len(pairs)} examples, every reply and score")
            continue
        flipped = sum(one["outcome"] != two["outcome"] for one, two in pairs)
        changed = sum(one != two for one, two in pairs)
        values = ["unscored" if found.value is None else f"{found.value:.3f}" for found in (suite, other)]
        detail = (
            f"{changed} of {len(pairs)} replies or scores and {flipped} outcomes differ; {values[0]}, now {values[1]}"
        )
        yield Comparison(what, "different" if flipped else "close", detail)
