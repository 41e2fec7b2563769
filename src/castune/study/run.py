"""`castune study`: from a recipe to the paper's tables, over as many processes and machines as there are."""

from __future__ import annotations

import logging
import math
import os
import shlex
import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from castune.artifacts.files import locked, write_text
from castune.config import Recipe
from castune.console import say, show_rows
from castune.core.devices import torch_dtype_of
from castune.core.heads import HeadLayout
from castune.core.loading import load_config
from castune.core.numbers import duration, number
from castune.core.shards import Shard
from castune.core.units import UnitLayout
from castune.data.example import content_hash
from castune.diagnosis.domains import utility_hash, utility_sets
from castune.errors import CastuneError
from castune.evaluation.suites import Suite, load_suites
from castune.names import ArmName
from castune.plan.skeleton import skeleton
from castune.purposes import PURPOSES, SAFETY
from castune.steps.arms import require_trainable
from castune.steps.evaluate import require_evaluation
from castune.steps.held_out import check_held_out
from castune.steps.inputs import load_calibration, load_training
from castune.study.cost import paper_seconds, study_cost
from castune.study.executors import Executor, LocalExecutor, RayExecutor, Resources
from castune.study.findings import Findings, findings
from castune.study.graph import Graph, WorkUnit
from castune.study.page import write_study_report
from castune.study.primary import expected_words
from castune.study.schedule import Schedule, State
from castune.study.tables import Cell, Row, Table, average_column, finding_tables, method_table, tables
from castune.study.trials import Results, read_results
from castune.study.work import is_done

logger = logging.getLogger(__name__)

_SHOWN = ("arm", "heads", "seeds", *map(average_column, PURPOSES), "ucr", "ucr_nll")


class Options(NamedTuple):
    """How a study is executed; None: by the machine."""

    executor: str = "local"
    workers: int | None = None
    threads: int | None = None
    gpus: int | None = None
    memory: float | None = None
    address: str | None = None
    shards: int = 1
    shard: str | None = None
    launch: str | None = None

    def check(self) -> None:
        """Refuse options that contradict each other.

        Raises:
            CastuneError: the message says what is accepted.
        """
        if self.executor not in ("local", "ray"):
            raise CastuneError(f"--executor {self.executor}: accepted: local, ray")
        if self.executor == "local" and (self.address is not None or self.memory is not None):
            raise CastuneError("--address and --memory need --executor ray")
        for name in ("workers", "threads", "shards"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise CastuneError(f"--{name} {value}: must be 1 or more")
        if self.memory is not None and not 0 < self.memory < math.inf:
            raise CastuneError(f"--memory {self.memory:g}: must be above 0 (gigabytes)")
        self._check_gpus()
        launcher = self.launcher()
        if launcher and shutil.which(launcher[0]) is None:
            raise CastuneError(f"--launch {self.launch}: program {launcher[0]!r} not found")

    def _check_gpus(self) -> None:
        if self.gpus is None:
            return
        if self.gpus < 0:
            raise CastuneError(f"--gpus {self.gpus}: must be 0 or more")
        if self.address is not None:
            return  # a cluster's own affair
        import torch

        n_here, n_wanted = torch.cuda.device_count(), self.gpus * (self.workers or 1)
        if n_wanted > n_here:
            each = f" for each of {self.workers} workers" if (self.workers or 1) > 1 else ""
            raise CastuneError(f"--gpus {self.gpus}{each}: this machine has {n_here} accelerators")

    def launcher(self) -> tuple[str, ...]:
        """The words of `launch`."""
        try:
            return tuple(shlex.split(self.launch or ""))
        except ValueError as error:
            raise CastuneError(f"--launch {self.launch}: {error}") from None

    def resources(self, workers: int) -> Resources:
        """What every unit has to itself."""
        cores = os.cpu_count() or 1
        threads = self.threads or max(1, cores // workers)
        memory = None if self.memory is None else int(self.memory * 1e9)
        return Resources(threads, self.gpus_a_unit(), memory, self.launcher())

    def gpus_a_unit(self) -> int:
        """Accelerators a unit: one where this machine has some."""
        if self.gpus is not None:
            return self.gpus
        import torch

        return min(1, torch.cuda.device_count())

    def workers_here(self) -> int:
        """Units beside each other on this machine."""
        if self.workers is not None:
            return self.workers
        if gpus := self.gpus_a_unit():
            import torch

            return max(1, torch.cuda.device_count() // gpus)
        return max(1, min(8, (os.cpu_count() or 1) // 2))

    def made(self, graph: Graph) -> Executor:
        """The executor."""
        workers = self.workers_here()
        resources = self.resources(workers)
        if self.executor == "ray":
            return RayExecutor(graph.folder, resources, address=self.address, workers=workers)
        return LocalExecutor(graph.folder, workers, resources)


def show_study(recipe: Recipe, options: Options) -> bool:
    """Do a study, or a share of it, and show what came out; returns whether nothing has failed."""
    options.check()
    suites = load_study_suites(recipe)
    share = None if options.shard is None else Shard.of(options.shard)
    graph = study_graph(recipe, shards=options.shards if share is None else share.count)
    if share is not None:
        schedule, waiting = run_share(graph, options.made(graph), suites, share)
        say(f"share {options.shard}: {schedule.progress()}")
        if waiting:
            say(f"{waiting} units wait for other shares; run this share again when those are done")
        return all(state.state == "done" for state in schedule.states.values())
    done = run_study(graph, options.made(graph), suites)
    for table in (done.tables.get(method_table(method)) for method in recipe.study.methods):
        if table is not None:
            show_rows(table.title, [_shown(row, table.nats) for row in table.rows])
    for sentence in done.findings.verdict:
        say(f"- {sentence}")
    for name in done.results.missing:
        say(f"missing: {name}")
    say(f"tables: {graph.folder.tables}")
    say(f"report: {done.report}")
    measured = {} if done.results.base is None else {"base": done.results.base}
    measured |= {trial.label: trial.measured for trial in done.results.trials}
    unscored = [(name, suite.suite) for name, one in measured.items() for suite in one.suites if not suite.n]
    for name, suite in unscored:
        say(f"{name}: none of the examples of suite {suite} could be scored")
    return done.is_finished and not unscored


def _shown(row: Row, nats: Collection[str]) -> dict[str, Cell]:
    """What of a row the console shows; nats to three places."""
    found = {key: row[key] for key in _SHOWN if key in row}
    in_nats = {key: value for key, value in found.items() if key in nats and isinstance(value, float)}
    return found | {key: number(value, ".3f") for key, value in in_nats.items()}


def show_graph(recipe: Recipe, *, accelerator: str | None) -> None:
    """Show the graph of a study and what it costs, from configs alone: no weights are loaded, nothing is written."""
    graph = study_graph(recipe, data=False)
    for run in graph.runs:
        say(f"{run.label}: {', '.join(run.trained)}")
        for arm, trained in run.same_as.items():
            if arm != trained:
                say(f"  {arm}: same heads as {trained}")
    found = study_cost(graph, accelerator=accelerator)
    show_rows("Work", found.rows())
    where = f"one {accelerator}" if accelerator else "this machine, one unit at a time"
    say(
        f"map of {graph.n_heads:,} heads: {duration(found.diagnosis_seconds)} on {where}; "
        f"{duration(paper_seconds(graph.n_heads))} by the paper's method (67 s per head on an H800)"
    )
    say(f"whole study: {duration(found.seconds(1))} on {where}, {duration(found.seconds(8))} on eight")
    for words in expected_words(recipe.study):
        say(words)
    for note in found.notes:
        say(f"note: {note}")


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
        logger.warning("select.compare has no effect in a study; study.arms says what to compare")
    config, _ = load_config(recipe.model, revision=recipe.revision, trust_remote_code=recipe.trust_remote_code)
    model = skeleton(config, torch_dtype_of(recipe.dtype, recipe.device))
    wanted, layers = recipe.diagnose, recipe.diagnose.layers
    units = UnitLayout.of(
        model, HeadLayout.unproven(model), wanted.kinds, n_mlp_groups=wanted.mlp_groups, layers=layers, prove=False
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
    with _alone(graph.folder.path):
        write_text(graph.folder.recipe_file, graph.recipe.to_toml())
        schedule = Schedule(graph.units, graph.folder.status_file, lambda unit: is_done(unit, suites))
        logger.info("study: %s", schedule.progress())
        with executor:
            finished = schedule.run(executor)
        if not finished:
            failed = {name: state for name, state in schedule.states.items() if state.state == "failed"}
            blocked = sum(state.state == "blocked" for state in schedule.states.values())
            logger.error("study: %d units failed, %d are blocked by them; logs:", len(failed), blocked)
            for name in failed:
                logger.error("  %s", graph.folder.log(name))
        return write_results(graph, schedule.states)


def run_share(graph: Graph, executor: Executor, suites: Sequence[Suite], share: Shard) -> tuple[Schedule, int]:
    """Do one share of a study, of several jobs that have its directory in common; no tables are written.

    Returns:
        The schedule, and how many units of this share wait for what other shares do: the same job again does them.

    Raises:
        CastuneError: a command without a share is at work on this study.
    """
    with _alone(graph.folder.path, shared=True):
        units = graph.share(share.index, share.count)
        by_name = {unit.name: unit for unit in graph.units}
        mine: dict[str, WorkUnit] = {}
        for unit in units:
            others = [name for name in unit.needs if name not in mine]
            if all(is_done(by_name[name], suites) for name in others):
                needs = tuple(name for name in unit.needs if name in mine)
                mine[unit.name] = replace(unit, needs=needs)
        status_file = graph.folder.status_file_of(share)
        schedule = Schedule(list(mine.values()), status_file, lambda unit: is_done(unit, suites))
        with executor:
            schedule.run(executor)
        return schedule, len(units) - len(mine)


def write_results(graph: Graph, states: Mapping[str, State]) -> Study:
    """Write tables, figures and report of what is there so far."""
    results = read_results(graph)
    found = findings(results, graph.recipe.study)
    made = [*tables(results, graph.recipe.study), *finding_tables(found)]
    for table in made:
        write_text(graph.folder.tables / f"{table.name}.csv", table.to_csv())
    report = write_study_report(graph, results, found, made, states)
    return Study(results, found, {table.name: table for table in made}, report, states)


def load_study_suites(recipe: Recipe) -> list[Suite]:
    """The suites of a study, checked with their judge, backend and the training data before hours are spent."""
    config = recipe.evaluate
    suites = load_suites(config.suites, limit=config.limit, seed=config.seed)
    require_evaluation(config, suites)
    _require_primary(recipe, suites)
    check_held_out(recipe, suites, arms=recipe.study.main_arms)
    return suites


def _require_primary(recipe: Recipe, suites: Sequence[Suite]) -> None:
    """Refuse a primary contrast that the evaluation would not measure."""
    contrast = recipe.study.primary
    if contrast is None:
        return
    purposes = {suite.purpose for suite in suites}
    if contrast.cost not in purposes or not purposes & set(SAFETY):
        raise CastuneError(
            f"study.primary compares {contrast.cost} at equal safety, and evaluate.suites measures "
            f"{', '.join(sorted(purposes))}: it needs suites of {contrast.cost}, and of {' or '.join(SAFETY)}"
        )
    if len(recipe.evaluate.strengths) < 2:
        raise CastuneError(
            "study.primary compares arms at equal safety, and evaluate.strengths has full strength alone: "
            "add weaker ones, for example strengths = [0.35, 0.65]"
        )


def _checked_data(recipe: Recipe) -> dict[str, str]:
    """Digests of all data of a study, each checked for what it is used for."""
    config = recipe.evaluate
    suites = load_suites(config.suites, limit=config.limit, seed=config.seed) if config.overlap == "drop" else []
    align = load_training(recipe, suites).align
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
                f"{folder}: another castune study is running here; wait for it, stop it, or choose another --out"
            ) from None
        yield
