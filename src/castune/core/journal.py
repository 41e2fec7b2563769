"""The journal of a diagnosis or an evaluation: every result is on disk as soon as it is known.

A folder of JSONL files, one for each process that wrote, so that nothing needs a lock: a diagnosis that was killed, or
that is spread over processes and machines with a common file system, reads them all. Every line is a checksum and a
record. One that a killed process left half-written, or that has changed since, is skipped; what it held is measured
again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import time
import zlib
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from castune.artifacts.files import PRIVATE

logger = logging.getLogger(__name__)

Record = dict[str, Any]
_FOLDER = "journal"
# Characters of a line before its record.
_HEAD = len('["01234567", ')
# To write where another process removes the folder.
_ATTEMPTS = 5


@dataclass(frozen=True)
class Journal:
    """Records of one diagnosis.

    Attributes:
        folder: where they lie; None keeps none.
        writer: name of this process's own file.
    """

    folder: Path | None
    writer: str

    @classmethod
    def of(cls, out: Path | None, key: object) -> Journal:
        """The journal in run directory `out` of the diagnosis that `key` (plain JSON) describes.

        Records made under another model, other data or other settings lie in another folder and are never read.
        """
        digest = hashlib.sha256(json.dumps(key, sort_keys=True, default=str).encode()).hexdigest()[:16]
        writer = f"{time.time_ns():x}-{os.getpid()}"
        return cls(None if out is None else out / _FOLDER / digest, writer)

    def append(self, record: Record) -> None:
        """Add a record; it is in the operating system's hands when this returns."""
        if self.folder is None:
            return
        text = json.dumps(record, allow_nan=False)
        line = f'["{_checksum(text)}", {text}]\n'
        for attempt in range(_ATTEMPTS):
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                # Of an evaluation they are replies.
                with open(self.folder / f"{self.writer}.jsonl", "a", encoding="utf-8", opener=_private) as file:
                    file.write(line)
                return
            except FileNotFoundError:  # another process has just finished the same work, and removed the folder
                if attempt == _ATTEMPTS - 1:
                    raise

    def records(self) -> Iterator[Record]:
        """All records of all processes."""
        if self.folder is None:
            return
        for path in sorted(self.folder.glob("*.jsonl")):
            try:
                text = path.read_text(encoding="utf-8", errors="replace")
            except FileNotFoundError:
                return  # another share has just made the map, and removed the journal
            for number, line in enumerate(text.split("\n"), start=1):
                if not line:
                    continue
                record = line[_HEAD:-1]
                if line != f'["{_checksum(record)}", {record}]':
                    logger.warning("%s line %d: truncated or changed; its content is measured again", path, number)
                    continue
                yield json.loads(record)

    def remove(self) -> None:
        """Delete the records, once the artifacts made from them are saved."""
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)
            with suppress(OSError):  # journals of other work are in it, or another process was faster
                self.folder.parent.rmdir()

    @staticmethod
    def remove_all(out: Path) -> None:
        """Delete the records of all diagnoses in a run directory whose map is there: nothing needs them any more."""
        shutil.rmtree(out / _FOLDER, ignore_errors=True)


def _checksum(text: str) -> str:
    return f"{zlib.crc32(text.encode()):08x}"


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, PRIVATE)


def nullable(values: Sequence[float]) -> list[float | None]:
    """Numbers as JSON has them: null where not finite."""
    return [float(value) if abs(value) != float("inf") and value == value else None for value in values]
