"""Units of a map by attribution that are measured exactly as well, on some of the examples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from castune.artifacts import Unit
from castune.core.generation import Reply
from castune.core.journal import Journal
from castune.core.shards import Shard
from castune.diagnosis.ablator import distinct
from castune.diagnosis.fidelity import units_to_check
from castune.diagnosis.grams import Gram
from castune.diagnosis.objectives import Measured, Objectives
from castune.diagnosis.score import Floats, conflict_from_gram, conflict_score, functional_sensitivity, margin_shift
from castune.diagnosis.sweep import Outcomes, sweep
from castune.diagnosis.task import Task


@dataclass(frozen=True)
class Checked:
    """What was measured exactly beside a map by attribution.

    Attributes:
        units: which units.
        measured_as: for every unit of the map, the one that is ablated in its place (`distinct`).
        examples: numbers of the examples that they were measured on, by objective.
        outcomes: by objective, a row a unit.
    """

    units: Sequence[Unit]
    measured_as: Mapping[Unit, Unit]
    examples: Mapping[str, Sequence[int]]
    outcomes: Mapping[str, Outcomes]

    def holds(self, one: Unit) -> bool:
        """Whether a unit of the map was measured exactly."""
        return self.measured_as[one] in self.units

    def mixed(self, objective: str, units: Sequence[Unit], attributed: Outcomes) -> tuple[Outcomes, Outcomes]:
        """Outcomes of all units on the checked examples: by attribution, and exact where that is known."""
        numbers = list(self.examples[objective])
        estimated = replace(
            attributed, baseline_N=attributed.baseline_N[numbers], ablated_HN=attributed.ablated_HN[:, numbers]
        )
        exact, row_of = self.outcomes[objective], {one: row for row, one in enumerate(self.units)}
        ablated_HN = estimated.ablated_HN.copy()
        for number, one in enumerate(units):
            row = row_of.get(self.measured_as[one])
            if row is not None:
                # Their change, put to the attribution's own baseline: batches round otherwise.
                change_N = exact.ablated_HN[row] - exact.baseline_N
                ablated_HN[number] = estimated.baseline_N + change_N
        return estimated, replace(estimated, ablated_HN=ablated_HN)


def check_units(
    task: Task,
    objectives: Objectives,
    measured: Mapping[str, Measured],
    grams: Mapping[str, Gram],
    replies: Sequence[Reply],
    journal: Journal,
    shard: Shard,
) -> Checked | None:
    """Measure some units of an attribution exactly, spread over depth and score; None while other shares are missing.

    Args:
        task: what is measured.
        objectives: as it was attributed.
        measured: the attribution, by objective, a row a swept unit.
        grams: inner products of gradients, a row a unit of the task.
        replies: the model's own to D_safe.
        journal: where results go.
        shard: which share of the work is this process's.
    """
    # Separate jobs do not wait for each other: the last of them does it alone.
    shard = shard if shard.together else Shard()
    swept = objectives.ablator.heads
    config = task.config.model_copy(update={"measure": "margin"})
    chosen: list[Unit] = []
    for kind in dict.fromkeys(one.kind for one in swept):
        numbers = [i for i, one in enumerate(swept) if one.kind == kind]
        units = [swept[i] for i in numbers]
        score_H = _rough_scores(task, measured, grams, units, numbers)
        chosen += [units[i] for i in units_to_check(units, score_H, task.config.check_units)]
    exact = replace(objectives, ablator=task.ablator(chosen), config=config)
    examples, outcomes = {}, {}
    for objective, found in measured.items():
        n = len(found.outcomes.baseline_N)
        picked = examples[objective] = spread(n, task.config.check_examples)
        if objective == "safety":
            asked = [task.examples["safety"][i] for i in picked]
            measure = exact.margin_measure(asked, [replies[i] for i in picked])
        elif next(one for one in task.sets if one.objective == objective).measure(config) == "decision":
            # Measured exactly already, with every unit.
            rows = [swept.index(one) for one in chosen]
            outcomes[objective] = Outcomes(
                found.outcomes.baseline_N[picked], found.outcomes.ablated_HN[np.ix_(rows, picked)]
            )
            continue
        else:
            measure = exact.utility_measure([task.examples[objective][i] for i in picked])
        swept_exactly = sweep(f"exact {objective}", exact.ablator, measure, journal=journal, shard=shard)
        if swept_exactly is None:
            return None
        outcomes[objective] = swept_exactly
    _, twins = distinct(task.layout, task.units)
    measured_as = {one: swept[twin] for one, twin in zip(task.units, twins, strict=True)}
    return Checked(chosen, measured_as, examples, outcomes)


def _rough_scores(
    task: Task,
    measured: Mapping[str, Measured],
    grams: Mapping[str, Gram],
    units: Sequence[Unit],
    numbers: Sequence[int],
) -> Floats:
    """C of some swept units on the first utility set, to spread the checked ones over it."""
    first = task.sets[0].objective
    shifts = []
    for objective in (first, "safety"):
        outcomes = measured[objective].outcomes
        shift_H, _ = margin_shift(outcomes.ablated_HN[list(numbers)], outcomes.baseline_N)
        shifts.append(np.nan_to_num(shift_H))
    rows = [task.units.index(one) for one in units]
    conflict_H = conflict_from_gram(grams[first].products_HCC[rows], grams[first].n_safety)
    return conflict_score(conflict_H, functional_sensitivity(*shifts, rank=task.config.sensitivity_rank))


def spread(n: int, wanted: int) -> list[int]:
    """Numbers of `wanted` of n examples, evenly spread: sets may be sorted by kind."""
    wanted = min(n, wanted)
    return [(2 * k + 1) * n // (2 * wanted) for k in range(wanted)]
