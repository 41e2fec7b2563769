"""Splitting work over processes: `torchrun`, or separate jobs that share a run directory."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch.distributed

from castune.errors import CastuneError

T = TypeVar("T")

# Ranks wait for the slowest share; a dead rank is torchrun's to notice.
_PATIENCE = timedelta(days=30)


@dataclass(frozen=True)
class Shard:
    """This process's share of the work: number `index` (0-based) of `count`.

    `together`: the processes belong to one torchrun job and can wait for each other.
    """

    index: int = 0
    count: int = 1
    together: bool = False

    @classmethod
    def of(cls, text: str | None = None) -> Shard:
        """The share named by `"i/n"` (1-based), else that of this torchrun rank, else everything.

        Raises:
            CastuneError: `text` is no share, or is given inside a torchrun job.
        """
        ranks = cls.n_processes()
        if text is not None:
            match = re.fullmatch(r"(\d+)/(\d+)", text.strip())
            if match is None or not 1 <= int(match[1]) <= int(match[2]):
                raise CastuneError(f"shard {text!r}: accepted: 1/n to n/n, for example 2/4")
            if ranks > 1:
                raise CastuneError("torchrun splits the work over its processes itself: leave out the shard")
            return cls(int(match[1]) - 1, int(match[2]))
        if ranks > 1:
            if not torch.distributed.is_initialized():
                torch.distributed.init_process_group("gloo", timeout=_PATIENCE)
            return cls(torch.distributed.get_rank(), ranks, together=True)
        return cls()

    @staticmethod
    def is_main_process() -> bool:
        """Whether this is the first process of a torchrun job, or the only one; joins no process group."""
        return os.environ.get("RANK", "0") == "0"

    @staticmethod
    def n_processes() -> int:
        """Processes of this torchrun job; joins no process group."""
        return int(os.environ.get("WORLD_SIZE", "1"))

    @property
    def is_first(self) -> bool:
        """Whether this process does what is not shared."""
        return self.index == 0

    @property
    def writes(self) -> bool:
        """Whether this process writes what all shares together make: one rank of a job, every separate job."""
        return self.is_first or not self.together

    def wait(self) -> None:
        """Wait until all processes of the torchrun job are here."""
        if self.together:
            torch.distributed.barrier()

    def share(self, items: Sequence[T], cost: Callable[[T], float]) -> list[T]:
        """This process's items: dealt out by descending cost, so that all shares cost about the same."""
        order = sorted(range(len(items)), key=lambda i: (-cost(items[i]), i))
        return [items[i] for i in sorted(order[self.index :: self.count])]
