"""Figures 3 to 7 of the paper from a study, and its budget curve, as Vega-Altair charts. Pure.

Large points are means over seeds with one standard error to both sides; small ones are the seeds, one by one. The arms
of a figure are shown over the seeds that all of them have.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import altair as alt

from castune.config import StudyConfig, method_suffix
from castune.core.numbers import with_error
from castune.purposes import COSTS, PAID, PURPOSES
from castune.report.equal_safety import charts as safety_charts
from castune.report.labels import Coordinate, ScatterPoint, place_labels
from castune.report.maps import conflict_heatmap
from castune.report.summary import BASE
from castune.report.theme import Chart, arm_colours
from castune.stats.estimates import estimate
from castune.study.findings import BudgetCheck, Findings
from castune.study.score_costs import SYMBOLS, ScoreValidity
from castune.study.trials import Measured, Results, Trial, common_seeds

_METHOD_FIGURES = {"sft": "figure_3_sft", "pcgrad": "figure_4_pcgrad"}
# The paper's first.
COST_FIGURES = {"mmlu_cr": "figure_5_mmlu_cr", "ucr": "figure_6_ucr"}
COST_FIGURES |= {cost: f"figure_{cost}" for cost in COSTS if cost not in COST_FIGURES}
_SIZE = {"width": 400, "height": 300}


class Dot(NamedTuple):
    """A training of an arm."""

    arm: str
    seed: str
    x: float
    y: float


def charts(results: Results, found: Findings, study: StudyConfig) -> dict[str, Chart]:
    """Every figure that these results allow, by the name of its file."""
    made: dict[str, Chart] = {}
    for method in study.methods:
        arms = {arm: results.of(f"{arm}{method_suffix(method)}") for arm in study.arms}
        for name, cost in zip(method_figures(method), PAID, strict=True):
            chart = trade_off(arms, results.base, cost)
            if chart is not None:
                made[name] = chart
        if method in found.equal_safety:
            drawn = safety_charts(found.equal_safety[method])
            made |= {equal_safety_figure(name, method): chart for name, chart in drawn.items()}
    for cost, name in COST_FIGURES.items():
        chosen = [v for v in found.validities if v.cost == cost and v.score == "conflict"]
        if any(point.cost is not None for validity in chosen for point in validity.points):
            made[name] = score_and_cost(chosen)
    for calibration, cmap in results.maps.items():
        suffix = "" if calibration == "main" else f"_{calibration}"
        made[f"figure_7_map{suffix}"] = conflict_heatmap(cmap, {})
    if found.budget is not None:
        made["figure_budget"] = budget(found.budget)
    return made


def method_figures(method: str) -> list[str]:
    """Names of the figures of a method: safety against utility, over-refusal and what else was measured."""
    name = _METHOD_FIGURES.get(method, f"figure_{method}")
    return [name if cost == "utility" else f"{name}_{cost.replace('-', '_')}" for cost in PAID]


def equal_safety_figure(name: str, method: str) -> str:
    """Name of a chart of costs at equal safety, of the arms of a method."""
    return f"figure_{name}_{method}"


def trade_off(arms: Mapping[str, Sequence[Trial]], base: Measured | None, cost: str) -> Chart | None:
    """Safety against utility, over-refusal (Figures 3 and 4) or another cost; None where nothing has both numbers, or
    arms have no seed in common."""
    x_of, y_of = PURPOSES["safety"], PURPOSES[cost]
    points: list[ScatterPoint] = []
    seeds: list[Dot] = []
    common = common_seeds(arms.values())
    for arm, trials in arms.items():
        pairs = [(t.seed, t.measured.mean("safety"), t.measured.mean(cost)) for t in trials if t.seed in common]
        known = [
            (seed, x_of.shown.scale * x, y_of.shown.scale * y)
            for seed, x, y in pairs
            if x is not None and y is not None
        ]
        seeds += [Dot(arm, str(seed), x, y) for seed, x, y in known]
        if known:
            points.append(_mean_point(arm, [x for _, x, _ in known], [y for *_, y in known]))
    if not points:
        return None
    if base is not None and (x := base.mean("safety")) is not None and (y := base.mean(cost)) is not None:
        points.insert(0, _mean_point(BASE, [x_of.shown.scale * x], [y_of.shown.scale * y]))
    titles = (f"{about.label}, mean of suites ({about.shown.level})" for about in (x_of, y_of))
    return _scatter(points, seeds, *titles)


def score_and_cost(validities: Sequence[ScoreValidity]) -> Chart:
    """Mean score of buckets against their cost (Figures 5 and 6), a panel a number of buckets."""
    panels = []
    for one in validities:
        by_arm: dict[str, list[Dot]] = {}
        for point in one.points:
            if point.cost is not None:
                arm = _bucket(point.arm)
                by_arm.setdefault(arm, []).append(Dot(arm, str(point.seed), point.score, point.cost))
        points = [_mean_point(arm, [dot.x for dot in found], [dot.y for dot in found]) for arm, found in by_arm.items()]
        if not points:
            continue
        seeds = [dot for found in by_arm.values() for dot in found]
        x = f"Mean {SYMBOLS[one.score]} of the heads of a bucket"
        cost = COSTS[one.cost]
        unit = "" if cost.is_ratio else f" ({cost.unit.change})"
        panel = _scatter(points, seeds, x, f"{cost.phrase[0].upper()}{cost.phrase[1:]}{unit}")
        panels.append(panel.properties(title=f"{one.buckets} buckets"))
    return alt.concat(*panels, columns=2, spacing=36)


def budget(found: BudgetCheck) -> Chart:
    """Predicted cost of training the safest heads, by their share, with its band; and what trained arms lost."""
    curve, n = found.curve, found.curve.n_heads
    # A point in a thousand is as fine as a page shows.
    steps = sorted({round(i * n / min(n, 400)) for i in range(min(n, 400) + 1)})
    records = [
        {
            "share": 100 * k / n,
            "cost": 100 * float(curve.cost_K[k]),
            "low": None if curve.low_K is None else 100 * float(curve.low_K[k]),
            "high": None if curve.high_K is None else 100 * float(curve.high_K[k]),
        }
        for k in steps
    ]
    x = alt.X("share:Q", title="Share of all heads, the safest first (%)")
    lines = alt.Chart(alt.InlineData(values=records)).encode(x=x)
    layers = [lines.mark_line(strokeWidth=2).encode(y=alt.Y("cost:Q", title="Predicted cost, all heads = 100"))]
    if curve.low_K is not None:
        layers.insert(0, lines.mark_area(opacity=0.2).encode(y="low:Q", y2="high:Q"))
    if curve.elbow is not None:
        elbow = [{"share": 100 * curve.elbow / n, "cost": 100 * float(curve.cost_K[curve.elbow])}]
        layers.append(
            alt.Chart(alt.InlineData(values=elbow))
            .mark_point(size=120, strokeWidth=2, shape="diamond")
            .encode(x=x, y="cost:Q")
        )
    predicted = alt.layer(*layers).properties(**_SIZE, title="Predicted from the map")
    points = [
        _mean_point(arm, [100 * share], [loss])
        for arm, share, loss in zip(found.arms, found.predicted, found.lost, strict=True)
        if loss is not None
    ]
    if not points:
        return predicted
    beside = _scatter(points, [], "Predicted cost, all heads = 100", "Utility lost, measured (points)")
    return alt.hconcat(predicted, beside.properties(title="Beside trained arms"), spacing=40)


def _scatter(points: Sequence[ScatterPoint], seeds: Sequence[Dot], x_title: str, y_title: str) -> alt.LayerChart:
    ranges = (
        _range([*(end for p in points for end in (p.x_low, p.x_high)), *(dot.x for dot in seeds)]),
        _range([*(end for p in points for end in (p.y_low, p.y_high)), *(dot.y for dot in seeds)]),
    )
    place_labels(points, *ranges, _SIZE["width"], _SIZE["height"])
    colours = arm_colours([point.arm for point in points])
    x = {"title": x_title, "scale": alt.Scale(domain=ranges[0], nice=False)}
    y = {"title": y_title, "scale": alt.Scale(domain=ranges[1], nice=False)}
    hue = alt.Color("arm:N", legend=None).scale(domain=list(colours), range=list(colours.values()))
    records = alt.InlineData(values=[vars(point) for point in reversed(points)])
    means = alt.Chart(records).encode(x=alt.X("x:Q", **x), y=alt.Y("y:Q", **y))
    rules = means.mark_rule(strokeWidth=1.5, opacity=0.6).encode(color=hue)
    tooltip = [
        alt.Tooltip("arm:N", title="Arm"),
        alt.Tooltip("x_text:N", title=x_title),
        alt.Tooltip("y_text:N", title=y_title),
    ]
    place = {key: alt.ExprRef(f"datum.{key}") for key in ("align", "dx", "dy")}
    layers = [
        rules.encode(x=alt.X("x_low:Q", **x), x2="x_high:Q"),
        rules.encode(y=alt.Y("y_low:Q", **y), y2="y_high:Q"),
        means.mark_point(opacity=1, strokeWidth=2, size=100, filled=True).encode(color=hue, tooltip=tooltip),
        means.mark_text(baseline="middle", **place).encode(text="arm:N"),
    ]
    if seeds:
        one_by_one = alt.Chart(alt.InlineData(values=[dot._asdict() for dot in seeds])).mark_point(size=22, opacity=0.7)
        layers.insert(0, one_by_one.encode(
            x=alt.X("x:Q", **x), y=alt.Y("y:Q", **y), color=hue,
            tooltip=["arm:N", "seed:N", alt.Tooltip("x:Q", format=".3~g"), alt.Tooltip("y:Q", format=".3~g")],
        ))  # fmt: skip
    return alt.layer(*layers).properties(**_SIZE, description=f"{y_title} over {x_title}, a point an arm.")


def _mean_point(arm: str, xs: Sequence[float], ys: Sequence[float]) -> ScatterPoint:
    return ScatterPoint.of(arm, _over_seeds(xs), _over_seeds(ys))


def _over_seeds(values: Sequence[float]) -> Coordinate:
    found = estimate(values)
    assert found.value is not None, "an arm has a seed"
    known = f", {len(values)} seeds" if len(values) > 1 else ""
    text = with_error(found.value, found.standard_error, ".2f" if abs(found.value) >= 10 else ".3f")
    return Coordinate(found.value, found.standard_error or 0.0, text + known)


def _range(ends: Sequence[float]) -> list[float]:
    low, high = min(ends), max(ends)
    margin = 0.1 * (high - low) or max(0.5, 0.1 * abs(high))
    return [low - margin, high + margin]


def _bucket(arm: str) -> str:
    """`bucket-2-of-4` as the paper has it."""
    return f"B{arm.split('-')[1]}" if arm.startswith("bucket-") else arm
