"""The paper's Eqs. 2-6 on plain arrays, and how several utility domains become one. Pure: numbers in, numbers out.

Shape letters: H head (all heads of the model in one axis), N example, C gradient chunk, D utility domain.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from castune.config import Measure
from castune.stats.ranking import percentile_rank

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


def gradient_norms(gram_HCC: Floats, n_safety: int) -> tuple[Floats, Floats]:
    """|g_safe| and |g_util| of each head, from the same inner products."""
    parts = (slice(None, n_safety), slice(n_safety, None))
    safety_H, utility_H = (np.sqrt(np.maximum(gram_HCC[:, part, part].sum((1, 2)), 0)) for part in parts)
    return safety_H, utility_H


def conflict_magnitude(gram_HCC: Floats, n_safety: int) -> Floats:
    """O(h) |g_safe| |g_util| = (|g_safe| |g_util| - g_safe·g_util) / 2, from the same inner products.

    O(h) (Eq. 2) knows directions alone: a head that hardly matters to either loss can have any. This is half of what
    the inner product lacks to full agreement, in squared nats per squared unit of weight.
    """
    safety_H, utility_H = gradient_norms(gram_HCC, n_safety)
    return conflict_from_gram(gram_HCC, n_safety) * safety_H * utility_H


def conflict_standard_error(grams: Sequence[Floats], n_safety: int) -> Floats:
    """Standard error of O(h), or of its mean over domains: the delete-one jackknife over the chunks of every set.

    The sets are independent samples, so their jackknife variances add. A safety chunk is left out of all domains at
    once, for they have it in common; a utility chunk changes the O(h) of its own domain, a D-th of the mean.

    Args:
        grams: `gram_HCC` of each domain, see `conflict_from_gram`.
        n_safety: how many of the partial gradients belong to the safety loss, the same ones in all.
    """

    def without(chunk: int, gram_HCC: Floats) -> Floats:
        kept = [c for c in range(gram_HCC.shape[1]) if c != chunk]
        # Leaving a chunk out rescales the mean gradient of its set, which the cosine does not see.
        return conflict_from_gram(gram_HCC[np.ix_(range(len(gram_HCC)), kept, kept)], n_safety - (chunk < n_safety))

    sets = [[np.mean([without(chunk, gram) for gram in grams], axis=0) for chunk in range(n_safety)]]
    # What the other domains add to the mean is the same in all of these replicates, and their spread does not see it.
    sets += [[without(chunk, g) / len(grams) for chunk in range(n_safety, g.shape[1])] for g in grams]
    variance_H = np.zeros(len(grams[0]))
    for replicates in sets:
        if len(replicates) < 2:
            return np.full_like(variance_H, np.nan)
        replicates_CH = np.stack(replicates)
        spread_H = ((replicates_CH - replicates_CH.mean(0)) ** 2).sum(0)
        variance_H += spread_H * (len(replicates) - 1) / len(replicates)
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


def shift_of(measure: Measure) -> Callable[[Floats, Floats], tuple[Floats, Floats]]:
    """How outcomes of a measure become a shift with its standard error."""
    return decision_shift if measure == "decision" else margin_shift


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


def combined(values_DH: Floats, score_DH: Floats, how: str) -> Floats:
    """One row from those of several domains.

    Args:
        values_DH: any column of the map of each domain; there may be more axes between D and H.
        score_DH: C(h) of each domain, of the same shape.
        how: `mean` over the domains; `worst`: for each head, of the domain in which its C(h) is highest (the first of
            equals).
    """
    if how == "mean":
        return np.asarray(values_DH.mean(0))
    return np.asarray(np.take_along_axis(values_DH, score_DH.argmax(0)[None], 0)[0])


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
