"""`castune budget`: how many of the safest heads to train, from a run's map and, for its scale, one measured arm."""

from __future__ import annotations

from castune.artifacts import ConflictMap
from castune.console import say, show_rows
from castune.errors import ArtifactError, CastuneError
from castune.steps.directory import BASE, RunDirectory
from castune.study.budget import Anchor, CostCurve, largest_budget
from castune.study.findings import map_curve
from castune.study.trials import Measured, utility_lost

_SHARES = (5, 10, 25, 50, 75, 100)


def show_budget(folder: RunDirectory, *, max_loss: float | None, anchor: str | None) -> None:
    """Show the curve of a run's map, its elbow, and the largest budget within a loss.

    Raises:
        CastuneError: options that need each other; an arm without evaluation, or one that is no end of the map.
    """
    if (max_loss is None) != (anchor is None):
        raise CastuneError("--max-loss and --anchor go together: a loss in points needs an arm whose loss is known")
    if max_loss is not None and not 0 <= max_loss <= 100:
        raise CastuneError(f"--max-loss {max_loss:g}: accepted are points of accuracy, at least 0 and at most 100")
    cmap = folder.load_map()
    if len(cmap.kinds) > 1:
        raise CastuneError(
            f"{folder.path}: scores of {', '.join(cmap.kinds)} do not add up; accepted are maps of one kind"
        )
    curve = map_curve(cmap)
    n = curve.n_heads
    rows = []
    for k in dict.fromkeys(max(1, round(share / 100 * n)) for share in _SHARES):
        band = "" if curve.low_K is None or curve.high_K is None else f"{curve.low_K[k]:.3f} to {curve.high_K[k]:.3f}"
        rows.append(
            {"heads": k, "share": f"{100 * k / n:.0f} %", "predicted cost": f"{curve.cost_K[k]:.3f}", "95 %": band}
        )
    show_rows("Predicted cost of training the safest heads (all of them = 1)", rows)
    if curve.elbow.k is None:
        say("elbow: none; within its band the curve is straight, so that no share is better than another by its shape")
    else:
        say(f"elbow: {curve.elbow.k} heads ({100 * curve.elbow.k / n:.0f} %)")
    if max_loss is not None and anchor is not None:
        _show_largest(curve, max_loss, _anchor(folder, cmap, curve, anchor))


def _anchor(folder: RunDirectory, cmap: ConflictMap, curve: CostCurve, name: str) -> Anchor:
    arm = folder.arm(name)
    heads = folder.load_selection(arm, cmap).units
    safest = {cmap.units[row] for row in curve.order_H[: len(heads)]}
    if set(heads) != safest:
        raise CastuneError(f"--anchor {name}: accepted are arms of the safest heads: all, safe, safe-50, ...")
    found = folder.load_evaluations()
    if BASE not in found or name not in found:
        raise ArtifactError(
            f"{folder.path}: {BASE} and {name} are not both evaluated; run: castune evaluate {folder.path}"
        )
    loss, error = utility_lost(Measured.of(found[name]), Measured.of(found[BASE]))
    if loss is None:
        raise ArtifactError(f"{folder.path}: no utility suite of {name} can be compared with {BASE}'s")
    say(
        f"anchor: {name}, {len(heads)} heads, lost {loss:.2f} points of utility"
        + ("" if error is None else f" ± {error:.2f}")
    )
    return Anchor(len(heads), loss, error)


def _show_largest(curve: CostCurve, max_loss: float, anchor: Anchor) -> None:
    found, n = largest_budget(curve, max_loss, anchor), curve.n_heads

    def heads(k: int | None) -> str:
        return "not even one head" if not k else f"{k} heads ({100 * k / n:.0f} %)"

    say(f"at most {max_loss:g} points: {heads(found.k)} by the prediction")
    if curve.high_K is not None:
        say(f"  {heads(found.k_sure)} by the upper end of its 95 % band, {heads(found.k_possible)} by the lower")
    if anchor.loss <= 0:
        say("  the anchor lost nothing, so the prediction is no loss at any budget; only the band says something")
