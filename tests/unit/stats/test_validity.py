"""What a study is worth: against scipy, by brute force, by theorem, and how often intervals hold what is true."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import mpmath
import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st
from one_suite import compare

from castune.stats.comparisons import Outcomes, holm
from castune.stats.comparisons import compare as compare_suites
from castune.stats.correlations import fisher_interval, map_agreement, partial_correlation
from castune.stats.distributions import clopper_pearson, student_p, student_quantile
from castune.stats.estimates import utility_cost_ratio
from castune.stats.validity import Point, arm_means, predictive_validity

TABLE_7 = json.loads((Path(__file__).parents[2] / "data" / "published_table7.json").read_text())
ROWS: list[dict[str, Any]] = [dict(zip(TABLE_7["columns"], row, strict=True)) for row in TABLE_7["rows"]]
# Utility, safety and MMLU of the base models (Table 1).
BASE = {"Llama": (66.10, 67.22, 59.38), "Qwen": (76.89, 57.33, 68.63), "Mistral": (35.47, 50.11, 46.98)}
# Table 8, C: Pearson and Spearman with UCR, then with MMLU-CR.
TABLE_8 = {
    "Llama": ((0.95, 1.00), (0.99, 1.00)), "Qwen": ((0.73, 0.80), (1.00, 1.00)), "Mistral": ((0.95, 1.00), (0.94, 1.00)),
}  # fmt: skip


def study(scores: Any, cost_AT: Any, errors: float | None = None, control: float = 0) -> list[Point]:
    """Trials of arms (rows) under seeds (columns); a NaN is an undefined cost."""
    return [
        Point(
            arm=f"arm {a}",
            seed=t,
            score=float(score),
            control=control,
            cost=None if math.isnan(cost) else float(cost),
            cost_se=errors,
        )
        for a, score in enumerate(scores)
        for t, cost in enumerate(np.asarray(cost_AT, dtype=float)[a])
    ]


def within(share: float, expected: float, n: int) -> bool:
    """Whether a simulated share is the expected one, up to four of its standard errors."""
    return abs(share - expected) < 4 * math.sqrt(expected * (1 - expected) / n)


# -- distributions


@settings(max_examples=50, deadline=None)
@given(st.floats(-50, 50), st.floats(0.1, 1e6))
def test_students_tails_are_those_of_the_incomplete_beta_function(t: float, df: float) -> None:
    """By mpmath, to 30 digits."""
    with mpmath.workdps(30):
        expected = mpmath.betainc(mpmath.mpf(df) / 2, 0.5, 0, df / (df + mpmath.mpf(t) ** 2), regularized=True)
    assert student_p(t, df) == pytest.approx(float(expected), rel=1e-8, abs=1e-12)


@pytest.mark.parametrize("df", [0.5, 1, 2, 2.7, 9, 200, 1e6, 1e9])
def test_students_quantile_leaves_a_twentieth_outside(df: float) -> None:
    assert student_p(student_quantile(df), df) == pytest.approx(0.05, rel=1e-9)
    closed = {1: math.tan(0.475 * math.pi), 2: 0.95 * math.sqrt(2 / (1 - 0.95**2))}
    assert student_quantile(df) == pytest.approx(closed.get(df, student_quantile(df)), rel=1e-9)
    assert student_p(0.0, df) == 1
    assert student_p(math.inf, df) == 0


@pytest.mark.parametrize(("k", "n"), [(0, 1), (1, 1), (0, 20), (3, 20), (20, 20), (700, 2000)])
def test_exact_intervals_leave_a_fortieth_on_either_side(k: int, n: int) -> None:
    """By their definition: at either end so few or so many successes have a chance of 2.5 %, summed term by term."""
    low, high = clopper_pearson(k, n) or (math.nan, math.nan)

    def chance(rate: float, counts: range) -> float:
        ways = (math.lgamma(n + 1) - math.lgamma(i + 1) - math.lgamma(n - i + 1) for i in counts)
        logs = (w + i * math.log(rate) + (n - i) * math.log1p(-rate) for w, i in zip(ways, counts, strict=True))
        return math.fsum(map(math.exp, logs))

    assert low == 0 if k == 0 else chance(low, range(k, n + 1)) == pytest.approx(0.025, rel=1e-9)
    assert high == 1 if k == n else chance(high, range(k + 1)) == pytest.approx(0.025, rel=1e-9)


def test_an_exact_interval_of_nothing_is_none() -> None:
    assert clopper_pearson(0, 0) is None
    with pytest.raises(ValueError):
        clopper_pearson(3, 2)


# -- correlation of score and cost


@pytest.mark.parametrize("model", TABLE_8)
def test_table_8_by_the_study(model: str) -> None:
    utility, safety, mmlu = BASE[model]
    rows = [row for row in ROWS if (row["model"], row["score"]) == (model, "conflict")]
    for expected, base, column in zip(TABLE_8[model], (utility, mmlu), ("utility", "mmlu"), strict=True):
        costs = [
            utility_cost_ratio(
                utility_before=base, utility_after=row[column], safety_before=safety, safety_after=row["safety"]
            )
            for row in rows
        ]
        trials = [
            Point(arm=f"B_{row['bucket']}", seed=0, score=row["mean_score"], control=0, cost=cost)
            for row, cost in zip(rows, costs, strict=True)
        ]
        found = predictive_validity(trials)
        assert (found.of_means.pearson, found.of_means.spearman) == pytest.approx(expected, abs=0.03)
        assert found.of_means.pearson_p is not None
        assert found.of_means.pearson_p >= 1 / 24
        # One training: nothing tells what another one would show.
        assert found.retrained is None
        assert found.other_arms is not None


def test_four_buckets_do_not_show_a_relation_even_at_r_of_095() -> None:
    # 1.83 - 1.96 < 0: the paper's four buckets alone leave every sign open for others.
    found = fisher_interval(0.95, 4)
    assert found == pytest.approx((math.tanh(math.atanh(0.95) - 1.959964), math.tanh(math.atanh(0.95) + 1.959964)))
    assert found is not None
    assert found.holds(0)


def test_undefined_costs_are_left_out_and_counted() -> None:
    nan = math.nan
    found = predictive_validity(study([4, 3, 2, 1], [[4, 5, 6], [3, nan, 5], [nan, nan, nan], [1, 2, 3]]))
    assert (found.n_trials, found.n_undefined, found.n_arms) == (12, 4, 3)
    assert found.n_seeds == 3
    arms = arm_means(study([4, 3], [[4, 5, 6], [3, nan, 5]]))
    assert arms.cost_A.tolist() == [5, 4]


@pytest.mark.parametrize("n_arms", [0, 1, 2])
def test_few_arms_have_no_interval(n_arms: int) -> None:
    found = predictive_validity(study(range(n_arms), np.arange(3 * n_arms).reshape(n_arms, 3)))
    assert found.retrained is None
    assert found.other_arms is None
    assert (found.of_means.pearson is None) == (n_arms < 2)


def test_without_any_cost_nothing_is_said() -> None:
    found = predictive_validity(study([1, 2, 3, 4], np.full((4, 3), math.nan)))
    assert (found.of_means.pearson, found.retrained, found.other_arms) == (None, None, None)
    assert (found.n_undefined, found.n_arms, found.n_seeds) == (12, 0, 0)


@pytest.mark.parametrize("field", ["score", "control", "cost", "cost_se"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_trial_refuses_what_is_no_number(field: str, bad: float) -> None:
    with pytest.raises(ValueError, match=f"{field} of arm 'B_1', seed 3"):
        Point(**{"arm": "B_1", "seed": 3, "score": 1.0, "control": 1.0, "cost": 1.0, field: bad})


def test_an_arm_has_one_trial_a_seed() -> None:
    with pytest.raises(ValueError, match="two trials"):
        predictive_validity(study([1, 2], [[1, 2], [3, 4]]) * 2)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.01, 100), st.floats(-50, 50))
def test_a_unit_of_cost_changes_no_correlation(seed: int, scale: float, shift: float) -> None:
    cost_AT = np.random.default_rng(seed).normal(size=(5, 3))
    one = predictive_validity(study(range(5), cost_AT), draws=200)
    other = predictive_validity(study(range(5), cost_AT * scale + shift), draws=200)
    assert other.retrained == pytest.approx(one.retrained, abs=1e-6)
    assert other.other_arms == pytest.approx(one.other_arms, abs=1e-6)


@pytest.mark.parametrize("unit", [1e-200, 1e200])
def test_hostile_units_change_no_correlation(unit: float) -> None:
    cost_AT = np.random.default_rng(6).normal(size=(5, 3))
    one = predictive_validity(study(range(5), cost_AT), draws=200)
    other = predictive_validity(study(np.arange(5) * unit, cost_AT * unit), draws=200)
    assert one.retrained == pytest.approx(other.retrained, abs=1e-9)


def test_noiseless_costs_have_an_interval_of_one_point() -> None:
    found = predictive_validity(study([1, 2, 4, 8], np.repeat([[1.0], [3], [2], [5]], 3, axis=1)), draws=100)
    assert found.retrained == pytest.approx([found.of_means.pearson] * 2)


def test_what_a_seed_does_to_all_arms_alike_changes_nothing() -> None:
    cost_AT = np.random.default_rng(0).normal(size=(6, 3))
    one = predictive_validity(study(range(6), cost_AT), draws=500)
    other = predictive_validity(study(range(6), cost_AT + np.array([0, 50, -20])), draws=500)
    assert other.retrained == pytest.approx(one.retrained, abs=1e-9)


def test_ranks_are_invariant_under_monotone_transforms_of_the_scores() -> None:
    cost_AT = np.random.default_rng(3).normal(size=(6, 3))
    scores = np.array([0.2, 0.5, 0.6, 1.1, 1.3, 2.0])
    one, other = (predictive_validity(study(x, cost_AT), draws=200) for x in (scores, np.exp(scores)))
    assert (one.of_means.spearman, one.of_means.spearman_p) == (other.of_means.spearman, other.of_means.spearman_p)


def test_the_interval_holds_0_where_the_t_interval_of_the_slopes_does() -> None:
    rng, scores, agree, unlike = np.random.default_rng(5), np.arange(5.0), 0, set()
    for _ in range(30):
        cost_AT = rng.normal(size=(5, 3)) + 0.35 * scores[:, None]
        slopes = [np.polyfit(scores, costs, 1)[0] for costs in cost_AT.T]
        low, high = scipy.stats.t.interval(0.95, 2, np.mean(slopes), scipy.stats.sem(slopes))
        found = predictive_validity(study(scores, cost_AT), draws=2000).retrained
        assert found is not None
        agree += found.holds(0) == (low <= 0 <= high)
        unlike.add(low <= 0 <= high)
    assert unlike == {True, False}
    assert agree >= 28, "all but those that draws decide"


@pytest.mark.parametrize(("slope", "spread"), [(0.0, 0.0), (1.0, 1.0), (0.0, 2.0)])
def test_coverage_of_the_interval_over_seeds(slope: float, spread: float) -> None:
    """4 arms, 3 seeds. Without any relation 0 is the truth: the interval may exclude it in 5 % and not more."""
    rng, n, held = np.random.default_rng(7), 150, 0
    scores = np.array([1.2, 0.9, 0.7, 0.5])
    for _ in range(n):
        true_A = slope * scipy.stats.zscore(scores) + spread * rng.normal(size=4)
        truth = float(np.corrcoef(scores, true_A)[0, 1]) if np.ptp(true_A) else 0.0
        cost_AT = true_A[:, None] + rng.normal(size=3) + 0.5 * rng.normal(size=(4, 3))
        found = predictive_validity(study(scores, cost_AT), draws=300).retrained
        assert found is not None
        held += found.holds(truth)
    assert held / n > 0.95 - 4 * math.sqrt(0.95 * 0.05 / n)


def test_errors_of_examples_widen_the_interval() -> None:
    cost_AT = np.arange(6.0)[:, None] + np.random.default_rng(2).normal(size=(6, 3))
    narrow, wide = (predictive_validity(study(range(6), cost_AT, errors)) for errors in (None, 2.0))
    assert narrow.retrained is not None
    assert wide.retrained is not None
    assert wide.retrained.high - wide.retrained.low > narrow.retrained.high - narrow.retrained.low
    assert wide.counts_examples
    assert not narrow.counts_examples
    # With errors even one seed has an interval, of the examples alone.
    assert predictive_validity(study(range(6), cost_AT[:, :1], 2.0)).retrained is not None


@pytest.mark.parametrize("n", [4, 12])
def test_coverage_of_fishers_interval(n: int) -> None:
    rng, times, held = np.random.default_rng(11), 2000, 0
    for _ in range(times):
        x = rng.normal(size=n)
        r = float(np.corrcoef(x, 0.75 * x + rng.normal(size=n))[0, 1])
        found = fisher_interval(r, n)
        assert found is not None
        held += found.holds(0.6)
    assert held / times == pytest.approx(0.95, abs=0.025)


def test_too_few_pairs_have_no_interval() -> None:
    assert fisher_interval(None, 10) is None
    assert fisher_interval(0.5, 3) is None


# -- partial correlation


def partial_by_regression(x: Any, y: Any, z: Any) -> float:
    left = [np.asarray(v) - np.polyval(np.polyfit(z, v, 1), z) for v in (x, y)]
    return float(np.corrcoef(*left)[0, 1])


@pytest.mark.parametrize("n", [5, 6, 20])
def test_partial_correlation_is_that_of_residuals_and_the_textbook_formula(n: int) -> None:
    x, y, z = np.random.default_rng(n + 1).normal(size=(3, n))
    found = partial_correlation(x, y, z)
    assert found.pearson == pytest.approx(partial_by_regression(x, y, z))
    xy, xz, yz = (np.corrcoef(a, b)[0, 1] for a, b in ((x, y), (x, z), (y, z)))
    assert found.pearson == pytest.approx((xy - xz * yz) / math.sqrt((1 - xz**2) * (1 - yz**2)))
    ranks = [scipy.stats.rankdata(v) for v in (x, y, z)]
    assert found.spearman == pytest.approx(partial_by_regression(*ranks))


def test_freedman_lane_by_brute_force() -> None:
    x, y, z = np.random.default_rng(1).normal(size=(3, 5))
    fit = np.polyval(np.polyfit(z, y, 1), z)
    observed = abs(partial_by_regression(x, y, z))
    permuted = [abs(partial_by_regression(x, fit + (y - fit)[list(o)], z)) for o in itertools.permutations(range(5))]
    assert partial_correlation(x, y, z).pearson_p == np.mean(np.array(permuted) >= observed - 1e-9)


def test_a_depth_that_does_not_vary_controls_nothing() -> None:
    x, y = np.random.default_rng(4).normal(size=(2, 6))
    found, plain = partial_correlation(x, y, [3] * 6), predictive_validity(study(x, y[:, None]))
    assert found.pearson == pytest.approx(plain.of_means.pearson)
    assert found.pearson_p == pytest.approx(plain.of_means.pearson_p)
    assert found.pearson_interval == pytest.approx(plain.other_arms)


def test_a_score_that_is_the_depth_says_nothing_more() -> None:
    depth = np.array([1.0, 3, 4, 8, 11])
    found = partial_correlation(0.1 + 0.3 * depth, [1, 5, 2, 3, 4], depth)
    assert (found.pearson, found.pearson_p, found.pearson_interval) == (None, None, None)
    assert found.reason == "score or cost does not vary between arms of equal depth"


@pytest.mark.parametrize("n", [0, 1, 2, 3])
def test_few_arms_have_no_partial_correlation_and_it_says_how_few(n: int) -> None:
    found = partial_correlation(range(n), range(n), range(n))
    assert found.pearson is None
    assert found.reason is not None
    assert found.reason.startswith("1 arm with" if n == 1 else f"{n} arms with")


def test_partial_correlation_refuses() -> None:
    with pytest.raises(ValueError, match="finite"):
        partial_correlation([1, 2, math.nan, 4], [1, 2, 3, 4], [1, 2, 3, 4])
    with pytest.raises(ValueError, match="differ in number"):
        partial_correlation([1, 2], [1, 2, 3], [1, 2, 3])


def test_p_values_are_uniform_where_only_depth_matters() -> None:
    rng, n = np.random.default_rng(9), 200
    small = 0
    for _ in range(n):
        z = rng.normal(size=6)
        found = partial_correlation(z + rng.normal(size=6), 2 * z + rng.normal(size=6), z)
        assert found.pearson_p is not None
        small += found.pearson_p <= 0.2
    # Freedman and Lane's test is not exact, but nearly so.
    assert small / n == pytest.approx(0.2, abs=0.07)


# -- two arms


def crossed(rng: np.random.Generator, seeds: int, n: int, *, of_seed: float, of_example: float, rest: float) -> Any:
    values = (
        of_seed * rng.normal(size=(seeds, 1)) + of_example * rng.normal(size=n) + rest * rng.normal(size=(seeds, n))
    )
    return {t: row.tolist() for t, row in enumerate(values)}


def zeros(arm: Any) -> Any:
    return {seed: [0.0] * len(values) for seed, values in arm.items()}


def test_comparison_by_hand() -> None:
    first = {21: [1, 1, 0, None], 42: [1, 0, 0, 1]}
    second = {21: [0, 1, 0, 1], 42: [0, 0, 1, 1]}
    found = compare(first, second)
    assert (found.n_seeds, found.n_examples, found.n_unscored) == (2, 3, 1)
    assert found.value == pytest.approx(1 / 6)
    assert found.per_seed == pytest.approx({21: 1 / 3, 42: 0})
    assert found.over_seeds == pytest.approx(scipy.stats.t.interval(0.95, 1, 1 / 6, scipy.stats.sem([1 / 3, 0])))
    assert found.over_examples == pytest.approx(scipy.stats.t.interval(0.95, 2, 1 / 6, scipy.stats.sem([1, 0, -0.5])))
    assert found.wider == "seeds"


def test_comparison_is_antisymmetric() -> None:
    rng = np.random.default_rng(0)
    one, other = ({t: rng.integers(0, 2, 30).tolist() for t in range(3)} for _ in range(2))
    forth, back = compare(one, other), compare(other, one)
    assert forth.interval is not None
    assert back.interval is not None
    assert (back.value, back.interval.low, back.p) == pytest.approx((-forth.value, -forth.interval.high, forth.p))


def test_variance_by_two_way_analysis_of_variance() -> None:
    arm = crossed(np.random.default_rng(1), 4, 30, of_seed=1, of_example=1, rest=1)
    found, d = compare(arm, zeros(arm)), np.array(list(arm.values()))
    mean_squares = (
        30 * d.mean(1).var(ddof=1),
        4 * d.mean(0).var(ddof=1),
        ((d - d.mean(1, keepdims=True) - d.mean(0) + d.mean()) ** 2).sum() / (3 * 29),
    )
    variance = (mean_squares[0] + mean_squares[1] - mean_squares[2]) / 120
    assert found.interval is not None
    assert found.df is not None
    half = scipy.stats.t.ppf(0.975, found.df) * math.sqrt(variance)
    assert found.over_seeds is not None
    half = max(half, (found.over_seeds.high - found.over_seeds.low) / 2)
    assert found.interval == pytest.approx((d.mean() - half, d.mean() + half))


@pytest.mark.parametrize(("of_seed", "of_example", "rest"), [(0.3, 0.5, 1), (0, 0, 1), (0, 1, 0.3), (1, 0.3, 0.3)])
def test_coverage_of_a_comparison_over_three_seeds(of_seed: float, of_example: float, rest: float) -> None:
    rng, n, held = np.random.default_rng(2), 300, 0
    for _ in range(n):
        arm = crossed(rng, 3, 40, of_seed=of_seed, of_example=of_example, rest=rest)
        interval = compare(arm, zeros(arm)).interval
        assert interval is not None
        held += interval.holds(0)
    assert held / n > 0.95 - 4 * math.sqrt(0.95 * 0.05 / n)


def test_the_p_value_and_the_interval_agree() -> None:
    rng, unlike = np.random.default_rng(4), set()
    for _ in range(60):
        arm = crossed(rng, 3, 20, of_seed=0.1, of_example=0.5, rest=0.5)
        found = compare({t: [0.5 + v for v in row] for t, row in arm.items()}, zeros(arm))
        assert found.interval is not None
        assert found.p is not None
        assert found.interval.holds(0) == (found.p >= 0.05)
        unlike.add(found.p >= 0.05)
    assert unlike == {True, False}


def test_examples_alone_promise_too_much_where_seeds_differ() -> None:
    rng, n, held = np.random.default_rng(2), 150, 0
    for _ in range(n):
        arm = crossed(rng, 3, 200, of_seed=0.3, of_example=0.5, rest=1)
        interval = compare(arm, zeros(arm)).over_examples
        assert interval is not None
        held += interval.holds(0)
    assert held / n < 0.7


def test_comparison_of_little() -> None:
    one_seed = compare({1: [1, 0, 1]}, {1: [0, 0, 1]})
    assert (one_seed.interval, one_seed.over_seeds, one_seed.wider, one_seed.p) == (None, None, None, None)
    assert one_seed.over_examples is not None
    for empty in (compare({}, {}), compare({1: []}, {1: []}), compare({1: [None], 2: [1]}, {1: [1], 2: [1]})):
        assert (empty.value, empty.interval) == (None, None)
    same = compare({1: [1, 0], 2: [1, 0]}, {1: [1, 0], 2: [1, 0]})
    assert (same.value, same.interval, same.over_seeds, same.p) == (0, None, None, None)
    # Two examples could fall to one side by chance, however far.
    constant = compare({1: [1, 1], 2: [1, 1]}, {1: [0, 0], 2: [0, 0]})
    assert (constant.value, constant.p, constant.over_seeds) == (1, 0.5, None)
    assert constant.interval is not None
    assert constant.interval.holds(0)


def test_comparison_refuses() -> None:
    with pytest.raises(ValueError, match="different seeds"):
        compare({1: [1]}, {2: [1]})
    with pytest.raises(ValueError, match="examples of suite differ"):
        compare({1: [1, 0]}, {1: [1]})
    with pytest.raises(ValueError, match="suites differ"):
        compare_suites({1: {"one": {"a": 1}}}, {1: {"other": {"a": 1}}})
    with pytest.raises(ValueError, match="finite"):
        compare({1: [math.nan]}, {1: [1]})


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([]) == []
    assert holm([0.5, None, 0.9]) == [1.0, None, 1.0]
    with pytest.raises(ValueError):
        holm([1.2])


def test_suites_count_alike_whatever_their_size() -> None:
    rng = np.random.default_rng(0)
    large, small = rng.integers(-1, 2, (3, 400)).astype(float), rng.integers(-1, 2, (3, 20)).astype(float) + 0.5

    def arm(scale: float) -> Outcomes:
        return {
            seed: {
                name: {str(n): scale * value for n, value in enumerate(part[seed])}
                for name, part in (("large", large), ("small", small))
            }
            for seed in range(3)
        }

    found = compare_suites(arm(1), arm(0))
    assert found.value == pytest.approx((large.mean() + small.mean()) / 2)
    assert found.over_seeds == pytest.approx(
        scipy.stats.t.interval(0.95, 2, found.value, scipy.stats.sem((large.mean(1) + small.mean(1)) / 2))
    )
    # Welch's mean of two samples, each with half the weight.
    parts = [(scipy.stats.sem(part.mean(0)) / 2) ** 2 for part in (large, small)]
    df = sum(parts) ** 2 / (parts[0] ** 2 / 399 + parts[1] ** 2 / 19)
    assert found.over_examples == pytest.approx(scipy.stats.t.interval(0.95, df, found.value, math.sqrt(sum(parts))))
    assert (found.n_examples, found.n_unscored) == (420, 0)


def test_coverage_of_a_comparison_over_suites_of_different_size() -> None:
    rng, n, held = np.random.default_rng(6), 200, 0
    for _ in range(n):
        parts = {
            name: crossed(rng, 3, size, of_seed=0.2, of_example=0.5, rest=0.5) for name, size in (("a", 60), ("b", 15))
        }
        arm = {
            seed: {name: dict(zip(map(str, range(99)), part[seed], strict=False)) for name, part in parts.items()}
            for seed in range(3)
        }
        nothing = {seed: {name: dict.fromkeys(row, 0.0) for name, row in one.items()} for seed, one in arm.items()}
        interval = compare_suites(arm, nothing).interval
        assert interval is not None
        held += interval.holds(0)
    assert held / n > 0.95 - 4 * math.sqrt(0.95 * 0.05 / n)


def test_few_examples_that_differ_are_judged_by_their_signs() -> None:
    # 7 of 60 examples, all to one side and the same under every seed.
    one = {seed: [1.0] * 7 + [0.0] * 53 for seed in (1, 2, 3)}
    found = compare(one, zeros(one))
    assert found.p == pytest.approx(scipy.stats.binomtest(0, 7).pvalue)
    assert found.over_seeds is None
    assert found.wider == "examples"
    # Every example differs, and that is not taken for certain of all others.
    every = {seed: [1.0] * 60 for seed in (1, 2, 3)}
    certain = compare(every, zeros(every))
    assert certain.interval is not None
    assert 0.9 < certain.interval.low < 1
    assert certain.p is not None
    assert 0 < certain.p < 0.001


# -- agreement of maps


def test_agreement_is_scipys_and_blind_to_monotone_transforms() -> None:
    x = np.random.default_rng(0).normal(size=50)
    y = x + np.random.default_rng(1).normal(size=50)
    found = map_agreement(x, y, resamples=200)
    assert found.spearman == pytest.approx(scipy.stats.spearmanr(x, y).statistic)
    assert map_agreement(np.exp(x), y**3, resamples=200) == found
    assert found.interval is not None
    assert found.interval.holds(found.spearman)


def test_whole_layers_are_drawn_where_heads_of_a_layer_resemble() -> None:
    rng = np.random.default_rng(2)
    layers = np.repeat(np.arange(10), 9)
    x, y = (np.repeat(rng.normal(size=10), 9) + 0.1 * rng.normal(size=90) for _ in range(2))
    heads, grouped = map_agreement(x, y, resamples=300), map_agreement(x, y, layers=layers, resamples=300)
    assert heads.interval is not None
    assert grouped.interval is not None
    assert grouped.interval.high - grouped.interval.low > 1.5 * (heads.interval.high - heads.interval.low)


def test_coverage_of_the_agreement() -> None:
    rng, n, held = np.random.default_rng(5), 60, 0
    truth = 6 / math.pi * math.asin(0.6 / 2)
    for _ in range(n):
        x = rng.normal(size=80)
        found = map_agreement(x, 0.6 * x + 0.8 * rng.normal(size=80), resamples=100).interval
        assert found is not None
        held += found.holds(truth)
    assert held / n > 0.84


def test_agreement_of_little() -> None:
    assert map_agreement([], []).spearman is None
    assert map_agreement([1], [2]).spearman is None
    assert map_agreement([1, 1, 1], [1, 2, 3]).spearman is None
    assert map_agreement([1, 2], [1, 2]).interval is None
    with pytest.raises(ValueError, match="1 of 3 heads"):
        map_agreement([1, 2, math.nan], [1, 2, 3])
    with pytest.raises(ValueError, match="differ"):
        map_agreement([1, 2], [1, 2, 3])
