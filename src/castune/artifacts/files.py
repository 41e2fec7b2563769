"""Atomic writes, and reading JSON artifacts with a check of kind and schema version."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from castune.errors import ArtifactError

logger = logging.getLogger(__name__)

SCHEMA_VERSION = 1

T = TypeVar("T")


# The umask is the process's and can only be read by changing it: two threads at once would leave it changed.
_UMASK = threading.Lock()


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; move it into place when the block ends without an error."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(descriptor)
    try:
        yield Path(temporary)
        _as_readable_as_any(Path(temporary))
        Path(temporary).replace(path)
    finally:
        Path(temporary).unlink(missing_ok=True)


@contextlib.contextmanager
def new_directory(path: str | Path, *, replace: bool = False) -> Iterator[Path]:
    """Yield an empty directory beside `path`; move it into place when the block ends without an error.

    The directory at `path` is complete or absent, whatever happens in the block.

    Args:
        path: the directory to make; what is there must be an empty directory, unless `replace`.
        replace: put it in the place of what is there.

    Raises:
        ArtifactError: something is there already.
    """
    path = Path(path).absolute()
    if not replace:
        check_vacant(path)
    made = [parent for parent in path.parents if not parent.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    # mkdtemp makes directories private; the one inside is as readable as any the user creates.
    inside = aside / path.name
    inside.mkdir()
    try:
        yield inside
        for file in inside.rglob("*"):
            if file.is_file():
                _as_readable_as_any(file)  # safetensors makes private files too
        if replace and path.exists():
            shutil.rmtree(path)
        inside.rename(path)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        for parent in made:
            with contextlib.suppress(OSError):
                parent.rmdir()
        raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)


@contextlib.contextmanager
def locked(directory: str | Path, *, wait: bool = True, shared: bool = False) -> Iterator[None]:
    """Be the only process in the block for a directory that exists; nothing is left behind, whatever happens.

    Where the file system has no locks, there is none: a warning says so.

    Args:
        directory: the directory.
        wait: for whoever is in it.
        shared: others that share may be in it too.

    Raises:
        BlockingIOError: another process is in it, and `wait` is False.
    """
    descriptor = os.open(directory, os.O_RDONLY)
    kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    try:
        try:
            fcntl.flock(descriptor, kind | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise
        except OSError as error:
            logger.warning("%s: cannot be locked (%s); let no other castune write there now", directory, error)
        yield
    finally:
        os.close(descriptor)


def _as_readable_as_any(file: Path) -> None:
    # mkstemp makes files private; an artifact is as readable as any file the user creates.
    with _UMASK:
        umask = os.umask(0)
        os.umask(umask)
    file.chmod(0o666 & ~umask)


def check_vacant(path: Path) -> None:
    """Refuse a place to write to where something is already; an empty directory is none."""
    if path.is_dir() and not any(path.iterdir()):
        return
    if path.exists() or path.is_symlink():
        raise ArtifactError(
            f"{path}: exists already; give another directory with --out, remove this one, or use --overwrite where the "
            "command has it"
        )


def write_text(path: str | Path, text: str) -> None:
    """Write a text file atomically."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | Path, kind: str, content: dict[str, Any]) -> None:
    """Write a JSON artifact atomically. NaN and infinity are refused: they are no JSON and no result."""
    record = {"kind": kind, "schema_version": SCHEMA_VERSION, **content}
    write_text(path, json.dumps(record, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: str | Path, kind: str, made_by: str) -> dict[str, Any]:
    """Read a JSON artifact.

    Args:
        path: the file.
        kind: what it must be.
        made_by: the command that makes it, for the message when it is missing.

    Raises:
        ArtifactError: missing, damaged, of another kind or schema version.
    """
    path = Path(path)
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ArtifactError(f"{path}: no such {kind}; make it with: {made_by}") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ArtifactError(f"{path}: damaged {kind}: {error}; remove it and run: {made_by}") from None
    check_schema(record, path, kind)
    return record


def check_schema(record: Any, path: Path, kind: str) -> None:
    """Refuse a record of another kind or schema version, naming both sides."""
    if not isinstance(record, dict) or record.get("kind") != kind:
        found = record.get("kind") if isinstance(record, dict) else type(record).__name__
        raise ArtifactError(f"{path}: expected a {kind}, found {found}")
    if record.get("schema_version") != SCHEMA_VERSION:
        raise ArtifactError(
            f"{path}: schema version {record.get('schema_version')}, this castune reads {SCHEMA_VERSION}; "
            "make it again with this version"
        )


def file_hash(path: str | Path) -> str:
    """SHA-256 of a file (first 16 hex digits)."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]


def parsed(path: Path, kind: str, build: Callable[[], T]) -> T:
    """`build()`, with missing or ill-typed fields reported as a damaged artifact."""
    try:
        return build()
    except (KeyError, TypeError, ValueError) as error:
        raise ArtifactError(f"{path}: damaged {kind}: {error!r}") from None
