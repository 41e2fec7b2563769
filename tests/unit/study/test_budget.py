"""Budgets from the map: by theorem, by hand, against the paper's Table 9, and how often bands hold what is true."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from castune.study.budget import (
    Anchor,
    check_against,
    cost_curve,
    largest_budget,
    predicted_cost,
    standard_errors,
)

SCORES = st.lists(st.floats(0.01, 5), min_size=1, max_size=40)
# Table 7, Llama: mean C of the four quarters from the lowest; Table 9: general average after training, 66.10 before.
QUARTERS = [0.47, 0.67, 0.88, 1.27]
SAFE = [66.10 - after for after in (61.34, 57.93, 55.97, 36.78)]
RISKY = [66.10 - after for after in (56.02, 54.78, 57.83)]


@settings(max_examples=60, deadline=None)
@given(SCORES)
def test_a_curve_is_a_lorenz_curve(scores: list[float]) -> None:
    curve = cost_curve(scores)
    assert (curve.cost_K[0], curve.cost_K[-1]) == (0, pytest.approx(1))
    assert (np.diff(curve.cost_K, 2) >= -1e-12).all(), "convex: every further head costs at least as much"
    assert (curve.cost_K <= np.linspace(0, 1, len(scores) + 1) + 1e-12).all()
    assert curve.mean_K[-1] == pytest.approx(1)
    assert sorted(curve.order_H) == list(range(len(scores)))
    assert (curve.low_K, curve.high_K, curve.reliability) == (None, None, None)


@settings(max_examples=60, deadline=None)
@given(SCORES)
def test_the_elbow_is_where_heads_begin_to_cost_more_than_the_mean(scores: list[float]) -> None:
    elbow = cost_curve(scores).elbow
    if np.ptp(scores) < 1e-9:
        return
    assert elbow.k is not None
    assert (
        np.sum(np.array(scores) < np.mean(scores) - 1e-9)
        <= elbow.k
        <= np.sum(np.array(scores) <= np.mean(scores) + 1e-9)
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
    assert curve.mean_K[1:] == pytest.approx(np.cumsum(QUARTERS) / np.arange(1, 5) / 0.8225)
    assert curve.elbow.k == 2


def test_equal_heads_have_no_elbow() -> None:
    assert cost_curve([2.0] * 7).elbow.k is None
    assert cost_curve([2.0]).elbow.k is None


def test_noise_alone_has_no_elbow_though_its_curve_bends() -> None:
    rng, found, n = np.random.default_rng(0), 0, 60
    for seed in range(n):
        curve = cost_curve(1 + 0.2 * rng.normal(size=100), [0.2] * 100, draws=200, seed=seed)
        assert curve.measured_K[50] < 0.45, "it does bend"
        assert curve.elbow.straight is not None
        found += curve.elbow.k is not None
    assert found / n < 0.05 + 4 * math.sqrt(0.05 * 0.95 / n)
    real = cost_curve(np.abs(1 + 0.5 * rng.normal(size=100)), [0.1] * 100)
    assert real.elbow.k is not None


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


# -- largest budget


def test_a_limit_without_an_anchor_is_a_share_of_the_full_model() -> None:
    curve = cost_curve(QUARTERS)
    found = [largest_budget(curve, limit) for limit in (0, 0.1, 0.35, 0.99, 1)]
    assert [budget.k for budget in found] == [None, None, 2, 3, 4]
    assert all(budget.k_sure is None and budget.interval is None for budget in found)


def test_an_anchor_comes_out_right_and_scales_the_rest() -> None:
    curve = cost_curve(QUARTERS)
    found = largest_budget(curve, 12, Anchor(1, SAFE[0]))
    assert found.scale == pytest.approx(4.76 * 3.29 / 0.47)
    assert found.k == 2
    assert found.loss == pytest.approx(4.76 * 1.14 / 0.47)
    assert largest_budget(curve, SAFE[0], Anchor(1, SAFE[0])).k == 1


def test_an_error_of_the_anchor_makes_the_budget_unsure() -> None:
    curve = cost_curve(np.linspace(0.5, 1.5, 100))
    found = largest_budget(curve, 5, Anchor(25, 3, 0.8))
    assert found.k is not None
    assert found.k_sure is not None
    assert found.k_possible is not None
    assert found.k_sure < found.k < found.k_possible
    # The loss at the anchor is that of the anchor: 3 ± 1.96 * 0.8; a limit at its upper end is sure there.
    assert largest_budget(curve, 3 + 1.96 * 0.8, Anchor(25, 3, 0.8)).k_sure == pytest.approx(25, abs=1)
    nothing = largest_budget(curve, 5, Anchor(25, -1, 2))
    assert (nothing.k, nothing.loss, nothing.scale) == (100, 0, 0)
    assert nothing.k_sure is not None
    assert nothing.k_sure < 100


def test_a_band_of_the_map_alone_makes_it_unsure_too() -> None:
    rng = np.random.default_rng(0)
    curve = cost_curve(np.abs(1 + 0.4 * rng.normal(size=80)), [0.3] * 80)
    found = largest_budget(curve, 0.3)
    assert found.interval is not None
    assert found.k_sure is not None
    assert found.k is not None
    assert found.k_possible is not None
    assert found.k_sure <= found.k <= found.k_possible
    assert found.interval.holds(found.loss)


@settings(max_examples=30, deadline=None)
@given(SCORES, st.floats(0, 1), st.floats(0, 1))
def test_a_larger_limit_never_allows_fewer_heads(scores: list[float], one: float, other: float) -> None:
    curve = cost_curve(scores)
    low, high = (largest_budget(curve, limit).k or 0 for limit in sorted((one, other)))
    assert low <= high
    assert curve.cost_K[high] <= max(one, other) + 1e-9


@pytest.mark.parametrize("bad", [Anchor(0, 1), Anchor(5, 1), Anchor(1, math.nan), Anchor(1, 1, -1)])
def test_anchors_that_are_none_are_refused(bad: Anchor) -> None:
    with pytest.raises(ValueError, match="anchor"):
        largest_budget(cost_curve(QUARTERS), 1, bad)


@pytest.mark.parametrize("bad", [-1, math.nan, math.inf])
def test_limits_that_are_none_are_refused(bad: float) -> None:
    with pytest.raises(ValueError, match="limit"):
        largest_budget(cost_curve(QUARTERS), bad)


# -- check


def test_table_9_follows_the_order_of_the_curve_only_along_the_safe_trajectory() -> None:
    curve = cost_curve(QUARTERS)
    safe = check_against(curve.cost_K[1:].tolist(), SAFE)
    assert safe.correlation.spearman == 1
    assert safe.scale == pytest.approx(25.73, abs=0.01)
    # The jump to the full model is steeper than the sum of C foretells.
    assert [residual > 0 for residual in safe.residuals] == [True, False, False, True]
    # Three quarters from the riskiest on, by the same curve: they cost about the same, whatever is added.
    risky = [predicted_cost(QUARTERS, heads) for heads in ([3], [3, 2], [3, 2, 1])]
    both = check_against([*curve.cost_K[1:].tolist(), *risky], [*SAFE, *RISKY])
    assert both.correlation.spearman is not None
    assert both.correlation.spearman == pytest.approx(1 - 6 * 12 / (7 * 48))


@pytest.mark.parametrize("losses", [[None, None], []])
def test_a_check_of_nothing(losses: list[Any]) -> None:
    found = check_against([0.5] * len(losses), losses)
    assert (found.scale, found.relative_error, found.n_undefined) == (None, None, len(losses))
    assert found.correlation.spearman is None


def test_a_perfect_prediction_leaves_nothing() -> None:
    found = check_against([0.1, 0.5, 0.7, 1.0], [1, 5, None, 10])
    assert found.scale == pytest.approx(10)
    assert found.relative_error == pytest.approx(0, abs=1e-12)
    assert found.residuals[2] is None
    assert found.n_undefined == 1


def test_a_check_refuses() -> None:
    with pytest.raises(ValueError, match="differ in number"):
        check_against([1, 2], [1])
    with pytest.raises(ValueError, match="finite"):
        check_against([1, 2], [1, math.nan])


def test_predicted_cost_of_any_heads() -> None:
    assert predicted_cost([1, 2, 5], [2, 0]) == 0.75
    assert predicted_cost([1, 2, 5], []) == 0
    for heads in ([0, 0], [3], [-1]):
        with pytest.raises(ValueError, match="heads"):
            predicted_cost([1, 2, 5], heads)
    with pytest.raises(ValueError, match="scores"):
        predicted_cost([math.nan, 1], [0])
