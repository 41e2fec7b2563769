"""Student's t and exact binomial intervals from the incomplete beta function. Pure.

scipy has all of this; castune does without it, and the tests compare the two.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

# The normal quantile of two-sided 95 % intervals.
Z = 1.959963984540054
# Convergence takes about sqrt(max(a, b)) terms: enough for a billion degrees of freedom.
_TERMS = 100_000
# Relative width at which a search by halves ends, and a bound for quantiles near 0.
_WIDTH, _HALVINGS = 1e-13, 200


class Interval(NamedTuple):
    """Both ends of a 95 % interval."""

    low: float
    high: float

    def holds(self, value: float) -> bool:
        """Whether the value lies in it, ends included."""
        return self.low <= value <= self.high


def incomplete_beta(x: float, a: float, b: float) -> float:
    """Regularised incomplete beta function I_x(a, b) for x in [0, 1], a and b > 0 (DLMF 8.17.22, Lentz's method)."""
    if not (0 <= x <= 1 and a > 0 and b > 0 and math.isfinite(a + b)):
        raise ValueError(f"incomplete beta of x = {x}, a = {a}, b = {b}: x in [0, 1], a and b above 0")
    if x in (0.0, 1.0):
        return x
    # The fraction converges fast below the mean; above it the other tail is.
    if x > (a + 1) / (a + b + 2):
        return 1 - incomplete_beta(1 - x, b, a)
    front = math.exp(math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x))
    tiny = 1e-300
    c, d = 1.0, 1 / ((1 - (a + b) * x / (a + 1)) or tiny)
    fraction = d
    for m in range(1, _TERMS):
        for term in (
            m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m)),
            -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1)),
        ):
            d = 1 / ((1 + term * d) or tiny)
            c = (1 + term / c) or tiny
            fraction *= c * d
        if abs(c * d - 1) < 1e-15:
            break
    return min(1.0, front * fraction / a)


def student_p(t: float, df: float) -> float:
    """Two-sided p-value of a t statistic with df degrees of freedom (any number above 0)."""
    return incomplete_beta(df / (df + t * t), df / 2, 0.5) if math.isfinite(t) else 0.0


@lru_cache(maxsize=1024)
def student_quantile(df: float) -> float:
    """The t beyond which 2.5 % lie on either side: half a 95 % interval in standard errors (4.30 with df = 2)."""
    high = 2.0
    while student_p(high, df) > 0.05:
        high *= 2
    return _last(lambda t: student_p(t, df) > 0.05, 0.0, high)


def clopper_pearson(successes: int, n: int, *, at_most: int | None = None) -> Interval | None:
    """Exact 95 % interval of a rate (Clopper and Pearson 1934); None for n = 0.

    Args:
        successes: how many of n.
        n: trials.
        at_most: how many if undecided trials count too: the interval then has the lower end of `successes` and the
            upper end of `at_most`.
    """
    most = successes if at_most is None else at_most
    if not 0 <= successes <= most <= n:
        raise ValueError(f"{successes} to {most} successes of {n}")
    if n == 0:
        return None
    low = 0.0 if successes == 0 else _beta_quantile(0.025, successes, n - successes + 1)
    high = 1.0 if most == n else _beta_quantile(0.975, most + 1, n - most)
    return Interval(low, high)


def _beta_quantile(p: float, a: float, b: float) -> float:
    return _last(lambda x: incomplete_beta(x, a, b) < p, 0.0, 1.0)


def _last(holds: Callable[[float], bool], low: float, high: float) -> float:
    """The last point of [low, high] at which something holds that holds at low and not at high."""
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if holds(middle) else (low, middle)
        if high - low <= _WIDTH * high:
            break
    return high
