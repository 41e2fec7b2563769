"""Doing the units of a study in the order of their needs: retries, what is blocked, and the state on disk."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from castune.artifacts.formats import parsed, read_json, write_json
from castune.core.numbers import duration
from castune.study.directory import StudyDirectory
from castune.study.executors import Executor
from castune.study.graph import WorkUnit
from castune.study.worker import Outcome

logger = logging.getLogger(__name__)

# Attempts at a unit whose process or node died. A unit that raised an error is not tried again: it would again.
_ATTEMPTS = 3
_SECONDS_BETWEEN_LOOKS = 5.0


@dataclass
class State:
    """How far a unit is.

    Attributes:
        stage: of the unit.
        state: waiting | running | done | failed | blocked (by a unit that failed).
        attempts: how often it was started by this command.
        seconds: of the attempt that ended it.
        error: what the last attempt ended with, one line.
        started: of the running attempt, seconds since 1970.
        was_there: it was done before this command.
    """

    stage: str
    state: str = "waiting"
    attempts: int = 0
    seconds: float | None = None
    error: str | None = None
    started: float | None = None
    was_there: bool = False


class Schedule:
    """The units of a study with their states.

    Args:
        units: a unit comes behind those it needs.
        status_file: kept up to date for whoever watches.
        is_done: whether a unit's result is there already.
    """

    def __init__(self, units: Sequence[WorkUnit], status_file: Path, is_done: Callable[[WorkUnit], bool]) -> None:
        self.units, self.status_file = {unit.name: unit for unit in units}, status_file
        self.states = {unit.name: State(unit.stage) for unit in units}
        self._started = time.time()
        for unit in units:
            if all(self.states[name].state == "done" for name in unit.needs) and is_done(unit):
                self.states[unit.name] = State(unit.stage, "done", was_there=True)

    def run(self, executor: Executor) -> bool:
        """Do everything that can be done; returns whether all of it is done.

        Units that fail block those that need them, and nothing else.
        """
        self._save()
        while True:
            self._start_ready(executor)
            if not any(state.state == "running" for state in self.states.values()):
                break
            for outcome in executor.wait(_SECONDS_BETWEEN_LOOKS):
                self._end(outcome)
                self._save()
        self._save()
        return all(state.state == "done" for state in self.states.values())

    def _start_ready(self, executor: Executor) -> None:
        for name, unit in self.units.items():
            state = self.states[name]
            if state.state != "waiting":
                continue
            needed = [self.states[other].state for other in unit.needs]
            if any(other in ("waiting", "running") for other in needed):
                continue
            # Replies are judged where there are some, whatever became of the other arms.
            is_enough = any if unit.stage == "judge" else all
            if needed and not is_enough(other == "done" for other in needed):
                state.state = "blocked"
                self._save()
                continue
            if sum(one.state == "running" for one in self.states.values()) >= executor.slots:
                return
            state.state, state.started = "running", time.time()
            state.attempts += 1
            executor.start(unit)
            self._save()

    def _end(self, outcome: Outcome) -> None:
        state = self.states[outcome.name]
        state.error, state.seconds, state.started = outcome.error, outcome.seconds, None
        if outcome.ending == "done":
            state.state = "done"
            logger.info("%s: done in %s; %s", outcome.name, duration(outcome.seconds or 0.0), self.progress())
            return
        if outcome.ending == "died" and state.attempts < _ATTEMPTS:
            state.state = "waiting"
            logger.warning("%s: %s; attempt %d follows", outcome.name, outcome.error, state.attempts + 1)
            return
        state.state = "failed"
        logger.error("%s: %s", outcome.name, outcome.error)

    def progress(self) -> str:
        """How many units are done, and when the others will be."""
        return progress_line(list(self.states.values()), time.time() - self._started)

    def _save(self) -> None:
        content = {
            "started": self._started,
            "updated": time.time(),
            "units": {name: asdict(state) for name, state in self.states.items()},
        }
        try:
            write_json(self.status_file, "study status", content)
        except OSError as error:  # for whoever watches; units go on, and say themselves what they cannot write
            logger.warning("%s could not be written: %s", self.status_file, error)


def progress_line(states: Sequence[State], elapsed: float) -> str:
    """How many units are done, and about when the others will be, from what units of their stages took."""
    done = sum(state.state == "done" for state in states)
    left = [state for state in states if state.state in ("waiting", "running")]
    mine = [state for state in states if state.seconds is not None and state.state == "done" and not state.was_there]
    text = f"{done} of {len(states)} units done"
    if not left or not mine or elapsed <= 0:
        return text
    means = {}
    for stage in {state.stage for state in mine}:
        seconds = [state.seconds or 0.0 for state in mine if state.stage == stage]
        means[stage] = sum(seconds) / len(seconds)
    usual = sum(means.values()) / len(means)
    # How many units have run beside each other so far.
    beside = max(1.0, sum(state.seconds or 0.0 for state in mine) / elapsed)
    return f"{text}, about {duration(sum(means.get(state.stage, usual) for state in left) / beside)} left"


def load_states(folder: StudyDirectory) -> tuple[dict[str, State], float, float]:
    """The states in a study directory, when its command began and when it last wrote them."""
    path = folder.status_file
    record = read_json(path, "study status", "castune study RECIPE")
    return parsed(
        path,
        "study status",
        lambda: (
            {name: State(**state) for name, state in record["units"].items()},
            float(record["started"]),
            float(record["updated"]),
        ),
    )
