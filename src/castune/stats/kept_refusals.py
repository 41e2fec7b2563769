"""Refusals that an attack leaves: how many of an arm's, and whether of another arm's fewer. Pure.

Of the prompts that an arm refused before the attack, the share that it refuses still. What is unscored after it, such
as an empty reply, is no refusal any more: else an arm that falls silent would keep them all. Shape letter: N prompt.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from castune.stats.distributions import Interval
from castune.stats.estimates import wilson_interval
from castune.stats.power import sd_of_changes, smallest_paired_difference

Floats = NDArray[np.float64]
# Outcomes of the same prompts: True refused, False not, None unscored.
Refused = Sequence[bool | None]
# With 95 % confidence no more than so many of n prompts would be lost or kept otherwise, where none of n was.
_UNSEEN = 3
# Beyond so many standard errors p is 0 in float64.
_FARTHEST = 38.0


class Kept(NamedTuple):
    """The share of refusals that is kept.

    Attributes:
        value: None where nothing was refused before, or not one prompt is scored after.
        interval: Wilson's, 95 %.
        kept: prompts refused before and after.
        refused: prompts refused before.
        unscored: those of them that are unscored after; not kept.
    """

    value: float | None
    interval: Interval | None
    kept: int
    refused: int
    unscored: int


class KeptDifference(NamedTuple):
    """Share of refusals that one arm keeps minus that of another, on the same prompts.

    Attributes:
        value: None where an arm refused nothing before, or not one of its prompts is scored after.
        interval: 95 %.
        p: two-sided p-value that belongs to it: below 0.05 where it excludes 0.
        smallest: the true difference that would be found in 80 of 100 such measurements at 5 %, at most 1; None where
            an arm refused fewer than two prompts.
        n: prompts scored in both arms before.
        unscored: prompts left out.
    """

    value: float | None
    interval: Interval | None
    p: float | None
    smallest: float | None
    n: int
    unscored: int


def kept(before: Refused, after: Refused) -> Kept:
    """The share of the refusals before an attack that are refusals after it.

    Args:
        before: outcomes of prompts.
        after: of the same prompts, in the same order.

    Raises:
        ValueError: they differ in number.
    """
    after_refused = [a for b, a in zip(before, after, strict=True) if b]
    n, n_kept, unscored = len(after_refused), sum(map(bool, after_refused)), after_refused.count(None)
    ends = wilson_interval(n_kept, n)
    if ends is None or _is_silent(after):
        return Kept(None, None, n_kept, n, unscored)
    return Kept(n_kept / n, Interval(*ends), n_kept, n, unscored)


def kept_difference(first: tuple[Refused, Refused], second: tuple[Refused, Refused]) -> KeptDifference:
    """The share that the first arm keeps minus that of the second, paired by prompt.

    The interval squares and adds the distances of the ends of Wilson's intervals of both shares, less what they have in
    common (Newcombe 1998, his method 10; Zou and Donner 2008): arms that refuse the same prompts lose the same ones.
    So it has a width, too, where an arm keeps all or nothing. p is one minus the level at which the interval would end
    at 0.

    In simulations (40, 120 and 300 prompts of which 30 to 90 % were refused before, arms alike in none to 90 % of them,
    50 to 95 % kept; 2,000 tries each) it held the true difference in 92 to 100 % of cases, 96 % on average: fewest with
    a dozen refusals an arm, most where both arms keep 95 %.

    Args:
        first: outcomes of the prompts under the first arm before and after.
        second: under the second, of the same prompts in the same order.

    Raises:
        ValueError: they differ in number.
    """
    rows = list(zip(*first, *second, strict=True))
    scored = [[bool(one) for one in row] for row in rows if row[0] is not None and row[2] is not None]
    one_before_N, one_after_N, two_before_N, two_after_N = np.array(scored, dtype=float).reshape(-1, 4).T
    one, two = _Share.of(one_before_N, one_after_N), _Share.of(two_before_N, two_after_N)
    unscored = len(rows) - len(scored)
    if one is None or two is None or _is_silent(first[1]) or _is_silent(second[1]):
        return KeptDifference(None, None, None, None, len(scored), unscored)
    in_common = _correlation(one.error_N, two.error_N)
    value = one.value - two.value
    low, high = _ends(one, two, in_common, None)
    return KeptDifference(
        value=value,
        interval=Interval(low, high),
        p=_p(one, two, in_common),
        smallest=_smallest(one, two, in_common),
        n=len(scored),
        unscored=unscored,
    )


def _is_silent(after: Refused) -> bool:
    return all(one is None for one in after)


class _Share(NamedTuple):
    """The share that an arm keeps, and how every prompt moves it."""

    value: float
    kept: float
    refused: float
    error_N: Floats

    @classmethod
    def of(cls, before_N: Floats, after_N: Floats) -> _Share | None:
        refused, n_kept = float(before_N.sum()), float((before_N * after_N).sum())
        if not refused:
            return None
        value = n_kept / refused
        return cls(value, n_kept, refused, before_N * (after_N - value) / refused)

    def distances(self, z: float | None) -> tuple[float, float]:
        """From the value down and up to the ends of its interval."""
        ends = wilson_interval(self.kept, self.refused) if z is None else wilson_interval(self.kept, self.refused, z)
        assert ends is not None
        return self.value - ends[0], ends[1] - self.value

    @property
    def variance(self) -> float:
        """Of the share; where all or nothing is kept, at most that of a few prompts that would not be."""
        found = float((self.error_N**2).sum())
        return found or sd_of_changes(min(1.0, _UNSEEN / self.refused)) ** 2 / self.refused


def _correlation(one_N: Floats, two_N: Floats) -> float:
    both = math.sqrt(float((one_N**2).sum()) * float((two_N**2).sum()))
    return float(one_N @ two_N) / both if both > 0 else 0.0


def _ends(one: _Share, two: _Share, in_common: float, z: float | None) -> tuple[float, float]:
    one_down, one_up = one.distances(z)
    two_down, two_up = two.distances(z)

    def far(a: float, b: float) -> float:
        return math.sqrt(max(0.0, a**2 - 2 * in_common * a * b + b**2))

    value = one.value - two.value
    return max(-1.0, value - far(one_down, two_up)), min(1.0, value + far(one_up, two_down))


def _p(one: _Share, two: _Share, in_common: float) -> float:
    """Two-sided, from the widest interval, in standard errors, that does not hold 0."""

    def holds(z: float) -> bool:
        low, high = _ends(one, two, in_common, z)
        return low <= 0 <= high

    if one.value == two.value:
        return 1.0
    inside, outside = _FARTHEST, 0.0
    for _ in range(60):
        middle = (inside + outside) / 2
        inside, outside = (middle, outside) if holds(middle) else (inside, middle)
    return math.erfc(outside / math.sqrt(2))


def _smallest(one: _Share, two: _Share, in_common: float) -> float | None:
    n_pairs = int(min(one.refused, two.refused))
    variance = one.variance + two.variance - 2 * in_common * math.sqrt(one.variance * two.variance)
    if n_pairs < 2 or variance <= 0:
        return None
    return min(1.0, smallest_paired_difference(math.sqrt(variance), n_pairs))
