"""A process that does units of a study, one after the other: JSON lines in on standard input, JSON lines out.

Started by the local executor; or with a file by `torchrun` and the like, as one of the processes of one unit.

It ends when its standard input does, even in the middle of a unit: a study that was killed leaves no process behind
that writes beside its successor. So model libraries, which take their time, are imported when somebody listens.
"""

from __future__ import annotations

import json
import os
import queue
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any

from castune.artifacts.files import write_text
from castune.study.executors import answer_file, attempt


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

    task = json.loads(file.read_text(encoding="utf-8"))
    threading.Thread(target=_end_with, args=(task.pop("launched_by"),), daemon=True).start()
    outcome = attempt(task)
    if Shard.is_main_process():
        write_text(answer_file(file), json.dumps(outcome))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _read(units: queue.Queue[str]) -> None:
    for line in sys.stdin:
        units.put(line)
    os._exit(0)


def _end_with(launched_by: dict[str, Any]) -> None:
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
