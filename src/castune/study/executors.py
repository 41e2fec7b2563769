"""Where units of a study are done: in processes of this machine, or as tasks of a Ray cluster.

An executor only starts units and tells how they ended. What is ready, what is retried and what is blocked is the
business of `schedule.py`, the same for all of them.
"""

from __future__ import annotations

import json
import logging
import os
import select
import selectors
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import suppress
from types import ModuleType
from typing import TYPE_CHECKING, NamedTuple

from castune.core.numbers import gigabytes
from castune.errors import CastuneError
from castune.study.directory import StudyDirectory
from castune.study.graph import WorkUnit
from castune.study.worker import Outcome, Task, attempt, exit_words

if TYPE_CHECKING:
    import ray

# Before a process is started again where none could be.
_SECONDS_TO_RECOVER = 5.0
# Units that a cluster is given at once.
_QUEUED = 10_000
# What of this process's environment tasks of Ray get too. Ray stores and shows it: nothing secret.
_PASSED_ON = ("HF_HUB_OFFLINE", "HF_HOME", "TOKENIZERS_PARALLELISM", "ONEDNN_PRIMITIVE_CACHE_CAPACITY")


class Resources(NamedTuple):
    """What every unit has to itself.

    Attributes:
        threads: CPU threads. Sums of floating-point numbers depend on how they are split: results are equal bit for bit
            between executions with the same number.
        gpus: accelerators.
        memory: bytes of memory, for Ray to know what fits on a node; None: not declared.
        launch: what starts the processes of one diagnosis or training, `torchrun` or `accelerate launch` with its
            options; empty: one process.
    """

    threads: int
    gpus: int = 0
    memory: int | None = None
    launch: tuple[str, ...] = ()

    def task(self, folder: StudyDirectory, unit: WorkUnit) -> Task:
        """The unit as a process does it."""
        log = str(folder.log(unit.name))
        return {"unit": unit.to_json(), "log": log, "threads": self.threads, "launch": list(self.launch)}


class Executor(ABC):
    """Starts units and waits for them. Closed at the end of a `with` block, which stops what still runs.

    Attributes:
        slots: how many units it takes at once.
    """

    slots: int

    @abstractmethod
    def start(self, unit: WorkUnit) -> None:
        """Start a unit; there is a free slot."""

    @abstractmethod
    def wait(self, seconds: float) -> list[Outcome]:
        """Outcomes of units that have ended; waits up to so many seconds for the first."""

    @abstractmethod
    def close(self) -> None:
        """Stop everything."""

    def __enter__(self) -> Executor:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class LocalExecutor(Executor):
    """Worker processes on this machine.

    Args:
        folder: the study directory, for logs.
        workers: how many processes.
        resources: of each of them; with accelerators, worker i sees the i-th share of them.
    """

    def __init__(self, folder: StudyDirectory, workers: int, resources: Resources) -> None:
        self.folder, self.slots, self.resources = folder, workers, resources
        self._workers: dict[int, subprocess.Popen[str]] = {}
        self._unit_of: dict[int, str] = {}
        self._not_started: list[Outcome] = []
        self._selector = selectors.DefaultSelector()

    def start(self, unit: WorkUnit) -> None:
        """Give the unit to an idle worker; start one where there is none."""
        slot = next(slot for slot in range(self.slots) if slot not in self._unit_of)
        try:
            worker = self._workers.get(slot) or self._spawn(slot)
        except OSError as error:  # no memory or no processes left, for now
            self._not_started.append(Outcome(unit.name, "died", f"no process could be started: {error.strerror}"))
            return
        self._unit_of[slot] = unit.name
        assert worker.stdin is not None
        with suppress(OSError):  # it died while it was idle: its standard output has ended too, which `wait` sees
            worker.stdin.write(json.dumps(self.resources.task(self.folder, unit)) + "\n")
            worker.stdin.flush()

    def wait(self, seconds: float) -> list[Outcome]:
        """Outcomes of workers that have answered or died."""
        outcomes, self._not_started = self._not_started, []
        if outcomes:
            time.sleep(min(seconds, _SECONDS_TO_RECOVER))
            return outcomes
        for key, _ in self._selector.select(seconds):
            slot: int = key.data
            worker = self._workers[slot]
            assert worker.stdout is not None
            line = worker.stdout.readline()
            if not line.endswith("\n"):
                outcomes += self._died(slot)
                continue
            self._unit_of.pop(slot)
            outcomes.append(Outcome(**json.loads(line)))
        # A process that it started may hold its standard output open when it is gone.
        for slot, worker in list(self._workers.items()):
            assert worker.stdout is not None
            if worker.poll() is not None and not select.select([worker.stdout], [], [], 0)[0]:
                outcomes += self._died(slot)
        return outcomes

    def _died(self, slot: int) -> list[Outcome]:
        code = self._forget(slot)
        name = self._unit_of.pop(slot, None)
        return [] if name is None else [Outcome(name, "died", f"its process ended ({exit_words(code)})")]

    def close(self) -> None:
        """Stop all workers."""
        for slot in list(self._workers):
            self._workers[slot].kill()
            self._forget(slot)

    def _spawn(self, slot: int) -> subprocess.Popen[str]:
        threads = str(self.resources.threads)
        environment = {**os.environ, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
        if self.resources.gpus:
            first = slot * self.resources.gpus
            devices = _visible_devices()[first : first + self.resources.gpus]
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(devices)
        elif self.slots > 1:
            # Threads that wait must not burn the cores on which others work.
            environment.setdefault("OMP_WAIT_POLICY", "passive")
        log = self.folder.logs / f"worker-{slot + 1}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("a", encoding="utf-8") as errors:
            worker = subprocess.Popen(
                [sys.executable, "-m", "castune.study.worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                encoding="utf-8",
                env=environment,
                # Ctrl-C is for the study alone, which then stops its workers.
                start_new_session=True,
            )
        self._workers[slot] = worker
        self._selector.register(worker.stdout, selectors.EVENT_READ, slot)  # type: ignore[arg-type]
        return worker

    def _forget(self, slot: int) -> int:
        worker = self._workers.pop(slot)
        self._selector.unregister(worker.stdout)  # type: ignore[arg-type]
        for pipe in (worker.stdin, worker.stdout):
            assert pipe is not None
            with suppress(OSError):  # a line that the dead worker never read
                pipe.close()
        return worker.wait()


class RayExecutor(Executor):
    """Tasks of a Ray cluster whose nodes share a file system with the study directory.

    Args:
        folder: the study directory.
        resources: what a unit needs; Ray places it on a node that has so much.
        address: of a running cluster, `auto` for the one this machine belongs to; None starts one here, for `workers`.
        workers: how many units run at once on the embedded cluster.
    """

    def __init__(
        self, folder: StudyDirectory, resources: Resources, *, address: str | None = None, workers: int = 1
    ) -> None:
        self._ray = require_ray()
        self.folder, self.resources = StudyDirectory(folder.path.absolute()), resources
        # A cluster queues what does not fit yet, which is what makes it grow. Here units that wait would die with Ray.
        self.slots = workers if address is None else _QUEUED
        self._names: dict[ray.ObjectRef, str] = {}
        started: dict[str, object] = (
            {"address": address}
            if address is not None
            else {
                "num_cpus": workers * resources.threads,
                "num_gpus": workers * resources.gpus,
                "include_dashboard": False,
            }
        )
        threads = str(resources.threads)
        environment = {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "OMP_WAIT_POLICY": "passive"}
        environment |= {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
        try:
            self._ray.init(
                **started, log_to_driver=False, logging_level=logging.WARNING, runtime_env={"env_vars": environment}
            )
        except ConnectionError as error:
            reason = " ".join(str(error).split())[:200]
            raise CastuneError(f"--address {address}: no Ray cluster answers there: {reason}") from None
        has = self._ray.cluster_resources().get("memory", 0)
        # A cluster of its own may grow; this one would wait for ever.
        if address is None and resources.memory is not None and resources.memory > has:
            self._ray.shutdown()
            raise CastuneError(
                f"--memory {resources.memory / 1e9:g}: the Ray that was started here has {gigabytes(has)}"
            )
        # Retries are the study's own business: it notes them.
        self._options: dict[str, int] = {"num_cpus": resources.threads, "num_gpus": resources.gpus, "max_retries": 0}
        if resources.memory is not None:
            self._options["memory"] = resources.memory
        self._attempt = self._ray.remote(attempt)

    def start(self, unit: WorkUnit) -> None:
        """Queue the unit."""
        task = self.resources.task(self.folder, unit)
        self._names[self._attempt.options(name=unit.name, **self._options).remote(task)] = unit.name

    def wait(self, seconds: float) -> list[Outcome]:
        """Outcomes of tasks that have ended, whatever became of their nodes."""
        if not self._names:
            return []
        ended, _ = self._ray.wait(list(self._names), num_returns=1, timeout=seconds)
        return [self._outcome(reference) for reference in ended]

    def close(self) -> None:
        """Stop all tasks and leave the cluster; an embedded one ends."""
        for reference in self._names:
            self._ray.cancel(reference, force=True)
        self._ray.shutdown()

    def _outcome(self, reference: ray.ObjectRef) -> Outcome:
        name = self._names.pop(reference)
        try:
            return Outcome(**self._ray.get(reference))
        except self._ray.exceptions.RayTaskError:
            raise  # `attempt` lets nothing through: a bug
        except self._ray.exceptions.RayError as error:
            reason = str(error).strip().splitlines()[0][:200]
            return Outcome(name, "died", f"{type(error).__name__}: {reason}")


def require_ray() -> ModuleType:
    """The package ray.

    Raises:
        CastuneError: it is not installed; the message says what to install.
    """
    try:
        import ray
        import ray.exceptions
    except ImportError:
        raise CastuneError(
            "--executor ray needs the package ray: python -m pip install 'castune[ray]'; or --executor local"
        ) from None
    module: ModuleType = ray
    return module


def _visible_devices() -> Sequence[str]:
    import torch

    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",") if named else [str(i) for i in range(torch.cuda.device_count())]
