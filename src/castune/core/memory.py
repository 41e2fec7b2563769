"""Peak memory of a piece of work: of the accelerator where the model lies on one, else of this process."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class Peak:
    """What a `peak_memory` block took beyond what was in use before; None where the system does not tell."""

    extra: int | None = None


@contextmanager
def peak_memory(device: torch.device) -> Iterator[Peak]:
    """Measure the peak inside the `with` block; read `extra` (bytes) behind it."""
    peak = Peak()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield peak
        peak.extra = torch.cuda.max_memory_allocated(device) - before
        return
    return_freed_memory()
    known = _reset_peak()
    resident = resident_memory()
    yield peak
    highest = _status("VmHWM")
    if known and resident is not None and highest is not None:
        peak.extra = max(0, highest - resident)


def resident_memory() -> int | None:
    """Bytes of this process in memory; None where the system does not tell (it is Linux that does)."""
    return _status("VmRSS")


def return_freed_memory() -> None:
    """Give memory that was freed, but kept for later, back to the system.

    Batches of ever new shapes leave holes that the next one does not fit into: over some hundred batches glibc's heap
    grows by half, none of it in use.
    """
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def _reset_peak() -> bool:
    try:
        _RESET.write_text("5")
    except OSError:
        return False
    return True


def _status(field: str) -> int | None:
    try:
        lines = _STATUS.read_text().splitlines()
    except OSError:
        return None
    found = next((line for line in lines if line.startswith(f"{field}:")), None)
    return None if found is None else int(found.split()[1]) * 1024
