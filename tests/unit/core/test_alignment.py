"""Safe LoRA's projectors against the formulas of the paper, written out dense in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from castune.core.alignment import AlignmentProjector, similarity

M, N, R = 12, 9, 3


def matrix(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def of_rank(rank: int, seed: int = 0) -> Tensor:
    return matrix(M, rank, seed=seed) @ matrix(rank, N, seed=seed + 1)


def frobenius_cosine(one: Tensor, other: Tensor) -> float:
    return float((one * other).sum() / (one.norm() * other.norm()))


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_the_fast_one_is_that_of_the_paper(scale: float) -> None:
    v, b = scale * of_rank(N), matrix(M, R, seed=2)
    wanted = v @ v.T / (v**2).sum().sqrt() @ b
    torch.testing.assert_close(AlignmentProjector.fast(v).apply(b), wanted, rtol=1e-12, atol=1e-12 * scale)


def test_the_exact_one_is_that_of_the_paper_where_that_can_be_computed() -> None:
    v, b = of_rank(N), matrix(M, R, seed=2)
    wanted = v @ torch.linalg.inv(v.T @ v) @ v.T @ b
    torch.testing.assert_close(AlignmentProjector.exact(v).apply(b), wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("rank", [1, 4, N])
@pytest.mark.parametrize("scale", [1e-9, 1.0, 1e9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_exact_one_is_a_projector_onto_the_columns(rank: int, scale: float, dtype: torch.dtype) -> None:
    v, b = scale * of_rank(rank), matrix(M, R, seed=2)
    projector = AlignmentProjector.exact(v.to(dtype))
    near = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 1e-9, "atol": 1e-10}
    assert projector.factor_MK.shape == (M, rank)
    once = projector.apply(b.to(dtype))
    torch.testing.assert_close(projector.apply(once), once, **near)
    # What lies in the column space stays; what is orthogonal to it goes.
    inside = (v / scale) @ matrix(N, R, seed=3)
    torch.testing.assert_close(projector.apply(inside.to(dtype)), inside.to(dtype), **near)
    outside = b - v @ torch.linalg.pinv(v) @ b
    assert projector.apply(outside.to(dtype)).abs().max() < near["atol"]


def test_of_a_wide_matrix_of_full_rank_the_exact_one_is_the_identity() -> None:
    b = matrix(N, R, seed=2)
    torch.testing.assert_close(AlignmentProjector.exact(of_rank(N).T).apply(b), b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("scale", [1e-8, 1.0, 1e8])
def test_the_cosine_is_that_of_the_dense_updates(scale: float) -> None:
    v, b, a = of_rank(4), scale * matrix(M, R, seed=2), matrix(R, N, seed=3)
    projected = AlignmentProjector.fast(v).apply(b)
    cosine, norm, projected_norm = similarity(b, projected, a)
    assert cosine == pytest.approx(frobenius_cosine(b @ a, projected @ a), rel=1e-9)
    assert norm == pytest.approx(float((b @ a).norm()), rel=1e-9)
    assert projected_norm == pytest.approx(float((projected @ a).norm()), rel=1e-9)


def test_the_cosine_is_one_inside_and_zero_outside_the_space() -> None:
    v, a = of_rank(1), matrix(R, N, seed=3)
    projector = AlignmentProjector.exact(v)
    inside = v @ matrix(N, R, seed=2)
    assert similarity(inside, projector.apply(inside), a)[0] == pytest.approx(1)
    outside = matrix(M, R, seed=2)
    outside -= projector.apply(outside)
    assert similarity(outside, projector.apply(outside), a)[0] == pytest.approx(0, abs=1e-12)


def test_of_an_update_of_zero_there_is_no_cosine() -> None:
    zero, b, a = torch.zeros(M, R), matrix(M, R, seed=2), matrix(R, N, seed=3)
    assert similarity(zero, zero, a) == (None, 0, 0)
    # B A is zero although neither is.
    assert similarity(b, b, torch.zeros(R, N))[0] is None
    cosine, norm, projected_norm = similarity(b, zero, a)
    assert (cosine, projected_norm) == (0, 0)
    assert norm > 0
