"""The predicted cost of every budget: by theorem, by hand, and how often bands hold what is true."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from castune.stats.cost_curve import cost_curve, predicted_cost, standard_errors

SCORES = st.lists(st.floats(0.01, 5), min_size=1, max_size=40)
# Table 7, Llama: mean C of the four quarters from the lowest.
QUARTERS = [0.47, 0.67, 0.88, 1.27]


@settings(max_examples=60, deadline=None)
@given(SCORES)
def test_a_curve_is_a_lorenz_curve(scores: list[float]) -> None:
    curve = cost_curve(scores)
    assert (curve.cost_K[0], curve.cost_K[-1]) == (0, pytest.approx(1))
    assert (np.diff(curve.cost_K, 2) >= -1e-12).all(), "convex: every further head costs at least as much"
    assert (curve.cost_K <= np.linspace(0, 1, len(scores) + 1) + 1e-12).all()
    assert sorted(curve.order_H) == list(range(len(scores)))
    assert (curve.low_K, curve.high_K, curve.reliability) == (None, None, None)


@settings(max_examples=60, deadline=None)
@given(SCORES)
def test_the_elbow_is_where_heads_begin_to_cost_more_than_the_mean(scores: list[float]) -> None:
    elbow = cost_curve(scores).elbow
    if np.ptp(scores) < 1e-9:
        return
    assert elbow is not None
    assert (
        np.sum(np.array(scores) < np.mean(scores) - 1e-9) <= elbow <= np.sum(np.array(scores) <= np.mean(scores) + 1e-9)
    )


@settings(max_examples=30, deadline=None)
@given(SCORES, st.floats(0.01, 100))
def test_a_unit_of_score_changes_nothing(scores: list[float], unit: float) -> None:
    errors = [0.1] * len(scores)
    one, other = (
        cost_curve(scores, errors, draws=50),
        cost_curve(np.multiply(scores, unit), np.multiply(errors, unit), draws=50),
    )
    assert other.cost_K == pytest.approx(one.cost_K)
    assert other.low_K == pytest.approx(one.low_K)


def test_the_curve_of_four_quarters_by_hand() -> None:
    curve = cost_curve([1.27, 0.47, 0.88, 0.67])
    assert curve.order_H.tolist() == [1, 3, 2, 0]
    assert curve.cost_K == pytest.approx(np.cumsum([0, *QUARTERS]) / 3.29)
    assert curve.elbow == 2


def test_equal_heads_have_no_elbow() -> None:
    assert cost_curve([2.0] * 7).elbow is None
    assert cost_curve([2.0]).elbow is None


def test_noise_alone_has_no_elbow_though_its_curve_bends() -> None:
    rng, found, n = np.random.default_rng(0), 0, 60
    for seed in range(n):
        curve = cost_curve(1 + 0.2 * rng.normal(size=100), [0.2] * 100, draws=200, seed=seed)
        assert curve.measured_K[50] < 0.45, "it does bend"
        found += curve.elbow is not None
    assert found / n < 0.05 + 4 * math.sqrt(0.05 * 0.95 / n)
    real = cost_curve(np.abs(1 + 0.5 * rng.normal(size=100)), [0.1] * 100)
    assert real.elbow is not None


def test_the_lowest_scores_are_too_low_and_the_band_knows() -> None:
    rng, n, held, raw, error = np.random.default_rng(1), 100, 0, [], []
    for seed in range(n):
        true_H = np.maximum(0, 1 + 0.25 * rng.normal(size=120))
        measured_H = np.maximum(0, true_H + 0.25 * rng.normal(size=120))
        curve = cost_curve(measured_H, [0.25] * 120, draws=200, seed=seed)
        truth = true_H[curve.order_H[:30]].sum() / true_H.sum()
        assert curve.low_K is not None
        assert curve.high_K is not None
        held += curve.low_K[30] <= truth <= curve.high_K[30]
        raw.append(curve.measured_K[30] - truth)
        error.append(curve.cost_K[30] - truth)
    assert held / n > 0.95 - 4 * math.sqrt(0.95 * 0.05 / n)
    assert np.mean(raw) < -0.03
    assert abs(np.mean(error)) < 0.01


def test_the_band_holds_for_skewed_scores_with_unequal_errors() -> None:
    rng, n, held = np.random.default_rng(4), 60, 0
    for seed in range(n):
        true_H, error_H = rng.lognormal(-0.2, 0.4, size=150), 0.1 + 0.3 * rng.random(150)
        curve = cost_curve(np.maximum(0, true_H + error_H * rng.normal(size=150)), error_H, draws=200, seed=seed)
        truth = true_H[curve.order_H[:37]].sum() / true_H.sum()
        assert curve.low_K is not None
        assert curve.high_K is not None
        held += curve.low_K[37] <= truth <= curve.high_K[37]
    assert held / n > 0.78, "with normal true scores alone about 0.64"


def test_reliability_is_the_share_that_is_no_noise() -> None:
    rng = np.random.default_rng(2)
    curve = cost_curve(np.maximum(0, 3 + rng.normal(size=4000) * math.hypot(0.4, 0.3)), [0.3] * 4000, draws=10)
    assert curve.reliability == pytest.approx(0.64, abs=0.03)
    assert cost_curve([1, 1.1, 0.9], [1, 1, 1], draws=10).reliability == 0
    assert cost_curve([1, 2, 3], [0, 0, 0], draws=10).cost_K == pytest.approx(cost_curve([1, 2, 3]).cost_K)


@pytest.mark.parametrize("bad", [[], [0, 0], [1, math.nan], [1, -1], [math.inf]])
def test_scores_that_are_none_are_refused(bad: list[float]) -> None:
    with pytest.raises(ValueError, match="scores must be finite"):
        cost_curve(bad)


@pytest.mark.parametrize("bad", [[0.1], [0.1, math.nan], [0.1, -0.1]])
def test_errors_that_are_none_are_refused(bad: list[float]) -> None:
    with pytest.raises(ValueError, match="errors must be 2"):
        cost_curve([1, 2], bad)


def test_standard_errors_of_intervals() -> None:
    assert standard_errors([1, 2], [1 + 2 * 1.959964, 2]) == pytest.approx([1, 0])
    for low, high in (([2.0], [1.0]), ([math.nan], [1.0]), ([1.0], [1.0, 2.0])):
        with pytest.raises(ValueError, match="intervals"):
            standard_errors(low, high)


def test_predicted_cost_of_any_heads() -> None:
    assert predicted_cost([1, 2, 5], [2, 0]) == 0.75
    assert predicted_cost([1, 2, 5], []) == 0
    for heads in ([0, 0], [3], [-1]):
        with pytest.raises(ValueError, match="heads"):
            predicted_cost([1, 2, 5], heads)
    with pytest.raises(ValueError, match="scores"):
        predicted_cost([math.nan, 1], [0])
