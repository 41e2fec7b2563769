"""Does a 95 % interval keep a threshold, and with how many examples would it be known? Pure.

What is measured is the unweighted mean of one or several suites, each of its own examples. A suite can say what its
interval would be with another number of examples and the same outcomes in proportion.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from castune.stats.distributions import Interval, student_quantile
from castune.stats.estimates import Estimate, PairedDifference, paired_rate_interval, wilson_interval

# Beyond so many times the examples there are, nobody would measure them.
_MOST_TIMES = 2**20


class Measured(Protocol):
    """One suite: a value, and an interval that gets narrower with more examples."""

    @property
    def value(self) -> float | None:
        """Over the scored examples; None without."""

    @property
    def possible(self) -> tuple[float, float]:
        """The lowest and the highest value, whatever unscored examples are; known where the interval is."""

    @property
    def total(self) -> int:
        """How many examples, unscored ones included."""

    def interval(self, times: float = 1.0) -> Interval | None:
        """At 95 %, with so many times the examples; None where nothing bounds it."""


@dataclass(frozen=True)
class Rate:
    """A rate of `n` scored examples. An unscored one may be either: it widens the interval on both sides.

    Attributes:
        successes: right or refused.
        n: scored.
        unscored: not scored.
    """

    successes: int
    n: int
    unscored: int = 0

    @classmethod
    def of(cls, found: Estimate) -> Rate:
        """From the mean of outcomes that are 1 or 0."""
        return cls(round((found.value or 0.0) * found.n), found.n, found.unscored)

    @property
    def value(self) -> float | None:
        """The rate over scored examples."""
        return self.successes / self.n if self.n else None

    @property
    def possible(self) -> tuple[float, float]:
        """Unscored examples are all failures, or all successes."""
        return self.successes / self.total, (self.successes + self.unscored) / self.total

    @property
    def total(self) -> int:
        """Scored or not."""
        return self.n + self.unscored

    def interval(self, times: float = 1.0) -> Interval | None:
        """Wilson's: its lower end for the lowest possible rate, its upper end for the highest."""
        n = self.total * times
        low = wilson_interval(self.successes * times, n)
        high = wilson_interval((self.successes + self.unscored) * times, n)
        return None if low is None or high is None else Interval(low[0], high[1])


@dataclass(frozen=True)
class RateChange:
    """The difference of two rates of the same `n` examples. An unscored pair may be lost or gained.

    Attributes:
        gained: right or refused after and not before.
        lost: the opposite.
        n: pairs scored on both sides.
        unscored: other pairs.
    """

    gained: int
    lost: int
    n: int
    unscored: int = 0

    @property
    def value(self) -> float | None:
        """After minus before, over pairs scored on both sides."""
        return (self.gained - self.lost) / self.n if self.n else None

    @property
    def possible(self) -> tuple[float, float]:
        """Unscored pairs are all lost, or all gained."""
        least, most = (self.gained - self.lost + sign * self.unscored for sign in (-1, 1))
        return least / self.total, most / self.total

    @property
    def total(self) -> int:
        """Pairs, scored or not."""
        return self.n + self.unscored

    def interval(self, times: float = 1.0) -> Interval | None:
        """Tango's: its lower end for the lowest possible difference, its upper end for the highest."""
        gained, lost, unscored, n = (count * times for count in (self.gained, self.lost, self.unscored, self.total))
        low, high = paired_rate_interval(gained, lost + unscored, n), paired_rate_interval(gained + unscored, lost, n)
        return None if low is None or high is None else Interval(low[0], high[1])


@dataclass(frozen=True)
class Mean:
    """A mean of numbers, or of their paired differences. One that is unscored could be any number.

    Attributes:
        value: over scored examples; None without.
        standard_error: of it; None for fewer than two.
        n: scored.
        unscored: not scored.
    """

    value: float | None
    standard_error: float | None
    n: int
    unscored: int = 0

    @classmethod
    def of(cls, found: Estimate | PairedDifference) -> Mean:
        """From a mean with its standard error."""
        return cls(found.value, found.standard_error, found.n, found.unscored)

    @property
    def possible(self) -> tuple[float, float]:
        """The value, where it has an interval."""
        assert self.value is not None
        return self.value, self.value

    @property
    def total(self) -> int:
        """Scored or not."""
        return self.n + self.unscored

    def interval(self, times: float = 1.0) -> Interval | None:
        """Student's; None where an example is unscored, or all have one value: nothing tells how far others are."""
        if self.value is None or not self.standard_error or self.unscored:
            return None
        half = student_quantile(self.n * times - 1) * self.standard_error / math.sqrt(times)
        return Interval(self.value - half, self.value + half)


def mean_value(suites: Sequence[Measured]) -> float | None:
    """Unweighted mean over suites; None where one has no scored example."""
    values = [suite.value for suite in suites if suite.value is not None]
    return sum(values) / len(values) if values and len(values) == len(suites) else None


def mean_interval(suites: Sequence[Measured], times: float = 1.0) -> Interval | None:
    """95 % interval of the unweighted mean over suites, each with so many times its examples; None where one has none.

    On each side the distances of the suites' values from their ends are squared and added (Zou and Donner 2008): unlike
    a normal interval it stays within [0, 1], and has a width where all examples of all suites came out alike.
    """
    intervals = [interval for suite in suites if (interval := suite.interval(times)) is not None]
    if not suites or len(intervals) < len(suites):
        return None
    if len(suites) == 1:
        return intervals[0]  # exactly, without the rounding below
    lowest, highest = zip(*(suite.possible for suite in suites), strict=True)
    lows, highs = zip(*intervals, strict=True)
    below = math.hypot(*(value - low for value, low in zip(lowest, lows, strict=True)))
    above = math.hypot(*(high - value for value, high in zip(highest, highs, strict=True)))
    return Interval((sum(lowest) - below) / len(suites), (sum(highest) + above) / len(suites))


@dataclass(frozen=True)
class Threshold:
    """What a number must reach, or must not exceed.

    Attributes:
        value: of the threshold; itself on the right side.
        is_floor: whether what is above it is right; else what is below.
    """

    value: float
    is_floor: bool

    def is_kept(self, interval: Interval) -> bool | None:
        """True where the whole interval is on the right side, False on the wrong one, None where it straddles."""
        low, high, least = interval.low, interval.high, self.value
        if not self.is_floor:
            low, high, least = -high, -low, -least
        if low >= least:
            return True
        return False if high < least else None


def examples_needed(suites: Sequence[Measured], threshold: Threshold) -> int | None:
    """The smallest number of examples whose interval does not straddle, if what was observed is the truth.

    Args:
        suites: what was measured, and straddles; all are enlarged in proportion.
        threshold: what it straddles.

    Returns:
        How many examples of all suites together; None where no number helps: the value is the threshold, unscored
        examples leave it open, or it would take a million times as many.
    """
    total = sum(suite.total for suite in suites)

    def is_decided(n: int) -> bool:
        interval = mean_interval(suites, n / total)
        return interval is not None and threshold.is_kept(interval) is not None

    if total == 0:
        return None
    enough = total
    while not is_decided(enough):
        enough *= 2
        if enough > total * _MOST_TIMES:
            return None
    too_few = enough // 2
    while enough - too_few > 1:
        middle = (too_few + enough) // 2
        too_few, enough = (too_few, middle) if is_decided(middle) else (middle, enough)
    return enough
