"""Points of a scatter chart, and where their names go, so that they cover neither points nor each other. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

# Pixels: a point's radius with some air, a letter's mean width at 12 px, a line's height.
_RADIUS, _LETTER, _LINE = 9, 6.6, 14
_PLACES = [("left", 1, -1), ("right", -1, -1), ("left", 1, 1), ("right", -1, 1)]

Box = tuple[float, float, float, float]


class Coordinate(NamedTuple):
    """Where a point is on an axis: the value, what lies to both sides of it, and both in words."""

    value: float
    error: float
    text: str


@dataclass
class ScatterPoint:
    """An arm as a chart has it; `align`, `dx` and `dy` place its name."""

    arm: str
    x: float
    x_low: float
    x_high: float
    x_text: str
    y: float
    y_low: float
    y_high: float
    y_text: str
    align: str = "left"
    dx: int = 0
    dy: int = 0

    @classmethod
    def of(cls, arm: str, x: Coordinate, y: Coordinate) -> ScatterPoint:
        """The point, its name not placed yet."""
        places = ((one.value, one.value - one.error, one.value + one.error, one.text) for one in (x, y))
        return cls(arm, *next(places), *next(places))


def place_labels(
    points: Sequence[ScatterPoint],
    x_range: Sequence[float],
    y_range: Sequence[float],
    width: int,
    height: int,
) -> None:
    """Give every point `align`, `dx` and `dy` for its label.

    Each point takes the free place nearest to it: right above, left above, right below, left below, then
    further away. Where none is free the first is taken.
    """
    pixels = [
        (
            (point.x - x_range[0]) / (x_range[1] - x_range[0]) * width,
            (1 - (point.y - y_range[0]) / (y_range[1] - y_range[0])) * height,
        )
        for point in points
    ]
    taken: list[Box] = [(x - _RADIUS, y - _RADIUS, x + _RADIUS, y + _RADIUS) for x, y in pixels]
    for point, (x, y) in zip(points, pixels, strict=True):
        options = []
        for distance in (12, 26, 40, 54):
            for align, right, down in _PLACES:
                start = x + right * 10
                text = _LETTER * len(point.arm)
                left = start if right > 0 else start - text
                middle = y + down * distance
                options.append(
                    (
                        (left, middle - _LINE / 2, left + text, middle + _LINE / 2),
                        align,
                        right,
                        down * distance,
                    )
                )
        inside = [option for option in options if option[0][0] >= 0 and option[0][2] <= width + 40]
        inside = [option for option in inside if option[0][1] >= -_LINE and option[0][3] <= height]
        free = [option for option in inside if not any(_overlap(option[0], box) for box in taken)]
        box, align, right, dy = (free or inside or options)[0]
        point.align, point.dx, point.dy = align, right * 10, dy
        taken.append(box)


def _overlap(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
