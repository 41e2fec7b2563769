"""Conflict drift: what changed between two maps, told apart from the noise of measuring them. Pure.

Both maps are measured on the same examples, so a part of their noise is common to both, and their correlation may lie
above what two measurements of one unchanged model would have. Halves of the examples settle it: with A and B disjoint,

    corrected = mean of r(first on A, later on B) and r(first on B, later on A)
                / sqrt(r(first on A, first on B) * r(later on A, later on B))

No two maps in it share an example, all of them are made from as many, and the noise that lowers the numerator lowers
the denominator as much (Spearman's correction for attenuation). 1 is no drift.

Shape letters: H head (all heads of the model in one axis), R resample or split.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from castune.artifacts.drift_result import ColumnDrift, HeadChange, ZoneOverlap
from castune.diagnosis.measurements import COLUMNS, Measurements, Weights
from castune.diagnosis.reliability import random_halves, spearman, spearman_brown
from castune.diagnosis.score import Floats
from castune.diagnosis.zones import zone_stability
from castune.stats.distributions import ENDS
from castune.stats.ranking import bucket_numbers

N_SPLITS = 50
N_RESAMPLES = 200
# Splits of a resample: fewer, and the interval is mostly the luck of one split; more cost time.
_SPLITS_OF_A_RESAMPLE = 5
_BUCKETS = 4
_RISKY, _SAFE = 1, _BUCKETS

Columns = Mapping[str, Floats]


@dataclass(frozen=True)
class Drift:
    """What `drift` finds: by column, and of the zones `safe` and `risky`."""

    columns: dict[str, ColumnDrift]
    zones: dict[str, ZoneOverlap]


@dataclass(frozen=True)
class HalfCorrelations:
    """Spearman correlations of one column between maps of disjoint halves, [R] each; NaN where undefined.

    Attributes:
        across_R: between the two maps.
        first_R: between halves of the first map.
        later_R: between halves of the later one.
    """

    across_R: Floats
    first_R: Floats
    later_R: Floats

    @property
    def corrected(self) -> float | None:
        """The correlation without noise, from means over the splits; None where halves of one map do not correlate."""
        across, first, later = (_mean(r_R) for r_R in (self.across_R, self.first_R, self.later_R))
        if across is None or first is None or later is None or min(first, later) <= 0:
            return None
        # Equal lengths must give 1 and not the rounding of a root.
        return across / first if first == later else across / math.sqrt(first * later)

    def parts(self, n: int) -> list[HalfCorrelations]:
        """The splits in `n` parts, one after the other."""
        pieces = (np.split(r_R, n) for r_R in (self.across_R, self.first_R, self.later_R))
        return [HalfCorrelations(*arrays) for arrays in zip(*pieces, strict=True)]


@dataclass(frozen=True)
class Halves:
    """Maps of two disjoint halves of the examples, a row a split: columns [R, H] of both models on both halves."""

    first_one: Columns
    first_other: Columns
    later_one: Columns
    later_other: Columns

    def agreement(self, name: str) -> HalfCorrelations:
        """How the halves go with one another in a column."""
        one_R = _correlations(self.first_one[name], self.later_other[name])
        other_R = _correlations(self.first_other[name], self.later_one[name])
        return HalfCorrelations(
            (one_R + other_R) / 2,
            _correlations(self.first_one[name], self.first_other[name]),
            _correlations(self.later_one[name], self.later_other[name]),
        )


def drift(
    first: Measurements, later: Measurements, *, seed: int, n_splits: int = N_SPLITS, n_resamples: int = N_RESAMPLES
) -> Drift:
    """How far the map of a model goes with that of the model it was trained from.

    Args:
        first: measurements of the first map.
        later: of the later one, on the same examples and chunks.
        seed: of splits and resamples; it alone determines them.
        n_splits: random halves of the corrected correlation; with the seed of a map and the number of its splits they
            are those of its reliability.
        n_resamples: of the interval: examples (and gradient chunks) are drawn with replacement, and all copies of one
            go into the same half. The interval is None where in more than 1 of 20 resamples halves of one map do not
            correlate: it would be that of the lucky ones.

    Raises:
        ValueError: the measurements are of other sizes.
    """
    if first.sizes != later.sizes:
        raise ValueError(f"sets of {first.sizes} and {later.sizes} examples and chunks: not the same")
    rng = np.random.default_rng(seed)
    halves = _halves(first, later, [random_halves(size, n_splits, rng) for size in first.sizes])
    resampled = _halves(first, later, [_drawn(size, n_resamples, rng) for size in first.sizes])
    whole_first, whole_later = (one.columns(one.whole) for one in (first, later))
    columns = {}
    for name in COLUMNS:
        agreement = halves.agreement(name)
        first_half, later_half = (_mean(r_R) for r_R in (agreement.first_R, agreement.later_R))
        reliability_first, reliability_now = (
            None if half is None else spearman_brown(half) for half in (first_half, later_half)
        )
        low, high = _interval([part.corrected for part in resampled.agreement(name).parts(n_resamples)])
        columns[name] = ColumnDrift(
            spearman=spearman(whole_first[name][0], whole_later[name][0]),
            reliability_first=reliability_first,
            reliability_now=reliability_now,
            ceiling=noise_ceiling(reliability_first, reliability_now),
            corrected=agreement.corrected,
            corrected_low=low,
            corrected_high=high,
        )
    score_first_H, score_later_H = (whole["conflict_score"][0] for whole in (whole_first, whole_later))
    return Drift(columns, _zones(score_first_H, score_later_H, halves))


def noise_ceiling(reliability_first: float | None, reliability_now: float | None) -> float | None:
    """What measurements of an unchanged model, each on its own examples, would correlate; None if either is noise."""
    if reliability_first is None or reliability_now is None or min(reliability_first, reliability_now) <= 0:
        return None
    return math.sqrt(reliability_first * reliability_now)


def zone_of(score_H: Floats) -> list[str]:
    """Zone of every head: the quarter of highest scores is `risky`, that of the lowest `safe`, the rest `middle`."""
    names = {_RISKY: "risky", _SAFE: "safe"}
    return [names.get(int(bucket), "middle") for bucket in bucket_numbers(score_H, _BUCKETS)]


def zone_changes(heads: Sequence[tuple[int, int]], first_H: Floats, later_H: Floats) -> tuple[HeadChange, ...]:
    """Heads whose zone by C is another one; those that crossed from one end to the other first, then by layer."""
    found = [
        HeadChange(layer, head, before, now, float(score), float(score_now))
        for (layer, head), before, now, score, score_now in zip(
            heads, zone_of(first_H), zone_of(later_H), first_H, later_H, strict=True
        )
        if before != now
    ]
    return tuple(sorted(found, key=lambda change: "middle" in (change.before, change.now)))


def kept_heads(before: Sequence[tuple[int, int]], now: Sequence[tuple[int, int]], n_total: int) -> dict[str, float]:
    """How many of the heads chosen before are chosen now, and how many would be by chance."""
    return {
        "heads": len(before),
        "kept": len(set(before) & set(now)),
        "by_chance": len(before) * len(now) / n_total,
    }


def _zones(first_H: Floats, later_H: Floats, halves: Halves) -> dict[str, ZoneOverlap]:
    first, later = zone_of(first_H), zone_of(later_H)
    name = "conflict_score"
    # Either half may be that of the first map.
    across = zone_stability(
        np.concatenate([halves.first_one[name], halves.first_other[name]]),
        np.concatenate([halves.later_other[name], halves.later_one[name]]),
    )
    within_first = zone_stability(halves.first_one[name], halves.first_other[name])
    within_later = zone_stability(halves.later_one[name], halves.later_other[name])
    found = {}
    for zone in ("safe", "risky"):
        size = first.count(zone)
        found[zone] = ZoneOverlap(
            size=size,
            kept=sum(one == other == zone for one, other in zip(first, later, strict=True)),
            by_chance=size * size / len(first),
            halves_across=getattr(across, zone),
            halves_first=getattr(within_first, zone),
            halves_now=getattr(within_later, zone),
        )
    return found


def _halves(first: Measurements, later: Measurements, weights: Sequence[tuple[Floats, Floats]]) -> Halves:
    one, other = (Weights.of(arrays) for arrays in zip(*weights, strict=True))
    return Halves(first.columns(one), first.columns(other), later.columns(one), later.columns(other))


def _drawn(size: int, n_resamples: int, rng: np.random.Generator) -> tuple[Floats, Floats]:
    """Weights [R * K, N] of two halves of a resample, K splits of each resample after one another."""
    drawn_RN = rng.multinomial(size, np.full(size, 1 / size), size=n_resamples).repeat(_SPLITS_OF_A_RESAMPLE, axis=0)
    one_RN, other_RN = random_halves(size, len(drawn_RN), rng)
    return one_RN * drawn_RN, other_RN * drawn_RN


def _correlations(one_RH: Floats, other_RH: Floats) -> Floats:
    """Spearman correlation of every row, [R]; NaN where undefined."""
    found = [spearman(one_H, other_H) for one_H, other_H in zip(one_RH, other_RH, strict=True)]
    return np.array([np.nan if r is None else r for r in found])


def _mean(values_R: Floats) -> float | None:
    known_R = values_R[np.isfinite(values_R)]
    return float(known_R.mean()) if len(known_R) else None


def _interval(values: Sequence[float | None]) -> tuple[float | None, float | None]:
    known = [value for value in values if value is not None]
    if len(known) < 0.95 * len(values):
        return None, None
    low, high = np.quantile(known, ENDS)
    return float(low), float(high)
