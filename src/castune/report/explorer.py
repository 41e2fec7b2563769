"""The conflict map to explore on the page: a map of heads, a budget that moves, and a table to sort.

`explorer` gives the HTML with its data; `explorer.js` and `explorer.css` bring every such element on a page to life.
What castune itself decides is decided here, from full precision: the order of heads by each score is shipped, and C(h)
in full, so that zones, buckets and their means on the page are those of `castune select`. All other numbers are shown
only, and are shortened to the digits that can be.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from castune.artifacts import ConflictMap, HeadSelection
from castune.artifacts.conflict_map import SCHEMA
from castune.artifacts.unit import only_heads
from castune.report.attribution import STANDINGS, standings
from castune.report.maps import SCORES
from castune.report.markup import Markup, join, script_json, tag
from castune.report.theme import LOW_TO_HIGH
from castune.stats.ranking import by_descending

# Short names for the heads of columns, and what `castune select --score` calls the score where it sorts by it.
_SYMBOLS = {
    "conflict_score": ("C(h)", "conflict"),
    "optimization_conflict": ("O(h)", "gradient"),
    "functional_sensitivity": ("S(h)", "sensitivity"),
    "utility_shift": ("H_gen(h)", None),
    "safety_shift": ("H_safe(h)", None),
}
_BUCKETS = (4, 8, 16)
# The share that a selection takes when none is asked for, in percent.
_USUAL_BUDGET = 25
# The page shows four significant digits; two more keep colours apart.
_DIGITS, _ERROR_DIGITS = 6, 4


def explorer(cmap: ConflictMap, selections: Mapping[str, HeadSelection]) -> Markup:
    """A map to explore; works once `explorer.js` runs, and any number of times on a page.

    Args:
        cmap: the conflict map, with those of its utility domains.
        selections: the heads that each arm trains.

    Returns:
        An element with its data inside.

    Raises:
        ValueError: a domain's map has other heads than the combined one.
    """
    noun = _noun(cmap)
    marks = [
        tag("span", tag("i", class_="cell risky", aria_hidden="true"), " risky zone"),
        tag("span", tag("i", class_="cell safe", aria_hidden="true"), " safe zone"),
        tag("span", tag("i", class_="cell empty", aria_hidden="true"), " no value"),
    ]
    grid = tag(
        "div",
        tag(
            "div",
            data_part="grid",
            class_="grid",
            role="grid",
            aria_label=f"Map of {noun}s: a row a layer, layer 0 first",
        ),
        tag("div", data_part="legend", class_="legend"),
        tag("p", *marks, class_="marks"),
        class_="explorer-map",
    )
    numbers = tag(
        "div",
        tag("p", data_part="budget-said", role="status", class_="budget-said"),
        tag("div", data_part="zones"),
        tag("p", data_part="command", class_="small"),
        tag("div", data_part="buckets"),
        class_="explorer-numbers",
    )
    use = (
        f"Point at a {noun}, or reach it with the arrow keys, for all its values with standard errors and 95 % "
        "intervals. Selecting it marks it in the map and in the table; click a column header to sort. Colours "
        f"span the lowest to the highest value shown. Beyond 50 % a {noun} can be in both zones."
    )
    of_map = " of the combined map" if cmap.domains else ""
    sure = (
        f"Standing: how sure it is that a {noun} is inside or outside the safe quarter by C(h){of_map}. Undecided: the "
        "error of the estimate may move it across the border; probable: other examples may; certain: neither. Exact: "
        "measured by ablation instead of estimated."
    )
    heads = tag("div", data_part="heads", class_="heads", role="region", aria_label=f"Table of {noun}s")
    live = tag(
        "div",
        _controls(cmap, selections),
        tag("div", grid, numbers, class_="explorer-body"),
        heads,
        tag("p", use, class_="small"),
        tag("p", sure, class_="small") if cmap.standing else "",
        tag("div", data_part="tip", class_="tip", role="tooltip", hidden=True),
        data_part="live",
        hidden=True,
    )
    without = tag("noscript", tag("p", "Exploring the map needs JavaScript; it is drawn in figures/conflict_map.svg."))
    data = tag("script", Markup(script_json(_data(cmap, selections))), type="application/json", data_part="data")
    return tag("div", without, live, data, class_="explorer")


def _controls(cmap: ConflictMap, selections: Mapping[str, HeadSelection]) -> Markup:
    fields = [_choice("Score", "score", list(SCORES.values()))]
    if cmap.domains:
        fields.append(_choice("Utility domain", "map", ["combined", *cmap.domains]))
    noun = _noun(cmap)
    sets = [f"{noun}s of {arm}" for arm in selections]
    if cmap.standing:
        sets.append(f"undecided {noun}s")
    budget = tag("input", type="range", min="1", max="100", step="0.5", value=str(_USUAL_BUDGET), data_part="budget")
    fields += [
        tag("label", "Budget ", budget, tag("output", data_part="budget-shown")),
        _choice("Buckets", "parts", [str(count) for count in _BUCKETS], values=[str(count) for count in _BUCKETS]),
        _choice("Colour by", "colour", ["score", "bucket"]),
        _choice("Highlight", "bring-out", [f"all {noun}s", "risky zone", "safe zone", *sets]),
    ]
    return tag("div", *fields, class_="explorer-controls", role="group", aria_label="What the map shows")


def _choice(label: str, part: str, shown: list[str], values: list[str] | None = None) -> Markup:
    values = values or [str(i) for i in range(len(shown))]
    options = [tag("option", text, value=value) for text, value in zip(shown, values, strict=True)]
    return tag("label", f"{label} ", tag("select", join(options), data_part=part))


def _data(cmap: ConflictMap, selections: Mapping[str, HeadSelection]) -> dict[str, object]:
    rows = {unit: i for i, unit in enumerate(cmap.units)}
    layers, heads = zip(*cmap.heads, strict=True)
    return {
        "noun": _noun(cmap),
        "layers": layers,
        "heads": heads,
        "scores": [
            {"column": column, "label": label, "symbol": _SYMBOLS[column][0], "select": _SYMBOLS[column][1]}
            for column, label in SCORES.items()
        ],
        "arms": [
            {"name": arm, "rows": [rows[unit] for unit in selection.units if unit in rows]}
            for arm, selection in selections.items()
        ],
        "standing": {"words": STANDINGS, "rows": [STANDINGS.index(one) for one in standings(cmap)]},
        "maps": [_map(one, cmap) for one in (cmap, *cmap.domains.values())],
        "ramp": LOW_TO_HIGH,
    }


def _noun(cmap: ConflictMap) -> str:
    """What one row is called."""
    return "head" if only_heads(cmap.units) else "unit"


def _map(one: ConflictMap, combined: ConflictMap) -> dict[str, object]:
    """The columns of a map, and its rows by each score, highest first, as `castune select` sorts them."""
    if one.heads != combined.heads:
        raise ValueError(f"the map of a utility domain has {len(one):,} heads that are not those of the combined map")
    every_row = range(len(one))
    shown = [name for name in SCHEMA.names if any(name == score or name.startswith(f"{score}_") for score in SCORES)]
    columns = {name: _numbers(one, name) for name in shown}
    return {
        "columns": {name: values for name, values in columns.items() if any(value is not None for value in values)},
        "order": {score: by_descending(every_row, one.column(score)) for score in SCORES},
    }


def _numbers(cmap: ConflictMap, name: str) -> list[float | None]:
    digits = 17 if name == "conflict_score" else _DIGITS if name in SCORES else _ERROR_DIGITS
    return [
        None if not math.isfinite(value) else value if digits == 17 else float(f"{value:.{digits}g}")
        for value in cmap.column(name).tolist()
    ]
