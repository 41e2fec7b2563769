"""Conflict drift: how the map changes while an arm is trained, beside what measurement noise alone would do."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import altair as alt

from castune.artifacts.drift_result import ColumnDrift, DriftResult, StepDrift, ZoneOverlap
from castune.core.numbers import UNDEFINED, duration, number, span
from castune.report.markup import Markup, table, tag
from castune.report.sections import figure, recorded_rate, section
from castune.report.theme import Chart

# More would be a list to scroll, not to read; drift.json has all.
_SHOWN_CHANGES = 20
_SYMBOLS = {
    "conflict_score": "C",
    "optimization_conflict": "O",
    "utility_shift": "H_gen",
    "safety_shift": "H_safe",
    "functional_sensitivity": "S",
}


def drift_chart(result: DriftResult) -> Chart | None:
    """Spearman correlation of C with the first map by step, its interval, and the noise ceiling; None without any."""
    shown = "Maps on other examples", "Noise ceiling: no drift"
    records = []
    for step, column in _points(result):
        expected = column.expected
        if column.ceiling is not None:
            records.append({"step": step, "series": shown[1], "value": column.ceiling})
        if expected is not None:
            value, low, high = expected
            records.append({"step": step, "series": shown[0], "value": value, "low": low, "high": high})
    if not records:
        return None
    base = alt.Chart(alt.InlineData(values=records)).encode(
        x=alt.X("step:Q", title="Optimiser step", axis=alt.Axis(grid=False, tickMinStep=1)),
        color=alt.Color("series:N", title=None)
        .scale(domain=list(shown), range=["#2f7ec2", "#808080"])
        .legend(orient="top", symbolOpacity=1),
    )
    scale = alt.Scale(zero=False, nice=True)
    y = alt.Y("value:Q", title="Spearman of C with the first map", scale=scale)
    tooltip = ["series:N", "step:Q", *(alt.Tooltip(f"{name}:Q", format=".3f") for name in ("value", "low", "high"))]
    ceiling, measured = (f"datum.series === '{name}'" for name in (shown[1], shown[0]))
    return alt.layer(
        base.transform_filter(measured).mark_area(opacity=0.18).encode(y=alt.Y("low:Q", scale=scale), y2="high:Q"),
        base.transform_filter(ceiling).mark_line(strokeWidth=1.5, strokeDash=[5, 4]).encode(y=y),
        base.transform_filter(measured)
        .mark_line(strokeWidth=1.5, point=alt.OverlayMarkDef(size=30))
        .encode(y=y, tooltip=tooltip),
    ).properties(
        width=420,
        height=220,
        description=f"Correlation of the conflict scores with those before training, by step of {result.arm}.",
    )


def drift_charts(drifts: Mapping[str, DriftResult]) -> dict[str, Chart]:
    """A chart an arm, by the name of its figure."""
    made = {figure_name(arm): drift_chart(result) for arm, result in drifts.items()}
    return {name: chart for name, chart in made.items() if chart is not None}


def figure_name(arm: str) -> str:
    """The name of the chart of an arm."""
    return f"drift_{arm}"


def drift_verdict(step: StepDrift, n: Mapping[str, int]) -> str:
    """What the interval of C says, in words."""
    column = step.columns["conflict_score"]
    examples = f"n = {n['utility']:,} utility examples and {n['safety']:,} harmful prompts"
    if column.is_seen is None:
        return f"whether the map has drifted cannot be told at {examples}: halves of one map do not agree"
    value = _corrected(column)
    if not column.is_seen:
        return f"no drift seen beyond measurement noise at {examples}: {value}"
    return f"the order of the heads has changed beyond measurement noise ({examples}): {value}"


def drift_section(drifts: Mapping[str, DriftResult], drawn: Collection[str]) -> Markup | str:
    """How the map changed while each arm was trained; nothing where it was not measured."""
    if not drifts:
        return ""
    explanation = (
        "The map was measured again with adapters saved during training, merged into the weights. Both maps "
        "are measured on the same examples and have part of their noise in common, so their plain correlation (same "
        "examples) says too little about drift. Corrected for noise: across halves of the examples that share none, "
        "over what halves of one map agree; 1 is no drift, the interval is a 95 % bootstrap over the examples. The "
        "noise ceiling is the correlation of two maps of an unchanged model, each measured on examples of its own. "
        "Intervals of several steps and arms are not corrected for their number."
    )
    parts = [_arm(arm, result, drawn) for arm, result in drifts.items()]
    return section("Conflict drift", "drift", tag("p", explanation, class_="small"), *parts)


def _arm(arm: str, result: DriftResult, drawn: Collection[str]) -> Markup:
    last = result.steps[-1]
    rate = "Accuracy or share answered" if result.settings.get("reply_domains") else "Accuracy"
    head = [
        "Step", rate, "Refusals", "C, same examples", "Noise ceiling of C",
        *(f"{symbol}, corrected" for symbol in _SYMBOLS.values()),
        "Safe zone kept", "Risky zone kept", "Same rule would keep",
    ]  # fmt: skip
    caption = (
        "Correlation expected between maps measured on separate examples, with its 95 % interval. The gap to the "
        "ceiling is drift."
    )
    return tag(
        "div",
        tag("h3", arm),
        tag("p", f"After {last.step:,} steps {drift_verdict(last, result.n)}."),
        figure(figure_name(arm), caption) if figure_name(arm) in drawn else "",
        table(head, [_row(step, result) for step in result.steps], label=f"Drift of {arm} by step", class_="numbers"),
        tag(
            "p",
            f"{result.n['heads']:,} heads, seed {result.seed}, {duration(result.seconds)} of measuring.",
            class_="small",
        ),
        _changes(last),
    )


def _row(step: StepDrift, result: DriftResult) -> list[object]:
    score = step.columns["conflict_score"]
    again = step.reselected
    kept = (
        "–" if again is None else f"{again['kept']:,.0f} of {again['heads']:,.0f} ({again['by_chance']:.1f} by chance)"
    )
    return [
        f"{step.step:,}",
        recorded_rate(step.baseline.get("utility_accuracy")),
        recorded_rate(step.baseline.get("refusal_rate")),
        number(score.spearman),
        number(score.ceiling),
        *(_corrected(step.columns[name]) for name in _SYMBOLS),
        _zone(step.zones["safe"]),
        _zone(step.zones["risky"]),
        kept,
    ]


def _changes(step: StepDrift) -> Markup | str:
    if not step.changes:
        return tag("p", f"No head is in another zone after {step.step:,} steps.")
    crossed = sum("middle" not in (change.before, change.now) for change in step.changes)
    rows = [
        [f"layer {c.layer}, head {c.head}", c.before, c.now, f"{c.score_before:.3f}", f"{c.score_now:.3f}"]
        for c in step.changes[:_SHOWN_CHANGES]
    ]
    rest = len(step.changes) - len(rows)
    safe = step.zones["safe"]
    noise = ""
    if safe.halves_across is not None and safe.halves_first is not None:
        noise = (
            f" Halves of the examples agree by {safe.halves_first:.2f} (Jaccard) on the safe zone of the first map, by "
            f"{safe.halves_across:.2f} where one of them is of the map now: without drift the two would be the same."
        )
    said = (
        f"{len(step.changes):,} heads are in another zone than before training, {crossed:,} of them went from one end "
        f"to the other.{noise}"
    )
    head = ["Head", "Zone before", "Zone now", "C before", "C now"]
    return tag(
        "div",
        tag("p", said),
        table(head, rows, label="Heads that changed zone", class_="numbers"),
        tag("p", f"{rest:,} more are in drift.json.", class_="small") if rest else "",
    )


def _points(result: DriftResult) -> list[tuple[int, ColumnDrift]]:
    """Steps with the drift of C; before the first one there is none."""
    found = [(step.step, step.columns["conflict_score"]) for step in result.steps]
    reliability = found[0][1].reliability_first
    if reliability is None or reliability <= 0:
        return found
    start = ColumnDrift(1.0, reliability, reliability, reliability, 1.0, 1.0, 1.0)
    return [(0, start), *found]


def _zone(zone: ZoneOverlap) -> str:
    return f"{zone.kept:,} of {zone.size:,} ({zone.by_chance:.1f} by chance)"


def _corrected(column: ColumnDrift) -> str:
    if column.corrected is None:
        return UNDEFINED
    if column.corrected_low is None or column.corrected_high is None:
        return f"{number(column.corrected)} (interval undefined)"
    return f"{number(column.corrected)} ({span(column.corrected_low, column.corrected_high)})"
