"""A process that does units of a study, one after the other: JSON lines in on standard input, JSON lines out.

Started by the local executor; or with a file by `torchrun` and the like, as one of the processes of one unit.

It ends when its standard input does, even in the middle of a unit: a study that was killed leaves no process behind
that writes beside its successor.
"""

from __future__ import annotations

import json
import os
import queue
import sys
import threading
from pathlib import Path

import torch.distributed

from castune.core.shards import Shard
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
    outcome = attempt(json.loads(file.read_text(encoding="utf-8")))
    if Shard.is_main_process():
        answer_file(file).write_text(json.dumps(outcome), encoding="utf-8")
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _read(units: queue.Queue[str]) -> None:
    for line in sys.stdin:
        units.put(line)
    os._exit(0)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        os._exit(130)  # the study says what there is to say
