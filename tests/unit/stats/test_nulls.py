"""What chance does: against every way it can come out, by theorem, and how often its p-values are small by chance."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from castune.stats.nulls import NullPosition, Stratum, null_position, order_p

# Few values, for many ties; the infinite ones gained no safety.
COSTS = st.sampled_from([0.0, 1.0, 2.0, 3.0, math.inf])
BOUNDED = COSTS.filter(math.isfinite)
STRATA, STRATA_OF_BOUNDED = (
    st.lists(st.builds(Stratum, costs, st.lists(costs, min_size=1, max_size=4)), min_size=1, max_size=3)
    for costs in (COSTS, BOUNDED)
)


def one(cost: float | None, random_costs: Sequence[float | None]) -> NullPosition:
    """The place with one seed."""
    return null_position([Stratum(cost, random_costs)])


def p_of(found: NullPosition) -> float:
    assert found.p is not None
    return found.p


def unusual_p_of(found: NullPosition) -> float:
    assert found.p_unusual is not None
    return found.p_unusual


# -- one seed


def test_place_among_random_selections() -> None:
    found = one(0.5, [0.1, 0.2, 0.5, 0.6, 0.9, None])
    assert (found.lower, found.equal, found.higher, found.n, found.n_undefined) == (2, 1, 2, 5, 1)
    assert found.percentile == 0.5
    assert found.p == 1.0
    extreme = one(0.0, [float(i) for i in range(1, 40)])
    assert extreme.p == extreme.p_least == 2 / 40
    assert extreme.interval == pytest.approx((0, scipy.stats.binomtest(0, 39).proportion_ci().high))


@given(COSTS, st.lists(COSTS, min_size=1, max_size=12))
def test_with_one_seed_p_counts_who_is_as_extreme(cost: float, random_costs: list[float]) -> None:
    found = one(cost, random_costs)
    as_low, as_high = (sum(map(as_extreme, [cost, *random_costs])) for as_extreme in (cost.__ge__, cost.__le__))
    assert found.p == found.p_unusual == min(1.0, 2 * min(as_low, as_high) / (len(random_costs) + 1))


def test_what_gains_no_safety_is_the_dearest_zone_and_random_heads_alike() -> None:
    found = one(41.0, [*map(float, range(40)), *[math.inf] * 40])
    assert (found.lower, found.equal, found.higher, found.n, found.n_gainless, found.p) == (40, 0, 40, 80, 40, 1.0)
    gainless = one(math.inf, [*map(float, range(39)), math.inf])
    assert (gainless.lower, gainless.equal, gainless.higher, gainless.n_seeds_gainless) == (39, 1, 0, 1)
    assert gainless.p == 2 * 2 / 41


def test_what_is_not_known_is_left_out_and_counted() -> None:
    for found in (one(None, [1.0, 2.0]), one(1.0, [None, None]), one(1.0, []), null_position([])):
        assert (found.percentile, found.interval, found.p, found.p_least, found.p_unusual) == (None,) * 5
        assert found.n == found.n_seeds == 0
    for wrong in (math.nan, -math.inf):
        with pytest.raises(ValueError, match="finite"):
            one(wrong, [1.0])
        with pytest.raises(ValueError, match="finite"):
            one(1.0, [wrong])
    kept = [Stratum(1.0, [0.0, 2.0, 3.0]), Stratum(2.0, [3.0, math.inf])]
    more = [Stratum(None, [1.0, None]), Stratum(1.0, [None]), *kept, Stratum(1.0, [])]
    found = null_position(more)
    assert (found.n, found.n_seeds, found.n_undefined, found.n_seeds_left_out) == (5, 2, 1, 1)
    assert replace(found, n_undefined=0, n_seeds_left_out=0) == null_position(kept)


# -- several seeds


def test_two_seeds_by_hand() -> None:
    # Nine ways: the zone is the cheapest of three with both seeds in one of them.
    cheapest = null_position([Stratum(0.0, [1.0, 2.0]), Stratum(5.0, [6.0, 7.0])])
    assert (cheapest.lower, cheapest.higher, cheapest.n, cheapest.n_seeds) == (0, 4, 4, 2)
    assert cheapest.p == cheapest.p_least == 2 / 9
    assert cheapest.p_unusual == 2 / 5
    assert cheapest.percentile == 0
    assert cheapest.interval is None, "there is no one share of random selections that cost less"
    # Sums of ranks 0, 1, 2, 3, 4 in 1, 2, 3, 2, 1 of the ways.
    second = null_position([Stratum(0.0, [1.0, 2.0]), Stratum(6.5, [6.0, 7.0])])
    assert second.p == 2 * 3 / 9
    # What a seed does to all costs alike is nobody's.
    assert null_position([Stratum(0.0, [1.0, 2.0]), Stratum(65.0, [60.0, 70.0])]) == second


@settings(max_examples=300, deadline=None)
@given(STRATA)
def test_p_is_that_of_all_ways_to_take_a_cost_of_every_seed(strata: list[Stratum]) -> None:
    midranks = [scipy.stats.rankdata([cost, *costs]) for cost, costs in strata]  # type: ignore[list-item]
    sums = [sum(way) for way in itertools.product(*midranks)]
    observed = sums[0]
    tails = [Fraction(sum(ok(total, observed) for total in sums), len(sums)) for ok in (float.__le__, float.__ge__)]
    found = null_position(strata)
    assert found.p == float(min(Fraction(1), 2 * min(tails)))
    assert found.p_least == min(1.0, 2 / len(sums))
    assert 0 < found.p_least <= found.p
    assert found.n == sum(len(costs) for _, costs in strata)


@given(STRATA_OF_BOUNDED)
def test_only_order_within_a_seed_counts_and_dear_is_the_mirror_of_cheap(strata: list[Stratum]) -> None:
    found = null_position(strata)
    cubes = [
        Stratum(100 * seed + cost**3, [100 * seed + one**3 for one in costs])  # type: ignore[operator]
        for seed, (cost, costs) in enumerate(strata)
    ]
    assert null_position(cubes[::-1]) == found
    mirrored = null_position([Stratum(-cost, [-one for one in costs]) for cost, costs in strata])  # type: ignore[operator]
    assert (mirrored.lower, mirrored.equal, mirrored.higher) == (found.higher, found.equal, found.lower)
    assert (mirrored.p, mirrored.p_unusual) == (found.p, found.p_unusual)


@given(st.lists(st.tuples(st.integers(1, 6), st.integers(0, 6)), min_size=1, max_size=4), st.integers(0, 3))
def test_the_cheaper_a_cheap_zone_the_smaller_its_p(sizes: list[tuple[int, int]], place: int) -> None:
    sizes = [(n, min(n, rank)) for n, rank in sizes]
    place %= len(sizes)

    def zone(lower_by: int) -> NullPosition:
        ranks = [max(0, rank - lower_by * (i == place)) for i, (_, rank) in enumerate(sizes)]
        return null_position([Stratum(r - 0.5, list(range(n))) for r, (n, _) in zip(ranks, sizes, strict=True)])

    if zone(0).lower <= zone(0).higher:
        assert p_of(zone(1)) <= p_of(zone(0))
        assert unusual_p_of(zone(1)) <= unusual_p_of(zone(0))
        assert p_of(zone(0)) <= unusual_p_of(zone(0)), "the second asks for more"


# -- how often p is small by chance


def drawn_places(
    n_zones: int, *, common: float, typical: bool = False, seed: int = 0, sizes: Sequence[int] = (14, 13, 13)
) -> list[NullPosition]:
    """Zones among random selections: `common` is the share of the variance of costs that a set of heads has in common
    with every seed. The zone is one such set, or a `typical` one in the middle of them."""
    rng = np.random.default_rng(seed)
    of_heads, of_training = math.sqrt(common), math.sqrt(1 - common)

    def places() -> NullPosition:
        zone = 0.0 if typical else of_heads * rng.normal()
        strata = []
        for n in sizes:
            level = 10 * rng.normal()  # of the seed
            costs = level + of_heads * rng.normal(size=n) + of_training * rng.normal(size=n)
            strata.append(Stratum(level + zone + of_training * rng.normal(), costs.tolist()))
        return null_position(strata)

    return [places() for _ in range(n_zones)]


def is_at_most(share: float, level: float, n: int) -> bool:
    """Whether a simulated share is no more than the level, up to four of its standard errors."""
    return share <= level + 4 * math.sqrt(level * (1 - level) / n)


@pytest.mark.parametrize("sizes", [(19,), (4, 4, 4), (14, 13, 13), (6, 2, 1, 1)])
def test_a_zone_that_costs_what_random_heads_do_is_seldom_told_from_them(sizes: tuple[int, ...]) -> None:
    n = 1500
    p = np.array([p_of(found) for found in drawn_places(n, common=0.0, sizes=sizes)])
    for level in (0.05, 0.1, 0.2, 0.5):
        assert is_at_most(float(np.mean(p <= level + 1e-12)), level, n)
    # Of random selections that differ, one in the middle is told from them still more seldom.
    p = np.array([p_of(found) for found in drawn_places(n, common=0.5, typical=True, sizes=sizes)])
    assert is_at_most(float(np.mean(p <= 0.05)), 0.05, n)


@pytest.mark.parametrize("common", [0.0, 0.3, 0.7, 1.0])
def test_a_random_selection_is_seldom_unusual_whatever_its_trainings_have_in_common(common: float) -> None:
    n = 1500
    found = drawn_places(n, common=common)
    for level in (0.05, 0.1, 0.2):
        assert is_at_most(float(np.mean([unusual_p_of(place) <= level + 1e-12 for place in found])), level, n)


def test_a_random_selection_is_often_told_from_the_others_where_selections_differ() -> None:
    """Why there are two p-values: heads that are cheap with one seed are so with the next."""
    assert np.mean([p_of(place) <= 0.05 for place in drawn_places(1500, common=0.5)]) > 0.12


def test_a_random_zone_is_as_often_unusual_as_its_p_says() -> None:
    n = 1500
    p = np.array([p_of(found) for found in drawn_places(n, common=0.4, sizes=(19,))])
    for level in (0.1, 0.2, 0.5):
        assert abs(np.mean(p <= level + 1e-12) - level) < 4 * math.sqrt(level * (1 - level) / n)


# -- the order of buckets


def test_order_of_four_buckets_by_hand() -> None:
    assert order_p([1.2, 0.9, 0.7, 0.5], [0.4, 0.3, 0.2, 0.1]) == 1 / 24
    assert order_p([1.2, 0.9, 0.7, 0.5], [0.3, 0.4, 0.2, 0.1]) == 4 / 24, "one pair out of order: three such orders"
    assert order_p([1.2, 0.9, 0.7, 0.5], [0.1, 0.2, 0.3, 0.4]) == 1


def test_order_is_kendalls_exact_test() -> None:
    for seed in range(5):
        x, y = np.random.default_rng(seed).normal(size=(2, 7))
        expected = scipy.stats.kendalltau(x, y, method="exact", alternative="greater")
        assert order_p(x, y.tolist()) == pytest.approx(expected.pvalue)
    x, y = np.random.default_rng(1).normal(size=(2, 10))
    expected = scipy.stats.kendalltau(x, y, method="exact", alternative="greater")
    assert order_p(x, y.tolist()) == pytest.approx(expected.pvalue, abs=0.02)


def test_order_of_nothing() -> None:
    assert order_p([3], [1.0]) is None
    assert order_p([], []) is None
    assert order_p([1, 1, 1], [1.0, 2.0, 3.0]) is None
    with pytest.raises(ValueError, match="finite"):
        order_p([1, math.nan], [1.0, 2.0])
