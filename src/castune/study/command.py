"""What `castune study` does with its options: the executor, and what is shown at the end."""

from __future__ import annotations

import math
import os
import shlex
import shutil
from typing import NamedTuple

from castune.config import Recipe
from castune.console import say, show_rows
from castune.core.shards import Shard
from castune.errors import CastuneError
from castune.study.cost import paper_hours, study_cost
from castune.study.executors import Executor, LocalExecutor, RayExecutor, Resources
from castune.study.graph import Graph
from castune.study.run import load_study_suites, run_share, run_study, study_graph
from castune.study.tables import method_table

_SHOWN = ("arm", "heads", "seeds", "general_average", "safety_average", "over_refusal_average", "ucr")


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
            raise CastuneError(f"--executor {self.executor}: accepted are local and ray")
        if self.executor == "local" and (self.address is not None or self.memory is not None):
            raise CastuneError("--address and --memory belong to --executor ray")
        for name in ("workers", "threads", "shards"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise CastuneError(f"--{name} {value}: accepted is 1 or more")
        if self.memory is not None and not 0 < self.memory < math.inf:
            raise CastuneError(f"--memory {self.memory:g}: accepted are gigabytes above 0")
        self._check_gpus()
        launcher = self.launcher()
        if launcher and shutil.which(launcher[0]) is None:
            raise CastuneError(f"--launch {self.launch}: there is no program {launcher[0]!r} here")

    def _check_gpus(self) -> None:
        if self.gpus is None:
            return
        if self.gpus < 0:
            raise CastuneError(f"--gpus {self.gpus}: accepted is 0 or more")
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


def run(recipe: Recipe, options: Options) -> bool:
    """Do a study, or a share of it, and show what came out; returns whether nothing has failed."""
    options.check()
    suites = load_study_suites(recipe)
    share = None if options.shard is None else Shard.of(options.shard)
    graph = study_graph(recipe, shards=options.shards if share is None else share.count)
    if share is not None:
        schedule, waiting = run_share(graph, options.made(graph), suites, share)
        say(f"share {options.shard}: {schedule.progress()}")
        if waiting:
            say(f"{waiting} units wait for other shares: run this share again when these have ended")
        return all(state.state == "done" for state in schedule.states.values())
    done = run_study(graph, options.made(graph), suites)
    for table in (done.tables.get(method_table(method)) for method in recipe.study.methods):
        if table is not None:
            show_rows(table.title, [{key: row.get(key) for key in _SHOWN} for row in table.rows])
    for sentence in done.findings.verdict:
        say(f"- {sentence}")
    for name in done.results.missing:
        say(f"missing: {name}")
    say(f"tables: {graph.folder / 'tables'}")
    say(f"report: {done.report}")
    measured = {} if done.results.base is None else {"base": done.results.base}
    measured |= {f"{trial.calibration}/{trial.seed}/{trial.arm}": trial.measured for trial in done.results.trials}
    unscored = [(name, suite.suite) for name, one in measured.items() for suite in one.suites if not suite.n]
    for name, suite in unscored:
        say(f"{name}: none of the examples of suite {suite} could be scored")
    return done.is_finished and not unscored


def dry_run(recipe: Recipe, *, accelerator: str | None) -> None:
    """Show the graph of a study and what it costs, from configs alone: no weights are loaded, nothing is written."""
    graph = study_graph(recipe, data=False)
    for run_ in graph.runs:
        say(f"{run_.label}: {', '.join(run_.trained)}")
        for arm, trained in run_.same_as.items():
            if arm != trained:
                say(f"  {arm}: the heads of {trained}")
    found = study_cost(graph, accelerator=accelerator)
    show_rows("Work", found.rows())
    where = f"one {accelerator}" if accelerator else "this machine, one unit at a time"
    n_heads, hours = graph.n_heads, found.diagnosis_hours
    say(
        f"map of {n_heads:,} heads: {hours:.2f} hours on {where}; as the paper does it (67 s a head on an H800) "
        f"{paper_hours(n_heads):.1f} hours"
    )
    say(f"whole study: {found.hours(1):.1f} hours on {where}, {found.hours(8):.1f} on eight")
    for note in found.notes:
        say(f"note: {note}")
