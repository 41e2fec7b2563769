"""The page of an inspection: maps of what an adapter does, unit by unit, and the same charts as files."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import altair as alt

from castune.artifacts.adapter_inspection import OBJECTIVES, PAGE_FILE, AdapterInspection
from castune.artifacts.files import write_text
from castune.core.numbers import number, percent, with_error
from castune.names import kind_words
from castune.report.document import document
from castune.report.inspection_summary import (
    EXAMPLES,
    LOSSES,
    Group,
    agreements,
    by_bucket,
    by_kind,
    cost_of,
    measured,
    named,
)
from castune.report.maps import Grid
from castune.report.markup import Markup, table, tag
from castune.report.sections import cut_words, figure, known, section
from castune.report.theme import Chart, bucket_colours

# Columns that the map can show, with their labels.
SHOWN = {
    "norm": "Size of the update",
    "relative_norm": "Size relative to the weights",
    "top_share": "Share of the largest direction",
    "effective_rank": "Effective rank",
    **{column: f"Effect on the loss of {LOSSES[name]}" for name, column in OBJECTIVES.items()},
    "conflict_score": "Conflict score C(h)",
}


def write_page(directory: str | Path, inspection: AdapterInspection) -> Path:
    """Write `inspection.html`, atomically. Returns the file."""
    drawn = charts(inspection)
    path = Path(directory) / PAGE_FILE
    name = known(inspection.metadata["adapter"]["name"])
    write_text(path, document(f"castune inspect: {name}", _body(inspection, drawn), drawn))
    return path


def charts(inspection: AdapterInspection) -> dict[str, Chart]:
    """Every chart that an inspection allows, by name."""
    if not len(inspection):
        return {}
    made: dict[str, Chart] = {"update_map": update_map(inspection)}
    for name in measured(inspection):
        if name != "safety" and "safety" in inspection.data:
            made[f"bought_{name.replace('-', '_')}"] = bought(inspection, name)
    return made


def update_map(inspection: AdapterInspection) -> Chart:
    """Layer x unit heat map with a switch between the columns of `SHOWN`, and between kinds of unit.

    Colours span the lowest to the highest value shown; a unit without a value is left empty.
    """
    shown = {name: label for name, label in SHOWN.items() if any(map(math.isfinite, inspection.column(name)))}
    records, kinds = _records(inspection, shown), inspection.kinds
    grid = Grid.of(inspection.units, width=360, height=540, largest=(36, 18), smallest=(9, 7))
    options = alt.binding_select(options=list(shown), labels=list(shown.values()), name="Show ")
    legend = alt.Legend(title=None, gradientLength=min(grid.height, 220), gradientThickness=12, tickCount=5)
    scale = alt.Scale(scheme="redyellowblue", reverse=True, zero=False, nice=False)
    chart = (
        grid.cells()
        .properties(
            data=alt.InlineData(values=records),
            title=alt.TitleParams(text=alt.ExprRef(f"({json.dumps(shown)})[column]")),
            description="Heat map of all units by layer and index, coloured by the chosen column.",
        )
        .transform_calculate(value="datum[column]")
        .encode(
            color=alt.Color("value:Q", scale=scale, legend=legend),
            tooltip=_tooltip(shown),
        )
        .add_params(alt.param(name="column", value=next(iter(shown)), bind=options))
    )
    if len(kinds) < 2:
        return chart
    choice = alt.binding_select(options=kinds, labels=[kind_words(kind) for kind in kinds], name="Units ")
    kind = alt.param(name="shown_unit", value=kinds[0], bind=choice)
    return chart.transform_filter("datum.unit === shown_unit").add_params(kind)


def bought(inspection: AdapterInspection, cost: str) -> Chart:
    """What every unit costs over what it gains in refusals, both to first order; a point a unit."""
    shown = {column: SHOWN[column] for column in OBJECTIVES.values()}
    records = [
        {**record, "gain": -record["safety_effect"], "cost": record[OBJECTIVES[cost]]}
        for record in _records(inspection, shown)
    ]
    buckets = sorted({record["bucket"] for record in records if record["bucket"] is not None})
    colour = alt.Color("kind:N", title="Units")
    if buckets:
        colour = alt.Color("bucket:O", title="Bucket").scale(domain=buckets, range=bucket_colours(len(buckets)))
    return (
        alt.Chart(alt.InlineData(values=records))
        .mark_point(filled=True, size=40, opacity=0.75)
        .encode(
            x=alt.X("gain:Q", title="Refusals gained, nats per token", axis=alt.Axis(tickCount=6)),
            y=alt.Y("cost:Q", title=f"Added to the loss of {LOSSES[cost]}, nats per token"),
            color=colour,
            tooltip=_tooltip(shown),
        )
        .properties(width=380, height=300, description=f"Cost in {LOSSES[cost]} over refusals gained, a point a unit.")
    )


def _records(inspection: AdapterInspection, shown: Mapping[str, str]) -> list[dict[str, Any]]:
    # Six digits are more than a colour shows.
    columns = {
        name: [float(f"{value:.6g}") if math.isfinite(value) else None for value in inspection.column(name).tolist()]
        for name in shown
    }
    buckets = inspection.table["bucket"].to_pylist()
    return [
        {"unit": one.kind, "kind": kind_words(one.kind), "layer": one.layer, "head": one.index, "bucket": buckets[row]}
        | {name: values[row] for name, values in columns.items()}
        for row, one in enumerate(inspection.units)
    ]


def _tooltip(shown: Mapping[str, str]) -> list[alt.Tooltip]:
    numbers = [alt.Tooltip(f"{name}:Q", title=label, format=".3~g") for name, label in shown.items()]
    return [*(alt.Tooltip(f"{name}:N", title=name.capitalize()) for name in ("unit", "layer", "head")), *numbers]


def _body(inspection: AdapterInspection, drawn: Mapping[str, Chart]) -> Markup:
    metadata = inspection.metadata
    adapter = metadata["adapter"]
    return tag(
        "main",
        tag(
            "header",
            tag("p", "castune inspect", class_="kicker"),
            tag("h1", known(adapter["name"])),
            tag("p", f"{adapter['kind']}, base {known(inspection.model.get('name'))}", class_="quiet"),
            tag("p", _verdict(inspection), class_="verdict"),
        ),
        tag("noscript", tag("p", "Charts need JavaScript; the table is in inspection.csv and inspection.parquet.")),
        _odd(metadata["odd"]),
        _effects(inspection, drawn),
        _overlay(inspection),
        _measurement(inspection),
    )


def _verdict(inspection: AdapterInspection) -> str:
    parts = []
    for name in measured(inspection):
        found = inspection.metadata["whole"][name]
        change = found["first_order"] if found["exact"] is None else found["exact"]
        error = found["first_order_se"] if found["exact"] is None else found["exact_se"]
        how = "to first order" if found["exact"] is None else f"first order {number(found['first_order'], '+.3f')}"
        parts.append(f"{LOSSES[name]} {with_error(change, error, '+.3f')} ({how})")
    return f"Change of the mean loss, nats per token: {', '.join(parts)}. Below 0 these replies become likelier."


def _odd(odd: Sequence[Mapping[str, Any]]) -> Markup:
    if not odd:
        return section("Anomalies", "odd", tag("p", "No anomalies found."))
    return section("Anomalies", "odd", tag("ul", *(tag("li", _sentence(one["said"])) for one in odd)))


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}."


def _effects(inspection: AdapterInspection, drawn: Mapping[str, Chart]) -> Markup:
    if not drawn:
        return section("What each unit does", "units", tag("p", "The adapter changes no unit that castune knows."))
    explanation = (
        "An effect is the inner product of the update with the gradient of a mean loss at the base model, over what "
        "the unit owns: the change of the loss to first order. It says how the update begins to act. The whole update "
        "goes further, and where first order and exact change differ much, so may the effects of single units."
    )
    captions = {
        "update_map": "Every unit by layer and index. Point at one for all its numbers.",
        "bought_utility": "Further right: refusals become more likely. Further up: right answers become less likely.",
        "bought_over_refusal": "Further right: refusals become more likely. Further up: helpful replies become "
        "less likely.",
    }
    figures = [figure(name, captions[name]) for name in drawn]
    return section(
        "What each unit does",
        "units",
        tag("p", explanation),
        _groups("Kind of unit", by_kind(inspection), inspection),
        figures[0],
        tag("div", *figures[1:], class_="figures"),
        _extremes(inspection),
    )


def _groups(first: str, groups: Sequence[Group], inspection: AdapterInspection) -> Markup:
    names = measured(inspection)
    rows = [
        [one.label, f"{one.changed:,} of {one.n:,}", "–" if one.share is None else percent(one.share)]
        + [number(one.effects[name], "+.4f") for name in names]
        for one in groups
    ]
    head = [first, "Changed", "Share of the squared size", *(f"Loss of {LOSSES[name]}" for name in names)]
    return table(head, rows, label=f"Effects by {first.lower()}", class_="numbers")


def _extremes(inspection: AdapterInspection) -> Markup:
    parts: list[Markup] = []
    names = measured(inspection)
    titles = {"Costliest units": cost_of(inspection), "Most refusals gained": -inspection.effect("safety")}
    for title, value_H in titles.items():
        rows = []
        for row in named(inspection, value_H):
            one = inspection.units[row]
            place = f"{kind_words(one.kind, 1)} {one.index} of layer {one.layer}"
            sizes = [f"{inspection.column(name)[row]:.3g}" for name in ("norm", "effective_rank", "top_share")]
            errors = [inspection.column(f"{OBJECTIVES[name]}_se")[row] for name in names]
            effects = [
                with_error(float(inspection.effect(name)[row]), error if math.isfinite(error) else None, "+.4f")
                for name, error in zip(names, errors, strict=True)
            ]
            rows.append([place, *sizes, *effects])
        if rows:
            head = ["Unit", "Size", "Effective rank", "Largest direction", *(f"Loss of {LOSSES[n]}" for n in names)]
            parts += [tag("h3", title), table(head, rows, label=title, class_="numbers")]
    return tag("div", *parts)


def _overlay(inspection: AdapterInspection) -> Markup | str:
    if not inspection.has_map or not (buckets := by_bucket(inspection)):
        return ""
    found = ", ".join(f"{name} {number(value)}" for name, value in agreements(inspection).items())
    said = f"Spearman correlation of the conflict score with {found}. Buckets are those of the map, 1 the riskiest."
    return section("Over the conflict map", "map", tag("p", said), _groups("Bucket", buckets, inspection))


def _measurement(inspection: AdapterInspection) -> Markup:
    metadata = inspection.metadata
    facts = [
        ("Adapter", f"{metadata['adapter']['kind']}, {metadata['adapter']['hash']}"),
        ("Modules", ", ".join(f"{n:,} {name}" for name, n in metadata["adapter"]["modules"].items()) or "none"),
        ("Base", f"{known(inspection.model.get('name'))} ({known(inspection.model.get('fingerprint'))})"),
        ("Computed in", known(inspection.model.get("dtype"))),
        *((EXAMPLES[name].capitalize(), _source(inspection, name)) for name in measured(inspection)),
        ("Parts of each set for standard errors", known(metadata["settings"]["gradient_chunks"])),
        ("Made", f"{metadata['provenance']['date']}, castune {metadata['provenance']['versions']['castune']}"),
    ]
    return section("How it was measured", "measured", table([], facts, label="Measurement", class_="facts"))


def _source(inspection: AdapterInspection, name: str) -> str:
    record = inspection.data[name]
    cut = cut_words(record)
    return f"{known(record['source'])}, n = {record['n']:,}" + (f", {cut}" if cut else "")
