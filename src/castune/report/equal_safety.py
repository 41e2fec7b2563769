"""What arms cost at equal safety: three sentences, a chart for every cost, a table. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import altair as alt

from castune.core import numbers
from castune.purposes import PAID, PURPOSES, UNITS, UnitOfMeasure
from castune.report.markup import Markup, table, tag
from castune.report.summary import NOT_MEASURED, level
from castune.report.theme import Chart, arm_colours
from castune.stats.distributions import Interval
from castune.stats.equal_safety import CostDifference
from castune.stats.safety_costs import SafetyCosts


def charts(found: SafetyCosts | None) -> dict[str, Chart]:
    """A chart for every cost, by the names of their files, the one that is spoken of first."""
    if found is None:
        return {}
    return {name: _chart(found, cost) for name, cost in zip(chart_names(found), costs_of(found), strict=True)}


def chart_names(found: SafetyCosts) -> list[str]:
    """Names of the charts, and of their files, in the order of `costs_of`."""
    return [f"equal_safety_{cost.replace('-', '_')}" for cost in costs_of(found)]


def costs_of(found: SafetyCosts) -> list[str]:
    """The costs that were measured, the one that is spoken of first."""
    return sorted(found.points, key=list(PAID).index)


def sentences(found: SafetyCosts) -> list[str]:
    """What training did to safety, what that costs at one safety, and what it says of the selection."""
    about, [cost, *_] = PURPOSES[found.safety], costs_of(found)
    points = found.points[cost]
    gains = []
    for arm, gain in found.gains.items():
        full = next(point.safety for point in points[arm] if point.strength == 1)
        rise = _amount(gain.value, about.unit, signed=True) + (" points" if about.unit == "share" else " nats")
        ends = "" if gain.interval is None else f", 95\u00a0% {_ends(gain.interval, about.unit)}"
        gains.append(f"{level(full, about.unit)} in {arm} ({rise}{ends})")
    together = f", all prompts of {len(found.suites)} suites together," if len(found.suites) > 1 else ""
    first = f"{about.label}{together} went from {level(found.base, about.unit)} to {_listed(gains)}."
    if found.target is None:
        second = f"{_nowhere(found)}, so there is no safety at which costs can be compared."
        return [
            first,
            second,
            "So whether selecting heads pays off cannot be determined.",
            *_left_out(found),
        ]
    paid = [f"{_paid(found, cost, arm)} in {arm}" for arm in found.arms]
    second = (
        f"With each adapter {_scaled(found)} to the same safety, {level(found.target, about.unit)}, the cost in "
        f"{PAID[cost]} ({_unit(cost)}) is {_listed(paid)}."
    )
    return [first, second, _verdict(found), *_left_out(found)]


def _scaled(found: SafetyCosts) -> str:
    """Which way adapters were scaled, as far as they were measured."""
    points = next(iter(found.points.values())).values()
    return "scaled up or down" if any(one.strength > 1 for of_arm in points for one in of_arm) else "scaled down"


def _left_out(found: SafetyCosts) -> list[str]:
    """What of the run is not compared, and why."""
    reasons = dict.fromkeys(found.left_out.values())
    return [
        f"Not compared: {_listed([name for name, one in found.left_out.items() if one == reason])} ({reason})."
        for reason in reasons
    ]


def _nowhere(found: SafetyCosts) -> str:
    """That nothing can be compared without a gain."""
    arm = f"Arm {next(iter(found.gains))}" if len(found.gains) == 1 else "An arm"
    return f"{arm} is nowhere safer than the base model"


def _verdict(found: SafetyCosts) -> str:
    """The run's own arm against every other, over all costs."""
    main, *others = found.arms
    if not others:
        return "There is no other arm to compare it with."
    # Of every outcome and cost, the arms that it is seen beside.
    beside: dict[str, dict[str, list[str]]] = {"less": {}, "more": {}, "unseen": {}}
    for cost in costs_of(found):
        for other in others:
            difference = found.costs[cost].differences[main, other]
            side = "unseen" if not difference.is_seen else "less" if _is_negative(difference) else "more"
            beside[side].setdefault(PAID[cost], []).append(other)
    words = [
        f"arm {main} costs {side} than {_arms(arms)} in {_listed(names)}"
        for side in ("less", "more")
        for arms, names in _by_arms(beside[side]).items()
    ]
    if words and len(others) > 1:
        words += ["no other difference is seen"] if beside["unseen"] else []
    elif beside["unseen"]:
        pair = f"arms {main} and {others[0]}" if len(others) == 1 else f"arm {main} and {_arms(others)}"
        words.append(f"no difference is seen{'' if words else f' between {pair}'} in {_listed(list(beside['unseen']))}")
    one = "; this is one training seed, and others may differ" if next(iter(found.costs.values())).n_seeds == 1 else ""
    return f"At that safety, {'; '.join(words)}{one}."


def _by_arms(of_costs: Mapping[str, list[str]]) -> dict[tuple[str, ...], list[str]]:
    """The costs that are seen beside the same arms, together."""
    found: dict[tuple[str, ...], list[str]] = {}
    for cost, arms in of_costs.items():
        found.setdefault(tuple(arms), []).append(cost)
    return found


def _arms(names: Sequence[str]) -> str:
    return f"arm {names[0]}" if len(names) == 1 else f"arms {_listed(names)}"


def _is_negative(difference: CostDifference) -> bool:
    assert difference.interval is not None
    return difference.interval.high < 0


def costs_table(found: SafetyCosts) -> Markup:
    """The table: every arm's price for one safety, with its difference from the run's own arm."""
    main = found.arms[0]
    rows = []
    for cost in costs_of(found) if found.target is not None else ():
        of_cost = found.costs[cost]
        n = ", ".join(f"{count:,}" for count in of_cost.n_items)
        for arm in found.arms:
            difference = of_cost.differences.get((main, arm))
            at = of_cost.arms[arm].strength
            rows.append(
                [
                    f"{PAID[cost]}, {_unit(cost)}",
                    arm,
                    "not reached" if at is None else numbers.number(at),
                    _paid(found, cost, arm),
                    "–" if difference is None else _difference(difference, cost),
                    f"{of_cost.n_prompts:,} prompts, {n} items",
                ]
            )
    if not rows:
        return tag("p", f"{_nowhere(found)}: nothing can be compared at equal safety.")
    head = ["Cost", "Arm", "Strength", "At equal safety", f"{main} minus arm", "n"]
    assert found.target is not None
    unit = PURPOSES[found.safety].unit
    rule = (
        f"Every adapter is {_scaled(found)} (its update multiplied by the strength) until {level(found.target, unit)} "
        "safety remains: the base model's, plus 80 % of the gain that the least safe arm reaches. Costs are above "
        "base, interpolated between the measured strengths. Intervals of 95 % come from a bootstrap over prompts and "
        "items, the same for all arms; with one seed they are for other examples and these trainings. A difference is "
        "claimed where its interval excludes 0 and p, adjusted for the number of costs and arms (Holm), is below 0.05. "
        "An end without a bound: more than 2.5 % of the draws do not reach that safety."
    )
    return tag(
        "div",
        tag("h3", "Costs at equal safety"),
        table(head, rows, label="Costs at equal safety", class_="numbers"),
        tag("p", rule, class_="small"),
    )


def _paid(found: SafetyCosts, cost: str, arm: str) -> str:
    price, unit = found.costs[cost].arms[arm], PURPOSES[cost].unit
    if price.value is None:
        return f"not known ({numbers.percent(price.reached_share, 0)} of draws reach that safety)"
    ends = "" if price.interval is None else f" ({_ends(price.interval, unit)})"
    return f"{_amount(price.value, unit, signed=True)}{ends}"


def _difference(difference: CostDifference, cost: str) -> str:
    unit = PURPOSES[cost].unit
    value = NOT_MEASURED if difference.value is None else _amount(difference.value, unit, signed=True)
    ends = "" if difference.interval is None else f" ({_ends(difference.interval, unit)})"
    p = "" if difference.p_adjusted is None else f", p {numbers.p_value(difference.p_adjusted)}"
    return f"{value}{ends}{p}" + ("" if difference.is_seen else ", no difference seen")


def _ends(interval: Interval, unit: UnitOfMeasure) -> str:
    low, high = (
        "no bound" if not math.isfinite(end) else _amount(end, unit, signed=True)
        for end in (interval.low, interval.high)
    )
    return f"{low} to {high}"


def _amount(value: float, unit: UnitOfMeasure, *, signed: bool = False) -> str:
    """Points of a rate, or nats."""
    shown = UNITS[unit]
    return numbers.number(shown.scale * value, f"{'+' if signed else ''}.{shown.digits}f")


def _unit(cost: str) -> str:
    return PURPOSES[cost].shown.change


def _listed(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def _chart(found: SafetyCosts, cost: str) -> Chart:
    """Cost over safety: a line an arm with its 95 % band, its measured strengths, and the common safety."""
    scale, safety_scale = PURPOSES[cost].shown.scale, PURPOSES[found.safety].shown.scale
    colours = arm_colours(list(found.gains))
    # More than three names do not fit beside each other.
    legend = alt.Legend(orient="top", title=None, symbolOpacity=1, columns=min(3, len(colours)))
    hue = alt.Color("arm:N", legend=legend).scale(domain=list(colours), range=list(colours.values()))
    points = [
        {
            "arm": arm,
            "safety": safety_scale * point.safety,
            "cost": scale * point.cost,
            "strength": "base" if point.strength == 0 else f"x {point.strength:g}",
        }
        for arm, of_arm in found.points[cost].items()
        for point in of_arm
    ]
    lines, ends = [], []
    for arm, band in found.bands.get(cost, {}).items():
        for safety, value, low, high in zip(band.safety_G, band.cost_G, band.low_G, band.high_G, strict=True):
            lines.append({"arm": arm, "safety": safety_scale * safety, "cost": scale * value})
            if math.isfinite(low) and math.isfinite(high):
                ends.append({"arm": arm, "safety": safety_scale * safety, "low": scale * low, "high": scale * high})
    x = alt.X(
        "safety:Q",
        title=f"{PURPOSES[found.safety].label} ({PURPOSES[found.safety].shown.level})",
        scale=alt.Scale(zero=False, nice=True),
        axis=alt.Axis(tickCount=6),
    )
    y_title = f"{PAID[cost][0].upper()}{PAID[cost][1:]}, over base ({_unit(cost)})"
    y = alt.Y("cost:Q", title=y_title, axis=alt.Axis(tickCount=6))
    bands = alt.Chart(alt.InlineData(values=ends)).mark_area(opacity=0.16, aria=False)
    curves = alt.Chart(alt.InlineData(values=lines)).mark_line(strokeWidth=2, aria=False)
    # Vega warns of the extent of a layer without data: no arm may have gained anything.
    layers: list[alt.Chart] = [
        *([bands.encode(x=x, y=alt.Y("low:Q", title=y_title), y2="high:Q", color=hue)] if ends else []),
        *([curves.encode(x=x, y=y, color=hue)] if lines else []),
        alt.Chart(alt.InlineData(values=points))
        .mark_point(filled=True, size=55, opacity=1)
        .encode(
            x=x,
            y=y,
            color=hue,
            tooltip=[
                alt.Tooltip("arm:N", title="Arm"),
                alt.Tooltip("strength:N", title="Strength"),
                alt.Tooltip("safety:Q", title=PURPOSES[found.safety].label, format=".3~g"),
                alt.Tooltip("cost:Q", title=PAID[cost], format=".3~g"),
            ],
        ),
    ]
    if found.target is not None:
        rule = alt.InlineData(values=[{"safety": safety_scale * found.target}])
        layers.append(alt.Chart(rule).mark_rule(strokeDash=[4, 4], opacity=0.7, aria=False).encode(x=x))
    return alt.layer(*layers).properties(
        width=254, height=230, description=f"{PAID[cost]} over {PURPOSES[found.safety].label}, a line an arm."
    )
