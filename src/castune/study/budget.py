"""How many heads to train: what the map foretells of every budget, before anything is trained. Pure.

The paper trains the quarter of the heads with the lowest C and finds by training that more cost more (Section 3.5,
Table 9). Here the conflict scores C(h) (Eq. 6) are added up instead: heads sorted from the lowest C, the predicted cost
of training the k safest is their share of the sum over all heads. This curve and everything made of it is castune's
extension: the paper only says that cost rises with the mean C of what is trained, not that costs add.

Shape letters: H head (all heads of the model in one axis), K budget (0 to H heads), M model of the
distribution of true scores, R draw.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from castune.stats.correlations import Correlation, correlation
from castune.stats.distributions import Interval, Z
from castune.stats.shrinkage import true_scores

Floats = NDArray[np.float64]
# Of an anchor's error on a curve without a band.
_ANCHOR_DRAWS = 4000


class Elbow(NamedTuple):
    """The budget at which a curve is farthest from a straight one.

    Attributes:
        k: heads; None where the curve is straight within its band.
        distance: k / H minus the predicted cost there, the largest of all k.
        straight: what 95 % of the maps stay below whose heads all have one score, from the same errors; None without
            errors.
    """

    k: int | None
    distance: float
    straight: float | None


@dataclass(frozen=True, eq=False)
class CostCurve:
    """Predicted cost of training the k heads with the lowest scores, k = 0 to H.

    Attributes:
        order_H: indices of the heads from the lowest score, ties in their order: the first k are the budget k.
        measured_K: sum of the k lowest scores as measured, the full model = 1 (a Lorenz curve).
        cost_K: the prediction, the full model = 1. With errors every score is first drawn towards the mean as far as it
            is noise: the lowest of many noisy scores are too low, and their sum promises too much. Else `measured_K`.
        mean_K: mean of those scores over the k heads, the mean of all heads = 1; NaN at 0.
        low_K: lower end of the 95 % band of `cost_K`; None without errors.
        high_K: its upper end.
        reliability: share of the variance of the scores that is not noise, 0 to 1; None without errors.
        elbow: see `Elbow`.
        drawn_MRK: the draws of the band under each of two models; None without errors.
    """

    order_H: NDArray[np.int64]
    measured_K: Floats
    cost_K: Floats
    mean_K: Floats
    low_K: Floats | None
    high_K: Floats | None
    reliability: float | None
    elbow: Elbow
    drawn_MRK: Floats | None = field(repr=False)

    @property
    def n_heads(self) -> int:
        """H."""
        return len(self.order_H)


@dataclass(frozen=True)
class Anchor:
    """A measured arm: the k safest heads were trained and lost so much utility; standard error None = not known."""

    k: int
    loss: float
    standard_error: float | None = None


@dataclass(frozen=True)
class Budget:
    """The largest budgets whose loss stays within a limit; None where not even one head does, or nothing is known.

    Attributes:
        k: by the prediction.
        k_sure: by the upper end of its 95 % band; None too without a band.
        k_possible: by the lower end.
        loss: predicted at k, in the unit of the limit.
        interval: its 95 % band at k.
        scale: loss of the full model that was predicted; 1 without an anchor.
    """

    k: int | None
    k_sure: int | None
    k_possible: int | None
    loss: float | None
    interval: Interval | None
    scale: float


@dataclass(frozen=True)
class Check:
    """Predictions beside what measured arms lost.

    Attributes:
        correlation: over the arms; Spearman's tells whether the order is right.
        scale: loss of the full model that fits the arms best (least squares through 0); None without a prediction
            above 0.
        residuals: measured minus scale times predicted, arm by arm.
        relative_error: root mean square of the residuals over that of the losses; None where nothing was lost.
        n_undefined: arms left out, for their loss is None; their residual is None too.
    """

    correlation: Correlation
    scale: float | None
    residuals: tuple[float | None, ...]
    relative_error: float | None
    n_undefined: int


def standard_errors(low_H: Sequence[float], high_H: Sequence[float]) -> Floats:
    """Standard errors [H] of 95 % intervals (`conflict_score_low`, `_high`): their width over 2 * 1.96."""
    low, high = np.asarray(low_H, dtype=float), np.asarray(high_H, dtype=float)
    if low.shape != high.shape or not (np.isfinite(low) & np.isfinite(high) & (low <= high)).all():
        raise ValueError("intervals must be finite, as many low ends as high ones, and low at most high")
    return np.asarray((high - low) / (2 * Z))


def cost_curve(
    scores: Sequence[float], errors: Sequence[float] | None = None, *, draws: int = 1000, seed: int = 0
) -> CostCurve:
    """Predicted cost of every budget from the scores of a map.

    With errors the prediction is that of the expected true scores, given the measured ones and how those of all heads
    are distributed (`stats.shrinkage`): such a band holds although the heads were chosen by the same scores; one around
    the measured sum would not. It is the envelope of two, with true scores of any distribution and normal ones. In
    simulations with errors of known size it held the truth of a tenth, quarter and half of 60 to 1,024 heads in 92 to
    100 % of cases. It held it less often in two: in 81 % for the lowest tenth where errors are in proportion to the
    true score, and in 53 % where all heads are equal, where it is too narrow but the prediction was 0.007 too low.
    Errors of heads are taken as independent; those of one map share its examples.

    The elbow is Kneedle's for a convex rising curve (Satopaa et al. 2011) without its smoothing: of all k the one with
    the largest distance k / H - cost to the chord from (0, 0) to (1, 1), the smallest of equal ones. Up to there every
    head costs less than the mean head. It is None where that distance of `measured_K` is within what 95 % of maps reach
    that have the mean score at every head and the same errors; without errors where it is 0.

    Args:
        scores: [H] C(h) of all heads, at least 0, not all 0.
        errors: [H] their standard errors (`standard_errors` makes them from the map's intervals); None = not known.
        draws: of the band and of straight curves.
        seed: of the draws.

    Raises:
        ValueError: no heads, a score or error that is missing, not finite or negative, or scores that are all 0.
    """
    score_H = np.asarray(scores, dtype=float)
    if len(score_H) == 0 or not (np.isfinite(score_H) & (score_H >= 0)).all() or not score_H.any():
        raise ValueError("scores must be finite, at least 0, and not all 0")
    order_H = np.argsort(score_H, kind="stable")
    measured_K = _cumulative(score_H[order_H][None])[0]
    if errors is None:
        return CostCurve(
            order_H,
            measured_K,
            measured_K,
            _means(measured_K),
            None,
            None,
            None,
            _elbow(measured_K, measured_K, None),
            None,
        )
    error_H = np.asarray(errors, dtype=float)
    if error_H.shape != score_H.shape or not (np.isfinite(error_H) & (error_H >= 0)).all():
        raise ValueError(f"errors must be {len(score_H)} finite numbers of at least 0, one a head")
    rng = np.random.default_rng(seed)
    mean, variance = float(score_H.mean()), float(score_H.var(ddof=1)) if len(score_H) > 1 else 0.0
    expected_H, *drawn = true_scores(score_H, error_H, draws, rng)
    drawn_MRK = np.stack([_cumulative(drawn_RH[:, order_H]) for drawn_RH in drawn])
    low_K, high_K = _band(drawn_MRK)
    cost_K = _cumulative(expected_H[order_H][None])[0]
    # Scores of equal heads with these errors, sorted as the map was.
    straight_RK = _cumulative(
        np.sort(np.maximum(0, mean + rng.standard_normal((draws, len(score_H))) * error_H), axis=1)
    )
    straight = float(np.quantile(_gaps(straight_RK).max(1), 0.95))
    return CostCurve(
        order_H,
        measured_K,
        cost_K,
        _means(cost_K),
        low_K,
        high_K,
        max(0.0, 1 - float((error_H**2).mean()) / variance) if variance > 0 else 0.0,
        _elbow(cost_K, measured_K, straight),
        drawn_MRK,
    )


def predicted_cost(scores: Sequence[float], heads: Sequence[int]) -> float:
    """Predicted cost of training any heads, by their indices: their share of the sum of all scores, as measured."""
    score_H = np.asarray(scores, dtype=float)
    if not (np.isfinite(score_H) & (score_H >= 0)).all() or not score_H.any():
        raise ValueError("scores must be finite, at least 0, and not all 0")
    if len(set(heads)) != len(heads) or not all(0 <= head < len(score_H) for head in heads):
        raise ValueError(f"heads must be different indices from 0 to {len(score_H) - 1}")
    return float(score_H[list(heads)].sum() / score_H.sum())


def largest_budget(curve: CostCurve, limit: float, anchor: Anchor | None = None, *, seed: int = 0) -> Budget:
    """The most heads that can be trained with a utility loss of at most `limit`.

    Args:
        curve: of the map.
        limit: at least 0; in the unit of the anchor's loss, or without one as a share of the full model's cost.
        anchor: an arm whose loss is known: all predictions are scaled so that it comes out right. One that lost nothing
            foretells no loss at any budget; then only `k_sure` says something, from its standard error.
        seed: of the draws of the anchor's error.

    Raises:
        ValueError: the limit is negative or not finite, or the anchor is outside the curve.
    """
    if not (math.isfinite(limit) and limit >= 0):
        raise ValueError(f"limit is {limit}, accepted: a number of at least 0")
    scale, loss_MRK = 1.0, curve.drawn_MRK
    if anchor is not None:
        _check_anchor(curve, anchor)
        scale = max(0.0, anchor.loss) / float(curve.cost_K[anchor.k])
        loss_MRK = _drawn_losses(curve, anchor, seed)
    loss_K = scale * curve.cost_K
    k = _largest(loss_K, limit)
    loss = None if k is None else float(loss_K[k])
    if loss_MRK is None:
        return Budget(k, None, None, loss, None, scale)
    low_K, high_K = _band(loss_MRK)
    interval = None if k is None else Interval(float(low_K[k]), float(high_K[k]))
    return Budget(k, _largest(high_K, limit), _largest(low_K, limit), loss, interval, scale)


def check_against(predicted: Sequence[float], losses: Sequence[float | None], *, seed: int = 0) -> Check:
    """Predicted costs of measured arms beside the utility that they lost.

    Args:
        predicted: of every arm, the share of the full model's cost: `CostCurve.cost_K[k]`, or `predicted_cost`.
        losses: of every arm, utility lost in any unit; None = not known, left out.
        seed: of the permutations.

    Raises:
        ValueError: the two differ in number, or a value is not finite.
    """
    if len(predicted) != len(losses):
        raise ValueError(f"predictions and losses differ in number: {len(predicted)} and {len(losses)}")
    pairs = [(x, y) for x, y in zip(predicted, losses, strict=True) if y is not None]
    found = correlation([x for x, _ in pairs], [y for _, y in pairs], seed=seed)
    x, y = np.array(pairs, dtype=float).reshape(len(pairs), 2).T
    scale = float(x @ y / (x @ x)) if x.any() else None
    residuals = tuple(
        None if b is None or scale is None else b - scale * a for a, b in zip(predicted, losses, strict=True)
    )
    error = None if scale is None or not y.any() else float(np.linalg.norm(y - scale * x) / np.linalg.norm(y))
    return Check(found, scale, residuals, error, len(losses) - len(pairs))


def _band(drawn_MRK: Floats) -> tuple[Floats, Floats]:
    """Lowest and highest 95 % interval under any of the models."""
    low_MK, high_MK = np.quantile(drawn_MRK, (0.025, 0.975), axis=1)
    return low_MK.min(0), high_MK.max(0)


def _cumulative(sorted_RH: Floats) -> Floats:
    """Cumulative sums [R, H + 1] from 0 to 1; straight where all are 0."""
    sums = np.cumsum(sorted_RH, axis=1)
    sums = np.concatenate([np.zeros((len(sums), 1)), sums], axis=1)
    straight = np.broadcast_to(np.linspace(0, 1, sums.shape[1]), sums.shape).copy()
    return np.divide(sums, sums[:, -1:], where=sums[:, -1:] > 0, out=straight)


def _means(cost_K: Floats) -> Floats:
    n = len(cost_K) - 1
    return np.concatenate([[np.nan], cost_K[1:] * n / np.arange(1, n + 1)])


def _gaps(curve_RK: Floats) -> Floats:
    return np.linspace(0, 1, curve_RK.shape[1]) - curve_RK


def _elbow(cost_K: Floats, measured_K: Floats, straight: float | None) -> Elbow:
    gap_K = _gaps(cost_K[None])[0]
    # Equal distances differ by rounding.
    k = int(np.argmax(gap_K >= gap_K.max() - 1e-12))
    bent = float(_gaps(measured_K[None]).max()) > (straight or 0.0) + 1e-12 and gap_K[k] > 1e-12
    return Elbow(k if bent else None, float(gap_K[k]), straight)


def _largest(loss_K: Floats, limit: float) -> int | None:
    """The largest k >= 1 up to which no loss is above the limit."""
    within = np.append(loss_K[1:] <= limit + 1e-12, False)
    k = int(np.argmin(within))
    return k or None


def _check_anchor(curve: CostCurve, anchor: Anchor) -> None:
    if not 1 <= anchor.k <= curve.n_heads or curve.cost_K[anchor.k] <= 0:
        raise ValueError(
            f"the anchor has {anchor.k} heads, accepted: 1 to {curve.n_heads} with a predicted cost above 0"
        )
    error = anchor.standard_error
    if not math.isfinite(anchor.loss) or (error is not None and not (math.isfinite(error) and error >= 0)):
        raise ValueError(f"the anchor's loss is {anchor.loss} with standard error {error}, accepted: finite numbers")


def _drawn_losses(curve: CostCurve, anchor: Anchor, seed: int) -> Floats | None:
    """Losses [M, R, K] of drawn curves, each scaled to a drawn loss of the anchor; None where nothing is uncertain."""
    drawn_MRK = curve.drawn_MRK
    if drawn_MRK is None:
        if anchor.standard_error is None:
            return None
        drawn_MRK = np.repeat(curve.cost_K[None, None], _ANCHOR_DRAWS, axis=1)
    noise_R = np.random.default_rng(seed).standard_normal(drawn_MRK.shape[1]) * (anchor.standard_error or 0.0)
    scale_MR = np.maximum(0, anchor.loss + noise_R) / np.maximum(drawn_MRK[:, :, anchor.k], np.finfo(float).tiny)
    return np.asarray(scale_MR[:, :, None] * drawn_MRK)
