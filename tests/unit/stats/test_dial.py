"""One adapter over its strength: by hand, against scipy, and where a target is not reached."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.interpolate import PchipInterpolator
from scipy.optimize import brentq
from scipy.special import expit

from castune.stats.dial import StrengthCurves
from castune.stats.equal_safety import Curve, equal_safety

Floats = NDArray[np.float64]
STRENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5)
SEEDS = st.integers(0, 10_000)


def of_means(strengths: Any = STRENGTHS, **means: Any) -> StrengthCurves:
    """Curves without noise: every one of four examples has the mean."""
    outcomes = {name: [np.tile(np.asarray(mean, dtype=float)[:, None], 4)] for name, mean in means.items()}
    return StrengthCurves.of(strengths, outcomes, draws=20)


def rates(n: int, *shares: float) -> Floats:
    """Outcomes of n prompts of which these shares are refused, the same ones first."""
    return np.array([np.arange(n) < round(share * n) for share in shares], dtype=float)


# -- the strength


@pytest.mark.parametrize("place", range(1, len(STRENGTHS)))
def test_a_target_that_was_measured_has_the_measured_strength(place: int) -> None:
    safety = [0.2, 0.3, 0.5, 0.8, 0.9, 0.95, 0.97]
    found = of_means(safety=safety).reach("safety", safety[place])
    assert found.strength == pytest.approx(STRENGTHS[place], abs=1e-9)
    assert found.between == (STRENGTHS[place - 1], STRENGTHS[place])
    assert found.rises
    assert found.interval is None, "no example differs from another"
    assert found.reached_share == 1


@settings(max_examples=60, deadline=None)
@given(SEEDS, st.floats(0.01, 0.99), st.booleans())
def test_in_between_it_is_where_scipys_curve_meets_the_target(seed: int, share: float, falls: bool) -> None:
    rng = np.random.default_rng(seed)
    strengths = np.concatenate([[0], np.cumsum(rng.uniform(0.05, 0.4, size=rng.integers(1, 7)))])
    means = np.cumsum(rng.uniform(0.05, 1, size=len(strengths))) * (-1 if falls else 1)
    target = means[0] + share * (means[-1] - means[0])
    found = of_means(strengths, nll=means).reach("nll", target)
    expected = brentq(lambda x: PchipInterpolator(strengths, means)(x) - target, 0, strengths[-1], xtol=1e-14)
    assert found.strength == pytest.approx(expected, abs=1e-7)
    assert found.rises is not falls
    assert found.between is not None
    assert found.between[0] - 1e-7 <= expected <= found.between[1] + 1e-7


@settings(max_examples=30, deadline=None)
@given(SEEDS)
def test_it_is_the_strength_of_equal_safety_where_safety_never_falls(seed: int) -> None:
    """The report and the dial say the same of one arm; so do the intervals of its strength and its cost's ends."""
    rng = np.random.default_rng(seed)
    refused = np.sort(rng.random((5, 40)) < np.linspace(0.2, 0.9, 5)[:, None], axis=0).astype(float)
    nll = np.sort(rng.normal(2, 0.5, size=(5, 30)), axis=0)
    curves = StrengthCurves.of(STRENGTHS[:5], {"safety": [refused], "nll": [nll]}, draws=50)
    target = float(np.quantile(refused.mean(1), 0.6))
    arm = equal_safety({"a": Curve(np.array(STRENGTHS[:5]), refused[None], [nll[None]])}, target, draws=2).arms["a"]
    found = curves.reach("safety", target)
    assert found.strength is not None
    assert found.strength == pytest.approx(arm.strength, abs=1e-9)
    assert curves.at(found.strength)["nll"].change.value == pytest.approx(arm.value, abs=1e-9)


def test_a_target_that_is_never_reached_has_no_strength() -> None:
    found = of_means(safety=[0.2, 0.3, 0.4, 0.5, 0.55, 0.6, 0.6]).reach("safety", 0.9)
    assert (found.strength, found.between, found.reached_share) == (None, None, 0)
    assert found.extreme == (1.25, 0.6), "the smallest strength that does as much"
    below = of_means(utility=[0.6, 0.62, 0.6, 0.6, 0.61, 0.6, 0.6]).reach("utility", 0.5)
    assert (below.strength, below.rises, below.extreme) == (None, False, (0, 0.6))


def test_what_the_base_has_needs_no_strength() -> None:
    curves = of_means(safety=[0.5, 0.3, 0.4, 0.5, 0.6, 0.6, 0.6])
    assert curves.reach("safety", 0.5).strength == 0


def test_an_adapter_that_breaks_at_high_strengths_is_read_off_before() -> None:
    """Refusals rise, and fall again where the model no longer writes sentences."""
    safety = [0.2, 0.5, 0.8, 0.95, 0.9, 0.6, 0.1]
    curves = of_means(safety=safety)
    assert curves.reach("safety", 0.95).strength == pytest.approx(0.75)
    assert curves.reach("safety", 0.8).strength == pytest.approx(0.5)
    assert curves.reach("safety", 0.96).strength is None
    assert curves.reach("safety", 0.96).extreme == (0.75, 0.95)


def test_a_rise_that_is_taken_back_on_the_way_does_not_count() -> None:
    curves = of_means(safety=[0.2, 0.7, 0.5, 0.6, 0.9, 0.9, 0.9])
    # 0.7, 0.5 and 0.6 are one level of 0.6: the closest curve that never falls.
    assert curves.reach("safety", 0.6).strength == pytest.approx(0.25)
    strength = curves.reach("safety", 0.65).strength
    assert strength is not None
    assert 0.75 < strength < 1


@settings(max_examples=40, deadline=None)
@given(SEEDS, st.floats(-1, 2))
def test_it_is_reached_if_and_only_if_a_measured_mean_reaches_it(seed: int, target: float) -> None:
    means = np.random.default_rng(seed).random(len(STRENGTHS))
    found = of_means(safety=means).reach("safety", target)
    reached = (means >= target).any() if target >= means[0] else (means <= target).any()
    assert (found.strength is not None) == reached


# -- levels and intervals


def test_levels_are_means_and_paired_changes() -> None:
    outcomes = rates(10, 0.2, 0.5)
    short = np.array([[1.0, 3.0], [2.0, 6.0]])
    curves = StrengthCurves.of((0, 1), {"safety": [outcomes], "nll": [short, np.array([[0.0], [10.0]])]}, draws=500)
    base, full = curves.levels("safety")
    assert (base.mean.value, full.mean.value) == (pytest.approx(0.2), pytest.approx(0.5))
    assert (base.change.value, base.change.interval) == (0, None)
    assert full.change.value == pytest.approx(0.3)
    # Changes of 3 of 10 prompts, drawn again: between 0 and 0.6 in 95 of 100 draws.
    assert full.change.interval is not None
    assert full.change.interval.low == pytest.approx(0.1, abs=0.11)
    assert full.change.interval.high == pytest.approx(0.6, abs=0.11)
    # Suites count alike, however long they are.
    assert curves.levels("nll")[1].change.value == pytest.approx((2 + 10) / 2)
    assert curves.measures["nll"].n == 3


def test_examples_that_are_not_scored_everywhere_are_left_out() -> None:
    outcomes = rates(10, 0.2, 0.5)
    outcomes[1, 0] = np.nan
    measure = StrengthCurves.of((0, 1), {"safety": [outcomes]}, draws=5).measures["safety"]
    assert (measure.n, measure.unscored) == (9, 1)
    assert measure.mean_J == pytest.approx([1 / 9, 4 / 9])


def test_in_between_levels_are_interpolated_and_beyond_refused() -> None:
    curves = of_means(nll=np.square(STRENGTHS))
    expected = float(PchipInterpolator(STRENGTHS, np.square(STRENGTHS))(0.6))
    assert curves.at(0.6)["nll"].mean.value == pytest.approx(expected)
    for strength in (-0.1, 1.6, float("nan")):
        with pytest.raises(ValueError, match=r"accepted: 0 to 1\.5"):
            curves.at(strength)


def test_the_level_at_the_strength_is_the_target_where_the_curve_never_falls() -> None:
    safety = [0.2, 0.3, 0.5, 0.8, 0.9, 0.85, 0.2]
    curves = of_means(safety=safety)
    for target in (0.25, 0.6, 0.88):
        strength = curves.reach("safety", target).strength
        assert strength is not None
        assert curves.at(strength)["safety"].mean.value == pytest.approx(target, abs=1e-9)


def test_draws_that_do_not_get_there_leave_the_strength_unbounded() -> None:
    curves = StrengthCurves.of((0, 0.5, 1), {"safety": [rates(50, 0.2, 0.6, 0.9)]}, draws=400)
    found = curves.reach("safety", 0.9)
    assert found.strength == pytest.approx(1)
    assert 0.3 < found.reached_share < 0.8
    assert found.interval is not None
    assert found.interval.high == math.inf
    assert found.interval.low < 1


def test_the_same_seed_draws_the_same() -> None:
    outcomes = {"safety": [rates(30, 0.2, 0.5, 0.8)]}
    one, two = (StrengthCurves.of((0, 0.5, 1), outcomes, draws=100) for _ in range(2))
    assert one.reach("safety", 0.6) == two.reach("safety", 0.6)
    other = StrengthCurves.of((0, 0.5, 1), outcomes, draws=100, seed=1)
    assert other.reach("safety", 0.6).strength == one.reach("safety", 0.6).strength
    assert other.reach("safety", 0.6).interval != one.reach("safety", 0.6).interval


def test_intervals_hold_the_true_strength() -> None:
    """120 tries with 80 prompts of a logistic curve that falls again: nominally 95 %, in longer runs 94 to 98 %."""

    def truth(x: Any) -> Any:
        rising = 0.2 + 0.75 * (expit((np.minimum(x, 1) - 0.45) / 0.15) - expit(-3)) / (expit(0.55 / 0.15) - expit(-3))
        return np.where(np.asarray(x) > 1, rising - 0.8 * (np.asarray(x) - 1), rising)

    target, rng, held = 0.75, np.random.default_rng(4), 0
    true = brentq(lambda x: float(truth(x)) - target, 0, 1)
    for attempt in range(120):
        threshold = np.where(rng.random((7, 80)) < 0.3, rng.random((7, 80)), rng.random(80))
        refused = (threshold < truth(np.array(STRENGTHS))[:, None]).astype(float)
        found = StrengthCurves.of(STRENGTHS, {"safety": [refused]}, draws=300, seed=attempt).reach("safety", target)
        held += found.interval is not None and found.interval.holds(true)
    assert 107 <= held <= 120  # below 107 of 120: once in 1,000 at 95 %


# -- bad input


@pytest.mark.parametrize(
    ("strengths", "outcomes", "said"),
    [
        ((0.5, 1), {"a": [np.zeros((2, 3))]}, "accepted: 0"),
        ((0,), {"a": [np.zeros((1, 3))]}, "accepted: 0"),
        ((0, 1, 1), {"a": [np.zeros((3, 3))]}, "rising"),
        ((0, math.nan), {"a": [np.zeros((2, 3))]}, "accepted: 0"),
        ((0, 1), {}, "no outcomes"),
        ((0, 1), {"a": []}, "no outcomes"),
        ((0, 1), {"a": [np.zeros((3, 3))]}, r"a has the shape \(3, 3\), accepted: \[2 strengths, examples\]"),
        ((0, 1), {"a": [np.array([[np.nan, 1], [1, np.nan]])]}, "no example is scored"),
    ],
)
def test_what_is_no_curve_is_refused(strengths: Any, outcomes: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        StrengthCurves.of(strengths, outcomes)


def test_a_target_and_draws_must_be_numbers() -> None:
    with pytest.raises(ValueError, match="accepted: a finite number"):
        of_means(safety=np.linspace(0, 1, 7)).reach("safety", math.inf)
    with pytest.raises(ValueError, match="draws is 0"):
        StrengthCurves.of((0, 1), {"a": [np.zeros((2, 3))]}, draws=0)


# -- strengths that are left out


def test_a_curve_without_a_strength_is_that_of_the_others() -> None:
    outcomes, unscored = rates(40, 0.2, 0.5, 0.8), np.full((1, 40), np.nan)
    whole = StrengthCurves.of((0, 0.5, 1), {"safety": [outcomes]}, draws=100)
    with_silent = np.concatenate([outcomes[:2], unscored, outcomes[2:], unscored])
    found = StrengthCurves.of(
        (0, 0.5, 0.75, 1, 2), {"safety": [with_silent]}, left_out={"safety": [0.75, 2]}, draws=100
    )
    assert found.strengths_J.tolist() == [0, 0.5, 0.75, 1, 2]
    assert found.measures["safety"].left_out == (0.75, 2)
    assert (found.measures["safety"].n, found.measures["safety"].unscored) == (40, 0)
    expected = whole.levels("safety")
    assert found.levels("safety") == [*expected[:2], None, expected[2], None]
    reached = found.reach("safety", 0.7)
    assert reached.left_out == (0.75, 2)
    assert replace(reached, left_out=()) == whole.reach("safety", 0.7)


def test_where_a_measure_is_left_out_the_others_are_told() -> None:
    curves = {"safety": [rates(20, 0.2, 0.5, 0.8)], "nll": [rates(20, 0.1, 0.3, 0.9)]}
    found = StrengthCurves.of((0, 1, 2), curves, left_out={"safety": [2]}, draws=20)
    assert list(found.at(1)) == ["safety", "nll"]
    for strength in (1.5, 2):  # nothing is known between a strength and one that is left out at the end
        assert list(found.at(strength)) == ["nll"]
    inner = StrengthCurves.of((0, 1, 2), curves, left_out={"safety": [1]}, draws=20)
    assert list(inner.at(1)) == ["nll"]
    assert list(inner.at(2)) == ["safety", "nll"]


@pytest.mark.parametrize("left_out", [(0,), (1,), (0, 1), (1, 5)])
def test_a_curve_needs_the_base_and_a_strength(left_out: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="the base and one strength above are needed"):
        StrengthCurves.of((0, 1), {"a": [np.zeros((2, 3))]}, left_out={"a": left_out})
