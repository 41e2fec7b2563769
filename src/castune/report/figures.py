"""Charts: artifacts in, Vega-Altair charts out. Pure; nothing is drawn or written here.

Data go in as inline values, so that no row limit or data server of Altair applies. Colours of text, axes and
rules come from `theme`, never from a chart: one chart serves a light page, a dark page and a printed figure.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import altair as alt

from castune.artifacts import ConflictMap, EvalResult, HeadSelection, TuneResult
from castune.artifacts.drift_result import DriftResult
from castune.artifacts.unit import only_heads
from castune.purposes import PURPOSES
from castune.report.drift import drift_charts
from castune.report.labels import Coordinate, ScatterPoint, place_labels
from castune.report.maps import SCORES, conflict_heatmap, zones
from castune.report.summary import BASE, in_order, mean_rate, percent, with_error
from castune.report.theme import Chart, arm_colours, bucket_colours
from castune.stats.estimates import Estimate


def charts(
    cmap: ConflictMap,
    selections: Mapping[str, HeadSelection],
    tunings: Mapping[str, TuneResult],
    evaluations: Mapping[str, EvalResult],
    drifts: Mapping[str, DriftResult] | None = None,
) -> dict[str, Chart]:
    """Every chart that these artifacts allow, by name."""
    made = {
        "conflict_map": conflict_heatmap(cmap, selections),
        "score_distribution": score_distribution(cmap),
    }
    if selections:
        made["zones"] = zones(cmap, selections)
    for name, cost in (("trade_off", "utility"), ("trade_off_over_refusal", "over-refusal")):
        if _trade_off_points(evaluations, cost):
            made[name] = trade_off(evaluations, cost=cost)
    if any(result.losses for result in tunings.values()):
        made["training_loss"] = training_loss(tunings)
    return {**made, **drift_charts(drifts or {})}


def score_distribution(cmap: ConflictMap) -> Chart:
    """How many heads have which conflict score, by bucket; of several kinds of unit, a histogram each."""
    scores, buckets = cmap.column("conflict_score").tolist(), cmap.table["bucket"].to_pylist()
    words, counted = cmap.kind_words, "Heads" if only_heads(cmap.units) else "Units"
    several = len(words) > 1
    records = [
        {"conflict_score": score, "bucket": bucket, **({"unit": words[unit.kind]} if several else {})}
        for score, bucket, unit in zip(scores, buckets, cmap.units, strict=True)
        if math.isfinite(score)
    ]
    domain = sorted({record["bucket"] for record in records})
    bars = alt.X("conflict_score:Q", bin=alt.Bin(maxbins=40), title=SCORES["conflict_score"])
    chart = (
        alt.Chart(alt.InlineData(values=records))
        .mark_bar(aria=False, binSpacing=1)
        .encode(
            x=bars.axis(grid=False),
            y=alt.Y("count():Q", title=counted, axis=alt.Axis(tickMinStep=1, tickCount=5)),
            color=alt.Color("bucket:O", title="Bucket").scale(domain=domain, range=bucket_colours(len(domain))),
            tooltip=[alt.Tooltip("bucket:O", title="Bucket"), alt.Tooltip("count():Q", title=counted)],
        )
        .properties(width=360, height=150, description="Histogram of the conflict score by bucket.")
    )
    return chart.encode(row=alt.Row("unit:N", title=None, sort=[*words.values()])) if several else chart


def trade_off(evaluations: Mapping[str, EvalResult], *, cost: str = "utility") -> Chart:
    """Safety against its cost (Figure 3 of the paper); bars are one standard error to both sides.

    Args:
        evaluations: by arm.
        cost: the purpose on the vertical axis, `utility` or `over-refusal`.

    Raises:
        ValueError: no arm has both numbers.
    """
    points = _trade_off_points(evaluations, cost)
    if not points:
        raise ValueError(f"no arm was measured on both safety and {cost}")
    width, height = 380, 300
    x_range = _range(end for point in points for end in (point.x_low, point.x_high))
    y_range = _range(end for point in points for end in (point.y_low, point.y_high))
    place_labels(points, x_range, y_range, width, height)
    colours = arm_colours([point.arm for point in points])
    shares = alt.Axis(format=".0%", tickCount=6)
    x = {"title": PURPOSES["safety"].label, "scale": alt.Scale(domain=x_range, nice=False), "axis": shares}
    y = {"title": PURPOSES[cost].label, "scale": alt.Scale(domain=y_range, nice=False), "axis": shares}
    hue = alt.Color("arm:N", legend=None).scale(domain=list(colours), range=list(colours.values()))
    is_base = f"datum.arm === '{BASE}'"
    # Base is first and drawn last: it lies on top.
    records = alt.InlineData(values=[vars(point) for point in reversed(points)])
    arms = alt.Chart(records).encode(x=alt.X("x:Q", **x), y=alt.Y("y:Q", **y))
    rules = arms.mark_rule(strokeWidth=1.5, opacity=0.6).encode(color=hue)
    dots = arms.mark_point(opacity=1, strokeWidth=2).encode(
        color=hue,
        size=alt.condition(is_base, alt.value(170), alt.value(90)),
        shape=alt.condition(is_base, alt.value("diamond"), alt.value("circle")),
        fill=alt.condition(is_base, alt.value("transparent"), hue),
        tooltip=[
            alt.Tooltip("arm:N", title="Arm"),
            alt.Tooltip("x_text:N", title=PURPOSES["safety"].label),
            alt.Tooltip("y_text:N", title=PURPOSES[cost].label),
        ],
    )
    place = {key: alt.ExprRef(f"datum.{key}") for key in ("align", "dx", "dy")}
    return alt.layer(
        rules.encode(x=alt.X("x_low:Q", **x), x2="x_high:Q"),
        rules.encode(y=alt.Y("y_low:Q", **y), y2="y_high:Q"),
        dots,
        arms.mark_text(baseline="middle", **place).encode(text="arm:N"),
    ).properties(
        width=width,
        height=height,
        description=f"{PURPOSES[cost].label} over {PURPOSES['safety'].label}, a point an arm.",
    )


def training_loss(tune_results: Mapping[str, TuneResult]) -> Chart:
    """Training loss by optimiser step, a line an arm."""
    records = [
        {"arm": arm, "step": step, "loss": loss}
        for arm, result in tune_results.items()
        for step, loss in result.losses
        if math.isfinite(loss)
    ]
    colours = arm_colours(list(tune_results))
    return (
        alt.Chart(alt.InlineData(values=records))
        .mark_line(strokeWidth=1.5, point=alt.OverlayMarkDef(size=12))
        .encode(
            x=alt.X("step:Q", title="Optimiser step", axis=alt.Axis(grid=False, tickMinStep=1)),
            y=alt.Y("loss:Q", title="Training loss", scale=alt.Scale(zero=False)),
            color=alt.Color("arm:N", title="Arm").scale(domain=list(colours), range=list(colours.values())),
            tooltip=["arm:N", "step:Q", alt.Tooltip("loss:Q", format=".4~g")],
        )
        .properties(width=420, height=220, description="Training loss by optimiser step for every arm.")
    )


def _trade_off_points(evaluations: Mapping[str, EvalResult], cost: str) -> list[ScatterPoint]:
    points = []
    for arm, evaluation in in_order(evaluations).items():
        x, y = (_coordinate(mean_rate(evaluation, purpose)) for purpose in ("safety", cost))
        if x is not None and y is not None:
            points.append(ScatterPoint.of(arm, x, y))
    return points


def _coordinate(rate: Estimate | None) -> Coordinate | None:
    if rate is None or rate.value is None:
        return None
    text = f"{with_error(rate, percent)}, n = {rate.n:,}, {rate.unscored:,} unscored"
    return Coordinate(rate.value, rate.standard_error or 0.0, text)


def _range(ends: Iterable[float]) -> list[float]:
    low, *_, high = sorted(ends)
    # At least ten percentage points, lest noise fill the chart; a margin keeps bars off the frame.
    margin = max(0.0, 0.1 - (high - low)) / 2 + 0.08 * (high - low)
    return [low - margin, high + margin]
