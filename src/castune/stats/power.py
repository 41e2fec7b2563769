"""How large a difference a study can see, how many seeds it needs, and when two arms are equivalent. Pure.

The test is that of `stats.comparisons`: of the paired difference of two arms, a mean over T seeds and over examples.
Its variance is seeds_sd^2 / T + items_se^2, for more seeds do not make up for few examples; degrees of freedom after
Satterthwaite (1946). The power of Student's t is that of the noncentral t distribution.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from castune.stats.distributions import LEVEL, Interval, student_quantile


class Equivalence(NamedTuple):
    """Two one-sided tests at 5 % each (Schuirmann 1987).

    Attributes:
        is_equivalent: both are passed: the whole interval lies within the bound.
        interval: 90 %, unlike other intervals.
    """

    is_equivalent: bool
    interval: Interval


def power(
    difference: float,
    *,
    seeds_sd: float,
    n_seeds: int,
    items_se: float = 0.0,
    items_df: float = math.inf,
    level: float = LEVEL,
) -> float:
    """Chance that a two-sided test finds a true difference of two arms.

    Noise is taken to be as large whatever the difference. That of costs grows with them, so where chance makes their
    difference small its error is small too, and more is found than foretold: in simulated studies of eight seeds
    97 % instead of 88 %, 57 % instead of 51 % (`benchmarks/planted_truth.py`).

    Args:
        difference: true mean difference, in any unit; its sign does not matter.
        seeds_sd: standard deviation over seeds of the paired difference, in the same unit.
        n_seeds: seeds of both arms, 2 or more.
        items_se: standard error that the choice of examples leaves however many seeds there are, in the same unit.
        items_df: its degrees of freedom; by default those of many examples.
        level: of the test.

    Raises:
        ValueError: a number out of its range, or neither seeds nor examples that vary.
    """
    _check_difference(difference)
    se, df = _error(seeds_sd, n_seeds, items_se, items_df)
    return _power_of_t(abs(difference) / se, df, _checked_level(level))


def smallest_difference(
    *,
    seeds_sd: float,
    n_seeds: int,
    items_se: float = 0.0,
    items_df: float = math.inf,
    power: float = 0.8,
    level: float = LEVEL,
) -> float:
    """The true difference that is found with this power, in the unit of the standard deviations.

    Args:
        seeds_sd: as for `power`, like all the others.
        n_seeds: seeds of both arms.
        items_se: standard error by examples.
        items_df: its degrees of freedom.
        power: chance to find it, above the level.
        level: of the test.

    Raises:
        ValueError: as `power`, or a power that is not above the level and below 1.
    """
    from scipy.optimize import brentq

    _check_power(power, _checked_level(level))
    se, df = _error(seeds_sd, n_seeds, items_se, items_df)
    enough = 1.0
    while _power_of_t(enough, df, level) < power:
        enough *= 2
    return se * float(brentq(lambda errors: _power_of_t(errors, df, level) - power, 0.0, enough))


def seeds_needed(
    difference: float,
    *,
    seeds_sd: float,
    items_se: float = 0.0,
    items_df: float = math.inf,
    power: float = 0.8,
    level: float = LEVEL,
    at_most: int = 1000,
) -> int | None:
    """The fewest seeds, 2 or more, that find a true difference with this power.

    Args:
        difference: as for `power`, like all the others.
        seeds_sd: standard deviation over seeds of the paired difference.
        items_se: standard error by examples.
        items_df: its degrees of freedom.
        power: chance to find it, above the level.
        level: of the test.
        at_most: the most seeds to think of.

    Returns:
        None where `at_most` are not enough: no number may be, for more seeds do not reduce the error by examples.

    Raises:
        ValueError: as `smallest_difference`, or fewer than two seeds to think of.
    """
    _check_difference(difference)
    _check_power(power, _checked_level(level))
    if at_most < 2:
        raise ValueError(f"at_most is {at_most}, accepted: 2 or more seeds")
    for n_seeds in range(2, at_most + 1):
        se, df = _error(seeds_sd, n_seeds, items_se, items_df)
        if _power_of_t(abs(difference) / se, df, level) >= power:
            return n_seeds
    return None


def smallest_paired_difference(
    standard_error: float, n_pairs: int, *, power: float = 0.8, level: float = LEVEL
) -> float:
    """The true mean difference of so many paired examples that is found with this power; no other training is meant.

    Args:
        standard_error: of the mean difference, above 0, in any unit.
        n_pairs: 2 or more.
        power: chance to find it, above the level.
        level: of the test.

    Raises:
        ValueError: a number out of its range.
    """
    _check_pairs(n_pairs)
    return smallest_difference(
        seeds_sd=0.0, n_seeds=2, items_se=standard_error, items_df=n_pairs - 1, power=power, level=level
    )


def pairs_needed(
    difference: float, *, sd: float, power: float = 0.8, level: float = LEVEL, at_most: int = 10_000_000
) -> int | None:
    """The fewest pairs, 2 or more, that find a true mean difference with this power.

    Args:
        difference: in the unit of `sd`; its sign does not matter.
        sd: standard deviation of the differences of single pairs, above 0.
        power: chance to find it, above the level.
        level: of the test.
        at_most: the most pairs to think of.

    Returns:
        None where `at_most` are not enough.

    Raises:
        ValueError: a number out of its range.
    """
    _check_difference(difference)
    _check_power(power, _checked_level(level))
    _check_pairs(at_most)
    if not 0 < sd < math.inf:
        raise ValueError(f"sd is {sd}, accepted: a finite number above 0")

    def finds(n_pairs: int) -> bool:
        return _power_of_t(abs(difference) / sd * math.sqrt(n_pairs), n_pairs - 1, level) >= power

    if not finds(at_most):
        return None
    few, enough = 1, at_most
    while enough - few > 1:
        middle = (few + enough) // 2
        few, enough = (few, middle) if finds(middle) else (middle, enough)
    return enough


def sd_of_changes(changed_share: float) -> float:
    """At most how far paired outcomes, right or wrong, spread where so large a share of them changes.

    A change is +1 or -1, so the variance is the share minus the squared mean difference.

    Raises:
        ValueError: no share.
    """
    if not 0 <= changed_share <= 1:
        raise ValueError(f"changed_share is {changed_share}, accepted: 0 to 1")
    return math.sqrt(changed_share)


def equivalent(value: float, se: float, df: float, bound: float) -> Equivalence:
    """Whether a difference is smaller than a bound on either side: more than that no difference was seen.

    Args:
        value: measured difference.
        se: its standard error.
        df: degrees of freedom of the standard error.
        bound: the smallest difference that would matter, above 0.

    Raises:
        ValueError: a number out of its range.
    """
    if not math.isfinite(value):
        raise ValueError(f"value is {value}, accepted: a finite number")
    if not 0 <= se < math.inf:
        raise ValueError(f"se is {se}, accepted: a finite number of at least 0")
    if not df > 0:
        raise ValueError(f"df is {df}, accepted: a number above 0")
    if not 0 < bound < math.inf:
        raise ValueError(f"bound is {bound}, accepted: a finite number above 0")
    half = student_quantile(df, 2 * LEVEL) * se
    interval = Interval(value - half, value + half)
    return Equivalence(-bound < interval.low and interval.high < bound, interval)


def _error(seeds_sd: float, n_seeds: int, items_se: float, items_df: float) -> tuple[float, float]:
    """Standard error of the difference, and its degrees of freedom."""
    for name, value in (("seeds_sd", seeds_sd), ("items_se", items_se)):
        if not 0 <= value < math.inf:
            raise ValueError(f"{name} is {value}, accepted: a finite number of at least 0")
    if n_seeds < 2:
        raise ValueError(f"n_seeds is {n_seeds}, accepted: 2 or more; one does not show what another would do")
    if not items_df > 0:
        raise ValueError(f"items_df is {items_df}, accepted: a number above 0")
    of_seeds = seeds_sd / math.sqrt(n_seeds)
    se = math.hypot(of_seeds, items_se)
    if se == 0:
        raise ValueError("seeds_sd and items_se are 0, accepted: at least one of them above 0")
    share = (of_seeds / se) ** 2
    spread = share**2 / (n_seeds - 1) + (1 - share) ** 2 / items_df
    df = 1 / spread if spread > 0 else math.inf
    return se, min(df, max(n_seeds - 1, items_df))


def _power_of_t(errors: float, df: float, level: float) -> float:
    """Chance that t is beyond its quantile on either side, of a difference of so many standard errors."""
    from scipy.special import nctdtr

    quantile = student_quantile(df, level)
    below, beyond = (float(nctdtr(df, errors, end)) for end in (-quantile, quantile))
    # Where a probability is next to nothing, scipy may say NaN.
    return 1.0 - (0.0 if math.isnan(beyond) else beyond) + (0.0 if math.isnan(below) else below)


def _check_pairs(n_pairs: int) -> None:
    if n_pairs < 2:
        raise ValueError(f"{n_pairs} pairs, accepted: 2 or more")


def _check_difference(difference: float) -> None:
    if not math.isfinite(difference):
        raise ValueError(f"difference is {difference}, accepted: a finite number")


def _checked_level(level: float) -> float:
    if not 0 < level < 1:
        raise ValueError(f"level is {level}, accepted: a number between 0 and 1")
    return level


def _check_power(asked: float, level: float) -> None:
    if not level < asked < 1:
        raise ValueError(f"power is {asked}, accepted: a number above the level, {level}, and below 1")
