"""The comparison that a study is made to decide: what it finds of planted costs, what it can see, what it says."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from fake_study import STUDY, in_nats, planted

from castune.config import EvaluateConfig, PrimaryContrast, Recipe, StudyConfig
from castune.errors import CastuneError
from castune.stats.power import power
from castune.study.findings import Findings, findings
from castune.study.primary import expected_design, expected_words
from castune.study.run import load_study_suites
from castune.study.tables import finding_tables


def study(**values: Any) -> StudyConfig:
    return STUDY.model_copy(update={"primary": PrimaryContrast(cost="nll", **values)})


def found_in(effect: float, declared: StudyConfig | None = None, **values: Any) -> Findings:
    return findings(in_nats(effect, strengths=(0.35, 0.65), **values), declared or study())


def test_the_ratio_is_that_of_the_planted_costs() -> None:
    results = in_nats(0.8, strengths=(0.35, 0.65))
    found = findings(results, study()).primary
    assert found is not None
    planted_cost = {arm: np.mean([t.scores["conflict"] for t in results.of(arm)]) for arm in ("risky", "safe")}
    ratio = planted_cost["risky"] / planted_cost["safe"]
    assert found.found.value == pytest.approx(ratio, rel=0.05)
    assert found.found.interval is not None
    assert found.found.interval.holds(ratio)
    assert found.verdict.is_seen
    assert not found.verdict.is_refuted
    assert found.seeds_to_decide is None
    assert any(words.startswith("An effect is seen") for words in found.words)


def test_it_is_the_first_thing_that_is_said_and_stands_outside_the_adjustment() -> None:
    with_it, without = found_in(0.8), found_in(0.8, STUDY)
    assert without.primary is None
    assert with_it.verdict[0].startswith("Primary contrast of the recipe: at equal safety")
    assert with_it.verdict[len(with_it.primary.words if with_it.primary else []) :] == without.verdict
    assert [c.found.p_adjusted for c in with_it.comparisons] == [c.found.p_adjusted for c in without.comparisons]
    rows = {table.name: table.rows for table in finding_tables(with_it)}["primary"]
    assert [(row["first"], row["second"], row["is_seen"], row["seeds"]) for row in rows] == [("risky", "safe", True, 3)]
    assert "primary" not in {table.name for table in finding_tables(without)}


def test_swapped_arms_refute_what_they_would_show_the_other_way_round() -> None:
    found = found_in(0.8, study(arms=("safe", "risky"))).primary
    assert found is not None
    assert found.verdict.is_refuted
    assert not found.verdict.is_seen
    assert any("refuted at this scale" in words for words in found.words)


def test_arms_that_cost_nothing_decide_nothing() -> None:
    found = found_in(0.0).primary
    assert found is not None
    assert found.verdict.is_undecided
    assert any(words.startswith("Undecided") for words in found.words)


def test_an_arm_that_misses_the_safety_with_some_seeds_is_told_not_more_seeds() -> None:
    gains = {("risky", seed): gain for seed, gain in zip(STUDY.seeds, (0.2, 0.4, 0.6), strict=True)}
    found = found_in(0.1, gains=gains, n=400).primary
    assert found is not None
    assert found.found.value is not None
    misses, other = found.found.unreached_shares
    assert misses > 0.025
    assert other < misses
    assert found.found.interval is not None
    assert np.isinf(found.found.interval.high)
    assert found.verdict.is_undecided
    assert found.seeds_to_decide is None
    assert any("not reached by risky in" in words and "no bound" in words for words in found.words)


def test_what_is_equivalent_depends_on_the_bound() -> None:
    wide, narrow = (found_in(0.8, study(equivalent_within=bound)).primary for bound in (5.0, 0.001))
    assert wide is not None
    assert narrow is not None
    assert wide.equivalence is not None
    assert narrow.equivalence is not None
    assert wide.equivalence.is_equivalent
    assert not narrow.equivalence.is_equivalent
    assert any("not shown to be equivalent" in words for words in narrow.words)


def test_more_seeds_of_its_two_arms_count_though_others_have_fewer() -> None:
    results = in_nats(0.8, strengths=(0.35, 0.65), seeds=(1, 2, 3, 4, 5))
    kept = [t for t in results.trials if t.arm in ("risky", "safe") or t.seed in STUDY.seeds]
    more = study().model_copy(update={"arm_seeds": dict.fromkeys(("risky", "safe"), (1, 2, 3, 4, 5))})
    found = findings(replace(results, trials=tuple(kept)), more)
    assert found.primary is not None
    assert found.primary.found.n_seeds == 5
    assert {costs.n_seeds for costs in found.equal_safety["sft"].costs.values()} == {3}


def test_costs_at_equal_safety_take_part_where_scores_are_tested() -> None:
    results = in_nats(0.8, strengths=(0.35, 0.65))
    found = findings(results, STUDY)
    by_cost = {validity.cost: validity for validity in found.validities}
    assert {"nll_at_safety", "kl_at_safety"} <= by_cost.keys()
    # Planted: the cost is proportional to the mean C of the arm's heads.
    assert by_cost["nll_at_safety"].found.of_means.pearson == pytest.approx(1, abs=0.03)
    assert "at equal safety" in by_cost["nll_at_safety"].words
    held = {(control.score, control.cost, control.held) for control in found.controls}
    assert ("conflict", "nll_at_safety", "depth") in held
    assert ("conflict", "nll_at_safety", "gradient") in held
    assert not any(score == what for score, _, what in held), "O(h) does not control itself"
    plain = findings(in_nats(0.8), STUDY)
    assert not any(validity.cost.endswith("at_safety") for validity in plain.validities)


def test_a_declared_contrast_that_cannot_be_told_is_the_first_thing_that_is_said() -> None:
    without_strengths = findings(in_nats(0.8), study())
    assert without_strengths.primary is None
    assert without_strengths.headline[0].startswith("The primary contrast of the recipe cannot be told yet")
    told = found_in(0.8)
    assert told.primary is not None
    assert told.headline == told.primary.words
    assert not any("primary" in words for words in findings(in_nats(0.8), STUDY).headline)


def test_small_buckets_have_a_common_safety_of_their_own() -> None:
    """An eighth of the heads does not reach what a quarter does: scores would be tested on what is left of them."""
    results = in_nats(0.8, strengths=(0.35, 0.65), buckets=8, gain_of_buckets=0.2)
    found = findings(results, STUDY.model_copy(update={"buckets": (8,)}))
    assert found.equal_safety["sft"].target is not None
    assert found.equal_safety["sft"].target > 0.1 + 0.2, "no bucket gets there"
    validity = next(one for one in found.validities if one.cost == "nll_at_safety")
    assert (validity.found.n_arms, validity.found.n_undefined) == (8, 0)
    # At their own common safety all adapters are at one strength, and cost what was planted.
    assert validity.found.of_means.pearson == pytest.approx(1, abs=0.03)
    # What else is held constant is so among the eight of a size, not among the three others.
    assert {control.found.n for control in found.controls} == {8}


def test_gradient_sizes_are_held_constant_where_they_are_known() -> None:
    results, rng = in_nats(0.8, strengths=(0.35, 0.65)), np.random.default_rng(0)
    known = {arm: float(rng.random()) for arm in {t.arm for t in results.trials}}
    sized = replace(results, trials=tuple(replace(t, gradient_size=known[t.arm]) for t in results.trials))
    assert "gradient_size" in {control.held for control in findings(sized, STUDY).controls}
    assert "gradient_size" not in {control.held for control in findings(results, STUDY).controls}


def test_a_design_sees_what_the_power_calculation_says() -> None:
    declared = study(seeds_sd=0.03, items_se=0.005, second_cost=0.05)
    design = expected_design(declared)
    assert design is not None
    assert design.n_seeds == 3
    assert power(design.smallest, seeds_sd=0.03, n_seeds=3, items_se=0.005) == pytest.approx(0.8)
    assert design.ratio == pytest.approx(1 + design.smallest / 0.05)
    assert sorted(design.by_seeds.values(), reverse=True) == list(design.by_seeds.values())
    words = " ".join(expected_words(declared))
    assert f"{design.smallest:.3f}" in words
    assert "3 seeds" in words


@pytest.mark.parametrize(
    ("declared", "said"),
    [
        (STUDY, "no primary contrast"),
        (study(), "study.primary.seeds_sd"),
        (study(seeds_sd=0.1).model_copy(update={"seeds": (1,)}), "one seed decides nothing"),
    ],
)
def test_a_design_without_what_it_needs_says_so(declared: StudyConfig, said: str) -> None:
    assert expected_design(declared) is None
    assert said in " ".join(expected_words(declared))


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"arms": ("safe", "safe")}, "names safe twice"),
        ({"arms": ("safe", "layer-matched")}, "study.primary.arms names arms that the study does not train"),
        ({"cost": "mmlu"}, "cost"),
        ({"refuted_below": 0}, "refuted_below"),
        ({"power": 0.01}, "power"),
        ({"seed": 3}, "seed"),
    ],
)
def test_bad_contrasts_are_refused_by_their_key(values: dict[str, Any], said: str) -> None:
    with pytest.raises(CastuneError, match=said):
        StudyConfig(primary=values)  # type: ignore[arg-type]


def recipe(**evaluate: Any) -> Recipe:
    plain = Recipe.load("recipes/quickstart.toml")
    return plain.model_copy(update={"evaluate": EvaluateConfig(**evaluate), "study": study()})


@pytest.mark.parametrize(
    ("evaluate", "said"),
    [
        ({"suites": ("starter-safety-eval",), "strengths": (0.5,)}, "needs suites of nll"),
        ({"suites": ("nll:starter-solutions-eval",), "strengths": (0.5,)}, "safety or safety-margin"),
        (
            {"suites": ("starter-safety-eval", "nll:starter-solutions-eval")},
            "evaluate.strengths has full strength alone",
        ),
    ],
)
def test_what_would_not_be_measured_is_refused_before_anything_runs(evaluate: dict[str, Any], said: str) -> None:
    with pytest.raises(CastuneError, match=said):
        load_study_suites(recipe(**evaluate))


def test_nothing_is_claimed_of_a_study_without_strengths() -> None:
    assert findings(planted(0.3, n=20), study()).primary is None
