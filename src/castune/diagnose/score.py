"""The paper's Eqs. 2-6 on plain arrays. Pure: numbers in, numbers out.

Shape letters: H head (all heads of the model in one axis), N example, C gradient chunk.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from castune.core.ranking import percentile_rank

Floats = NDArray[np.float64]


def conflict_from_gram(gram_HCC: Floats, n_safety: int) -> Floats:
    """O(h) = (1 - cos(g_safe, g_util)) / 2 (Eq. 2), from inner products of partial gradients.

    Args:
        gram_HCC: inner products of the partial gradients of each head. The first `n_safety` partial gradients sum
            to g_safe, the others to g_util.
        n_safety: how many of the partial gradients belong to the safety loss.

    Returns:
        O(h) in [0, 1] for each head; 0.5 (no direction, hence no conflict and no agreement) where a gradient is
        exactly zero.
    """
    safety, utility = slice(None, n_safety), slice(n_safety, None)
    dot_H = gram_HCC[:, safety, utility].sum((1, 2))
    squares_H = gram_HCC[:, safety, safety].sum((1, 2)) * gram_HCC[:, utility, utility].sum((1, 2))
    with np.errstate(divide="ignore", invalid="ignore"):
        cosine_H = np.where(squares_H > 0, dot_H / np.sqrt(np.maximum(squares_H, 0)), 0.0)
    return (1 - np.clip(cosine_H, -1, 1)) / 2


def conflict_standard_error(gram_HCC: Floats, n_safety: int) -> Floats:
    """Standard error of O(h): the delete-one jackknife over the chunks of both sets.

    The two sets are independent samples, so their jackknife variances add.
    """
    n_chunks = gram_HCC.shape[1]
    variance_H = np.zeros(gram_HCC.shape[0])
    for chunks in (range(n_safety), range(n_safety, n_chunks)):
        if len(chunks) < 2:
            return np.full(gram_HCC.shape[0], np.nan)
        replicates = []
        for left_out in chunks:
            kept = [c for c in range(n_chunks) if c != left_out]
            # Leaving a chunk out rescales the mean gradient of its set, which the cosine does not see.
            n_kept = n_safety - (left_out < n_safety)
            replicates.append(conflict_from_gram(gram_HCC[np.ix_(range(len(gram_HCC)), kept, kept)], n_kept))
        replicates_CH = np.stack(replicates)
        spread_H = ((replicates_CH - replicates_CH.mean(0)) ** 2).sum(0)
        variance_H += spread_H * (len(chunks) - 1) / len(chunks)
    return np.sqrt(variance_H)


def decision_shift(ablated_HN: Floats, baseline_N: Floats) -> tuple[Floats, Floats]:
    """H(h) = |rate without h - rate| over paired 0/1 outcomes (Eqs. 3-4), and its standard error.

    Examples unscored (NaN) with or without the head are left out of that head's pair.

    Args:
        ablated_HN: outcome of each example with each head ablated; NaN is unscored.
        baseline_N: outcome of each example of the whole model.
    """
    return _absolute_mean(ablated_HN - baseline_N)


def margin_shift(ablated_HN: Floats, baseline_N: Floats) -> tuple[Floats, Floats]:
    """Mean absolute change of an example's margin, and its standard error.

    The absolute value is taken inside the mean: a head that helps some examples and hurts others is sensitive,
    and does not cancel to zero as in the difference of two rates.
    """
    change_HN = np.abs(ablated_HN - baseline_N)
    return change_HN.mean(1), _standard_error(change_HN)


def functional_sensitivity(utility_shift: Floats, safety_shift: Floats, *, rank: str = "difference") -> Floats:
    """S(h) (Eq. 5).

    Args:
        utility_shift: H_gen of every head.
        safety_shift: H_safe of every head.
        rank: `difference` is Eq. 5 as written, exp(rank(H_gen) - rank(H_safe)); `of-difference` is
            exp(rank(H_gen - H_safe)), which reproduces the scale of the paper's Table 7.
    """
    if rank == "of-difference":
        return np.exp(percentile_rank(utility_shift - safety_shift))
    return np.exp(percentile_rank(utility_shift) - percentile_rank(safety_shift))


def conflict_score(optimization_conflict: Floats, sensitivity: Floats) -> Floats:
    """C(h) = O(h) * S(h) (Eq. 6)."""
    return optimization_conflict * sensitivity


def _absolute_mean(difference_HN: Floats) -> tuple[Floats, Floats]:
    scored_H = np.isfinite(difference_HN).sum(1)
    with np.errstate(invalid="ignore"):
        mean_H = np.nansum(difference_HN, 1) / np.where(scored_H > 0, scored_H, np.nan)
    return np.abs(mean_H), _standard_error(difference_HN)


def _standard_error(values_HN: Floats) -> Floats:
    """Standard error of the mean over the finite values of each row; NaN for fewer than two."""
    scored_H = np.isfinite(values_HN).sum(1)
    enough_H = scored_H > 1
    safe_H = np.where(enough_H, scored_H, 2)
    mean_H = np.nansum(values_HN, 1) / np.maximum(scored_H, 1)
    squares_H = np.nansum((values_HN - mean_H[:, None]) ** 2, 1)
    return np.where(enough_H, np.sqrt(squares_H / (safe_H - 1) / safe_H), np.nan)
