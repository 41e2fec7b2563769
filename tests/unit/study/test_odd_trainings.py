"""One odd bucket, seed, strength or unscored example neither hides nor misdescribes what the others show."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import chain, combinations
from typing import Any

import numpy as np
import pytest
from fake_study import STUDY, in_nats, measured, planted

from castune.config import StudyConfig
from castune.report.equal_safety import sentences
from castune.stats.comparisons import compare
from castune.stats.estimates import CostRatio
from castune.study.equal_safety import at_common_safety, costs_by_method, primary
from castune.study.figures import charts
from castune.study.findings import findings, outcomes
from castune.study.realised_costs import costs_of, loss
from castune.study.score_costs import ScoreValidity, validities
from castune.study.tables import finding_tables, tables
from castune.study.trials import Measured, Results, Trial, most_comparable

ARMS = ("safe", "all", "random", "risky")
BUCKETS = tuple(f"bucket-{n}-of-4" for n in range(1, 5))
# Full strength costs 0.8 of itself where safety and cost rise in proportion, within the planted noise.
CLOSE = {"rel": 0.1}


def changed(results: Results, change: Callable[[Trial], Trial | None]) -> Results:
    found = (change(trial) for trial in results.trials)
    return replace(results, trials=tuple(trial for trial in found if trial is not None))


def unscored(found: Measured, suite: str) -> Measured:
    values: dict[str, tuple[str, Any]] = {s.suite: (s.purpose, found.outcomes_of(s.suite)) for s in found.suites}
    purpose, of_suite = values[suite]
    return measured({**values, suite: (purpose, [None] * len(of_suite))})


def without_scores(results: Results, arm: str, seed: int, suite: str) -> Results:
    """As `read_results` reads a training of which a suite has nothing scored: it has no cost ratio."""
    return changed(
        results,
        lambda t: replace(t, measured=unscored(t.measured, suite), cost_ratios={}) if (t.arm, t.seed) == (arm, seed) else t,
    )  # fmt: skip


def buckets_of(results: Results) -> list[Trial]:
    return [trial for bucket in BUCKETS for trial in results.of(bucket)]


def at_safety(trials: list[Trial]) -> dict[tuple[str, int], Mapping[str, tuple[float | None, float | None]]]:
    return {(trial.arm, trial.seed): trial.at_safety for trial in trials}


@pytest.fixture(scope="module")
def whole() -> Results:
    """Everything measured at half and full strength."""
    return in_nats(0.8, n=40, strengths=(0.5,))


@pytest.fixture(scope="module")
def whole_costs(whole: Results) -> dict[tuple[str, int], Mapping[str, tuple[float | None, float | None]]]:
    return at_safety(at_common_safety(buckets_of(whole), whole.base))


# -- costs at equal safety of buckets


def test_a_bucket_that_gains_no_safety_is_undefined_and_the_others_are_not() -> None:
    gainless = {(BUCKETS[0], seed): -0.05 for seed in STUDY.seeds}
    results = in_nats(0.8, n=40, strengths=(0.5,), gains=gainless)
    found = at_safety(at_common_safety(buckets_of(results), results.base))
    for trial in buckets_of(results):
        value, _ = found[trial.arm, trial.seed]["nll"]
        if trial.arm == BUCKETS[0]:
            assert found[trial.arm, trial.seed] == {"nll": (None, None), "kl": (None, None)}
        else:
            full, _ = loss(trial.measured, results.base, "nll_added")  # type: ignore[arg-type]
            assert value == pytest.approx(0.8 * full, **CLOSE)  # type: ignore[operator]
    # They cost what they do without it.
    others = [trial for trial in buckets_of(results) if trial.arm != BUCKETS[0]]
    assert at_safety(at_common_safety(others, results.base)).items() <= found.items()
    (of_nll,) = (v for v in validities(results, STUDY) if v.cost == "nll_at_safety")
    assert (of_nll.found.n_arms, of_nll.found.n_undefined) == (3, 3)
    assert of_nll.found.of_means.pearson == pytest.approx(1, abs=0.05)
    assert "In 3 of 12 trials the common safety was not reached" in of_nll.words


def test_where_no_bucket_gains_safety_none_has_a_cost(whole: Results) -> None:
    results = in_nats(0.8, n=40, strengths=(0.5,), gain_of_buckets=-0.05)
    found = at_common_safety(buckets_of(results), results.base)
    assert all(trial.at_safety == {"nll": (None, None), "kl": (None, None)} for trial in found)
    assert all(trial.at_safety == {} for trial in at_common_safety(buckets_of(whole), None))


@pytest.mark.parametrize(
    ("odd", "why"),
    [
        (lambda t: replace(t, strengths={}), "not every strength was measured"),
        (
            lambda t: replace(t, strengths={0.5: unscored(t.strengths[0.5], "h")}),
            "a suite has nothing scored at a strength",
        ),
        (lambda t: replace(t, measured=unscored(t.measured, "said")), "a suite has nothing scored at a strength"),
    ],
    ids=["not measured", "no safety", "no cost"],
)
def test_a_training_that_lacks_a_strength_or_its_scores_is_dropped_alone_and_told(
    odd: Callable[[Trial], Trial],
    why: str,
    whole: Results,
    whole_costs: dict[tuple[str, int], Mapping[str, tuple[float | None, float | None]]],
) -> None:
    results = changed(whole, lambda t: odd(t) if (t.arm, t.seed) == (BUCKETS[1], 3) else t)
    found = at_safety(at_common_safety(buckets_of(results), results.base))
    assert found == {**whole_costs, (BUCKETS[1], 3): {}}
    (of_nll,) = (v for v in validities(results, STUDY) if v.cost == "nll_at_safety")
    assert (of_nll.found.n_arms, of_nll.found.n_trials, of_nll.found.n_undefined) == (4, 12, 1)
    assert f"In 1 of 12 trials {why}, so the NLL of right answers at equal safety is undefined" in of_nll.words


def test_buckets_that_each_lack_another_seed_still_have_a_common_safety(
    whole: Results, whole_costs: dict[tuple[str, int], Mapping[str, tuple[float | None, float | None]]]
) -> None:
    lost = {(BUCKETS[n], n + 1) for n in range(3)}
    results = changed(whole, lambda t: replace(t, strengths={}) if (t.arm, t.seed) in lost else t)
    found = at_safety(at_common_safety(buckets_of(results), results.base))
    assert found == {key: {} if key in lost else costs for key, costs in whole_costs.items()}


def test_a_cost_without_scores_anywhere_leaves_the_others(whole: Results) -> None:
    results = changed(whole, lambda t: replace(t, measured=unscored(t.measured, "said")))
    found = at_common_safety(buckets_of(results), results.base)
    assert {cost for trial in found for cost in trial.at_safety} == {"kl"}


# -- costs at equal safety of arms


def only(results: Results, seeds: Mapping[str, tuple[int, ...]]) -> Results:
    return changed(results, lambda t: t if t.seed in seeds.get(t.arm, STUDY.seeds) else None)


@pytest.mark.parametrize(
    ("seeds", "kept", "n_seeds", "few"),
    [
        ({"all": (1,)}, ["safe", "random", "risky"], 3, ("all",)),
        ({"all": (1,), "random": (2, 3)}, ["safe", "random", "risky"], 2, ("all",)),
        ({"all": (1, 2)}, ["safe", "all", "random", "risky"], 2, ()),
        # Without most arms there is little to compare.
        ({"all": (1,), "random": (1,)}, ["safe", "all", "random", "risky"], 1, ()),
        # The arm that the others are compared with is not left out.
        ({"safe": (1,)}, ["safe", "all", "random", "risky"], 1, ()),
        ({"safe": (1,), "all": (2, 3)}, ["safe", "random", "risky"], 1, ("all",)),
        ({"safe": (1, 2), "all": (3,), "random": (3,), "risky": (3,)}, ["safe"], 2, ("all", "random", "risky")),
    ],
)
def test_an_arm_with_too_few_of_the_others_seeds_is_left_out_and_named(
    seeds: Mapping[str, tuple[int, ...]], kept: list[str], n_seeds: int, few: tuple[str, ...], whole: Results
) -> None:
    found = costs_by_method(only(whole, seeds), STUDY, "safe")["sft"]
    assert found.arms == kept
    assert found.left_out == dict.fromkeys(
        few, "measured at every strength with too few of the training seeds of the others"
    )
    assert {costs.n_seeds for costs in found.costs.values()} == {n_seeds}
    said = " ".join(sentences(found))
    assert ("too few of the training seeds" in said) == bool(few)
    assert all(arm in said for arm in few)
    assert ("this is one training seed" in said) == (n_seeds == 1)


def test_the_arms_that_stay_cost_what_they_do_without_the_one_that_is_left_out(whole: Results) -> None:
    found = costs_by_method(only(whole, {"all": (1,)}), STUDY, "safe")["sft"]
    alone = costs_by_method(only(whole, {"all": ()}), STUDY, "safe")["sft"]
    assert found.costs == alone.costs
    assert found.target == alone.target == pytest.approx(0.42, abs=0.02)


def test_an_arm_without_further_strengths_is_named(whole: Results) -> None:
    results = changed(whole, lambda t: replace(t, strengths={}) if t.arm == "risky" else t)
    found = costs_by_method(results, STUDY, "safe")["sft"]
    assert (found.arms, list(found.left_out)) == (["safe", "all", "random"], ["risky"])
    assert sentences(found)[-1] == (
        "Not compared: risky (not measured at other strengths; castune study RECIPE does that)."
    )


def test_a_training_or_an_arm_without_scores_leaves_the_others_their_costs(whole: Results) -> None:
    def odd(seeds: tuple[int, ...]) -> Results:
        bad = {("all", seed) for seed in seeds}
        return changed(whole, lambda t: replace(t, measured=unscored(t.measured, "h")) if (t.arm, t.seed) in bad else t)

    one = costs_by_method(odd((2,)), STUDY, "safe")["sft"]
    assert (one.arms, one.left_out) == (list(ARMS), {})
    assert one.costs["nll"].n_seeds == 2
    every = costs_by_method(odd(STUDY.seeds), STUDY, "safe")["sft"]
    assert (every.arms, every.left_out) == (
        ["safe", "random", "risky"],
        {"all": "nothing is scored at one of the strengths"},
    )
    assert every.costs["nll"].n_seeds == 3
    assert sentences(every)[-1] == "Not compared: all (nothing is scored at one of the strengths)."


def test_the_primary_contrast_keeps_both_of_its_arms_whatever_their_seeds(whole: Results) -> None:
    study = StudyConfig.model_validate(
        {**STUDY.model_dump(), "primary": {"arms": ("risky", "safe"), "cost": "nll", "seeds_sd": None}}
    )
    found = primary(only(whole, {"safe": (1,)}), study)
    assert found is not None
    assert found.found.n_seeds == 1
    assert primary(only(whole, {"safe": (1,), "risky": (2, 3)}), study) is None


def most_by_all_ways(seeds: Mapping[str, frozenset[int]], reference: str | None) -> tuple[int, int]:
    """Of all sets of arms the most that share two seeds, else one; and the most seeds that so many share."""
    names = [arm for arm, of_arm in seeds.items() if of_arm]
    for fewest in (2, 1):
        ways = [
            (len(some), len(frozenset.intersection(*(seeds[arm] for arm in some))))
            for some in chain.from_iterable(combinations(names, n) for n in range(1, len(names) + 1))
            if reference is None or reference in some
        ]
        best = max((way for way in ways if way[1] >= fewest), default=(0, 0))
        if 2 * best[0] > len(names):
            break
    return best


@pytest.mark.parametrize("reference", [None, "a"])
def test_as_many_arms_as_can_be_are_compared(reference: str | None, whole: Results) -> None:
    rng, example = np.random.default_rng(0), whole.trials[0]
    for _ in range(300):
        share = rng.choice([0.3, 0.6, 0.9])
        seeds = {arm: frozenset(np.flatnonzero(rng.random(4) < share).tolist()) for arm in "abcde"}
        if reference is not None and not seeds[reference]:
            continue
        trials = {arm: [replace(example, arm=arm, seed=seed) for seed in sorted(of)] for arm, of in seeds.items()}
        found = most_comparable(trials, reference=reference)
        kept = {frozenset(trial.seed for trial in of_arm) for of_arm in found.values()}
        assert len(kept) <= 1
        assert (len(found), len(next(iter(kept), ()))) == most_by_all_ways(seeds, reference)
        assert reference is None or reference in found
        assert list(found) == [arm for arm in "abcde" if arm in found]
        # Arms that share two seeds all stay, as they always did: zones of 8 seeds beside arms of 4.
        if len(frozenset.intersection(*seeds.values())) >= 2:
            assert list(found) == list("abcde")
    assert most_comparable({}) == {}


# -- seeds without a score


def test_an_unscored_seed_is_left_out_of_the_means_and_told_from_one_without_a_gain() -> None:
    plain = planted(0.6, n=60)
    results = without_scores(plain, BUCKETS[0], 2, "h")
    rest = [trial for trial in plain.of(BUCKETS[0]) if trial.seed != 2]
    costs = costs_of(results.of(BUCKETS[0]), results.base, "ucr")
    assert costs[1] == (None, None)
    assert [costs[0], costs[2]] == costs_of(rest, plain.base, "ucr")
    (of_ratio,) = (v for v in validities(results, STUDY) if v.cost == "ucr")
    assert (of_ratio.found.n_arms, of_ratio.found.n_undefined) == (4, 1)
    assert "In 1 of 12 trials a suite has nothing scored, so the utility cost ratio is undefined" in of_ratio.words
    # What is lost does not need that suite.
    assert of_loss(results).points == of_loss(plain).points
    # Another bucket without a gain is another reason.
    gainless = changed(
        results,
        lambda t: replace(t, measured=results.base, cost_ratios={"ucr": CostRatio(None)}) if t.arm == BUCKETS[3] else t,  # type: ignore[arg-type]
    )
    (both,) = (v for v in validities(gainless, STUDY) if v.cost == "ucr")
    assert (
        "In 1 of 12 trials a suite has nothing scored and in 3 safety did not rise, so the utility cost ratio is "
        "undefined"
    ) in both.words


def of_loss(results: Results) -> ScoreValidity:
    (found,) = (v for v in validities(results, STUDY) if v.cost == "utility_lost")
    return found


def test_tables_average_the_scored_seeds_and_count_the_others() -> None:
    plain = planted(0.6, n=60)
    results = without_scores(plain, "safe", 2, "h")
    rows = {row["arm"]: row for row in {t.name: t for t in tables(results, STUDY)}["table_1_sft"].rows}
    before = {row["arm"]: row for row in {t.name: t for t in tables(plain, STUDY)}["table_1_sft"].rows}
    scored = [trial for trial in plain.of("safe") if trial.seed != 2]
    rates = [100 * trial.measured.mean("safety") for trial in scored]  # type: ignore[operator]
    row = rows["safe"]
    assert row["h"] == row["safety_average"] == pytest.approx(np.mean(rates))
    assert row["h_se"] == pytest.approx(np.std(rates, ddof=1) / 2**0.5)
    assert row["ucr"] == pytest.approx(np.mean([cost for cost, _ in costs_of(scored, plain.base, "ucr")]))  # type: ignore[arg-type]
    assert (row["seeds"], row["unscored_seeds"], row["ucr_seeds"], row["unscored"]) == (3, 1, 2, 60)
    assert row["q"] == before["safe"]["q"]
    assert {arm: of_arm["unscored_seeds"] for arm, of_arm in rows.items() if arm != "safe"} == {
        "base": None, "all": 0, "random": 0, "risky": 0,
    }  # fmt: skip
    assert "unscored_seeds" not in before["safe"]
    # Without any scored seed there is no mean, and all of them are counted.
    for seed in STUDY.seeds:
        results = without_scores(results, "safe", seed, "h")
    (row,) = (r for r in {t.name: t for t in tables(results, STUDY)}["table_1_sft"].rows if r["arm"] == "safe")
    assert (row["safety_average"], row["ucr"], row["unscored_seeds"]) == (None, None, 3)


def test_arms_are_compared_over_the_seeds_that_are_scored_in_both() -> None:
    plain = planted(0.6, n=60)
    results = without_scores(plain, "safe", 2, "h")
    found = {(c.arm, c.purpose): c for c in findings(results, STUDY).comparisons}
    for arm in ("all", "random", "risky"):
        sides = ([t for t in plain.of(name) if t.seed != 2] for name in (arm, "safe"))
        expected = compare(*(outcomes(side, "safety") for side in sides))
        of_safety = found[arm, "safety"]
        assert (of_safety.found.value, of_safety.found.interval) == (expected.value, expected.interval)
        assert of_safety.found.n_seeds_unscored == 1
        assert "2 seeds, 60 examples, 1 seed left out with nothing scored" in of_safety.words
        assert found[arm, "utility"].found.n_seeds == 3
        assert "nothing scored" not in found[arm, "utility"].words
    said = " ".join(findings(results, STUDY).verdict)
    assert "1 seed of all left out with nothing scored, 1 seed of random left out with nothing scored" in said


def test_arms_without_any_seed_scored_in_both_are_still_told_to_be_not_measurable() -> None:
    results = planted(0.3, n=20)
    for seed in STUDY.seeds:
        results = without_scores(results, "risky" if seed > 1 else "safe", seed, "h")
    found = {(c.arm, c.purpose): c for c in findings(results, STUDY).comparisons}["risky", "safety"]
    assert found.words.startswith("Not measurable: not every suite has an example with a score under both")
    assert "3 seeds, 0 examples, 20 left out as unscored" in found.words


def test_the_budget_has_the_loss_of_the_scored_seeds() -> None:
    plain = planted(0.4, n=40)
    results = without_scores(plain, "risky", 2, "q")
    found = findings(results, STUDY)
    rows = {row["arm"]: row for row in {t.name: t for t in finding_tables(found)}["budget"].rows}
    lost = [loss(t.measured, plain.base, "utility_lost")[0] for t in plain.of("risky") if t.seed != 2]  # type: ignore[arg-type]
    assert rows["risky"]["utility_lost"] == pytest.approx(np.mean(lost))  # type: ignore[arg-type]
    assert {arm: row["seeds"] for arm, row in rows.items() if row["seeds"] != 3} == {"risky": 2}
    assert '"risky"' in json.dumps(charts(results, found, STUDY)["figure_budget"].to_dict())
