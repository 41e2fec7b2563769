"""Exact where it matters: units whose place inside or outside the safe zone an attribution leaves open.

Shape letters: H unit (all units of a kind in one axis), N example.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from castune.artifacts import Unit
from castune.config import DiagnoseConfig
from castune.core.generation import Reply
from castune.core.journal import Journal
from castune.core.shards import Shard
from castune.diagnosis.maps import Results
from castune.diagnosis.objectives import Measured, Objectives
from castune.diagnosis.score import Floats
from castune.diagnosis.sweep import sweep
from castune.diagnosis.task import Task
from castune.diagnosis.zones import safe_border
from castune.names import kind_words

logger = logging.getLogger(__name__)

# Scores are ranks: a unit that is measured moves others. Few rounds need more than three.
_MOST_ROUNDS = 8


def verified(
    task: Task, objectives: Objectives, results: Results, replies: Sequence[Reply], journal: Journal, shard: Shard
) -> Results:
    """The results with units near the border of the safe zone (the quarter of lowest C) measured exactly.

    Round by round, the nearest first, until all are settled or `verify_units` of a kind are measured.

    Args:
        task: what is measured.
        objectives: as it was attributed.
        results: of the attribution, with what was checked.
        replies: the model's own to D_safe.
        journal: where results go.
        shard: which share of the work is this process's.
    """
    shard = shard if shard.together else Shard()
    found = replace(results, attribution=results)
    for kind in dict.fromkeys(one.kind for one in results.heads):
        left = task.config.verify_units
        for number in range(_MOST_ROUNDS):
            todo = _undecided(found.of_kind(kind), task.config)[:left]
            if not todo:
                break
            name = f"{kind_words(kind)}, round {number + 1}"
            found = _measured_exactly(task, objectives, found, todo, name, replies, journal, shard)
            left -= len(todo)
    return found


def _undecided(results: Results, config: DiagnoseConfig) -> list[Unit]:
    """Units of a kind that are to be measured, the nearest to the border first."""
    measurements = results.measurements(list(results.utility), config)
    score_H = measurements.columns(measurements.whole)["conflict_score"][0]
    distance_H = np.abs(score_H - safe_border(score_H))
    near = [int(i) for i in np.argsort(distance_H, kind="stable") if distance_H[i] < results.unsettled(config)]
    return [results.heads[i] for i in near if results.heads[i] not in results.exact]


def _measured_exactly(
    task: Task,
    objectives: Objectives,
    results: Results,
    units: Sequence[Unit],
    name: str,
    replies: Sequence[Reply],
    journal: Journal,
    shard: Shard,
) -> Results:
    logger.info("%d units near the border of the safe zone are measured exactly", len(units))
    config = task.config.model_copy(update={"measure": "margin"})
    exact = replace(objectives, ablator=task.ablator(list(units)), config=config)
    utility = dict(results.utility)
    for one in task.sets:
        if one.measure(config) == "margin":
            measure = exact.utility_measure(one.examples)
            outcomes = sweep(f"{one.objective}, {name}", exact.ablator, measure, journal=journal, shard=shard)
            assert outcomes is not None
            change_HN = outcomes.ablated_HN - outcomes.baseline_N
            utility[one.objective] = _replaced(results.utility[one.objective], results.heads, units, change_HN)
    measure = exact.margin_measure(task.examples["safety"], replies)
    outcomes = sweep(f"safety, {name}", exact.ablator, measure, journal=journal, shard=shard)
    assert outcomes is not None
    safety = _replaced(results.safety, results.heads, units, outcomes.ablated_HN - outcomes.baseline_N)
    return replace(results, utility=utility, safety=safety, exact=results.exact | set(units))


def _replaced(measured: Measured, heads: Sequence[Unit], units: Sequence[Unit], change_HN: Floats) -> Measured:
    ablated_HN = measured.outcomes.ablated_HN.copy()
    for one, change_N in zip(units, change_HN, strict=True):
        # Put to the attribution's own baseline: batches round otherwise.
        ablated_HN[heads.index(one)] = measured.outcomes.baseline_N + change_N
    return replace(measured, outcomes=replace(measured.outcomes, ablated_HN=ablated_HN))
