"""`castune study`: from a recipe to the paper's tables, over as many processes and machines as there are."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from castune.artifacts import EvalResult, TuneResult
from castune.artifacts.drift_result import DRIFT_FILE
from castune.artifacts.files import locked, write_text
from castune.artifacts.tune_result import adapter_hash
from castune.config import Recipe, TuneConfig
from castune.core.heads import HeadLayout
from castune.core.loading import load_config, torch_dtype_of
from castune.core.shards import Shard
from castune.core.units import UnitLayout
from castune.data.example import content_hash
from castune.diagnosis.domains import utility_hash, utility_sets
from castune.errors import CastuneError
from castune.evaluation.suites import Suite, load_suites
from castune.names import ArmName
from castune.plan.skeleton import skeleton
from castune.steps.directory import BASE, RunDirectory
from castune.steps.evaluate import identity_by_map, require_evaluation, stored_evaluation
from castune.steps.inputs import check_held_out, load_align, load_calibration
from castune.steps.tune import require_trainable
from castune.study.executors import Executor, log_file
from castune.study.findings import Findings, findings
from castune.study.graph import Graph, Unit
from castune.study.page import write_study_report
from castune.study.schedule import Schedule, State
from castune.study.tables import Table, finding_tables, tables
from castune.study.trials import Results, read_results

logger = logging.getLogger(__name__)


def study_graph(recipe: Recipe, *, shards: int = 1, data: bool = True) -> Graph:
    """The graph of a study.

    Args:
        recipe: of the study; `recipe.study` says what is compared.
        shards: into how many units a diagnosis is split.
        data: whether the data are loaded and become part of the keys of directories; without, nothing is read but the
            model's config.

    Raises:
        CastuneError: bad data or settings, an extra is missing, or the model's heads cannot be located.
    """
    if recipe.select.compare:
        logger.warning("select.compare has no effect on a study: study.arms says what is compared")
    config, _ = load_config(recipe.model, revision=recipe.revision, trust_remote_code=recipe.trust_remote_code)
    model = skeleton(config, torch_dtype_of(recipe.dtype, recipe.device))
    wanted, layers = recipe.diagnose, recipe.diagnose.layers
    units = UnitLayout.of(
        model, HeadLayout.unproven(model), wanted.units, n_mlp_groups=wanted.mlp_groups, layers=layers, prove=False
    ).units
    n_heads = sum(layers is None or unit.layer in layers for unit in units)
    hashes = _checked_data(recipe) if data else {}
    graph = Graph(recipe, n_heads, hashes, shards)
    for run in graph.runs:
        require_trainable(recipe, map(ArmName.parse, run.trained))
    return graph


class Study(NamedTuple):
    """A study as far as it is done.

    Attributes:
        results: what was measured.
        findings: what it shows.
        tables: by name, as they are written to files.
        report: the page.
        states: of every unit.
    """

    results: Results
    findings: Findings
    tables: Mapping[str, Table]
    report: Path
    states: Mapping[str, State]

    @property
    def is_finished(self) -> bool:
        """Whether every unit is done."""
        return all(state.state == "done" for state in self.states.values())


def run_study(graph: Graph, executor: Executor, suites: Sequence[Suite]) -> Study:
    """Do what is missing of a study, and write its tables, figures and report.

    Args:
        graph: of the study.
        executor: where units are done.
        suites: of the evaluation, loaded.

    Raises:
        CastuneError: another command is at work on this study.
    """
    with _alone(graph.folder):
        write_text(graph.folder / "recipe.toml", graph.recipe.to_toml())
        schedule = Schedule(graph.units, graph.folder, lambda unit: is_done(unit, suites))
        logger.info("study: %s", schedule.progress())
        with executor:
            finished = schedule.run(executor)
        if not finished:
            failed = {name: state for name, state in schedule.states.items() if state.state == "failed"}
            blocked = sum(state.state == "blocked" for state in schedule.states.values())
            logger.error("study: %d units failed, %d are blocked by them; logs:", len(failed), blocked)
            for name in failed:
                logger.error("  %s", log_file(graph.folder, name))
        return write_results(graph, schedule.states)


def run_share(graph: Graph, executor: Executor, suites: Sequence[Suite], share: Shard) -> tuple[Schedule, int]:
    """Do one share of a study, of several jobs that have its directory in common; no tables are written.

    Returns:
        The schedule, and how many units of this share wait for what other shares do: the same job again does them.

    Raises:
        CastuneError: a command without a share is at work on this study.
    """
    with _alone(graph.folder, shared=True):
        units = graph.share(share.index, share.count)
        by_name = {unit.name: unit for unit in graph.units}
        mine: dict[str, Unit] = {}
        for unit in units:
            others = [name for name in unit.needs if name not in mine]
            if all(is_done(by_name[name], suites) for name in others):
                needs = tuple(name for name in unit.needs if name in mine)
                mine[unit.name] = replace(unit, needs=needs)
        status = f"status-{share.index + 1}-of-{share.count}.json"
        schedule = Schedule(list(mine.values()), graph.folder, lambda unit: is_done(unit, suites), status=status)
        with executor:
            schedule.run(executor)
        return schedule, len(units) - len(mine)


def write_results(graph: Graph, states: Mapping[str, State]) -> Study:
    """Write tables, figures and report of what is there so far."""
    results = read_results(graph)
    found = findings(results, graph.recipe.study)
    made = [*tables(results, graph.recipe.study), *finding_tables(found)]
    for table in made:
        write_text(graph.folder / "tables" / f"{table.name}.csv", table.to_csv())
    report = write_study_report(graph, results, found, made, states)
    return Study(results, found, {table.name: table for table in made}, report, states)


def load_study_suites(recipe: Recipe) -> list[Suite]:
    """The suites of a study, checked with their judge, backend and the training data before hours are spent."""
    config = recipe.evaluate
    suites = load_suites(config.suites, limit=config.limit, seed=config.seed)
    require_evaluation(config, suites)
    check_held_out(recipe, suites, arms=recipe.study.main_arms)
    return suites


def is_done(unit: Unit, suites: Sequence[Suite]) -> bool:
    """Whether the result of a unit is there; what cannot be told, for a file is missing or damaged, is not done.

    The unit then makes it again, or fails with what is wrong, and the study goes on.
    """
    try:
        return _is_done(unit, suites)
    except (CastuneError, OSError) as error:
        logger.warning("%s: %s", unit.name, error)
        return False


def _is_done(unit: Unit, suites: Sequence[Suite]) -> bool:
    """Whether the result of a unit is there, told from files alone: no model is loaded for it.

    Diagnoses and trainings lie in directories whose names are digests of what they were made from. An evaluation must
    be of these suites and settings, and of the adapter that is there. Judging is always asked for: it finds itself
    whether there is something to do.
    """
    folder = RunDirectory(unit.folder)
    if unit.stage == "diagnose":
        return folder.map_file.is_file()
    if unit.stage == "tune":
        assert unit.arm is not None
        arm = folder.side_arm(unit.arm)
        if not (arm.is_trained and arm.selection_file.is_file()):
            return False
        wanted = unit.recipe.tune.changed(**dict(ArmName.parse(unit.arm).changes))
        # If not, the unit says what differs.
        return TuneConfig(**TuneResult.load(arm.adapter).settings) == wanted
    if unit.stage == "base":
        found = _stored(folder, unit.recipe, BASE, suites, None)
        # It may have been killed before its replies were judged.
        return found is not None and found.settings["judge"] == unit.recipe.evaluate.judge
    if unit.stage == "evaluate":
        assert unit.arm is not None
        adapter = adapter_hash(folder.side_arm(unit.arm).adapter)
        return _stored(folder, unit.recipe, unit.arm, suites, adapter) is not None
    if unit.stage == "drift":
        assert unit.arm is not None
        return (folder.drift(folder.side_arm(unit.arm)) / DRIFT_FILE).is_file()
    return False


def _stored(
    folder: RunDirectory, recipe: Recipe, arm: str, suites: Sequence[Suite], adapter: str | None
) -> EvalResult | None:
    if not (folder.evaluation(arm) / "metrics.json").is_file():
        return None
    model = {**identity_by_map(folder, recipe), "adapter": adapter}
    return stored_evaluation(folder.evaluation(arm), model, recipe.evaluate, suites)


def _checked_data(recipe: Recipe) -> dict[str, str]:
    """Digests of all data of a study, each checked for what it is used for."""
    config = recipe.evaluate
    suites = load_suites(config.suites, limit=config.limit, seed=config.seed) if config.overlap == "drop" else []
    align, _ = load_align(recipe, suites)
    hashes = {"align": content_hash(align)}
    for name, calibration in {"main": None, **recipe.study.calibrations}.items():
        changes = {
            key: value
            for key in ("safety", "utility")
            if calibration is not None and (value := getattr(calibration, key)) is not None
        }
        safety, utility = load_calibration(recipe.model_copy(update=changes))
        hashes |= {f"safety:{name}": content_hash(safety), f"utility:{name}": utility_hash(utility_sets(utility))}
    return hashes


@contextmanager
def _alone(folder: Path, *, shared: bool = False) -> Iterator[None]:
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        try:
            stack.enter_context(locked(folder, wait=False, shared=shared))
        except BlockingIOError:
            raise CastuneError(
                f"{folder}: another castune study is at work here; wait for it, stop it, or give another --out"
            ) from None
        yield
