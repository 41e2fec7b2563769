"""Costs at equal safety: by theorem, by hand, against scipy, and how often intervals hold what is true."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from planted_costs import SHIFT_SD, STRENGTHS, Population, simulated
from scipy.interpolate import PchipInterpolator
from scipy.optimize import brentq, isotonic_regression
from scipy.special import expit
from scipy.stats import binom

from castune.stats.distributions import Interval, student_quantile
from castune.stats.equal_safety import Curve, common_target, cost_bands, equal_safety

SEEDS = st.integers(0, 10_000)


def measured(seed: int, n_arms: int = 2, n_seeds: int = 1, n: int = 20, m: int = 30) -> dict[str, Curve]:
    """Arms `a`, `b`, ... with noisy outcomes and one base."""
    rng, arms = np.random.default_rng(seed), {}
    base_N, base_M = rng.random(n) < 0.2, rng.normal(2, 0.5, size=m)
    for name in "abc"[:n_arms]:
        safety = rng.random((n_seeds, 5, n)) < np.linspace(0.2, rng.uniform(0.6, 1), 5)[:, None]
        cost = base_M + STRENGTHS[:, None] ** 2 * rng.normal(rng.uniform(0.1, 0.5), 0.3, size=(n_seeds, 1, m))
        safety[:, 0], cost[:, 0] = base_N, base_M
        arms[name] = Curve(STRENGTHS, safety, [cost])
    return arms


def of_means(safety: Any, cost: Any, strengths: Any = STRENGTHS, n: int = 2) -> Curve:
    """A curve without noise: every example has the means."""
    return Curve(strengths, np.tile(np.asarray(safety, dtype=float)[None, :, None], n),
                 [np.tile(np.asarray(cost, dtype=float)[None, :, None], n)])  # fmt: skip


def changed(curves: dict[str, Curve], safety: Any = None, cost: Any = None) -> dict[str, Curve]:
    """The curves with functions applied to their outcomes."""
    return {
        name: Curve(
            curve.strengths_J,
            curve.safety_TJN if safety is None else safety(curve.safety_TJN),
            curve.costs_TJM if cost is None else [cost(part) for part in curve.costs_TJM],
        )
        for name, curve in curves.items()
    }


def ends(interval: Interval | None) -> Interval:
    assert interval is not None
    return interval


# -- the value


@settings(max_examples=60, deadline=None)
@given(SEEDS, st.floats(0.05, 0.99))
def test_the_cost_is_where_scipys_curves_meet_the_target(seed: int, share: float) -> None:
    rng = np.random.default_rng(seed)
    strengths = np.concatenate([[0], np.cumsum(rng.uniform(0.05, 0.4, size=rng.integers(1, 7)))])
    safety, cost = rng.normal(size=len(strengths)), rng.normal(size=len(strengths))
    fitted = isotonic_regression(safety).x
    target = fitted[0] + share * (fitted[-1] - fitted[0])
    found = equal_safety({"a": of_means(safety, cost, strengths)}, target, draws=2).arms["a"]
    if fitted[-1] - fitted[0] < 1e-9:
        assert found.strength == 0
        return
    strength = brentq(lambda x: PchipInterpolator(strengths, fitted)(x) - target, 0, strengths[-1], xtol=1e-14)
    assert found.strength == pytest.approx(strength, abs=1e-7)
    assert found.value == pytest.approx(PchipInterpolator(strengths, cost)(strength) - cost[0], abs=1e-6)
    assert found.between is not None
    assert found.between[0] <= strength + 1e-7
    assert found.between[1] >= strength - 1e-7
    assert found.between in list(itertools.pairwise(strengths))


def test_two_strengths_by_hand() -> None:
    found = equal_safety({"a": of_means([0.2, 1.0], [3.0, 3.5], [0, 1])}, 0.6, draws=2).arms["a"]
    assert (found.strength, found.value) == (pytest.approx(0.5), pytest.approx(0.25))


@pytest.mark.parametrize("place", range(1, 5))
def test_a_target_that_was_measured_has_the_measured_cost(place: int) -> None:
    cost = [1.0, 1.03, 1.3, 1.2, 2.0]
    safety = [0.2, 0.25, 0.5, 0.8, 0.95]
    found = equal_safety({"a": of_means(safety, cost)}, safety[place], draws=2).arms["a"]
    assert found.value == pytest.approx(cost[place] - 1, abs=1e-9)
    assert found.strength == pytest.approx(STRENGTHS[place], abs=1e-9)


def test_smooth_curves_are_met_within_the_error_of_their_interpolation() -> None:
    safety = 0.2 + 0.7 * (expit((STRENGTHS - 0.45) / 0.15) - expit(-3)) / (expit(0.55 / 0.15) - expit(-3))
    found = equal_safety({"a": of_means(safety, 0.15 * STRENGTHS**2)}, 0.7, draws=2).arms["a"]
    inner = 0.5 / 0.7 * (expit(0.55 / 0.15) - expit(-3)) + expit(-3)
    true = 0.45 + 0.15 * math.log(inner / (1 - inner))
    assert found.value == pytest.approx(0.15 * true**2, rel=0.03)


def test_a_target_that_the_base_reaches_costs_nothing() -> None:
    for target in (0.2, 0.1, -5):
        found = equal_safety({"a": of_means([0.2, 0.5], [1, 2], [0, 1])}, target, draws=2).arms["a"]
        assert (found.value, found.strength, found.between) == (0, 0, (0, 1))


def test_of_a_flat_stretch_the_weakest_adapter_counts() -> None:
    found = equal_safety({"a": of_means([0.2, 0.6, 0.6, 0.6, 0.9], [0, 1, 2, 3, 4])}, 0.6, draws=2).arms["a"]
    assert (found.strength, found.value) == (pytest.approx(0.25), pytest.approx(1))
    dipped = equal_safety({"a": of_means([0.2, 0.7, 0.5, 0.6, 0.9], [0, 1, 2, 3, 4])}, 0.6, draws=2).arms["a"]
    assert dipped.strength == pytest.approx(0.25), "0.7, 0.5 and 0.6 are one level of 0.6"


# -- invariances


@settings(max_examples=25, deadline=None)
@given(SEEDS, st.sampled_from([1, 3]))
def test_equal_arms_cost_the_same(seed: int, n_seeds: int) -> None:
    curves = measured(seed, 2, n_seeds)
    found = equal_safety({"a": curves["a"], "b": curves["b"], "again": curves["a"]}, 0.5, draws=50)
    assert found.arms["again"].value == found.arms["a"].value
    assert ends(found.arms["again"].interval) == pytest.approx(ends(found.arms["a"].interval), rel=1e-9)
    same = found.differences["a", "again"]
    assert same.interval is None, "no draw tells them apart"
    assert (same.value, same.is_seen) == (0 if found.arms["a"].reached else None, False)
    assert same.both_share + same.neither_share == pytest.approx(1), "never one alone"


@settings(max_examples=25, deadline=None)
@given(SEEDS, st.sampled_from([1, 3]), st.floats(1e-9, 1e9), st.floats(-10, 10))
def test_units_of_cost_and_safety_change_nothing_else(seed: int, n_seeds: int, unit: float, shift: float) -> None:
    curves = measured(seed, 2, n_seeds)
    one = equal_safety(curves, 0.51, draws=60)
    scaled = changed(curves, cost=lambda part: part * unit)
    other = equal_safety(changed(scaled, safety=lambda part: 3 * part + shift), 3 * 0.51 + shift, draws=60)
    pairs = [(one.arms[name], other.arms[name]) for name in curves]
    for first, second in [*pairs, (one.differences["a", "b"], other.differences["a", "b"])]:
        assert (first.value is None) == (second.value is None)
        if first.value is not None and second.value is not None:
            assert second.value == pytest.approx(unit * first.value, rel=1e-6, abs=1e-9 * unit)
        assert ends(second.interval) == pytest.approx(tuple(unit * np.array(ends(first.interval))), rel=1e-6)
    assert [arm.reached_share for arm in other.arms.values()] == [arm.reached_share for arm in one.arms.values()]


@settings(max_examples=25, deadline=None)
@given(SEEDS, st.sampled_from([1, 3]))
def test_the_order_of_examples_and_arms_changes_nothing(seed: int, n_seeds: int) -> None:
    curves = measured(seed, 3, n_seeds)
    rng = np.random.default_rng(seed)
    prompts, items = rng.permutation(20), rng.permutation(30)
    one = equal_safety(curves, 0.5, draws=60)
    shuffled = changed(curves, lambda part: part[:, :, prompts], lambda part: part[:, :, items])
    for name, arm in equal_safety(shuffled, 0.5, draws=60).arms.items():
        assert arm.value == (None if one.arms[name].value is None else pytest.approx(one.arms[name].value))
    turned = equal_safety(dict(reversed(curves.items())), 0.5, draws=60)
    assert list(turned.arms) == ["c", "b", "a"]
    alone = {name: equal_safety({name: curve}, 0.5, draws=60).arms[name] for name, curve in curves.items()}
    for name, arm in one.arms.items():
        for other in (turned.arms[name], alone[name]):
            assert (other.value, other.strength, other.reached_share) == (arm.value, arm.strength, arm.reached_share)
            assert ends(other.interval) == pytest.approx(ends(arm.interval), rel=1e-9, abs=1e-12)
    for (first, second), difference in one.differences.items():
        back = turned.differences[second, first]
        assert back.value == (None if difference.value is None else -difference.value)
        low, high = ends(difference.interval)
        assert ends(back.interval) == pytest.approx((-high, -low), rel=1e-9, abs=1e-12)


def test_draws_follow_from_their_seed() -> None:
    curves = measured(1, 2, 3)
    assert equal_safety(curves, 0.5, draws=300) == equal_safety(curves, 0.5, draws=300)
    assert equal_safety(curves, 0.5, draws=300).arms != equal_safety(curves, 0.5, draws=300, seed=1).arms


def test_examples_without_a_score_are_left_out_everywhere() -> None:
    curves = measured(5, 2, 3)
    holes = {name: Curve(c.strengths_J, c.safety_TJN.copy(), [c.costs_TJM[0].copy()]) for name, c in curves.items()}
    holes["a"].safety_TJN[2, 4, 19] = np.nan
    holes["b"].costs_TJM[0][0, 1, 29] = np.nan
    for curve in holes.values():
        curve.costs_TJM[0][:, 0, 28] = np.nan
    fewer = changed(curves, lambda part: part[:, :, :19], lambda part: part[:, :, :28])
    found, expected = equal_safety(holes, 0.5, draws=50), equal_safety(fewer, 0.5, draws=50)
    assert (found.n_prompts, found.unscored_prompts, found.n_items, found.unscored_items) == (19, 1, (28,), (2,))
    assert (expected.n_prompts, expected.unscored_prompts, expected.n_seeds, expected.draws) == (19, 0, 3, 50)
    assert (found.arms, found.differences) == (expected.arms, expected.differences)


def test_suites_count_alike_whatever_their_size() -> None:
    safety = np.tile(np.array([0.0, 1.0])[None, :, None], 5)
    few, many = np.zeros((1, 2, 3)), np.zeros((1, 2, 300))
    few[:, 1], many[:, 1] = 2.0, 1.0
    found = equal_safety({"a": Curve([0, 1], safety, [few, many])}, 1.0, draws=20)  # type: ignore[arg-type]
    assert found.arms["a"].value == pytest.approx(1.5)
    assert found.n_items == (3, 300)


# -- intervals where they are known


def test_the_interval_of_a_mean_of_items() -> None:
    rng, m = np.random.default_rng(0), 400
    costs = np.stack([np.zeros(m), rng.normal(0.15, 0.15, size=m)])[None]
    curve = Curve([0, 1], np.tile(np.array([0.0, 1.0])[None, :, None], 5), [costs])  # type: ignore[arg-type]
    low, high = ends(equal_safety({"a": curve}, 1.0, draws=20_000).arms["a"].interval)
    half = 1.96 * costs[0, 1].std() / math.sqrt(m)
    assert (low, high) == (pytest.approx(costs[0, 1].mean() - half, abs=0.03 * half),
                           pytest.approx(costs[0, 1].mean() + half, abs=0.03 * half))  # fmt: skip


@pytest.mark.parametrize("n_seeds", [2, 3, 5])
def test_where_only_seeds_differ_the_interval_is_students(n_seeds: int) -> None:
    of_seeds = np.random.default_rng(n_seeds).normal(1, 0.2, size=n_seeds)
    costs = np.zeros((n_seeds, 2, 10))
    costs[:, 1] = of_seeds[:, None]
    curve = Curve([0, 1], np.tile(np.array([0.0, 1.0])[:, None], (n_seeds, 1, 5)), [costs])  # type: ignore[arg-type]
    low, high = ends(equal_safety({"a": curve}, 1.0, draws=20_000).arms["a"].interval)
    half = student_quantile(n_seeds - 1) * of_seeds.std(ddof=1) / math.sqrt(n_seeds)
    assert (low, high) == (pytest.approx(of_seeds.mean() - half, abs=0.03 * half),
                           pytest.approx(of_seeds.mean() + half, abs=0.03 * half))  # fmt: skip


def test_differences_are_paired() -> None:
    rng, m = np.random.default_rng(3), 200
    shared = rng.normal(0.5, 1, size=m)
    curves = {
        name: Curve(
            [0, 1], np.tile(np.array([0.0, 1.0])[None, :, None], 5), [np.stack([0 * shared, shared + more])[None]]
        )  # type: ignore[arg-type]
        for name, more in (("a", 0.1 + rng.normal(0, 0.01, size=m)), ("b", np.zeros(m)))
    }
    found = equal_safety(curves, 1.0)
    low, high = ends(found.differences["a", "b"].interval)
    assert found.differences["a", "b"].is_seen
    assert 0.09 < low < high < 0.11
    assert found.arms["a"].interval != found.arms["b"].interval
    assert ends(found.arms["b"].interval).high - ends(found.arms["b"].interval).low > 0.2


def test_the_share_of_draws_that_reach_is_binomial() -> None:
    n, refused, target = 40, 26, 0.6
    safety = np.zeros((1, 2, n))
    safety[0, 1, :refused] = 1
    curve = Curve([0, 1], safety, [np.tile(np.array([0.0, 1.0])[None, :, None], 5)])  # type: ignore[arg-type]
    found = equal_safety({"a": curve}, target, draws=20_000).arms["a"]
    expected = binom.sf(math.ceil(target * n) - 1, n, refused / n)
    assert found.reached
    assert abs(found.reached_share - expected) < 4 * math.sqrt(expected * (1 - expected) / 20_000)
    assert ends(found.interval).high == math.inf
    # Of a straight line: the strength that reaches the target is target over the drawn rate.
    assert ends(found.interval).low == pytest.approx(target / (binom.ppf(0.975, n, refused / n) / n), rel=0.05)


@pytest.mark.parametrize("n_seeds", [1, 3])
def test_what_does_not_occur_has_no_interval(n_seeds: int) -> None:
    curve = Curve(STRENGTHS, np.tile(np.linspace(0, 1, 5)[:, None], (n_seeds, 1, 8)), [np.zeros((n_seeds, 5, 9))])
    found = equal_safety({"a": curve}, 0.5, draws=50).arms["a"]
    assert (found.value, found.interval, found.reached_share) == (0, None, 1)
    one_item = measured(0, 1, n_seeds, m=1)
    assert equal_safety(one_item, 0.5, draws=50).arms["a"].interval is None
    band = cost_bands(one_item, points=3, draws=50)["a"]
    assert np.isnan([band.low_G, band.high_G]).all()
    assert np.isfinite(band.cost_G).all()


# -- arms that do not get there


def test_an_arm_that_never_reaches_the_target_has_no_cost() -> None:
    curves = {"far": of_means([0.2, 0.9], [0, 1], [0, 1]), "short": of_means([0.2, 0.5], [0, 1], [0, 1])}
    found = equal_safety({**curves, "too": curves["short"]}, 0.8, draws=40)
    short = found.arms["short"]
    assert (short.value, short.strength, short.between, short.reached, short.reached_share) == (
        None,
        None,
        None,
        False,
        0,
    )
    assert short.interval == (math.inf, math.inf)
    assert found.arms["far"].reached
    one, none = found.differences["far", "short"], found.differences["short", "too"]
    assert (one.value, one.interval, one.both_share, one.neither_share) == (None, (-math.inf, -math.inf), 0, 0)
    assert one.is_seen, "which arm is cheaper is known, though not by how much"
    assert (none.value, none.interval, none.both_share, none.neither_share) == (None, None, 0, 1)


@pytest.mark.parametrize("n_seeds", [1, 3])
def test_an_arm_that_may_not_reach_it_has_no_upper_end(n_seeds: int) -> None:
    curves = measured(2, 2, n_seeds, n=60)
    highest = {name: isotonic_regression(curve.safety_TJN.mean((0, 2))).x[-1] for name, curve in curves.items()}
    name = min(highest, key=lambda arm: highest[arm])
    found = equal_safety(curves, highest[name] - 0.01)
    assert 0.5 < found.arms[name].reached_share < 0.9
    assert found.arms[name].reached
    low, high = ends(found.arms[name].interval)
    assert 0 < low < ends(found.arms[name].interval).high == high == math.inf
    beyond = equal_safety(curves, highest[name] + 0.01).arms[name]
    assert (beyond.reached, beyond.value) == (False, None)
    assert 0.1 < beyond.reached_share < 0.5
    assert math.isfinite(ends(beyond.interval).low)


def test_no_difference_is_claimed_where_neither_arm_gets_there() -> None:
    """Of the few draws in which the first arm does, all say that it is cheaper."""
    safety = np.zeros((1, 2, 40))
    safety[0, 1, :17] = 1
    costs = [np.tile(np.array([0.0, 1.0])[None, :, None], 5)]
    curves = {"first": Curve([0, 1], safety, costs), "second": Curve([0, 1], 0 * safety, costs)}  # type: ignore[arg-type]
    found = equal_safety(curves, 0.5)
    assert 0.05 < found.arms["first"].reached_share < 0.4
    assert found.differences["first", "second"].neither_share == 1 - found.arms["first"].reached_share
    assert not found.differences["first", "second"].is_seen


# -- the common target


def test_the_common_target_by_hand() -> None:
    curves = {"a": of_means([0.2, 0.5, 0.7], [0, 1, 2], [0, 0.5, 1]), "b": of_means([0.2, 0.9], [0, 1], [0, 1])}
    assert common_target(curves) == pytest.approx(0.2 + 0.8 * 0.5)
    assert common_target({"b": curves["b"]}) == pytest.approx(0.2 + 0.8 * 0.7)
    # 0.9 and 0.5 are one level of 0.7.
    assert common_target({"a": of_means([0.2, 0.9, 0.5], [0, 1, 2], [0, 0.5, 1])}) == pytest.approx(0.6)
    cheaper = changed(curves, cost=lambda part: part * 7)
    assert common_target(cheaper) == common_target(curves)


@pytest.mark.parametrize("safety", [[0.2, 0.2], [0.2, 0.1], [0.2, 0.1, 0.2]])
def test_no_gain_no_target(safety: list[float]) -> None:
    strengths = np.linspace(0, 1, len(safety))
    assert (
        common_target({"a": of_means(safety, [0, *safety[1:]], strengths), "b": of_means([0.2, 0.9], [0, 1], [0, 1])})
        is None
    )


# -- bands


@pytest.mark.parametrize("n_seeds", [1, 3])
def test_a_band_is_the_intervals_of_its_safeties(n_seeds: int) -> None:
    curves = measured(4, 2, n_seeds)
    bands = cost_bands(curves, points=6, draws=80, seed=3)
    assert list(bands) == ["a", "b"]
    for name, band in bands.items():
        fitted = isotonic_regression(curves[name].safety_TJN.mean((0, 2))).x
        assert band.safety_G == pytest.approx(np.linspace(fitted[0], fitted[-1], 6))
        assert (band.cost_G[0], len(band.cost_G)) == (0, 6)
        for safety, cost, low, high in zip(band.safety_G, band.cost_G, band.low_G, band.high_G, strict=True):
            found = equal_safety(curves, safety, draws=80, seed=3).arms[name]
            assert found.value == cost
            assert found.interval == (low, high)
        assert band.high_G[-1] == math.inf


# -- hostile inputs


@pytest.mark.parametrize(
    ("strengths", "safety", "costs", "message"),
    [
        ([0.1, 1], np.zeros((1, 2, 3)), [np.zeros((1, 2, 3))], "strengths are"),
        ([0], np.zeros((1, 1, 3)), [np.zeros((1, 1, 3))], "at least one above"),
        ([], np.zeros((1, 0, 3)), [np.zeros((1, 0, 3))], "strengths are"),
        ([0, 1, 1], np.zeros((1, 3, 3)), [np.zeros((1, 3, 3))], "above the one before"),
        ([0, 1, 0.5], np.zeros((1, 3, 3)), [np.zeros((1, 3, 3))], "above the one before"),
        ([0, math.inf], np.zeros((1, 2, 3)), [np.zeros((1, 2, 3))], "finite"),
        ([0, math.nan], np.zeros((1, 2, 3)), [np.zeros((1, 2, 3))], "finite"),
        ([[0, 1]], np.zeros((1, 2, 3)), [np.zeros((1, 2, 3))], "strengths are"),
        ([0, 1], np.zeros((2, 3)), [np.zeros((1, 2, 3))], "safety has the shape"),
        ([0, 1], np.zeros((1, 3, 3)), [np.zeros((1, 2, 3))], "safety has the shape"),
        ([0, 1], np.zeros((1, 2, 0)), [np.zeros((1, 2, 3))], "at least one example"),
        ([0, 1], np.zeros((0, 2, 3)), [np.zeros((0, 2, 3))], "safety has the shape"),
        ([0, 1], np.zeros((1, 2, 3)), [], "no cost suite"),
        ([0, 1], np.zeros((1, 2, 3)), np.zeros((1, 2, 3)), "cost suite 0 has the shape"),
        ([0, 1], np.zeros((1, 2, 3)), [np.zeros((1, 2, 3)), np.zeros((2, 2, 3))], "cost suite 1 has the shape"),
        ([0, 1], np.full((1, 2, 3), math.inf), [np.zeros((1, 2, 3))], "safety has an infinite"),
        ([0, 1], np.zeros((1, 2, 3)), [np.full((1, 2, 3), -math.inf)], "cost suite 0 has an infinite"),
    ],
)  # fmt: skip
def test_curves_that_are_none_are_refused(strengths: Any, safety: Any, costs: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Curve(strengths, safety, costs)


def test_arms_that_cannot_be_compared_are_refused() -> None:
    curves = measured(0)
    a, b = curves["a"], curves["b"]
    unscored = np.full_like(a.costs_TJM[0], math.nan)
    cases = {
        "no arm": {},
        "safety: arms have different seeds": {"a": a, "b": measured(0, 2, 3)["b"]},
        "safety: arms have different seeds or examples": {"a": a, "b": measured(0, 2, n=21)["b"]},
        "cost suite 0: arms have different": {"a": a, "b": Curve(STRENGTHS, b.safety_TJN, [b.costs_TJM[0][:, :, 1:]])},
        "different numbers of cost suites": {"a": a, "b": Curve(STRENGTHS, b.safety_TJN, [*b.costs_TJM] * 2)},
        "safety: outcomes at strength 0 differ": {"a": a, "b": Curve(STRENGTHS, 1 - b.safety_TJN, b.costs_TJM)},
        "cost suite 0: outcomes at strength 0 differ": {
            "a": a,
            "b": Curve(STRENGTHS, b.safety_TJN, [b.costs_TJM[0][:, :, ::-1]]),
        },
        "cost suite 0: no example is scored": {"a": Curve(STRENGTHS, a.safety_TJN, [unscored])},
        "safety: no example is scored": {"a": Curve(STRENGTHS, np.full_like(a.safety_TJN, math.nan), a.costs_TJM)},
    }
    for message, given_curves in cases.items():
        for call in (common_target, cost_bands, lambda these: equal_safety(these, 0.5)):
            with pytest.raises(ValueError, match=message):
                call(given_curves)  # type: ignore[operator]
    for target in (math.nan, math.inf):
        with pytest.raises(ValueError, match="the target is"):
            equal_safety(curves, target)
    for points in (1, 0, -1):
        with pytest.raises(ValueError, match="points is"):
            cost_bands(curves, points=points)
    for draws in (0, -1):
        with pytest.raises(ValueError, match="draws is"):
            equal_safety(curves, 0.5, draws=draws)


@pytest.mark.parametrize("scale", [1e15, 1e-15])
def test_margins_of_any_size(scale: float) -> None:
    curves = changed(measured(7, 2, 3), lambda part: part * scale)
    target = common_target(curves)
    expected = equal_safety(measured(7, 2, 3), common_target(measured(7, 2, 3)) or 0.0, draws=50)
    assert target is not None
    found = equal_safety(curves, target, draws=50)
    for name, arm in expected.arms.items():
        assert found.arms[name].value == pytest.approx(arm.value)
        assert ends(found.arms[name].interval) == pytest.approx(ends(arm.interval))


# -- how often intervals hold what is true


def held(
    arms: dict[str, Population],
    n_seeds: int,
    n: int,
    m: int,
    *,
    target: float | None,
    skewed: bool = False,
    tries: int,
    draws: int,
) -> dict[str, float]:
    """How often the intervals of both arms and of their difference hold the truth; `reached`: the second arm does."""
    rng, found = np.random.default_rng(n + m + n_seeds), []
    names = list(arms)
    for seed in range(tries):
        curves = simulated(arms, n_seeds, n, m, rng, skewed=skewed)
        goal = common_target(curves) if target is None else target
        assert goal is not None
        true = [arm.cost(goal, SHIFT_SD * (n_seeds > 1)) for arm in arms.values()]
        result = equal_safety(curves, goal, draws=draws, seed=seed)
        holds = [ends(result.arms[name].interval).holds(cost) for name, cost in zip(names, true, strict=True)]
        difference = result.differences[names[0], names[1]]
        holds += [ends(difference.interval).holds(true[0] - true[1]), result.arms[names[1]].reached]
        found.append(holds)
    return dict(zip((*names, "difference", "reached"), np.mean(found, axis=0).tolist(), strict=True))


COMMON = {"first": Population(0.9), "second": Population(0.95, middle=0.35, full=0.12, power=1.5)}
PARTLY = {"first": Population(0.9), "second": Population(0.78, full=0.1)}
NEVER = {"first": Population(0.9), "second": Population(0.5, full=0.1)}
CASES: dict[str, dict[str, Any]] = {
    "common": {"arms": COMMON, "target": 0.76},
    "skewed": {"arms": COMMON, "target": 0.76, "skewed": True},
    "partly": {"arms": PARTLY, "target": 0.75},
    "never": {"arms": NEVER, "target": 0.75},
    "target of the data": {"arms": PARTLY, "target": None},
}


def test_intervals_hold_the_truth() -> None:
    for n_seeds in (1, 3):
        shares = held(COMMON, n_seeds, 60, 100, target=0.76, tries=150, draws=200)
        for share in (shares["first"], shares["second"], shares["difference"]):
            assert abs(share - 0.95) < 4 * math.sqrt(0.95 * 0.05 / 150)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("n_seeds", "n", "m"), [(1, 60, 100), (1, 120, 300), (3, 60, 100), (3, 120, 300)])
def test_intervals_hold_the_truth_in_many_cases(case: str, n_seeds: int, n: int, m: int) -> None:
    tries = 400
    shares = held(**CASES[case], n_seeds=n_seeds, n=n, m=m, tries=tries, draws=400)
    error = math.sqrt(0.05 * 0.95 / tries)
    # An infinite cost is never below the lower end.
    most = 1.0 if case == "never" else 0.97 + 2 * error
    assert 0.93 - 2 * error <= shares["first"] <= 0.97 + 2 * error
    assert 0.93 - 2 * error <= shares["second"] <= most
    assert 0.93 - 2 * error <= shares["difference"] <= most
    if case in ("partly", "never"):
        assert shares["reached"] < 0.95
