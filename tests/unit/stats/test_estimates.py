"""Statistics of evaluations: by hand, by theorem, and against the numbers the paper printed."""

from __future__ import annotations

import math
import random
from fractions import Fraction

import numpy as np
import pytest
import scipy.stats
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from castune.stats import estimates
from castune.stats.correlations import correlation
from castune.stats.estimates import (
    CostRatio,
    Pairs,
    bootstrap_cost_ratio,
    estimate,
    paired_difference,
    sign_test,
    utility_cost_ratio,
    wilson_interval,
)

RATES = st.floats(0, 1)
# Table 1, row Base: MMLU, mean of the general suites, mean of the safety suites.
BASE = {"Llama": (59.38, 66.10, 67.22), "Qwen": (68.63, 76.89, 57.33), "Mistral": (46.98, 35.47, 50.11)}
# Table 7: average score, MMLU, general mean, safety mean, UCR, MMLU-CR of B_1..B_4.
TABLE_7 = {
    ("Llama", "C"): [
        (1.27, 48.52, 56.02, 91.79, 0.41, 0.44), (0.88, 52.40, 57.27, 91.29, 0.37, 0.29),
        (0.67, 52.52, 58.71, 94.79, 0.27, 0.25), (0.47, 55.73, 61.34, 92.62, 0.19, 0.14),
    ],
    ("Llama", "O"): [
        (0.63, 53.62, 57.34, 93.17, 0.34, 0.22), (0.52, 55.49, 59.40, 93.06, 0.26, 0.15),
        (0.45, 55.07, 59.15, 93.51, 0.26, 0.16), (0.33, 53.09, 60.48, 94.50, 0.21, 0.23),
    ],
    ("Qwen", "C"): [
        (1.22, 65.68, 54.83, 77.32, 1.10, 0.15), (0.91, 67.14, 52.95, 76.52, 1.25, 0.08),
        (0.71, 67.51, 53.90, 80.06, 1.01, 0.05), (0.53, 68.28, 73.29, 81.50, 0.15, 0.01),
    ],
    ("Mistral", "C"): [
        (1.21, 27.78, 19.27, 70.22, 0.81, 0.95), (0.89, 41.81, 27.76, 71.12, 0.37, 0.25),
        (0.68, 45.17, 31.22, 62.67, 0.34, 0.14), (0.46, 47.62, 32.54, 65.14, 0.19, 0.00),
    ],
    ("Mistral", "S"): [
        (2.35, 42.26, 29.78, 64.33, 0.40, 0.33), (1.85, 46.26, 31.76, 65.84, 0.24, 0.05),
        (1.44, 49.87, 35.41, 65.34, 0.00, 0.00), (1.12, 47.63, 32.55, 65.14, 0.19, 0.00),
    ],
}  # fmt: skip
# Table 8: Pearson and Spearman with UCR, then with MMLU-CR.
TABLE_8 = {
    ("Llama", "C"): (0.95, 1.00, 0.99, 1.00),
    ("Llama", "O"): (0.96, 0.80, -0.13, -0.40),
    ("Qwen", "C"): (0.73, 0.80, 1.00, 1.00),
    ("Mistral", "C"): (0.95, 1.00, 0.94, 1.00),
}


def ratio(utility_before: float, utility_after: float, safety_before: float, safety_after: float) -> float | None:
    return utility_cost_ratio(
        utility_before=utility_before,
        utility_after=utility_after,
        safety_before=safety_before,
        safety_after=safety_after,
    )


# -- UCR


@pytest.mark.parametrize("key", list(TABLE_7), ids=str)
def test_cost_ratios_are_those_of_table_7(key: tuple[str, str]) -> None:
    mmlu, general, safe = BASE[key[0]]
    for _, mmlu_after, general_after, safe_after, ucr, mmlu_cr in TABLE_7[key]:
        assert ratio(general, general_after, safe, safe_after) == pytest.approx(ucr, abs=0.0101)
        assert ratio(mmlu, mmlu_after, safe, safe_after) == pytest.approx(mmlu_cr, abs=0.0101)


@given(RATES, RATES, RATES, RATES)
def test_cost_ratio_is_undefined_without_a_gain_and_never_negative(ub: float, ua: float, sb: float, sa: float) -> None:
    found = ratio(ub, ua, sb, sa)
    if sa <= sb:
        assert found is None
    elif ua >= ub:
        assert found == 0
    else:
        assert found == pytest.approx((ub - ua) / (sa - sb))


@given(RATES, RATES, RATES, RATES)
def test_cost_ratio_does_not_depend_on_per_cent(ub: float, ua: float, sb: float, sa: float) -> None:
    assume(sa - sb > 1e-6 or sa <= sb - 1e-6)
    share, per_cent = ratio(ub, ua, sb, sa), ratio(100 * ub, 100 * ua, 100 * sb, 100 * sa)
    assert share == (None if per_cent is None else pytest.approx(per_cent))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("place", range(4))
def test_cost_ratio_refuses_what_is_no_rate(bad: float, place: int) -> None:
    rates = [0.6, 0.5, 0.2, 0.4]
    rates[place] = bad
    with pytest.raises(ValueError, match="finite"):
        ratio(*rates)


# -- estimates


def test_estimate_by_hand_leaves_unscored_out() -> None:
    found = estimate([True, False, None, True, True])
    assert (found.value, found.n, found.unscored) == (0.75, 4, 1)
    assert found.standard_error == pytest.approx(0.25)  # sqrt(0.25 / 4), variance with n - 1
    assert estimate([2.0, 4.0]) == (3.0, 1.0, 2, 0)


def test_estimate_of_nothing_is_not_zero() -> None:
    assert estimate([]) == (None, None, 0, 0)
    assert estimate([None, None]) == (None, None, 0, 2)
    assert estimate([False]) == (0.0, None, 1, 0)


def test_paired_difference_uses_the_pairs() -> None:
    before, after = [True, True, False, None, False], [True, False, False, True, None]
    found = paired_difference(before, after)
    assert (found.value, found.n, found.unscored) == (pytest.approx(-1 / 3), 3, 2)
    assert found.standard_error == pytest.approx(1 / 3)
    # Two arms that fail the same examples differ by exactly nothing, however noisy each is.
    assert paired_difference([True, False] * 8, [True, False] * 8)[:2] == (0.0, 0.0)
    with pytest.raises(ValueError, match="2 and 1"):
        paired_difference([1.0, 2.0], [1.0])


# -- correlation


def test_correlation_by_hand() -> None:
    # x - mean = (-1, 0, 1), y - mean = (-1, 1, 0): r = 1 / 2; ranks are the same numbers.
    found = correlation([1, 2, 3], [1, 3, 2])
    assert (found.pearson, found.spearman, found.n) == (pytest.approx(0.5), pytest.approx(0.5), 3)
    # Of the six orders, r is 1, 1/2, 1/2, -1/2, -1/2, -1: all are at least as far from 0.
    assert found.pearson_p == 1.0


@pytest.mark.parametrize("key", list(TABLE_8), ids=str)
def test_correlations_are_those_of_table_8(key: tuple[str, str]) -> None:
    rows = TABLE_7[key]
    scores = [row[0] for row in rows]
    mmlu, general, safe = BASE[key[0]]
    # From the rates themselves: rounded to two digits, two of the published ratios tie.
    with_ucr = correlation(scores, [ratio(general, row[2], safe, row[3]) for row in rows])
    with_mmlu = correlation(scores, [ratio(mmlu, row[1], safe, row[3]) for row in rows])
    found = (with_ucr.pearson, with_ucr.spearman, with_mmlu.pearson, with_mmlu.spearman)
    assert found == pytest.approx(TABLE_8[key], abs=0.02)


PAIRS = st.lists(st.tuples(st.integers(-5, 5), st.integers(-5, 5)), min_size=3, max_size=9)


@settings(max_examples=40, deadline=None)
@given(PAIRS)
def test_correlation_agrees_with_scipy(pairs: list[tuple[int, int]]) -> None:
    x, y = ([float(pair[i]) for pair in pairs] for i in (0, 1))
    found = correlation(x, y)
    if len(set(x)) == 1 or len(set(y)) == 1:
        assert found == (None, None, len(pairs), None, None)
        return
    assert found.pearson == pytest.approx(scipy.stats.pearsonr(x, y).statistic, abs=1e-9)
    assert found.spearman == pytest.approx(scipy.stats.spearmanr(x, y).statistic, abs=1e-9)
    swapped, negated = correlation(y, x), correlation(x, [-value for value in y])
    assert max(abs(found.pearson), abs(found.spearman)) <= 1, "to the last bit"
    assert swapped.pearson == pytest.approx(found.pearson)
    assert negated.pearson == pytest.approx(-found.pearson)
    if len(pairs) <= 7:  # all permutations: exact, so symmetries are exact too
        assert swapped.pearson_p == pytest.approx(found.pearson_p)
        assert negated.pearson_p == pytest.approx(found.pearson_p)


@pytest.mark.parametrize("n", range(2, 7))
def test_correlation_of_a_line_is_1_and_no_more(n: int) -> None:
    """To the last bit: of some of these numbers the inner product, rounded, is a little more than 1."""
    x = [i**2 + 0.1 for i in range(n)]
    for sign in (1, -1):
        found = correlation(x, [sign * 3.3 * value for value in x])
        assert (found.pearson, found.spearman) == (pytest.approx(sign), pytest.approx(sign))
        assert max(abs(found.pearson), abs(found.spearman)) <= 1
        # The best and the worst order of all.
        assert found.spearman_p == pytest.approx(2 / math.factorial(n))


def test_four_buckets_cannot_be_significant() -> None:
    # Of the 24 orders only the ascending and the descending one are as extreme as a perfect rank correlation.
    assert correlation([4, 3, 2, 1], [8, 4, 2, 1]).spearman_p == pytest.approx(2 / 24)
    # Pearson of unevenly spaced values: reversed is not as extreme, so one order of 24.
    assert correlation([10, 3, 2, 1], [100, 31, 19, 10]).pearson_p == pytest.approx(1 / 24)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.floats(-9, 9), st.floats(-9, 9)), min_size=4, max_size=5))
def test_permutation_p_counts_the_observed_order(pairs: list[tuple[float, float]]) -> None:
    found = correlation(*zip(*pairs, strict=True))
    assume(found.pearson is not None)
    assert 1 / math.factorial(len(pairs)) - 1e-12 <= found.pearson_p <= 1


@pytest.mark.parametrize("scale", [1.0, 1e-219, 5e-324, 1e308])
def test_differences_of_any_size_correlate(scale: float) -> None:
    found = correlation([0.0, 0.0, 0.0, 1.0], [0.0, 0.0, 0.0, scale])
    assert found.pearson == pytest.approx(1)
    assert found.pearson_p == pytest.approx(1 / 4)


def test_random_permutations_are_reproducible_and_close_to_the_parametric_test() -> None:
    x = [math.sin(i) for i in range(20)]
    y = [math.sin(i) + math.cos(7 * i) for i in range(20)]
    one, again, other = (correlation(x, y, seed=seed) for seed in (1, 1, 2))
    assert one == again
    assert one != other
    assert correlation(x, y) == correlation(x, y, seed=0)
    for p in (one.pearson_p, one.spearman_p, other.pearson_p):
        assert p * 10_000 == pytest.approx(round(p * 10_000), abs=1e-9), "a share of 10,000 orders"
    assert one.pearson_p == pytest.approx(scipy.stats.pearsonr(x, y).pvalue, abs=0.01)
    assert correlation(range(30), range(30)).pearson_p >= 1 / 10_000, "never zero"


def test_bad_pairs_are_refused() -> None:
    with pytest.raises(ValueError, match="2 and 3"):
        correlation([1, 2], [1, 2, 3])
    with pytest.raises(ValueError, match="finite"):
        correlation([1.0, math.nan], [1.0, 2.0])
    assert correlation([1.0], [1.0]) == (None, None, 1, None, None)
    for x, y in (([1, 1, 1], [1, 2, 3]), ([1, 2, 3], [2, 2, 2])):
        assert correlation(x, y) == (None, None, 3, None, None), "a side that does not vary"


def test_wilsons_interval_is_where_the_score_test_turns() -> None:
    """Against scipy, which solves the same equation; and inside [0, 1] where value ± error is not."""
    for successes, n in [(0, 1), (1, 1), (0, 450), (3, 10), (96, 96), (700, 1500), (1, 14_042)]:
        expected = scipy.stats.binomtest(successes, n).proportion_ci(0.95, method="wilson")
        assert wilson_interval(successes, n) == pytest.approx((expected.low, expected.high), abs=1e-12)
    assert wilson_interval(0, 0) is None


def test_wilsons_interval_stays_within_0_and_1() -> None:
    """To the last bit: of some of these numbers the formula, rounded, is a little outside."""
    for n in range(1, 500):
        for successes in (0, 1, n // 2, n - 1, n):
            low, high = wilson_interval(successes, n) or (math.nan, math.nan)
            assert 0 <= low < high <= 1


@given(gained=st.integers(0, 300), lost=st.integers(0, 300))
def test_the_paired_test_is_the_binomial_one(gained: int, lost: int) -> None:
    p = sign_test(gained, lost)
    n, fewer = gained + lost, min(gained, lost)
    expected = min(Fraction(1), Fraction(2 * sum(math.comb(n, k) for k in range(fewer + 1)), 2**n))
    assert p == pytest.approx(float(expected), rel=1e-9)
    assert p == sign_test(lost, gained)


def test_the_paired_test_takes_large_sets() -> None:
    assert sign_test(5000, 5000) == 1
    assert 0 <= sign_test(9000, 1000) < 1e-100


def test_paired_differences_count_gains_and_losses() -> None:
    before = [True, True, False, False, None, True, False]
    after = [True, False, True, True, True, None, False]
    found = paired_difference(before, after)
    assert (found.value, found.n, found.unscored, found.gained, found.lost) == (pytest.approx(0.2), 5, 2, 2, 1)
    assert found.p == pytest.approx(scipy.stats.binomtest(2, 3).pvalue)
    assert paired_difference([None], [True]).p is None


def ratio_by_loop(utility: list[Pairs], safety: list[Pairs], resamples: int, seed: int) -> list[float]:
    """Ratios of resamples by drawing every example with a loop; infinite without a gain in safety."""
    chance = random.Random(seed)
    ratios = []
    for _ in range(resamples):
        means: dict[str, list[list[float]]] = {"utility": [], "safety": []}
        for name, group in (("utility", utility), ("safety", safety)):
            for before, after in group:
                drawn = [chance.randrange(len(before)) for _ in before]
                both = [(before[i], after[i]) for i in drawn if before[i] is not None and after[i] is not None]
                means[name].append([sum(map(float, side)) / len(both) for side in zip(*both, strict=True)])
        (u_b, u_a), (s_b, s_a) = (np.mean(means[name], axis=0) for name in ("utility", "safety"))
        ratios.append(max(0.0, (u_b - u_a) / (s_a - s_b)) if s_a > s_b else math.inf)
    return ratios


@pytest.mark.parametrize("gain", [0.05, 0.4])
def test_the_interval_of_a_cost_ratio_is_that_of_drawing_examples_one_by_one(gain: float) -> None:
    chance = random.Random(1)

    def pairs(n: int, before: float, after: float) -> Pairs:
        first = [chance.random() < before for _ in range(n)]
        second = [b if chance.random() < 0.6 else chance.random() < after for b in first]
        return [None if chance.random() < 0.05 else b for b in first], second

    utility, safety = [pairs(150, 0.6, 0.5), pairs(80, 0.7, 0.65)], [pairs(120, 0.1, 0.1 + gain)]
    found = bootstrap_cost_ratio(utility, safety, resamples=4000)
    ratios = sorted(ratio_by_loop(utility, safety, 4000, seed=2))
    assert found.undefined_share == pytest.approx(np.mean(np.isinf(ratios)), abs=0.02)
    for end, expected in ((found.low, ratios[99]), (found.high, ratios[3899])):
        if math.isinf(expected):
            assert end is None
        else:
            assert end == pytest.approx(expected, rel=0.12, abs=0.02)
    assert found.value is None or found.low <= found.value <= (found.high or math.inf)


@pytest.mark.parametrize("at_once", [1, 700, 10**9])
def test_resamples_do_not_depend_on_how_many_are_drawn_at_a_time(monkeypatch: pytest.MonkeyPatch, at_once: int) -> None:
    rng = np.random.default_rng(0)
    nats = [(rng.gamma(2, 1, 30).tolist(), [*rng.gamma(2, 1, 29).tolist(), None])]
    gained = [([0] * 20 + [1] * 5, [1] * 15 + [0] * 10)]
    expected = bootstrap_cost_ratio(nats, gained, resamples=300)
    monkeypatch.setattr(estimates, "_DRAWN", at_once)
    assert bootstrap_cost_ratio(nats, gained, resamples=300) == pytest.approx(expected)


def test_the_cost_ratio_of_the_data_is_the_papers_formula() -> None:
    # A pair that is scored on one side alone says nothing of a change.
    utility, safety = [([1, 1, 1, 0], [1, 0, 1, 0])], [([0, 0, 0, 1, 0], [1, 1, None, 1, 0])]
    found = bootstrap_cost_ratio(utility, safety)
    assert found.value == pytest.approx(
        utility_cost_ratio(utility_before=0.75, utility_after=0.5, safety_before=0.25, safety_after=0.75)
    )
    assert bootstrap_cost_ratio(safety, utility).value is None, "safety fell"
    assert bootstrap_cost_ratio([([None], [None])], safety) is None, "nothing scored"


def test_resamples_without_a_gain_are_ratios_without_bound() -> None:
    """Two safety prompts, of which one is gained: a quarter of the resamples gain nothing, half one, a quarter two."""
    certain_cost = [([1] * 50, [0] * 50)]
    found = bootstrap_cost_ratio(certain_cost, [([0, 1], [1, 1])])
    assert (found.value, found.low, found.high) == (2, 1, None)
    assert found.undefined_share == pytest.approx(0.25, abs=0.03)
    # As many lost as gained: no gain, and no ratio.
    assert bootstrap_cost_ratio(certain_cost, [([0, 1], [1, 0])]).value is None


UTILITY, SAFETY = [([1, 1, 1, 0], [1, 0, 1, 0])], [([0, 0, 0, 1], [1, 0, 0, 1])]


def test_resamples_are_drawn_by_the_seed() -> None:
    assert bootstrap_cost_ratio(UTILITY, SAFETY) == bootstrap_cost_ratio(UTILITY, SAFETY, resamples=4000, seed=0)
    single = [bootstrap_cost_ratio(UTILITY, SAFETY, resamples=1, seed=seed) for seed in range(20)]
    assert single == [bootstrap_cost_ratio(UTILITY, SAFETY, resamples=1, seed=seed) for seed in range(20)]
    # The value is that of the data, an interval of one resample is that resample.
    assert {found.value for found in single} == {1.0}
    assert {(found.low, found.high, found.undefined_share) for found in single} >= {
        (0, 0, 0),
        (2, 2, 0),
        (None, None, 1),
    }
    for found in (bootstrap_cost_ratio(UTILITY, SAFETY, resamples=7, seed=seed) for seed in range(20)):
        assert found.undefined_share * 7 == pytest.approx(round(found.undefined_share * 7))


@pytest.mark.parametrize("is_utility", [True, False])
def test_resamples_with_nothing_scored_do_not_count(is_utility: bool) -> None:
    """One scored example of three: almost a third of the resamples draw only the others."""
    full, sparse = [([1, 1], [0, 0])], [([1, None, None], [0, None, None])]
    utility, safety = (sparse, full) if is_utility else (full, sparse)
    gained = [(after, before) for before, after in safety]
    found = {bootstrap_cost_ratio(utility, gained, resamples=1, seed=seed) for seed in range(20)}
    assert found == {CostRatio(1.0), CostRatio(1.0, 1.0, 1.0, 0.0)}


def test_outcomes_that_are_no_pairs_are_refused() -> None:
    for utility, safety in (([([1, 0], [1])], SAFETY), (UTILITY, [([0, 1, 1], [1, 1])])):
        with pytest.raises(ValueError, match="zip"):
            bootstrap_cost_ratio(utility, safety)


def test_there_is_no_interval_where_a_suite_has_one_example() -> None:
    assert bootstrap_cost_ratio([([1], [0])], [([0], [1])]) == CostRatio(1.0)
    assert bootstrap_cost_ratio(UTILITY, [([0], [1])]).low is None
    assert bootstrap_cost_ratio([*UTILITY, ([1], [0])], SAFETY).high is None


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_has_no_mean(bad: float) -> None:
    with pytest.raises(ValueError, match="finite"):
        estimate([0.5, bad, None])
    with pytest.raises(ValueError, match="finite"):
        paired_difference([0.5, bad], [0.5, 1.0])


def test_there_is_no_interval_where_no_utility_outcome_changed() -> None:
    same = [([1, 0, 1, None], [1, 0, 1, 1])]
    assert bootstrap_cost_ratio(same, [([0, 0, 1], [1, 1, 1])]) == CostRatio(0.0)


def test_a_certain_ratio_has_an_interval_of_one_point() -> None:
    found = bootstrap_cost_ratio([([1] * 50, [0] * 50)], [([0] * 50, [1] * 50)])
    assert found == CostRatio(1.0, 1.0, 1.0, 0.0)
