"""Intervals of 95 %, from Student's t, exact binomials or draws. Pure.

scipy is imported where it is used: who only looks at results does not wait for it.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

# What is seen is seen at this level: p below it, or a 95 % interval without the value of no effect.
LEVEL = 0.05
# The normal quantile of two-sided 95 % intervals.
Z = 1.959963984540054
# The quantiles of draws that are its ends.
ENDS = (0.025, 0.975)


class Interval(NamedTuple):
    """Both ends of a 95 % interval."""

    low: float
    high: float

    def holds(self, value: float) -> bool:
        """Whether the value lies in it, ends included."""
        return self.low <= value <= self.high


def percentile_interval(draws: ArrayLike) -> Interval:
    """The percentile interval of draws, all finite."""
    low, high = np.quantile(np.asarray(draws, dtype=float), ENDS)
    return Interval(float(low), float(high))


def student_p(t: float, df: float) -> float:
    """Two-sided p-value of a t statistic with df degrees of freedom (any number above 0)."""
    from scipy.special import stdtr

    return float(2 * stdtr(df, -abs(t)))


def student_quantile(df: float, level: float = LEVEL) -> float:
    """The t beyond which half the level lies on either side: by default half a 95 % interval in standard errors.

    It is 4.30 with df = 2, and the normal quantile with infinite df.
    """
    from scipy.special import stdtrit

    return float(stdtrit(df, 1 - level / 2))


def clopper_pearson(successes: int, n: int, *, at_most: int | None = None) -> Interval | None:
    """Exact 95 % interval of a rate (Clopper and Pearson 1934); None for n = 0.

    Args:
        successes: how many of n.
        n: trials.
        at_most: how many if undecided trials count too: the interval then has the lower end of `successes` and the
            upper end of `at_most`.
    """
    from scipy.special import betaincinv

    most = successes if at_most is None else at_most
    if not 0 <= successes <= most <= n:
        raise ValueError(f"{successes} to {most} successes of {n}")
    if n == 0:
        return None
    low = 0.0 if successes == 0 else float(betaincinv(successes, n - successes + 1, ENDS[0]))
    high = 1.0 if most == n else float(betaincinv(most + 1, n - most, ENDS[1]))
    return Interval(low, high)
