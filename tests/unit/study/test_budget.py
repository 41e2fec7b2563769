"""Budgets within a loss: by hand, by theorem, and against the paper's Table 9."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from castune.stats.cost_curve import cost_curve, predicted_cost
from castune.study.budget import Anchor, check_against, largest_budget

SCORES = st.lists(st.floats(0.01, 5), min_size=1, max_size=40)
# Table 7, Llama: mean C of the four quarters from the lowest; Table 9: general average after training, 66.10 before.
QUARTERS = [0.47, 0.67, 0.88, 1.27]
SAFE = [66.10 - after for after in (61.34, 57.93, 55.97, 36.78)]
RISKY = [66.10 - after for after in (56.02, 54.78, 57.83)]


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
    assert (found.scale, found.n_undefined) == (None, len(losses))
    assert found.correlation.spearman is None


def test_a_perfect_prediction_leaves_nothing() -> None:
    found = check_against([0.1, 0.5, 0.7, 1.0], [1, 5, None, 10])
    assert found.scale == pytest.approx(10)
    assert found.residuals == (pytest.approx(0), pytest.approx(0), None, pytest.approx(0))
    assert found.n_undefined == 1


def test_a_check_refuses() -> None:
    with pytest.raises(ValueError, match="differ in number"):
        check_against([1, 2], [1])
    with pytest.raises(ValueError, match="finite"):
        check_against([1, 2], [1, math.nan])
