"""Units of a study done in this process, one after the other: JSON lines in on standard input, JSON lines out.

Started by the local executor; or with a file by `torchrun` and the like, as one of the processes of one unit.

It ends when its standard input does, even in the middle of a unit: a study that was killed leaves no process behind
that writes beside its successor. So model libraries, which take their time, are imported when somebody listens.
"""

from __future__ import annotations

import json
import logging
import os
import queue
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, NamedTuple, NotRequired, TypedDict

from castune.artifacts.files import write_text
from castune.errors import CastuneError, of_the_machine
from castune.secrets import redacted
from castune.study.graph import WorkUnit, WorkUnitRecord

# By its full name, which it does not have as the process that it is: logs of units take what castune says.
logger = logging.getLogger("castune.study.worker")

# Evaluations and verdicts are made by one process.
_LAUNCHED = ("diagnose", "tune")

Ending = Literal["done", "failed", "died"]


class Outcome(NamedTuple):
    """How an attempt at a unit ended.

    Attributes:
        name: of the unit.
        ending: `done`; `failed`: it raised an error, and would again; `died`: its process or its node is gone.
        error: what went wrong, in one line.
        seconds: wall time of the attempt; None where nobody was there to measure it.
    """

    name: str
    ending: Ending
    error: str | None = None
    seconds: float | None = None


class Task(TypedDict):
    """What a process is given to do, as plain JSON.

    Attributes:
        unit: see `WorkUnit.to_json`.
        log: file of its log.
        threads: CPU threads.
        launch: what starts several processes for it; empty for one.
        launched_by: the process that has launched this one.
    """

    unit: WorkUnitRecord
    log: str
    threads: int
    launch: list[str]
    launched_by: NotRequired[Process]


class Process(TypedDict):
    """A process, by its machine and its number there."""

    host: str
    pid: int


def attempt(task: Task) -> dict[str, object]:
    """Do a unit in this process. Errors are part of the answer, so that it can come from anywhere.

    Returns:
        Its `Outcome` as a record, which any process can read.
    """
    if task["launch"] and task["unit"]["stage"] in _LAUNCHED:
        return _launched(task)
    started, name = time.monotonic(), task["unit"]["name"]
    error = None
    try:
        with _logging_to(Path(task["log"])):
            # Not at the top: the process that only waits for others loads no model library.
            import torch

            from castune.study.work import perform

            torch.set_num_threads(task["threads"])
            try:
                perform(WorkUnit.from_json(task["unit"]))
            except CastuneError:
                raise
            except Exception as bug:
                if of_the_machine(bug) is None:
                    logger.error("%s", redacted(traceback.format_exc()))
                raise
    except CastuneError as known:
        error = str(known)
    except Exception as bug:
        error = of_the_machine(bug) or f"{type(bug).__name__}: {bug}"
    # It is shown and stored where everybody may read.
    error = None if error is None else redacted(" ".join(error.split()))
    seconds = round(time.monotonic() - started, 2)
    return Outcome(name, "failed" if error is not None else "done", error, seconds)._asdict()


def _launched(task: Task) -> dict[str, object]:
    """Do a unit in several processes; each of them runs `castune.study.worker FILE`, and the first one answers."""
    started = time.monotonic()
    Path(task["log"]).parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, Path(task["log"]).open("a", encoding="utf-8") as log:
        file = Path(folder) / "task.json"
        alone: Task = {**task, "launch": [], "launched_by": {"host": socket.gethostname(), "pid": os.getpid()}}
        file.write_text(json.dumps(alone), encoding="utf-8")
        command = [*task["launch"], "-m", "castune.study.worker", str(file)]
        code = subprocess.run(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, check=False).returncode
        answer = answer_file(file)
        # Where one process died, what another says is how it noticed: the first may have said that it failed.
        if code == 0 and answer.is_file():
            return dict(json.loads(answer.read_text(encoding="utf-8")))
    seconds = round(time.monotonic() - started, 2)
    # Whatever ended its processes, memory that ran out or a node, may not happen again.
    return Outcome(task["unit"]["name"], "died", f"{task['launch'][0]} ended ({exit_words(code)})", seconds)._asdict()


def answer_file(task_file: Path) -> Path:
    """Where the first of the processes of a unit writes how it ended."""
    return task_file.with_suffix(".answer.json")


@contextmanager
def _logging_to(path: Path) -> Iterator[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S"))
    ours = logging.getLogger("castune")
    level, ours.propagate = ours.level, False
    ours.setLevel(logging.INFO)
    ours.addHandler(handler)
    try:
        yield
    finally:
        ours.removeHandler(handler)
        handler.close()
        ours.setLevel(level)
        ours.propagate = True


def exit_words(code: int) -> str:
    """How a process ended."""
    return f"killed by signal {-code}" if code < 0 else f"exit code {code}"


def main() -> None:
    """Do units until there are no more, or the one in the file that was named."""
    if len(sys.argv) > 1:
        _do_one(Path(sys.argv[1]))
        return
    # Results have standard output to themselves: what libraries print goes where logs go.
    results = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    units: queue.Queue[str] = queue.Queue()
    threading.Thread(target=_read, args=(units,), daemon=True).start()
    while True:
        results.write(json.dumps(attempt(json.loads(units.get()))) + "\n")
        results.flush()


def _do_one(file: Path) -> None:
    import torch.distributed

    from castune.core.shards import Shard

    task: Task = json.loads(file.read_text(encoding="utf-8"))
    threading.Thread(target=_end_with, args=(task["launched_by"],), daemon=True).start()
    outcome = attempt(task)
    if Shard.is_main_process():
        write_text(answer_file(file), json.dumps(outcome))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _read(units: queue.Queue[str]) -> None:
    for line in sys.stdin:
        units.put(line)
    os._exit(0)


def _end_with(launched_by: Process) -> None:
    """End when the process that had this one launched is gone, on whose machine this can be seen."""
    while launched_by["host"] == socket.gethostname():
        try:
            os.kill(launched_by["pid"], 0)
        except ProcessLookupError:
            os._exit(1)
        time.sleep(1)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        os._exit(130)  # the study says what there is to say
