"""How many times as much one arm costs as another where both are equally safe, and what follows from it. Pure.

`stats.estimates.CostRatio` is another ratio: the cost of one arm over its own gain in safety (Eqs. 7-8).

Shape letter: R draw.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from castune.stats.distributions import ENDS, Interval
from castune.stats.equal_safety import CostDifference, cost_difference, cost_spread, drawn_ends, drawn_interval
from castune.stats.strength_curves import ArmCurves, Curve, Examples

Floats = NDArray[np.float64]
Reason = Literal["unreached", "costless", "undefined", "one-example", "no-variation"]


@dataclass(frozen=True)
class CostRatioAtSafety:
    """Cost of the first arm over that of the second at the target, and what planning a larger study needs.

    Attributes:
        value: None where an arm does not reach the target, or there is no ratio.
        interval: 95 %. Its upper end is infinite where the second arm may cost nothing or the first may not reach the
            target; its lower end is 0 where the second may not reach it.
        reason: why the value or the interval is None; None where both are known.
            `unreached`: an arm does not reach the target; if neither does in half of the draws there is no interval.
            `costless`: the second arm is measured to cost nothing, or less, so there is no ratio.
            `undefined`: so it is in more than 2.5 % of the draws for both arms, so there is no ratio.
            `one-example`: a suite has one example, which does not show how others would differ.
            `no-variation`: no draw differs from another: what did not occur cannot show how often it would.
        first_cost: measured cost of the first arm; None where it does not reach the target.
        second_cost: that of the second.
        undefined_share: share of all draws in which both arms cost nothing, or less, and that are left out.
        unreached_shares: share of all draws in which the first, and the second arm does not reach the target. Above
            2.5 % it takes the interval's upper end to infinity, or its lower end to 0.
        difference: cost of the first arm minus that of the second, as `equal_safety` has it.
        seeds_sd: standard deviation over seeds of the difference, paired, to first order around the means; None with
            one seed, and where an arm does not reach the target.
        items_se: standard error of the difference that the choice of prompts and items leaves however many seeds there
            are; with one seed, that of this seed. None where an arm does not reach the target, or a suite has one
            example.
        n_seeds: trainings of every arm.
        n_prompts: prompts with a safety under every arm, strength and seed.
        n_items: of every cost suite the items with a cost under every arm, strength and seed.
        target: the safety at which they are compared.
        draws: of the bootstrap.
    """

    value: float | None
    interval: Interval | None
    reason: Reason | None
    first_cost: float | None
    second_cost: float | None
    undefined_share: float
    unreached_shares: tuple[float, float]
    difference: CostDifference
    seeds_sd: float | None
    items_se: float | None
    n_seeds: int
    n_prompts: int
    n_items: tuple[int, ...]
    target: float
    draws: int

    @property
    def unbounded(self) -> tuple[bool, bool]:
        """Whether the first, and the second arm misses the target in so many draws that its cost has no bound."""
        first, second = (share > ENDS[0] for share in self.unreached_shares)
        return first, second


@dataclass(frozen=True)
class RatioVerdict:
    """What the interval of a ratio says.

    Attributes:
        is_seen: the first arm costs more, for the whole interval lies above.
        is_refuted: it does not cost so much more, for the whole interval lies below the larger ratio. May hold beside
            `is_seen`: more, but not so much more.
    """

    is_seen: bool
    is_refuted: bool

    @property
    def is_undecided(self) -> bool:
        """Neither; also where there is no interval."""
        return not (self.is_seen or self.is_refuted)


def cost_ratio(
    curves: Mapping[str, Curve], first: str, second: str, target: float, *, draws: int = 2000, seed: int = 0
) -> CostRatioAtSafety:
    """Cost of one arm over that of another at one safety, with a 95 % interval for other seeds and other examples.

    The draws are those of `equal_safety`; their spread is that of Fieller's contrast (1954), the first cost minus the
    measured ratio times the second, whose sign says on which side of the measured ratio a draw lies. The interval is
    the percentiles of the draws' ratios, so a cost near 0 below the line gives no narrow interval but one without an
    upper end: a draw in which only the first arm costs anything counts as infinite, one in which only the first
    reaches the target as 0.

    In simulated studies (`benchmarks/planted_truth.py`: 120 prompts, 50 items with skewed costs, sd of seeds = 15 % of
    the cost, 500 tries each) it held true ratios of 1, 1.5 and 2.1 in 95 % of the cases with eight seeds, and in 93 to
    95 % with three; a true ratio of 1 lay below it in 3 %. The spread of this contrast and that of the plain difference
    are each uncertain where seeds are few: at a true ratio of 1.5, in 1 % of 250 studies with eight seeds, and 7 % with
    three, one of the two intervals said that the first arm costs more and the other did not.

    Args:
        curves: of both arms and any others; all with the same examples, seeds and outcomes at strength 0. Examples
            that are not scored under every one of them are left out.
        first: name of the arm above the line.
        second: name of the arm below it.
        target: safety, in the unit of the outcomes (`equal_safety.common_target`).
        draws: of the bootstrap.
        seed: of the draws.

    Raises:
        ValueError: as `equal_safety`, or arms that are not two of the curves.
    """
    if first == second or not {first, second} <= curves.keys():
        raise ValueError(f"arms are {first!r} and {second!r}, accepted: two different ones of {', '.join(curves)}")
    if not math.isfinite(target):
        raise ValueError(f"the target is {target}, accepted: a finite safety")
    data = Examples.of(curves)
    drawn = data.draw(curves, draws, seed)
    pair = {name: drawn[name] for name in (first, second)}
    one, two = (float(arm.measured.at(target)[0][0]) for arm in pair.values())
    value = one / two if math.isfinite(one) and 0 < two < math.inf else None
    spread = cost_spread(data, pair, target, 1.0 if value is None else value)
    one_R, two_R = (arm.drawn(spread).at(target)[0] for arm in pair.values())
    undefined_share = float(((one_R <= 0) & (two_R <= 0)).mean())
    neither_share = float((np.isinf(one_R) & np.isinf(two_R)).mean())
    interval: Interval | None = None
    reason: Reason | None = None
    if two <= 0 or undefined_share > ENDS[0]:
        value, reason = None, "costless" if two <= 0 else "undefined"
    elif not data.can_vary:
        reason = "one-example"
    else:
        interval = _interval(one_R, two_R) if neither_share < 0.5 else None
        if value is None or neither_share >= 0.5:
            reason = "unreached"
        elif interval is None:
            reason = "no-variation"
    seeds_sd, items_se = _spread_of_difference(data, pair, target)
    return CostRatioAtSafety(
        value=value,
        interval=interval,
        reason=reason,
        first_cost=one if math.isfinite(one) else None,
        second_cost=two if math.isfinite(two) else None,
        undefined_share=undefined_share,
        unreached_shares=(float(np.isinf(one_R).mean()), float(np.isinf(two_R).mean())),
        difference=cost_difference(data, pair, target),
        seeds_sd=seeds_sd,
        items_se=items_se,
        n_seeds=data.n_seeds,
        n_prompts=data.safety.n,
        n_items=tuple(part.n for part in data.costs),
        target=float(target),
        draws=draws,
    )


def ratio_verdict(found: CostRatioAtSafety, *, seen_above: float = 1.0, refuted_below: float = 1.5) -> RatioVerdict:
    """What follows from a ratio's interval.

    Args:
        found: the ratio.
        seen_above: a ratio is seen where the lower end of its interval is larger.
        refuted_below: so large a ratio is refuted where the upper end is smaller.

    Raises:
        ValueError: a bound that is not a finite number of at least 0.
    """
    for name, bound in (("seen_above", seen_above), ("refuted_below", refuted_below)):
        if not (math.isfinite(bound) and bound >= 0):
            raise ValueError(f"{name} is {bound}, accepted: a finite ratio of at least 0")
    if found.interval is None:
        return RatioVerdict(is_seen=False, is_refuted=False)
    return RatioVerdict(is_seen=found.interval.low > seen_above, is_refuted=found.interval.high < refuted_below)


def _interval(one_R: Floats, two_R: Floats) -> Interval | None:
    """Percentiles of the ratios of draws, those left out in which no arm reaches the target or none costs anything."""
    known_R = (np.isfinite(one_R) | np.isfinite(two_R)) & ((one_R > 0) | (two_R > 0))
    one_R, two_R = one_R[known_R], two_R[known_R]
    # The first over a second that is not reached is 0, or -0; over one that costs nothing it has no bound.
    ratio_R = 0.0 + np.divide(one_R, two_R, where=two_R > 0, out=np.full(len(one_R), np.inf))
    # That an arm does not reach the target in any draw says which costs more, although all ratios are one number.
    both = np.isfinite(one_R).all() and np.isfinite(two_R).all()
    return drawn_interval(ratio_R, ratio_R) if both else drawn_ends(ratio_R)


def _spread_of_difference(
    data: Examples, pair: Mapping[str, ArmCurves], target: float
) -> tuple[float | None, float | None]:
    """Standard deviation over seeds of the first cost minus the second, and the standard error that examples leave."""
    one, two = (arm.slopes(target) for arm in pair.values())
    if one is None or two is None:
        return None, None
    first, second = pair
    variances = data.variances({first: one, second: (-two[0], -two[1])})
    seeds_sd = math.sqrt(variances.seeds * data.n_seeds) if data.n_seeds > 1 else None
    # The rest is in the variance over seeds too, and becomes less with more of them.
    return seeds_sd, math.sqrt(max(0.0, variances.examples - variances.rest)) if data.can_vary else None
