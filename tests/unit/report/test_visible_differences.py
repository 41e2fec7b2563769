"""What differences an evaluation could have shown: a row a measured change, and what is known of none."""

from __future__ import annotations

import math
import re

from fake_run import make_evaluation, make_suite

from castune.report.power import visible_differences
from castune.stats.estimates import PairedDifference
from castune.stats.power import pairs_needed, smallest_paired_difference


def change(value: float | None, error: float | None, n: int = 100) -> PairedDifference:
    return PairedDifference(value, error, n, 0, 1, 1, 0.5)


def cells(html: object) -> list[list[str]]:
    rows = re.findall(r"<tr>(.*?)</tr>", str(html), re.S)
    return [re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", row, re.S) for row in rows]


def test_the_smallest_visible_change_follows_from_the_measured_error() -> None:
    suites = [make_suite("safety", 0.5, 0.05, suite="harmful"), make_suite("nll", 1.5, 0.05, suite="solutions")]
    evaluations = {name: make_evaluation(name, suites) for name in ("base", "safe")}
    found = {"safe": {"harmful": change(0.2, 0.04), "solutions": change(0.01, 0.02)}}
    _, rate, nats = cells(visible_differences(evaluations, found))
    assert rate[:3] == ["safe", "harmful", "100"]
    assert rate[4] == f"{100 * smallest_paired_difference(0.04, 100):.1f} points"
    assert nats[4].startswith(f"{smallest_paired_difference(0.02, 100):.3f} nats")
    assert rate[5:] == [f"{pairs_needed(d, sd=0.4):,}" for d in (0.01, 0.05)]
    assert nats[5:] == [f"{pairs_needed(d, sd=0.2):,}" for d in (0.01, 0.05)]


def test_where_no_outcome_changed_three_might_have() -> None:
    suites = [make_suite("utility", 0.5, 0.05, suite="letters"), make_suite("nll", 1.5, 0.05, suite="solutions")]
    evaluations = {name: make_evaluation(name, suites) for name in ("base", "safe")}
    found = {"safe": {"letters": change(0.0, 0.0), "solutions": change(0.0, 0.0)}}
    _, rate, nats = cells(visible_differences(evaluations, found))
    assert rate[4] == f"{100 * smallest_paired_difference(math.sqrt(0.03) / 10, 100):.1f} points"
    assert nats[4:] == ["not measured"] * 3


def test_without_a_change_there_is_nothing_to_say() -> None:
    suites = [make_suite("safety", 0.5, 0.05, suite="harmful")]
    evaluations = {name: make_evaluation(name, suites) for name in ("base", "safe")}
    assert visible_differences(evaluations, {}) == ""
    assert visible_differences(evaluations, {"safe": {"harmful": change(None, None, 0)}}) == ""
    # One pair has no spread.
    _, one = cells(visible_differences(evaluations, {"safe": {"harmful": change(1.0, None, 1)}}))
    assert one[4] == "not measured"
