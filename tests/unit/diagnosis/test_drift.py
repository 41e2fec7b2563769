"""Drift against its definition by slow loops, against what is known of simple maps, and against simulated noise."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats

from castune.diagnosis.drift import drift, kept_heads, noise_ceiling, zone_changes, zone_of
from castune.diagnosis.measurements import COLUMNS, Domain, Measurements
from castune.diagnosis.reliability import random_halves, reliability
from castune.diagnosis.score import conflict_from_gram, conflict_score, functional_sensitivity, margin_shift
from castune.stats.ranking import bucket_numbers

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Pairs:
    baseline_N: Floats
    ablated_HN: Floats


def gram(parts_HCP: Floats) -> Floats:
    return np.einsum("hcp,hdp->hcd", parts_HCP, parts_HCP)


@dataclass(frozen=True)
class Heads:
    """What heads truly are: gradient directions, and how much hangs on each."""

    safety_HP: Floats
    utility_HP: Floats
    sizes_2H: Floats

    @classmethod
    def random(cls, n_heads: int, seed: int) -> Heads:
        rng = np.random.default_rng(seed)
        return cls(*rng.normal(size=(2, n_heads, 6)), 0.8 * rng.normal(size=(2, n_heads)))

    def mixed(self, other: Heads, share: float) -> Heads:
        """These heads moved towards others; at share 1 nothing of them is left."""
        keep = math.sqrt(1 - share**2)
        pairs = zip(vars(self).values(), vars(other).values(), strict=True)
        return Heads(*(keep * mine + share * theirs for mine, theirs in pairs))


def measured(heads: Heads, *, n: int, seed: int, noise: float = 1.0, own: float = 0.0, chunks: int = 6) -> Measurements:
    """Margins and gradients of `n` examples, which are those of the seed; `own` is noise beside that of the examples."""
    shared, mine, n_heads = np.random.default_rng(seed), np.random.default_rng(seed + 10**6), len(heads.safety_HP)

    def normal(*shape: int) -> Floats:
        return noise * shared.normal(size=shape) + own * mine.normal(size=shape)

    means_HCP = np.concatenate([g[:, None].repeat(chunks, 1) for g in (heads.safety_HP, heads.utility_HP)], 1)
    parts_HCP = means_HCP + 2 * math.sqrt(chunks / n) * normal(n_heads, 2 * chunks, 6)
    pairs = [Pairs(np.zeros(n), np.exp(size_H[:, None] + normal(n_heads, n))) for size_H in heads.sizes_2H]
    return Measurements(
        domains=[Domain(gram(parts_HCP), pairs[0])],
        n_safety=chunks,
        safety=pairs[1],
        measure="margin",
        sensitivity_rank="difference",
    )


def reordered(m: Measurements, order: Sequence[int]) -> Measurements:
    (domain,) = m.domains
    utility = Pairs(domain.utility.baseline_N, domain.utility.ablated_HN[order])
    safety = Pairs(m.safety.baseline_N, m.safety.ablated_HN[order])
    return replace(m, domains=[Domain(domain.gram_HCC[order], utility)], safety=safety)


FIRST = measured(Heads.random(40, 0), n=24, seed=1)
FAST: dict[str, Any] = {"seed": 3, "n_splits": 8, "n_resamples": 30}


# -- what is known beforehand


@pytest.mark.parametrize("n_heads", [3, 17, 270])
def test_a_map_has_not_drifted_from_itself(n_heads: int) -> None:
    # Little noise: with much of it three heads have no order at all.
    m = measured(Heads.random(n_heads, 0), n=24, seed=1, noise=0.1)
    found = drift(m, m, **FAST)
    for name, column in found.columns.items():
        assert column.spearman == pytest.approx(1, abs=1e-12), name
        assert column.corrected == pytest.approx(1, abs=1e-12)
        assert (column.corrected_low, column.corrected_high) == (pytest.approx(1), pytest.approx(1))
        assert not column.is_seen
        assert column.ceiling == column.reliability_first == column.reliability_now
    for zone in found.zones.values():
        assert zone.kept == zone.size
        assert zone.halves_across == zone.halves_first == zone.halves_now


def test_a_scale_is_no_drift() -> None:
    """Ranks and directions do not see how large gradients and shifts are."""
    (domain,) = FIRST.domains
    scaled = replace(
        FIRST,
        domains=[Domain(9 * domain.gram_HCC, Pairs(domain.utility.baseline_N, 5 * domain.utility.ablated_HN))],
        safety=Pairs(FIRST.safety.baseline_N, 0.1 * FIRST.safety.ablated_HN),
    )
    assert all(column.corrected == pytest.approx(1) for column in drift(FIRST, scaled, **FAST).columns.values())


def test_a_reversed_map_has_minus_one() -> None:
    """Heads whose shifts are known without noise, in one order and in the opposite one."""
    size_H = np.exp(np.linspace(-1, 1, 20))
    rng = np.random.default_rng(0)
    parts_HCP = rng.normal(size=(20, 12, 6))

    def of(order_H: Floats) -> Measurements:
        pairs = Pairs(np.zeros(10), order_H[:, None].repeat(10, 1))
        return Measurements(
            domains=[Domain(gram(parts_HCP), pairs)], n_safety=6, safety=Pairs(np.zeros(10), np.ones((20, 10))),
            measure="margin", sensitivity_rank="difference",
        )  # fmt: skip

    found = drift(of(size_H), of(size_H[::-1]), **FAST).columns
    for name in ("utility_shift", "functional_sensitivity"):
        column = found[name]
        assert (column.spearman, column.corrected) == (pytest.approx(-1), pytest.approx(-1))
        assert (column.corrected_high, column.ceiling) == (pytest.approx(-1), pytest.approx(1))
        assert column.is_seen
    assert found["optimization_conflict"].spearman == pytest.approx(1)
    # All heads tie: no order, hence no correlation, and nothing that can be told.
    assert set(vars(found["safety_shift"]).values()) == {None}
    assert found["safety_shift"].is_seen is None


@pytest.mark.parametrize("seed", range(4))
def test_the_order_in_which_heads_stand_does_not_matter(seed: int) -> None:
    order = np.random.default_rng(seed).permutation(40).tolist()
    later = measured(Heads.random(40, 9), n=24, seed=1)
    small: dict[str, Any] = {"seed": 3, "n_splits": 3, "n_resamples": 2}
    one, other = drift(FIRST, later, **small), drift(reordered(FIRST, order), reordered(later, order), **small)
    for name in COLUMNS:
        for mine, theirs in zip(vars(one.columns[name]).values(), vars(other.columns[name]).values(), strict=True):
            assert mine == (None if theirs is None else pytest.approx(theirs, abs=1e-9))
    assert one.zones == other.zones


def test_both_ways_are_the_same() -> None:
    later = measured(Heads.random(40, 9), n=24, seed=1)
    there, back = drift(FIRST, later, **FAST).columns, drift(later, FIRST, **FAST).columns
    for name in COLUMNS:
        assert there[name].corrected == pytest.approx(back[name].corrected)
        assert there[name].corrected_low == pytest.approx(back[name].corrected_low)
        assert there[name].reliability_first == back[name].reliability_now


def test_the_seed_alone_decides() -> None:
    later = measured(Heads.random(40, 9), n=24, seed=1)
    assert drift(FIRST, later, **FAST) == drift(FIRST, later, **FAST)
    assert drift(FIRST, later, **FAST) != drift(FIRST, later, **{**FAST, "seed": 4})


def test_other_examples_are_refused() -> None:
    with pytest.raises(ValueError, match="not the same"):
        drift(FIRST, measured(Heads.random(40, 0), n=25, seed=1), **FAST)


# -- against the definition


def slow_columns(m: Measurements, sets: Sequence[NDArray[np.int64]]) -> dict[str, Floats]:
    """The columns by `score.py` on the examples and chunks of one half."""
    utility, safety, utility_chunks, safety_chunks = sets
    (domain,) = m.domains
    order = [*safety_chunks, *(m.n_safety + utility_chunks)]
    conflict_H = conflict_from_gram(domain.gram_HCC[:, order][:, :, order], len(safety_chunks))
    utility_H = margin_shift(domain.utility.ablated_HN[:, utility], domain.utility.baseline_N[utility])[0]
    safety_H = margin_shift(m.safety.ablated_HN[:, safety], m.safety.baseline_N[safety])[0]
    sensitivity_H = functional_sensitivity(utility_H, safety_H)
    values = (conflict_H, utility_H, safety_H, sensitivity_H, conflict_score(conflict_H, sensitivity_H))
    return dict(zip(COLUMNS, values, strict=True))


def test_the_corrected_correlation_is_that_of_the_definition() -> None:
    later = measured(Heads.random(40, 0).mixed(Heads.random(40, 9), 0.5), n=24, seed=1, own=0.5)
    found = drift(FIRST, later, **FAST)
    rng, halves = np.random.default_rng(FAST["seed"]), []
    for size in FIRST.sizes:
        halves.append([[weights.nonzero()[0] for weights in half] for half in random_halves(size, 8, rng)])
    for name in COLUMNS:
        across, within_first, within_later, zones = [], [], [], []
        for split in range(8):
            a, b = ([half[side][split] for half in halves] for side in (0, 1))
            first_a, first_b, later_a, later_b = (
                slow_columns(m, side)[name] for m in (FIRST, later) for side in (a, b)
            )
            across += [stats.spearmanr(first_a, later_b)[0], stats.spearmanr(first_b, later_a)[0]]
            within_first.append(stats.spearmanr(first_a, first_b)[0])
            within_later.append(stats.spearmanr(later_a, later_b)[0])
            zones += [jaccard(first_a, later_b), jaccard(first_b, later_a)]
        wanted = np.mean(across) / np.sqrt(np.mean(within_first) * np.mean(within_later))
        assert found.columns[name].corrected == pytest.approx(wanted)
        if name == "conflict_score":
            assert found.zones["safe"].halves_across == pytest.approx(np.mean(zones))


def jaccard(one_H: Floats, other_H: Floats) -> float:
    one, other = (set(np.flatnonzero(bucket_numbers(values_H) == 4)) for values_H in (one_H, other_H))
    return len(one & other) / len(one | other)


def test_the_reliabilities_are_those_the_map_states() -> None:
    _, stated = reliability(FIRST, seed=7, n_resamples=2)
    found = drift(FIRST, FIRST, seed=7, n_resamples=2)
    for name in COLUMNS:
        assert found.columns[name].reliability_first == pytest.approx(stated.split_half.columns[name].full)
    assert found.zones["risky"].halves_first == stated.split_half.zones.risky


@pytest.mark.parametrize(
    ("pair", "ceiling"), [((0.25, 1.0), 0.5), ((0.64, 0.64), 0.64), ((0.5, 0.0), None), ((None, 0.5), None), ((-0.1, -0.1), None)]
)  # fmt: skip
def test_the_noise_ceiling(pair: tuple[float | None, float | None], ceiling: float | None) -> None:
    assert noise_ceiling(*pair) == (None if ceiling is None else pytest.approx(ceiling))


# -- against noise


def test_noise_the_maps_have_in_common_hides_drift_from_the_plain_correlation_and_not_from_the_corrected_one() -> None:
    before, n_heads = Heads.random(120, 20), 120
    after = before.mixed(Heads.random(n_heads, 21), 0.6)
    unchanged = drift(*(measured(before, n=48, seed=2, own=own) for own in (0.0, 0.3)), seed=0, n_resamples=60).columns
    changed = drift(measured(before, n=48, seed=2), measured(after, n=48, seed=2), seed=0, n_resamples=60).columns
    for name in COLUMNS:
        # Both lie above, or not far below, what unchanged models measured on other examples would have.
        assert unchanged[name].spearman > unchanged[name].ceiling > 0
        assert not unchanged[name].is_seen
        assert unchanged[name].corrected == pytest.approx(1, abs=0.08)
        assert changed[name].is_seen, name
        assert changed[name].corrected < 0.9


def test_a_model_of_which_nothing_is_left() -> None:
    found = drift(
        measured(Heads.random(200, 1), n=48, seed=2),
        measured(Heads.random(200, 5), n=48, seed=2),
        seed=0,
        n_resamples=60,
    )
    for name in ("optimization_conflict", "utility_shift", "safety_shift"):
        column = found.columns[name]
        assert column.corrected_low is not None
        assert column.corrected_high is not None
        assert column.corrected_low < 0.1
        assert column.corrected_high < 0.5
    safe = found.zones["safe"]
    assert abs(safe.kept - safe.by_chance) < 12


def test_pure_noise_has_no_interval() -> None:
    """The interval would be that of the splits in which halves happen to agree."""
    heads = Heads(np.zeros((60, 6)), np.zeros((60, 6)), np.zeros((2, 60)))
    found = drift(measured(heads, n=12, seed=2), measured(heads, n=12, seed=2, own=1.0), seed=0, n_resamples=40)
    for column in found.columns.values():
        assert (column.corrected_low, column.corrected_high, column.is_seen) == (None, None, None)


def test_decisions_with_unscored_examples_and_the_smallest_sets() -> None:
    rng = np.random.default_rng(0)

    def of(seed: int) -> Measurements:
        r = np.random.default_rng(seed)
        pairs = [Pairs(r.integers(0, 2, n).astype(float), r.integers(0, 2, (9, n)).astype(float)) for n in (2, 3)]
        pairs[1].ablated_HN[0] = np.nan
        parts_HCP = rng.normal(size=(9, 4, 3))
        return Measurements(
            domains=[Domain(gram(parts_HCP), pairs[0])], n_safety=2, safety=pairs[1], measure="decision",
            sensitivity_rank="difference",
        )  # fmt: skip

    found = drift(of(1), of(2), **FAST)
    for column in found.columns.values():
        assert all(value is None or math.isfinite(value) for value in vars(column).values())


# -- zones


SCORES = st.lists(st.floats(0, 3) | st.sampled_from([0.0, 1.0]), min_size=1, max_size=40)


@settings(deadline=None)  # a busy machine is no failure
@given(SCORES, st.randoms(use_true_random=False))
def test_changes_are_all_heads_in_another_zone_and_no_other(scores: list[float], random: Any) -> None:
    before_H, now_H = np.array(scores), np.array(random.sample(scores, len(scores)))
    heads = [(i // 4, i % 4) for i in range(len(scores))]
    changes = zone_changes(heads, before_H, now_H)
    names = {1: "risky", 2: "middle", 3: "middle", 4: "safe"}
    wanted = {
        (heads[i], names[a], names[b])
        for i, (a, b) in enumerate(zip(bucket_numbers(before_H), bucket_numbers(now_H), strict=True))
        if names[a] != names[b]
    }
    assert {((c.layer, c.head), c.before, c.now) for c in changes} == wanted
    assert len(changes) == len(wanted)
    for c in changes:
        i = heads.index((c.layer, c.head))
        assert (c.score_before, c.score_now) == (before_H[i], now_H[i])
    crossing = ["middle" not in (c.before, c.now) for c in changes]
    assert crossing == sorted(crossing, reverse=True)
    assert zone_changes(heads, before_H, before_H) == ()
    # Zones do not change their sizes: as many heads leave as enter.
    assert sum(c.before == "safe" for c in changes) == sum(c.now == "safe" for c in changes)


def test_a_reversed_order_exchanges_the_zones() -> None:
    score_H = np.linspace(0, 1, 40)
    changes = zone_changes([(0, i) for i in range(40)], score_H, score_H[::-1])
    assert [(c.before, c.now) for c in changes] == [("safe", "risky")] * 10 + [("risky", "safe")] * 10
    assert zone_of(score_H).count("middle") == 20


def test_kept_heads() -> None:
    assert kept_heads([(0, 1), (0, 2), (1, 0)], [(1, 0), (0, 1), (2, 2)], 12) == {
        "heads": 3,
        "kept": 2,
        "by_chance": 0.75,
    }
