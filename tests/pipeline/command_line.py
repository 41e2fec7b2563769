"""The real command line in a process of its own, and what it must say of bad input."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from castune_server import served_castune
from processes import run_command
from typer.testing import CliRunner

from castune.cli import app
from castune.errors import CastuneError

BIN = Path(sys.executable).parent


def castune(*arguments: object, cwd: Path, timeout: float = 600) -> subprocess.CompletedProcess[str]:
    """A command in a process of its own, forked from one that has imported everything."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return run_command([served_castune(), *arguments], cwd=cwd, env=environment, timeout=timeout)


def assert_one_error(done: subprocess.CompletedProcess[str], *said: str) -> str:
    """Exit code 2 and exactly one line of error, which says all of `said` (regular expressions)."""
    assert done.returncode == 2, (done.returncode, done.stdout, done.stderr)
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("error:")]
    assert len(errors) == 1, done.stderr
    assert lines[-1] == errors[0], "the error is the last thing the user reads"
    assert "Traceback" not in done.stderr
    for pattern in said:
        assert re.search(pattern, errors[0]), (pattern, errors[0])
    return errors[0]


def command(*arguments: object) -> str:
    """A command in this process, which is faster; an error of the user's is raised."""
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if done.exception is not None:
        raise done.exception
    return done.output


def refused(*arguments: object) -> str:
    """The error, one line, that a command in this process ends with."""
    with pytest.raises(CastuneError) as error:
        command(*arguments)
    assert "\n" not in str(error.value)
    return str(error.value)
