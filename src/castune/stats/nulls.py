"""What chance would do: the cost of random heads, and the cost of the buckets in any other order. Pure."""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from castune.stats.distributions import Interval, clopper_pearson
from castune.stats.ranking import orders


class Stratum(NamedTuple):
    """A zone beside random selections of as many heads, all trained with one seed: they differ in their heads alone.

    Attributes:
        cost: of the zone; None = unknown, infinite = it gained no safety, so that its cost has no bound.
        random_costs: of the random selections, alike.
    """

    cost: float | None
    random_costs: Sequence[float | None]


@dataclass(frozen=True, kw_only=True)
class NullPosition:
    """Where the costs of a zone lie among those of random selections of as many heads, over one or several seeds.

    Two p-values answer two questions, as the heads of a zone are the same with every seed, and what is peculiar to them
    is in all its costs. With one seed they are equal.

    - `p`: do these heads cost what random ones do? Exact for costs that, but for the seed, come about by chance anew in
      every training; it errs on the safe side for a zone that costs what random selections typically do, where these
      differ in cost among themselves.
    - `p_unusual`: would a random selection, trained with as many seeds, seldom have such a place? It then brings its
      peculiarity into every stratum, and `p` counts one surprise as several: of zones that are drawn at random from
      selections that differ, far more than 5 % have `p` below 0.05 (docs/study.md).

    Attributes:
        lower: random selections that cost less than the zone with their seed.
        equal: that cost the same.
        higher: that cost more.
        percentile: share of random selections that cost less, of equal ones half, over all seeds; None without any.
        interval: exact 95 % interval of the share of all random selections that cost less (Clopper and Pearson); equal
            ones may belong to either side. With one seed only: over several the zone has a cost of its own in each, so
            that there is no one share that it would be an interval of.
        p: two-sided, from the sum over seeds of the zone's midrank, where within every seed any of the costs could as
            well be the zone's, independently of other seeds. Never 0: the zone counts as one of them.
        p_least: the smallest p that so many random selections can give: 2 / product of (selections of a seed + 1).
        p_unusual: two-sided, min(1, 2 min(1 + lower + equal, 1 + higher + equal) / (n + 1)): the place of one random
            selection more among all, whatever its costs with different seeds have in common; at least 2 / (n + 1).
        n: random selections with a cost, with seeds in which the zone has one too.
        n_seeds: seeds that have both.
        n_undefined: random selections left out, for nothing is known of their cost.
        n_seeds_left_out: seeds left out, for nothing is known of the zone's cost.
        n_gainless: of the random selections, those whose safety did not rise: a cost without bound, above all others.
        n_seeds_gainless: seeds in which the zone's own safety did not rise.
    """

    lower: int = 0
    equal: int = 0
    higher: int = 0
    percentile: float | None = None
    interval: Interval | None = None
    p: float | None = None
    p_least: float | None = None
    p_unusual: float | None = None
    n: int = 0
    n_seeds: int = 0
    n_undefined: int = 0
    n_seeds_left_out: int = 0
    n_gainless: int = 0
    n_seeds_gainless: int = 0


def null_position(strata: Sequence[Stratum]) -> NullPosition:
    """Place of a zone's costs in the distribution of trained random selections of the same number of heads.

    The paper compares with one random selection (Section 4.2); one cannot tell how unusual a zone is. Compare like with
    like: the cost of one training with those of one training each, with the same seed.

    Args:
        strata: a training seed each; every random selection in one of them, every stratum with trainings of the same
            zone.

    Raises:
        ValueError: a cost is neither finite nor positively infinite.
    """
    if any(
        cost is not None and (math.isnan(cost) or cost == -math.inf)
        for stratum in strata
        for cost in (stratum.cost, *stratum.random_costs)
    ):
        raise ValueError("costs must be finite, or infinite where no safety was gained; an unknown cost is None")
    known = [
        (stratum.cost, [cost for cost in stratum.random_costs if cost is not None])
        for stratum in strata
        if stratum.cost is not None
    ]
    compared = [(zone, costs) for zone, costs in known if costs]
    n = sum(len(costs) for _, costs in compared)
    found = NullPosition(
        n=n,
        n_seeds=len(compared),
        n_undefined=sum(len(stratum.random_costs) for stratum in strata if stratum.cost is not None) - n,
        n_seeds_left_out=len(strata) - len(known),
        n_gainless=sum(cost == math.inf for _, costs in compared for cost in costs),
        n_seeds_gainless=sum(zone == math.inf for zone, _ in compared),
    )
    if not n:
        return found
    lower = sum(cost < zone for zone, costs in compared for cost in costs)
    equal = sum(cost == zone for zone, costs in compared for cost in costs)
    higher = n - lower - equal
    ways = _ways([(zone, *costs) for zone, costs in compared])
    at_most, at_least = (
        sum(count for place, count in ways.items() if sign * place <= sign * (2 * lower + equal)) for sign in (1, -1)
    )
    return replace(
        found,
        lower=lower,
        equal=equal,
        higher=higher,
        percentile=(lower + equal / 2) / n,
        interval=clopper_pearson(lower, n, at_most=lower + equal) if len(compared) == 1 else None,
        p=min(1.0, 2 * min(at_most, at_least) / ways.total()),
        p_least=min(1.0, 2 / ways.total()),
        p_unusual=min(1.0, 2 * (1 + equal + min(lower, higher)) / (n + 1)),
    )


def _ways(strata: Sequence[Sequence[float]]) -> Counter[int]:
    """In how many of all ways to take one cost of every stratum these have a sum of midranks, by twice that sum.

    The midrank of a cost counts the others below it, and half of those that equal it.
    """
    found = Counter({0: 1})
    for costs in strata:
        ascending = sorted(costs)
        # A cost does not count itself.
        twice = Counter(bisect_left(ascending, cost) + bisect_right(ascending, cost) - 1 for cost in costs)
        longer: Counter[int] = Counter()
        for place, count in found.items():
            for midrank, times in twice.items():
                longer[place + midrank] += count * times
        found = longer
    return found


def order_p(scores: Sequence[float], costs: Sequence[float], *, seed: int = 0) -> float | None:
    """How likely is so good an order of M buckets if scores say nothing of costs?

    The share of all orders of the costs that agree with the scores at least as well (Kendall's statistic, one-sided,
    for the prediction has a direction): at least 1 / M!, of all orders up to M = 7. `scipy.stats.kendalltau` takes no
    ties into its exact test.

    Args:
        scores: mean score of every bucket.
        costs: its cost, best the mean over seeds.
        seed: of the random orders above M = 7.

    Returns:
        None where a side does not vary.

    Raises:
        ValueError: scores and costs differ in number, or one is not finite.
    """
    if len(scores) != len(costs):
        raise ValueError(f"scores and costs differ in number: {len(scores)} and {len(costs)}")
    x, y = np.asarray(scores, dtype=float), np.asarray(costs, dtype=float)
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise ValueError("scores and costs must be finite; leave undefined costs out")
    signs_x, signs_y = (np.sign(values[:, None] - values) for values in (x, y))
    if not (signs_x * signs_y).any():
        return None
    # The first order is the one observed.
    agreement = np.array([(signs_x * signs_y[np.ix_(order, order)]).sum() for order in orders(len(x), seed)])
    return float(np.mean(agreement >= agreement[0]))
