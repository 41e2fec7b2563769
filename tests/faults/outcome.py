"""What a run directory holds, but for when and how fast it was made."""

from __future__ import annotations

import hashlib
import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

# What says when and how fast something was made, not what it is.
_VOLATILE = {"provenance", "seconds", "digest", "samples_hash", "date", "started", "updated"}
# Drawings and pages are made anew each time.
MADE_ANEW = (".html", ".svg", ".pdf", ".png", ".md")


def results(run: Path) -> dict[str, str]:
    """A digest of everything a run directory holds, but for when and how fast it was made."""
    return {
        str(path.relative_to(run)): _digest(path)
        for path in sorted(run.rglob("*"))
        if path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(run).parts)
        # A log of steps: a step that was begun twice stands there twice.
        and path.name != "provenance.json"
    }


def leftovers(run: Path) -> list[str]:
    """What was put aside to be moved into place, and is still there."""
    return [
        str(p.relative_to(run.parent)) for p in run.parent.rglob("*") if p.name.startswith(".") and p.suffix != ".next"
    ]


def _digest(path: Path) -> str:
    if path.suffix in MADE_ANEW:
        return "there"
    content: Any = path.read_bytes()
    with suppress(ValueError, OSError):  # damaged on purpose: its bytes are what it is
        content = _content(path, content)
    return hashlib.sha256(content).hexdigest()[:16]


def _content(path: Path, content: Any) -> Any:
    if path.suffix == ".parquet":
        table = pq.read_table(path)
        header = json.loads((table.schema.metadata or {}).get(b"castune", b"{}"))
        content = json.dumps(
            [table.replace_schema_metadata(None).to_pydict(), _stable(header)], sort_keys=True
        ).encode()
    elif path.suffix == ".json":
        content = json.dumps(_stable(json.loads(content)), sort_keys=True).encode()
    return content


def _stable(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _stable(inner) for key, inner in value.items() if key not in _VOLATILE}
    return [_stable(inner) for inner in value] if isinstance(value, list) else value
