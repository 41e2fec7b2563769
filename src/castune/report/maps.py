"""Charts with a cell a head: the conflict map and the heads that each arm trains. Pure."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import altair as alt

from castune.artifacts import ConflictMap, HeadSelection, Unit
from castune.artifacts.unit import only_heads
from castune.report.theme import NEUTRAL, Chart, arm_colours

SCORES = {
    "conflict_score": "Conflict score C(h)",
    "optimization_conflict": "Optimization conflict O(h)",
    "functional_sensitivity": "Functional sensitivity S(h)",
    "utility_shift": "Utility shift H_gen(h)",
    "safety_shift": "Safety shift H_safe(h)",
}
_MEASURED = ("optimization_conflict", "utility_shift", "safety_shift")
# Pixels between two labels of an axis that can still be read apart: beside each other, below each other.
_ACROSS, _DOWN = 20, 14


def conflict_heatmap(cmap: ConflictMap, selections: Mapping[str, HeadSelection]) -> Chart:
    """Layer x head heatmap (Figure 7 of the paper) with a switch between the scores of `SCORES`, and between domains.

    Layer 0 is at the top and blue is low, red high, as in the paper's maps. Layers may have different numbers
    of heads: a head that does not exist is left empty. Where a head has no value its cell is empty too. Of a map with
    several kinds of unit one is shown at a time, by a switch: scores are made of ranks within a kind.
    """
    grid = Grid.of(cmap.units, width=360, height=540, largest=(36, 18), smallest=(9, 7))
    records = _records(cmap, selections)
    if cmap.domains:
        maps: list[tuple[str | None, ConflictMap]] = [(None, cmap), *cmap.domains.items()]
        records = [{**row, "domain": name} for name, one in maps for row in _records(one, selections)]
    score = alt.param(
        name="score",
        value="conflict_score",
        bind=alt.binding_select(options=list(SCORES), labels=list(SCORES.values()), name="Show "),
    )
    legend = alt.Legend(title=None, gradientLength=min(grid.height, 220), gradientThickness=12, tickCount=5)
    scale = alt.Scale(scheme="redyellowblue", reverse=True, zero=False, nice=False)
    chart = (
        grid.cells()
        .properties(
            data=alt.InlineData(values=records),
            title=alt.TitleParams(text=alt.ExprRef(f"({json.dumps(SCORES)})[score]")),
            description=f"Heat map of all {grid.title.lower()}s by layer and index, coloured by the chosen score.",
        )
        .transform_calculate(value="datum[score]", **_tooltip_texts())
        .encode(
            color=alt.Color("value:Q", scale=scale, legend=legend),
            tooltip=[
                alt.Tooltip("layer:O", title="Layer"),
                alt.Tooltip("head:O", title=grid.title),
                *(alt.Tooltip(f"{name}_text:N", title=label) for name, label in SCORES.items()),
                alt.Tooltip("bucket:O", title="Bucket (1: highest)"),
                alt.Tooltip("zones:N", title="Trained in"),
            ],
        )
        .add_params(score)
    )
    if len(cmap.kinds) > 1:
        kinds = alt.binding_select(options=cmap.kinds, labels=[*cmap.kind_words.values()], name="Units ")
        unit = alt.param(name="shown_unit", value=cmap.kinds[0], bind=kinds)
        chart = chart.transform_filter("datum.unit === shown_unit").add_params(unit)
    if cmap.domains:
        # Null stands for the combined map. Colours are those of the shown map's own range.
        choice = alt.binding_select(
            options=[None, *cmap.domains], labels=["combined", *cmap.domains], name="Utility domain "
        )
        domain = alt.param(name="shown_domain", value=None, bind=choice)
        chart = chart.transform_filter("datum.domain === shown_domain").add_params(domain)
    if not selections:
        return chart
    # Null stands for all heads.
    choice = alt.binding_select(options=[None, *selections], labels=["all", *selections], name="Heads of ")
    arm = alt.param(name="arm", value=None, bind=choice)
    shown = "arm === null || indexof(datum.arms, arm) >= 0"
    return chart.encode(opacity=alt.condition(shown, alt.value(1), alt.value(0.12))).add_params(arm)


def zones(cmap: ConflictMap, selections: Mapping[str, HeadSelection]) -> Chart:
    """Which heads every arm trains: one small layer x head grid an arm."""
    grid = Grid.of(cmap.units, width=230, height=360, largest=(24, 13), smallest=(4, 4))
    colours = arm_colours(list(selections))
    grids = []
    for arm, kind in ((arm, kind) for arm in selections for kind in cmap.kinds):
        selection = selections[arm]
        chosen = f"indexof(datum.arms, {json.dumps(arm)}) >= 0"
        n = sum(one.kind == kind for one in selection.units)
        total, cells = selection.n_total, grid.cells()
        if len(cmap.kinds) > 1:
            total = len(cmap.rows_of(kind))
            cells = cells.transform_filter(f"datum.unit === {json.dumps(kind)}")
        title = f"{arm}: {n:,} of {total:,} {cmap.kind_words[kind]}"
        grids.append(
            cells.properties(title=title).encode(
                color=alt.condition(chosen, alt.value(colours[arm]), alt.value(NEUTRAL)),
                opacity=alt.condition(chosen, alt.value(1), alt.value(0.14)),
                tooltip=[
                    alt.Tooltip("layer:O", title="Layer"),
                    alt.Tooltip("head:O", title=grid.title),
                    alt.Tooltip("conflict_score:Q", title=SCORES["conflict_score"], format=".4~g"),
                    alt.Tooltip("zones:N", title="Trained in"),
                ],
            )
        )
    names = ("unit", "layer", "head", "conflict_score", "arms", "zones")
    records = [{name: record[name] for name in names if name in record} for record in _records(cmap, selections)]
    return alt.concat(*grids, data=alt.InlineData(values=records), columns=3, spacing=36).properties(
        description="Grids of layers and heads; coloured cells are the heads that an arm trains."
    )


@dataclass(frozen=True)
class Grid:
    """Layers downwards and heads to the right, in cells that fill the room there is."""

    layers: list[int]
    heads: list[int]
    title: str
    cell_width: int
    cell_height: int

    @classmethod
    def of(
        cls,
        units: Sequence[Unit],
        *,
        width: int,
        height: int,
        largest: tuple[int, int],
        smallest: tuple[int, int],
    ) -> Grid:
        """Cells for some units, as large as the room in pixels and the limits of a cell's width and height allow."""
        layers, heads = (sorted({getattr(one, name) for one in units}) for name in ("layer", "index"))
        return cls(
            layers,
            heads,
            "Head" if only_heads(units) else "Unit",
            max(smallest[0], min(largest[0], width // len(heads))),
            max(smallest[1], min(largest[1], height // len(layers))),
        )

    @property
    def height(self) -> int:
        """Of all cells, in pixels."""
        return self.cell_height * len(self.layers)

    def cells(self) -> alt.Chart:
        """A chart of rectangles by `layer` and `head`, without data."""
        return (
            alt.Chart()
            .mark_rect(aria=False)
            .encode(
                x=alt.X("head:O", title=self.title, **_bands(self.heads, self.cell_width, _ACROSS)),
                y=alt.Y("layer:O", title="Layer", **_bands(self.layers, self.cell_height, _DOWN)),
            )
            .properties(width=self.cell_width * len(self.heads), height=self.height)
        )


def _bands(indices: list[int], cell: int, apart: int) -> dict[str, alt.Axis | alt.Scale]:
    """Scale and axis over layers or heads, with as many labels as there is room for."""
    every = 1
    while every * cell < apart:
        every *= 2
    labelled = [index for index in indices if index % every == 0]
    return {
        "axis": alt.Axis(values=labelled, labelAngle=0, labelOverlap=False, ticks=False, domain=False, grid=False),
        "scale": alt.Scale(domain=indices, paddingInner=0.06, paddingOuter=0),
    }


def _records(cmap: ConflictMap, selections: Mapping[str, HeadSelection]) -> list[dict[str, object]]:
    owners: dict[Unit, list[str]] = {}
    for arm, selection in selections.items():
        for one in selection.units:
            owners.setdefault(one, []).append(arm)
    columns = {
        name: [value if math.isfinite(value) else None for value in cmap.column(name).tolist()]
        for name in [*SCORES, *(f"{name}_se" for name in _MEASURED)]
    }
    buckets = cmap.table["bucket"].to_pylist()
    records = []
    several = len(cmap.kinds) > 1
    for i, unit in enumerate(cmap.units):
        arms = owners.get(unit, [])
        values = {name: column[i] for name, column in columns.items()}
        kind = {"unit": unit.kind} if several else {}
        place = {**kind, "layer": unit.layer, "head": unit.index, "bucket": buckets[i]}
        records.append({**place, **values, "arms": arms, "zones": ", ".join(arms) or "no arm"})
    return records


def _tooltip_texts() -> dict[str, str]:
    """Vega expressions: a value, with its standard error where it is a measured one; in words if missing."""

    def shown(field: str, digits: int) -> str:
        return f"(isValid(datum.{field}) ? format(datum.{field}, '.{digits}~g') : 'not measured')"

    texts = {f"{name}_text": shown(name, 4) for name in SCORES}
    return texts | {f"{name}_text": f"{shown(name, 4)} + ' ± ' + {shown(name + '_se', 2)}" for name in _MEASURED}
