"""Memory that was freed, and not given back."""

from __future__ import annotations

import ctypes
from contextlib import suppress


def return_freed_memory() -> None:
    """Give memory that was freed, but kept for later, back to the system.

    Batches of ever new shapes leave holes that the next one does not fit into: over some hundred batches glibc's heap
    grows by half, none of it in use.
    """
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
