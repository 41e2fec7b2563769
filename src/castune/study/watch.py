"""`castune watch`: how far a study is, from its status file, the logs of its units and the maps it has made."""

from __future__ import annotations

import re
import sys
import time
from collections import Counter
from pathlib import Path

from rich.console import Group
from rich.live import Live
from rich.text import Text

from castune.artifacts import ConflictMap
from castune.artifacts.conflict_map import MAP_FILE
from castune.console_table import TextTable, stdout_console
from castune.core.numbers import duration, number
from castune.errors import ArtifactError
from castune.study.directory import StudyDirectory
from castune.study.schedule import State, load_states, progress_line

# A study writes its status whenever a unit starts or ends; units log once a minute. Longer silence is worth a word.
_SILENT = 30 * 60
_TAIL = 4096


def watch(folder: Path, *, interval: float, once: bool) -> None:
    """Show the state of a study until it ends or Ctrl-C; in a pipe or with `once` one time.

    Raises:
        ArtifactError: no study there.
    """
    console, study = stdout_console(160), StudyDirectory(folder)
    view, ended = _view(study)
    if once or not sys.stdout.isatty():
        console.print(view)
        return
    with Live(view, console=console, auto_refresh=False) as live:
        while not ended:
            time.sleep(interval)
            view, ended = _view(study)
            live.update(view, refresh=True)


def _view(folder: StudyDirectory) -> tuple[Group, bool]:
    """What is shown, and whether nothing runs or waits any more."""
    states, started, updated = load_states(folder)
    ended = not any(state.state in ("waiting", "running") for state in states.values())
    now = updated if ended else time.time()
    lines = [Text(f"{folder.path}: {progress_line(list(states.values()), now - started)}", style="bold")]
    newest = max([updated, *(path.stat().st_mtime for path in folder.logs.glob("*.log"))])
    if not ended and now - newest > _SILENT:
        lines.append(Text(f"no output for {duration(now - newest)}: the study may have been stopped"))
    parts: list[TextTable | Text] = [*lines, _stages(states)]
    if any(state.state == "running" for state in states.values()):
        parts.append(_running(folder, states, now))
    for name, state in states.items():
        if state.state == "failed":
            parts.append(Text(f"failed: {name}: {state.error}", style="red"))
    parts += [Text(line) for line in _reliabilities(folder)]
    return Group(*parts), ended


def _stages(states: dict[str, State]) -> TextTable:
    columns = ("done", "running", "waiting", "failed", "blocked")
    rows = []
    for stage in dict.fromkeys(state.stage for state in states.values()):
        counts = Counter(state.state for state in states.values() if state.stage == stage)
        rows.append([stage, *(counts[column] for column in columns)])
    return TextTable(["stage", *columns], rows)


def _running(folder: StudyDirectory, states: dict[str, State], now: float) -> TextTable:
    rows = [
        [
            name,
            None if state.started is None else duration(now - state.started),
            state.attempts,
            _last_line(folder.log(name)),
        ]
        for name, state in states.items()
        if state.state == "running"
    ]
    return TextTable(["running", "for", "attempt", "last log line"], rows)


def _last_line(path: Path) -> str:
    """The last line of a unit's log, without its time; progress lines of trainings carry the loss."""
    if not path.is_file():
        return ""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - _TAIL))
        lines = file.read().decode(encoding="utf-8", errors="replace").strip().splitlines()
    return re.sub(r"^\d{4}-\d\d-\d\d [\d:]+ ", "", lines[-1]) if lines else ""


def _reliabilities(folder: StudyDirectory) -> list[str]:
    """A line a map that is there: how far it can be trusted."""
    found = []
    for path in sorted(folder.maps.glob(f"*/{MAP_FILE}")):
        try:
            cmap = ConflictMap.load(path)
        except ArtifactError as error:
            found.append(str(error))
            continue
        shown = number(cmap.metadata["reliability"]["reliability"])
        found.append(" ".join([f"map {path.parent.name}: reliability of C {shown}.", *cmap.warnings]))
    return found
