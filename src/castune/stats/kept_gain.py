"""How much of an adapter's gain another one keeps, over the same prompts. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from castune.stats.distributions import ENDS, Interval

Floats = NDArray[np.float64]
# Of the same prompts: without an adapter, with it, and with the other one; 1, 0 or a number, None where unscored.
Outcomes = tuple[Sequence[float | bool | None], Sequence[float | bool | None], Sequence[float | bool | None]]

# A share of a gain that is absent in more of the resamples than this has no interval.
_GAINLESS = 0.025


class KeptGain(NamedTuple):
    """Share of a gain that is kept.

    Attributes:
        value: (other - base) / (adapter - base), of the unweighted means of the suites; None where the adapter gains
            nothing.
        interval: 95 %, percentiles of a bootstrap over prompts, all three together; None where the gain itself is too
            unsure, no prompt differs between the adapter and the other, or a suite has one.
        gain: of the adapter.
        n: prompts that are scored in all three.
    """

    value: float | None
    interval: Interval | None
    gain: float
    n: int


def kept_gain(suites: Sequence[Outcomes], *, resamples: int = 4000, seed: int = 0) -> KeptGain:
    """Share of the gain of an adapter that another one keeps.

    Args:
        suites: outcomes of every suite, higher is better.
        resamples: of the bootstrap.
        seed: of the draws.

    Raises:
        ValueError: no suite, or one of which no prompt is scored in all three.
    """
    scored = [_scored(outcomes) for outcomes in suites]
    if not scored or not all(part_3N.shape[1] for part_3N in scored):
        raise ValueError("needs at least one suite, each with a prompt that is scored in all three")
    generator = np.random.default_rng(seed)
    means_3 = np.mean([part_3N.mean(1) for part_3N in scored], axis=0)
    gain, n = float(means_3[1] - means_3[0]), sum(part_3N.shape[1] for part_3N in scored)
    if gain <= 0:
        return KeptGain(None, None, gain, n)
    value = float((means_3[2] - means_3[0]) / gain)
    if all(np.array_equal(part_3N[1], part_3N[2]) for part_3N in scored):
        return KeptGain(value, None, gain, n)
    drawn_3R = np.mean([_drawn_means(part_3N, resamples, generator) for part_3N in scored], axis=0)
    gain_R = drawn_3R[1] - drawn_3R[0]
    if (gain_R <= 0).mean() > _GAINLESS:
        return KeptGain(value, None, gain, n)
    known = gain_R > 0
    kept_R = (drawn_3R[2] - drawn_3R[0])[known] / gain_R[known]
    if any(part_3N.shape[1] < 2 for part_3N in scored):
        return KeptGain(value, None, gain, n)
    low, high = np.quantile(kept_R, ENDS)
    return KeptGain(value, Interval(float(low), float(high)), gain, n)


def _scored(outcomes: Outcomes) -> Floats:
    """Outcomes `[3, N]` of the prompts that are scored in all three."""
    values_3N = np.array([[np.nan if one is None else float(one) for one in of_one] for of_one in outcomes])
    return np.asarray(values_3N[:, np.isfinite(values_3N).all(0)])


def _drawn_means(values_3N: Floats, resamples: int, generator: np.random.Generator) -> Floats:
    """Means `[3, R]` over prompts drawn anew with replacement."""
    n = values_3N.shape[1]
    counts_RN = generator.multinomial(n, np.full(n, 1 / n), size=resamples)
    return np.asarray(values_3N @ counts_RN.T / n)
