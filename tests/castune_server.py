"""`castune` without its start-up: a process that has imported everything forks for each command it is asked for.

python castune_server.py FOLDER      # serves FOLDER/castune, a command to put on the PATH, until its parent ends
"""

from __future__ import annotations

import atexit
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

_CLIENT = """#!{python} -S
import json, os, socket, sys
with socket.socket(socket.AF_UNIX) as server:
    server.connect({address!r})
    order = json.dumps([sys.argv[1:], os.getcwd(), dict(os.environ)]).encode()
    socket.send_fds(server, [len(order).to_bytes(8, "big")], [0, 1, 2])
    server.sendall(order)
    answer = server.recv(1)
    sys.exit(answer[0] if answer else "the command died")
"""


@lru_cache
def served_castune() -> Path:
    """A `castune` that starts in no time, for this process and as long as it lives."""
    folder = Path(tempfile.mkdtemp(prefix="castune-server-"))
    # What libraries read when they are imported.
    environment = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "HF_DATASETS_CACHE": str(folder / "cache")}
    process = subprocess.Popen(
        [sys.executable, __file__, str(folder)], env={**os.environ, **environment}, start_new_session=True
    )

    def stop() -> None:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        shutil.rmtree(folder, ignore_errors=True)

    atexit.register(stop)
    end = time.monotonic() + 300
    while not (folder / "castune").exists():
        assert process.poll() is None, "the server has ended"
        assert time.monotonic() < end, "the server does not start"
        time.sleep(0.05)
    return folder / "castune"


def main() -> None:
    folder = Path(sys.argv[1])
    server = socket.socket(socket.AF_UNIX)
    server.bind(str(folder / "socket"))
    server.listen()
    # Everything that is imported by a command sooner or later. Nothing is computed: threads do not survive a fork.
    import peft  # noqa: F401
    import torch  # noqa: F401
    import transformers.models.llama.modeling_llama
    import transformers.trainer  # noqa: F401

    import castune.cli
    import castune.pipeline
    import castune.steps.evaluate
    import castune.steps.reproduce  # noqa: F401

    client = folder / ".castune"
    client.write_text(_CLIENT.format(python=sys.executable, address=str(folder / "socket")), encoding="utf-8")
    client.chmod(0o755)
    client.rename(folder / "castune")
    parent = os.getppid()
    server.settimeout(5)
    while os.getppid() == parent:
        try:
            connection, _ = server.accept()
        except TimeoutError:
            continue
        connection.settimeout(None)
        if os.fork() == 0:
            _do(connection)
        connection.close()
        while True:  # those that have ended
            try:
                if os.waitpid(-1, os.WNOHANG)[0] == 0:
                    break
            except ChildProcessError:
                break


def _do(connection: socket.socket) -> None:
    """One command, in a process of its own; its exit code is the answer."""
    from castune import cli

    size, descriptors, _, _ = socket.recv_fds(connection, 8, 3)
    order = b""
    while len(order) < int.from_bytes(size, "big"):
        order += connection.recv(65536)
    arguments, place, environment = json.loads(order)
    for number, descriptor in enumerate(descriptors):
        os.dup2(descriptor, number)
    os.chdir(place)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = ["castune", *arguments]
    code = 1
    try:
        cli.main()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    connection.sendall(bytes([code % 256]))
    os._exit(0)


if __name__ == "__main__":
    main()
