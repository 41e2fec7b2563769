"""Updates of weights: products that are never formed say what they would say, on hostile values too."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from castune.core.heads import HeadLayout
from castune.core.units import Part, UnitLayout
from castune.core.updates import Dense, Effects, LowRank, first_order_effects, size_of, spans_of, unit_size, with_error

SHAPES = [(12, 20, 3), (20, 12, 3), (5, 7, 16), (1, 9, 2), (9, 1, 1)]


def pair(shape: tuple[int, int, int], scale: float = 1.0, *, dependent: bool = False) -> tuple[LowRank, Tensor]:
    """An update of rank 3 or less, and the matrix it stands for, in float64."""
    m, n, r = shape
    generator = torch.Generator().manual_seed(m * n + r)
    left, right = (torch.randn(*size, generator=generator, dtype=torch.float64) for size in ((m, r), (r, n)))
    if dependent:
        right[-1] = right[0]
    return LowRank(left * scale, right, -0.5), -0.5 * scale * left @ right


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("scale", [1.0, 1e15, 1e-15])
@pytest.mark.parametrize("dependent", [False, True])
def test_a_product_says_what_its_matrix_says(shape: tuple[int, int, int], scale: float, dependent: bool) -> None:
    update, matrix = pair(shape, scale, dependent=dependent)
    other = torch.randn(matrix.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    rows, columns = slice(0, max(1, shape[0] // 2)), slice(0, max(1, shape[1] // 3))
    for one, whole in ((update, matrix), (update.sliced(rows, columns), matrix[rows, columns])):
        dense = Dense(whole)
        assert one.shape == dense.shape == tuple(whole.shape)
        inner = other[: whole.shape[0], : whole.shape[1]]
        close = {"rel": 1e-9, "abs": 1e-12 * scale}
        assert one.inner(inner) == pytest.approx(float((whole * inner).sum()), **close)
        assert dense.inner(inner) == pytest.approx(float((whole * inner).sum()), **close)
        expected = torch.linalg.svdvals(whole)
        for values in (one.singular_values(), dense.singular_values()):
            found = values.sort(descending=True).values[: len(expected)]
            torch.testing.assert_close(found, expected[: len(found)], rtol=1e-6, atol=1e-6 * float(expected[0]))
        assert one.norm == pytest.approx(float(expected.norm()), rel=1e-9)
        assert dense.norm == pytest.approx(float(expected.norm()), rel=1e-9)


def test_sizes_by_hand() -> None:
    even = size_of([Dense(torch.eye(4))])
    assert even == pytest.approx((2.0, 4.0, 0.25, 4))
    one = size_of([LowRank(torch.ones(3, 2), torch.ones(2, 5), 1.0)])
    # Two equal columns: one direction, of the two that the rank allows.
    assert one == pytest.approx((2 * math.sqrt(15), 1.0, 1.0, 2), abs=1e-6)
    together = size_of([Dense(torch.eye(4)), Dense(torch.eye(2))])
    assert together == pytest.approx((math.sqrt(6), 6.0, 1 / 6, 6))
    assert size_of([Dense(torch.zeros(2, 3))]) == (0.0, None, None, 2)


@pytest.mark.parametrize(
    ("axis", "transposed", "rows", "columns"),
    [(0, False, slice(1, 3), slice(None)), (1, False, slice(None), slice(1, 3)), (0, True, slice(None), slice(1, 3)), (1, True, slice(1, 3), slice(None))],
)  # fmt: skip
def test_spans_are_those_of_the_part(axis: int, transposed: bool, rows: slice, columns: slice) -> None:
    part = Part("x", axis, slice(1, 3), 4, transposed)
    assert spans_of(part) == (rows, columns)
    weight = torch.arange(16).view(4, 4)
    view = part.of(weight)
    assert torch.equal(weight[spans_of(part)], view.T if transposed else view)


def test_effects_of_projections_that_are_not_among_the_gradients_count_nothing(tiny_model: Callable[..., Any]) -> None:
    model = tiny_model("llama")
    layout = UnitLayout.of(model, HeadLayout.of(model))
    paths = [layout.heads.at(layer).query_path for layer in range(3)]
    updates = {path: Dense(torch.ones(32, 32)) for path in paths}
    chunks = [{path: torch.full((32, 32), float(chunk)) for path in paths[:2]} for chunk in (1, 2)]
    found = first_order_effects(layout, layout.units, chunks, updates)
    assert found.units_HC.tolist() == [[256.0, 512.0]] * 8 + [[0.0, 0.0]] * 4
    assert found.total_C.tolist() == [2048.0, 4096.0]
    rest = first_order_effects(layout, layout.units, [{paths[2]: torch.ones(32, 32)}] * 2, updates)
    both: Effects = found + rest
    assert both.modules_C.keys() == set(paths)
    assert both.units_HC[-1].tolist() == [256.0, 256.0]
    assert unit_size(layout, layout.units[0], {}) == (0.0, None, None, 0)


def test_standard_errors_over_chunks() -> None:
    effect, error = with_error(np.array([1.0, 2.0, 3.0, 2.0]))
    assert effect == 8
    # Each chunk times four is an estimate: their spread over sqrt(4).
    assert error == pytest.approx(np.std([4, 8, 12, 8], ddof=1) / 2)
    assert with_error(np.array([1.5])) == (1.5, None)
