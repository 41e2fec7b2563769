"""What a study shows, from results made by hand: every number by another way, and what cannot be said."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from castune.artifacts import ConflictMap, HeadSelection, SuiteResult
from castune.artifacts.conflict_map import SCHEMA
from castune.config import StudyConfig
from castune.evaluate.stats import CostRatio, correlation
from castune.select import select
from castune.study.figures import charts
from castune.study.findings import cost_of, findings
from castune.study.tables import finding_tables, over_seeds, tables
from castune.study.trials import Measured, Results, Trial, mean_scores, utility_lost

N_LAYERS, N_HEADS = 6, 4
STUDY = StudyConfig(
    arms=("all", "random", "safe", "risky"), methods=("sft",), seeds=(1, 2, 3), scores=("conflict",), shares=()
)


def conflict_map(seed: int = 0) -> ConflictMap:
    generator = np.random.default_rng(seed)
    n = N_LAYERS * N_HEADS
    columns: dict[str, Any] = {name: generator.random(n) for name in SCHEMA.names}
    columns["conflict_score_low"] = columns["conflict_score"] - 0.01
    columns["conflict_score_high"] = columns["conflict_score"] + 0.01
    columns |= {
        "unit": ["q_head"] * n,
        "layer": np.repeat(range(N_LAYERS), N_HEADS),
        "head": np.tile(range(N_HEADS), N_LAYERS),
        "bucket": np.ones(n),
    }
    table = pa.table({name: pa.array(columns[name]) for name in SCHEMA.names}).cast(SCHEMA)
    return ConflictMap(table, {"model": {"fingerprint": "f"}, "settings": {"measure": "margin"}})


def measured(suites: Mapping[str, tuple[str, Sequence[float | None]]]) -> Measured:
    """An evaluation of suites `{name: (purpose, outcomes)}`."""
    results, outcomes = [], {}
    for name, (purpose, values) in suites.items():
        scored = [value for value in values if value is not None]
        results.append(
            SuiteResult(
                suite=name, purpose=purpose, metric="rate", value=sum(scored) / len(scored) if scored else None,
                standard_error=None, n=len(scored), unscored=len(values) - len(scored), judge="prefix",
                max_new_tokens=None, extra={}, data_hash="h", seconds=0.0,
            )
        )  # fmt: skip
        outcomes[name] = {f"{n:04d}": value for n, value in enumerate(values)}
    return Measured(tuple(results), outcomes)


def trial(cmap: ConflictMap, arm: str, seed: int, found: Measured, **values: Any) -> Trial:
    zone, _, rest = arm.partition("-")
    if zone == "bucket":
        number, _, buckets = rest.split("-")
        selection: HeadSelection = select(cmap, buckets=int(buckets), bucket=int(number))
    else:
        selection = select(cmap, zone=zone, seed=seed)
    given = {"cost_ratio": None, "mmlu_cost_ratio": None, **values}
    return Trial(
        calibration="main", arm=arm, trained=arm, seed=seed, is_draw=False, selection=selection,
        scores=mean_scores(cmap, selection.all_units), depth=float(np.mean([layer for layer, _ in selection.heads])),
        measured=found, **given,
    )  # fmt: skip


def outcomes_of(rate: float, n: int, generator: np.random.Generator) -> list[float]:
    return (generator.random(n) < rate).astype(float).tolist()


def planted(effect: float, *, n: int = 400, gain: float = 0.4) -> Results:
    """A study in which an arm loses `effect` of utility for each unit of its mean C."""
    cmap, generator = conflict_map(), np.random.default_rng(1)
    base = measured({"q": ("utility", outcomes_of(0.9, n, generator)), "h": ("safety", outcomes_of(0.1, n, generator))})
    trials = []
    arms = [*STUDY.arms, *(f"bucket-{i}-of-4" for i in range(1, 5))]
    for seed in STUDY.seeds:
        for arm in arms:
            made = trial(cmap, arm, seed, base)
            rate = 0.9 - effect * made.scores["conflict"]
            after = measured(
                {
                    "q": ("utility", outcomes_of(rate, n, generator)),
                    "h": ("safety", outcomes_of(0.1 + gain, n, generator)),
                }
            )
            lost, _ = utility_lost(after, base)
            before, now = base.mean("safety"), after.mean("safety")
            assert lost is not None
            assert before is not None
            assert now is not None
            ratio = CostRatio(max(0.0, lost / 100 / (now - before)) if now > before else None)
            trials.append(trial(cmap, arm, seed, after, cost_ratio=ratio))
    return Results({"main": cmap}, base, tuple(trials), (), {"judge": "prefix"})


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


def test_an_arm_that_lacks_a_seed_is_not_compared() -> None:
    results = planted(0.3, n=20)
    fewer = Results(
        results.maps, results.base, tuple(t for t in results.trials if (t.arm, t.seed) != ("all", 2)), ("x",), {}
    )
    assert {c.arm for c in findings(fewer, STUDY).comparisons} == {"random", "risky"}


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
    results = planted(0.6, n=60, gain=0.0)
    no_gain = Results(
        results.maps, results.base,
        tuple(trial(results.maps["main"], t.arm, t.seed, t.measured, cost_ratio=CostRatio(None)) for t in results.trials), (), {},
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
    lost, error = utility_lost(after, before)
    # q: +1, 0, -1 of three pairs; r: +1, 0 of two.
    assert lost == pytest.approx((0 + 50) / 2)
    assert error == pytest.approx(math.sqrt(100**2 / 3 + 5000 / 2) / 2)
    assert utility_lost(measured({"q": ("utility", [None])}), measured({"q": ("utility", [1])})) == (None, None)
    assert cost_of(planted(0.1, n=5).trials[0], None, "utility_lost") == (None, None)


def test_the_null_is_of_random_selections_with_one_training_each() -> None:
    results = planted(0.3, n=40)
    found = {(n.zone, n.cost): n.found for n in findings(results, STUDY).nulls}
    draws = [cost_of(t, results.base, "utility_lost")[0] for t in results.of("random")]
    safe = next(t for t in results.of("safe") if t.seed == 1)
    cost, _ = cost_of(safe, results.base, "utility_lost")
    place = found["safe", "utility_lost"]
    assert place.n == 3
    assert place.lower == sum(draw < cost for draw in draws)  # type: ignore[operator]


@pytest.mark.parametrize(
    ("values", "expected"),
    [([1.0], (1.0, None)), ([1.0, 3.0], (2.0, 1.0)), ([1.0, None], (None, None)), ([], (None, None))],
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
