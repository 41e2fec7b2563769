"""Progress of long steps: share done, elapsed time and ETA, on standard error."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from tqdm.auto import tqdm


class Advance(Protocol):
    """Tells a progress bar how much work was just done."""

    def __call__(self, work: float = 1, /) -> object:
        """Advance by `work` units."""


def no_progress(work: float = 1, /) -> None:
    """Advance nothing."""


@contextmanager
def progress(description: str, total: float) -> Iterator[Advance]:
    """A bar over `total` units of work; its ETA is right when equal work takes equal time.

    It is drawn on terminals only, so logs of batch jobs stay readable.
    """
    layout = "{desc} {percentage:3.0f}% |{bar}| {elapsed} elapsed, {remaining} left"
    with tqdm(total=total, desc=description, bar_format=layout, disable=None, leave=False) as bar:
        yield bar.update
