"""Theorems of Eqs. 2-6, on random and hostile gradients."""

from __future__ import annotations

import math
import statistics
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from castune.diagnosis.score import (
    combined,
    conflict_from_gram,
    conflict_magnitude,
    conflict_score,
    conflict_standard_error,
    decision_shift,
    functional_sensitivity,
    margin_shift,
)

Floats = NDArray[np.float64]
H, P = 7, 12
NAN = math.nan


def gram(safety_HCP: Floats, utility_HCP: Floats) -> Floats:
    parts = np.concatenate([safety_HCP, utility_HCP], axis=1)
    return np.einsum("hcp,hdp->hcd", parts, parts)


def chunks(seed: int, n_chunks: int = 3) -> Floats:
    return np.random.default_rng(seed).normal(size=(H, n_chunks, P))


def conflict(safety: Floats, utility: Floats) -> Floats:
    return conflict_from_gram(gram(safety, utility), safety.shape[1])


def direct_conflict(safety_P: Floats, utility_P: Floats) -> float:
    return (1 - safety_P @ utility_P / np.linalg.norm(safety_P) / np.linalg.norm(utility_P)) / 2


@given(st.integers(0, 1000), st.integers(1, 5), st.integers(1, 5))
def test_conflict_is_that_of_the_summed_gradients(seed: int, n_safety: int, n_utility: int) -> None:
    safety, utility = chunks(seed, n_safety), chunks(seed + 1, n_utility)
    expected = [direct_conflict(s.sum(0), u.sum(0)) for s, u in zip(safety, utility, strict=True)]
    np.testing.assert_allclose(conflict(safety, utility), expected, rtol=0, atol=1e-10)


@given(st.integers(0, 1000), st.floats(0, 5), st.floats(0, 5))
def test_magnitude_is_half_of_what_the_inner_product_lacks_and_grows_with_both_gradients(
    seed: int, larger: float, other: float
) -> None:
    safety, utility = chunks(seed), chunks(seed + 1)
    s_HP, u_HP = safety.sum(1), utility.sum(1)
    lacks = np.linalg.norm(s_HP, axis=1) * np.linalg.norm(u_HP, axis=1) - np.einsum("hp,hp->h", s_HP, u_HP)
    scaled = conflict_magnitude(gram(larger * safety, other * utility), safety.shape[1])
    np.testing.assert_allclose(scaled, larger * other * lacks / 2, rtol=1e-9, atol=1e-12)


@given(st.integers(0, 1000))
def test_identical_objectives_give_0_and_opposite_ones_1(seed: int) -> None:
    safety = chunks(seed)
    one_chunk = safety.sum(1, keepdims=True)  # cut into other parts, the objective is the same
    np.testing.assert_allclose(conflict(safety, one_chunk), 0, atol=1e-12)
    np.testing.assert_allclose(conflict(safety, -one_chunk), 1, atol=1e-12)


@given(st.integers(0, 1000))
def test_conflict_is_symmetric_and_bounded(seed: int) -> None:
    safety, utility = chunks(seed, 2), chunks(seed + 1, 4)
    found = conflict(safety, utility)
    np.testing.assert_allclose(found, conflict(utility, safety), rtol=0, atol=1e-12)
    np.testing.assert_allclose(found, 1 - conflict(safety, -utility), rtol=0, atol=1e-12)
    assert ((found >= 0) & (found <= 1)).all()


@pytest.mark.parametrize("safety_scale", [1e-15, 1.0, 1e15])
@pytest.mark.parametrize("utility_scale", [1e-15, 1.0, 1e15])
def test_conflict_is_blind_to_positive_rescaling(safety_scale: float, utility_scale: float) -> None:
    safety, utility = chunks(1), chunks(2)
    found = conflict(safety * safety_scale, utility * utility_scale)
    np.testing.assert_allclose(found, conflict(safety, utility), rtol=0, atol=1e-10)


def test_conflict_survives_the_smallest_and_largest_float32_gradients() -> None:
    safety, utility = chunks(1), chunks(2)
    for scale in (1e-38, 1e37):
        np.testing.assert_allclose(
            conflict(safety * scale, utility * scale), conflict(safety, utility), rtol=0, atol=1e-9
        )


def test_nearly_parallel_and_opposite_gradients_stay_within_bounds() -> None:
    safety = chunks(3, 1)
    utility = safety * (1 + 1e-9 * chunks(4, 1))
    found, opposed = conflict(safety, utility), conflict(safety, -utility)
    assert ((found >= 0) & (found < 1e-9)).all()
    assert ((opposed <= 1) & (opposed > 1 - 1e-9)).all()


def test_chunks_that_nearly_cancel_stay_within_bounds() -> None:
    """Little is left of their sums but rounding: without bounds, O would be outside [0, 1] by some 1e-4."""
    large, rest = 1e6 * chunks(5, 1), chunks(6, 1)
    safety = np.concatenate([large, rest - large], axis=1)
    for utility, expected in ((3 * safety[:, ::-1], 0), (-3 * safety[:, ::-1], 1)):
        found = conflict(safety, utility)
        assert ((found >= 0) & (found <= 1)).all()
        np.testing.assert_allclose(found, expected, atol=1e-3)


def test_a_zero_gradient_is_no_conflict_and_no_agreement() -> None:
    safety, utility = chunks(1), chunks(2)
    safety[0], utility[1] = 0, 0
    safety[2], utility[2] = 0, 0
    found = conflict(safety, utility)
    np.testing.assert_array_equal(found[:3], 0.5)
    assert (found[3:] != 0.5).all()


def test_chunks_that_cancel_are_a_zero_gradient() -> None:
    half = chunks(1, 1)
    found = conflict(np.concatenate([half, -half], axis=1), chunks(2))
    np.testing.assert_array_equal(found, 0.5)


@given(st.integers(0, 200), st.integers(2, 5), st.integers(2, 5))
def test_standard_error_is_the_delete_one_jackknife(seed: int, n_safety: int, n_utility: int) -> None:
    safety, utility = chunks(seed, n_safety), chunks(seed + 1, n_utility)
    found = conflict_standard_error([gram(safety, utility)], n_safety)
    for head in range(H):
        s, u = safety[head], utility[head]
        variance = 0.0
        for left_out in (
            [direct_conflict(np.delete(s, c, axis=0).sum(0), u.sum(0)) for c in range(n_safety)],
            [direct_conflict(s.sum(0), np.delete(u, c, axis=0).sum(0)) for c in range(n_utility)],
        ):
            n = len(left_out)
            variance += (n - 1) / n * sum((x - sum(left_out) / n) ** 2 for x in left_out)
        assert found[head] == pytest.approx(math.sqrt(variance), abs=1e-10)


@given(st.integers(0, 200), st.integers(2, 4), st.lists(st.integers(2, 4), min_size=2, max_size=3))
def test_standard_error_of_a_mean_over_domains_is_the_delete_one_jackknife(
    seed: int, n_safety: int, sizes: list[int]
) -> None:
    """Every chunk of every set left out of the mean over domains, the safety chunks out of all domains at once."""
    safety, domains = chunks(seed, n_safety), [chunks(seed + 1 + d, n) for d, n in enumerate(sizes)]
    found = conflict_standard_error([gram(safety, utility) for utility in domains], n_safety)
    for head in range(H):
        sets = [safety[head], *(utility[head] for utility in domains)]
        variance = 0.0
        for number, part in enumerate(sets):
            means = []
            for chunk in range(len(part)):
                s, *us = [np.delete(one, chunk, 0) if i == number else one for i, one in enumerate(sets)]
                means.append(np.mean([direct_conflict(s.sum(0), u.sum(0)) for u in us]))
            variance += (len(part) - 1) / len(part) * ((np.array(means) - np.mean(means)) ** 2).sum()
        assert found[head] == pytest.approx(math.sqrt(variance), abs=1e-10)


def test_standard_error_needs_two_chunks_of_each() -> None:
    for n_safety, n_utility in ((1, 3), (3, 1), (1, 1)):
        matrix = gram(chunks(1, n_safety), chunks(2, n_utility))
        assert np.isnan(conflict_standard_error([matrix], n_safety)).all()


def test_equal_chunks_have_no_standard_error() -> None:
    safety, utility = np.repeat(chunks(1, 1), 4, axis=1), np.repeat(chunks(2, 1), 3, axis=1)
    np.testing.assert_allclose(conflict_standard_error([gram(safety, utility)], 4), 0, atol=1e-9)


def test_standard_error_tells_the_spread_of_repeated_measurements() -> None:
    """The jackknife of one data set against the deviation over many: within a third, on average over heads."""
    rng = np.random.default_rng(0)
    means = rng.normal(size=(2, H, 1, P))
    measured, errors = [], []
    for _ in range(200):
        safety, utility = (mean + rng.normal(size=(H, 8, P)) for mean in means)
        measured.append(conflict(safety, utility))
        errors.append(conflict_standard_error([gram(safety, utility)], 8))
    ratio = np.mean(errors, axis=0).mean() / np.std(measured, axis=0).mean()
    assert 0.75 < ratio < 1.33


def test_decision_shift_by_hand() -> None:
    baseline = np.array([1.0, 0.0, 1.0, NAN])
    ablated = np.array([[1, 0, 1, 1], [0, 0, 0, 0], [0, 1, 1, NAN], [NAN, NAN, 0, 1], [NAN, NAN, NAN, 1]], dtype=float)
    shift, error = decision_shift(ablated, baseline)
    np.testing.assert_allclose(shift, [0, 2 / 3, 0, 1, NAN])
    # Differences (-1, 0, -1) and (-1, 1, 0): deviation over the root of n.
    np.testing.assert_allclose(error, [0, math.sqrt(1 / 3 / 3), math.sqrt(1 / 3), NAN, NAN])


@given(st.integers(0, 500), st.integers(2, 12))
def test_decision_shift_is_the_difference_of_two_rates(seed: int, n: int) -> None:
    rng = np.random.default_rng(seed)
    baseline, ablated = rng.integers(0, 2, n).astype(float), rng.integers(0, 2, (H, n)).astype(float)
    shift, _ = decision_shift(ablated, baseline)
    np.testing.assert_allclose(shift, abs(ablated.mean(1) - baseline.mean()), rtol=0, atol=1e-12)
    # Equal counts must be equal floats, or ties would be broken by rounding.
    assert len(set(shift)) <= n + 1
    np.testing.assert_allclose(decision_shift(1 - ablated, 1 - baseline)[0], shift, rtol=0, atol=1e-12)


def test_margin_shift_does_not_cancel() -> None:
    shift, error = margin_shift(np.array([[2.0, -2.0], [1.0, 1.0]]), np.array([0.0, 0.0]))
    np.testing.assert_allclose(shift, [2, 1])
    np.testing.assert_allclose(error, [0, 0])
    shift, error = margin_shift(np.array([[1.0, 3.0, 2.0]]), np.array([0.0, 0.0, 0.0]))
    np.testing.assert_allclose((shift[0], error[0]), (2, 1 / math.sqrt(3)))


@given(st.integers(0, 500), st.integers(2, 12))
def test_margin_shift_is_the_mean_distance_from_the_whole_model(seed: int, n: int) -> None:
    rng = np.random.default_rng(seed)
    baseline, ablated = rng.normal(3, 1, n), rng.normal(3, 1, (H, n))
    ablated[0] = baseline  # a head without which nothing changes
    shift, error = margin_shift(ablated, baseline)
    for head in range(H):
        distances = [abs(after - before) for after, before in zip(ablated[head], baseline, strict=True)]
        assert shift[head] == pytest.approx(statistics.mean(distances))
        assert error[head] == pytest.approx(statistics.stdev(distances) / math.sqrt(n))
    assert shift[0] == error[0] == 0


def test_an_unmeasured_margin_is_not_a_number() -> None:
    """NaN must come through, so that `diagnose` can refuse; it must not pass for a shift."""
    shift, _ = margin_shift(np.array([[1.0, NAN], [1.0, 1.0]]), np.array([0.0, 0.0]))
    assert np.isnan(shift[0])
    assert shift[1] == 1


SHIFTS = st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=2, max_size=30)


@given(SHIFTS)
def test_sensitivity_bounds(pairs: list[tuple[float, float]]) -> None:
    utility, safety = (np.array(values) for values in zip(*pairs, strict=True))
    difference = functional_sensitivity(utility, safety)
    assert ((difference >= math.exp(-1) - 1e-12) & (difference <= math.e + 1e-12)).all()
    of_difference = functional_sensitivity(utility, safety, rank="of-difference")
    assert ((of_difference >= 1) & (of_difference <= math.e + 1e-12)).all()
    # Swapping the objectives inverts S; equal shifts of all heads give 1.
    np.testing.assert_allclose(functional_sensitivity(safety, utility), 1 / difference, rtol=1e-9)
    np.testing.assert_allclose(functional_sensitivity(utility, utility), 1)


def test_sensitivity_pinned() -> None:
    utility, safety = np.array([0.0, 0.5, 0.25]), np.array([0.5, 0.25, 0.25])
    np.testing.assert_allclose(functional_sensitivity(utility, safety), [math.exp(-1), math.exp(0.75), math.exp(0.25)])
    np.testing.assert_allclose(
        functional_sensitivity(utility, safety, rank="of-difference"), [1, math.e, math.exp(0.5)]
    )


def test_of_difference_has_the_scale_of_table_7() -> None:
    """Quartile means of S in the paper: 2.38, 1.86, 1.45, 1.13."""
    rng = np.random.default_rng(0)
    sensitivity = np.sort(functional_sensitivity(rng.random(1000), rng.random(1000), rank="of-difference"))[::-1]
    np.testing.assert_allclose(sensitivity.reshape(4, -1).mean(1), [2.38, 1.86, 1.45, 1.13], atol=0.04)


def test_a_planted_conflicting_head_ranks_first() -> None:
    """Opposed gradients, needed for utility, not for safety: Eq. 6 must put it first, on any background."""
    for seed in range(20):
        rng = np.random.default_rng(seed)
        safety, utility = chunks(seed), chunks(seed + 100)
        utility_shift, safety_shift = rng.random(H), rng.random(H)
        planted = int(rng.integers(H))
        utility[planted] = -safety[planted] * 3
        utility_shift[planted], safety_shift[planted] = 2.0, 0.0
        score = conflict_score(conflict(safety, utility), functional_sensitivity(utility_shift, safety_shift))
        assert score.argmax() == planted
        assert score[planted] == pytest.approx(math.e)


# Domains


COLUMNS = st.lists(st.lists(st.floats(-1e6, 1e6), min_size=4, max_size=4), min_size=1, max_size=5)


@given(COLUMNS, st.permutations(range(5)))
def test_the_worst_is_at_least_the_mean_and_the_mean_at_least_the_least(rows: list[list[float]], order: Any) -> None:
    score_DH = np.array(rows)
    mean_H, worst_H = combined(score_DH, score_DH, "mean"), combined(score_DH, score_DH, "worst")
    slack = 1e-9 * np.abs(score_DH).max(0)
    assert (worst_H >= mean_H - slack).all()
    assert (mean_H >= score_DH.min(0) - slack).all()
    moved_DH = score_DH[[d for d in order if d < len(rows)]]
    np.testing.assert_array_equal(combined(moved_DH, moved_DH, "worst"), worst_H)
    np.testing.assert_allclose(combined(moved_DH, moved_DH, "mean"), mean_H, rtol=1e-9, atol=slack.max())


def test_the_mean_row_is_the_mean_of_the_domains_whatever_their_scores() -> None:
    score_DRH, other_DRH = np.random.default_rng(0).normal(size=(2, 3, 7, 5))
    found_RH = combined(other_DRH, score_DRH, "mean")
    for r in range(7):
        for h in range(5):
            assert found_RH[r, h] == pytest.approx(statistics.mean(other_DRH[:, r, h]))


def test_the_worst_row_is_of_one_domain_in_all_columns_and_resamples() -> None:
    score_DRH, other_DRH = np.random.default_rng(0).normal(size=(2, 3, 7, 5))
    found_RH = combined(other_DRH, score_DRH, "worst")
    for r in range(7):
        for h in range(5):
            domain = max(range(3), key=lambda d: score_DRH[d, r, h])
            assert found_RH[r, h] == other_DRH[domain, r, h]
