"""A run made again from its own records, and what came out otherwise.

Every artifact says what it was made from: model, data by their digests, settings, versions, machine. From these records
alone the same stages are run into another directory. What differs now that results depend on is told before anything
is computed, and results are compared stage by stage: bit for bit first, then by what they decide.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from castune.artifacts import ConflictMap, EvalResult, HeadSelection, TuneResult
from castune.artifacts.formats import write_json
from castune.artifacts.records import CodeRecord, DataRecord
from castune.config import DataConfig, DiagnoseConfig, EvaluateConfig, Recipe, SelectConfig, TuneConfig
from castune.core.loading import LoadedModel, load_config, load_model
from castune.core.provenance import provenance
from castune.data.example import Example, content_hash
from castune.data.sources import examples
from castune.errors import CastuneError, DataError
from castune.evaluation.suites import load_suites
from castune.steps.arm import Arm
from castune.steps.compare import Comparison, compare_adapters, compare_evaluations, compare_maps
from castune.steps.diagnose import diagnose_step
from castune.steps.directory import BASE, RunDirectory
from castune.steps.evaluate import evaluate_step
from castune.steps.inputs import TrainingData, load_calibration, load_data, recorded_data
from castune.steps.select import choose
from castune.steps.tune import tune_step

logger = logging.getLogger(__name__)

REPRODUCTION_FILE = "reproduction.json"

Severity = Literal["other input", "other arithmetic", "other program"]
"""`other input`: other data, model or settings; results are those of another run. `other arithmetic`: sums are made in
another order or precision; equal up to rounding, and what rounding decides (near ties, greedy replies) may flip. `other
program`: versions of what should not change results, and could."""


# Versions of these decide how numbers are computed; those of others, what is computed with them.
_ARITHMETIC = ("torch", "numpy")


@dataclass(frozen=True)
class Difference:
    """A condition of a run that is not what it was.

    Attributes:
        what: the condition.
        then: when the run was made.
        now: here.
        severity: what it means for results.
    """

    what: str
    then: str
    now: str
    severity: Severity


@dataclass(frozen=True)
class Reproduction:
    """What differed before, and what came out.

    Attributes:
        run: name of the run.
        differences: conditions that are not what they were.
        comparisons: results, stage by stage; empty where conditions alone were looked at.
    """

    run: str
    differences: tuple[Difference, ...]
    comparisons: tuple[Comparison, ...] = ()

    @property
    def is_reproduced(self) -> bool:
        """Whether no result decides otherwise than it did."""
        return all(one.outcome != "different" for one in self.comparisons)

    def save(self, directory: Path) -> Path:
        """Write `reproduction.json`, atomically."""
        path = directory / REPRODUCTION_FILE
        write_json(path, "reproduction", {**asdict(self), "provenance": provenance()})
        return path


def reproduce(run: str | Path, out: str | Path) -> Reproduction:
    """Make a run again from its records, and compare all results.

    An interrupted reproduction continues with the same call.

    Args:
        run: a run directory with a conflict map.
        out: another directory, for the results that are made again and `reproduction.json`.

    Raises:
        CastuneError: `run` holds no map, or `out` is it or holds another run; or data or the model cannot be loaded.
    """
    folder, again = RunDirectory(Path(run)), RunDirectory(Path(out))
    if folder.path.resolve() == again.path.resolve():
        raise CastuneError(f"{out} is the run itself; choose another directory with --out")
    found = conditions(folder)
    cmap = folder.load_map()
    recipe = recorded_recipe(folder, cmap, out=str(again.path))
    again.check(recipe)
    if not cmap.metadata["provenance"]["accelerators"]:
        torch.set_num_threads(cmap.metadata["provenance"]["threads"])
    calibration = load_calibration(recipe, _reader(cmap))
    loaded = load_model(recipe)
    fresh = diagnose_step(again, recipe, loaded, calibration)
    again.save_recipe(recipe)
    comparisons = [compare_maps(cmap, fresh)]
    for arm in folder.arms():
        comparisons += _arm_again(folder, again, arm, cmap, fresh, recipe, loaded)
    comparisons += _evaluations_again(folder, again, recipe, loaded)
    result = Reproduction(folder.path.name, tuple(found), tuple(comparisons))
    result.save(again.path)
    return result


def conditions(folder: RunDirectory) -> list[Difference]:
    """What a run depended on that is not so here, the gravest first: nothing is computed, no weights are loaded.

    Raises:
        CastuneError: there is no conflict map, or its model's config cannot be loaded.
    """
    cmap = folder.load_map()
    record, here = cmap.metadata["provenance"], provenance()
    found = [*_data_differences(folder, cmap)]
    recipe = recorded_recipe(folder, cmap, out=str(folder.path))
    config, _ = load_config(recipe.model, revision=recipe.revision, trust_remote_code=recipe.trust_remote_code)
    if config.model_type != cmap.model["type"]:
        found.append(Difference("model type", cmap.model["type"], config.model_type, "other input"))
    for package, then in record["versions"].items():
        now = here["versions"].get(package)
        # What was not there was not used.
        if then is not None and then != now:
            severity: Severity = "other arithmetic" if package in _ARITHMETIC else "other program"
            found.append(Difference(f"version of {package}", then, now or "not installed", severity))
    if record["machine"] != here["machine"]:
        found.append(Difference("machine", record["machine"], here["machine"], "other arithmetic"))
    if record["accelerators"] != here["accelerators"]:
        names = [", ".join(one["accelerators"]) or "none" for one in (record, here)]
        found.append(Difference("accelerators", names[0], names[1], "other arithmetic"))
    threads, possible = record["threads"], torch.get_num_threads()
    if threads > possible and not record["accelerators"]:
        found.append(Difference("threads", str(threads), f"{possible} by default; using {threads}", "other program"))
    code = [_code(one["code"]) for one in (record, here)]
    if code[0] != code[1]:
        found.append(Difference("castune's code", code[0], code[1], "other program"))
    order: tuple[Severity, ...] = ("other input", "other arithmetic", "other program")
    return sorted(found, key=lambda one: order.index(one.severity))


def recorded_recipe(folder: RunDirectory, cmap: ConflictMap, *, out: str) -> Recipe:
    """The recipe that the records of a run amount to: what was measured and trained, not what a file asks for now."""
    recipe = folder.load_recipe()
    settings = DiagnoseConfig(**{**cmap.metadata["settings"], "batch_tokens": cmap.metadata["batch_tokens"]})
    changes: dict[str, Any] = {
        "out": out,
        # `auto` may mean something else here.
        "dtype": cmap.model["dtype"],
        "diagnose": settings,
    }
    if folder.is_evaluated(BASE):
        changes["evaluate"] = EvaluateConfig(**EvalResult.load(folder.evaluation(BASE)).settings)
    return Recipe(**{**dict(recipe), **changes})


def _arm_again(
    folder: RunDirectory,
    again: RunDirectory,
    arm: Arm,
    cmap: ConflictMap,
    fresh: ConflictMap,
    recipe: Recipe,
    loaded: LoadedModel,
) -> Iterator[Comparison]:
    """The selection and the adapter of an arm, made again."""
    selection = folder.load_selection(arm, cmap)
    chosen = _selected_again(selection, fresh)
    place = again.main_arm(chosen) if arm.folder == folder.path else again.side_arm(arm.name)
    chosen.save(place.folder)
    of_heads = f"heads of {arm.name}"
    lost = set(selection.units) - set(chosen.units)
    if lost:
        n = len(selection.units)
        yield Comparison(of_heads, "different", f"{len(lost)} of {n} differ: rounding decided between near ties")
    else:
        yield Comparison(of_heads, "same", selection.counted)
    of_adapter = f"adapter of {arm.name}"
    if arm.is_made_of_others:
        yield Comparison(of_adapter, "not compared", "made from other adapters")
        return
    if not arm.is_trained:
        return
    result = folder.load_tuning(arm, selection)
    align = recorded_data(result.data, recipe.seed)
    assert result.data["source"] is not None
    utility = None
    if result.utility is not None:
        configs = recipe.utility if isinstance(recipe.utility, dict) else {"": recipe.utility}
        utility = [example for key in sorted(configs) for example in load_data(configs[key], recipe.seed)]
        if content_hash(utility) != result.utility["hash"]:
            yield Comparison(of_adapter, "not compared", "its utility data differ from the recipe's")
            return
    if content_hash(align) != result.data["hash"]:
        yield Comparison(of_adapter, "not compared", f"its training data ({result.data['source']}) have changed")
        return
    settings = TuneConfig(**result.settings)
    if settings.quantization != "none":
        loaded = load_model(recipe, settings.quantization)
    data = TrainingData(
        align,
        DataConfig(source=result.data["source"], balance=result.data.get("balance"), shares=result.data.get("shares")),
        result.data.get("left_out", ()),
        utility,
        None if result.utility is None else result.utility["source"],
    )
    trained = tune_step(again, place, loaded, data, settings)
    yield compare_adapters(of_adapter, (arm.adapter, result), (place.adapter, trained))


def _selected_again(selection: HeadSelection, cmap: ConflictMap) -> HeadSelection:
    if selection.zone == "custom":
        return selection
    rule = {name: getattr(selection, name) for name in ("zone", "fraction", "buckets", "bucket", "score", "seed")}
    settings: dict[str, Any] = {name: value for name, value in rule.items() if value is not None}
    if selection.zone == "bucket":
        settings["zone"] = "safe"
    return choose(cmap, SelectConfig(**settings))


def _evaluations_again(
    folder: RunDirectory, again: RunDirectory, recipe: Recipe, loaded: LoadedModel
) -> Iterator[Comparison]:
    """Every evaluation, made again and compared example by example."""
    before = folder.load_evaluations()
    if not before:
        return
    suites = load_suites(recipe.evaluate.suites, limit=recipe.evaluate.limit, seed=recipe.evaluate.seed)
    after = evaluate_step(again, recipe, suites, loaded if recipe.evaluate.backend == "hf" else None)
    for name, result in before.items():
        if name in after:
            yield from compare_evaluations(name, result, after[name])
        else:
            yield Comparison(f"evaluation of {name}", "not compared", "its adapter was not reproduced")


def _data_differences(folder: RunDirectory, cmap: ConflictMap) -> Iterator[Difference]:
    recipe = folder.load_recipe()
    try:
        calibration = load_calibration(recipe, _reader(cmap))
        now = {name: content_hash(examples) for name, examples in calibration.by_name.items()}
    except DataError as error:
        yield Difference("calibration data", "available", str(error), "other input")
        now = {}
    for name, record in cmap.data.items():
        if name in now and record["hash"] != now[name]:
            yield Difference(f"{name} data", record["hash"], now[name], "other input")
    for arm in folder.arms():
        if not arm.is_trained:
            continue
        record = TuneResult.load(arm.adapter).data
        yield from _changed(
            f"training data of {arm.name}", record["hash"], lambda r=record: recorded_data(r, recipe.seed)
        )
    evaluations = folder.load_evaluations()
    if BASE in evaluations:
        config = EvaluateConfig(**evaluations[BASE].settings)
        for suite, source in zip(evaluations[BASE].suites, config.suites, strict=True):
            yield from _changed(
                f"examples of {suite.suite}",
                suite.data_hash,
                lambda s=source: list(load_suites([s], limit=config.limit, seed=config.seed)[0].examples),
            )


def _changed(what: str, then: str, load: Callable[..., Sequence[Example]]) -> Iterator[Difference]:
    try:
        now = content_hash(load())
    except DataError as error:
        now = str(error)
    if now != then:
        yield Difference(what, then, now, "other input")


def _reader(cmap: ConflictMap) -> Callable[..., list[Example]]:
    """Reads calibration data as many as the map was made from, where the recipe draws another number by now."""
    by_source = {record["source"]: record for record in cmap.data.values()}

    def read(
        source: str,
        *,
        limit: int | None = None,
        seed: int = 0,
        balance: str | None = None,
        shares: dict[str, float] | None = None,
    ) -> list[Example]:
        record: DataRecord | None = by_source.get(source)
        if record is None:
            return examples(source, limit=limit, seed=seed, balance=balance, shares=shares)
        return recorded_data({**record, "balance": balance, "shares": shares}, seed)

    return read


def _code(state: CodeRecord | None) -> str:
    if state is None:
        return "an installed package"
    return f"commit {state['commit'][:12]}{', changed' if state['dirty'] else ''}"
