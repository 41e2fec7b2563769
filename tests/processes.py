"""Commands in processes of their own that cannot outlive a test, whatever they started themselves."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import psutil


def run_command(
    command: Sequence[object], *, timeout: float = 600, cwd: Path | None = None, env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a command to its end and return what it said.

    Its standard streams belong to its children too, ranks of torchrun for example: of a command that takes too long all
    processes are killed, or nobody would ever see the end of its output.
    """
    arguments = [str(word) for word in command]
    process = subprocess.Popen(
        arguments, cwd=cwd, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
    )
    with process:
        try:
            said, errors = process.communicate(timeout=timeout)
        except BaseException:
            # Ranks of torchrun have sessions of their own.
            for one in [*psutil.Process(process.pid).children(recursive=True), process]:
                with suppress(psutil.NoSuchProcess, ProcessLookupError):
                    one.kill()
            said, errors = process.communicate(timeout=20)
            print(" ".join(arguments), said, errors, sep="\n")
            raise
    return subprocess.CompletedProcess(arguments, process.returncode, said, errors)
