"""Statistics of evaluations. Pure: numbers in, numbers out."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from castune.core.ranking import percentile_rank

# At most this many permutations are enumerated; beyond, as many are drawn at random.
_PERMUTATIONS = 10_000


class Estimate(NamedTuple):
    """A mean with its standard error over `n` values; `unscored` values are in neither."""

    value: float | None
    standard_error: float | None
    n: int
    unscored: int


class Correlation(NamedTuple):
    """Pearson r and Spearman rho with two-sided permutation p-values; None where a side does not vary."""

    pearson: float | None
    spearman: float | None
    n: int
    pearson_p: float | None
    spearman_p: float | None


def estimate(values: Sequence[float | bool | None]) -> Estimate:
    """Mean and standard error of the values that are not None."""
    scored = np.array([float(value) for value in values if value is not None])
    n = len(scored)
    return Estimate(
        value=float(scored.mean()) if n else None,
        standard_error=float(scored.std(ddof=1) / math.sqrt(n)) if n > 1 else None,
        n=n,
        unscored=len(values) - n,
    )


def paired_difference(before: Sequence[float | bool | None], after: Sequence[float | bool | None]) -> Estimate:
    """Mean of after - before over examples scored in both, with the standard error of the paired differences."""
    if len(before) != len(after):
        raise ValueError(f"paired values differ in number: {len(before)} and {len(after)}")
    pairs = zip(before, after, strict=True)
    return estimate([None if b is None or a is None else float(a) - float(b) for b, a in pairs])


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


def correlation(scores: Sequence[float], costs: Sequence[float], *, seed: int = 0) -> Correlation:
    """Pearson and Spearman correlation of predicted scores and realised costs (Section 5.3).

    p-values are the share of permutations at least as correlated in absolute value: all of them for up to 7 pairs
    (n = 4 buckets cannot reach p < 1/24), else 10,000 random ones, counting the observed order as one.
    """
    if len(scores) != len(costs):
        raise ValueError(f"scores and costs differ in number: {len(scores)} and {len(costs)}")
    x, y = np.asarray(scores, dtype=float), np.asarray(costs, dtype=float)
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise ValueError("scores and costs must be finite; leave undefined costs out")
    n = len(x)
    if n < 2 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return Correlation(None, None, n, None, None)
    pearson, pearson_p = _permutation_test(x, y, seed)
    spearman, spearman_p = _permutation_test(percentile_rank(x), percentile_rank(y), seed)
    return Correlation(pearson, spearman, n, pearson_p, spearman_p)


def _permutation_test(x: NDArray[np.float64], y: NDArray[np.float64], seed: int) -> tuple[float, float]:
    x, y = _unit(x), _unit(y)
    observed = float(np.clip(x @ y, -1, 1))
    if math.factorial(len(x)) <= _PERMUTATIONS:
        permuted = np.array([y[list(order)] for order in itertools.permutations(range(len(y)))])
    else:
        generator = np.random.default_rng(seed)
        permuted = np.array([y, *(generator.permutation(y) for _ in range(_PERMUTATIONS - 1))])
    # The tolerance counts permutations that only differ from the observed order by rounding.
    return observed, float(np.mean(np.abs(permuted @ x) >= abs(observed) - 1e-12))


def _unit(values: NDArray[np.float64]) -> NDArray[np.float64]:
    # Squares of tiny values would vanish, sums of huge ones overflow.
    scaled = values / np.abs(values).max()
    centred = scaled - scaled.mean()
    return centred / np.linalg.norm(centred)
