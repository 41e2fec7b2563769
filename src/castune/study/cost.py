"""What a study costs, unit by unit of its graph, from configs alone. Data that are not here are stood in for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from castune.config import TuneConfig
from castune.core.numbers import duration, gigabytes
from castune.data.example import Example
from castune.evaluation.suites import load_suites
from castune.names import ArmName
from castune.plan import makespan
from castune.plan.planner import DiagnosisCost, Planner, TrainingCost
from castune.plan.shape import ModelShape
from castune.plan.stand_ins import DataOrStandIns
from castune.plan.work import Cost
from castune.steps.inputs import load_calibration, load_data
from castune.study.graph import MAIN, Graph, WorkUnit
from castune.tuning.snapshots import snapshot_steps

# What the paper's diagnosis takes a head on an H800 (Appendix F.5, 100 examples): utility, and safety.
PAPER_HEAD_SECONDS = 7 + 60


def paper_seconds(n_heads: int) -> float:
    """Seconds of a diagnosis of so many heads as the paper does it: 19.1 hours for Llama-3.1-8B's 1,024."""
    return float(n_heads * PAPER_HEAD_SECONDS)


@dataclass(frozen=True)
class StudyCost:
    """Cost of a study.

    Attributes:
        shape: of the model.
        units: the graph's, with seconds on one device.
        costs: of all units of a stage.
        peak_memory: bytes of a unit of a stage at the peak, where they are known.
        diagnosis_seconds: of the main map, on one device.
        notes: what the user should know.
    """

    shape: ModelShape
    units: Sequence[makespan.Job]
    costs: Mapping[str, Cost]
    peak_memory: Mapping[str, int]
    diagnosis_seconds: float
    notes: Sequence[str]

    def seconds(self, n_devices: int) -> float:
        """Seconds on so many devices; each does a unit at a time, and they share diagnoses."""
        return makespan.makespan(self.units, n_devices)

    def rows(self) -> list[dict[str, Any]]:
        """A row a stage."""
        stages = [_stage(unit.name) for unit in self.units]
        return [
            {
                "stage": name,
                "units": stages.count(name),
                "forwards": f"{cost.work.forwards:,}",
                "tokens": f"{cost.work.tokens:,}",
                "decoded": f"{cost.work.step_tokens:,}",
                "PFLOP": f"{self.shape.all_flops(cost.work) / 1e15:,.3f}",
                "time on one device": duration(cost.seconds),
                "peak memory": gigabytes(self.peak_memory[name]) if name in self.peak_memory else None,
            }
            for name, cost in self.costs.items()
            if name in stages
        ]


def study_cost(graph: Graph, *, accelerator: str | None = None) -> StudyCost:
    """What a study costs, see `Planner`. Judging is not counted.

    Args:
        graph: of the study; `model` may be a directory that holds a config.json alone.
        accelerator: take seconds from this one's data sheet (`ACCELERATORS`) instead of timing a slice here.

    Raises:
        CastuneError: an unknown accelerator, no config, data that are neither here nor known, or settings that a plan
            refuses.
    """
    pieces = _Pieces(graph, Planner.of(graph.maps[MAIN], accelerator=accelerator))
    planned = [unit for unit in graph.units if unit.stage != "judge"]
    names = {unit.name for unit in planned}
    units, costs = [], dict.fromkeys(("diagnose", "tune", "evaluate", "drift"), Cost())
    for unit in planned:
        cost = pieces.cost(unit)
        costs[_stage(unit.name)] += cost
        needs = tuple(name for name in unit.needs if name in names)
        units.append(makespan.Job(unit.name, cost.seconds, needs, is_divisible=unit.stage == "diagnose"))
    return StudyCost(
        shape=pieces.planner.shape,
        units=units,
        costs=costs,
        peak_memory=pieces.peak_memory,
        diagnosis_seconds=pieces.whole_diagnosis(MAIN).seconds,
        notes=[*pieces.planner.notes, *pieces.read.notes],
    )


class _Pieces:
    """What the units of a study do: each thing counted, and timed, once."""

    def __init__(self, graph: Graph, planner: Planner) -> None:
        self.graph, self.planner, self.read = graph, planner, DataOrStandIns()
        self._recipe = graph.maps[MAIN]
        self._map_of = {recipe.out: name for name, recipe in graph.maps.items()}
        self._diagnoses: dict[str, DiagnosisCost] = {}
        self._trainings: dict[tuple[str, str], TrainingCost] = {}

    def cost(self, unit: WorkUnit) -> Cost:
        """The cost of a unit of any stage but judging."""
        name = self._map_of[str(unit.map_folder)]
        if unit.stage == "diagnose":
            # A map that ranks the outcomes of another one in its own way measures nothing.
            return self.whole_diagnosis(name) if unit.folder == unit.map_folder else Cost()
        if unit.stage == "tune":
            return self._training(unit, name).cost
        if unit.stage == "drift":
            n_maps = len(snapshot_steps(unit.recipe.tune, self._training(unit, name).steps)) + 1
            return self.whole_diagnosis(name) * n_maps
        # The base model has one strength.
        return self._evaluation * (1 if unit.stage == "base" else len(unit.recipe.evaluate.strengths))

    def whole_diagnosis(self, name: str) -> Cost:
        """The cost of a map that is measured."""
        return self._diagnosis(name).total(self.graph.maps[name].diagnose.measure)

    @property
    def peak_memory(self) -> dict[str, int]:
        """The most that a unit of a stage needs, of the units whose cost was asked for."""
        by_map = {name: found.peak_memory for name, found in self._diagnoses.items()}
        measured = [most[self.graph.maps[name].diagnose.measure] for name, most in by_map.items() if most]
        found = {"diagnose": measured, "tune": [one.peak_memory for one in self._trainings.values()]}
        return {stage: max(sizes) for stage, sizes in found.items() if sizes}

    def _diagnosis(self, name: str) -> DiagnosisCost:
        if name not in self._diagnoses:
            recipe = self.graph.maps[name]
            safety, utility = load_calibration(recipe, self.read)
            self._diagnoses[name] = self.planner.diagnosis(safety, utility, recipe.diagnose)
        return self._diagnoses[name]

    def _training(self, unit: WorkUnit, name: str) -> TrainingCost:
        """Arms that differ in their heads alone cost the same; so do maps, but for utility data that take part."""
        assert unit.arm is not None
        config: TuneConfig = self._recipe.tune.changed(**dict(ArmName.parse(unit.arm).changes))
        key = config.model_dump_json(), name if config.needs_utility else MAIN
        if key not in self._trainings:
            utility = load_calibration(self.graph.maps[name], self.read).all_utility
            self._trainings[key] = self.planner.training(self._align, utility, config)
        return self._trainings[key]

    @cached_property
    def _align(self) -> list[Example]:
        return load_data(self._recipe.align, self._recipe.seed, self.read)

    @cached_property
    def _evaluation(self) -> Cost:
        """All suites on one model."""
        settings = self._recipe.evaluate
        suites = load_suites(settings.suites, limit=settings.limit, seed=settings.seed, read=self.read)
        return sum((self.planner.suite(suite, settings) for suite in suites), Cost())


def _stage(unit: str) -> str:
    """The stage of a unit by its name; that of the base model is an evaluation."""
    return unit.partition(" ")[0]
