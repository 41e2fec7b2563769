"""Ranks, ties, order and equal buckets of head scores. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
T = TypeVar("T")


def percentile_rank(values: Floats) -> Floats:
    """Ranks scaled to [0, 1]; ties share the average of their ranks. A single value has rank 0.5."""
    if len(values) == 1:
        return np.array([0.5])
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    first = np.cumsum(counts) - counts
    return (first + (counts - 1) / 2)[inverse] / (len(values) - 1)


def tie_share(values: Floats) -> float:
    """Share of heads whose value equals that of at least one other head."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return float(np.mean(counts[inverse] > 1))


def by_descending(items: Sequence[T], scores: Floats) -> list[T]:
    """Items sorted by score, highest first; equal scores keep their order."""
    return [items[i] for i in np.argsort(-scores, kind="stable")]


def equal_parts(items: Sequence[T], parts: int) -> list[list[T]]:
    """Contiguous parts whose sizes differ by at most one, larger parts first."""
    return [[items[i] for i in part] for part in np.array_split(np.arange(len(items)), parts)]


def bucket_numbers(scores: Floats, buckets: int = 4) -> NDArray[np.int32]:
    """Bucket of every head: 1 (highest scores) to `buckets`, sizes equal up to one (Section 3.5)."""
    numbers = np.empty(len(scores), dtype=np.int32)
    order = by_descending(range(len(scores)), scores)
    for number, part in enumerate(equal_parts(order, buckets), start=1):
        numbers[part] = number
    return numbers
