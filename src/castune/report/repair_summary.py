"""What a repair tried and took, in lines. Pure."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence

from castune.artifacts.repair_result import RepairResult, Tried
from castune.core.numbers import percent, span, with_error
from castune.purposes import PURPOSES

WIDTH = 80
# What a cost is called, above that of the base model.
LABELS = {
    "nll": "NLL added",
    "utility": "accuracy lost",
    "over-refusal-margin": "margin added",
    "over-refusal": "over-refusals",
    "kl": "KL added",
}


def summary(found: RepairResult) -> list[str]:
    """What was tried and taken, for the command line."""
    lines = [
        f"{found.adapter['name']}: candidates chosen by {', '.join(found.suites)}; base model refuses "
        f"{percent(found.base_safety)} of harmful prompts",
        "",
        *_table(found.tried, found.cost),
        *_too_few(found.tried),
        "",
        _legend(found.tried, found.cost, found.judge),
        "",
        f"{'selected' if found.chosen else 'nothing selected'}: {found.reason}",
    ]
    if found.chosen:
        lines += [f"compared with it: {verdict(found.tried, found.chosen, found.cost)}"]
        lines += _before_and_after(found.tried, found.chosen)
    if found.confirmed and found.chosen:
        lines += ["", f"confirmed on {', '.join(found.confirmed_on)}, which played no part in the choice:"]
        lines += [*_table(found.confirmed, found.cost), *_too_few(found.confirmed), ""]
        lines += [_legend(found.confirmed, found.cost, found.judge), ""]
        lines += [verdict(found.confirmed, found.chosen, found.cost)]
        lines += _before_and_after(found.confirmed, found.chosen)
    elif found.chosen:
        lines.append(
            "note: it was chosen on these suites, so their numbers flatter it; measure it on other prompts (--confirm)"
        )
    return [line for text in lines for line in _fitted(text)]


def verdict(rows: Sequence[Tried], chosen: str, cost: str) -> str:
    """What was taken beside what it is compared with, by their plain values, in a sentence."""
    one = next(row for row in rows if row.name == chosen)
    if one.too_few:
        return f"nothing can be said of {one.name}, of which too few examples are scored"
    peers = [row for row in rows if row.kind not in ("source", "effects") and not row.too_few]
    better, phrase = [row for row in peers if _is_better(row, one, cost)], PURPOSES[cost].phrase
    if not better:
        return f"none of {len(peers)} alternatives keeps as much safety at no higher cost ({phrase})"
    said = f"these keep as much safety at no higher cost ({phrase}): {', '.join(row.name for row in better)}"
    n_random, n_better = (sum(row.kind == "random" for row in some) for some in (peers, better))
    chance = "; here the order by effects is no better than chance" if 2 * n_better >= n_random > 0 else ""
    return said + chance


def _is_better(row: Tried, one: Tried, cost: str) -> bool:
    if row.kept is None or one.kept is None or cost not in row.costs or cost not in one.costs:
        return False
    return row.kept >= one.kept and row.costs[cost][0] <= one.costs[cost][0]


def _table(rows: Sequence[Tried], cost: str) -> Iterator[str]:
    yield _row("", ["refusals", "gain kept", LABELS[cost], "saved"])
    for row in rows:
        low, high = row.kept_interval or (None, None)
        ends = "" if low is None or high is None else f" ({span(100 * low, 100 * high, '.0f')})"
        kept = "–" if row.kept is None else f"{percent(row.kept, 0)}{ends}"
        kept = "too few scored" if row.too_few else kept
        saved = "" if row.saved is None else _shown(row.saved, cost)
        yield _row(row.name, ["–" if row.safety is None else percent(row.safety), kept, _cost(row, cost), saved])


def _too_few(rows: Sequence[Tried]) -> Iterator[str]:
    """Why rows stand for nothing, a line each."""
    return (f"{row.name} cannot be chosen or compared: {row.too_few}" for row in rows if row.too_few)


def _legend(rows: Sequence[Tried], cost: str, judge: str) -> str:
    """What the numbers of a table are, and of how many examples."""
    unit = PURPOSES[cost].shown.change
    said = f"{LABELS[cost]} and saved: {unit} ± standard error, paired; gain kept: 95 % interval"
    if not all(row.n for row in rows):  # a record of before
        return said
    counts = [f"{_counts(rows, 'safety')} harmful prompts"]
    counts.append(f"{_counts(rows, cost)} for {LABELS[cost]}")
    return f"n = {', '.join(counts)}; {said}; judge {judge}"


def _counts(rows: Sequence[Tried], purpose: str) -> str:
    """How many examples were scored: they may differ from row to row."""
    least, most = (end(row.n.get(purpose, 0) for row in rows) for end in (min, max))
    return str(most) if least == most else f"{least} to {most}"


def _before_and_after(rows: Sequence[Tried], chosen: str) -> Iterator[str]:
    """All costs of the adapter as it is, and of what was taken."""
    before, after = rows[0], next(row for row in rows if row.name == chosen)
    for purpose in before.costs:
        yield f"{LABELS[purpose]}: {_cost(before, purpose)} before, {_cost(after, purpose)} after"


def _cost(row: Tried, purpose: str) -> str:
    return "not measured" if purpose not in row.costs else _shown(row.costs[purpose], purpose)


def _shown(found: tuple[float, float | None], purpose: str) -> str:
    value, error = found
    unit = PURPOSES[purpose].shown
    return with_error(unit.scale * value, None if error is None else unit.scale * error, f"+.{unit.digits}f")


def _row(label: str, cells: Sequence[str]) -> str:
    widths = [9, 19, 18, 18]
    room = WIDTH - sum(widths[: len(cells)])
    shown = label if len(label) < room else f"{label[: room - 2]}…"
    return f"{shown:<{room}}" + "".join(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=False))


def _fitted(text: str) -> list[str]:
    if len(text) <= WIDTH:
        return [text.rstrip()]
    return textwrap.wrap(text, WIDTH, subsequent_indent="  ", break_on_hyphens=False)
