"""Commands of castune in forked processes: an attempt costs what its work costs, for everything is imported already."""

from __future__ import annotations

import os
import re
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import castune.cli
import castune.pipeline
import castune.report.page
import castune.steps.dial
import castune.steps.drift
import castune.steps.evaluate
import castune.steps.export
import castune.steps.inspect
import castune.tuning.mask

Before = Callable[[], None]


class Ended(NamedTuple):
    """How a command ended: its exit code, negative for a signal, and what it said."""

    code: int
    said: str
    seconds: float


class Started(NamedTuple):
    """A process that runs a command, and where what it says comes out."""

    pid: int
    output: int
    began: float


def start(root: Path, arguments: list[str], before: Before | None = None) -> Started:
    """Fork a process that runs a command in a directory."""
    reading, writing = os.pipe()
    began = time.monotonic()
    pid = os.fork()
    if pid:
        os.close(writing)
        return Started(pid, reading, began)
    code = 70
    try:
        os.setsid()
        os.close(reading)
        for descriptor in (1, 2):
            os.dup2(writing, descriptor)
        os.close(writing)
        sys.stdout, sys.stderr = (os.fdopen(n, "w", encoding="utf-8", closefd=False) for n in (1, 2))
        os.chdir(root)
        sys.argv = ["castune", *arguments]
        if before is not None:
            before()
        castune.cli.main()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    except BaseException:
        traceback.print_exc()
        code = 1
    finally:
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError):
                stream.flush()
        os._exit(code)


def finish(started: Started, kill: tuple[float, int] | None = None) -> Ended:
    """Wait for a command, two minutes at most; stop it at a moment."""
    said = bytearray()
    end = started.began + 120
    while True:
        now = time.monotonic()
        if kill is not None and now >= started.began + kill[0]:
            with suppress(ProcessLookupError):
                os.kill(started.pid, kill[1])
            kill = None
        if now > end:
            # With its children, which hold the pipe open.
            with suppress(ProcessLookupError):
                os.killpg(started.pid, signal.SIGKILL)
            break
        until = end if kill is None else started.began + kill[0]
        readable, _, _ = select.select([started.output], [], [], max(0.001, min(until - now, 0.5)))
        if readable:
            part = os.read(started.output, 65536)
            if not part:
                break
            said += part
    os.close(started.output)
    _, status = os.waitpid(started.pid, 0)
    code = os.waitstatus_to_exitcode(status)
    return Ended(
        -99 if time.monotonic() > end else code, said.decode(errors="replace"), time.monotonic() - started.began
    )


def command(
    root: Path, arguments: list[str], before: Before | None = None, kill: tuple[float, int] | None = None
) -> Ended:
    """Run a command in a forked process; `before` is called in it first, `kill` is a moment and a signal."""
    return finish(start(root, arguments, before), kill)


def told(ended: Ended, *codes: int) -> str | None:
    """What is wrong with how a command ended; None where it is one of these codes, and said without a traceback."""
    if "Traceback" in ended.said:
        return f"traceback: {ended.said[-400:]}"
    if ended.code not in codes:
        return f"exit code {ended.code}, accepted: {codes}: {ended.said[-300:]}"
    if ended.code == 2 and not re.search(r"^error: ", ended.said, re.MULTILINE):
        return f"no error is told: {ended.said[-300:]}"
    return None
