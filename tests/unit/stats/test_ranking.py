"""Ranks, ties and buckets from their definitions."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from castune.stats.ranking import bucket_numbers, by_descending, equal_parts, percentile_rank, tie_share

# Few distinct values (ties), and any finite float.
VALUES = st.one_of(
    st.lists(st.integers(-3, 3).map(float), min_size=1, max_size=40),
    st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=1, max_size=40),
)


@given(VALUES)
def test_ranks_count_the_values_below_and_half_of_the_equal_ones(values: list[float]) -> None:
    n = len(values)
    expected = [
        (sum(o < v for o in values) + (sum(o == v for o in values) - 1) / 2) / (n - 1) if n > 1 else 0.5 for v in values
    ]
    found = percentile_rank(np.array(values))
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)
    assert found.min() >= 0
    assert found.max() <= 1
    assert found.mean() == pytest.approx(0.5)


@given(st.lists(st.integers(-1000, 1000).map(float), min_size=2, max_size=40), st.sampled_from([1e-15, 3.0, 1e15]))
def test_ranks_see_order_only(values: list[float], scale: float) -> None:
    ranks = percentile_rank(np.array(values))
    np.testing.assert_array_equal(percentile_rank(np.array(values) * scale), ranks)
    np.testing.assert_allclose(percentile_rank(-np.array(values)), 1 - ranks, rtol=0, atol=1e-12)


def test_pinned_ranks() -> None:
    np.testing.assert_array_equal(percentile_rank(np.array([3.0, 1.0, 1.0, 7.0, 1.0])), [0.75, 0.25, 0.25, 1.0, 0.25])
    np.testing.assert_array_equal(percentile_rank(np.array([2.0])), [0.5])
    np.testing.assert_array_equal(percentile_rank(np.array([0.0, -0.0])), [0.5, 0.5])


@given(st.integers(1, 30), st.integers(1, 6), st.integers(0, 10**6))
def test_rows_are_ranked_and_cut_each_for_itself(n: int, n_rows: int, seed: int) -> None:
    rows = np.random.default_rng(seed).integers(-3, 4, (n_rows, n)).astype(float)
    np.testing.assert_array_equal(percentile_rank(rows), [percentile_rank(row) for row in rows])
    np.testing.assert_array_equal(bucket_numbers(rows, 4), [bucket_numbers(row, 4) for row in rows])
    assert percentile_rank(rows.reshape(1, n_rows, n)).shape == (1, n_rows, n)


@given(VALUES)
def test_tie_share_counts_heads_with_a_twin(values: list[float]) -> None:
    expected = sum(values.count(v) > 1 for v in values) / len(values)
    assert tie_share(np.array(values)) == pytest.approx(expected)


@given(st.integers(0, 50), st.integers(1, 12))
def test_parts_are_equal_up_to_one_larger_first(n: int, parts: int) -> None:
    found = equal_parts(list(range(n)), parts)
    assert [x for part in found for x in part] == list(range(n))
    sizes = [len(part) for part in found]
    assert len(sizes) == parts
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] - sizes[-1] <= 1


@given(VALUES, st.integers(1, 9))
def test_buckets_are_equal_and_ordered(values: list[float], buckets: int) -> None:
    numbers = bucket_numbers(np.array(values), buckets)
    n = len(values)
    sizes = [int((numbers == b).sum()) for b in range(1, buckets + 1)]
    assert sum(sizes) == n
    assert all(size in (math.floor(n / buckets), math.ceil(n / buckets)) for size in sizes)
    for i in range(n):
        for j in range(n):
            if values[i] > values[j] or (values[i] == values[j] and i < j):
                assert numbers[i] <= numbers[j]


def test_pinned_buckets() -> None:
    """Four, as in the paper, where no number is given; as the numbers that the map's column holds."""
    numbers = bucket_numbers(np.array([0.1, 0.9, 0.5, 0.7, 0.3]))
    np.testing.assert_array_equal(numbers, [4, 1, 2, 1, 3])
    assert numbers.dtype == np.int32


@given(VALUES)
def test_descending_order_is_stable(values: list[float]) -> None:
    order = by_descending(list(range(len(values))), np.array(values))
    assert order == sorted(range(len(values)), key=lambda i: (-values[i], i))
