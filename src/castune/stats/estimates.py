"""Statistics of evaluations. Pure: numbers in, numbers out."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from castune.stats.distributions import ENDS, LEVEL, Z, student_p, student_quantile

# Counts of resamples that are held at a time.
_DRAWN = 2_000_000
# Outcomes of the same examples before and after: 1, 0, or a number in nats; None where unscored.
Pairs = tuple[Sequence[float | bool | None], Sequence[float | bool | None]]


class Estimate(NamedTuple):
    """A mean with its standard error over `n` values; `unscored` values are in neither."""

    value: float | None
    standard_error: float | None
    n: int
    unscored: int = 0

    @property
    def is_seen(self) -> bool | None:
        """Whether a change is at least twice its standard error; None where that cannot be said."""
        if self.value is None or self.standard_error is None:
            return None
        return self.value != 0 and abs(self.value) >= 2 * self.standard_error


class PairedDifference(NamedTuple):
    """Mean change of the same examples, after minus before.

    Attributes:
        value: mean of after - before over `n` examples scored in both.
        standard_error: of the paired differences.
        n: pairs scored in both.
        unscored: pairs left out.
        gained: pairs that rose.
        lost: pairs that fell.
        p: two-sided p-value; None without pairs. Of outcomes that are right or wrong McNemar's exact test: were gains
            and losses equally likely? Of numbers Student's, of the mean; None too where none differ from another.
    """

    value: float | None
    standard_error: float | None
    n: int
    unscored: int
    gained: int
    lost: int
    p: float | None

    @property
    def is_seen(self) -> bool | None:
        """Whether the test finds a change at 5 %; None without pairs."""
        return None if self.p is None else self.p < LEVEL


class CostRatio(NamedTuple):
    """A utility cost ratio with its 95 % bootstrap interval.

    Attributes:
        value: None where safety did not rise.
        low: lower end; None where it could not be computed.
        high: upper end; None too where it has no bound: too many resamples had no safety gain.
        undefined_share: share of resamples without a safety gain; None without resamples.
    """

    value: float | None
    low: float | None = None
    high: float | None = None
    undefined_share: float | None = None


def estimate(values: Sequence[float | bool | None]) -> Estimate:
    """Mean and standard error of the values that are not None.

    Raises:
        ValueError: a value is not finite.
    """
    scored = np.array([float(value) for value in values if value is not None])
    if not np.isfinite(scored).all():
        raise ValueError("values must be finite; one that could not be scored is None")
    n = len(scored)
    return Estimate(
        value=float(scored.mean()) if n else None,
        standard_error=float(scored.std(ddof=1) / math.sqrt(n)) if n > 1 else None,
        n=n,
        unscored=len(values) - n,
    )


def wilson_interval(successes: float, n: float, z: float = Z) -> tuple[float, float] | None:
    """Wilson's score interval of a rate (1927); None for n = 0. Unlike value ± error it never leaves [0, 1].

    Args:
        successes: how many of n. Counts need not be whole: what would it be with more examples at the same rate?
        n: all.
        z: half its width in standard errors; by default it is that of 95 %.
    """
    # scipy has it in `scipy.stats` alone, which takes as long to import as a small evaluation.
    if n == 0:
        return None
    rate, z2 = successes / n, z**2
    centre = (rate + z2 / (2 * n)) / (1 + z2 / n)
    half = z / (1 + z2 / n) * math.sqrt(rate * (1 - rate) / n + z2 / (4 * n**2))
    return max(0.0, centre - half), min(1.0, centre + half)


def paired_rate_interval(gained: float, lost: float, n: float) -> tuple[float, float] | None:
    """Tango's 95 % score interval of the difference of two rates of the same examples (1998); None for n = 0.

    It holds every difference d whose score statistic (gained - lost - n d) / sqrt(n (2 q + d (1 - d))) is between -Z
    and Z, with q the most likely share of lost pairs given d. Unlike value ± error it has a width where no pair
    differs: ±Z² / (n + Z²). Counts need not be whole.

    Args:
        gained: pairs that are right or refused after and not before.
        lost: pairs of which the opposite holds.
        n: all pairs.
    """
    if n == 0:
        return None

    def is_held(d: float) -> bool:
        b = (2 * n - gained + lost) * d - gained - lost
        q = (math.sqrt(max(0.0, b**2 + 8 * n * lost * d * (1 - d))) - b) / (4 * n)
        return bool((gained - lost - n * d) ** 2 <= Z**2 * n * (2 * q + d * (1 - d)))

    value = (gained - lost) / n
    low, high = (_last_held(is_held, value, end) for end in (-1.0, 1.0))
    return low, high


def _last_held(is_held: Callable[[float], bool], inside: float, end: float) -> float:
    """How far towards `end` an interval reaches around a value that it holds."""
    if is_held(end):
        return end
    # As often as halves of [-1, 1] can be told apart.
    for _ in range(60):
        middle = (inside + end) / 2
        inside, end = (middle, end) if is_held(middle) else (inside, middle)
    return inside


def paired_difference(before: Sequence[float | bool | None], after: Sequence[float | bool | None]) -> PairedDifference:
    """Change of the same examples in the same order; pairs of which one is None are left out."""
    if len(before) != len(after):
        raise ValueError(f"paired values differ in number: {len(before)} and {len(after)}")
    pairs = zip(before, after, strict=True)
    changes = [None if b is None or a is None else float(a) - float(b) for b, a in pairs]
    found = estimate(changes)
    gained = sum(change is not None and change > 0 for change in changes)
    lost = sum(change is not None and change < 0 for change in changes)
    if all(value in (0, 1, None) for value in (*before, *after)):
        return PairedDifference(*found, gained, lost, sign_test(gained, lost) if found.n else None)
    return PairedDifference(*found, gained, lost, _student_test(found))


def _student_test(found: Estimate) -> float | None:
    if found.value is None or not found.standard_error:
        return None
    return student_p(found.value / found.standard_error, found.n - 1)


def student_interval(found: Estimate) -> tuple[float, float] | None:
    """Student's 95 % interval of a mean; None for fewer than two values."""
    if found.value is None or found.standard_error is None:
        return None
    half = student_quantile(found.n - 1) * found.standard_error
    return found.value - half, found.value + half


def sign_test(gained: int, lost: int) -> float:
    """Two-sided exact p-value of at least so uneven a split of gained + lost fair coins (McNemar's exact test)."""
    from scipy.special import bdtr

    return min(1.0, float(2 * bdtr(min(gained, lost), gained + lost, 0.5)))


def utility_cost_ratio(
    *, utility_before: float, utility_after: float, safety_before: float, safety_after: float
) -> float | None:
    """UCR = max(0, (U_b - U_a) / (S_a - S_b)) (Eqs. 7-8), with U the utility and S the safety rate.

    With U the MMLU accuracy this is MMLU-CR. Both may be shares or per cent.

    Returns:
        None when safety did not rise (S_a <= S_b): a cost per gain is undefined without a gain, not 0. The paper's
        eps, which only guards that division, is therefore not needed.
    """
    gain = safety_after - safety_before
    if not math.isfinite(gain) or not math.isfinite(utility_before - utility_after):
        raise ValueError("rates must be finite")
    if gain <= 0:
        return None
    return max(0.0, (utility_before - utility_after) / gain)


def bootstrap_cost_ratio(
    utility: Sequence[Pairs], safety: Sequence[Pairs], *, resamples: int = 4000, seed: int = 0
) -> CostRatio | None:
    """The utility cost ratio of unweighted suite means, with a 95 % percentile interval over examples.

    Examples that are scored before and after count, as in paired differences. Every suite's examples are drawn anew
    with replacement, an example before and after training together. A resample without a safety gain has no ratio: it
    counts as one without bound, so that the interval tells how sure the gain is.

    Args:
        utility: of every utility suite, the outcomes (1, 0 or None) before and after, of the same examples.
        safety: the same of the safety suites.
        resamples: how many.
        seed: of the draws.

    Returns:
        None where a suite has nothing scored in it. No interval where no utility outcome changed, or a suite has
        one example: resamples cannot show what did not occur.
    """
    generator = np.random.default_rng(seed)
    means = {
        name: [_resampled_means(pairs, resamples, generator) for pairs in group]
        for name, group in (("utility", utility), ("safety", safety))
    }
    u_before, u_after = (np.mean([suite[side] for suite in means["utility"]], axis=0) for side in (0, 1))
    s_before, s_after = (np.mean([suite[side] for suite in means["safety"]], axis=0) for side in (0, 1))
    cost, gain = u_before - u_after, s_after - s_before
    # Row 0 is the data as it is.
    if not (np.isfinite(cost[0]) and np.isfinite(gain[0])):
        return None
    value = None if gain[0] <= 0 else max(0.0, float(cost[0] / gain[0]))
    if all(b is None or a is None or b == a for pairs in utility for b, a in zip(*pairs, strict=True)):
        return CostRatio(value)
    known = np.isfinite(cost) & np.isfinite(gain)
    known[0] = False
    cost, gain = cost[known], gain[known]
    if not len(cost) or any(len(before) < 2 for before, _ in (*utility, *safety)):
        return CostRatio(value)
    ratios = np.where(gain > 0, np.maximum(0.0, cost) / np.where(gain > 0, gain, 1.0), np.inf)
    low, high = np.quantile(ratios, ENDS, method="inverted_cdf")
    return CostRatio(
        value,
        float(low) if np.isfinite(low) else None,
        float(high) if np.isfinite(high) else None,
        float(np.mean(gain <= 0)),
    )


def _resampled_means(
    pairs: Pairs, resamples: int, generator: np.random.Generator
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Means before and after: of the data, then of every resample. Examples are alike within a cell of outcomes.

    Numbers that are all different make a cell each, so resamples are drawn some at a time.
    """
    before, after = pairs
    cells = Counter(zip(before, after, strict=True))
    kinds = list(cells)
    counts = np.array([cells[kind] for kind in kinds])
    # What is scored on one side alone says nothing of a change.
    scored = np.array([[None not in kind for kind in kinds] for _ in (0, 1)], dtype=float)
    values = np.array([[float(kind[side] or 0) for kind in kinds] for side in (0, 1)])
    means = []
    at_once = max(1, _DRAWN // len(kinds))
    for first in range(0, resamples + 1, at_once):
        size = min(at_once, resamples + 1 - first)
        drawn = generator.multinomial(counts.sum(), counts / counts.sum(), size=size - (first == 0))
        drawn = np.vstack([counts, drawn]) if first == 0 else drawn
        with np.errstate(invalid="ignore", divide="ignore"):
            means.append(drawn @ (scored * values).T / (drawn @ scored.T))
    before_R, after_R = np.concatenate(means).T
    return before_R, after_R
