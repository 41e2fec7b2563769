"""Costs at equal safety from evaluations: which numbers go in, and what is said of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import altair as alt
import numpy as np
import pytest

from castune.artifacts import EvalResult
from castune.artifacts.samples import Sample
from castune.evaluation.metrics import suite_result
from castune.report.equal_safety import charts, costs_table, sentences
from castune.report.theme import theme
from castune.stats.comparisons import holm
from castune.stats.estimates import paired_rate_interval
from castune.steps.equal_safety import safety_costs

N, M = 60, 40


def evaluated(
    name: str, refused: Sequence[float | None], nll: Sequence[float | None], right: Sequence[float]
) -> EvalResult:
    """An evaluation with these outcomes of harmful prompts, replies and questions."""
    samples: list[Any] = []
    for i, outcome in enumerate(refused):
        samples.append(
            _about("harmful", "safety", i) | {"reply": "x", "finished": True, "tokens": 1, "outcome": outcome}
        )
    for i, value in enumerate(nll):
        samples.append(_about("said", "nll", i) | {"scored_tokens": 3, "outcome": value})
    for i, outcome in enumerate(right):
        scores = {"choices": ["a"], "choice_scores": [0.0], "answer": 0, "margin": 0.0}
        samples.append(_about("asked", "utility", i) | scores | {"outcome": outcome})
    of_suites: dict[str, list[Sample]] = {}
    for sample in samples:
        of_suites.setdefault(sample["suite"], []).append(sample)
    suites = [
        suite_result(of_suite, judge="opening", max_new_tokens=None, data_hash=suite, seconds=1.0)
        for suite, of_suite in of_suites.items()
    ]
    return EvalResult(name, tuple(suites), tuple(samples), {"judge": "opening"}, {}, {})


def _about(suite: str, purpose: str, number: int) -> dict[str, Any]:
    return {"suite": suite, "id": f"{suite}-{number}", "purpose": purpose, "group": None, "prompt": "p"}


def run(cost_at_full: dict[str, float], *, gain: float = 0.6, noise: float = 0.02) -> tuple[EvalResult, dict[str, Any]]:
    """Arms whose refusals rise alike with strength, and whose NLL rises in proportion to it."""
    rng = np.random.default_rng(3)
    threshold = (np.arange(N) + 0.5) / N
    start, slope = 1 + rng.random(M), 1 + noise * rng.standard_normal(M)

    def at(strength: float, full: float) -> EvalResult:
        refused = (threshold < 0.2 + gain * strength).astype(float)
        right = (np.arange(M) < 30 - round(4 * strength)).astype(float)
        return evaluated("arm", refused.tolist(), (start + full * strength * slope).tolist(), right.tolist())

    strengths = (0.25, 0.5, 0.75, 1.0)
    arms = {arm: [{s: at(s, full) for s in strengths}] for arm, full in cost_at_full.items()}
    return at(0.0, 0.0), arms


def test_points_are_means_over_examples_above_base() -> None:
    base, arms = run({"safe": 0.2, "all": 0.4})
    found = safety_costs(base, arms)
    assert found is not None
    for arm, [by_strength] in arms.items():
        for point in found.points["nll"][arm][1:]:
            result = by_strength[point.strength]
            assert point.safety == pytest.approx(result.suite("harmful").value)
            rise = result.suite("said").value - base.suite("said").value
            assert point.cost == pytest.approx(rise)
            lost = base.suite("asked").value - result.suite("asked").value
            at = next(p for p in found.points["utility"][arm] if p.strength == point.strength)
            assert at.cost == pytest.approx(lost)
        assert found.points["nll"][arm][0][1:] == (pytest.approx(0.2, abs=0.01), 0.0)


def test_the_target_is_the_same_for_all_arms_and_costs() -> None:
    base, arms = run({"safe": 0.2, "all": 0.4})
    found = safety_costs(base, arms)
    assert found is not None
    # 80 % of a gain of 0.6.
    assert found.target == pytest.approx(0.2 + 0.8 * 0.6, abs=0.02)
    assert found.costs["nll"].arms["safe"].value == pytest.approx(0.2 * 0.8, abs=0.01)
    assert found.costs["nll"].arms["all"].value == pytest.approx(0.4 * 0.8, abs=0.02)
    fixed = safety_costs(base, arms, target=0.5)
    assert fixed is not None
    assert fixed.costs["nll"].arms["safe"].value == pytest.approx(0.2 * 0.5, abs=0.01)


def test_what_costs_less_is_said_to() -> None:
    base, arms = run({"safe": 0.2, "all": 0.4})
    found = safety_costs(base, arms)
    assert found is not None
    first, second, third = sentences(found)
    assert first.startswith("Refusals on harmful prompts went from 20.0")
    assert "in safe (+60.0 points, 95\u00a0% +" in first
    assert "in all (" in first
    assert "NLL of right answers (nats per token)" in second
    assert third.startswith(
        "At that safety, arm safe costs less than arm all in NLL of right answers; no difference is seen in "
    )


def test_differences_of_the_first_arm_are_claimed_together() -> None:
    base, arms = run({"safe": 0.2, "all": 0.4, "random": 0.2004})
    found = safety_costs(base, arms)
    assert found is not None
    pairs = [(cost, pair) for cost in found.costs for pair in (("safe", "all"), ("safe", "random"))]
    differences = [found.costs[cost].differences[pair] for cost, pair in pairs]
    assert {one.n_comparisons for one in differences} == {4}
    assert [one.p_adjusted for one in differences] == holm([one.p for one in differences])
    for one in differences:
        if one.interval is not None:
            assert one.p is not None
            assert (one.p < 0.05) == (not one.interval.holds(0))
    # The others are nobody's claim.
    assert found.costs["nll"].differences["all", "random"].p_adjusted is None


def test_what_the_adjustment_does_not_leave_is_not_claimed() -> None:
    base, arms = run({"safe": 0.2, "all": 0.4})
    found = safety_costs(base, arms)
    assert found is not None
    seen = found.costs["nll"].differences["safe", "all"]
    assert seen.is_seen
    assert not replace(seen, p_adjusted=0.051).is_seen
    costs = {
        **found.costs,
        "nll": replace(found.costs["nll"], differences={("safe", "all"): replace(seen, p_adjusted=0.2)}),
    }
    text = sentences(replace(found, costs=costs))[2]
    assert "no difference is seen between arms safe and all in NLL" in text


def test_arms_that_cost_the_same_show_no_difference() -> None:
    base, arms = run({"safe": 0.3, "all": 0.3})
    found = safety_costs(base, arms)
    assert found is not None
    assert sentences(found)[2].startswith("At that safety, no difference is seen between arms safe and all in NLL")


def test_the_dearer_arm_is_named_whichever_it_is() -> None:
    base, arms = run({"safe": 0.4, "all": 0.2})
    found = safety_costs(base, arms)
    assert found is not None
    assert "arm safe costs more than arm all in NLL" in sentences(found)[2]


def test_without_a_gain_nothing_is_compared() -> None:
    base, arms = run({"safe": 0.2, "all": 0.4}, gain=0.0)
    found = safety_costs(base, arms)
    assert found is not None
    assert found.target is None
    assert sentences(found)[1:] == [
        "An arm is nowhere safer than the base model, so there is no safety at which costs can be compared.",
        "So whether selecting heads pays off cannot be determined.",
    ]
    assert "nothing can be compared" in costs_table(found)


def test_a_cost_of_which_nothing_is_scored_under_every_arm_is_left_out() -> None:
    base, arms = run({"safe": 0.2, "all": 0.6})
    broken = [{1.0: arms["all"][0][1.0], 0.5: unscored(arms["all"][0][0.5], "said")}]
    found = safety_costs(base, {"safe": [{1.0: arms["safe"][0][1.0], 0.5: arms["safe"][0][0.5]}], "all": broken})
    assert found is not None
    assert "utility" in found.costs
    assert "nll" not in found.points
    broken = [{strength: unscored(result, "harmful") for strength, result in broken[0].items()}]
    assert safety_costs(base, {"all": broken}) is None


def unscored(result: EvalResult, suite: str) -> EvalResult:
    samples: list[Any] = [
        {**sample, "outcome": None if sample["suite"] == suite else sample["outcome"]} for sample in result.samples
    ]
    return replace(result, samples=tuple(samples))


@pytest.mark.parametrize("gain", [0.6, 0.0, -0.1])
def test_every_layer_of_a_chart_has_data(gain: float) -> None:
    """Vega warns in the browser's console of the extent of one that has none."""
    found = safety_costs(*run({"safe": 0.2, "all": 0.4}, gain=gain))
    assert found is not None
    assert (found.target is not None) == (gain > 0)
    for chart in charts(found).values():
        assert len(chart.layer) == (4 if gain > 0 else 1)
        # Altair hoists the data of a single layer.
        assert all((chart.data if layer.data is alt.Undefined else layer.data)["values"] for layer in chart.layer)


def test_an_arm_that_does_not_get_there_has_no_price() -> None:
    base, arms = run({"safe": 0.2, "all": 0.4})
    found = safety_costs(base, arms, target=0.95)
    assert found is not None
    assert found.costs["nll"].arms["safe"].value is None
    assert "not known (0" in sentences(found)[1]
    assert "not reached" in costs_table(found)


def test_unscored_examples_are_left_out_of_every_strength() -> None:
    base, arms = run({"safe": 0.2})
    [points] = arms["safe"]

    def without(result: EvalResult, number: int) -> EvalResult:
        samples: list[Any] = list(result.samples)
        samples[number] = {**samples[number], "outcome": None}
        return replace(result, samples=tuple(samples))

    points[0.5] = without(points[0.5], 0)
    found = safety_costs(base, arms)
    assert found is not None
    assert found.costs["nll"].unscored_prompts == 1
    assert found.costs["nll"].n_prompts == N - 1


@pytest.mark.parametrize(
    "spoil",
    [
        lambda base, arms: (base, {arm: [{1.0: of_arm[0][1.0]}] for arm, of_arm in arms.items()}),
        lambda base, arms: (replace(base, suites=tuple(s for s in base.suites if s.purpose != "safety")), arms),
        lambda base, arms: (base, {}),
        lambda base, arms: (
            replace(base, suites=tuple(replace(suite, data_hash="another") for suite in base.suites)),
            arms,
        ),
    ],
    ids=["one strength", "no safety", "no arm", "other examples"],
)
def test_what_cannot_be_compared_is_not(spoil: Callable[[EvalResult, Any], tuple[EvalResult, Any]]) -> None:
    assert safety_costs(*spoil(*run({"safe": 0.2, "all": 0.4}))) is None


def test_arms_may_have_been_measured_at_other_strengths_than_each_other() -> None:
    base, arms = run({"safe": 0.2, "all": 0.4})
    fewer = {"safe": arms["safe"], "all": [{s: arms["all"][0][s] for s in (0.5, 1.0)}]}
    found = safety_costs(base, fewer)
    assert found is not None
    assert found.arms == ["safe", "all"]
    assert [point.strength for point in found.points["nll"]["safe"]] == [0, 0.25, 0.5, 0.75, 1]
    assert [point.strength for point in found.points["nll"]["all"]] == [0, 0.5, 1]
    # Costs and refusals rise in proportion to strength, however many of them were measured.
    assert found.costs["nll"].arms["all"].value == pytest.approx(0.4 * 0.8, abs=0.02)
    assert "arm safe costs less than arm all in NLL" in sentences(found)[2]
    assert set(charts(found)) == {"equal_safety_nll", "equal_safety_utility"}


def test_of_an_arms_trainings_the_strengths_of_all_are_used() -> None:
    base, arms = run({"safe": 0.2})
    [points] = arms["safe"]
    found = safety_costs(base, {"safe": [points, {s: points[s] for s in (1.0, 0.5)}]})
    assert found is not None
    assert [point.strength for point in found.points["nll"]["safe"]] == [0, 0.5, 1]
    assert safety_costs(base, {"safe": [points, {0.5: points[0.5]}]}) is None, "no full strength"


def test_a_strength_that_was_measured_otherwise_is_left_out_and_its_arm_is_not() -> None:
    base, arms = run({"safe": 0.2})
    [points] = arms["safe"]
    judged = tuple(replace(suite, judge="wildguard") for suite in points[0.5].suites)
    found = safety_costs(base, {"safe": [{**points, 0.5: replace(points[0.5], suites=judged)}]})
    assert found is not None
    assert [point.strength for point in found.points["nll"]["safe"]] == [0, 0.25, 0.75, 1]


def test_an_adapter_that_breaks_above_full_strength_is_compared_below() -> None:
    base, arms = run({"safe": 0.2, "all": 0.4})
    plain = safety_costs(base, arms)
    broken = evaluated("arm", [0.0] * N, [9.0] * M, [0.0] * M)
    stronger = evaluated("arm", [1.0] * N, [2.0] * M, [0.0] * M)
    [points] = arms["safe"]
    found = safety_costs(base, {**arms, "safe": [{**points, 1.5: broken}]})
    assert plain is not None
    assert found is not None
    assert found.target == plain.target
    assert found.costs["nll"].arms["safe"] == plain.costs["nll"].arms["safe"]
    # One that is safer still belongs to the curve, and the words know of it.
    more = safety_costs(base, {**arms, "safe": [{**points, 1.25: stronger, 1.5: broken}]})
    assert more is not None
    assert [point.strength for point in more.points["nll"]["safe"]] == [0, 0.25, 0.5, 0.75, 1, 1.25]
    assert "With each adapter scaled up or down to the same safety" in sentences(more)[1]
    assert "With each adapter scaled down to the same safety" in sentences(plain)[1]


@pytest.mark.parametrize("gain", [-0.1, 0.0, 0.03])
def test_an_arm_that_is_not_seen_to_be_safer_hides_nothing_of_the_others(gain: float) -> None:
    base, arms = run({"safe": 0.2, "all": 0.6})
    _, weak = run({"kept": 0.1}, gain=gain)
    alone, found = safety_costs(base, arms), safety_costs(base, {"kept": weak["kept"], **arms})
    assert alone is not None
    assert found is not None
    assert found.target == alone.target
    assert list(found.left_out) == ["kept"]
    assert found.arms == ["safe", "all"]
    assert found.costs["nll"].differences["safe", "all"] == alone.costs["nll"].differences["safe", "all"]
    first, *others, last = sentences(found)
    assert "in kept" in first
    assert others == sentences(alone)[1:]
    assert last == "Not compared: kept (not seen to be safer than the base model at full strength)."
    assert "kept" not in costs_table(found)
    assert set(found.points["nll"]) == {"kept", "safe", "all"}


def test_an_arm_that_breaks_at_full_strength_hides_nothing_of_the_others() -> None:
    base, arms = run({"safe": 0.2, "all": 0.6})
    rates = {0.25: 0.5, 0.5: 0.6, 0.75: 0.1, 1.0: 0.0}
    broken = {
        s: evaluated("arm", [float(i < rate * N) for i in range(N)], [1 + s] * M, [1.0] * M)
        for s, rate in rates.items()
    }
    found, alone = safety_costs(base, {**arms, "risky": [broken]}), safety_costs(base, arms)
    assert found is not None
    assert alone is not None
    assert found.target == alone.target
    assert list(found.left_out) == ["risky"]


@pytest.mark.parametrize("share", [1.0, 0.5])
def test_a_strength_without_replies_is_left_out_and_hides_nothing(share: float) -> None:
    base, arms = run({"safe": 0.2, "all": 0.6})
    [points] = arms["all"]
    silent = [1.0] * round(N * (1 - share)) + [None] * round(N * share)
    stronger = evaluated("arm", silent, [1.2] * M, [1.0] * M)
    found, alone = safety_costs(base, {**arms, "all": [{**points, 1.5: stronger}]}), safety_costs(base, arms)
    assert found is not None
    assert alone is not None
    assert found.costs["nll"].differences == alone.costs["nll"].differences
    assert found.gains == alone.gains
    # At full strength the arm has no curve, and the others have theirs.
    gone = safety_costs(base, {**arms, "all": [{**points, 1.0: stronger}]})
    assert gone is not None
    assert gone.arms == ["safe"]


def test_where_no_arm_is_seen_to_be_safer_all_that_rise_are_compared() -> None:
    base, arms = run({"safe": 0.2, "all": 0.6}, gain=0.03)
    _, falls = run({"kept": 0.1}, gain=-0.05)
    found = safety_costs(base, {**arms, "kept": falls["kept"]})
    assert found is not None
    assert list(found.left_out) == ["kept"]
    assert found.target is not None


@pytest.mark.parametrize("n", [60, 100])
@pytest.mark.parametrize("rate", [0.21, 0.1, 0.3])
def test_what_never_changes_has_gained_nothing(n: int, rate: float) -> None:
    """The mean of a constant is off by a rounding error, one way or the other."""
    same = evaluated("arm", [float(i < rate * n) for i in range(n)], [1.0, 1.1], [1.0, 0.0])
    found = safety_costs(same, {"safe": [dict.fromkeys((0.25, 0.5, 0.75, 1.0), same)]})
    assert found is not None
    assert found.target is None


def test_the_interval_of_a_gain_of_few_prompts_has_a_width_and_stays_within_its_range() -> None:
    for before, after in ((0, 3), (1, 8), (20, 20)):
        n = max(after, 3) if after != 8 else 10
        points = {
            s: evaluated("arm", [float(i < k) for i in range(n)], [1.0, 1.1], [1.0, 0.0])
            for s, k in ((0.0, before), (0.5, after), (1.0, after))
        }
        found = safety_costs(points.pop(0.0), {"safe": [points]})
        assert found is not None
        gain = found.gains["safe"]
        assert gain.interval is not None
        assert gain.interval == pytest.approx(paired_rate_interval(after - before, 0, n))
        assert -1 <= gain.interval.low < gain.interval.high <= 1


def test_the_gain_of_several_trainings_knows_how_far_they_differ() -> None:
    base, arms = run({"safe": 0.2}, gain=0.6)
    _, none = run({"safe": 0.2}, gain=0.0)
    found = safety_costs(base, {"safe": [none["safe"][0], arms["safe"][0], none["safe"][0]]})
    assert found is not None
    gain = found.gains["safe"]
    assert gain.value == pytest.approx(0.2)
    assert gain.interval is not None
    # t of two degrees of freedom over 0, 0.6 and 0.
    assert gain.interval.low <= 0.2 - 4.3 * 0.2 + 1e-2
    assert gain.interval.high == 1 or gain.interval.high >= 0.2 + 4.3 * 0.2 - 1e-2


def test_the_base_of_the_sentence_is_the_base_models_own() -> None:
    base, arms = run({"safe": 0.2, "all": 0.6})
    # Of the first arm a tenth is unscored at full strength, all of it prompts that the base complied with.
    [points] = arms["safe"]
    outcomes = [None if i >= 54 else outcome for i, outcome in enumerate(points[1.0].outcomes_of("harmful"))]
    partly = evaluated("arm", outcomes, points[1.0].outcomes_of("said"), points[1.0].outcomes_of("asked"))  # type: ignore[arg-type]
    found = safety_costs(base, {"safe": [{**points, 1.0: partly}], "all": arms["all"]})
    assert found is not None
    assert "went from 20.0\u202f% to" in sentences(found)[0]


@pytest.mark.parametrize(("names", "said"), [(("all",), "all"), (("all", "risky"), "all and risky")])
def test_arms_that_are_not_compared_are_named(names: tuple[str, ...], said: str) -> None:
    base, arms = run({"safe": 0.2})
    found = safety_costs(base, arms)
    assert found is not None
    assert len(sentences(found)) == 3
    [*_, last] = sentences(replace(found, left_out=dict.fromkeys(names, "not measured; castune dial RUN does that")))
    assert last == f"Not compared: {said} (not measured; castune dial RUN does that)."


def test_every_cost_is_drawn_with_its_band_and_the_target() -> None:
    base, arms = run({"safe": 0.2, "all": 0.4})
    found = safety_costs(base, arms)
    drawn = charts(found)
    assert list(drawn) == ["equal_safety_nll", "equal_safety_utility"]
    spec = drawn["equal_safety_nll"].to_dict()
    assert [layer["mark"]["type"] for layer in spec["layer"]] == ["area", "line", "point", "rule"]
    values = spec["datasets"][spec["layer"][2]["data"]["name"]]
    assert {(value["arm"], value["strength"]) for value in values} >= {("safe", "base"), ("all", "x 0.5")}
    assert theme("#222222", "Arial")
    assert charts(None) == {}
