"""How many heads to train: the largest budget within a loss, from a run's map and one measured arm (`castune budget`).

`stats.cost_curve`, whose shape letters are used here, foretells a shape from the map alone. What one arm lost gives it
a scale, and what several lost checks it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from castune.artifacts import ConflictMap
from castune.console import say, show_rows
from castune.core import numbers
from castune.errors import ArtifactError, CastuneError
from castune.purposes import COSTS
from castune.stats.correlations import Correlation, correlation
from castune.stats.cost_curve import CostCurve, band_of, cost_curve, standard_errors
from castune.stats.distributions import Interval
from castune.steps.directory import BASE, RunDirectory
from castune.study.realised_costs import loss
from castune.study.trials import Measured

Floats = NDArray[np.float64]
# Of an anchor's error on a curve without a band.
_ANCHOR_DRAWS = 4000
# What an anchor may have lost, by the purpose of the suites that tell.
_LOSSES = {cost.purpose: name for name, cost in COSTS.items() if not cost.is_ratio}
# Of all heads, in per cent: what is shown of a curve.
_SHARES = (5, 10, 25, 50, 75, 100)


@dataclass(frozen=True)
class Anchor:
    """A measured arm: the k safest heads were trained and cost so much; standard error None = not known."""

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
        n_undefined: arms left out, for their loss is None; their residual is None too.
    """

    correlation: Correlation
    scale: float | None
    residuals: tuple[float | None, ...]
    n_undefined: int


def map_curve(cmap: ConflictMap) -> CostCurve:
    """The predicted cost of training the safest heads of a map, with a band where the map has intervals."""
    low, high = cmap.column("conflict_score_low"), cmap.column("conflict_score_high")
    known = np.isfinite(low).all() and np.isfinite(high).all()
    errors = standard_errors(low.tolist(), high.tolist()).tolist() if known else None
    return cost_curve(cmap.column("conflict_score").tolist(), errors)


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
    low_K, high_K = band_of(loss_MRK)
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
    return Check(found, scale, residuals, len(losses) - len(pairs))


def show_budget(folder: RunDirectory, *, max_loss: float | None, anchor: str | None, cost: str = "utility") -> None:
    """Show the curve of a run's map, its elbow, and the largest budget within a loss.

    Raises:
        CastuneError: options that need each other; an arm without evaluation, or one that is no end of the map.
    """
    if (max_loss is None) != (anchor is None):
        raise CastuneError("--max-loss and --anchor go together: the anchor is an arm whose loss is known")
    if cost not in _LOSSES:
        raise CastuneError(f"--cost {cost}: accepted: {', '.join(_LOSSES)}")
    if max_loss is None and cost != "utility":
        raise CastuneError(f"--cost {cost} needs --max-loss and --anchor: without them the curve has no unit")
    _check_max_loss(max_loss, cost)
    cmap = folder.load_map()
    if len(cmap.kinds) > 1:
        kinds = " and ".join(cmap.kind_words.values())
        raise CastuneError(f"{folder.path}: scores of {kinds} do not add up; accepted: maps of one kind of unit")
    curve = map_curve(cmap)
    n = curve.n_heads
    rows = []
    for k in dict.fromkeys(max(1, round(share / 100 * n)) for share in _SHARES):
        ends = () if curve.low_K is None or curve.high_K is None else (curve.low_K[k], curve.high_K[k])
        band = numbers.span(*ends, ".3f") if ends else ""
        predicted = numbers.number(curve.cost_K[k], ".3f")
        rows.append({"heads": k, "share": numbers.percent(k / n, 0), "predicted cost": predicted, "95 %": band})
    show_rows("Predicted cost of training the safest heads (all of them = 1)", rows)
    if curve.elbow is None:
        say("elbow: none; within its band the curve is straight, so its shape favours no share over another")
    else:
        say(f"elbow: {curve.elbow} heads ({numbers.percent(curve.elbow / n, 0)})")
    if max_loss is not None and anchor is not None:
        unit = COSTS[_LOSSES[cost]].unit.change
        _show_largest(curve, max_loss, unit, _anchor(folder, cmap, curve, anchor, cost))


def _check_max_loss(max_loss: float | None, cost: str) -> None:
    unit = COSTS[_LOSSES[cost]].unit
    most, of_what = (100.0, "points of accuracy") if unit.change == "points" else (math.inf, unit.change)
    if max_loss is not None and not (math.isfinite(max_loss) and 0 <= max_loss <= most):
        above = "" if most == math.inf else f" and at most {most:g}"
        raise CastuneError(f"--max-loss {max_loss:g}: accepted: {of_what}, at least 0{above}")


def _anchor(folder: RunDirectory, cmap: ConflictMap, curve: CostCurve, name: str, cost: str) -> Anchor:
    arm = folder.arm(name)
    heads = folder.load_selection(arm, cmap).units
    safest = {cmap.units[row] for row in curve.order_H[: len(heads)]}
    if set(heads) != safest:
        raise CastuneError(f"--anchor {name}: accepted: arms of the safest heads, such as all, safe or safe-50")
    found = folder.load_evaluations()
    if BASE not in found or name not in found:
        raise ArtifactError(
            f"{folder.path}: {BASE} and {name} are not both evaluated; run: castune evaluate {folder.path}"
        )
    about = COSTS[_LOSSES[cost]]
    lost, error = loss(Measured.of(found[name]), Measured.of(found[BASE]), _LOSSES[cost])
    if lost is None:
        raise ArtifactError(f"{folder.path}: no {cost} suite of {name} can be compared with {BASE}'s")
    value = numbers.with_error(lost, error, f".{about.unit.digits + 1}f")
    say(f"anchor: {name}, {len(heads)} heads, {about.phrase}: {value} {about.unit.change}")
    return Anchor(len(heads), lost, error)


def _show_largest(curve: CostCurve, max_loss: float, unit: str, anchor: Anchor) -> None:
    found, n = largest_budget(curve, max_loss, anchor), curve.n_heads

    def heads(k: int | None) -> str:
        return "not a single head" if not k else f"{k} heads ({numbers.percent(k / n, 0)})"

    say(f"at most {max_loss:g} {unit}: {heads(found.k)} by prediction")
    if curve.high_K is not None:
        say(f"  {heads(found.k_sure)} by the upper end of the 95 % band, {heads(found.k_possible)} by the lower")
    if anchor.loss <= 0:
        say("  the anchor lost nothing, so no loss is predicted at any budget; only the band is informative")


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
