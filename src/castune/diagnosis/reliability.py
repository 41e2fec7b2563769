"""How far a conflict map can be trusted: intervals, overlap of zones, split-half reliability. Pure.

All of it is recomputed from what one diagnosis measured. It tells how much the map owes to the choice of calibration
examples, not whether Eqs. 2-6 measure the right thing.

Shape letters: H head (all heads of the model in one axis), N example, C gradient chunk, R resample.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from castune.diagnosis.measurements import COLUMNS, Measurements, Weights
from castune.diagnosis.score import Floats
from castune.diagnosis.zones import ZoneStability, zone_stability
from castune.stats.distributions import ENDS
from castune.stats.ranking import percentile_rank, tie_share

# Reliability is the share of the variance over heads that another set of examples would reproduce. Below one half the
# order of the heads is more noise than signal.
RELIABLE = 0.5


@dataclass(frozen=True)
class Bootstrap:
    """What the resamples of a map tell.

    Attributes:
        intervals: `<column>_low` and `<column>_high` of every head for each of `COLUMNS`, [H] each.
        zones: overlap of the map's zones with those of each resample. Resamples share examples with the map, so
            even pure noise overlaps by about a third, more than by chance.
    """

    intervals: dict[str, Floats]
    zones: ZoneStability


def bootstrap(measurements: Measurements, *, n_resamples: int = 400, seed: int) -> Bootstrap:
    """95 % percentile intervals of O, H_gen, H_safe, S and C of every head, and the stability of the zones.

    Samples are drawn with replacement, each apart from the others: examples and gradient chunks of every set. Several
    utility domains are combined in every resample, which has one draw of the safety set for all of them.
    Gradients are kept per chunk only, so the examples of a resample cannot be given their own gradients; errors that
    O and S share through one example are taken as independent.

    To know when reading the intervals:
    - H is the absolute value of a mean. Of decisions its interval is that of the signed mean, folded at zero, so it
      holds 0 when the sign is not settled; the resampled absolute values themselves almost never do. A mean of
      absolute values over domains in none of which the sign is settled is too large, which its interval does not
      know: it held 0 in 90, 84 and 64 % of simulated cases with 2, 3 and 5 domains.
    - Where few decisions change, the interval is short: it is [0, 0] where none does, though a rate of up to 3 / n is
      compatible with that.
    - O is that of a gradient of n examples, whose noise alone draws it towards 0.5; the interval is about that value.
      The noise that resampling adds on top is taken off (`drawn` of `weighted_conflict`), in the intervals of O and
      C; the zones are those of the resamples as they are.
    - S and C depend on ranks: their intervals are the spread over resamples, not a promise of coverage.

    Args:
        measurements: of the map.
        n_resamples: how many resamples.
        seed: of the draws; it alone determines them.

    Returns:
        Intervals and zones. A resample without a scored example of a head is left out of that head's interval; a
        head without any has NaN.
    """
    if n_resamples < 1:
        raise ValueError(f"n_resamples is {n_resamples}, accepted is 1 or more")
    rng = np.random.default_rng(seed)
    weights = Weights.of([_random_counts(size, n_resamples, rng) for size in measurements.sizes])
    score_RH = measurements.columns(weights)["conflict_score"]
    map_RH = np.broadcast_to(measurements.columns(measurements.whole)["conflict_score"], score_RH.shape)
    intervals: dict[str, Floats] = {}
    for name, values_RH in measurements.columns(weights, drawn=True).items():
        # Only shifts can be negative here; of anything else the absolute values are the interval itself.
        low_H, high_H = _folded(*_percentiles(values_RH))
        intervals |= {f"{name}_low": low_H, f"{name}_high": high_H}
    return Bootstrap(intervals, zone_stability(map_RH, score_RH))


@dataclass(frozen=True)
class Agreement:
    """Agreement of one column between maps made from two disjoint halves of the data.

    Attributes:
        half: Spearman correlation over heads, mean over the splits in which it is defined; None if in none.
        full: predicted reliability of the whole map, `spearman_brown(half)`.
        n_splits: splits in which the correlation is defined.
    """

    half: float | None
    full: float | None
    n_splits: int


@dataclass(frozen=True)
class SplitHalf:
    """Agreement of each of `COLUMNS` between halves, and the overlap of the halves' zones.

    Halves share nothing, so the overlap of their zones compares with that by chance; it is that of maps made from
    half the data.
    """

    columns: dict[str, Agreement]
    zones: ZoneStability


def split_half(measurements: Measurements, *, n_splits: int = 50, seed: int) -> SplitHalf:
    """Correlation over heads between the columns of two random disjoint halves of examples and of chunks.

    Examples and chunks are halved apart from each other, as in `bootstrap`. Of an odd number one is left out by
    chance, for Spearman-Brown needs halves of one size.

    Args:
        measurements: of the map.
        n_splits: how many random splits.
        seed: of the splits; it alone determines them.

    Returns:
        Agreement and overlap. A column that does not vary over the heads of one half has no correlation: that split
        does not count, and without any the agreement is None, never zero.
    """
    if n_splits < 1:
        raise ValueError(f"n_splits is {n_splits}, accepted is 1 or more")
    rng = np.random.default_rng(seed)
    halves = [random_halves(size, n_splits, rng) for size in measurements.sizes]
    one, other = (measurements.columns(Weights.of(arrays)) for arrays in zip(*halves, strict=True))
    found = {}
    for name in COLUMNS:
        pairs = zip(one[name], other[name], strict=True)
        defined = [r for x_H, y_H in pairs if (r := spearman(x_H, y_H)) is not None]
        half = float(np.mean(defined)) if defined else None
        found[name] = Agreement(half, None if half is None else spearman_brown(half), len(defined))
    return SplitHalf(found, zone_stability(one["conflict_score"], other["conflict_score"]))


def spearman(x_H: Floats, y_H: Floats) -> float | None:
    """Spearman's correlation over the heads with both values, average ranks for ties; None where a side is constant."""
    both_H = np.isfinite(x_H) & np.isfinite(y_H)
    if not both_H.any():
        return None
    ranks_2H = np.stack([percentile_rank(x_H[both_H]), percentile_rank(y_H[both_H])])
    if (np.ptp(ranks_2H, axis=1) == 0).any():
        return None
    x_H, y_H = ranks_2H - ranks_2H.mean(1, keepdims=True)
    return float(np.clip(x_H @ y_H / np.sqrt((x_H @ x_H) * (y_H @ y_H)), -1, 1))


def spearman_brown(r_half: float) -> float:
    """Predicted reliability of twice the data, 2r / (1 + r) (Spearman 1910, Brown 1910).

    Without a positive correlation there is nothing to extrapolate, and r is returned as it is. The formula is that of
    plain sums: of C, which is made of ranks, simulated maps reproduced up to 0.06 less than predicted.
    """
    return 2 * r_half / (1 + r_half) if r_half > 0 else r_half


def examples_needed(r_half: float, n_half: int, target: float) -> int | None:
    """Number of examples at which the predicted reliability reaches `target`.

    Spearman-Brown solved for the length: k = target (1 - r) / (r (1 - target)) times the examples of a half.

    Args:
        r_half: correlation between two halves.
        n_half: examples of a half.
        target: reliability wanted, between 0 and 1.

    Returns:
        The number, at least 1; None if r_half is not positive.
    """
    if not 0 < target < 1:
        raise ValueError(f"target is {target}, accepted is a number between 0 and 1")
    if r_half <= 0:
        return None
    times = target * (1 - r_half) / (r_half * (1 - target))
    # A whole number must not be rounded up for the last digit of a division.
    return max(1, math.ceil(times * n_half * (1 - 1e-12)))


@dataclass(frozen=True, kw_only=True)
class Reliability:
    """How far a map can be trusted. None is undefined.

    Attributes:
        n_heads: heads of the map.
        n_utility: examples of D_util, of all domains together.
        n_safety: examples of D_safe.
        chunks_utility: gradient chunks of D_util, of all domains together.
        chunks_safety: gradient chunks of D_safe.
        split_half: agreement between halves of the data.
        zones: overlap of the map's zones with those of the bootstrap's resamples.
        tie_shares: share of heads that tie with another one, for each of `COLUMNS`.
        n_resamples: resamples of the bootstrap.
        n_splits: random splits.
        seed: of both.
    """

    n_heads: int
    n_utility: int
    n_safety: int
    chunks_utility: int
    chunks_safety: int
    split_half: SplitHalf
    zones: ZoneStability
    tie_shares: dict[str, float | None]
    n_resamples: int
    n_splits: int
    seed: int

    @property
    def of_score(self) -> float | None:
        """Predicted reliability of the whole map's C: the number that decides about the warning."""
        return self.split_half.columns["conflict_score"].full

    def examples_needed(self, target: float = RELIABLE) -> dict[str, int] | None:
        """Examples of each set at which the reliability of C would reach `target`; None if it cannot be told."""
        r_half = self.split_half.columns["conflict_score"].half
        if r_half is None:
            return None
        sets = (("utility", self.n_utility), ("safety", self.n_safety))
        return {name: needed for name, n in sets if (needed := examples_needed(r_half, n // 2, target))} or None

    def to_json(self) -> dict[str, Any]:
        """Everything above as plain JSON types."""
        found = {"reliability": self.of_score, "examples_needed": self.examples_needed(), "warnings": self.warnings()}
        return {**asdict(self), **found}

    def warnings(self) -> list[str]:
        """One sentence if the reliability of C is undefined or below `RELIABLE`."""
        n = f"{self.n_utility} utility and {self.n_safety} safety examples"
        if self.of_score is None:
            return [
                f"The reliability of the conflict scores is undefined with {n}, for in no split of them into halves do "
                "the scores of both halves differ between heads; no number of examples that would be needed can be "
                "named."
            ]
        if self.of_score >= RELIABLE:
            return []
        needed = self.examples_needed(RELIABLE)
        remedy = "no number of examples that would be needed can be named"
        if needed is not None:
            counts = f"{needed['utility']} utility and {needed['safety']} safety examples"
            remedy = f"about {counts} would be needed for {RELIABLE}"
        return [
            f"The reliability of the conflict scores is {self.of_score:.2f} with {n}, below {RELIABLE}: the order of "
            f"the heads is more noise than signal; {remedy}."
        ]


def reliability(
    measurements: Measurements, *, seed: int, n_resamples: int = 400, n_splits: int = 50
) -> tuple[dict[str, Floats], Reliability]:
    """Intervals of every head, and how far the map as a whole can be trusted.

    Args:
        measurements: of the map.
        seed: of resamples and splits.
        n_resamples: see `bootstrap`.
        n_splits: see `split_half`.

    Returns:
        The columns `<column>_low` and `<column>_high` for each of `COLUMNS`, [H] each, NaN where undefined; the
        summary.
    """
    resampled = bootstrap(measurements, n_resamples=n_resamples, seed=seed)
    columns, sizes, n_domains = measurements.columns(measurements.whole), measurements.sizes, len(measurements.domains)
    return resampled.intervals, Reliability(
        n_heads=len(measurements.safety.ablated_HN),
        n_utility=sum(sizes[:n_domains]),
        n_safety=sizes[n_domains],
        chunks_utility=sum(sizes[n_domains + 1 : -1]),
        chunks_safety=sizes[-1],
        split_half=split_half(measurements, n_splits=n_splits, seed=seed),
        zones=resampled.zones,
        tie_shares={name: tie_share(v[0]) if np.isfinite(v).all() else None for name, v in columns.items()},
        n_resamples=n_resamples,
        n_splits=n_splits,
        seed=seed,
    )


def _random_counts(n: int, n_resamples: int, rng: np.random.Generator) -> Floats:
    """How often each of n is drawn in n draws with replacement, [R, N]."""
    return rng.multinomial(n, np.full(n, 1 / n), size=n_resamples).astype(np.float64)


def random_halves(n: int, n_splits: int, rng: np.random.Generator) -> tuple[Floats, Floats]:
    """Weights [R, N] of two random halves of n // 2 each, one row a split."""
    place_RN = rng.permuted(np.tile(np.arange(n), (n_splits, 1)), axis=1)
    half_RN = place_RN // (n // 2)
    return (half_RN == 0).astype(np.float64), (half_RN == 1).astype(np.float64)


def _percentiles(values_RH: Floats) -> tuple[Floats, Floats]:
    """Bounds of each head over its finite values; NaN without any."""
    rows = [values_R[np.isfinite(values_R)] for values_R in values_RH.T]
    bounds_H2 = np.array([np.quantile(row, ENDS) if len(row) else (np.nan, np.nan) for row in rows])
    return bounds_H2[:, 0], bounds_H2[:, 1]


def _folded(low_H: Floats, high_H: Floats) -> tuple[Floats, Floats]:
    """Absolute values that an interval of signed values holds."""
    return np.maximum(0, np.maximum(low_H, -high_H)), np.maximum(-low_H, high_H)
