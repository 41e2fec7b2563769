"""Colours and type of the charts, the same on the page and in figure files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeAlias

import altair as alt

from castune.report.summary import BASE

# What Altair draws, and charts by their names.
Chart: TypeAlias = alt.TopLevelMixin
Charts: TypeAlias = Mapping[str, Chart]

NEUTRAL = "#808080"
_ZONES = {BASE: NEUTRAL, "safe": "#2f7ec2", "risky": "#d1502f", "random": "#b08a2e", "all": "#8465b3"}
_MORE = ("#3f9c78", "#bf5f96", "#6f8f2f", "#4a9fb0", "#9a6a4f")
# ColorBrewer's RdYlBu, the scale of the paper's Figure 7, from low to high; told apart with any colour vision.
LOW_TO_HIGH = (
    *("#313695", "#4575b4", "#74add1", "#abd9e9", "#e0f3f8", "#ffffbf"),
    *("#fee090", "#fdae61", "#f46d43", "#d73027", "#a50026"),
)
_RISKY_TO_SAFE = ("#d1502f", "#eaa35e", "#8fbad6", "#2f7ec2")


def theme(ink: str, font: str) -> dict[str, object]:
    """Vega-Lite configuration with one colour for text and lines (`currentColor` follows the page)."""
    colours = {"labelColor": ink, "titleColor": ink}
    guide = {**colours, "titleFontWeight": "normal", "labelFontSize": 11, "titleFontSize": 12}
    return {
        "background": None,
        "font": font,
        "view": {"stroke": None},
        "axis": {**guide, "domainColor": ink, "tickColor": ink, "gridColor": ink, "gridOpacity": 0.12},
        "axisX": {"titlePadding": 8},
        "legend": guide,
        "header": guide,
        "title": {"color": ink, "fontSize": 13, "fontWeight": 600, "anchor": "start", "offset": 10},
        "text": {"color": ink, "fontSize": 12},
        "rule": {"color": ink},
    }


def arm_colours(arms: Sequence[str]) -> dict[str, str]:
    """A colour an arm; the zones of the paper keep theirs everywhere."""
    others = [arm for arm in arms if arm not in _ZONES]
    more = {arm: _MORE[i % len(_MORE)] for i, arm in enumerate(others)}
    return {arm: _ZONES.get(arm) or more[arm] for arm in arms}


def bucket_colours(count: int) -> list[str]:
    """Colours of buckets 1 (highest conflict) to `count`."""
    last = len(_RISKY_TO_SAFE) - 1
    return [_RISKY_TO_SAFE[round(i * last / max(1, count - 1))] for i in range(count)]
