"""Charts: artifacts in, Vega-Altair charts out. Pure; nothing is drawn or written here.

Data go in as inline values, so that no row limit or data server of Altair applies. Colours of text, axes and rules
come from `theme`, never from a chart, so that one chart serves a light page, a dark page and a printed figure.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import altair as alt

from castune.artifacts import ConflictMap, EvalResult, HeadSelection, TuneResult
from castune.report.labels import place_labels
from castune.report.summary import BASE, PURPOSES, in_order, mean_rate

SCORES = {
    "conflict_score": "Conflict score C(h)",
    "optimization_conflict": "Optimization conflict O(h)",
    "functional_sensitivity": "Functional sensitivity S(h)",
    "utility_shift": "Utility shift H_gen(h)",
    "safety_shift": "Safety shift H_safe(h)",
}
_MEASURED = ("optimization_conflict", "utility_shift", "safety_shift")
_ZONE_COLOURS = {
    BASE: "#808080",
    "safe": "#2f7ec2",
    "risky": "#d1502f",
    "random": "#b08a2e",
    "all": "#8465b3",
}
_MORE_COLOURS = ("#3f9c78", "#bf5f96", "#6f8f2f", "#4a9fb0", "#9a6a4f")
_NEUTRAL = "#808080"


def theme(ink: str) -> dict[str, Any]:
    """Vega-Lite configuration with one colour for text and lines (`currentColor` follows the page)."""
    guide = {
        "labelColor": ink,
        "titleColor": ink,
        "titleFontWeight": "normal",
        "labelFontSize": 11,
        "titleFontSize": 12,
    }
    return {
        "background": None,
        "font": "system-ui, 'Segoe UI', 'Helvetica Neue', Arial, sans-serif",
        "view": {"stroke": None},
        "axis": {**guide, "domainColor": ink, "tickColor": ink, "gridColor": ink, "gridOpacity": 0.12},
        "axisX": {"titlePadding": 8},
        "legend": guide,
        "title": {"color": ink, "fontSize": 13, "fontWeight": 600, "anchor": "start", "offset": 10},
        "text": {"color": ink, "fontSize": 12},
    }


def arm_colours(arms: Sequence[str]) -> dict[str, str]:
    """A colour an arm; the zones of the paper keep theirs everywhere."""
    others = [arm for arm in arms if arm not in _ZONE_COLOURS]
    more = {arm: _MORE_COLOURS[i % len(_MORE_COLOURS)] for i, arm in enumerate(others)}
    return {arm: _ZONE_COLOURS.get(arm) or more[arm] for arm in arms}


def charts(
    cmap: ConflictMap,
    selections: Mapping[str, HeadSelection],
    tunings: Mapping[str, TuneResult],
    evaluations: Mapping[str, EvalResult],
) -> dict[str, Any]:
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
    return made


def conflict_heatmap(cmap: ConflictMap, selections: Mapping[str, HeadSelection]) -> Any:
    """Layer x head heatmap (Figure 7 of the paper) with a switch between the scores of `SCORES`.

    Layer 0 is at the top and blue is low, red high, as in the paper's maps. Layers may have different numbers of
    heads: a head that does not exist is left empty.
    """
    score = alt.param(
        name="score",
        value="conflict_score",
        bind=alt.binding_select(options=list(SCORES), labels=list(SCORES.values()), name="Show "),
    )
    arm = alt.param(
        name="arm",
        value=None,
        bind=alt.binding_select(
            options=[None, *selections], labels=["all heads", *selections], name="Heads of "
        ),
    )
    height = _cell(cmap, "layer", 540, 7, 18) * len(_indices(cmap, "layer"))
    chart = (
        alt.Chart(alt.InlineData(values=_head_records(cmap, selections)))
        .mark_rect(aria=False)
        .transform_calculate(value="datum[score]", **_tooltip_texts())
        .encode(
            x=_axis(cmap, "head", 360, 9, 36),
            y=_axis(cmap, "layer", 540, 7, 18),
            color=alt.Color(
                "value:Q",
                scale=alt.Scale(scheme="redyellowblue", reverse=True, zero=False, nice=False),
                legend=alt.Legend(title=None, gradientLength=min(height, 220), gradientThickness=12),
            ),
            tooltip=[
                alt.Tooltip("layer:O", title="Layer"),
                alt.Tooltip("head:O", title="Head"),
                *(
                    alt.Tooltip(f"{name}_text:N", title=label)
                    if name in _MEASURED
                    else alt.Tooltip(f"{name}:Q", title=label, format=".4~g")
                    for name, label in SCORES.items()
                ),
                alt.Tooltip("bucket:O", title="Bucket (1: highest)"),
                alt.Tooltip("zones:N", title="Trained in"),
            ],
        )
        .properties(
            width=_cell(cmap, "head", 360, 9, 36) * len(_indices(cmap, "head")),
            height=height,
            title=alt.TitleParams(text=alt.ExprRef(f"({json.dumps(SCORES)})[score]")),
            description="Heat map of all query heads by layer and head index, coloured by the chosen score.",
        )
        .add_params(score)
    )
    if not selections:
        return chart
    shown = "arm === null || indexof(datum.arms, arm) >= 0"
    return chart.encode(opacity=alt.condition(shown, alt.value(1), alt.value(0.12))).add_params(arm)


def zones(cmap: ConflictMap, selections: Mapping[str, HeadSelection]) -> Any:
    """Which heads every arm trains: one small layer x head grid an arm."""
    colours = arm_colours(list(selections))
    grids = []
    for arm, selection in selections.items():
        chosen = f"indexof(datum.arms, {json.dumps(arm)}) >= 0"
        grids.append(
            alt.Chart()
            .mark_rect(aria=False)
            .encode(
                x=_axis(cmap, "head", 230, 4, 24),
                y=_axis(cmap, "layer", 360, 4, 13),
                color=alt.condition(chosen, alt.value(colours[arm]), alt.value(_NEUTRAL)),
                opacity=alt.condition(chosen, alt.value(1), alt.value(0.14)),
                tooltip=[
                    alt.Tooltip("layer:O", title="Layer"),
                    alt.Tooltip("head:O", title="Head"),
                    alt.Tooltip("conflict_score:Q", title=SCORES["conflict_score"], format=".4~g"),
                    alt.Tooltip("zones:N", title="Trained in"),
                ],
            )
            .properties(
                width=_cell(cmap, "head", 230, 4, 24) * len(_indices(cmap, "head")),
                height=_cell(cmap, "layer", 360, 4, 13) * len(_indices(cmap, "layer")),
                title=f"{arm}: {len(selection.heads):,} of {selection.n_total:,} heads",
            )
        )
    # The scores are needed by the tooltip alone, so all but one are left out.
    names = ("layer", "head", "conflict_score", "arms", "zones")
    records = [{name: record[name] for name in names} for record in _head_records(cmap, selections)]
    return alt.concat(*grids, data=alt.InlineData(values=records), columns=3, spacing=36).properties(
        description="Grids of layers and heads; coloured cells are the heads that an arm trains."
    )


def score_distribution(cmap: ConflictMap) -> Any:
    """How many heads have which conflict score, by bucket."""
    records = [
        {"conflict_score": score, "bucket": int(bucket)}
        for score, bucket in zip(cmap.column("conflict_score"), cmap.column("bucket"), strict=True)
        if math.isfinite(score)
    ]
    buckets = sorted({record["bucket"] for record in records})
    return (
        alt.Chart(alt.InlineData(values=records))
        .mark_bar(aria=False, binSpacing=1)
        .encode(
            x=alt.X(
                "conflict_score:Q",
                bin=alt.Bin(maxbins=40),
                title=SCORES["conflict_score"],
                axis=alt.Axis(grid=False),
            ),
            y=alt.Y("count():Q", title="Heads", axis=alt.Axis(tickMinStep=1, tickCount=5)),
            color=alt.Color(
                "bucket:O",
                title="Bucket",
                scale=alt.Scale(domain=buckets, range=_from_risky_to_safe(len(buckets))),
            ),
            tooltip=[alt.Tooltip("bucket:O", title="Bucket"), alt.Tooltip("count():Q", title="Heads")],
        )
        .properties(
            width=360, height=150, description="Histogram of the conflict score over all heads, by bucket."
        )
    )


def trade_off(evaluations: Mapping[str, EvalResult], *, cost: str = "utility") -> Any:
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
    x_range, y_range = (_range(points, axis) for axis in "xy")
    place_labels(points, x_range, y_range, width, height)
    colours = arm_colours([str(point["arm"]) for point in points])
    x = alt.X(
        "x:Q",
        title=_title("safety"),
        scale=alt.Scale(domain=x_range, nice=False),
        axis=alt.Axis(format=".0%"),
    )
    y = alt.Y(
        "y:Q", title=_title(cost), scale=alt.Scale(domain=y_range, nice=False), axis=alt.Axis(format=".0%")
    )
    colour = alt.Color(
        "arm:N", scale=alt.Scale(domain=list(colours), range=list(colours.values())), legend=None
    )
    base = alt.Chart(alt.InlineData(values=points)).encode(color=colour)
    tooltip = [
        alt.Tooltip("arm:N", title="Arm"),
        alt.Tooltip("x_text:N", title=PURPOSES["safety"]),
        alt.Tooltip("y_text:N", title=PURPOSES[cost]),
    ]
    return alt.layer(
        base.mark_rule(strokeWidth=1.5, opacity=0.6).encode(
            x=alt.X("x_low:Q", title=None), x2="x_high:Q", y=y
        ),
        base.mark_rule(strokeWidth=1.5, opacity=0.6).encode(
            x=x, y=alt.Y("y_low:Q", title=None), y2="y_high:Q"
        ),
        base.mark_point(size=90, opacity=1, strokeWidth=2).encode(
            x=x,
            y=y,
            shape=alt.condition(f"datum.arm === '{BASE}'", alt.value("diamond"), alt.value("circle")),
            fill=alt.condition(f"datum.arm === '{BASE}'", alt.value("transparent"), colour),
            tooltip=tooltip,
        ),
        alt.Chart(alt.InlineData(values=points))
        .mark_text(
            align=alt.ExprRef("datum.align"),
            dx=alt.ExprRef("datum.dx"),
            dy=alt.ExprRef("datum.dy"),
            baseline="middle",
        )
        .encode(x=x, y=y, text="arm:N"),
    ).properties(
        width=width, height=height, description=f"{_title('safety')} against {_title(cost)}, a point an arm."
    )


def training_loss(tune_results: Mapping[str, TuneResult]) -> Any:
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
            y=alt.Y("loss:Q", title="Training loss (NLL a reply token)", scale=alt.Scale(zero=False)),
            color=alt.Color(
                "arm:N",
                title="Arm",
                scale=alt.Scale(domain=list(colours), range=list(colours.values())),
            ),
            tooltip=["arm:N", "step:Q", alt.Tooltip("loss:Q", format=".4~g")],
        )
        .properties(width=420, height=220, description="Training loss by optimiser step for every arm.")
    )


def _head_records(cmap: ConflictMap, selections: Mapping[str, HeadSelection]) -> list[dict[str, Any]]:
    owners: dict[tuple[int, int], list[str]] = {}
    for arm, selection in selections.items():
        for head in selection.heads:
            owners.setdefault(head, []).append(arm)
    names = [*SCORES, *(f"{name}_se" for name in _MEASURED)]
    columns = {name: cmap.column(name).tolist() for name in names}
    buckets = cmap.table["bucket"].to_pylist()
    records: list[dict[str, Any]] = []
    for i, (layer, head) in enumerate(cmap.heads):
        arms = owners.get((layer, head), [])
        values = {name: column[i] if math.isfinite(column[i]) else None for name, column in columns.items()}
        records.append(
            {"layer": layer, "head": head, **values, "bucket": buckets[i], "arms": arms}
            | {"zones": ", ".join(arms) or "no arm"}
        )
    return records


def _tooltip_texts() -> dict[str, str]:
    """Vega expressions: `value ± standard error`, in words where one is missing."""
    return {
        f"{name}_text": (
            f"isValid(datum.{name}) ? format(datum.{name}, '.4~g') + ' ± ' + "
            f"(isValid(datum.{name}_se) ? format(datum.{name}_se, '.2~g') : 'not measured') : 'not measured'"
        )
        for name in _MEASURED
    }


def _indices(cmap: ConflictMap, name: str) -> list[int]:
    return sorted({int(index) for index in cmap.table[name].to_pylist()})


def _cell(cmap: ConflictMap, name: str, room: int, smallest: int, largest: int) -> int:
    return max(smallest, min(largest, room // len(_indices(cmap, name))))


def _axis(cmap: ConflictMap, name: str, room: int, smallest: int, largest: int) -> Any:
    """A band axis over layers or heads with as many labels as there is room for (about 14 pixels each)."""
    indices = _indices(cmap, name)
    every = next(
        step
        for step in (1, 2, 4, 8, 16, 32, 64, 128)
        if step * _cell(cmap, name, room, smallest, largest) >= 14
    )
    channel = alt.X if name == "head" else alt.Y
    axis = alt.Axis(
        values=[index for index in indices if index % every == 0],
        labelAngle=0,
        ticks=False,
        domain=False,
        grid=False,
    )
    scale = alt.Scale(domain=indices, paddingInner=0.06, paddingOuter=0)
    return channel(f"{name}:O", title=name.capitalize(), axis=axis, scale=scale)


def _from_risky_to_safe(count: int) -> list[str]:
    anchors = ["#d1502f", "#eaa35e", "#8fbad6", "#2f7ec2"]
    return [anchors[round(i * (len(anchors) - 1) / max(1, count - 1))] for i in range(count)]


def _title(purpose: str) -> str:
    better = "lower is better" if purpose == "over-refusal" else "higher is better"
    return f"{PURPOSES[purpose]} ({better})"


def _trade_off_points(evaluations: Mapping[str, EvalResult], cost: str) -> list[dict[str, Any]]:
    points = []
    for arm, evaluation in in_order(evaluations).items():
        rates = mean_rate(evaluation, "safety"), mean_rate(evaluation, cost)
        point: dict[str, Any] = {"arm": arm}
        for axis, rate in zip("xy", rates, strict=True):
            if rate is None or rate.value is None:
                break
            error = rate.standard_error or 0.0
            known = "not measured" if rate.standard_error is None else f"{error:.1%}"
            point |= {axis: rate.value, f"{axis}_low": rate.value - error, f"{axis}_high": rate.value + error}
            point[f"{axis}_text"] = f"{rate.value:.1%} ± {known}, n = {rate.n}, {rate.unscored} unscored"
        else:
            points.append(point)
    return points


def _range(points: Sequence[Mapping[str, Any]], axis: str) -> list[float]:
    low, high = min(point[f"{axis}_low"] for point in points), max(point[f"{axis}_high"] for point in points)
    # At least ten percentage points, so that noise does not fill the chart; a margin keeps bars off the frame.
    missing = max(0.0, 0.1 - (high - low)) / 2
    margin = missing + 0.08 * (high - low)
    return [low - margin, high + margin]
