"""What differences an evaluation to come can show, from the numbers of its examples alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from castune.evaluation.suites import Suite
from castune.stats.power import pairs_needed, sd_of_changes, smallest_paired_difference

CHANGED = (0.1, 0.3)
"""Shares of examples whose outcome a training is thought to change: a light one, and one that teaches refusals."""
GIVEN = 0.02
"""A difference that examples are counted for, as a share."""


@dataclass(frozen=True)
class VisibleDifference:
    """What the examples of a suite show.

    Attributes:
        suite: its name.
        n: its examples.
        smallest: smallest visible difference of two models, as a share, for each of `CHANGED`.
        needed: examples that would show `GIVEN`, for each of `CHANGED`.
    """

    suite: str
    n: int
    smallest: tuple[float, ...]
    needed: tuple[int, ...]


def visible_differences(suites: Sequence[Suite]) -> list[VisibleDifference]:
    """Of suites whose examples are right or wrong, with a power of 80 % at 5 %, paired by example.

    How far numbers in nats spread is unknown before a run: its report says what they show.
    """
    found = []
    for suite in suites:
        n = len(suite.examples)
        if suite.about.is_continuous or n < 2:
            continue
        spreads = [sd_of_changes(share) for share in CHANGED]
        needed = [pairs_needed(GIVEN, sd=sd) for sd in spreads]
        smallest = tuple(min(1.0, smallest_paired_difference(sd / math.sqrt(n), n)) for sd in spreads)
        found.append(VisibleDifference(suite.name, n, smallest, tuple(one for one in needed if one is not None)))
    return found
