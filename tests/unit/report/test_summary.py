from __future__ import annotations

import pytest
from fake_run import Run, make_evaluation, make_suite

from castune.report.summary import (
    NO_DIFFERENCE,
    NOT_MEASURED,
    cost_ratio,
    mean_change,
    mean_rate,
    number,
    percent,
    points,
    verdict,
    with_error,
)
from castune.stats.estimates import Estimate, PairedDifference


def test_mean_rate_averages_suites_without_weights_and_their_errors_as_independent() -> None:
    suites = [
        make_suite("safety", 0.2, 0.03, suite="a", n=10, unscored=1),
        make_suite("safety", 0.6, 0.04, suite="b", n=1000, unscored=2),
    ]
    rate = mean_rate(make_evaluation("base", suites), "safety")
    assert rate is not None
    assert rate.value == pytest.approx(0.4)
    assert rate.standard_error == pytest.approx(0.025)
    assert (rate.n, rate.unscored) == (1010, 3)


def test_a_mean_over_a_suite_without_a_value_is_not_measured() -> None:
    suites = [make_suite("safety", 0.2, 0.03, suite="a"), make_suite("safety", None, None, suite="b", n=0)]
    rate = mean_rate(make_evaluation("base", suites), "safety")
    assert rate is not None
    assert rate.value is None
    assert rate.standard_error is None
    assert mean_rate(make_evaluation("base", suites), "utility") is None


def test_mean_change_needs_every_suite_of_the_purpose() -> None:
    suites = [make_suite("safety", 0.2, 0.03, suite="a"), make_suite("safety", 0.4, 0.03, suite="b")]
    evaluation = make_evaluation("safe", suites)
    change = Estimate(0.1, 0.03, 50)
    assert mean_change(evaluation, {"a": change}, "safety") is None
    both = mean_change(evaluation, {"a": change, "b": Estimate(0.3, 0.04, 50)}, "safety")
    assert both is not None
    assert both.value == pytest.approx(0.2)
    assert both.standard_error == pytest.approx(0.025)


@pytest.mark.parametrize(
    ("value", "error", "seen"),
    [
        (0.2, 0.1, True),
        (-0.2, 0.1, True),
        (0.199, 0.1, False),
        (0.0, 0.0, False),
        (0.3, 0.0, True),
        (0.3, None, None),
        (None, 0.1, None),
    ],
)
def test_a_change_is_seen_from_two_standard_errors_on(
    value: float | None, error: float | None, seen: bool | None
) -> None:
    assert Estimate(value, error, 10).is_seen is seen


def test_verdict_says_which_changes_are_seen(run: Run) -> None:
    said = verdict(run.evaluations, run.differences, run.cost_ratios["ucr"])
    assert said.rates.startswith("Refusals on harmful prompts (n = 96): 3.1\u202f%\u00a0±\u00a01.8 base, 78.1")
    safe, random = said.changes["safe"], said.changes["random"]
    assert "refusals on harmful prompts: +75.0\u00a0±\u00a04.1;" in safe
    assert f"utility accuracy: {NO_DIFFERENCE} (−3.5\u00a0±\u00a04.1)" in safe
    assert "Utility cost ratio: 0.05 (0.01 to 0.12)." in safe
    assert "Utility cost ratio: 0.15 (0.03 to no bound: no gain in 4\u202f% of resamples)." in said.changes["risky"]
    assert random.count(NO_DIFFERENCE) == 3
    assert "Utility cost ratio: undefined." in random
    assert "base" not in said.changes


def test_verdict_claims_no_change_that_was_not_given(run: Run) -> None:
    said = verdict(run.evaluations, {}, {})
    for change in said.changes.values():
        assert change.count(f"change {NOT_MEASURED}") == 3
        assert f"Utility cost ratio: {NOT_MEASURED}." in change
    del run.evaluations["base"]
    assert verdict(run.evaluations, run.differences, run.cost_ratios["ucr"]).changes == {}
    assert "Nothing has been evaluated" in verdict({}, {}, {}).rates


def test_a_cost_ratio_that_was_not_measured_is_not_called_undefined(run: Run) -> None:
    assert cost_ratio("random", run.cost_ratios["ucr"]) == "undefined"
    del run.cost_ratios["ucr"]["random"]
    assert cost_ratio("random", run.cost_ratios["ucr"]) == NOT_MEASURED


def test_a_paired_test_decides_whether_a_change_is_seen() -> None:
    assert PairedDifference(0.04, 0.0197, 100, 0, 4, 0, 0.125).is_seen is False
    assert PairedDifference(0.08, 0.03, 100, 0, 8, 0, 0.0078).is_seen is True


def test_numbers_in_words() -> None:
    assert percent(0.0313) == "3.1\u202f%"
    assert percent(None) == NOT_MEASURED
    assert points(-0.125) == "−12.5"
    assert points(0.02) == "+2.0"
    assert points(-0.0001) == "0.0"
    assert with_error(Estimate(None, None, 0), percent) == NOT_MEASURED
    assert with_error(Estimate(0.5, None, 1), percent) == f"50.0\u202f%\u00a0±\u00a0{NOT_MEASURED}"
    assert number(1_234_567) == "1,234,567"
    assert number(-0.012345) == "−0.01235"
    assert number(None) == number(float("nan")) == NOT_MEASURED
