"""Two arms over seeds and examples: is one better, and would it be so on other seeds and other examples? Pure.

Shape letters: T seed of a training, N example of a suite, R draw.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from castune.stats.distributions import LEVEL, Interval, student_p, student_quantile

Floats = NDArray[np.float64]
# Of every seed and suite, the outcome of every example by its id: 1, 0, a number in nats, or None where unscored.
Outcomes = Mapping[int, Mapping[str, Mapping[str, float | bool | None]]]

# With more examples that differ, signs drawn at random say what Student's t says.
_FEW = 100
_FLIPS = 10_000


@dataclass(frozen=True)
class Comparison:
    """Difference of two arms, first minus second, in the unit of the outcomes: the unweighted mean over their suites.

    Attributes:
        value: None where a suite has no example that is scored by both arms under every seed.
        interval: 95 %, for other seeds and other examples; None with one seed (nothing tells what another would do), a
            suite of one example, or no difference at all: what did not occur cannot show how often it would.
        over_seeds: 95 % for other seeds on these examples: t over the seeds' mean differences, with T - 1 degrees of
            freedom (2 of 3 seeds: 4.30 standard errors); None where the seeds do not differ.
        over_examples: 95 % for other examples of these trained models: t over the examples' mean differences.
        wider: which of the two is wider, `seeds` or `examples`; None where one cannot be known.
        df: Satterthwaite's degrees of freedom of the variance over seeds and examples together.
        p: two-sided p-value that belongs to `interval`: below 0.05 where it excludes 0. The larger of Student's and,
            where few examples differ, of flipping the signs of their differences.
        p_adjusted: Holm's, over all comparisons made together; p where there is one.
        n_comparisons: how many were made together.
        per_seed: mean difference of every seed.
        n_seeds: seeds.
        n_examples: examples that both arms have a score for under every seed.
        n_unscored: examples left out.
        n_seeds_unscored: seeds that both arms have and that were not given, for a suite has nothing that is scored in
            both.
    """

    value: float | None
    interval: Interval | None
    over_seeds: Interval | None
    over_examples: Interval | None
    wider: str | None
    df: float | None
    p: float | None
    p_adjusted: float | None
    n_comparisons: int
    per_seed: dict[int, float]
    n_seeds: int
    n_examples: int
    n_unscored: int
    n_seeds_unscored: int = 0

    @property
    def is_seen(self) -> bool:
        """Whether a difference is claimed: its interval excludes 0, and its adjusted p-value is below 5 %."""
        adjusted = self.p if self.p_adjusted is None else self.p_adjusted
        return self.interval is not None and not self.interval.holds(0) and adjusted is not None and adjusted < LEVEL


def compare(first: Outcomes, second: Outcomes) -> Comparison:
    """Difference of two arms, paired by seed and example.

    Every suite counts alike, as in the averages of the tables, whatever its number of examples. The difference of seed
    t and example n of a suite is mean + seed effect + example effect + rest, both effects random and crossed. With V_T
    and V_N the variances of the mean of seed means and of example means, and V_R that of the rest, the variance of the
    grand mean is V_T + V_N - V_R, for each of the first two counts the rest once (two-way analysis of variance). It is
    taken as at least V_N: V_T of three seeds may be small by chance. Degrees of freedom after Satterthwaite (1946),
    which promise a little too much where both matter and seeds are few: so the interval is never narrower than that
    over seeds or that over examples, and holds 0 where flipped signs do as well in one case of twenty.

    Args:
        first: of every seed, the outcomes under one arm.
        second: the same seeds, suites and examples under the other.

    Raises:
        ValueError: seeds, suites or examples differ, or an outcome is not finite.
    """
    parts, seeds, n_unscored = _differences(first, second)
    n_seeds, n_examples = len(seeds), sum(part_TN.shape[1] for part_TN in parts)
    nothing = Comparison(None, None, None, None, None, None, None, None, 1, {}, n_seeds, n_examples, n_unscored)
    if not seeds or not parts or not all(part_TN.shape[1] for part_TN in parts):
        return nothing
    seed_T = np.mean([part_TN.mean(1) for part_TN in parts], axis=0)
    mean = float(seed_T.mean())
    per_seed = {seed: float(value) for seed, value in zip(seeds, seed_T, strict=True)}
    found = replace(nothing, value=mean, per_seed=per_seed)
    if not any(part_TN.any() for part_TN in parts):
        return found
    variance_T = None if n_seeds < 2 else float(seed_T.var(ddof=1)) / n_seeds
    if np.ptp(seed_T) <= 1e-12 * abs(mean) and variance_T is not None:
        variance_T = 0.0  # but for rounding
    variance_N, df_N = _over_examples([part_TN.mean(0) for part_TN in parts])
    found = replace(
        found,
        over_seeds=_interval(mean, variance_T, n_seeds - 1) if variance_T else None,
        over_examples=None if variance_N is None else _interval(mean, variance_N, df_N),
    )
    if variance_T is None or variance_N is None:
        return found
    variance = max(variance_N, variance_T + variance_N - _variance_of_rest(parts))
    df = _degrees(variance, variance_T, variance_N, n_seeds - 1, df_N)
    kinds = [kind for kind in ((variance, df), (variance_T, n_seeds - 1), (variance_N, df_N)) if kind[0] > 0]
    interval = max((_interval(mean, *kind) for kind in kinds), key=lambda one: one.high - one.low)
    p = max(student_p(mean / math.sqrt(part), degrees) for part, degrees in kinds)
    p = max(p, _flipped_signs([part_TN.mean(0) for part_TN in parts]))
    if p >= LEVEL and not interval.holds(0):
        interval = Interval(min(interval.low, 0.0), max(interval.high, 0.0))
    wider = "seeds" if _half(variance_T, n_seeds - 1) >= _half(variance_N, df_N) else "examples"
    return replace(found, interval=interval, wider=wider, df=df, p=p, p_adjusted=p)


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Holm's adjusted p-values (1979); None, where nothing could be tested, stays None and still counts as one.

    Raises:
        ValueError: a p-value outside [0, 1].
    """
    known = [(p, place) for place, p in enumerate(p_values) if p is not None]
    if not all(0 <= p <= 1 for p, _ in known):
        raise ValueError(f"p-values are {list(p_values)}, accepted: 0 to 1, or None")
    adjusted: list[float | None] = [None] * len(p_values)
    largest = 0.0
    for rank, (p, place) in enumerate(sorted(known)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p))
        adjusted[place] = largest
    return adjusted


def _differences(first: Outcomes, second: Outcomes) -> tuple[list[Floats], list[int], int]:
    """Differences [T, N] of every suite's examples that have a score throughout, the seeds, and how many have not."""
    seeds = sorted(first)
    if seeds != sorted(second):
        raise ValueError(f"the arms have different seeds: {seeds} and {sorted(second)}")
    of_both = [outcomes[seed] for outcomes in (first, second) for seed in seeds]
    parts, n_unscored = [], 0
    for suite in sorted(of_both[0]) if of_both else ():
        if any(of_one.keys() != of_both[0].keys() for of_one in of_both):
            raise ValueError("suites differ; both arms need the same under every seed")
        ids = sorted(of_both[0][suite])
        if any(of_one[suite].keys() != of_both[0][suite].keys() for of_one in of_both):
            raise ValueError(f"examples of {suite} differ; both arms need the same under every seed")
        rows = [[of_one[suite][example] for example in ids] for of_one in of_both]
        given = np.array([value for row in rows for value in row if value is not None], dtype=float)
        if not np.isfinite(given).all():
            raise ValueError("outcomes must be finite; one that could not be scored is None")
        sides = np.array([[math.nan if value is None else float(value) for value in row] for row in rows])
        first_TN, second_TN = sides.reshape(2, len(seeds), len(ids))
        scored_N = np.isfinite(first_TN - second_TN).all(0)
        parts.append((first_TN - second_TN)[:, scored_N])
        n_unscored += len(ids) - int(scored_N.sum())
    return parts, seeds, n_unscored


def _over_examples(means: Sequence[Floats]) -> tuple[float | None, float]:
    """Variance of the mean over suites of the means of their examples, and its degrees of freedom (Satterthwaite)."""
    if min(len(mean_N) for mean_N in means) < 2:
        return None, 0.0
    # Where all examples differ alike, as if there were one more that does not: how often it would is not known.
    spread = [np.append(mean_N, 0.0) if mean_N[0] and (mean_N == mean_N[0]).all() else mean_N for mean_N in means]
    parts = [float(mean_N.var(ddof=1)) / len(mean_N) / len(means) ** 2 for mean_N in spread]
    degrees = [len(mean_N) - 1 for mean_N in means]
    weighted = sum(part**2 / df for part, df in zip(parts, degrees, strict=True))
    return sum(parts), sum(parts) ** 2 / weighted if weighted > 0 else float(min(degrees))


def _variance_of_rest(parts: Sequence[Floats]) -> float:
    """What neither seeds nor examples explain, as a variance of the mean over suites."""
    found = 0.0
    for part_TN in parts:
        n_seeds, n_examples = part_TN.shape
        rest_TN = part_TN - part_TN.mean(1)[:, None] - part_TN.mean(0) + part_TN.mean()
        found += float((rest_TN**2).sum()) / ((n_seeds - 1) * (n_examples - 1) * n_seeds * n_examples)
    return found / len(parts) ** 2


def _flipped_signs(means: Sequence[Floats]) -> float:
    """Share of all ways to flip the signs of the examples' differences whose mean is as far from 0; 0 for many."""
    weighted = np.concatenate([mean_N / len(mean_N) / len(means) for mean_N in means])
    weighted = weighted[weighted != 0]
    n = len(weighted)
    if n > _FEW:
        return 0.0
    if 2**n <= _FLIPS:
        flips_RN = (np.arange(2**n)[:, None] >> np.arange(n)) & 1
        added = 0
    else:
        flips_RN = np.random.default_rng(0).integers(0, 2, (_FLIPS, n), dtype=np.int8)
        added = 1  # the observed signs are one of the ways
    sums_R = np.abs(weighted.sum() - 2 * (flips_RN.astype(float) @ weighted))
    as_far = int((sums_R >= abs(weighted.sum()) * (1 - 1e-9)).sum())
    return (as_far + added) / (len(sums_R) + added)


def _interval(mean: float, variance: float, df: float) -> Interval:
    half = _half(variance, df)
    return Interval(mean - half, mean + half)


def _half(variance: float, df: float) -> float:
    return student_quantile(df) * math.sqrt(variance)


def _degrees(variance: float, variance_T: float, variance_N: float, df_T: float, df_N: float) -> float:
    """Satterthwaite's degrees of freedom of the sum, between those of the seeds and those of the examples."""
    spread = variance_T**2 / df_T + variance_N**2 / df_N
    fewest, most = sorted((df_T, df_N))
    return float(min(max(variance**2 / spread, fewest), most)) if spread > 0 else float(fewest)
