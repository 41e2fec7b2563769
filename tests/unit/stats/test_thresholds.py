"""Intervals against thresholds: kept, missed or undecided, and how many examples would decide."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import scipy.stats
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar

from castune.stats.distributions import Interval
from castune.stats.estimates import estimate, paired_difference, paired_rate_interval, student_interval, wilson_interval
from castune.stats.thresholds import (
    Mean,
    Measured,
    Rate,
    RateChange,
    Threshold,
    examples_needed,
    mean_interval,
    mean_value,
)

Z = scipy.stats.norm.ppf(0.975)
# Each input takes many intervals.
FEW = settings(max_examples=30, deadline=None)


@st.composite
def rates(draw: st.DrawFn, unscored: int = 0) -> Rate:
    n = draw(st.integers(1, 200))
    return Rate(draw(st.integers(0, n)), n, draw(st.integers(0, unscored)))


@st.composite
def changes(draw: st.DrawFn, unscored: int = 0) -> RateChange:
    n = draw(st.integers(1, 120))
    gained = draw(st.integers(0, n))
    return RateChange(gained, draw(st.integers(0, n - gained)), n, draw(st.integers(0, unscored)))


MEANS = st.builds(Mean, st.floats(-5, 5), st.floats(1e-3, 2), st.integers(2, 200))
SUITES = rates() | changes() | MEANS
INTERVALS = st.tuples(st.floats(-2, 2), st.floats(-2, 2)).map(lambda ends: Interval(*sorted(ends)))
THRESHOLDS = st.builds(Threshold, st.floats(-2, 2), st.booleans())


# -- differences of rates of the same examples


@pytest.mark.parametrize(
    ("counts", "ends"),
    [
        # Fagerland, Lydersen and Laake (2014): airway hyper-responsiveness before and after transplantation.
        ((1, 7, 21), (-0.517, -0.026)),
        # No pair differs: both ends by hand.
        ((0, 0, 100), (-(Z**2) / (100 + Z**2), Z**2 / (100 + Z**2))),
        ((0, 0, 1), (-(Z**2) / (1 + Z**2), Z**2 / (1 + Z**2))),
    ],
)
def test_tangos_interval_pinned(counts: tuple[int, int, int], ends: tuple[float, float]) -> None:
    assert paired_rate_interval(*counts) == pytest.approx(ends, abs=5e-4)
    assert paired_rate_interval(0, 0, 0) is None


@FEW
@given(changes())
def test_tangos_interval_ends_where_the_score_test_turns(change: RateChange) -> None:
    gained, lost, n = change.gained, change.lost, change.n
    found = paired_rate_interval(gained, lost, n)
    assert found is not None
    for end in found:
        if abs(end) > 1 - 1e-6:
            continue

        # The most likely share of lost pairs given the difference, found without its formula.
        def unlikely(q: float, end: float = end) -> float:
            shares = np.array([q + end, q, 1 - 2 * q - end])
            with np.errstate(divide="ignore"):
                logs = np.log(np.clip(shares, 1e-300, None))
            return -float(np.dot([gained, lost, n - gained - lost], logs))

        bounds = (max(0.0, -end), (1 - end) / 2)
        q = minimize_scalar(unlikely, bounds=bounds, method="bounded", options={"xatol": 1e-10}).x
        score = (gained - lost - n * end) / math.sqrt(n * (2 * q + end * (1 - end)))
        assert abs(score) == pytest.approx(Z, abs=2e-3)


@given(changes())
def test_tangos_interval_holds_the_value_and_turns_around_with_the_sides(change: RateChange) -> None:
    low, high = paired_rate_interval(change.gained, change.lost, change.n) or (1, 0)
    assert -1 <= low <= (change.value or 0.0) <= high <= 1
    assert low < high
    assert paired_rate_interval(change.lost, change.gained, change.n) == pytest.approx((-high, -low), abs=1e-9)


# -- one suite


@given(rates())
def test_a_rate_that_is_scored_has_wilsons_interval(rate: Rate) -> None:
    assert rate.interval() == wilson_interval(rate.successes, rate.n)
    assert Rate.of(estimate([True] * rate.successes + [False] * (rate.n - rate.successes))) == rate


@given(rates(unscored=6))
def test_whatever_unscored_examples_are_their_rate_is_allowed_for(rate: Rate) -> None:
    interval = rate.interval()
    assert interval is not None
    for successes in range(rate.successes, rate.successes + rate.unscored + 1):
        low, high = wilson_interval(successes, rate.total) or (0, 0)
        assert interval.low <= low
        assert high <= interval.high
    # Wilson's ends of 0 and 1 are that but for rounding.
    assert interval.low - 1e-12 <= (rate.value or 0.0) <= interval.high + 1e-12


@FEW
@given(changes(unscored=4))
def test_whatever_unscored_pairs_are_their_difference_is_allowed_for(change: RateChange) -> None:
    interval = change.interval()
    assert interval is not None
    for gained in range(change.unscored + 1):
        for lost in range(change.unscored + 1 - gained):
            low, high = paired_rate_interval(change.gained + gained, change.lost + lost, change.total) or (0, 0)
            assert interval.low <= low + 1e-9
            assert high <= interval.high + 1e-9
    assert interval.holds(change.value or 0.0)


def test_a_mean_has_students_interval_where_one_can_be_known() -> None:
    values = [0.5, 0.75, 1.5, 0.25]
    found = estimate(values)
    assert Mean.of(found).interval() == pytest.approx(student_interval(found))
    assert Mean.of(estimate([*values, None])).interval() is None
    assert Mean.of(estimate([0.5])).interval() is None
    assert Mean.of(estimate([0.5, 0.5, 0.5])).interval() is None
    assert Mean.of(estimate([])).value is None
    paired = paired_difference([0.0, 0.5, 0.25], [0.5, 0.5, 1.0])
    assert Mean.of(paired).value == pytest.approx(1.25 / 3)


def test_more_examples_are_the_same_ones_over_again() -> None:
    assert Rate(9, 12).interval(3) == Rate(27, 36).interval()
    assert Rate(9, 12, 2).interval(2) == Rate(18, 24, 4).interval()
    assert RateChange(3, 5, 40, 1).interval(4) == RateChange(12, 20, 160, 4).interval()
    # Of numbers: with their spread as it was estimated, and the degrees of freedom of so many.
    half = scipy.stats.t.ppf(0.975, 29) * 0.02 / math.sqrt(3)
    assert Mean(0.5, 0.02, 10).interval(3) == pytest.approx((0.5 - half, 0.5 + half))


def test_nothing_scored_is_no_value_and_bounds_nothing() -> None:
    for nothing in (Rate(0, 0, 5), RateChange(0, 0, 0, 5)):
        assert nothing.value is None
        interval = nothing.interval()
        assert interval is not None
        assert interval.holds(0)
        assert interval.high == 1
    assert Rate(0, 0).interval() is RateChange(0, 0, 0).interval() is None


# -- several suites


@given(SUITES)
def test_the_mean_of_one_suite_is_that_suite(suite: Measured) -> None:
    assert mean_interval([suite]) == suite.interval()
    assert mean_value([suite]) == suite.value


@given(st.lists(rates(unscored=3), min_size=2, max_size=4), st.randoms())
def test_every_suite_counts_alike_in_any_order(suites: list[Rate], random: Any) -> None:
    interval, value = mean_interval(suites), mean_value(suites)
    assert interval is not None
    assert value == pytest.approx(np.mean([suite.successes / suite.n for suite in suites]))
    assert interval.low >= -1e-12
    assert interval.high <= 1 + 1e-12
    assert interval.low - 1e-9 <= value <= interval.high + 1e-9
    shuffled = random.sample(suites, len(suites))
    assert mean_interval(shuffled) == pytest.approx(interval)


def test_the_interval_of_a_mean_by_hand() -> None:
    first, second = wilson_interval(90, 100), wilson_interval(30, 50)
    assert first is not None
    assert second is not None
    low = 0.75 - math.sqrt((0.9 - first[0]) ** 2 + (0.6 - second[0]) ** 2) / 2
    high = 0.75 + math.sqrt((first[1] - 0.9) ** 2 + (second[1] - 0.6) ** 2) / 2
    assert mean_interval([Rate(90, 100), Rate(30, 50)]) == pytest.approx((low, high))


@given(MEANS, MEANS)
def test_the_interval_of_a_mean_of_numbers_is_that_of_added_variances(one: Mean, other: Mean) -> None:
    interval = mean_interval([one, other])
    assert interval is not None
    halves = [scipy.stats.t.ppf(0.975, suite.n - 1) * float(suite.standard_error or 0) for suite in (one, other)]
    assert interval.high - interval.low == pytest.approx(math.hypot(*halves))


def test_a_suite_without_an_interval_leaves_none_for_the_mean() -> None:
    assert mean_interval([Rate(3, 4), Rate(0, 0)]) is None
    assert mean_value([Rate(3, 4), Rate(0, 0, 2)]) is None
    assert mean_interval([]) is mean_value([]) is None


@pytest.mark.parametrize("rates_of", [(0.9, 0.95), (0.97, 0.99)])
def test_a_mean_rate_is_passed_by_luck_no_more_often_than_promised(rates_of: tuple[float, float]) -> None:
    """All outcomes of two suites of 40, enumerated: how often the lower end is above the truth."""
    n, truth = 40, float(np.mean(rates_of))
    chance = [scipy.stats.binom.pmf(range(n + 1), n, rate) for rate in rates_of]
    passed = sum(
        chance[0][a] * chance[1][b]
        for a in range(n + 1)
        for b in range(n + 1)
        if (interval := mean_interval([Rate(a, n), Rate(b, n)])) is not None and interval.low > truth
    )
    assert passed <= 0.025


# -- thresholds


@given(INTERVALS, st.floats(-2, 2))
def test_a_rule_passes_iff_the_bound_does(interval: Interval, value: float) -> None:
    floor, ceiling = Threshold(value, is_floor=True), Threshold(value, is_floor=False)
    assert (floor.is_kept(interval) is True) == (interval.low >= value)
    assert (floor.is_kept(interval) is False) == (interval.high < value)
    assert (ceiling.is_kept(interval) is True) == (interval.high <= value)
    assert (ceiling.is_kept(interval) is False) == (interval.low > value)


@given(INTERVALS, st.floats(-2, 2), st.floats(0, 1))
def test_what_keeps_a_threshold_keeps_every_easier_one(interval: Interval, value: float, more: float) -> None:
    order = {False: 0, None: 1, True: 2}
    for is_floor, easier in ((True, value - more), (False, value + more)):
        kept = Threshold(value, is_floor).is_kept(interval)
        assert order[Threshold(easier, is_floor).is_kept(interval)] >= order[kept]


@given(INTERVALS, THRESHOLDS)
def test_floor_and_ceiling_are_each_others_mirror(interval: Interval, threshold: Threshold) -> None:
    mirrored = Threshold(-threshold.value, not threshold.is_floor)
    assert mirrored.is_kept(Interval(-interval.high, -interval.low)) == threshold.is_kept(interval)


@given(rates(), rates(), st.floats(0.01, 0.99))
def test_swapping_success_and_failure_swaps_floor_and_ceiling(one: Rate, other: Rate, value: float) -> None:
    interval = mean_interval([one, other])
    swapped = mean_interval([Rate(rate.n - rate.successes, rate.n) for rate in (one, other)])
    assert interval is not None
    assert swapped is not None
    assume(min(abs(value - end) for end in interval) > 1e-9)
    assert Threshold(value, True).is_kept(interval) == Threshold(1 - value, False).is_kept(swapped)


# -- how many examples


def brute_force(suites: Sequence[Measured], threshold: Threshold, most: int) -> int | None:
    """The first number of examples that decides, all tried."""
    total = sum(suite.total for suite in suites)
    for n in range(total, most):
        interval = mean_interval(suites, n / total)
        if interval is not None and threshold.is_kept(interval) is not None:
            return n
    return None


@pytest.mark.parametrize(
    ("suites", "threshold"),
    [
        ([Rate(112, 120)], Threshold(0.9, True)),
        ([Rate(112, 120)], Threshold(0.95, True)),
        ([Rate(8, 120)], Threshold(0.1, False)),
        ([Rate(120, 120)], Threshold(0.99, True)),
        ([Rate(0, 30)], Threshold(0.02, False)),
        ([Rate(112, 120, 1)], Threshold(0.9, True)),
        ([Rate(45, 50), Rate(90, 100)], Threshold(0.85, True)),
        ([RateChange(3, 5, 160)], Threshold(-0.05, True)),
        ([RateChange(0, 0, 60)], Threshold(-0.02, True)),
        ([RateChange(10, 20, 100)], Threshold(-0.05, True)),
        ([RateChange(3, 5, 160, 1)], Threshold(-0.06, True)),
        ([RateChange(1, 2, 50), RateChange(4, 4, 70)], Threshold(-0.04, True)),
        ([Mean(0.04, 0.02, 50)], Threshold(0.05, False)),
        ([Mean(0.04, 0.02, 3)], Threshold(0.02, False)),
        ([Mean(0.04, 0.02, 50), Mean(0.06, 0.01, 20)], Threshold(0.06, False)),
    ],
    ids=str,
)
def test_the_number_of_examples_is_the_smallest_that_decides(suites: list[Measured], threshold: Threshold) -> None:
    needed = examples_needed(suites, threshold)
    assert needed is not None
    assert needed > sum(suite.total for suite in suites)
    assert brute_force(suites, threshold, most=needed + 2) == needed


@given(rates(), st.floats(0.02, 0.98), st.booleans())
def test_of_a_rate_it_is_that_of_the_score_test(rate: Rate, value: float, is_floor: bool) -> None:
    threshold, interval, observed = Threshold(value, is_floor), rate.interval(), rate.value
    assert interval is not None
    assert observed is not None
    assume(threshold.is_kept(interval) is None and abs(observed - value) > 0.01)
    exact = Z**2 * value * (1 - value) / (observed - value) ** 2
    needed = examples_needed([rate], threshold)
    assert needed is not None
    assert exact - 1e-6 <= needed <= exact + 1 + 1e-6


@FEW
@given(SUITES, st.floats(0.05, 0.95), st.booleans())
def test_more_examples_decide_as_the_value_does(suite: Any, place: float, is_floor: bool) -> None:
    low, high = suite.interval()
    threshold = Threshold(low + place * (high - low), is_floor)
    assume(abs(suite.value - threshold.value) > 1e-2 * (high - low))
    needed = examples_needed([suite], threshold)
    assert needed is not None
    then = mean_interval([suite], needed / suite.total)
    assert then is not None
    assert threshold.is_kept(then) is threshold.is_kept(Interval(suite.value, suite.value))


def test_no_number_of_examples_decides_what_it_cannot() -> None:
    assert examples_needed([Rate(50, 100)], Threshold(0.5, True)) is None
    assert examples_needed([Rate(80, 90, 10)], Threshold(0.85, True)) is None  # 80 to 90 of 100
    assert examples_needed([Mean(1.0, None, 1)], Threshold(0.5, True)) is None
    assert examples_needed([], Threshold(0.5, True)) is None
