"""What a study shows, from results made by hand: every number by another way, and what cannot be said."""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from fake_study import STUDY, conflict_map, in_nats, measured, outcomes_of, planted, trial

from castune.artifacts import ConflictMap
from castune.stats.comparisons import holm
from castune.stats.correlations import correlation
from castune.stats.estimates import CostRatio
from castune.study.figures import charts
from castune.study.findings import findings
from castune.study.realised_costs import costs_of, loss
from castune.study.tables import finding_tables, over_seeds, tables
from castune.study.trials import Measured, Results, Trial


def test_a_planted_effect_is_seen_and_its_absence_is_not() -> None:
    seen, unseen = findings(planted(0.6), STUDY), findings(planted(0.0), STUDY)
    (of_loss,) = (v for v in seen.validities if v.cost == "utility_lost")
    assert of_loss.found.of_means.pearson is not None
    assert of_loss.found.of_means.pearson > 0.9
    assert of_loss.found.retrained is not None
    assert of_loss.found.retrained.low > 0
    assert "higher utility lost" in of_loss.words
    by_arm = {c.arm: c for c in seen.comparisons if c.purpose == "utility"}
    assert by_arm["risky"].found.value is not None
    assert by_arm["risky"].found.value < -0.1
    assert "is lower under risky than under safe" in by_arm["risky"].words
    for comparison in unseen.comparisons:
        assert "No difference seen" in comparison.words, comparison.words
    (of_nothing,) = (v for v in unseen.validities if v.cost == "utility_lost")
    assert "No relation seen" in of_nothing.words


def test_comparisons_are_of_the_same_examples_under_both_arms() -> None:
    results = planted(0.3, n=50)
    for found in findings(results, STUDY).comparisons:
        first, safe = results.of(found.arm), results.of("safe")
        differences = [
            np.mean(
                [
                    a.measured.outcomes[suite][key] - b.measured.outcomes[suite][key]
                    for key in a.measured.outcomes[suite]
                ]
            )  # type: ignore[operator]
            for a, b in zip(first, safe, strict=True)
            for suite in (s.suite for s in a.measured.suites if s.purpose == found.purpose)
        ]
        assert found.found.value == pytest.approx(np.mean(differences))
        assert list(found.found.per_seed.values()) == pytest.approx(differences)


def without(results: Results, *lost: tuple[str, int]) -> Results:
    kept = tuple(t for t in results.trials if (t.arm, t.seed) not in lost)
    return Results(results.maps, results.base, kept, ("x",), {})


def test_arms_are_compared_over_the_seeds_that_both_have() -> None:
    results = planted(0.3, n=20)
    seeds = {c.arm: set(c.found.per_seed) for c in findings(without(results, ("all", 2)), STUDY).comparisons}
    assert seeds == {"all": {1, 3}, "random": {1, 2, 3}, "risky": {1, 2, 3}}
    of_safe = findings(without(results, ("safe", 2)), STUDY).comparisons
    assert {tuple(c.found.per_seed) for c in of_safe} == {(1, 3)}
    # An arm that was to be compared and is not there makes the others no surer.
    gone = findings(without(results, *(("all", seed) for seed in STUDY.seeds)), STUDY).comparisons
    assert {c.arm for c in gone} == {"random", "risky"}
    assert {c.found.n_comparisons for c in gone} == {6}


def test_all_comparisons_are_one_family_and_the_tax_is_among_the_sentences() -> None:
    cmap, generator, study = (
        conflict_map(),
        np.random.default_rng(0),
        STUDY.model_copy(update={"methods": ("sft", "pcgrad")}),
    )

    def anything() -> Measured:
        rates = {"q": "utility", "h": "safety", "x": "over-refusal"}
        return measured({name: (purpose, outcomes_of(0.5, 40, generator)) for name, purpose in rates.items()})

    trials = [
        replace(trial(cmap, arm, seed, anything()), arm=f"{arm}{suffix}")
        for suffix in ("", "+pcgrad") for arm in study.arms for seed in study.seeds
    ]  # fmt: skip
    found = findings(Results({"main": cmap}, anything(), tuple(trials), (), {}), study)
    assert len(found.comparisons) == 2 * 3 * 3
    assert {c.found.n_comparisons for c in found.comparisons} == {18}
    assert [c.found.p_adjusted for c in found.comparisons] == holm([c.found.p for c in found.comparisons])
    # A sentence a method and purpose where nothing is seen, with all arms and what their intervals hold together.
    assert sum("harmless prompts" in sentence for sentence in found.verdict) == 2
    utility = [c.found for c in found.comparisons if (c.method, c.purpose) == ("sft", "utility")]
    low, high = min(f.interval.low for f in utility), max(f.interval.high for f in utility)  # type: ignore[union-attr]
    assert found.verdict[0].startswith(
        "No difference seen at this n: utility accuracy, all, random, risky against safe: "
    )
    ends = f"95 % intervals from {100 * low:+.1f} to {100 * high:+.1f}; 3 seeds, 40 examples, 18 comparisons (Holm)."
    assert found.verdict[0].endswith(ends.replace("-", "−"))


def test_a_training_with_two_names_is_one() -> None:
    results = planted(0.4, n=40)
    # The riskiest of four buckets has the heads of the risky zone, and is not trained again.
    risky = {t.seed: t for t in results.of("risky")}
    twice = tuple(replace(risky[t.seed], arm=t.arm) if t.arm == "bucket-1-of-4" else t for t in results.trials)
    found = findings(Results(results.maps, results.base, twice, (), {}), STUDY)
    # all has other heads; safe is bucket 4, so 7 arms of the usual size are random, safe, risky and two buckets.
    assert {control.found.n for control in found.controls} == {5}
    assert found.budget is not None
    assert "risky" in found.budget.arms
    assert "bucket-1-of-4" not in found.budget.arms


def test_an_arm_has_one_cost_ratio_and_its_seeds_are_around_it() -> None:
    results = planted(0.6, n=100)
    found = findings(results, STUDY)
    (of_ratio,) = (v for v in found.validities if v.cost == "ucr")
    assert of_ratio.found.counts_examples
    table = {row["bucket"]: row for row in {t.name: t for t in tables(results, STUDY)}["table_7_buckets"].rows}
    for number, row in table.items():
        trials = results.of(f"bucket-{number}-of-4")
        lost = np.mean([loss(t.measured, results.base, "utility_lost")[0] for t in trials])  # type: ignore[arg-type]
        gained = np.mean([100 * (t.measured.mean("safety") - results.base.mean("safety")) for t in trials])  # type: ignore[operator, union-attr]
        costs = [p.cost for p in of_ratio.points if p.arm == f"bucket-{number}-of-4"]
        assert row["ucr"] == pytest.approx(max(0, lost / gained)) == pytest.approx(np.mean(costs))  # type: ignore[arg-type]
        assert row["ucr_se"] == pytest.approx(np.std(costs, ddof=1) / math.sqrt(3))  # type: ignore[arg-type]
    means = [
        np.mean([p.cost for p in of_ratio.points if p.arm == arm])
        for arm in dict.fromkeys(p.arm for p in of_ratio.points)
    ]  # type: ignore[arg-type]
    scores = [
        next(p.score for p in of_ratio.points if p.arm == arm) for arm in dict.fromkeys(p.arm for p in of_ratio.points)
    ]
    assert of_ratio.found.of_means.pearson == pytest.approx(correlation(scores, means).pearson)


def test_the_error_of_a_cost_ratio_over_examples_is_that_of_resampling_them() -> None:
    results, generator = planted(0.6, n=400), np.random.default_rng(3)
    one = results.of("risky")[:1]
    ((value, error),) = costs_of(one, results.base, "ucr")
    before, after = results.base, one[0].measured
    assert before is not None
    q, h = (
        np.array([list(side.outcomes[suite].values()) for side in (before, after)], dtype=float) for suite in ("q", "h")
    )
    drawn = []
    for _ in range(2000):
        at_q, at_h = generator.integers(0, 400, (2, 400))
        drawn.append((q[0, at_q] - q[1, at_q]).mean() / (h[1, at_h] - h[0, at_h]).mean())
    assert value == pytest.approx((q[0] - q[1]).mean() / (h[1] - h[0]).mean())
    assert error == pytest.approx(np.std(drawn), rel=0.1)


def test_table_9_has_the_recipes_own_share_and_the_others_once() -> None:
    results = planted(0.3, n=20)
    study = STUDY.model_copy(update={"shares": (25.0, 50.0)})
    cmap = results.maps["main"]
    more = [replace(t, arm="safe-25") for t in results.of("safe")]
    rows = {t.name: t for t in tables(Results({"main": cmap}, results.base, (*results.trials, *more), (), {}), study)}
    assert [row["arm"] for row in rows["table_9_budget"].rows] == ["base", "all", "risky", "safe", "safe-25"]


def test_table_8_is_the_correlation_of_table_7() -> None:
    results = planted(0.6, n=100)
    made = {table.name: table for table in tables(results, STUDY)}
    buckets = made["table_7_buckets"].rows
    for row in made["table_8_validity"].rows:
        if row["seed"] != "mean" or row["cost"] != "ucr":
            continue
        expected = correlation([b["mean_score"] for b in buckets], [b["ucr"] for b in buckets])
        assert (row["pearson"], row["spearman"], row["n"]) == (expected.pearson, expected.spearman, 4)


def test_undefined_costs_are_counted_and_never_zero() -> None:
    results = planted(0.6, n=60, gain=-0.1)
    no_gain = Results(
        results.maps, results.base,
        tuple(trial(results.maps["main"], t.arm, t.seed, t.measured, cost_ratios={"ucr": CostRatio(None)}) for t in results.trials), (), {},
    )  # fmt: skip
    found = findings(no_gain, STUDY)
    (of_ratio,) = (v for v in found.validities if v.cost == "ucr")
    assert of_ratio.found.n_undefined == of_ratio.found.n_trials == 12
    assert "Not measurable" in of_ratio.words
    for row in {t.name: t for t in tables(no_gain, STUDY)}["trials"].rows:
        assert row["ucr"] is None
    # A map without trained arms beside it is no reason to fail.
    assert findings(Results(results.maps, None, (), (), {}), STUDY).comparisons == ()
    assert findings(Results({}, None, (), (), {}), STUDY).verdict == []


def test_utility_lost_is_paired_and_leaves_out_what_is_unscored() -> None:
    before = measured({"q": ("utility", [1, 1, 0, None, 1]), "r": ("utility", [1, 0])})
    after = measured({"q": ("utility", [0, 1, 1, 1, None]), "r": ("utility", [0, 0])})
    lost, error = loss(after, before, "utility_lost")
    # q: +1, 0, -1 of three pairs; r: +1, 0 of two.
    assert lost == pytest.approx((0 + 50) / 2)
    assert error == pytest.approx(math.sqrt(100**2 / 3 + 5000 / 2) / 2)
    nothing = measured({"q": ("utility", [None])})
    assert loss(nothing, measured({"q": ("utility", [1])}), "utility_lost") == (None, None)
    assert costs_of(planted(0.1, n=5).trials[:1], None, "utility_lost") == [(None, None)]


def draw(cmap: ConflictMap, seed: int, selection_seed: int, found: Measured, **values: Any) -> Trial:
    """A random selection more, trained with a seed of the zones."""
    chosen = trial(cmap, "random", selection_seed, found, **values)
    return replace(chosen, seed=seed, is_draw=True)


def test_the_null_is_of_random_selections_beside_the_zone_with_their_seed() -> None:
    results = planted(0.3, n=40)
    draws = [
        draw(results.maps["main"], seed, 1000 + n, results.of("random")[n % 3].measured)
        for n, seed in enumerate([1, 2, 3, 1])
    ]
    more = replace(results, trials=(*results.trials, *draws))
    place = {(n.zone, n.cost): n.found for n in findings(more, STUDY).nulls}["safe", "utility_lost"]

    def cost(one: Trial) -> float:
        ((found, _),) = costs_of([one], results.base, "utility_lost")
        assert found is not None
        return found

    zone = {t.seed: cost(t) for t in results.of("safe")}
    beside = [*results.of("random"), *draws]
    assert (place.n, place.n_seeds, place.n_seeds_left_out) == (7, 3, 0)
    assert place.lower == sum(cost(one) < zone[one.seed] for one in beside)
    assert place.higher == sum(cost(one) > zone[one.seed] for one in beside)
    # The first seed has two draws and the arm random, the others one draw and the arm.
    assert place.p_least == 2 / (4 * 3 * 3)
    nulls = {t.name: t for t in finding_tables(findings(more, STUDY))}["nulls"].rows
    (row,) = (row for row in nulls if (row["zone"], row["cost"]) == ("safe", "utility_lost"))
    assert (row["seeds"], row["n"], row["p"], row["p_least"]) == (3, 7, place.p, place.p_least)
    # Draws are no seeds of an arm more, and their rows can be told from the arm's.
    made = {t.name: t for t in tables(more, STUDY)}
    assert {row["arm"]: row["seeds"] for row in made["table_1_sft"].rows}["random"] == 3
    of_random = [(row["seed"], row["selection_seed"]) for row in made["trials"].rows if row["arm"] == "random"]
    assert of_random == [(1, 1), (2, 2), (3, 3), (1, 1000), (2, 1001), (3, 1002), (1, 1003)]
    assert len({one.label for one in more.trials}) == len(more.trials)


def test_a_zone_that_gained_no_safety_is_the_dearest_with_that_seed_and_one_without_a_number_left_out() -> None:
    results = planted(0.3, n=40)
    ratios = {("safe", 1): {"ucr": CostRatio(None)}, ("safe", 2): {}}
    trials = tuple(replace(t, cost_ratios=ratios.get((t.arm, t.seed), t.cost_ratios)) for t in results.trials)
    place = {(n.zone, n.cost): n.found for n in findings(replace(results, trials=trials), STUDY).nulls}["safe", "ucr"]
    assert (place.n, place.n_seeds, place.n_seeds_gainless, place.n_seeds_left_out) == (2, 2, 1, 1)
    assert place.lower >= 1


# -- arms with seeds of their own


MORE_SEEDS = STUDY.model_copy(
    update={"arm_seeds": {"safe": (1, 2, 3, 4, 5), "all": (4, 3, 2), "bucket-1-of-4": (2, 3)}}
)


def unequal(effect: float = 0.4, *, strengths: Sequence[float] = ()) -> Results:
    """Arms with unequal seeds; the risky zone is trained once for two names, with the seeds of either."""
    results = in_nats(effect, n=60, strengths=strengths, seeds=MORE_SEEDS.main_seeds)
    kept = [
        replace(t, trained="risky" if t.arm == "bucket-1-of-4" else t.trained)
        for t in results.trials
        if t.seed in MORE_SEEDS.seeds_of(t.arm)
    ]
    return replace(results, trials=tuple(kept))


def test_tables_have_the_seeds_of_each_arm_and_comparisons_those_of_both() -> None:
    assert MORE_SEEDS.main_seeds == (1, 2, 3, 4, 5)
    results = unequal()
    found = findings(results, MORE_SEEDS)
    made = {t.name: t for t in [*tables(results, MORE_SEEDS), *finding_tables(found)]}
    counts = {row["arm"]: row["seeds"] for row in made["table_1_sft"].rows}
    assert counts == {"base": None, "all": 3, "random": 3, "safe": 5, "risky": 3}
    assert {c.arm: set(c.found.per_seed) for c in found.comparisons} == {
        "all": {2, 3, 4},
        "random": {1, 2, 3},
        "risky": {1, 2, 3},
    }
    assert [row["seeds"] for row in made["table_7_buckets"].rows] == [2, 3, 3, 3]


def test_scores_and_budgets_are_compared_over_the_seeds_that_all_their_arms_have() -> None:
    results = unequal()
    found = findings(results, MORE_SEEDS)
    for validity in found.validities:
        assert {point.seed for point in validity.points} == {2, 3}
        assert len(validity.points) == 8
    made = {t.name: t for t in [*tables(results, MORE_SEEDS), *finding_tables(found)]}
    assert {row["seed"] for row in made["table_8_validity"].rows} == {"mean", "2", "3"}
    assert found.budget is not None
    assert found.budget.n_seeds == 2
    assert {row["seeds"] for row in made["budget"].rows} == {2}
    lost = dict(zip(found.budget.arms, found.budget.lost, strict=True))
    of_safe = [loss(t.measured, results.base, "utility_lost")[0] for t in results.of("safe") if t.seed in (2, 3)]  # type: ignore[arg-type]
    assert lost["safe"] == pytest.approx(np.mean(of_safe))  # type: ignore[arg-type]
    # A training with two names is one, also with a seed that only its second name has.
    assert "bucket-1-of-4" not in lost
    drawn = charts(results, found, MORE_SEEDS)
    assert "figure_3_sft" in drawn
    for name, chart in drawn.items():
        if name.startswith(("figure_3", "figure_ucr_nll")):
            assert ", 2 seeds" in json.dumps(chart.to_dict())


def test_arms_are_equally_safe_and_zones_among_random_heads_over_the_seeds_that_they_have() -> None:
    found = findings(unequal(strengths=(0.5,)), MORE_SEEDS)
    assert found.equal_safety["sft"].costs["nll"].n_seeds == 2
    places = {n.zone: n.found for n in found.nulls if n.cost == "nll_added"}
    # A draw a seed, of those with seeds 1 to 3 alone.
    assert {zone: (place.n, place.n_seeds) for zone, place in places.items()} == {"safe": (3, 3), "risky": (3, 3)}


def test_arms_without_a_seed_in_common_are_not_compared() -> None:
    apart = STUDY.model_copy(update={"arm_seeds": {"safe": (7, 8), "bucket-2-of-4": (7, 8)}})
    results = in_nats(0.4, n=30, seeds=apart.main_seeds)
    results = replace(results, trials=tuple(t for t in results.trials if t.seed in apart.seeds_of(t.arm)))
    found = findings(results, apart)
    assert not found.comparisons
    assert not found.validities
    assert all(place.found.n == 0 for place in found.nulls if place.zone == "safe")
    assert found.budget is not None
    assert found.budget.arms == ()
    assert "figure_3_sft" not in charts(results, found, apart)
    rows = {row["arm"]: row["seeds"] for row in {t.name: t for t in tables(results, apart)}["table_1_sft"].rows}
    assert rows["safe"] == 2


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([1.0], (1.0, None)),
        ([1.0, 3.0], (2.0, 1.0)),
        ([1.0, None], (1.0, None)),
        ([1.0, None, 3.0], (2.0, 1.0)),
        ([None], (None, None)),
        ([], (None, None)),
    ],
)
def test_means_over_seeds(values: list[float | None], expected: tuple[float | None, float | None]) -> None:
    assert tuple(over_seeds("x", values).values()) == expected


def test_tables_are_read_back_from_csv_as_they_were() -> None:
    results = planted(0.6, n=30)
    found = findings(results, STUDY)
    for table in [*tables(results, STUDY), *finding_tables(found)]:
        rows = list(csv.DictReader(io.StringIO(table.to_csv())))
        assert len(rows) == len(table.rows)
        for row, expected in zip(rows, table.rows, strict=True):
            for key, value in expected.items():
                if isinstance(value, float):
                    assert float(row[key]) == pytest.approx(value, rel=1e-9)
                else:
                    assert row[key] == ("" if value is None else str(value))


def test_every_figure_is_made_and_none_of_what_is_not_there() -> None:
    results = planted(0.6, n=30)
    drawn = charts(results, findings(results, STUDY), STUDY)
    assert set(drawn) == {"figure_3_sft", "figure_6_ucr", "figure_utility_lost", "figure_7_map", "figure_budget"}
    for chart in drawn.values():
        chart.to_dict()
    assert charts(Results({}, None, (), (), {}), findings(Results({}, None, (), (), {}), STUDY), STUDY) == {}
    only_map = Results(results.maps, None, (), (), {})
    assert set(charts(only_map, findings(only_map, STUDY), STUDY)) == {"figure_7_map", "figure_budget"}


# -- continuous suites


NATS = ("nll_average", "ucr_nll", "ucr_nll_se", "ucr_nll_seeds")


def test_continuous_suites_are_compared_in_nats() -> None:
    results = in_nats(0.8)
    found = findings(results, STUDY)
    by_arm = {(c.arm, c.purpose): c for c in found.comparisons}
    assert [purpose for _, purpose in by_arm][::3] == ["utility", "safety", "nll", "kl"]
    assert len({c.found.n_comparisons for c in found.comparisons}) == 1
    of_nll = by_arm["risky", "nll"]
    expected = [
        np.mean([b - a for a, b in zip(safe.outcomes_of("said"), risky.outcomes_of("said"), strict=True)])  # type: ignore[operator]
        for safe, risky in zip(
            *([t.measured for t in results.of(arm)] for arm in ("safe", "risky")), strict=True
        )
    ]  # fmt: skip
    assert of_nll.found.value == pytest.approx(np.mean(expected))
    assert of_nll.words.startswith(
        f"The NLL of right answers is higher under risky than under safe: +{np.mean(expected):.3f} nats per token (95 % +"
    )
    assert "The KL from the base model is higher under risky than under safe" in by_arm["risky", "kl"].words
    rows = {(row["arm"], row["purpose"]): row for row in finding_tables(found)[0].rows}
    assert rows["risky", "nll"]["minus_safe"] == pytest.approx(np.mean(expected))
    assert of_nll.found.interval is not None
    assert rows["risky", "nll"]["interval_low"] == pytest.approx(of_nll.found.interval.low)
    assert rows["risky", "safety"]["minus_safe"] == pytest.approx(0, abs=1e-9)


def test_columns_in_nats_are_there_where_such_suites_were_measured_and_the_others_as_ever() -> None:
    plain = {t.name: t for t in tables(planted(0.3, n=20), STUDY)}
    # What readers of earlier studies' files rely on.
    assert plain["table_1_sft"].columns == [
        "calibration", "arm", "heads", "mean_conflict", "seeds", "q", "q_se", "h", "h_se", "general_average",
        "general_average_se", "safety_average", "safety_average_se", "over_refusal_average", "over_refusal_average_se",
        "unscored", "ucr", "ucr_se", "ucr_seeds", "mmlu_cr", "mmlu_cr_se", "mmlu_cr_seeds",
    ]  # fmt: skip
    assert not plain["table_1_sft"].nats
    results = in_nats(0.8)
    made = {t.name: t for t in tables(results, STUDY)}["table_1_sft"]
    new = [column for column in made.columns if column not in plain["table_1_sft"].columns]
    assert {*NATS, "kl_average", "said", "own"} <= set(new)
    assert made.nats == {"said", "own", "nll_average", "kl_average"}
    rows = {row["arm"]: row for row in made.rows}
    assert results.base is not None
    assert rows["base"]["nll_average"] == rows["base"]["said"] == pytest.approx(results.base.rate("said"))
    values = [trial.measured.rate("said") for trial in results.of("safe")]
    assert rows["safe"]["said"] == rows["safe"]["nll_average"] == pytest.approx(np.mean(values))  # type: ignore[arg-type]
    assert rows["safe"]["said_se"] == pytest.approx(np.std(values, ddof=1) / math.sqrt(3))  # type: ignore[arg-type]
    assert rows["safe"]["h"] == pytest.approx(50, abs=1), "a rate, in per cent"


def test_costs_in_nats_take_part_wherever_costs_do() -> None:
    results = in_nats(0.8)
    found = findings(results, STUDY)
    costs = ["ucr", "utility_lost", "ucr_nll", "nll_added", "kl"]
    assert [v.cost for v in found.validities] == costs
    assert {control.cost for control in found.controls} == {null.cost for null in found.nulls} == set(costs)
    by_cost = {v.cost: v for v in found.validities}
    for cost in ("ucr_nll", "nll_added", "kl"):
        assert by_cost[cost].found.of_means.pearson == pytest.approx(1, abs=0.02)
        assert f"of {len(costs)} comparisons (Holm)" in by_cost[cost].words
        assert by_cost[cost].found.counts_examples
    assert "higher NLL added" in by_cost["nll_added"].words
    assert {row["cost"] for row in {t.name: t for t in tables(results, STUDY)}["table_8_validity"].rows} >= {"ucr_nll"}
    drawn = charts(results, found, STUDY)
    of_nats = {"figure_3_sft_nll", "figure_3_sft_kl", "figure_ucr_nll", "figure_nll_added", "figure_kl"}
    assert of_nats <= set(drawn)
    for name in of_nats:
        drawn[name].to_dict()
    # What was not measured is no cost that is undefined.
    assert {v.cost for v in findings(planted(0.3, n=20), STUDY).validities} == {"ucr", "utility_lost"}


def test_the_cost_ratio_in_nats_is_nats_added_over_the_share_of_refusals_gained() -> None:
    results, generator = in_nats(0.8, n=300), np.random.default_rng(5)
    one = results.of("risky")[:1]
    before, after = results.base, one[0].measured
    assert before is not None
    said, refused = (np.array([side.outcomes_of(suite) for side in (before, after)]) for suite in ("said", "h"))
    ((value, error),) = costs_of(one, before, "ucr_nll")
    assert value == pytest.approx((said[1] - said[0]).mean() / (refused[1] - refused[0]).mean())
    drawn = []
    for _ in range(2000):
        n, m = generator.integers(0, 300, (2, 300))
        drawn.append((said[1, n] - said[0, n]).mean() / (refused[1, m] - refused[0, m]).mean())
    assert error == pytest.approx(np.std(drawn), rel=0.1)
    ((added, its_error),) = costs_of(one, before, "nll_added")
    assert added == pytest.approx((said[1] - said[0]).mean())
    assert its_error == pytest.approx((said[1] - said[0]).std(ddof=1) / math.sqrt(300))
    (of_arm,) = (
        row for row in {t.name: t for t in tables(results, STUDY)}["table_1_sft"].rows if row["arm"] == "risky"
    )
    costs = [cost for cost, _ in costs_of(results.of("risky"), before, "ucr_nll")]
    assert of_arm["ucr_nll"] == pytest.approx(np.mean(costs))  # type: ignore[arg-type]
    gainless = in_nats(0.8, n=40, gain=-0.05)
    assert costs_of(gainless.of("risky"), gainless.base, "ucr_nll") == [(None, None)] * 3
    (null,) = (n for n in findings(gainless, STUDY).nulls if (n.zone, n.cost) == ("safe", "ucr_nll"))
    assert null.found.n_gainless == 3


def test_arms_that_were_measured_at_several_strengths_are_compared_at_equal_safety() -> None:
    assert findings(in_nats(0.8, n=30), STUDY).equal_safety == {}
    results = in_nats(0.8, n=60, strengths=(0.5,))
    found = findings(results, STUDY)
    costs = found.equal_safety["sft"]
    assert costs.arms == ["safe", "all", "random", "risky"]
    of_nll = costs.costs["nll"]
    assert of_nll.n_seeds == 3
    # Refusals and costs rise in proportion to strength: the price is the share of full strength that is needed.
    for arm in costs.arms:
        full = np.mean([loss(t.measured, results.base, "nll_added")[0] for t in results.of(arm)])  # type: ignore[arg-type]
        assert of_nll.arms[arm].value == pytest.approx(0.8 * full, rel=0.05)
    assert found.verdict[0].startswith("Refusals on harmful prompts went from 10.0")
    assert any(
        re.search("arm safe costs less than arms? [^;]*risky[^;]* in [^;]*NLL of right answers", sentence)
        for sentence in found.verdict[:3]
    )
    rows = {(r["cost"], r["arm"]): r for r in {t.name: t for t in finding_tables(found)}["equal_safety"].rows}
    assert rows["nll", "risky"]["value"] == pytest.approx(of_nll.arms["risky"].value)
    assert rows["utility", "risky"]["value"] == pytest.approx(0, abs=1e-9)
    assert rows["nll", "risky"]["first_minus_arm"] == pytest.approx(of_nll.differences["safe", "risky"].value)
    assert rows["nll", "risky"]["safety"] == pytest.approx(100 * costs.target)  # type: ignore[operator]
    assert {f"figure_equal_safety_{cost}_sft" for cost in ("nll", "kl", "utility")} <= set(
        charts(results, found, STUDY)
    )
    # An arm with a seed less is compared over those that all have, one without further strengths not at all.
    kept = without(results, ("all", 2)).trials
    fewer = Results(
        results.maps, results.base,
        tuple(replace(t, strengths={}) if t.arm == "random" else t for t in kept), (), {},
    )  # fmt: skip
    costs = findings(fewer, STUDY).equal_safety["sft"]
    assert (costs.arms, list(costs.left_out)) == (["safe", "all", "risky"], ["random"])
    assert costs.costs["nll"].n_seeds == 2
