"""The graph of a study: which runs there are, what each unit of work needs, and where its result lies. Pure.

    diagnose -> tune -> evaluate -> judge      a chain an arm, over the seeds
    diagnose -> base ----------------^         the base model, once
                tune -> drift                  the map again, where it is asked for

A study directory holds a run directory a map (`maps/NAME-KEY`) and a run directory a map and seed
(`runs/NAME-SEED-KEY`), whose arms share the map; a random draw has its own (`runs/NAME-SEED-draw-NUMBER-KEY`). The key
is a digest of everything the results depend on: another learning rate gives other directories beside the old ones, and
what is there already is never computed twice.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypedDict

from castune.config import CalibrationConfig, DataConfig, Recipe, SelectConfig, StudyConfig, TuneConfig
from castune.errors import CastuneError
from castune.names import ArmName, heads_name
from castune.stats.ranking import equal_parts
from castune.study.directory import StudyDirectory

MAIN = "main"

Stage = Literal["diagnose", "base", "tune", "evaluate", "judge", "drift"]

# Keys of a recipe that decide about the model and its prompts.
_OF_MODEL = ("model", "revision", "template_date", "dtype")
# Defaults of other versions, by table and key: directories that were named then keep their names.
_FORMER_DEFAULTS: dict[tuple[str, str], object] = {("tune", "group_by_length"): True}


class WorkUnitRecord(TypedDict):
    """A unit as plain JSON."""

    name: str
    stage: Stage
    recipe: dict[str, object]
    needs: list[str]
    map_folder: str
    base_folder: str
    arm: str | None
    shard: str | None


@dataclass(frozen=True)
class WorkUnit:
    """A piece of work that one worker does, and that is retried when the worker dies.

    Attributes:
        name: unique, for people: `tune main/21/safe+pcgrad`.
        stage: what is done.
        recipe: of the run directory it is done in (`recipe.out`).
        needs: names of the units whose results it takes.
        map_folder: the run directory of the map.
        base_folder: the run directory with the evaluation of the base model.
        arm: the arm, for `tune`, `evaluate` and `drift`.
        shard: share of a diagnosis, `i/n`.
    """

    name: str
    stage: Stage
    recipe: Recipe
    needs: tuple[str, ...]
    map_folder: Path
    base_folder: Path
    arm: str | None = None
    shard: str | None = None

    @property
    def folder(self) -> Path:
        """The run directory the unit writes to."""
        return Path(self.recipe.out)

    def to_json(self) -> WorkUnitRecord:
        """Plain JSON, from which another process makes the unit again."""
        return {
            "name": self.name,
            "stage": self.stage,
            "recipe": self.recipe.model_dump(mode="json"),
            "needs": list(self.needs),
            "map_folder": str(self.map_folder),
            "base_folder": str(self.base_folder),
            "arm": self.arm,
            "shard": self.shard,
        }

    @classmethod
    def from_json(cls, record: WorkUnitRecord) -> WorkUnit:
        """The unit that `to_json` wrote."""
        return cls(
            record["name"],
            record["stage"],
            Recipe.model_validate(record["recipe"]),
            tuple(record["needs"]),
            Path(record["map_folder"]),
            Path(record["base_folder"]),
            record["arm"],
            record["shard"],
        )


@dataclass(frozen=True)
class Run:
    """A run directory of a study: arms of one map, trained with one seed.

    Attributes:
        calibration: name of the map, `main` for the recipe's own.
        seed: of the training, and of random selections but for those of a draw.
        recipe: with `out`, the seeds and the map's data in it.
        map_recipe: of the map's own run directory.
        trained: names of the arms that are trained.
        same_as: every wanted arm -> the trained one with the same heads, itself for most.
        draw: the seed that heads are selected with, where it is there for a random selection more.
    """

    calibration: str
    seed: int
    recipe: Recipe
    map_recipe: Recipe
    trained: tuple[str, ...]
    same_as: Mapping[str, str]
    draw: int | None = None

    @property
    def folder(self) -> Path:
        """The run directory."""
        return Path(self.recipe.out)

    @property
    def label(self) -> str:
        """What the run is called in names of units."""
        return run_label(self.calibration, self.seed, self.draw)

    @property
    def is_draw(self) -> bool:
        """Whether it is there for a random selection more."""
        return self.draw is not None


@dataclass(frozen=True)
class Graph:
    """All runs and units of a study; a unit comes behind those it needs.

    Args:
        recipe: of the study; `out` is the study directory.
        n_heads: number of heads a map has.
        data: digests of the data, by `align`, `safety:MAP` and `utility:MAP`; part of the keys.
        shards: into how many units a diagnosis is split.
    """

    recipe: Recipe
    n_heads: int
    data: Mapping[str, str] = field(default_factory=dict)
    shards: int = 1

    @property
    def folder(self) -> StudyDirectory:
        """The study directory."""
        return StudyDirectory(Path(self.recipe.out))

    @cached_property
    def maps(self) -> dict[str, Recipe]:
        """The recipe of every map's run directory, by the name of its calibration."""
        return {name: self._map_recipe(name, found) for name, found in self._calibrations().items()}

    @cached_property
    def runs(self) -> tuple[Run, ...]:
        """All run directories, the seeds of the main map first."""
        study = self.recipe.study
        # Of all arms, for those of a directory to have the same names whatever seeds they are trained with.
        same_as = self._same_as(study.main_arms)
        found = [
            self._run(MAIN, {arm: one for arm, one in same_as.items() if seed in study.seeds_of(arm)}, seed)
            for seed in study.main_seeds
        ]
        found += [self._run(MAIN, self._same_as(("random",)), seed, draw) for seed, draw in study.draws]
        for name, calibration in study.calibrations.items():
            if calibration.arms:
                found += [self._run(name, self._same_as(calibration.arms), seed) for seed in study.seeds]
        return tuple(found)

    @cached_property
    def units(self) -> tuple[WorkUnit, ...]:
        """All units, in the order in which they are best done: map by map, each with its runs."""
        found: list[WorkUnit] = []
        for name, recipe in self.maps.items():
            found += self._map_units(name, recipe)
            if name == MAIN:
                needs = (f"diagnose {MAIN}",)
                found.append(WorkUnit("evaluate base", "base", recipe, needs, self.base_folder, self.base_folder))
            found += [unit for run in self.runs if run.calibration == name for unit in self._run_units(run)]
        return tuple(found)

    @property
    def base_folder(self) -> Path:
        """The run directory that holds the evaluation of the base model."""
        return Path(self.maps[MAIN].out)

    def share(self, index: int, count: int) -> tuple[WorkUnit, ...]:
        """The units of share `index` (0-based) of `count` separate jobs that have the study directory in common.

        A share has its part of every diagnosis, which is the `shards` of the graph, and every count-th arm. The first
        evaluates the base model. Judging is for the command without a share, which comes last.
        """
        arms = [unit for unit in self.units if unit.stage == "tune"]
        mine = {(unit.folder, unit.arm) for unit in arms[index::count]}
        return tuple(
            unit
            for unit in self.units
            if unit.shard == f"{index + 1}/{count}"
            or (unit.stage == "base" and index == 0)
            or (unit.stage in ("tune", "evaluate", "drift") and (unit.folder, unit.arm) in mine)
        )

    def _calibrations(self) -> dict[str, CalibrationConfig]:
        return {MAIN: CalibrationConfig(), **self.recipe.study.calibrations}

    def _map_recipe(self, name: str, calibration: CalibrationConfig) -> Recipe:
        changes: dict[str, object] = {"study": StudyConfig(), "select": SelectConfig()}
        changes |= {key: value for key in ("safety", "utility") if (value := getattr(calibration, key)) is not None}
        given = {key: getattr(calibration, key) for key in ("measure", "sensitivity_rank")}
        given = {key: value for key, value in given.items() if value is not None}
        if given:
            changes["diagnose"] = self.recipe.diagnose.model_copy(update=given)
        recipe = self.recipe.model_copy(update=changes)
        made_from = _made_from(recipe, {*_OF_MODEL, "seed", "safety", "utility", "diagnose"})
        key = _digest([made_from, self.data.get(f"safety:{name}"), self.data.get(f"utility:{name}")])
        return recipe.model_copy(update={"out": str(self.folder.maps / f"{name}-{key}")})

    def _run(self, calibration: str, same_as: Mapping[str, str], seed: int, draw: int | None = None) -> Run:
        map_recipe = self.maps[calibration]
        select = self.recipe.select.model_copy(update={"seed": seed if draw is None else draw})
        recipe = map_recipe.model_copy(
            update={"select": select, "tune": self.recipe.tune.model_copy(update={"seed": seed})}
        )
        # How often a training is saved, and where it is logged, changes nothing.
        usual = {name: TuneConfig.model_fields[name].default for name in ("checkpoint_steps", "report_to")}
        tune = recipe.tune.model_copy(update=usual)
        made_from = _made_from(recipe.model_copy(update={"tune": tune}), {"select", "tune", "align"})
        key = _digest([Path(map_recipe.out).name, made_from, self.data.get("align")])
        out = self.folder.runs / f"{run_label(calibration, seed, draw).replace('/', '-')}-{key}"
        return Run(
            calibration=calibration,
            seed=seed,
            recipe=recipe.model_copy(update={"out": str(out)}),
            map_recipe=map_recipe,
            trained=tuple(dict.fromkeys(same_as.values())),
            same_as=same_as,
            draw=draw,
        )

    def _same_as(self, arms: tuple[str, ...]) -> dict[str, str]:
        """Every arm -> the first one that trains the same heads in the same way."""
        first: dict[tuple[Hashable, Hashable], str] = {}
        found: dict[str, str] = {}
        for text in arms:
            name = self._full_name(ArmName.parse(text))
            found[text] = first.setdefault((self._heads(ArmName.parse(text)), ArmName.parse(text).changes), name)
        return found

    def _full_name(self, name: ArmName) -> str:
        """The name of the arm's directory."""
        size = self._fraction(name)
        zone, score = (name.zone or "bucket"), name.score or self.recipe.select.score
        return heads_name(zone, size, name.bucket, name.buckets, score) + name.suffix

    def _fraction(self, name: ArmName) -> float:
        if name.zone == "all":
            return 1.0
        return name.fraction or self.recipe.select.fraction or 0.25

    def _heads(self, name: ArmName) -> Hashable:
        """What tells two selections apart, before the map is there: a range of the sorted heads where it is one."""
        if len(self.recipe.diagnose.units) > 1:
            return self._full_name(name)  # a range of each kind
        score, n = name.score or self.recipe.select.score, self.n_heads
        if name.bucket is not None and name.buckets is not None:
            if name.buckets > n:
                raise CastuneError(f"{name.buckets} buckets of {n} heads: study.buckets goes up to the number of heads")
            part = equal_parts(range(n), name.buckets)[name.bucket - 1]
            return score, part[0], part[-1] + 1
        count = max(1, round(self._fraction(name) * n))
        if count == n or name.zone == "all":
            return "all"
        if name.zone == "risky":
            return score, 0, count
        if name.zone == "safe":
            return score, n - count, n
        return name.zone, score, count

    def _measured_by(self, name: str) -> str | None:
        """An earlier map that measures the same and ranks S(h) otherwise; None where this one has to measure itself."""
        wanted = self.maps[name]
        if wanted.diagnose.units != ("q_heads",) or not isinstance(wanted.utility, DataConfig):
            return None

        def measured(recipe: Recipe) -> Recipe:
            settings = recipe.diagnose.model_copy(update={"sensitivity_rank": "difference"})
            return recipe.model_copy(update={"out": "", "diagnose": settings})

        for other, recipe in self.maps.items():
            if other == name:
                return None
            if measured(recipe) == measured(wanted):
                return other
        return None

    def _map_units(self, name: str, recipe: Recipe) -> Iterator[WorkUnit]:
        measured_by = self._measured_by(name)
        if measured_by is not None:
            source = Path(self.maps[measured_by].out)
            needs = (f"diagnose {measured_by}",)
            yield WorkUnit(f"diagnose {name}", "diagnose", recipe, needs, source, self.base_folder)
            return
        places = Path(recipe.out), self.base_folder
        shares: list[str] = []
        for number in range(1, self.shards + 1) if self.shards > 1 else ():
            shares.append(f"diagnose {name}, share {number} of {self.shards}")
            yield WorkUnit(shares[-1], "diagnose", recipe, (), *places, shard=f"{number}/{self.shards}")
        # Behind the shares it finds the map made; without them it makes it.
        yield WorkUnit(f"diagnose {name}", "diagnose", recipe, tuple(shares), *places)

    def _run_units(self, run: Run) -> Iterator[WorkUnit]:
        places = Path(run.map_recipe.out), self.base_folder
        evaluations = []
        for arm in run.trained:
            tune, evaluate = f"tune {run.label}/{arm}", f"evaluate {run.label}/{arm}"
            yield WorkUnit(tune, "tune", run.recipe, (f"diagnose {run.calibration}",), *places, arm=arm)
            yield WorkUnit(evaluate, "evaluate", run.recipe, (tune, "evaluate base"), *places, arm=arm)
            evaluations.append(evaluate)
        yield WorkUnit(f"judge {run.label}", "judge", run.recipe, tuple(evaluations), *places)
        for arm in self.drifting(run):
            yield WorkUnit(
                f"drift {run.label}/{arm}", "drift", run.recipe, (f"tune {run.label}/{arm}",), *places, arm=arm
            )

    def drifting(self, run: Run) -> tuple[str, ...]:
        """Trained arms of a run whose drift is measured."""
        if run is not self.runs[0]:
            return ()
        return tuple(dict.fromkeys(run.same_as[arm] for arm in self.recipe.study.drift))


def run_label(calibration: str, seed: int, draw: int | None) -> str:
    """What the run of a map, a seed of the training and maybe a random draw is called."""
    return f"{calibration}/{seed}" + ("" if draw is None else f"/draw-{draw}")


def _made_from(recipe: Recipe, keys: set[str]) -> dict[str, object]:
    """What of a recipe becomes part of a key: a setting that is new to castune changes none by its default, and a
    default that became another one changes none either."""
    found: dict[str, Any] = recipe.model_dump(mode="json", include=keys, exclude_defaults=True)
    for (table, name), former in _FORMER_DEFAULTS.items():
        if table in keys:
            value = getattr(getattr(recipe, table), name)
            settings = {key: kept for key, kept in found.pop(table, {}).items() if key != name}
            if value != former:
                settings[name] = value
            if settings:
                found[table] = settings
    return found


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:10]
