"""What a study costs: the cost of its recipes, unit by unit of its graph."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from castune.config import SelectConfig
from castune.names import ArmName
from castune.plan import makespan
from castune.plan.diagnosis import Stage, plan_diagnosis
from castune.plan.recipe import RecipeCost, recipe_cost
from castune.plan.stand_ins import DataOrStandIns
from castune.study.graph import MAIN, Graph, Unit
from castune.tuning.snapshots import snapshot_steps


@dataclass(frozen=True)
class StudyCost:
    """Cost of a study.

    Attributes:
        units: the graph's, with seconds on one device.
        work: of all units of a stage.
        diagnosis_hours: of the main map, on one device.
        notes: what the user should know.
    """

    units: Sequence[makespan.Unit]
    work: Mapping[str, Stage]
    diagnosis_hours: float
    notes: Sequence[str]

    def hours(self, n_devices: int) -> float:
        """Hours on so many devices; each does a unit at a time, and they share diagnoses."""
        return makespan.makespan(self.units, n_devices) / 3600

    def rows(self) -> list[dict[str, Any]]:
        """A row a stage."""
        counts: dict[str, int] = {}
        for unit in self.units:
            stage = unit.name.partition(" ")[0]
            counts[stage] = counts.get(stage, 0) + 1
        return [
            {
                "stage": name,
                "units": counts[name],
                "forwards": f"{stage.forwards:,}",
                "tokens": f"{stage.tokens:,}",
                "decoded": f"{stage.step_tokens:,}",
                "hours on one device": (stage.seconds or 0.0) / 3600,
            }
            for name, stage in self.work.items()
            if name in counts
        ]


def study_cost(graph: Graph, *, accelerator: str | None = None) -> StudyCost:
    """What a study costs, from configs alone; see `recipe_cost`. Judging is not counted."""
    main = _cost(graph, MAIN, accelerator)
    of_map = {name: main if name == MAIN else _of_calibration(graph, name, main, accelerator) for name in graph.maps}
    calibration_of = {recipe.out: name for name, recipe in graph.maps.items()}
    evaluation = main.evaluation
    units, work = [], dict.fromkeys(("diagnose", "tune", "evaluate", "drift"), Stage(seconds=0.0))
    names = {unit.name for unit in graph.units if unit.stage != "judge"}
    for unit in graph.units:
        if unit.stage == "judge":
            continue
        cost = of_map[calibration_of[str(unit.map_folder)]]
        done = _of_unit(unit, cost, evaluation)
        stage = unit.name.partition(" ")[0]
        work[stage] = _sum(work[stage], done)
        needs = tuple(name for name in unit.needs if name in names)
        units.append(makespan.Unit(unit.name, done.seconds or 0.0, needs, is_divisible=unit.stage == "diagnose"))
    notes = list(dict.fromkeys(note for cost in of_map.values() for note in cost.notes))
    return StudyCost(units, work, main.diagnosis_seconds / 3600, notes)


def _cost(graph: Graph, calibration: str, accelerator: str | None) -> RecipeCost:
    """The cost of a map and of all arms that any of its runs trains."""
    arms = dict.fromkeys(arm for run in graph.runs if run.calibration == calibration for arm in run.trained)
    select = SelectConfig(zone="all", fraction=1.0, compare=tuple(arm for arm in arms if arm != "all"), seed=0)
    return recipe_cost(graph.maps[calibration].model_copy(update={"select": select}), accelerator=accelerator)


def _of_calibration(graph: Graph, name: str, main: RecipeCost, accelerator: str | None) -> RecipeCost:
    """The cost of another map: its trainings cost what the main map's do, where no utility data take part in them."""
    arms = [ArmName.parse(arm) for run in graph.runs if run.calibration == name for arm in run.trained]
    if any(arm.changes for arm in arms):
        return _cost(graph, name, accelerator)
    recipe, read = graph.maps[name], DataOrStandIns()
    diagnosis, notes = plan_diagnosis(recipe, accelerator=accelerator, read=read)
    return replace(main, diagnosis=diagnosis, measure=recipe.diagnose.measure, notes=[*notes, *read.notes])


def _of_unit(unit: Unit, cost: RecipeCost, evaluation: Stage) -> Stage:
    if unit.stage == "diagnose":
        return _diagnosis(cost)
    if unit.stage == "tune":
        assert unit.arm is not None
        arm = cost.arms.get(unit.arm, cost.arms["main"])
        return Stage(**{**vars(arm.training.stage), "seconds": arm.seconds})
    if unit.stage == "drift":
        assert unit.arm is not None
        n_maps = len(snapshot_steps(unit.recipe.tune, cost.arms[unit.arm].training.steps)) + 1
        one = _diagnosis(cost)
        return Stage(**{name: value * n_maps for name, value in vars(one).items()})
    return evaluation


def _diagnosis(cost: RecipeCost) -> Stage:
    parts = cost.diagnosis.parts(cost.measure).values()
    total = sum(parts, Stage())
    return Stage(**{**vars(total), "seconds": cost.diagnosis_seconds})


def _sum(one: Stage, other: Stage) -> Stage:
    return Stage(**{**vars(one + other), "seconds": (one.seconds or 0.0) + (other.seconds or 0.0)})
