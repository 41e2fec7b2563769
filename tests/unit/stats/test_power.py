"""Power and equivalence: by theorem, against scipy, and against simulated studies."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy.integrate import quad
from scipy.special import ndtr, stdtr, stdtrit
from scipy.stats import chi, ttest_1samp

from castune.stats.power import (
    equivalent,
    pairs_needed,
    power,
    sd_of_changes,
    seeds_needed,
    smallest_difference,
    smallest_paired_difference,
)

SEEDS_SD = st.floats(0.01, 10)
ITEMS_SE = st.one_of(st.just(0.0), st.floats(0.01, 10))
N_SEEDS = st.integers(2, 60)
DIFFERENCE = st.floats(0, 30)
LEVEL = st.sampled_from([0.01, 0.05, 0.2])
DF = st.one_of(st.just(math.inf), st.floats(1, 200))


# -- power


@given(SEEDS_SD, N_SEEDS, ITEMS_SE, DF, LEVEL)
def test_without_a_difference_the_level_is_found(sd: float, n: int, se: float, df: float, level: float) -> None:
    found = power(0, seeds_sd=sd, n_seeds=n, items_se=se, items_df=df, level=level)
    assert found == pytest.approx(level, abs=1e-9)


@given(DIFFERENCE, st.floats(0, 5), SEEDS_SD, N_SEEDS, ITEMS_SE)
def test_a_larger_difference_is_found_more_often(d: float, more: float, sd: float, n: int, se: float) -> None:
    small, large = (power(value, seeds_sd=sd, n_seeds=n, items_se=se) for value in (d, d + more))
    assert small <= large + 1e-12
    assert 0.05 - 1e-9 <= small <= large <= 1 or small == pytest.approx(large)
    assert power(-d, seeds_sd=sd, n_seeds=n, items_se=se) == small


@given(DIFFERENCE, SEEDS_SD, N_SEEDS, st.integers(1, 40), ITEMS_SE)
def test_more_seeds_find_it_more_often(d: float, sd: float, n: int, more: int, se: float) -> None:
    few, many = (power(d, seeds_sd=sd, n_seeds=count, items_se=se) for count in (n, n + more))
    assert few <= many + 1e-9


@given(DIFFERENCE, SEEDS_SD, st.floats(1, 3), N_SEEDS, ITEMS_SE)
def test_noise_hides_it(d: float, sd: float, times: float, n: int, se: float) -> None:
    found = power(d, seeds_sd=sd, n_seeds=n, items_se=se)
    assert power(d, seeds_sd=sd * times, n_seeds=n, items_se=se * times) <= found + 1e-9
    assert power(d, seeds_sd=sd * times, n_seeds=n) <= power(d, seeds_sd=sd, n_seeds=n) + 1e-9


@given(DIFFERENCE, SEEDS_SD, N_SEEDS, ITEMS_SE, st.floats(1e-12, 1e12))
def test_units_change_nothing(d: float, sd: float, n: int, se: float, unit: float) -> None:
    found = power(d, seeds_sd=sd, n_seeds=n, items_se=se)
    assert power(d * unit, seeds_sd=sd * unit, n_seeds=n, items_se=se * unit) == pytest.approx(found, abs=1e-9)


@pytest.mark.parametrize("n", [2, 4, 8, 30])
@pytest.mark.parametrize("d", [0.5, 1, 3])
def test_of_seeds_alone_it_is_the_paired_t_tests(n: int, d: float) -> None:
    """The chance given the measured sd, averaged over what may be measured."""
    quantile, shift, measured_sd = stdtrit(n - 1, 0.975), d * math.sqrt(n), chi(n - 1, scale=1 / math.sqrt(n - 1))

    def part(sd: float) -> float:
        return float((ndtr(shift - quantile * sd) + ndtr(-shift - quantile * sd)) * measured_sd.pdf(sd))

    assert power(d, seeds_sd=1, n_seeds=n) == pytest.approx(quad(part, 0, 8, limit=200)[0], abs=1e-7)


def test_a_published_power() -> None:
    """power.t.test(n = 10, delta = 1, sd = 1, type = "paired") of R."""
    assert power(1, seeds_sd=1, n_seeds=10) == pytest.approx(0.8030969, abs=5e-8)


def test_of_many_examples_alone_it_is_the_normal_tests() -> None:
    expected = ndtr(2.5 - 1.959963985) + ndtr(-2.5 - 1.959963985)
    assert power(2.5, seeds_sd=0, n_seeds=3, items_se=1) == pytest.approx(expected, abs=1e-8)
    of_few = power(2.5, seeds_sd=0, n_seeds=3, items_se=1, items_df=6)
    assert of_few == pytest.approx(power(2.5, seeds_sd=math.sqrt(7), n_seeds=7), abs=1e-9), "as of seven seeds"


@pytest.mark.parametrize("n", [2, 3, 8, 50, 1000])
def test_what_cannot_be_missed_is_found(n: int) -> None:
    found = [power(d, seeds_sd=1, n_seeds=n) for d in np.geomspace(1, 1e9, 400)]
    assert np.isfinite(found).all()
    assert (np.diff(found) >= -1e-12).all()
    assert found[-1] == pytest.approx(1)


@pytest.mark.parametrize(("n", "d"), [(3, 1.5), (8, 0.7), (8, 1.2)])
def test_simulated_studies_find_it_as_often(n: int, d: float) -> None:
    tries = 20_000
    difference_RT = np.random.default_rng(n).normal(d, 1, size=(tries, n))
    share = np.mean(ttest_1samp(difference_RT, 0, axis=1).pvalue < 0.05)
    expected = power(d, seeds_sd=1, n_seeds=n)
    assert abs(share - expected) < 4 * math.sqrt(expected * (1 - expected) / tries)


@pytest.mark.parametrize(("n", "items_se", "d"), [(4, 0.5, 1.8), (8, 0.35, 1.4), (8, 1.0, 2.5)])
def test_simulated_studies_of_seeds_and_items_find_it_as_often(n: int, items_se: float, d: float) -> None:
    """The test is that of measured variances: seeds' from the seeds, items' known, Satterthwaite's df from both."""
    tries, rng = 20_000, np.random.default_rng(n)
    seed_RT = rng.normal(size=(tries, n))
    value_R = d + seed_RT.mean(1) + rng.normal(0, items_se, size=tries)
    of_seeds_R = seed_RT.var(1, ddof=1) / n
    variance_R = of_seeds_R + items_se**2
    df_R = variance_R**2 / (of_seeds_R**2 / (n - 1))
    share = np.mean(2 * stdtr(df_R, -np.abs(value_R) / np.sqrt(variance_R)) < 0.05)
    expected = power(d, seeds_sd=1, n_seeds=n, items_se=items_se)
    assert 0.3 < expected < 0.95
    assert share == pytest.approx(expected, abs=0.025)


# -- what can be seen, and with how many seeds


@given(SEEDS_SD, N_SEEDS, ITEMS_SE, DF, LEVEL, st.floats(0.21, 0.999))
def test_the_smallest_difference_has_the_power_asked_for(
    sd: float, n: int, se: float, df: float, level: float, asked: float
) -> None:
    settings: dict[str, Any] = {"seeds_sd": sd, "n_seeds": n, "items_se": se, "items_df": df, "level": level}
    found = smallest_difference(**settings, power=asked)
    assert power(found, **settings) == pytest.approx(asked, abs=1e-9)


@given(st.floats(0.05, 10), SEEDS_SD, ITEMS_SE, st.sampled_from([0.5, 0.8, 0.9]))
def test_the_seeds_needed_are_the_fewest(d: float, sd: float, se: float, asked: float) -> None:
    found = seeds_needed(d, seeds_sd=sd, items_se=se, power=asked, at_most=200)
    if found is None:
        assert power(d, seeds_sd=sd, n_seeds=200, items_se=se) < asked
        return
    assert power(d, seeds_sd=sd, n_seeds=found, items_se=se) >= asked
    assert found == 2 or power(d, seeds_sd=sd, n_seeds=found - 1, items_se=se) < asked


def test_no_number_of_seeds_makes_up_for_few_items() -> None:
    assert seeds_needed(1, seeds_sd=1, items_se=0.5, at_most=5000) is None
    assert seeds_needed(0, seeds_sd=1) is None
    assert seeds_needed(-1, seeds_sd=1) == seeds_needed(1, seeds_sd=1) == 10, "as R's power.t.test: n = 9.94"
    limit = smallest_difference(seeds_sd=1, n_seeds=10**9, items_se=0.5)
    assert limit == pytest.approx(0.5 * (1.959964 + 0.841621), rel=1e-4)


# -- what can be seen, and with how many pairs of examples


@pytest.mark.parametrize(("n", "sd"), [(8, 1.0), (40, 0.3), (120, 2.0)])
def test_simulated_pairs_show_the_smallest_visible_difference_as_often(n: int, sd: float) -> None:
    difference = smallest_paired_difference(sd / math.sqrt(n), n, power=0.8)
    pairs_RN = np.random.default_rng(n).normal(difference, sd, (20_000, n))
    assert (ttest_1samp(pairs_RN, 0, axis=1).pvalue < 0.05).mean() == pytest.approx(0.8, abs=0.012)


@given(st.floats(0.01, 3), st.floats(0.05, 3), st.sampled_from([0.5, 0.8, 0.9]))
def test_the_pairs_needed_are_the_fewest(d: float, sd: float, asked: float) -> None:
    found = pairs_needed(d, sd=sd, power=asked)
    assert found is not None
    assert smallest_paired_difference(sd / math.sqrt(found), found, power=asked) <= d * (1 + 1e-9)
    if found > 2:
        fewer = smallest_paired_difference(sd / math.sqrt(found - 1), found - 1, power=asked)
        assert fewer > d * (1 - 1e-9)


def test_what_pairs_cannot_show() -> None:
    assert pairs_needed(0, sd=1) is None
    assert pairs_needed(1e-9, sd=1) is None
    for call in (lambda: smallest_paired_difference(0.1, 1), lambda: pairs_needed(1, sd=1, at_most=1)):
        with pytest.raises(ValueError, match="1 pairs"):
            call()
    with pytest.raises(ValueError, match="sd is 0"):
        pairs_needed(1, sd=0)


@given(st.lists(st.sampled_from([-1, 0, 1]), min_size=2, max_size=60))
def test_paired_outcomes_spread_no_further_than_their_changes_allow(changes: list[int]) -> None:
    assert np.std(changes) <= sd_of_changes(float(np.mean(np.abs(changes)))) + 1e-12


# -- equivalence


@given(st.floats(-3, 3), st.floats(0.01, 2), st.floats(1, 200), st.floats(0.1, 3))
def test_equivalence_is_two_one_sided_tests(value: float, se: float, df: float, bound: float) -> None:
    found = equivalent(value, se, df, bound)
    p = [float(stdtr(df, -(value + bound) / se)), float(stdtr(df, (value - bound) / se))]
    assume(abs(max(p) - 0.05) > 1e-9)
    assert found.is_equivalent == (max(p) < 0.05)
    assert found.interval.high - value == pytest.approx(stdtrit(df, 0.95) * se)
    assert value - found.interval.low == pytest.approx(stdtrit(df, 0.95) * se)
    assert equivalent(-value, se, df, bound).is_equivalent == found.is_equivalent


def test_equivalence_where_the_difference_is_known() -> None:
    assert equivalent(0.5, 0, 3, 1) == (True, (0.5, 0.5))
    assert not equivalent(1, 0, 3, 1).is_equivalent
    assert not equivalent(0, 1, 2, 1).is_equivalent, "what is not seen is not therefore nothing"
    assert equivalent(0, 1, math.inf, 1.65).is_equivalent
    assert not equivalent(0, 1, math.inf, 1.64).is_equivalent


# -- hostile inputs


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"difference": math.nan}, "difference is nan, accepted"),
        ({"difference": math.inf}, "difference is inf, accepted"),
        ({"seeds_sd": -1.0}, "seeds_sd is -1.0, accepted"),
        ({"seeds_sd": math.nan}, "seeds_sd is nan, accepted"),
        ({"seeds_sd": math.inf}, "seeds_sd is inf, accepted"),
        ({"items_se": -0.1}, "items_se is -0.1, accepted"),
        ({"items_se": math.inf}, "items_se is inf, accepted"),
        ({"seeds_sd": 0.0}, "seeds_sd and items_se are 0"),
        ({"items_df": 0}, "items_df is 0, accepted"),
        ({"items_df": math.nan}, "items_df is nan, accepted"),
        ({"level": 0}, "level is 0, accepted"),
        ({"level": 1}, "level is 1, accepted"),
        ({"level": math.nan}, "level is nan, accepted"),
        ({"n_seeds": 1}, "n_seeds is 1, accepted"),
        ({"power": 0.05}, "power is 0.05, accepted"),
        ({"power": 1}, "power is 1, accepted"),
        ({"power": math.nan}, "power is nan, accepted"),
        ({"at_most": 1}, "at_most is 1, accepted"),
    ],
)
def test_numbers_out_of_range_are_refused(changed: dict[str, Any], message: str) -> None:
    valid: dict[str, Any] = {"difference": 1.0, "seeds_sd": 1.0, "n_seeds": 3, "power": 0.8, "at_most": 5}
    takes = {
        power: ("difference", "seeds_sd", "n_seeds"),
        smallest_difference: ("seeds_sd", "n_seeds", "power"),
        seeds_needed: ("difference", "seeds_sd", "power", "at_most"),
    }
    (name,) = changed
    callers = [call for call, names in takes.items() if name in names or name not in valid]
    assert callers
    for call in callers:
        settings = {**{key: valid[key] for key in takes[call]}, **changed}
        with pytest.raises(ValueError, match=message):
            call(**settings)  # type: ignore[operator]


@pytest.mark.parametrize(
    ("value", "se", "df", "bound", "message"),
    [
        (math.nan, 1, 3, 1, "value is nan"),
        (0, -1, 3, 1, "se is -1"),
        (0, math.nan, 3, 1, "se is nan"),
        (0, 1, 0, 1, "df is 0"),
        (0, 1, math.nan, 1, "df is nan"),
        (0, 1, 3, 0, "bound is 0"),
        (0, 1, 3, math.inf, "bound is inf"),
    ],
)
def test_no_equivalence_of_what_is_no_number(value: float, se: float, df: float, bound: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        equivalent(value, se, df, bound)
