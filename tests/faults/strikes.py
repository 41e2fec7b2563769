"""What breaks a command from inside its process: at a file operation, counted by Python's audit events, or by a limit."""

from __future__ import annotations

import ctypes
import errno
import os
import random
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from forked import Before

_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_CHANGES = (
    "os.rename",
    "os.remove",
    "os.mkdir",
    "os.rmdir",
    "os.link",
    "os.symlink",
    "shutil.rmtree",
    "shutil.copyfile",
)


def _touched(event: str, arguments: tuple[Any, ...], root: str) -> bool:
    """Whether an audit event is a change of a file below a directory."""
    if event == "open":
        path, mode, flags = arguments
        if not (isinstance(mode, str) and set(mode) & set("wax+")) and not (isinstance(flags, int) and flags & _WRITES):
            return False
    elif event in _CHANGES:
        path = arguments[0]
    else:
        return False
    return isinstance(path, str | os.PathLike) and os.fspath(path).startswith(root)


class Counting:
    """Counts the file operations of a forked process in memory that it shares with this one."""

    def __init__(self, root: Path) -> None:
        import mmap

        self._memory, self._root = mmap.mmap(-1, 8), str(root / "place")
        self._count = ctypes.c_int64.from_buffer(self._memory)

    def before(self) -> None:
        """Count from now on."""

        def hook(event: str, arguments: tuple[Any, ...]) -> None:
            if _touched(event, arguments, self._root):
                self._count.value += 1

        sys.addaudithook(hook)

    def read(self) -> int:
        """How many there were."""
        return int(self._count.value)


def at_operation(number: int, root: Path, strike: Callable[[str], None], *, from_then_on: bool = False) -> Before:
    """Strike at the file operation of that number."""
    place, seen = str(root / "place"), [0]

    def before() -> None:
        def hook(event: str, arguments: tuple[Any, ...]) -> None:
            if not _touched(event, arguments, place):
                return
            seen[0] += 1
            if seen[0] == number or (from_then_on and seen[0] > number):
                strike(event)

        sys.addaudithook(hook)

    return before


def send(number: int) -> Callable[[str], None]:
    """A signal to this process."""
    return lambda event: os.kill(os.getpid(), number)


def full(event: str) -> None:
    """The disk is full: nothing can be made, things can be removed."""
    if event in ("open", "os.mkdir", "os.link", "shutil.copyfile"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "a file")


def small_files(limit: int) -> Before:
    """No file can grow beyond so many bytes."""
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))


def little_memory(extra: int) -> Before:
    """So many bytes of address space more than are in use."""

    def before() -> None:
        in_use = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        resource.setrlimit(resource.RLIMIT_AS, (in_use + extra, in_use + extra))

    return before


def powerless() -> None:
    """Give up root's right to write where permissions say no (and every other capability)."""

    class Header(ctypes.Structure):
        _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))

    nothing = (ctypes.c_uint32 * 6)()
    if ctypes.CDLL(None, use_errno=True).capset(ctypes.byref(Header(0x20080522, 0)), ctypes.byref(nothing)):
        raise OSError(ctypes.get_errno(), "capset")


def jumping_clock(seed: int) -> Before:
    """The wall clock jumps to and fro by up to a day at every tenth look."""

    def before() -> None:
        generator, offset, looks = random.Random(seed), [0.0], [0]
        now, now_ns = time.time, time.time_ns

        def jumped() -> float:
            looks[0] += 1
            if looks[0] % 10 == 0:
                offset[0] = generator.uniform(-86400, 86400)
            return offset[0]

        time.time = lambda: now() + jumped()
        time.time_ns = lambda: now_ns() + int(jumped() * 1e9)

    return before
