"""Files and directories that are whole or not there: written aside, moved into place, locked while they are used."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import logging
import os
import shutil
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

from castune.errors import ArtifactError, CastuneError

try:
    import fcntl
except ModuleNotFoundError:
    raise CastuneError(
        "this platform has no POSIX file locks (Python's module fcntl), which castune needs; supported are Linux and "
        "macOS, and Windows under WSL 2"
    ) from None

logger = logging.getLogger(__name__)


# Mode of files with replies to harmful prompts: readable and writable by their owner alone.
PRIVATE = 0o600

# The umask is the process's and can only be read by changing it: two threads at once would leave it changed.
_UMASK = threading.Lock()


@contextlib.contextmanager
def replacing(path: str | Path, *, private: bool = False) -> Iterator[Path]:
    """Yield a temporary path beside `path`; move it into place when the block ends without an error.

    A device or pipe, such as /dev/null or /dev/stdout, is written to instead: moving a file there would remove it.

    Args:
        path: the file to make or replace.
        private: only its owner may read it: it may hold harmful replies.
    """
    path = Path(path)
    if path.exists() and not path.is_file() and not path.is_dir():
        with tempfile.TemporaryDirectory() as aside:
            yield Path(aside) / "content"
            with path.open("wb") as stream:
                stream.write((Path(aside) / "content").read_bytes())
        return
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
    except BaseException as error:  # also a signal between the two
        if before.exists() and not path.exists():
            before.rename(path)
        _remove(aside)
        for parent in made:
            with contextlib.suppress(OSError):
                parent.rmdir()
        if isinstance(error, CastuneError) and str(inside) in str(error):
            # By the place that the user named: the one aside is gone.
            raise type(error)(str(error).replace(str(inside), str(path))) from None
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
            logger.warning("%s: cannot be locked (%s); do not let another castune write there", directory, error)
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
                        f"{path.parent}: another castune is running there; run the command again when it has finished"
                    ) from None
                logger.info("%s: another castune is running there; waiting for it", path.parent)
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            except OSError as error:
                logger.warning("%s cannot be locked (%s); do not let another castune write there", path, error)
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


def check_vacant(path: Path, option: str = "--out") -> None:
    """Refuse a place to write to where something is already; an empty directory is none.

    Args:
        path: the place.
        option: by which another one is given.
    """
    if path.is_dir() and not any(path.iterdir()):
        return
    if path.exists() or path.is_symlink():
        raise ArtifactError(
            f"{path}: exists already; give another directory with {option}, remove this one, or use --overwrite where "
            "the command has it"
        )


def write_text(path: str | Path, text: str, *, private: bool = False) -> None:
    """Write a text file atomically; see `replacing`."""
    with replacing(path, private=private) as temporary:
        temporary.write_text(text, encoding="utf-8")


def text_hash(text: str) -> str:
    """SHA-256 of a text in UTF-8 (first 16 hex digits)."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def file_hash(path: str | Path) -> str:
    """SHA-256 of a file (first 16 hex digits)."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]
