"""Studies made by hand: trials with planted costs, as `read_results` would have read them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from castune.artifacts import ConflictMap, HeadSelection, SuiteResult
from castune.artifacts.conflict_map import SCHEMA
from castune.config import StudyConfig
from castune.selection import select
from castune.stats.estimates import CostRatio
from castune.study.realised_costs import loss
from castune.study.trials import Measured, Results, Trial, mean_scores

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
    given = {"cost_ratios": {}, **values}
    return Trial(
        calibration="main", arm=arm, trained=arm, seed=seed, is_draw=False, selection=selection,
        scores=mean_scores(cmap, selection.units), depth=float(np.mean([layer for layer, _ in selection.heads])),
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
            lost, _ = loss(after, base, "utility_lost")
            before, now = base.mean("safety"), after.mean("safety")
            assert lost is not None
            assert before is not None
            assert now is not None
            ratio = CostRatio(max(0.0, lost / 100 / (now - before)) if now > before else None)
            trials.append(trial(cmap, arm, seed, after, cost_ratios={"ucr": ratio}))
    return Results({"main": cmap}, base, tuple(trials), (), {"judge": "prefix"})


def in_nats(
    effect: float,
    *,
    n: int = 120,
    gain: float = 0.4,
    strengths: Sequence[float] = (),
    seeds: Sequence[int] = STUDY.seeds,
    buckets: int = 4,
    gain_of_buckets: float | None = None,
    gains: Mapping[tuple[str, int], float] | None = None,
) -> Results:
    """A study in which an arm adds `effect` nats to every answer for each unit of its mean C, and loses no accuracy.

    Half-strong adapters refuse and cost half as much. Buckets, and the trainings in `gains` (arm and seed), gain as much
    safety as other arms unless told otherwise.
    """
    cmap, rng = conflict_map(), np.random.default_rng(2)
    right, start, threshold = outcomes_of(0.9, n, rng), rng.gamma(2, 1, n), (np.arange(n) + 0.5) / n
    more = {"said": "nll", "own": "kl"}

    def at(strength: float, cost: float, gain: float = gain) -> Measured:
        noise = 0.02 * strength * rng.standard_normal((2, n))
        refused = (threshold < 0.1 + gain * strength).astype(float).tolist()
        values = {"said": start + strength * cost + noise[0], "own": np.abs(strength * cost / 2 + noise[1])}
        continuous = {name: (purpose, values[name].tolist()) for name, purpose in more.items()}
        return measured({"q": ("utility", right), "h": ("safety", refused), **continuous})

    base = at(0, 0)
    trials = []
    for seed in seeds:
        for arm in (*STUDY.arms, *(f"bucket-{i}-of-{buckets}" for i in range(1, buckets + 1))):
            cost = effect * trial(cmap, arm, seed, base).scores["conflict"]
            of_arm = gain if gain_of_buckets is None or not arm.startswith("bucket") else gain_of_buckets
            of_arm = (gains or {}).get((arm, seed), of_arm)
            after = at(1, cost, of_arm)
            lost, _ = loss(after, base, "nll_added")
            assert lost is not None
            ratios = {"ucr": CostRatio(0.0), "ucr_nll": CostRatio(max(0.0, lost / gain) if gain > 0 else None)}
            beside = {strength: at(strength, cost, of_arm) for strength in strengths}
            trials.append(trial(cmap, arm, seed, after, cost_ratios=ratios, strengths=beside))
    return Results({"main": cmap}, base, tuple(trials), (), {"judge": "prefix"})
