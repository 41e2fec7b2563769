"""What chance would do: the cost of random heads, and the cost of the buckets in any other order. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from castune.stats.distributions import Interval, clopper_pearson
from castune.stats.ranking import orders


@dataclass(frozen=True)
class NullPosition:
    """Where the cost of a zone lies among those of random selections of as many heads.

    Attributes:
        lower: random selections that cost less.
        equal: that cost the same.
        higher: that cost more.
        percentile: share of random selections that cost less, of equal ones half; None without any, or without a cost.
        interval: exact 95 % interval of the share of all random selections that cost less (Clopper and Pearson); equal
            ones may belong to either side.
        n_gainless: of the higher ones, those whose safety did not rise: a cost without bound.
        p: two-sided p-value, min(1, 2 min(1 + lower + equal, 1 + higher + equal) / (n + 1)): the zone counts as one
            of the random selections, so that it is never 0, and at least 2 / (n + 1).
        n: random selections with a cost.
        n_undefined: random selections left out, for nothing is known of their cost.
    """

    lower: int
    equal: int
    higher: int
    percentile: float | None
    interval: Interval | None
    p: float | None
    n: int
    n_undefined: int
    n_gainless: int = 0


def null_position(cost: float | None, random_costs: Sequence[float | None], *, n_gainless: int = 0) -> NullPosition:
    """Place of a zone's cost in the distribution of trained random selections of the same number of heads.

    The paper compares with one random selection (Section 4.2); one cannot tell how unusual a zone is. Compare like with
    like: the cost of one training with those of one training each, or means over as many seeds.

    Args:
        cost: of the zone; None = undefined.
        random_costs: of the random selections; None = unknown.
        n_gainless: further random selections that gained no safety, so that their cost ratio has no bound.

    Raises:
        ValueError: a cost is not finite.
    """
    defined = [value for value in random_costs if value is not None]
    if not all(math.isfinite(value) for value in (*defined, 0.0 if cost is None else cost)):
        raise ValueError("costs must be finite; an undefined cost is None")
    n, n_undefined = len(defined) + n_gainless, len(random_costs) - len(defined)
    if cost is None or n == 0:
        return NullPosition(0, 0, 0, None, None, None, n, n_undefined, n_gainless)
    lower, equal = sum(value < cost for value in defined), sum(value == cost for value in defined)
    higher = n - lower - equal
    p = min(1.0, 2 * (1 + equal + min(lower, higher)) / (n + 1))
    interval = clopper_pearson(lower, n, at_most=lower + equal)
    return NullPosition(lower, equal, higher, (lower + equal / 2) / n, interval, p, n, n_undefined, n_gainless)


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
