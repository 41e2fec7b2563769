"""Resampling against slow loops over `score.py`; statistics against theory, simulation and scipy."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats

from castune.diagnosis.measurements import COLUMNS, Domain, Measurements, Weights, weighted_conflict
from castune.diagnosis.reliability import (
    RELIABLE,
    bootstrap,
    examples_needed,
    reliability,
    spearman,
    spearman_brown,
    split_half,
)
from castune.diagnosis.score import (
    conflict_from_gram,
    conflict_score,
    decision_shift,
    functional_sensitivity,
    margin_shift,
)
from castune.diagnosis.zones import expected_jaccard, zone_stability
from castune.stats.ranking import bucket_numbers

Floats = NDArray[np.float64]
NAN = math.nan


@dataclass(frozen=True)
class Pairs:
    baseline_N: Floats
    ablated_HN: Floats


def gram(parts_HCP: Floats) -> Floats:
    return np.einsum("hcp,hdp->hcd", parts_HCP, parts_HCP)


def decisions(rng: np.random.Generator, n_heads: int, n: int, unscored: float = 0.0) -> Pairs:
    baseline_N, ablated_HN = rng.integers(0, 2, n).astype(float), rng.integers(0, 2, (n_heads, n)).astype(float)
    ablated_HN[rng.random((n_heads, n)) < unscored] = NAN
    baseline_N[rng.random(n) < unscored / 2] = NAN
    return Pairs(baseline_N, ablated_HN)


def margins(rng: np.random.Generator, n_heads: int, n: int) -> Pairs:
    return Pairs(rng.normal(size=n), rng.normal(size=(n_heads, n)))


def measurements(
    seed: int = 0,
    *,
    n_heads: int = 12,
    n: tuple[int, int] = (20, 14),
    chunks: tuple[int, int] = (5, 4),
    measure: Any = "decision",
    rank: Any = "difference",
    unscored: float = 0.0,
) -> Measurements:
    """Random data without any signal; `n` and `chunks` are those of utility and safety."""
    rng = np.random.default_rng(seed)
    utility, safety = (
        margins(rng, n_heads, k) if measure == "margin" else decisions(rng, n_heads, k, unscored) for k in n
    )
    return Measurements(
        domains=[Domain(gram(rng.normal(size=(n_heads, sum(chunks), 9))), utility)],
        n_safety=chunks[1],
        safety=safety,
        measure=measure,
        sensitivity_rank=rank,
    )


def with_signal(seed: int, *, n: int, signal: float, n_heads: int = 120, n_chunks: int = 6) -> Measurements:
    """Margins and gradients of heads that differ; the heads are those of the seed's tens, the examples are new."""
    heads, rng = np.random.default_rng(seed // 10), np.random.default_rng(seed)
    safety_HP, utility_HP = heads.normal(size=(2, n_heads, 1, 6))
    sizes = np.exp(signal * heads.normal(size=(2, n_heads, 1)))
    # The mean of n / n_chunks examples: noise falls with n.
    noise_HCP = rng.normal(size=(n_heads, 2 * n_chunks, 6)) * math.sqrt(n_chunks / n) * 2
    parts_HCP = np.concatenate([safety_HP.repeat(n_chunks, 1), utility_HP.repeat(n_chunks, 1)], 1) + noise_HCP
    pairs = [Pairs(np.zeros(n), size_H1 * np.exp(2 * rng.normal(size=(n_heads, n)))) for size_H1 in sizes]
    return Measurements(
        domains=[Domain(gram(parts_HCP), pairs[0])],
        n_safety=n_chunks,
        safety=pairs[1],
        measure="margin",
        sensitivity_rank="difference",
    )


def changed(m: Measurements, *, gram_HCC: Floats | None = None, utility: Pairs | None = None, **more: Any) -> Any:
    """Measurements of one domain with another Gram matrix, other utility outcomes, or anything else."""
    (domain,) = m.domains
    domain = Domain(domain.gram_HCC if gram_HCC is None else gram_HCC, domain.utility if utility is None else utility)
    return replace(m, domains=[domain], **more)


def slow_columns(m: Measurements, utility: Any, safety: Any, utility_chunks: Any, safety_chunks: Any) -> list[Floats]:
    """The five columns by the functions of `score.py`, on arrays made of the drawn examples and chunks."""
    shift = margin_shift if m.measure == "margin" else decision_shift
    ((gram_HCC, pairs, _),) = m.domains
    utility_H = shift(pairs.ablated_HN[:, utility], pairs.baseline_N[utility])[0]
    safety_H = shift(m.safety.ablated_HN[:, safety], m.safety.baseline_N[safety])[0]
    order = [*safety_chunks, *(m.n_safety + np.asarray(utility_chunks))]
    conflict_H = conflict_from_gram(gram_HCC[:, order][:, :, order], len(safety_chunks))
    sensitivity_H = np.full(len(conflict_H), NAN)
    known_H = np.isfinite(utility_H + safety_H)
    if known_H.any():
        sensitivity_H[known_H] = functional_sensitivity(utility_H[known_H], safety_H[known_H], rank=m.sensitivity_rank)
    return [conflict_H, utility_H, safety_H, sensitivity_H, conflict_score(conflict_H, sensitivity_H)]


KINDS = pytest.mark.parametrize(
    ("measure", "rank", "unscored"),
    [("decision", "difference", 0.0), ("decision", "of-difference", 0.6), ("decision", "difference", 0.6),
     ("margin", "difference", 0.0), ("margin", "of-difference", 0.0)],
)  # fmt: skip


# Weighted columns


@given(st.integers(0, 10_000), st.integers(1, 5), st.integers(1, 5), st.data())
def test_weighted_conflict_is_that_of_repeated_chunks(seed: int, n_safety: int, n_utility: int, data: Any) -> None:
    gram_HCC = gram(np.random.default_rng(seed).normal(size=(4, n_safety + n_utility, 7)))
    safety, utility = (
        np.array(data.draw(st.lists(st.integers(0, 3), min_size=k, max_size=k).filter(any)))
        for k in (n_safety, n_utility)
    )
    order = [*np.repeat(np.arange(n_safety), safety), *np.repeat(np.arange(n_utility) + n_safety, utility)]
    expected_H = conflict_from_gram(gram_HCC[:, order][:, :, order], int(safety.sum()))
    found_RH = weighted_conflict(gram_HCC, n_safety, safety[None].astype(float), utility[None].astype(float))
    np.testing.assert_allclose(found_RH, expected_H[None], rtol=0, atol=1e-10)


def test_weighted_conflict_where_a_gradient_is_zero() -> None:
    half = np.random.default_rng(0).normal(size=(1, 1, 5))
    gram_HCC = gram(np.concatenate([half, -half, half, half], 1))
    weights = np.array([[1.0, 1.0], [2.0, 0.0], [0.0, 2.0]])
    found_RH = weighted_conflict(gram_HCC, 2, weights, np.ones((3, 2)))
    np.testing.assert_allclose(found_RH[:, 0], [0.5, 0, 1], atol=1e-12)


def test_drawn_chunks_are_as_long_as_the_whole_on_average() -> None:
    """The length of a drawn gradient loses what draws add to it on average: here over all 27 draws of 3 of 3."""
    rng = np.random.default_rng(0)
    safety_HCP, utility_HCP = rng.normal(size=(2, 6, 3, 4))
    draws_RC = np.array([np.bincount(draw, minlength=3) for draw in itertools.product(range(3), repeat=3)], dtype=float)

    def squares(parts_HCP: Floats) -> Floats:
        lengths_RH = np.array([((w_C[:, None] * parts_HCP).sum(1) ** 2).sum(1) for w_C in draws_RC])
        return lengths_RH - lengths_RH.mean(0) + (parts_HCP.sum(1) ** 2).sum(1)

    # Every draw of one set with every draw of the other, so that also both squares are negative.
    safety_RC, utility_RC = draws_RC.repeat(27, 0), np.tile(draws_RC, (27, 1))
    safety_RH, utility_RH = squares(safety_HCP).repeat(27, 0), np.tile(squares(utility_HCP), (27, 1))
    known_RH = (safety_RH > 0) & (utility_RH > 0)
    dot_RH = np.einsum("ra,hap,hbp,rb->rh", safety_RC, safety_HCP, utility_HCP, utility_RC)
    cosine_RH = np.where(known_RH, dot_RH / np.sqrt(np.where(known_RH, safety_RH * utility_RH, 1)), 0)
    gram_HCC = gram(np.concatenate([safety_HCP, utility_HCP], 1))
    found_RH = weighted_conflict(gram_HCC, 3, safety_RC, utility_RC, drawn=True)
    np.testing.assert_allclose(found_RH, (1 - np.clip(cosine_RH, -1, 1)) / 2, rtol=0, atol=1e-9)
    assert ((safety_RH < 0) & (utility_RH < 0)).any()


def test_the_interval_of_a_conflict_is_about_the_measured_one() -> None:
    """In many dimensions plain resampling misses the measured value altogether: noise has one length, always."""
    rng = np.random.default_rng(0)
    parts_HCP = rng.normal(size=(20, 16, 3000)) / 40
    parts_HCP[:, :, 0] += 1
    m = changed(measurements(0, n_heads=20), gram_HCC=gram(parts_HCP), n_safety=8)
    measured_H = m.columns(m.whole)["optimization_conflict"][0]
    found = bootstrap(m, n_resamples=100, seed=0).intervals
    low_H, high_H = (found[f"optimization_conflict_{bound}"] for bound in ("low", "high"))
    assert ((low_H < measured_H) & (measured_H < high_H)).all()
    counts = rng.multinomial(8, np.full(8, 1 / 8), size=(2, 100)).astype(float)
    plain_RH = weighted_conflict(m.domains[0].gram_HCC, 8, *counts)
    assert (np.quantile(plain_RH, 0.025, axis=0) > measured_H).all()


@KINDS
def test_columns_of_the_whole_are_those_of_the_map(measure: str, rank: str, unscored: float) -> None:
    m = measurements(3, measure=measure, rank=rank, unscored=unscored / 2)
    every = [range(20), range(14), range(5), range(4)]
    for (name, found), expected in zip(m.columns(m.whole).items(), slow_columns(m, *every), strict=True):
        np.testing.assert_allclose(found[0], expected, rtol=0, atol=1e-12, err_msg=name)


@KINDS
def test_columns_of_resamples_are_those_of_a_slow_loop(measure: str, rank: str, unscored: float) -> None:
    m = measurements(5, n=(6, 4), measure=measure, rank=rank, unscored=unscored)
    sizes, rng = m.sizes, np.random.default_rng(1)
    drawn = [[rng.integers(0, size, size) for size in sizes] for _ in range(60)]
    counts = [np.stack([np.bincount(row[k], minlength=sizes[k]) for row in drawn]).astype(float) for k in range(4)]
    found = m.columns(Weights.of(counts))
    assert list(found) == list(COLUMNS)
    expected_RCH = np.array([slow_columns(m, *row) for row in drawn])
    for number, name in enumerate(COLUMNS):
        np.testing.assert_allclose(found[name], expected_RCH[:, number], rtol=0, atol=1e-9, err_msg=name)
    assert np.isnan(found["conflict_score"]).any() == (unscored > 0), "some pairs must be missing altogether"


def test_bootstrap_intervals_are_percentiles_of_resampled_maps() -> None:
    """Against index-resampled maps with other draws: equal up to the Monte Carlo error of a percentile."""
    rng = np.random.default_rng(8)
    # Chunks that differ little: the noise that draws add to the length of a gradient is of second order.
    parts_HCP = rng.normal(size=(25, 2, 9)).repeat([5, 4], axis=1) + 0.05 * rng.normal(size=(25, 9, 9))
    m = changed(measurements(2, n_heads=25, n=(40, 30), measure="margin"), gram_HCC=gram(parts_HCP), n_safety=5)
    found = bootstrap(m, n_resamples=1500, seed=0).intervals
    slow_RCH = np.array([slow_columns(m, *(rng.integers(0, size, size) for size in m.sizes)) for _ in range(1500)])
    for number, name in enumerate(COLUMNS):
        spread_H = slow_RCH[:, number].std(0)
        for bound, share in (("low", 0.025), ("high", 0.975)):
            off_H = (found[f"{name}_{bound}"] - np.quantile(slow_RCH[:, number], share, axis=0)) / spread_H
            assert np.abs(off_H).max() < 0.5, (name, bound)


# Intervals


@pytest.mark.parametrize("measure", ["decision", "margin"])
def test_intervals_cover_the_truth(measure: Any) -> None:
    """60 data sets of known rates, sizes and directions; O from 16 chunks of 4-dimensional gradients."""
    rng, n, n_heads, n_chunks, n_data = np.random.default_rng(0), 150, 5, 16, 60
    # Shares of outcomes that a head changes for the worse and for the better; the first does as much of either, the
    # shifts are far enough apart for ranks without doubt.
    worse_H, better_H = np.array([0.05, 0.15, 0.3, 0.5, 0.8]), np.array([0.05, 0.0, 0.0, 0.0, 0.0])
    directions = rng.normal(size=(2, n_heads, 1, 4))
    cosine_H = np.einsum("hip,hip->h", *directions) / np.prod(np.linalg.norm(directions, axis=-1), axis=0)[:, 0]

    def changes(worse_H: Floats, better_H: Floats) -> Pairs:
        if measure == "margin":
            return Pairs(np.zeros(n), worse_H[:, None] * rng.normal(size=(n_heads, n)))
        u_HN = rng.random((n_heads, n))
        return Pairs(np.zeros(n), (u_HN > 1 - better_H[:, None]) - (u_HN < worse_H[:, None]).astype(float))

    covered = dict.fromkeys(COLUMNS, np.zeros(n_heads))
    scale = math.sqrt(2 / math.pi)  # E|x| of a standard normal
    utility_H = scale * worse_H if measure == "margin" else worse_H - better_H
    safety_H = utility_H[::-1]
    sensitivity_H = functional_sensitivity(utility_H, safety_H)
    truth = ((1 - cosine_H) / 2, utility_H, safety_H, sensitivity_H, (1 - cosine_H) / 2 * sensitivity_H)
    for seed in range(n_data):
        parts = [d + rng.normal(size=(n_heads, n_chunks, 4)) for d in directions]
        m = Measurements(
            domains=[Domain(gram(np.concatenate(parts, 1)), changes(worse_H, better_H))],
            n_safety=n_chunks,
            safety=changes(worse_H[::-1], better_H[::-1]),
            measure=measure,
            sensitivity_rank="difference",
        )
        found = bootstrap(m, n_resamples=120, seed=seed).intervals
        for name, truth_H in zip(COLUMNS, truth, strict=True):
            low_H, high_H = found[f"{name}_low"] - 1e-12, found[f"{name}_high"] + 1e-12
            covered[name] = covered[name] + ((low_H <= truth_H) & (truth_H <= high_H)) / n_data
    # The standard error of each share is 0.03. Ranks without doubt are always covered.
    for name in COLUMNS:
        assert covered[name].min() > 0.86, (name, covered[name])
    assert 0.9 < covered["optimization_conflict"].mean() < 0.98
    assert 0.9 < covered["utility_shift"].mean() < 0.98


def test_a_shift_whose_sign_is_not_settled_may_be_zero() -> None:
    """Heads that only shuffle outcomes: 95 % of the intervals must hold 0, which no resampled |mean| does."""
    rng = np.random.default_rng(0)
    m = changed(
        measurements(0, n_heads=500, n=(100, 100)),
        utility=Pairs(np.zeros(100), rng.choice([-1.0, 1.0], size=(500, 100))),
    )
    low_H = bootstrap(m, n_resamples=200, seed=1).intervals["utility_shift_low"]
    assert 0.9 < (low_H == 0).mean() < 0.98


@KINDS
def test_intervals_are_within_the_bounds_of_their_columns(measure: str, rank: str, unscored: float) -> None:
    m = measurements(7, measure=measure, rank=rank, unscored=unscored / 2)
    found = bootstrap(m, n_resamples=50, seed=3).intervals
    assert list(found) == [f"{name}_{bound}" for name in COLUMNS for bound in ("low", "high")]
    bounds = {"optimization_conflict": 1, "functional_sensitivity": math.e, "conflict_score": math.e}
    for name in COLUMNS:
        low_H, high_H = found[f"{name}_low"], found[f"{name}_high"]
        assert low_H.shape == high_H.shape == (12,)
        assert (low_H >= 0).all()
        assert (low_H <= high_H).all()
        assert (high_H <= bounds.get(name, math.inf) + 1e-12).all()


def test_data_without_noise_have_intervals_without_width() -> None:
    found = bootstrap(noise_free(), n_resamples=40, seed=0).intervals
    for name in COLUMNS:
        np.testing.assert_allclose(found[f"{name}_low"], found[f"{name}_high"], rtol=0, atol=1e-9)


def test_a_resample_without_a_scored_pair_is_left_out_for_that_head_only() -> None:
    m = measurements(1, n_heads=3, n=(2, 5))
    pairs = Pairs(np.array([0.0, 0.0]), np.array([[NAN, 1.0], [NAN, NAN], [0.0, 1.0]]))
    resampled = bootstrap(changed(m, utility=pairs), n_resamples=200, seed=0)
    low_H, high_H = (resampled.intervals[f"utility_shift_{bound}"] for bound in ("low", "high"))
    np.testing.assert_array_equal(low_H, [1, NAN, 0])
    np.testing.assert_array_equal(high_H, [1, NAN, 1])
    np.testing.assert_array_equal(np.isnan(resampled.intervals["conflict_score_low"]), [False, True, False])
    assert np.isfinite(resampled.intervals["safety_shift_low"]).all()
    assert (resampled.zones.safe, resampled.zones.n_pairs) == (None, 0)


@pytest.mark.parametrize("measure", ["decision", "margin"])
def test_the_place_of_a_head_in_memory_does_not_matter(measure: str) -> None:
    m = measurements(4, n_heads=101, n=(203, 64), chunks=(9, 8), measure=measure)
    order = np.random.default_rng(0).permutation(101)

    def moved(pairs: Any) -> Pairs:
        return Pairs(pairs.baseline_N, np.asfortranarray(pairs.ablated_HN[order]))

    other = changed(
        m,
        gram_HCC=np.asfortranarray(m.domains[0].gram_HCC[order]),
        utility=moved(m.domains[0].utility),
        safety=moved(m.safety),
    )
    columns, summary = reliability(m, seed=5, n_resamples=60, n_splits=8)
    moved_columns, moved_summary = reliability(other, seed=5, n_resamples=60, n_splits=8)
    for name, values_H in columns.items():
        np.testing.assert_array_equal(moved_columns[name], values_H[order], err_msg=name)
    assert moved_summary.zones == summary.zones
    for name, agreement in summary.split_half.columns.items():
        assert moved_summary.split_half.columns[name].half == pytest.approx(agreement.half, abs=1e-12)


def test_the_seed_alone_determines_the_result() -> None:
    m = measurements(6)
    first, second, third = (reliability(m, seed=seed, n_resamples=50, n_splits=5) for seed in (1, 1, 2))
    assert first[1] == second[1]
    assert all(np.array_equal(first[0][name], second[0][name]) for name in first[0])
    assert any(not np.array_equal(first[0][name], third[0][name]) for name in first[0])
    assert first[1].split_half != third[1].split_half


# Domains


def together(parts: Sequence[Measurements], combination: Any) -> Measurements:
    """One diagnosis with the domain of each of `parts`; the safety set is that of the first."""
    first = parts[0]
    shared = first.n_safety
    domains = []
    for part in parts:
        ((gram_HCC, utility, _),) = part.domains
        # Any Gram matrix will do, as long as the safety chunks are the same in all.
        gram_HCC = gram_HCC.copy()
        gram_HCC[:, :shared, :shared] = first.domains[0].gram_HCC[:, :shared, :shared]
        domains.append(Domain(gram_HCC, utility))
    return replace(first, domains=domains, combination=combination)


@KINDS
@pytest.mark.parametrize("combination", ["mean", "worst"])
@pytest.mark.parametrize("drawn", [False, True])
def test_domains_are_combined_in_every_resample(
    measure: str, rank: str, unscored: float, combination: str, drawn: bool
) -> None:
    """Each domain by itself with the safety draws of all, then row by row what the combination says."""
    sizes = [((6, 4), (3, 4)), ((9, 4), (5, 4)), ((4, 4), (2, 4))]
    parts = [
        measurements(seed, n=n, chunks=chunks, measure=measure, rank=rank, unscored=unscored / 2)
        for seed, (n, chunks) in enumerate(sizes)
    ]
    m = together(parts, combination)
    assert m.sizes == [6, 9, 4, 4, 3, 5, 2, 4]
    rng = np.random.default_rng(3)
    counts = [rng.multinomial(size, np.full(size, 1 / size), size=30).astype(float) for size in m.sizes]
    found = m.columns(Weights.of(counts), drawn=drawn)
    alone = [
        replace(m, domains=[domain], combination="mean").columns(
            Weights([counts[d]], counts[3], [counts[4 + d]], counts[7]), drawn=drawn
        )
        for d, domain in enumerate(m.domains)
    ]
    whole = [c_HN.ablated_HN - c_HN.baseline_N for _, c_HN, _ in m.domains]
    signs = [np.where(np.nanmean(np.abs(x) if measure == "margin" else x, 1) < 0, -1, 1) for x in whole]
    for name in COLUMNS:
        columns = [one[name] for one in alone]
        if name == "safety_shift":
            np.testing.assert_array_equal(found[name], columns[0])
            continue
        if name == "utility_shift" and drawn:  # every domain counts with the sign that it has on the whole set
            columns = [column * sign * signs[0] for column, sign in zip(columns, signs, strict=True)]
        expected = sum(columns) / 3
        if combination == "worst":
            scores = np.stack([one["conflict_score"] for one in alone])
            expected = np.choose(scores.argmax(0), columns)
        np.testing.assert_allclose(found[name], expected, rtol=1e-12, atol=1e-15, err_msg=name)


@pytest.mark.parametrize("measure", ["decision", "margin"])
def test_one_domain_is_its_own_mean_and_its_own_worst(measure: str) -> None:
    m = measurements(2, measure=measure)
    (mean, of_mean), (worst, of_worst) = (
        reliability(replace(m, combination=how), seed=0, n_resamples=20, n_splits=3) for how in ("mean", "worst")
    )
    assert of_mean == of_worst
    for name, values_H in mean.items():
        np.testing.assert_array_equal(worst[name], values_H)


def test_intervals_of_a_mean_over_domains_cover_the_truth() -> None:
    """Rates of two domains that heads change in the same or in opposite directions."""
    rng, n, n_data, n_chunks = np.random.default_rng(0), 120, 80, 16
    truth_2H = np.array([[0.1, 0.4, -0.5, 0.3], [0.2, -0.4, -0.1, 0.0]])
    directions = rng.normal(size=(3, 4, 1, 4))
    cosines = [
        np.einsum("hip,hip->h", directions[0], u) / np.prod(np.linalg.norm([directions[0], u], axis=-1), axis=0)[:, 0]
        for u in directions[1:]
    ]
    conflict_H = np.mean([(1 - cosine_H) / 2 for cosine_H in cosines], axis=0)
    covered, widths = np.zeros((2, 4)), []
    for seed in range(n_data):
        safety, *utilities = (d + rng.normal(size=(4, n_chunks, 4)) for d in directions)
        domains = []
        for utility, change_H in zip(utilities, truth_2H, strict=True):
            u_HN = rng.random((4, n))
            change_HN = np.sign(change_H)[:, None] * (u_HN < np.abs(change_H)[:, None])
            domains.append(Domain(gram(np.concatenate([safety, utility], 1)), Pairs(np.zeros(n), change_HN)))
        m = replace(measurements(0, n_heads=4), domains=domains, n_safety=n_chunks)
        found = bootstrap(m, n_resamples=120, seed=seed).intervals
        for i, (name, wanted_H) in enumerate(
            (("utility_shift", np.abs(truth_2H).mean(0)), ("optimization_conflict", conflict_H))
        ):
            low_H, high_H = found[f"{name}_low"] - 1e-12, found[f"{name}_high"] + 1e-12
            covered[i] += ((low_H <= wanted_H) & (wanted_H <= high_H)) / n_data
        widths.append(found["utility_shift_high"] - found["utility_shift_low"])
    # The standard error of each share is 0.03; of the binomial interval too little at small n.
    assert covered.min() > 0.85, covered
    assert 0.9 < covered.mean() < 0.99
    # Of independent domains: sqrt(v1 + v2) / 2, each side 1.96 times.
    expected_H = 1.96 * np.sqrt((np.abs(truth_2H) * (1 - np.abs(truth_2H)) / n).sum(0))
    np.testing.assert_allclose(np.mean(widths, axis=0), expected_H, rtol=0.1)


def test_more_domains_do_not_hide_what_the_safety_set_is_unsure_of() -> None:
    """Utility without noise: the intervals of C owe all to the safety set, which all domains have in common."""
    m = measurements(4, n_heads=30, n=(6, 10), chunks=(4, 4), measure="margin")
    rng = np.random.default_rng(1)
    still = Pairs(np.zeros(6), rng.normal(size=(30, 1)).repeat(6, 1))
    parts_HCP = rng.normal(size=(30, 8, 9))
    parts_HCP[:, 4:] = parts_HCP[:, 4:5]
    one = changed(m, utility=still, gram_HCC=gram(parts_HCP))
    five = replace(one, domains=list(one.domains) * 5)
    (alone, _), (all_five, summary) = (reliability(x, seed=0, n_resamples=300, n_splits=3) for x in (one, five))
    widths = [x["conflict_score_high"] - x["conflict_score_low"] for x in (alone, all_five)]
    assert np.median(widths[1] / widths[0]) == pytest.approx(1, abs=0.1)
    assert (summary.n_utility, summary.chunks_utility) == (30, 20)


# Zones


@pytest.mark.parametrize(("size", "n_heads"), [(1, 1), (1, 4), (2, 7), (3, 8), (4, 5)])
def test_expected_jaccard_is_the_mean_over_all_zones(size: int, n_heads: int) -> None:
    first = set(range(size))
    zones = [set(zone) for zone in itertools.combinations(range(n_heads), size)]
    expected = np.mean([len(first & zone) / len(first | zone) for zone in zones])
    assert expected_jaccard(size, n_heads) == pytest.approx(expected, abs=1e-12)


def test_random_zones_overlap_by_chance() -> None:
    rng = np.random.default_rng(0)
    found = zone_stability(rng.normal(size=(400, 61)), rng.normal(size=(400, 61)))
    # 61 heads: the risky zone has 16, the safe zone 15.
    assert found.safe_by_chance == expected_jaccard(15, 61)
    assert found.risky_by_chance == expected_jaccard(16, 61)
    assert found.safe == pytest.approx(found.safe_by_chance, abs=0.012)
    assert found.risky == pytest.approx(found.risky_by_chance, abs=0.012)


def test_zones_are_those_of_the_map() -> None:
    rng = np.random.default_rng(1)
    one_RH, other_RH = rng.normal(size=(2, 9, 30))
    other_RH[:, :15] = one_RH[:, :15]
    found = zone_stability(one_RH, other_RH)
    for overlap, bucket in ((found.risky, 1), (found.safe, 4)):
        jaccards = []
        for one_H, other_H in zip(one_RH, other_RH, strict=True):
            a, b = (set(np.flatnonzero(bucket_numbers(c_H, 4) == bucket)) for c_H in (one_H, other_H))
            jaccards.append(len(a & b) / len(a | b))
        assert overlap == pytest.approx(np.mean(jaccards))
        assert 0 < np.mean(jaccards) < 1


def test_equal_maps_overlap_wholly_and_reversed_ones_not_at_all() -> None:
    score_RH = np.random.default_rng(0).normal(size=(3, 20))
    same, reverse = zone_stability(score_RH, 2 * score_RH), zone_stability(score_RH, -score_RH)
    assert (same.safe, same.risky) == (1, 1)
    assert (reverse.safe, reverse.risky) == (0, 0)


def test_pairs_with_a_head_without_a_score_have_no_zones() -> None:
    one_RH, other_RH = np.random.default_rng(0).normal(size=(2, 3, 8))
    one_RH[0, 2] = other_RH[1, 5] = NAN
    found = zone_stability(one_RH, other_RH)
    assert found == zone_stability(one_RH[2:], other_RH[2:])
    assert found.n_pairs == 1


def test_resamples_of_noise_overlap_more_than_by_chance_and_its_halves_do_not() -> None:
    m = with_signal(1, n=60, signal=0)
    m = changed(m, gram_HCC=gram(np.random.default_rng(0).normal(size=(120, 12, 6))))
    resampled, halves = bootstrap(m, n_resamples=100, seed=0).zones, split_half(m, seed=0).zones
    for zone in ("safe", "risky"):
        chance = getattr(halves, f"{zone}_by_chance")
        assert getattr(halves, zone) == pytest.approx(chance, abs=0.06)
        assert 0.25 < getattr(resampled, zone) < 0.45


# Split halves


@given(
    st.lists(st.tuples(st.integers(-3, 3), st.integers(-3, 3)), min_size=1, max_size=25),
    st.lists(st.integers(0, 24), max_size=3),
)
def test_spearman_is_that_of_scipy(pairs: list[tuple[int, int]], missing: list[int]) -> None:
    x_H, y_H = np.array(pairs, dtype=float).T
    x_H[[i for i in missing if i < len(x_H)]] = NAN
    both_H = np.isfinite(x_H)
    if len(set(x_H[both_H])) < 2 or len(set(y_H[both_H])) < 2:
        assert spearman(x_H, y_H) is None
    else:
        assert spearman(x_H, y_H) == pytest.approx(stats.spearmanr(x_H[both_H], y_H[both_H]).statistic, abs=1e-12)


def noise_free(n_heads: int = 20) -> Measurements:
    """Every example of a head changes as much, every chunk has the same gradient."""
    rng = np.random.default_rng(0)
    parts_HCP = rng.normal(size=(n_heads, 2, 8)).repeat(6, axis=1)
    utility, safety = (Pairs(rng.normal(size=9), rng.normal(size=(n_heads, 1)).repeat(9, 1)) for _ in range(2))
    return Measurements(
        domains=[Domain(gram(parts_HCP), replace(utility, ablated_HN=utility.ablated_HN + utility.baseline_N))],
        n_safety=6,
        safety=replace(safety, ablated_HN=safety.ablated_HN + safety.baseline_N),
        measure="margin",
        sensitivity_rank="difference",
    )


def test_halves_of_data_without_noise_agree() -> None:
    found = split_half(noise_free(), n_splits=10, seed=0)
    for name, agreement in found.columns.items():
        assert agreement.half == pytest.approx(1, abs=0.01), name
        assert agreement.full == pytest.approx(1, abs=0.01), name
    assert (found.zones.safe, found.zones.risky) == (1, 1)
    assert reliability(noise_free(), seed=0, n_resamples=5)[1].warnings() == []


@pytest.mark.parametrize("measure", ["decision", "margin"])
def test_halves_of_noise_do_not_agree(measure: str) -> None:
    m = measurements(0, n_heads=500, n=(40, 40), chunks=(6, 6), measure=measure)
    for name, agreement in split_half(m, seed=0).columns.items():
        assert agreement.half == pytest.approx(0, abs=0.06), name
        assert agreement.n_splits == 50


def test_halves_are_disjoint_and_of_one_size() -> None:
    """One head answers for one example each: a head changed in one half cannot be in the other."""
    n = 7
    m = changed(measurements(0, n_heads=n, n=(n, n)), utility=Pairs(np.zeros(n), np.eye(n)))
    # Heads of one half have a shift of 1/3 there and 0 in the other; the one left out has 0 in both.
    x_H, y_H = np.repeat([1, 0, 0], [3, 3, 1]), np.repeat([0, 1, 0], [3, 3, 1])
    expected = stats.spearmanr(x_H, y_H).statistic
    assert split_half(m, n_splits=30, seed=0).columns["utility_shift"].half == pytest.approx(expected)


def test_the_predicted_reliability_is_that_of_new_data() -> None:
    """Two diagnoses of the same heads with other examples correlate as halves of one of them predict."""
    for signal in (0.2, 0.6):
        predicted, found = dict.fromkeys(COLUMNS, 0.0), dict.fromkeys(COLUMNS, 0.0)
        for seed in (10, 20, 30):
            one, other = (with_signal(seed + k, n=48, signal=signal, n_heads=400) for k in (1, 2))
            halves = split_half(one, n_splits=10, seed=0).columns
            columns = [m.columns(m.whole) for m in (one, other)]
            for name in COLUMNS:
                predicted[name] += (halves[name].full or 0) / 3
                found[name] += (spearman(*(c[name][0] for c in columns)) or 0) / 3
        for name in COLUMNS:
            assert predicted[name] == pytest.approx(found[name], abs=0.1), (name, signal)


@given(st.floats(0.001, 0.999), st.integers(1, 2000), st.floats(0.01, 0.99))
def test_examples_needed_is_the_least_number_that_reaches_the_target(r_half: float, n_half: int, target: float) -> None:
    def predicted(n: float) -> float:
        times = n / n_half
        return times * r_half / (1 + (times - 1) * r_half)

    needed = examples_needed(r_half, n_half, target)
    assert needed is not None
    assert predicted(needed) >= target - 1e-9
    assert needed == 1 or predicted(needed - 1) < target + 1e-9
    assert predicted(2 * n_half) == pytest.approx(spearman_brown(r_half))


def test_examples_needed_pinned() -> None:
    assert spearman_brown(1 / 3) == pytest.approx(0.5)
    assert examples_needed(1 / 3, 50, 0.5) == 100
    assert examples_needed(0.5, 100, 0.8) == 400
    assert examples_needed(1.0, 100, 0.8) == 1
    assert examples_needed(0.0, 100, 0.8) is examples_needed(-0.2, 100, 0.8) is None
    assert (spearman_brown(0), spearman_brown(-1)) == (0, -1)
    for target in (0.0, 1.0):
        with pytest.raises(ValueError, match="between 0 and 1"):
            examples_needed(0.5, 100, target)


# The summary


def test_the_summary_is_plain_json() -> None:
    columns, summary = reliability(measurements(1, unscored=0.5, n=(3, 3)), seed=4, n_resamples=30, n_splits=6)
    record = summary.to_json()
    assert json.loads(json.dumps(record, allow_nan=False)) == record
    assert [record[key] for key in ("n_heads", "n_utility", "n_safety", "chunks_utility", "chunks_safety")] == [
        12, 3, 3, 5, 4,
    ]  # fmt: skip
    assert set(record["split_half"]["columns"]) == set(record["tie_shares"]) == set(COLUMNS)
    assert record["reliability"] == record["split_half"]["columns"]["conflict_score"]["full"]
    assert all(values_H.shape == (12,) for values_H in columns.values())


def test_an_unreliable_map_is_told_with_the_examples_it_would_need() -> None:
    _, summary = reliability(with_signal(11, n=10, signal=0.1), seed=0, n_resamples=5)
    value, needed = summary.of_score, summary.examples_needed()
    assert value is not None
    assert needed is not None
    assert 0 < value < RELIABLE
    half = summary.split_half.columns["conflict_score"].half
    assert half is not None
    assert needed["utility"] == needed["safety"] == examples_needed(half, 5, RELIABLE) > 10
    (sentence,) = summary.warnings()
    assert f"is {value:.2f} with 10 utility and 10 safety examples" in sentence
    assert f"about {needed['utility']} utility and {needed['safety']} safety examples" in sentence


def test_no_number_is_named_when_halves_do_not_agree_at_all() -> None:
    _, summary = reliability(measurements(0), seed=0, n_resamples=5)
    half = summary.split_half.columns["conflict_score"]
    opposed = replace(
        summary,
        split_half=replace(
            summary.split_half,
            columns={**summary.split_half.columns, "conflict_score": replace(half, half=-0.2, full=-0.2)},
        ),
    )
    assert opposed.examples_needed() is None
    (sentence,) = opposed.warnings()
    assert "is -0.20 with 20 utility and 14 safety examples" in sentence
    assert "no number of examples" in sentence


@pytest.mark.parametrize("measure", ["decision", "margin"])
def test_heads_that_are_all_alike_have_no_reliability(measure: str) -> None:
    m = measurements(3, n_heads=1, n=(203, 64), chunks=(9, 8), measure=measure)

    def repeated(pairs: Any) -> Pairs:
        return Pairs(pairs.baseline_N, pairs.ablated_HN.repeat(101, axis=0))

    alike = changed(
        m,
        gram_HCC=m.domains[0].gram_HCC.repeat(101, axis=0),
        utility=repeated(m.domains[0].utility),
        safety=repeated(m.safety),
    )
    columns, summary = reliability(alike, seed=0, n_resamples=40, n_splits=7)
    assert {(a.half, a.full, a.n_splits) for a in summary.split_half.columns.values()} == {(None, None, 0)}
    assert set(summary.tie_shares.values()) == {1.0}
    np.testing.assert_array_equal(columns["functional_sensitivity_low"], 1)
    np.testing.assert_array_equal(columns["functional_sensitivity_high"], 1)
    (sentence,) = summary.warnings()
    assert "undefined with 203 utility and 64 safety examples" in sentence
    json.dumps(summary.to_json(), allow_nan=False)


def test_a_column_that_is_constant_in_some_splits_only_counts_in_the_others() -> None:
    n_heads = 5
    ablated_HN = np.zeros((n_heads, 4))
    ablated_HN[:2, :2] = 1  # defined only if the two examples that differ are in different halves: 2 of 3 splits
    m = changed(measurements(0, n_heads=n_heads, n=(4, 6)), utility=Pairs(np.zeros(4), ablated_HN))
    agreement = split_half(m, n_splits=200, seed=0).columns["utility_shift"]
    assert agreement.half == pytest.approx(1)
    assert 110 < agreement.n_splits < 155


@pytest.mark.parametrize("n_heads", [1, 2, 3])
def test_the_smallest_data_are_answered(n_heads: int) -> None:
    m = measurements(0, n_heads=n_heads, n=(2, 2), chunks=(2, 2), measure="margin")
    columns, summary = reliability(m, seed=0, n_resamples=20, n_splits=4)
    assert all(np.isfinite(values_H).all() for values_H in columns.values())
    assert summary.zones.safe is None, "no head is in the lowest of four buckets"
    assert summary.zones.risky_by_chance is not None
    if n_heads == 1:
        assert summary.of_score is None
    json.dumps(summary.to_json(), allow_nan=False)


def test_one_resample_and_one_split_are_enough() -> None:
    columns, _ = reliability(measurements(0), seed=0, n_resamples=1, n_splits=1)
    np.testing.assert_array_equal(columns["conflict_score_low"], columns["conflict_score_high"])
    with pytest.raises(ValueError, match="n_resamples is 0"):
        bootstrap(measurements(0), n_resamples=0, seed=0)
    with pytest.raises(ValueError, match="n_splits is 0"):
        split_half(measurements(0), n_splits=0, seed=0)


@pytest.mark.parametrize("scale", [1e-300, 1e-12, 1e12])
def test_margins_of_any_size_are_summed(scale: float) -> None:
    m = measurements(0, measure="margin")
    scaled = changed(m, utility=Pairs(m.domains[0].utility.baseline_N * scale, m.domains[0].utility.ablated_HN * scale))
    found, plain = (x.columns(x.whole)["utility_shift"] for x in (scaled, m))
    np.testing.assert_allclose(found / scale, plain, rtol=1e-12)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"measure": "accuracy"}, "measure 'accuracy'; accepted are decision, margin"),
        ({"sensitivity_rank": "ratio"}, "sensitivity_rank 'ratio'; accepted are .*of-difference"),
        ({"combination": "best"}, "combination 'best'; accepted are mean, worst"),
        ({"n_safety": 1}, "1 of 9 chunks are of the safety loss"),
        ({"n_safety": 8}, "8 of 9 chunks"),
        ({"utility": Pairs(np.zeros(1), np.zeros((12, 1)))}, "utility: 1 examples"),
        ({"safety": Pairs(np.zeros(5), np.zeros((12, 4)))}, r"safety: 5 examples, ablated_HN of shape \(12, 4\)"),
        ({"measure": "margin", "safety": Pairs(np.zeros(5), np.full((12, 5), NAN))}, "safety: margins"),
    ],
)
def test_measurements_that_do_not_fit_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        changed(measurements(0), **change)
