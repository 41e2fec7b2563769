"""What an inspection found, in lines of at most 80 columns; and its units by kind and by bucket. Pure."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from castune.artifacts.adapter_inspection import OBJECTIVES, AdapterInspection
from castune.core.numbers import counted, number, percent, with_error
from castune.core.updates import Floats
from castune.names import kind_words, units_counted
from castune.stats.correlations import correlations
from castune.stats.ranking import percentile_rank

WIDTH = 80
# What the losses are of, by objective.
LOSSES = {"safety": "refusals", "utility": "right answers", "over-refusal": "helpful replies"}
EXAMPLES = {"safety": "harmful prompts", "utility": "utility examples", "over-refusal": "harmless prompts"}
# Units that are named.
_MOST_NAMED = 5
_CELL = 18


@dataclass(frozen=True)
class Group:
    """Some units together.

    Attributes:
        label: what they are.
        n: how many.
        changed: how many of them the adapter changes.
        share: of the squared norm of the whole update; None of an update of zero.
        effects: sums of their effects by objective; those that were measured.
    """

    label: str
    n: int
    changed: int
    share: float | None
    effects: dict[str, float]


def measured(inspection: AdapterInspection) -> list[str]:
    """The objectives that effects were measured on."""
    return [name for name in OBJECTIVES if name in inspection.data]


def group(inspection: AdapterInspection, label: str, rows: Sequence[int]) -> Group:
    """Some rows of an inspection together."""
    norm_H, total = inspection.column("norm")[list(rows)], inspection.metadata["norm"]
    return Group(
        label=label,
        n=len(rows),
        changed=int((norm_H > 0).sum()),
        share=float((norm_H**2).sum() / total**2) if total else None,
        effects={name: float(inspection.effect(name)[list(rows)].sum()) for name in measured(inspection)},
    )


def by_kind(inspection: AdapterInspection) -> list[Group]:
    """The units of each kind."""
    kinds = [one.kind for one in inspection.units]
    return [
        group(inspection, kind_words(kind), [row for row, found in enumerate(kinds) if found == kind])
        for kind in inspection.kinds
    ]


def by_bucket(inspection: AdapterInspection) -> list[Group]:
    """The units of each bucket of the conflict map, 1 the highest scores; none without a map."""
    bucket_H = inspection.column("bucket")
    words = {1: " (risky zone)", np.nanmax(bucket_H, initial=1): " (safe zone)"}
    return [
        group(inspection, f"bucket {number:.0f}{words.get(number, '')}", np.flatnonzero(bucket_H == number).tolist())
        for number in np.unique(bucket_H[np.isfinite(bucket_H)]).tolist()
    ]


def cost_of(inspection: AdapterInspection) -> Floats:
    """What every unit's update costs to first order: what it adds to the losses of answers and of helpful replies."""
    return np.asarray(inspection.effect("utility") + inspection.effect("over-refusal"))


def named(inspection: AdapterInspection, value_H: Floats) -> list[int]:
    """Rows of the highest values above zero, highest first."""
    order = np.argsort(-value_H, kind="stable")[:_MOST_NAMED]
    return [int(row) for row in order if value_H[row] > 0]


def agreements(inspection: AdapterInspection) -> dict[str, float]:
    """Spearman correlation of C(h) with size, refusals gained and cost, over the first kind of unit of the map."""
    score_H, kinds = inspection.column("conflict_score"), [one.kind for one in inspection.units]
    known = np.flatnonzero(np.isfinite(score_H)).tolist()
    rows = [row for row in known if kinds[row] == kinds[known[0]]]
    columns = {
        "size": inspection.column("norm"),
        "refusals gained": -inspection.effect("safety"),
        "cost": cost_of(inspection),
    }
    rank_H = percentile_rank(score_H[rows])
    return {
        name: float(correlations(rank_H, percentile_rank(value_H[rows])[None])[0]) for name, value_H in columns.items()
    }


def summary(inspection: AdapterInspection) -> list[str]:
    """What was found, for the command line."""
    metadata, names = inspection.metadata, measured(inspection)
    adapter = metadata["adapter"]
    modules = ", ".join(f"{n} {name}" for name, n in adapter["modules"].items()) or "no projection"
    examples = ", ".join(f"{inspection.data[name]['n']:,} {EXAMPLES[name]}" for name in names)
    lines = [
        f"{adapter['name']}: {adapter['kind']} on {modules}; base {inspection.model['name']}",
        f"measured on {examples}",
        "",
        "change of the mean loss, nats per token; below 0 the replies become likelier",
        _row("", [LOSSES[name] for name in names]),
        *_whole(metadata["whole"], names),
    ]
    groups = by_kind(inspection)
    if len(groups) > 1:
        lines += ["", *_groups("units", groups, names)]
    elif groups:
        changed = units_counted({inspection.kinds[0]: groups[0].n})
        lines += ["", f"{groups[0].changed:,} of {changed} changed"]
    if inspection.has_map and (buckets := by_bucket(inspection)):
        lines += ["", *_groups("by conflict score", buckets, names), *_map_lines(inspection)]
    lines += ["", *_units(inspection, names), *_odd(metadata["odd"])]
    return [line for text in lines for line in _fitted(text)]


def _whole(whole: Mapping[str, Mapping[str, float | None]], names: Sequence[str]) -> list[str]:
    shown = {"first order": "first_order", "exact": "exact"}
    rows = []
    for label, key in shown.items():
        pairs = [(whole[name][key], whole[name][f"{key}_se"]) for name in names]
        cells = ["not measured" if value is None else with_error(value, error, "+.4f") for value, error in pairs]
        rows.append(_row(label, cells))
    return rows


def _groups(title: str, groups: Iterable[Group], names: Sequence[str]) -> list[str]:
    lines = [_row(title, ["share", *(_short(name) for name in names)], cell=11)]
    for one in groups:
        share = "–" if one.share is None else percent(one.share, 0)
        cells = [share, *(number(one.effects[name], "+.4f") for name in names)]
        lines.append(_row(f"{one.changed:,} of {one.n:,} {one.label}", cells, cell=11))
    return lines


def _units(inspection: AdapterInspection, names: Sequence[str]) -> list[str]:
    lines = []
    for title, value_H in (
        ("costliest units", cost_of(inspection)),
        ("most refusals gained", -inspection.effect("safety")),
    ):
        rows = named(inspection, value_H)
        if not rows:
            continue
        lines.append(_row(title, ["size", *(_short(name) for name in names)], cell=11))
        for row in rows:
            effects = [number(float(inspection.effect(name)[row]), "+.4f") for name in names]
            size = f"{inspection.column('norm')[row]:.3g}"
            lines.append(_row(f"  {inspection.units[row]}", [size, *effects], cell=11))
    return lines


def _map_lines(inspection: AdapterInspection) -> list[str]:
    found = ", ".join(f"{name} {number(value)}" for name, value in agreements(inspection).items())
    return [f"Spearman of C(h) with {found}"]


def _odd(odd: Sequence[Mapping[str, str]]) -> list[str]:
    if not odd:
        return ["no anomalies found"]
    return [f"{counted(len(odd), 'finding')}:", *(f"- {one['said']}" for one in odd)]


def _short(name: str) -> str:
    return LOSSES[name].split()[-1]


def _row(label: str, cells: Sequence[str], *, cell: int = _CELL) -> str:
    """A line of a table: a label and right-aligned cells."""
    label = label if len(label) <= WIDTH - cell * len(cells) else label[: WIDTH - cell * len(cells) - 1] + "…"
    return f"{label:<{WIDTH - cell * len(cells)}}" + "".join(f"{text:>{cell}}" for text in cells)


def _fitted(text: str) -> list[str]:
    """A text in lines that fit; what follows the first is indented."""
    if len(text) <= WIDTH:
        return [text.rstrip()]
    return textwrap.wrap(text, WIDTH, subsequent_indent="  ", break_on_hyphens=False)
