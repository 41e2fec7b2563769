"""Ranks, ties, order and equal buckets of head scores. Pure."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
T = TypeVar("T")
# At most this many orders are enumerated (7! = 5,040); beyond, as many are drawn at random.
_ORDERS = 10_000


def percentile_rank(values: Floats) -> Floats:
    """Ranks along the last axis, scaled to [0, 1]; ties share their average rank. A single value has rank 0.5."""
    # The same bits as by `scipy.stats.rankdata`, without the second that its import takes at every diagnosis.
    n = values.shape[-1]
    if n == 1:
        return np.full(values.shape, 0.5)
    order = np.argsort(values, axis=-1, kind="stable")
    ascending = np.take_along_axis(values, order, axis=-1)
    place = np.broadcast_to(np.arange(n), values.shape)
    differs = np.ones(values.shape, dtype=bool)
    differs[..., 1:] = ascending[..., 1:] != ascending[..., :-1]
    first = np.maximum.accumulate(np.where(differs, place, 0), axis=-1)
    ends = np.ones(values.shape, dtype=bool)
    ends[..., :-1] = differs[..., 1:]
    last = np.minimum.accumulate(np.where(ends, place, n)[..., ::-1], axis=-1)[..., ::-1]
    ranks = np.empty(values.shape)
    np.put_along_axis(ranks, order, (first + last) / 2 / (n - 1), axis=-1)
    return ranks


def orders(n: int, seed: int) -> NDArray[np.int64]:
    """Orders [P, n] of n things, as they are first: all up to n = 7, else 10,000 at random."""
    if math.factorial(n) <= _ORDERS:
        return np.array(list(itertools.permutations(range(n))))
    rng = np.random.default_rng(seed)
    return np.array([np.arange(n), *(rng.permutation(n) for _ in range(_ORDERS - 1))])


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
    """Buckets along the last axis: 1 (highest scores) to `buckets`, sizes equal up to one (Section 3.5)."""
    numbers = np.empty(scores.shape, dtype=np.int32)
    order = np.argsort(-scores, axis=-1, kind="stable")
    sizes = map(len, np.array_split(np.arange(scores.shape[-1]), buckets))
    in_order = np.repeat(np.arange(1, buckets + 1, dtype=np.int32), list(sizes))
    np.put_along_axis(numbers, order, np.broadcast_to(in_order, scores.shape), axis=-1)
    return numbers
