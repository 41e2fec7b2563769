"""Comparisons of arms that have one suite, from outcomes in one order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from castune.stats import comparisons
from castune.stats.comparisons import Comparison, Outcomes


def compare(first: Mapping[int, Sequence[Any]], second: Mapping[int, Sequence[Any]]) -> Comparison:
    """`castune.stats.comparisons.compare` of arms `{seed: outcomes}`."""
    return comparisons.compare(_suite(first), _suite(second))


def _suite(arm: Mapping[int, Sequence[Any]]) -> Outcomes:
    return {seed: {"suite": {f"{n:05d}": value for n, value in enumerate(row)}} for seed, row in arm.items()}
