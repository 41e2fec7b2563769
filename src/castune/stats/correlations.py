"""Correlations of scores and costs, plain and at equal depth, and of two maps; their p-values and intervals. Pure.

Shape letters: H head, P permutation, R resample.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from castune.stats.distributions import Interval, Z, percentile_interval
from castune.stats.ranking import orders, percentile_rank

Floats = NDArray[np.float64]
# What is left of a column after depth was taken out counts as nothing below this share of it.
_NOTHING = 1e-9


class Correlation(NamedTuple):
    """Pearson r and Spearman rho with two-sided permutation p-values; None where a side does not vary."""

    pearson: float | None
    spearman: float | None
    n: int
    pearson_p: float | None
    spearman_p: float | None


@dataclass(frozen=True)
class PartialCorrelation:
    """Correlation of score and cost at equal depth; None where it is undefined, and `reason` says why.

    Attributes:
        pearson: r of what the depth leaves of both.
        spearman: the same of ranks.
        n: arms.
        pearson_p: two-sided p-value of Freedman and Lane's permutations (1983).
        pearson_interval: by Fisher's z with n - 4 degrees of freedom; None below 5 arms.
        reason: why `pearson` is None; None where it is not.
    """

    pearson: float | None
    spearman: float | None
    n: int
    pearson_p: float | None
    pearson_interval: Interval | None
    reason: str | None


@dataclass(frozen=True)
class Agreement:
    """Spearman's rho of two columns over n heads, None where a column does not vary, and its 95 % interval."""

    spearman: float | None
    interval: Interval | None
    n: int


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


def fisher_interval(r: float | None, n: int, *, controlled: int = 0) -> Interval | None:
    """95 % interval of a correlation over n independent pairs, by Fisher's z = atanh r (1921).

    Args:
        r: the correlation.
        n: pairs.
        controlled: variables that were controlled for; each takes one degree of freedom.

    Returns:
        None where r is, and for n - 3 - controlled < 1.
    """
    df = n - 3 - controlled
    if r is None or df < 1:
        return None
    # A correlation of exactly 1 has no z; float64 cannot tell the two apart.
    z = math.atanh(min(max(r, -1 + 1e-15), 1 - 1e-15))
    half = Z / math.sqrt(df)
    return Interval(math.tanh(z - half), math.tanh(z + half))


def partial_correlation(
    scores: Sequence[float], costs: Sequence[float], depths: Sequence[float], *, seed: int = 0
) -> PartialCorrelation:
    """Correlation of score and cost over arms, controlled for the mean layer depth of their heads.

    Conflict scores differ between layers, and so may what a layer costs: this asks whether the score tells more than
    the layer does. Not in the paper. Give means over seeds (`arm_means`), for the trainings of an arm are no
    independent pairs. Permuted is what depth leaves of the costs, as Freedman and Lane do: all orders up to 7 arms,
    else 10,000 at random.

    Raises:
        ValueError: the three differ in number, or a value is not finite.
    """
    x, y, z = (np.asarray(values, dtype=float) for values in (scores, costs, depths))
    n = len(x)
    if not n == len(y) == len(z):
        raise ValueError(f"scores, costs and depths differ in number: {n}, {len(y)} and {len(z)}")
    if not all(np.isfinite(values).all() for values in (x, y, z)):
        raise ValueError("scores, costs and depths must be finite; leave undefined costs out")
    if n < 4:
        # What depth leaves of three values lies on a line, where every correlation is 1 or -1.
        reason = f"{n} {'arm' if n == 1 else 'arms'} with a defined cost, at least 4 are needed"
        return PartialCorrelation(None, None, n, None, None, reason)
    pearson, pearson_p = _freedman_lane(x, y, z, seed) or (None, None)
    ranks = percentile_rank(x), percentile_rank(y), percentile_rank(z)
    spearman, _ = _freedman_lane(*ranks, seed) or (None, None)
    return PartialCorrelation(
        pearson,
        spearman,
        n,
        pearson_p,
        fisher_interval(pearson, n, controlled=int(np.ptp(z) > 0)),
        None if pearson is not None else "score or cost does not vary between arms of equal depth",
    )


def map_agreement(
    one: Sequence[float],
    other: Sequence[float],
    *,
    layers: Sequence[int] | None = None,
    resamples: int = 2000,
    seed: int = 0,
) -> Agreement:
    """Spearman correlation of two score columns over the heads of a model, with a bootstrap interval over heads.

    For two maps of one model (decisions and margins) or two columns of one map (C, O and S: how much of the conflict
    score is its gradient half).

    Args:
        one: [H] a score a head.
        other: [H] the other score of the same heads in the same order.
        layers: [H] their layers; whole layers are then drawn, for the heads of a layer resemble one another and heads
            drawn one by one would promise too much.
        resamples: how many.
        seed: of the draws.

    Raises:
        ValueError: the columns differ in number, or a value is not finite.
    """
    x_H, y_H = np.asarray(one, dtype=float), np.asarray(other, dtype=float)
    if len(x_H) != len(y_H) or (layers is not None and len(layers) != len(x_H)):
        raise ValueError(f"the columns differ in number of heads: {len(x_H)} and {len(y_H)}, layers of as many")
    missing = int((~(np.isfinite(x_H) & np.isfinite(y_H))).sum())
    if missing:
        raise ValueError(f"{missing} of {len(x_H)} heads have no finite score in both columns")
    n = len(x_H)
    if n < 2 or np.ptp(x_H) == 0 or np.ptp(y_H) == 0:
        return Agreement(None, None, n)
    observed = float(correlations(percentile_rank(x_H), percentile_rank(y_H)[None])[0])
    labels = np.arange(n) if layers is None else np.unique(np.asarray(layers), return_inverse=True)[1]
    groups = [np.flatnonzero(labels == label) for label in range(labels.max() + 1)]
    if len(groups) < 3:
        return Agreement(observed, None, n)
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(resamples):
        drawn = np.concatenate([groups[i] for i in rng.integers(len(groups), size=len(groups))])
        if np.ptp(x_H[drawn]) > 0 and np.ptp(y_H[drawn]) > 0:
            found.append(float(correlations(percentile_rank(x_H[drawn]), percentile_rank(y_H[drawn])[None])[0]))
    return Agreement(observed, percentile_interval(found), n)


def correlations(x: Floats, y_P: Floats) -> Floats:
    """Pearson's r of x [n] with every row of y_P [P, n]; 0 for a row that does not vary."""
    x, y_P = _centred(x[None]), _centred(y_P)
    norms_P = np.linalg.norm(y_P, axis=1) * np.linalg.norm(x)
    r_P = np.divide(y_P @ x[0], norms_P, where=norms_P > 0, out=np.zeros(len(y_P)))
    return np.asarray(np.clip(r_P, -1, 1))


def _centred(rows: Floats) -> Floats:
    # Squares of tiny values would vanish, sums of huge ones overflow.
    largest = np.abs(rows).max(axis=1, keepdims=True)
    rows = np.divide(rows, largest, where=largest > 0, out=np.zeros_like(rows))
    return np.asarray(rows - rows.mean(axis=1, keepdims=True))


def _permutation_test(x: Floats, y: Floats, seed: int) -> tuple[float, float]:
    permuted_P = correlations(x, y[orders(len(x), seed)])
    return float(permuted_P[0]), _share_as_far(permuted_P, float(permuted_P[0]))


def _share_as_far(permuted_P: Floats, observed: float) -> float:
    # The tolerance counts permutations that only differ from the observed order by rounding.
    return float(np.mean(np.abs(permuted_P) >= abs(observed) - 1e-12))


def _freedman_lane(x: Floats, y: Floats, z: Floats, seed: int) -> tuple[float, float] | None:
    """Partial correlation of x and y given z and its permutation p; None where z leaves nothing of either."""
    x, y, z = (_centred(values[None])[0] for values in (x, y, z))
    direction = z / np.linalg.norm(z) if np.ptp(z) > 0 else np.zeros_like(z)

    def without_z(rows: Floats) -> Floats:
        return rows - (rows @ direction)[:, None] * direction

    left_x, left_y = without_z(x[None])[0], without_z(y[None])[0]
    if any(np.linalg.norm(left) <= _NOTHING * np.linalg.norm(whole) for left, whole in ((left_x, x), (left_y, y))):
        return None
    observed = float(correlations(left_x, left_y[None])[0])
    # The fitted part of y lies along z and goes out again, so that only the permuted rest is left of y*.
    return observed, _share_as_far(correlations(left_x, without_z(left_y[orders(len(x), seed)])), observed)
