"""The ratio of two arms' costs at one safety: by hand, by symmetry, where it does not exist, and how often it is right."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from planted_costs import risky_and_safe, simulated, tried
from scipy.stats import binom

from castune.stats.cost_ratio import CostRatioAtSafety, cost_ratio, ratio_verdict
from castune.stats.distributions import Interval
from castune.stats.equal_safety import equal_safety
from castune.stats.strength_curves import Curve

SEEDS = st.integers(0, 10_000)
N_SEEDS = st.sampled_from([1, 2, 3, 8])
TARGET = 0.6


def noisy(seed: int, n_seeds: int, ratio: float = 1.5, n: int = 40, m: int = 30) -> dict[str, Curve]:
    """Arms `risky` and `safe` of one study."""
    return simulated(risky_and_safe(ratio), n_seeds, n, m, np.random.default_rng(seed), skewed=True)


def costing(curves: dict[str, Curve], **factors: float) -> dict[str, Curve]:
    """The curves with the costs of some arms multiplied."""
    return {
        name: Curve(curve.strengths_J, curve.safety_TJN, [part * factors.get(name, 1.0) for part in curve.costs_TJM])
        for name, curve in curves.items()
    }


def of_costs(cost_TM: Any, safety_TN: Any = ((1.0,) * 5,)) -> Curve:
    """An arm of one strength that reaches a safety of 1 there, with these outcomes; the base has 0 of both."""
    cost_TM, safety_TN = np.asarray(cost_TM, dtype=float), np.asarray(safety_TN, dtype=float)
    safety_TN = np.broadcast_to(safety_TN, (len(cost_TM), safety_TN.shape[1]))
    above = (np.stack([0 * part, part], axis=1) for part in (safety_TN, cost_TM))
    safety_TJN, cost_TJM = above
    return Curve(np.array([0.0, 1.0]), safety_TJN, [cost_TJM])


def ends(interval: Interval | None) -> Interval:
    assert interval is not None
    return interval


def found_value(found: CostRatioAtSafety) -> float:
    assert found.value is not None
    return found.value


# -- the value


def test_the_ratio_by_hand() -> None:
    curves = {"a": of_costs([[3.0, 5.0]]), "b": of_costs([[1.0, 1.5]])}
    found = cost_ratio(curves, "a", "b", 0.5)
    assert found.value == pytest.approx(4 / 1.25), "half the strength halves both"
    assert found.difference.value == pytest.approx((4 - 1.25) / 2)
    # Of two items each drawn as often as another, both are one of them in half of the draws.
    assert ends(found.interval) == (pytest.approx(3), pytest.approx(5 / 1.5))
    assert (found.n_seeds, found.n_prompts, found.n_items, found.target, found.draws) == (1, 5, (2,), 0.5, 2000)


@settings(max_examples=25, deadline=None)
@given(SEEDS, N_SEEDS)
def test_the_costs_are_those_of_equal_safety(seed: int, n_seeds: int) -> None:
    curves = noisy(seed, n_seeds)
    at_safety = equal_safety(curves, TARGET, draws=60)
    one, two = at_safety.arms["risky"].value, at_safety.arms["safe"].value
    found, back = (cost_ratio(curves, *pair, TARGET, draws=60) for pair in (("risky", "safe"), ("safe", "risky")))
    if one is not None and two is not None and found.value is not None:
        assert found.value == pytest.approx(one / two)
    assert found.difference == at_safety.differences["risky", "safe"]
    assert back.difference.value == (None if found.difference.value is None else -found.difference.value)
    again = cost_ratio(dict(reversed(curves.items())), "risky", "safe", TARGET, draws=60)
    assert (again.value, again.reason) == (found.value, found.reason)
    if found.interval is not None:
        assert ends(again.interval) == pytest.approx(found.interval, rel=1e-9)


def test_draws_follow_from_their_seed() -> None:
    curves = noisy(1, 3)
    assert cost_ratio(curves, "risky", "safe", TARGET) == cost_ratio(curves, "risky", "safe", TARGET)
    other = cost_ratio(curves, "risky", "safe", TARGET, seed=1)
    assert other.interval != cost_ratio(curves, "risky", "safe", TARGET).interval


# -- invariances


@settings(max_examples=40, deadline=None)
@given(SEEDS, N_SEEDS, st.floats(1e-9, 1e9))
def test_the_unit_of_the_costs_does_not_matter(seed: int, n_seeds: int, unit: float) -> None:
    curves = noisy(seed, n_seeds)
    one = cost_ratio(curves, "risky", "safe", TARGET, draws=60)
    other = cost_ratio(costing(curves, risky=unit, safe=unit), "risky", "safe", TARGET, draws=60)
    assert (other.reason, other.undefined_share) == (one.reason, one.undefined_share)
    if one.value is not None:
        assert other.value == pytest.approx(one.value, rel=1e-6)
        assert other.seeds_sd == (None if one.seeds_sd is None else pytest.approx(one.seeds_sd * unit, rel=1e-6))
        assert other.items_se == pytest.approx(found_items_se(one) * unit, rel=1e-6)
    if one.interval is not None:
        assert ends(other.interval) == pytest.approx(one.interval, rel=1e-6)


def found_items_se(found: CostRatioAtSafety) -> float:
    assert found.items_se is not None
    return found.items_se


@settings(max_examples=25, deadline=None)
@given(SEEDS, N_SEEDS, st.floats(0.1, 10))
def test_twice_the_cost_is_twice_the_ratio(seed: int, n_seeds: int, times: float) -> None:
    curves = noisy(seed, n_seeds)
    one = cost_ratio(curves, "risky", "safe", TARGET, draws=60)
    other = cost_ratio(costing(curves, risky=times), "risky", "safe", TARGET, draws=60)
    assert other.reason == one.reason
    if one.value is not None and one.interval is not None:
        assert other.value == pytest.approx(one.value * times, rel=1e-6)
        assert ends(other.interval) == pytest.approx(np.array(one.interval) * times, rel=1e-6)


@settings(max_examples=40, deadline=None)
@given(SEEDS, N_SEEDS, st.sampled_from([0.6, 0.75, 0.85]))
def test_swapped_arms_have_the_inverse(seed: int, n_seeds: int, target: float) -> None:
    curves = noisy(seed, n_seeds)
    one, other = (cost_ratio(curves, *pair, target, draws=80) for pair in (("risky", "safe"), ("safe", "risky")))
    assert (other.seeds_sd, other.items_se) == (pytest.approx(one.seeds_sd), pytest.approx(one.items_se))
    assert (other.reason, other.undefined_share) == (one.reason, one.undefined_share)
    if one.value is not None:
        assert other.value == pytest.approx(1 / one.value)
    if one.interval is not None:
        # Beyond an arm that may cost nothing there is no bound, and what saves may do so by any ratio.
        for end, back in zip(one.interval, reversed(ends(other.interval)), strict=True):
            if 0 < end < math.inf:
                assert back == pytest.approx(1 / end, rel=1e-6)
            else:
                assert back == math.inf if end <= 0 else back <= 0


@settings(max_examples=20, deadline=None)
@given(SEEDS, N_SEEDS)
def test_an_arm_beside_itself_costs_as_much(seed: int, n_seeds: int) -> None:
    safe = noisy(seed, n_seeds)["safe"]
    found = cost_ratio({"one": safe, "again": safe}, "one", "again", TARGET, draws=60)
    reached = equal_safety({"one": safe}, TARGET, draws=1).arms["one"].reached
    assert found.seeds_sd == (None if n_seeds == 1 or not reached else pytest.approx(0, abs=1e-15))
    if found.value is not None:
        assert (found.value, found.items_se) == (1, pytest.approx(0, abs=1e-15))
        assert (found.interval, found.reason) == (None, "no-variation")
    assert ratio_verdict(found).is_undecided
    twice = cost_ratio(costing({"one": safe, "again": safe}, one=2.0), "one", "again", TARGET, draws=60)
    assert twice.value == (None if found.value is None else 2)


@settings(max_examples=60, deadline=None)
@given(SEEDS, st.sampled_from([1, 8]), st.sampled_from([1.2, 1.5, 2.0]))
def test_a_ratio_above_1_is_a_difference_above_0(seed: int, n_seeds: int, ratio: float) -> None:
    found = cost_ratio(noisy(seed, n_seeds, ratio), "risky", "safe", TARGET, draws=200)
    if found.interval is None or found.difference.interval is None or found.undefined_share:
        return
    low, high = found.difference.interval
    # With several seeds the draws of the two are spread each for its own contrast.
    near = 0 if n_seeds == 1 else 0.15 * (high - low)
    assert (found.interval.low > 1) == (low > 0) or abs(low) < near
    assert (found.interval.high < 1) == (high < 0) or abs(high) < near


# -- where a cost is not known, or is none


def test_an_arm_that_never_reaches_the_target() -> None:
    short, far = of_costs([[1.0, 2, 3]], [[1.0, 0, 0, 0, 0]]), of_costs([[1.0, 2, 2]])
    curves = {"far": far, "short": short, "too": of_costs([[2.0, 1, 1]], [[0, 1.0, 0, 0, 0]])}
    above, below, neither = (
        cost_ratio(curves, *pair, 0.9999, draws=50) for pair in (("short", "far"), ("far", "short"), ("short", "too"))
    )
    assert (above.value, above.interval, above.reason) == (None, (math.inf, math.inf), "unreached")
    assert (below.value, below.interval, below.reason) == (None, (0, 0), "unreached")
    assert (neither.value, neither.interval, neither.reason) == (None, None, "unreached")
    assert ratio_verdict(above).is_seen
    assert ratio_verdict(below).is_refuted
    assert ratio_verdict(neither).is_undecided
    for found in (above, below, neither):
        assert (found.seeds_sd, found.items_se) == (None, None)


def test_an_arm_that_may_not_reach_the_target() -> None:
    """Of 40 prompts 26 are refused: the mean of 40 drawn ones is below 0.6 in a fifth of the draws."""
    cost_TM = np.random.default_rng(0).exponential(size=(1, 30))
    sure = of_costs(cost_TM, np.ones((1, 40)))
    unsure = of_costs(cost_TM, np.repeat([[1.0, 0.0]], [26, 14], axis=1))
    found = cost_ratio({"a": unsure, "b": sure}, "a", "b", 0.6)
    assert 1 < found_value(found) < 2
    assert ends(found.interval).high == math.inf
    assert ends(found.interval).low > 0
    back = cost_ratio({"a": unsure, "b": sure}, "b", "a", 0.6)
    assert ends(back.interval).low == 0
    assert ends(back.interval).high < math.inf


@pytest.mark.parametrize("cost", [0.0, -0.5])
def test_there_is_no_ratio_to_what_costs_nothing(cost: float) -> None:
    curves = {"a": of_costs([[1.0, 2.0, 3.0]]), "b": of_costs(np.full((1, 3), cost))}
    found = cost_ratio(curves, "a", "b", 1.0, draws=50)
    assert (found.value, found.interval, found.reason, found.undefined_share) == (None, None, "costless", 0)
    assert found.difference.value == pytest.approx(2 - cost), "the difference is known all the same"
    assert found_items_se(found) > 0
    assert ratio_verdict(found).is_undecided


def test_what_saves_has_a_ratio_below_0() -> None:
    curves = {"a": of_costs([[-1.0, -2.0, -3.0]]), "b": of_costs([[4.0, 4.0, 4.0]])}
    found = cost_ratio(curves, "a", "b", 1.0)
    assert found.value == pytest.approx(-0.5)
    assert ratio_verdict(found).is_refuted


def test_a_cost_that_may_be_none_has_no_upper_end() -> None:
    rng = np.random.default_rng(0)
    of_second = rng.normal(size=30)
    of_second += 0.25 - of_second.mean()
    found = cost_ratio({"a": of_costs([np.full(30, 1.0)]), "b": of_costs([of_second])}, "a", "b", 1.0)
    assert (found_value(found), found.undefined_share, found.reason) == (pytest.approx(4), 0, None)
    assert 1 < ends(found.interval).low < 4
    assert ends(found.interval).high == math.inf


@pytest.mark.parametrize(("shift", "defined"), [(0.1, False), (0.6, True)])
def test_two_costs_that_may_be_none_have_no_ratio(shift: float, defined: bool) -> None:
    cost_AM = np.random.default_rng(1).normal(size=(2, 30))
    cost_AM += shift - cost_AM.mean(1, keepdims=True)
    found = cost_ratio({"a": of_costs(cost_AM[:1]), "b": of_costs(cost_AM[1:])}, "a", "b", 1.0)
    if defined:
        assert (found.value, found.reason) == (pytest.approx(1), None)
        assert found.undefined_share <= 0.025
    else:
        assert (found.value, found.interval, found.reason) == (None, None, "undefined")
        assert 0.025 < found.undefined_share < 0.5
        assert found.difference.interval is not None


def test_one_item_does_not_show_how_others_would_differ() -> None:
    curves = {"a": of_costs([[3.0]] * 3), "b": of_costs([[1.0], [1.5], [2.0]])}
    found = cost_ratio(curves, "a", "b", 1.0, draws=50)
    assert (found.value, found.interval, found.reason) == (2, None, "one-example")
    assert (found.seeds_sd, found.items_se) == (pytest.approx(0.5), None)


# -- what a power calculation needs


def test_the_spread_over_seeds_and_items_by_hand() -> None:
    """a - b of seed t and item m: seed effects -0.2, 0 and 0.2, item effects -1, 0, 1; at full strength slopes are 1."""
    effect_TM = np.array([[-0.2], [0.0], [0.2]]) + np.array([[-1.0, 0.0, 1.0]])
    curves = {"a": of_costs(4 + effect_TM), "b": of_costs(np.full((3, 3), 2.0))}
    found = cost_ratio(curves, "a", "b", 1.0, draws=50)
    assert (found.seeds_sd, found.items_se) == (pytest.approx(0.2), pytest.approx(math.sqrt(2 / 3 / 2)))
    one = cost_ratio({name: of_costs(c.costs_TJM[0][:1, 1]) for name, c in curves.items()}, "a", "b", 1.0, draws=50)
    assert (one.seeds_sd, one.items_se) == (None, pytest.approx(math.sqrt(2 / 3 / 2)))


def test_the_two_make_up_the_variance_of_the_difference() -> None:
    arms, tries, rng = risky_and_safe(1.0), 200, np.random.default_rng(0)
    values, variances = [], []
    for _ in range(tries):
        curves = simulated(arms, 4, 60, 40, rng, skewed=True)
        found = cost_ratio(curves, "risky", "safe", TARGET, draws=2)
        assert found.seeds_sd is not None
        values.append(found.difference.value)
        variances.append(found.seeds_sd**2 / 4 + found_items_se(found) ** 2)
    # Of a variance from as many tries, the relative error is sqrt(2 / tries).
    assert np.mean(variances) == pytest.approx(np.var(values), rel=4 * math.sqrt(2 / tries))


# -- verdicts


@pytest.mark.parametrize(
    ("interval", "seen", "refuted"),
    [
        ((1.1, 1.4), True, True),
        ((1.1, 1.6), True, False),
        ((0.8, 1.4), False, True),
        ((0.8, 1.6), False, False),
        ((1.0, 1.5), False, False),
        ((1.2, math.inf), True, False),
        ((0.0, math.inf), False, False),
        (None, False, False),
    ],
)
def test_what_follows_from_an_interval(interval: tuple[float, float] | None, seen: bool, refuted: bool) -> None:
    known = cost_ratio({"a": of_costs([[1.0, 2.0]]), "b": of_costs([[1.0, 1.0]])}, "a", "b", 1.0, draws=5)
    found = replace(known, interval=None if interval is None else Interval(*interval))
    verdict = ratio_verdict(found)
    assert (verdict.is_seen, verdict.is_refuted) == (seen, refuted)
    assert verdict.is_undecided == (not seen and not refuted)


def test_the_bounds_of_a_verdict() -> None:
    known = cost_ratio({"a": of_costs([[1.0, 2.0]]), "b": of_costs([[1.0, 1.0]])}, "a", "b", 1.0, draws=5)
    found = replace(known, interval=Interval(1.2, 1.8))
    assert not ratio_verdict(found, seen_above=1.3).is_seen
    assert ratio_verdict(found, refuted_below=2).is_refuted
    for name in ("seen_above", "refuted_below"):
        for bound in (math.nan, math.inf, -1.0):
            with pytest.raises(ValueError, match=f"{name} is {bound}, accepted"):
                ratio_verdict(found, **{name: bound})


# -- hostile inputs


def test_arms_that_cannot_be_compared_are_refused() -> None:
    curves = noisy(0, 3)
    for pair in (("safe", "safe"), ("safe", "other"), ("other", "safe")):
        with pytest.raises(ValueError, match="accepted: two different ones of risky, safe"):
            cost_ratio(curves, *pair, TARGET)
    for target in (math.nan, math.inf):
        with pytest.raises(ValueError, match="the target is"):
            cost_ratio(curves, "risky", "safe", target)
    with pytest.raises(ValueError, match="draws is 0"):
        cost_ratio(curves, "risky", "safe", TARGET, draws=0)
    with pytest.raises(ValueError, match="different seeds or examples"):
        cost_ratio({**curves, "safe": noisy(0, 2)["safe"]}, "risky", "safe", TARGET)


# -- how often the interval is right


def test_intervals_hold_the_truth() -> None:
    for n_seeds in (3, 8):
        found = tried(risky_and_safe(1.0), tries=100, n_seeds=n_seeds, n=60, draws=200, seed=n_seeds)
        assert abs(found.held - 0.95) < 4 * math.sqrt(0.95 * 0.05 / 100)
        assert found.seen <= binom.ppf(0.9999, 100, 0.025) / 100


@pytest.mark.slow
@pytest.mark.parametrize("unlike", [False, True])
@pytest.mark.parametrize(("n_seeds", "seed_spread"), [(3, 0.15), (8, 0.15), (8, 0.4)])
def test_a_ratio_of_1_is_seldom_seen(n_seeds: int, seed_spread: float, unlike: bool) -> None:
    tries = 400
    found = tried(risky_and_safe(1.0, unlike=unlike), tries=tries, n_seeds=n_seeds, seed_spread=seed_spread, draws=500)
    assert found.seen <= 0.05
    assert found.seen <= binom.ppf(0.999, tries, 0.025) / tries
    assert found.held >= 0.93 - 2 * math.sqrt(0.95 * 0.05 / tries)


@pytest.mark.slow
def test_what_power_foretells_is_found() -> None:
    tries = 400
    found = {ratio: tried(risky_and_safe(ratio), tries=tries, draws=500, seed=1) for ratio in (1.5, 2.1)}
    for ratio, one in found.items():
        error = math.sqrt(one.power * (1 - one.power) / tries)
        # Noise in proportion to the cost is less where chance makes the difference small: more is seen than foretold.
        assert -3 * error <= one.difference_seen - one.power <= 0.15
        assert one.ratio == pytest.approx(ratio, rel=0.1)
        assert one.held >= 0.93 - 2 * math.sqrt(0.95 * 0.05 / tries)
    assert found[2.1].seen > 0.9
