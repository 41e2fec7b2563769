"""An adapter over its strength, as the command line tells it: tables of 80 columns, sentences on a target. Pure."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence

from castune.core import numbers
from castune.purposes import PURPOSES, UNITS, UnitOfMeasure
from castune.report.summary import level
from castune.stats.dial import Level, Reached, StrengthCurves
from castune.stats.distributions import Interval

_WIDTH = 80
_HEAD = 14
_TITLES: dict[UnitOfMeasure, str] = {"share": "Rates in %", "nats": "Nats per token"}
_SHORT: dict[UnitOfMeasure, str] = {"share": "%", "nats": "nats"}


def curve_tables(curves: StrengthCurves) -> list[str]:
    """Rates and means in nats at every strength, a table each; below a value the interval of its change."""
    tables = []
    for unit, title in _TITLES.items():
        names = [name for name in curves.measures if PURPOSES[name].unit == unit]
        if not names:
            continue
        heads = ["Strength", *(textwrap.fill(PURPOSES[name].label, _HEAD) for name in names)]
        of_measures = [curves.levels(name) for name in names]
        rows = [
            [_strength(strength), *(_cell(of_measure[place], unit) for of_measure in of_measures)]
            for place, strength in enumerate(curves.strengths_J)
        ]
        rows.append(["Examples", *(f"{curves.measures[name].n:,}" for name in names)])
        unscored = [curves.measures[name].unscored for name in names]
        if any(unscored):
            rows.append(["Left out", *(f"{n:,}" for n in unscored)])
        table = _table(heads, rows)
        if max(map(len, table.splitlines())) > _WIDTH:  # changes of ten nats and more
            table = _table(heads, [[cell.replace(" to ", " to\n") for cell in row] for row in rows])
        tables.append(f"{title}\n{table}")
    return tables


def rule() -> str:
    """How the tables are to be read."""
    return filled(
        "Below each value: the 95 % interval of its change from the base model, in the same unit, paired by example; "
        "left out are examples that were not scored at every strength."
    )


def filled(text: str) -> str:
    """Text in lines that fit beside the tables; options and names are not broken."""
    return textwrap.fill(text, _WIDTH, break_on_hyphens=False, break_long_words=False)


def level_table(strength: float, levels: Mapping[str, Level], unknown: Sequence[str] = ()) -> str:
    """Every measure at one strength, and its change from the base model with a 95 % interval; then those not known."""
    rows = []
    for name, one in levels.items():
        unit = PURPOSES[name].unit
        change = _amount(one.change.value, unit, signed=True)
        ends = "" if one.change.interval is None else f" ({_ends(one.change.interval, unit, signed=True)})"
        rows.append([f"{PURPOSES[name].label}, {_SHORT[unit]}", _amount(one.mean.value, unit), f"{change}{ends}"])
    rows += [[f"{PURPOSES[name].label}, {_SHORT[PURPOSES[name].unit]}", "not known", ""] for name in unknown]
    return _table([f"At strength {strength:g}", "value", "change from base (95 %)"], rows)


def target_sentences(reached: Reached, strength: float | None, *, goal: bool) -> list[str]:
    """Where the target is reached, or that it is not.

    Args:
        reached: what was found.
        strength: the one to take; None where there is none.
        goal: whether the target is better than the base model, so that it is to be reached; else it is a limit.
    """
    about = PURPOSES[reached.measure]
    wanted = level(reached.target, about.unit)
    side = "above" if about.higher_is_better else "below"
    if reached.strength is None:
        at, value = reached.extreme
        if not goal:
            but = f" but {', '.join(map(_strength, reached.left_out))}" if reached.left_out else ""
            return [
                f"{about.label}: at or {side} {wanted} at every measured strength{but}, so any of them keeps this "
                "limit."
            ]
        most = f"the closest is {level(value, about.unit)}, " + (
            "the base model itself" if at == 0 else f"at strength {at:g}"
        )
        share = numbers.percent(reached.reached_share, 0)
        return [
            f"{about.label}: no measured strength reaches {wanted}; {most}. {share} of the resamples of the prompts "
            "reach it.",
            "Measure higher strengths (--strengths, up to 2), aim lower, or train longer.",
        ]
    if strength is None:
        return [f"{about.label}: the base model is at {wanted} already, so no adapter is needed for it."]
    assert reached.between is not None
    what = f"reaches {wanted} at" if goal else f"stays at or {side} {wanted} up to"
    found = [f"{about.label}: {what} strength {strength:g}{_interval_of(reached)}."]
    if not any(math.isclose(strength, one, abs_tol=1e-6) for one in reached.between):
        low, high = reached.between
        found.append(
            f"It lies between the measured {_strength(low)} and {_strength(high)}, where values are interpolated; "
            f"--strengths {strength:g} measures it."
        )
    return found


def caution(reached: Reached, at: Level, n: int) -> str:
    """What a strength that was chosen on the same prompts is worth."""
    unit = PURPOSES[reached.measure].unit
    ends = ""
    if at.mean.interval is not None:
        low, high = (level(end, unit) for end in at.mean.interval)
        ends = f" Other examples of the same kind would give {low} to {high} at this strength (95 %)."
    return (
        f"The strength was chosen on the same {n:,} examples on which it is measured here, so this is no independent "
        f"test of it.{ends} Evaluate it on others before you rely on it."
    )


def _interval_of(reached: Reached) -> str:
    if reached.interval is None:
        return ""
    low, high = reached.interval
    if math.isfinite(high):
        return f" (95 % interval {numbers.span(low, high)})"
    missing = numbers.percent(1 - reached.reached_share, 0)
    start = numbers.number(low) if math.isfinite(low) else "no bound"
    return f" (95 % interval {start} to no bound: {missing} of the resamples never reach it)"


def _strength(strength: float) -> str:
    return "base" if strength == 0 else f"{strength:g}"


def _cell(one: Level | None, unit: UnitOfMeasure) -> str:
    """The value, and the interval of its change on a second line."""
    if one is None:
        return "left out"
    ends = one.change.interval
    return _amount(one.mean.value, unit) + ("" if ends is None else f"\n{_ends(ends, unit, signed=True)}")


def _ends(interval: Interval, unit: UnitOfMeasure, *, signed: bool) -> str:
    return " to ".join(_amount(end, unit, signed=signed) for end in interval)


def _amount(value: float, unit: UnitOfMeasure, *, signed: bool = False) -> str:
    shown = UNITS[unit]
    return numbers.number(shown.scale * value, f"{'+' if signed else ''}.{shown.digits}f")


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns of plain text, a line under the heads; cells may have several lines. The first is set left."""
    cells = [[cell.split("\n") for cell in row] for row in (heads, *rows)]
    widths = [max(len(line) for row in cells for line in row[column]) for column in range(len(heads))]
    lines = []
    for number, row in enumerate(cells):
        for at in range(max(map(len, row))):
            parts = [cell[at] if at < len(cell) else "" for cell in row]
            first, *others = (part.rjust(width) for part, width in zip(parts, widths, strict=True))
            lines.append("  ".join([parts[0].ljust(len(first)), *others]).rstrip())
        if number == 0:
            lines.append("  ".join("-" * width for width in widths))
    return "\n".join(lines)
