"""`castune` without its start-up: a process that has imported everything forks for each command it is asked for.

python castune_server.py FOLDER      # serves FOLDER/castune, a command to put on the PATH
"""

from __future__ import annotations

import json
import os
import socket
import sys
import traceback
from pathlib import Path

_CLIENT = """#!{python} -S
import json, os, socket, sys
with socket.socket(socket.AF_UNIX) as server:
    server.connect({address!r})
    order = json.dumps([sys.argv[1:], os.getcwd(), dict(os.environ)]).encode()
    socket.send_fds(server, [len(order).to_bytes(8, "big")], [0, 1, 2])
    server.sendall(order)
    sys.exit(int.from_bytes(server.recv(1), "big"))
"""


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
    import castune.evaluations
    import castune.pipeline
    import castune.reproduce  # noqa: F401

    client = folder / "castune"
    client.write_text(_CLIENT.format(python=sys.executable, address=str(folder / "socket")), encoding="utf-8")
    client.chmod(0o755)
    while True:
        connection, _ = server.accept()
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
