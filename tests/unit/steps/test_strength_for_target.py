"""The strength that `castune dial` takes for a target: on the curve that was measured, on the right side of the target."""

from __future__ import annotations

import numpy as np
import pytest

from castune.stats.dial import StrengthCurves
from castune.steps.dial import chosen_strength


def curves(strengths: tuple[float, ...], rates: tuple[float, ...], measure: str = "safety") -> StrengthCurves:
    """Ten prompts each, of which so many are refused at every strength."""
    outcomes_JN = np.array([[float(i < round(10 * rate)) for i in range(10)] for rate in rates])
    return StrengthCurves.of(strengths, {measure: [outcomes_JN]}, draws=2)


@pytest.mark.parametrize("last", [1.2345, 1.23456, 1.9999, 1 / 3])
def test_a_target_at_the_last_strength_is_reached_there_whatever_its_digits(last: float) -> None:
    found = curves((0.0, 0.25, last), (0.0, 0.2, 0.5))
    strength = chosen_strength(found.reach("safety", 0.5))
    assert strength == last
    assert found.at(strength)["safety"].mean.value == pytest.approx(0.5)


def test_no_rounding_goes_past_a_strength_behind_which_the_curve_turns() -> None:
    found = curves((0.0, 0.5004, 1.0), (0.0, 0.6, 0.1))
    strength = chosen_strength(found.reach("safety", 0.5999))
    assert strength is not None
    assert strength <= 0.5004
    assert found.at(strength)["safety"].mean.value >= 0.5999


def test_a_limit_that_is_met_below_a_thousandth_is_not_that_of_the_base_model() -> None:
    found = curves((0.0, 1.0), (0.0, 0.5), "over-refusal")
    reached = found.reach("over-refusal", 1e-4)
    strength = chosen_strength(reached)
    assert strength is not None
    assert 0 < strength <= (reached.strength or 0) < 1e-3
    assert found.at(strength)["over-refusal"].mean.value <= 1e-4


@pytest.mark.parametrize("strengths", [(0.0, 0.25, 1.0), (0.0, 0.3333, 0.7777)])
@pytest.mark.parametrize("target", [0.1, 0.3, 0.55, 0.6, 0.75])
def test_a_goal_is_reached_and_a_limit_kept_between_the_measured_strengths(
    strengths: tuple[float, ...], target: float
) -> None:
    for measure in ("safety", "over-refusal"):
        found = curves(strengths, (0.0, 0.4, 0.8), measure)
        reached = found.reach(measure, target)
        strength = chosen_strength(reached)
        assert strength is not None
        assert reached.between is not None
        assert reached.between[0] <= strength <= reached.between[1]
        value = found.at(strength)[measure].mean.value
        assert value >= target - 1e-6 if measure == "safety" else value <= target + 1e-6
