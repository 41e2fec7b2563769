"""What differences an evaluation could have shown, and how many examples would show a given one."""

from __future__ import annotations

import math
from collections.abc import Mapping

from castune.artifacts import EvalResult
from castune.purposes import PURPOSES, Unit
from castune.report.markup import Markup, table, tag
from castune.report.summary import BASE, NOT_MEASURED, Differences, in_unit
from castune.stats.estimates import PairedDifference
from castune.stats.power import pairs_needed, sd_of_changes, smallest_paired_difference

# Differences that examples are counted for: points over a hundred, or nats.
_GIVEN = (0.01, 0.05)
# With 95 % confidence no more than so many of n pairs would change, where none of n did.
_UNSEEN_PAIRS = 3


def visible_differences(evaluations: Mapping[str, EvalResult], differences: Differences) -> Markup | str:
    """Of every arm and suite: the smallest change from base that so many examples show; nothing without changes."""
    rows = []
    for arm, evaluation in evaluations.items():
        for suite in evaluation.suites if arm != BASE else ():
            change = differences.get(arm, {}).get(suite.suite)
            if change is not None and change.value is not None:
                purpose = PURPOSES[suite.purpose]
                rows.append([arm, suite.suite, f"{change.n:,}", in_unit(change, purpose.unit, change=True)])
                rows[-1] += [_smallest(change, purpose.shown, is_share=purpose.unit == "share")]
                rows[-1] += [_needed(change, value, is_share=purpose.unit == "share") for value in _GIVEN]
    if not rows:
        return ""
    rule = (
        "The smallest true change from base that a test at 5 % finds in 80 of 100 cases, by the spread that was "
        "measured, and the pairs of examples that would show a given one. A smaller change may be there and not be "
        "seen. It is about these trained models: another seed changes results too, which only several seeds show "
        "(castune study). Where nothing changed, it is assumed that three examples could have."
    )
    columns = [
        "Arm",
        "Suite",
        "Pairs",
        "Change",
        "Smallest visible change",
        "Pairs for 1 point or 0.01 nats",
        "Pairs for 5 points or 0.05 nats",
    ]
    content = table(columns, rows, label="What differences could have been seen", class_="numbers")
    return tag(
        "details", tag("summary", "What differences could have been seen"), content, tag("p", rule, class_="small")
    )


def _sd(change: PairedDifference, *, is_share: bool) -> float | None:
    """Standard deviation of single pairs; None where it is unknown."""
    if change.standard_error:
        return change.standard_error * math.sqrt(change.n)
    return sd_of_changes(min(1.0, _UNSEEN_PAIRS / change.n)) if is_share else None


def _smallest(change: PairedDifference, unit: Unit, *, is_share: bool) -> str:
    sd = _sd(change, is_share=is_share)
    if sd is None or change.n < 2:
        return NOT_MEASURED
    smallest = smallest_paired_difference(sd / math.sqrt(change.n), change.n)
    return f"{unit.scale * smallest:.{unit.digits}f} {unit.change}"


def _needed(change: PairedDifference, difference: float, *, is_share: bool) -> str:
    sd = _sd(change, is_share=is_share)
    needed = None if sd is None else pairs_needed(difference, sd=sd)
    return NOT_MEASURED if needed is None else f"{needed:,}"
