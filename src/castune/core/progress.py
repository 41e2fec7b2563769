"""Progress of long steps: share done, elapsed time and ETA, on standard error."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from tqdm.auto import tqdm

logger = logging.getLogger(__name__)

_SECONDS_BETWEEN_LINES = 60


class Advance(Protocol):
    """Tells a progress bar how much work was just done."""

    def __call__(self, work: float = 1, /) -> object:
        """Advance by `work` units."""


class Progress(Advance, Protocol):
    """A progress bar that also shows a word on the state of the work."""

    note: str


def no_progress(work: float = 1, /) -> None:
    """Advance nothing."""


@contextmanager
def progress(description: str, total: float) -> Iterator[Progress]:
    """Progress over `total` units of work; its ETA is right when equal work takes equal time.

    A bar on terminals. Elsewhere a line of the log now and then, so that logs of batch jobs tell the state and stay
    readable.
    """
    if not sys.stderr.isatty():
        yield _LogLines(description, total)
        return
    layout = "{desc} {percentage:3.0f}% |{bar}| {elapsed} elapsed, {remaining} left{postfix}"
    with tqdm(total=total, desc=description, bar_format=layout, leave=False) as bar:
        yield _Bar(bar)


class _Bar:
    def __init__(self, bar: tqdm) -> None:
        self.bar, self.note = bar, ""

    def __call__(self, work: float = 1, /) -> None:
        if self.note:
            self.bar.set_postfix_str(self.note, refresh=False)
        self.bar.update(work)


class _LogLines:
    def __init__(self, description: str, total: float) -> None:
        self.description, self.total = description, total
        self.done, self.started, self.note = 0.0, time.monotonic(), ""
        self.last_line = self.started

    def __call__(self, work: float = 1, /) -> None:
        self.done += work
        now = time.monotonic()
        if now - self.last_line < _SECONDS_BETWEEN_LINES or self.done >= self.total:
            return
        self.last_line = now
        elapsed = now - self.started
        left = elapsed * (self.total - self.done) / self.done
        logger.info(
            "%s: %.0f %%, %s elapsed, about %s left%s",
            self.description,
            100 * self.done / self.total,
            tqdm.format_interval(elapsed),
            tqdm.format_interval(left),
            f", {self.note}" if self.note else "",
        )
