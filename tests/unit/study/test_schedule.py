"""Order, retries and blocking, with an executor that ends units as a script says."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Collection
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from castune.config import Recipe
from castune.errors import ArtifactError
from castune.study.directory import StudyDirectory
from castune.study.executors import Executor, LocalExecutor, Resources
from castune.study.graph import Graph, WorkUnit
from castune.study.schedule import Schedule, State, load_states, progress_line
from castune.study.worker import Ending, Outcome, attempt

SMALL = Recipe.of(
    out="x", study={"arms": ["safe", "all"], "methods": ["sft"], "buckets": [], "shares": [], "seeds": [1, 2]}
)


class Scripted(Executor):
    """Ends units in the order they were started, as `ends` says of an attempt."""

    def __init__(self, ends: Callable[[str, int], Ending], slots: int = 2, there: Collection[str] = ()) -> None:
        self.ends, self.slots, self.there = ends, slots, there
        self.running: list[WorkUnit] = []
        self.attempts: dict[str, int] = {}
        self.done: list[str] = []
        self.is_closed = False

    def start(self, unit: WorkUnit) -> None:
        assert len(self.running) < self.slots
        # Judging comes when no evaluation is to be waited for, the others when all they need is done.
        assert unit.stage == "judge" or set(unit.needs) <= {*self.done, *self.there}
        self.running.append(unit)
        self.attempts[unit.name] = self.attempts.get(unit.name, 0) + 1

    def wait(self, seconds: float) -> list[Outcome]:
        unit = self.running.pop(0)
        ending = self.ends(unit.name, self.attempts[unit.name])
        if ending == "done":
            self.done.append(unit.name)
        return [Outcome(unit.name, ending, None if ending == "done" else "why", 1.0)]

    def close(self) -> None:
        self.is_closed = True


def test_everything_is_done_once(tmp_path: Path) -> None:
    graph, executor = Graph(SMALL, 8), Scripted(lambda *_: "done")
    assert Schedule(graph.units, tmp_path / "status.json", lambda _: False).run(executor)
    assert sorted(executor.done) == sorted(unit.name for unit in graph.units)
    assert set(executor.attempts.values()) == {1}


@settings(max_examples=40, deadline=None)
@given(fails=st.sets(st.integers(0, 11)), slots=st.integers(1, 5))
def test_a_failure_blocks_what_needs_it_and_nothing_else(
    tmp_path_factory: pytest.TempPathFactory, fails: set[int], slots: int
) -> None:
    graph = Graph(SMALL, 8)
    bad = {unit.name for number, unit in enumerate(graph.units) if number in fails}
    schedule = Schedule(graph.units, tmp_path_factory.mktemp("s") / "status.json", lambda _: False)
    finished = schedule.run(Scripted(lambda name, _: "failed" if name in bad else "done", slots))
    by_name = {unit.name: unit for unit in graph.units}

    def expected(name: str) -> str:
        needed = [expected(other) for other in by_name[name].needs]
        enough = any if by_name[name].stage == "judge" else all
        if needed and not enough(state == "done" for state in needed):
            return "blocked"
        return "failed" if name in bad else "done"

    found = {name: state.state for name, state in schedule.states.items()}
    assert found == {name: expected(name) for name in by_name}
    assert finished is all(state == "done" for state in found.values())


def test_a_unit_whose_process_died_is_tried_three_times(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    graph = Graph(SMALL, 8)
    dying = "tune main/1/safe"
    executor = Scripted(lambda name, attempt: "died" if name == dying and attempt < 3 else "done")
    assert Schedule(graph.units, tmp_path / "status.json", lambda _: False).run(executor)
    assert executor.attempts[dying] == 3
    assert "attempt 2 follows" in caplog.text
    assert "attempt 3 follows" in caplog.text

    executor = Scripted(lambda name, _: "died" if name == dying else "done")
    schedule = Schedule(graph.units, tmp_path / "status.json", lambda _: False)
    assert not schedule.run(executor)
    assert executor.attempts[dying] == 3
    assert schedule.states[dying].state == "failed"
    assert schedule.states["evaluate main/1/safe"].state == "blocked"
    # The other arm of that seed is judged.
    assert schedule.states["judge main/1"].state == "done"


def test_what_is_there_is_not_started_but_only_where_all_it_needs_is(tmp_path: Path) -> None:
    graph = Graph(SMALL, 8)
    there = {"diagnose main", "evaluate base", "tune main/1/safe", "evaluate main/1/safe", "evaluate main/2/all"}
    executor = Scripted(lambda *_: "done", there=there)
    assert Schedule(graph.units, tmp_path / "status.json", lambda unit: unit.name in there).run(executor)
    # An evaluation whose training is missing was of something else.
    assert set(executor.attempts) == {unit.name for unit in graph.units} - (there - {"evaluate main/2/all"})


def test_the_status_on_disk(tmp_path: Path) -> None:
    graph = Graph(SMALL, 8)
    Schedule(graph.units, tmp_path / "status.json", lambda _: False).run(
        Scripted(lambda name, _: "failed" if "all" in name else "done")
    )
    states, started, updated = load_states(StudyDirectory(tmp_path))
    assert started <= updated
    assert states["tune main/1/all"] == State("tune", "failed", 1, 1.0, "why", None)
    assert states["evaluate main/1/all"].state == "blocked"
    (tmp_path / "status.json").write_text(json.dumps({"kind": "study status", "schema_version": 1}))
    with pytest.raises(ArtifactError, match=r"status\.json: damaged"):
        load_states(StudyDirectory(tmp_path))


def test_a_status_that_cannot_be_written_stops_nothing(tmp_path: Path) -> None:
    (tmp_path / "status.json").mkdir()
    assert Schedule(Graph(SMALL, 8).units, tmp_path / "status.json", lambda _: False).run(Scripted(lambda *_: "done"))


def executor_of(program: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> LocalExecutor:
    """An executor whose workers are another program."""
    monkeypatch.setattr(sys, "executable", str(program))
    return LocalExecutor(StudyDirectory(folder), 1, Resources(threads=1))


def ending_of(executor: LocalExecutor) -> Outcome:
    (unit,) = (unit for unit in Graph(SMALL, 8).units if unit.stage == "diagnose")
    with executor:
        executor.start(unit)
        end = time.monotonic() + 30
        while time.monotonic() < end:
            for outcome in executor.wait(0.1):
                return outcome
    raise AssertionError("nobody noticed")


def test_a_dead_worker_is_noticed_though_a_child_of_it_holds_its_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "worker"
    program.write_text("#!/bin/sh\nsleep 60 &\nexit 3\n")
    program.chmod(0o755)
    found = ending_of(executor_of(program, tmp_path, monkeypatch))
    assert (found.ending, found.error) == ("died", "its process ended (exit code 3)")


def test_a_worker_that_cannot_be_started_is_a_unit_that_died(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = ending_of(executor_of(tmp_path / "nowhere", tmp_path, monkeypatch))
    assert found.ending == "died"
    assert "no process could be started" in str(found.error)


def test_errors_of_units_are_one_line_without_secrets(tmp_path: Path) -> None:
    (unit,) = (unit for unit in Graph(SMALL, 8).units if unit.stage == "diagnose")
    # A file where the log should be, named like a key.
    (tmp_path / "hf_0123456789abcdefghijklmnopqrstuv").write_text("")
    log = tmp_path / "hf_0123456789abcdefghijklmnopqrstuv" / "unit.log"
    answer = attempt({"unit": unit.to_json(), "log": str(log), "threads": 1, "launch": []})
    assert answer["ending"] == "failed"
    assert "hf_0123456789" not in answer["error"]
    assert "\n" not in answer["error"]


def test_time_left_follows_from_units_of_the_same_stage() -> None:
    states = [State("tune", "done", 1, 100.0), State("evaluate", "done", 1, 10.0), State("tune"), State("evaluate")]
    # Two units beside each other: 110 seconds of work in 55.
    assert progress_line(states, 55.0) == "2 of 4 units done, about 55 s left"
    assert progress_line([State("tune")], 5.0) == "0 of 1 units done"
    assert progress_line([State("tune", "done", was_there=True), State("tune")], 5.0) == "1 of 2 units done"
