"""Atomic writes, and reading JSON artifacts with a check of kind and schema version."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from castune.errors import ArtifactError, CastuneError

try:
    import fcntl
except ModuleNotFoundError:
    raise CastuneError(
        "this platform has no POSIX file locks (Python's module fcntl), which castune needs; supported are Linux and "
        "macOS, and Windows under WSL 2"
    ) from None

if TYPE_CHECKING:
    import pyarrow as pa
    from pydantic import TypeAdapter

logger = logging.getLogger(__name__)

SCHEMA_VERSION = 1
# Key of a JSON artifact's digest of everything else in it.
DIGEST = "digest"

# Mode of files with replies to harmful prompts: readable and writable by their owner alone.
PRIVATE = 0o600

T = TypeVar("T")


# The umask is the process's and can only be read by changing it: two threads at once would leave it changed.
_UMASK = threading.Lock()


@contextlib.contextmanager
def replacing(path: str | Path, *, private: bool = False) -> Iterator[Path]:
    """Yield a temporary path beside `path`; move it into place when the block ends without an error.

    Args:
        path: the file to make or replace.
        private: only its owner may read it: it may hold harmful replies.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(descriptor)
    try:
        yield Path(temporary)
        if private:
            Path(temporary).chmod(PRIVATE)
        else:
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
    inside, before = aside / path.name, aside / "before"
    try:
        inside.mkdir()
        yield inside
        for file in inside.rglob("*"):
            if file.is_file():
                _as_readable_as_any(file)  # safetensors makes private files too
        if replace and path.exists():
            path.rename(before)
        try:
            inside.rename(path)
        except OSError as error:
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
                raise ArtifactError(f"{path}: another process has just made it") from None
            raise
    except BaseException:  # also a signal between the two
        if before.exists() and not path.exists():
            before.rename(path)
        _remove(aside)
        for parent in made:
            with contextlib.suppress(OSError):
                parent.rmdir()
        raise
    finally:
        _remove(aside)


def _remove(folder: Path) -> None:
    """Remove a directory, also where a signal comes in the middle of it."""
    try:
        shutil.rmtree(folder, ignore_errors=True)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


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


@contextlib.contextmanager
def alone_at(path: str | Path, *, wait: bool = True) -> Iterator[None]:
    """Be the only process in the block for a place where something is being made; others wait.

    Unlike `locked` it needs nothing to be there yet, and a process that is in it may lock the directory too.

    Args:
        path: of a lock file, which is removed afterwards; one that a killed process left is used again.
        wait: until others have left; False refuses.

    Raises:
        ArtifactError: another process is in the block, and `wait` is False.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, PRIVATE)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if not wait:
                    raise ArtifactError(
                        f"{path.parent}: another castune is at work there; give the command again when it has ended"
                    ) from None
                logger.info("%s: another castune is at work there; waiting for it", path.parent)
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            except OSError as error:
                logger.warning("%s cannot be locked (%s); let no other castune write there now", path, error)
                yield
                return
            # Whoever was here before has removed the file: it is no lock any more.
            try:
                is_lock = path.stat().st_ino == os.fstat(descriptor).st_ino
            except FileNotFoundError:
                is_lock = False
            if not is_lock:
                continue
            try:
                yield
            finally:
                path.unlink(missing_ok=True)
            return
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


def write_text(path: str | Path, text: str, *, private: bool = False) -> None:
    """Write a text file atomically; see `replacing`."""
    with replacing(path, private=private) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | Path, kind: str, content: dict[str, Any]) -> None:
    """Write a JSON artifact and the digest of its content, atomically.

    NaN and infinity are refused: they are no JSON and no result.
    """
    record = {"kind": kind, "schema_version": SCHEMA_VERSION, **content}
    record[DIGEST] = json_digest(record)
    write_text(path, json.dumps(record, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def json_digest(record: Any) -> str:
    """Digest of plain JSON, however it is laid out (first 16 hex digits of SHA-256)."""
    # As it is when it has been read again: keys are text, tuples are lists.
    plain = json.loads(json.dumps(record, allow_nan=False))
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:16]


def read_json(path: str | Path, kind: str, made_by: str) -> dict[str, Any]:
    """Read a JSON artifact.

    Args:
        path: the file.
        kind: what it must be.
        made_by: the command that makes it, for the message when it is missing.

    Raises:
        ArtifactError: missing, damaged (also by a single changed digit), of another kind or schema version.
    """
    path = Path(path)
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ArtifactError(f"{path}: no such {kind}; make it with: {made_by}") from None
    except OSError as error:
        raise ArtifactError(f"{path}: cannot be read as a {kind}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:  # also numbers of thousands of digits
        raise ArtifactError(f"{path}: damaged {kind}: {error}; remove it and run: {made_by}") from None
    check_schema(record, path, kind)
    check_digest(record, path, kind, made_by)
    found: dict[str, Any] = record
    return found


def check_digest(record: dict[str, Any], path: Path, kind: str, made_by: str) -> None:
    """Take the digest out of a record, and refuse one whose content is not what was written.

    Records from before there were digests, and those made by hand, have none.
    """
    noted = record.pop(DIGEST, None)
    if noted is None:
        return
    try:
        found = json_digest(record)
    except ValueError as error:  # NaN, which Python's reader takes
        raise ArtifactError(f"{path}: damaged {kind}: {error}; remove it and run: {made_by}") from None
    if noted != found:
        raise ArtifactError(
            f"{path}: damaged {kind}: its content has digest {found}, noted is {noted}; remove it and run: {made_by}. "
            f"Where it was edited on purpose, take the key {DIGEST!r} out"
        )


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


def write_parquet(path: str | Path, table: pa.Table) -> None:
    """Write a Parquet file atomically, with a checksum of every page."""
    import pyarrow.parquet as pq

    with replacing(path) as temporary:
        pq.write_table(table, temporary, write_page_checksum=True)


def read_parquet(path: str | Path) -> pa.Table:
    """Read a Parquet file of castune's and compare the checksums of its pages.

    Raises:
        OSError, pyarrow.ArrowException: it is damaged.
    """
    import pyarrow.parquet as pq

    # One thread: which error is told must not depend on which came first.
    return pq.read_table(path, page_checksum_verification=True, use_threads=False)


def text_hash(text: str) -> str:
    """SHA-256 of a text in UTF-8 (first 16 hex digits)."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def file_hash(path: str | Path) -> str:
    """SHA-256 of a file (first 16 hex digits)."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]


def typed(path: Path, kind: str, cls: type[T], record: Mapping[str, Any]) -> T:
    """An artifact's dataclass from plain JSON: every field there, and of its type; others are left out.

    Raises:
        ArtifactError: the message names the field.
    """
    from pydantic import ValidationError

    fields = {name: record[name] for name in cls.__dataclass_fields__ if name in record}  # type: ignore[attr-defined]
    try:
        # Strict as JSON is: a list may be a tuple, a text is no number.
        found: T = _adapter(cls).validate_json(json.dumps(fields), strict=True)  # type: ignore[arg-type]
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "as a whole"
        raise ArtifactError(f"{path}: damaged {kind}: {where}: {first['msg']}") from None
    return found


@lru_cache
def _adapter(cls: Any) -> TypeAdapter[Any]:
    from pydantic import TypeAdapter

    return TypeAdapter(cls)


def parsed(path: Path, kind: str, build: Callable[[], T]) -> T:
    """`build()`, with missing or ill-typed fields reported as a damaged artifact."""
    try:
        return build()
    except (KeyError, TypeError, ValueError) as error:
        raise ArtifactError(f"{path}: damaged {kind}: {error!r}") from None
