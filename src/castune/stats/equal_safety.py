"""What arms cost where they are equally safe: each at the strength of its adapter that reaches one safety. Pure.

At full strength arms differ in safety and in cost at once, and neither difference can be read without the other. So
every arm is measured at several strengths of its adapter (0 = base, 1 = as trained), on the same examples
(`stats.strength_curves`).

Shape letters: R draw, G safety of a grid.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from castune.stats.comparisons import holm
from castune.stats.distributions import ENDS, LEVEL, Interval
from castune.stats.strength_curves import ArmCurves, Curve, Examples, Spread, monotone

Floats = NDArray[np.float64]

# Of the gain in safety that every arm reaches, the share at which costs are compared. At all of it, noise would leave
# the weakest arm short of the target in half of the draws; at little of it, adapters are so weak that none costs much.
SHARE = 0.8
# Of its size: what rounding may add to the mean of a constant.
_NO_GAIN = 1e-9


@dataclass(frozen=True)
class ArmCost:
    """What one arm costs at the target, above base, in the unit of the costs: the unweighted mean over their suites.

    Attributes:
        value: None where the arm's safety never reaches the target: its cost beyond full strength is not known.
        interval: 95 %. A draw that does not reach the target counts as infinite cost, so the upper end may be
            infinite, and both are where (almost) none does. None where a suite has one example, or no draw differs
            from another: what did not occur cannot show how often it would.
        strength: the smallest that reaches the target.
        between: the measured strengths around it. Safety and cost are known there; the value in between is
            interpolated, and the interval does not know by how much that errs.
        reached_share: share of the draws that reach the target.
    """

    value: float | None
    interval: Interval | None
    strength: float | None
    between: tuple[float, float] | None
    reached_share: float

    @property
    def reached(self) -> bool:
        """Whether the measured curve reaches the target."""
        return self.value is not None


@dataclass(frozen=True)
class CostDifference:
    """Cost of the first arm minus that of the second at the target.

    Attributes:
        value: None where one of them does not reach the target.
        interval: 95 %, over draws of which at least one arm reaches the target: infinite where the other does not, so
            that an infinite end says which arm may not get there. None as for an arm, and where neither does in half
            of the draws.
        p: two-sided p-value that belongs to it, of the same draws: below 0.05 where it excludes 0.
        p_adjusted: Holm's, where several differences are claimed together (`adjusted`).
        n_comparisons: how many are.
        both_share: share of all draws in which both reach it.
        neither_share: share of all draws in which none does, and that are left out.
    """

    value: float | None
    interval: Interval | None
    both_share: float
    neither_share: float
    p: float | None = None
    p_adjusted: float | None = None
    n_comparisons: int = 1

    @property
    def is_seen(self) -> bool:
        """Whether a difference is claimed: its interval excludes 0, and its adjusted p-value is below 5 %."""
        holds_out = self.p_adjusted is None or self.p_adjusted < LEVEL
        return self.interval is not None and not self.interval.holds(0) and holds_out


@dataclass(frozen=True)
class EqualSafety:
    """Costs of all arms at one safety.

    Attributes:
        target: the safety at which they are compared.
        arms: of every arm, in the order given.
        differences: of every pair of arms, first minus second.
        n_seeds: trainings of every arm. With one, intervals are for other examples and these adapters; with more, for
            other trainings too.
        n_prompts: prompts with a safety under every arm, strength and seed.
        n_items: of every cost suite the items with a cost under every arm, strength and seed.
        unscored_prompts: prompts left out.
        unscored_items: of every cost suite the items left out.
        draws: of the bootstrap.
    """

    target: float
    arms: dict[str, ArmCost]
    differences: dict[tuple[str, str], CostDifference]
    n_seeds: int
    n_prompts: int
    n_items: tuple[int, ...]
    unscored_prompts: int
    unscored_items: tuple[int, ...]
    draws: int


@dataclass(frozen=True, eq=False)
class CostBand:
    """Cost of one arm as a function of its safety, for a figure.

    Attributes:
        safety_G: from the arm's lowest safety to its highest.
        cost_G: cost above base.
        low_G: lower ends of the 95 % intervals, each for its own safety.
        high_G: upper ends; infinite towards the highest safety, which many draws do not reach.
    """

    safety_G: Floats
    cost_G: Floats
    low_G: Floats
    high_G: Floats


def common_target(curves: Mapping[str, Curve]) -> float | None:
    """The safety at which arms are compared unless told otherwise: base + 0.8 x (lowest of the arms' highest - base).

    An arm's highest safety is that of its monotone curve, on prompts scored throughout. The share is the same for every
    study (see `SHARE`), so the target follows from safety alone, never from what anything costs.

    Returns:
        None where an arm is nowhere safer than base: then there is no gain whose cost could be compared.

    Raises:
        ValueError: as `equal_safety`.
    """
    data = Examples.of(curves)
    mean_L = data.safety.mean_L
    highest = [float(monotone(mean_L[None, at])[0, -1]) for at in data.columns.values()]
    base = float(mean_L[0])
    gain = min(highest) - base
    # The mean of a constant may come out higher by a rounding error.
    return base + SHARE * gain if gain > _NO_GAIN * max(abs(base), abs(min(highest))) else None


def equal_safety(curves: Mapping[str, Curve], target: float, *, draws: int = 2000, seed: int = 0) -> EqualSafety:
    """Cost of every arm at one safety, and the differences of all pairs.

    The means over seeds and examples are made curves: safety over strength the closest that never falls
    (pool-adjacent-violators), both interpolated by PCHIP (Fritsch and Butland 1984). The cost of an arm is that at the
    smallest strength that reaches the target. Between measured strengths it is as good as the interpolation, of which
    the interval knows nothing: with a true safety logistic over strength, measured at quarters, costs at 80 % of the
    gain erred by up to 4 % (straight lines: 20 %), and by 23 % (40 %) where safety rose almost at once, with a width of
    0.05. There, measure more strengths in `between`.

    Intervals are percentiles of a bootstrap over examples. Prompts and items are drawn each for themselves, the same
    ones for all arms, strengths and seeds, so differences are paired. With several seeds every draw also moves the
    curves along the seeds' deviations, by normal weights, and is widened to Student's quantile (`Examples.spread`). The
    target is taken as given, also where `common_target` found it.

    How often they held the truth in simulations, of costs and of differences, and their width (60 and 120 prompts, 100
    and 300 items; sd of items = mean cost, normal or skewed; one arm short of the target in none, a fifth or all of the
    cases; sd of three seeds = 15 % of the cost; 400 to 1,400 tries, others 250 to 1,000):

        one seed, percentiles                     93 to 96 %   1
        BCa                                       94 to 96 %   1.02
        1.96 sd of the draws                      92 to 97 %   0.98
        basic (reflected percentiles)             78 to 98 %   1
        three seeds, as here                      94 to 98 %   1
        seeds with t weights                      96 to 99 %   1.5
        normal weights, not widened               89 to 96 %   0.85
        seeds drawn with replacement              90 to 94 %   0.8
        seeds not drawn                           79 to 91 %   0.6

    Of a cost that is truly infinite, for the arm never gets there, 98 to 100 %. With two seeds 92 to 94 %, and hardly
    ever an upper end of a difference; with five 93 to 95 %.

    Args:
        curves: of every arm; all with the same examples, seeds and outcomes at strength 0.
        target: safety, in the unit of the outcomes (`common_target`).
        draws: of the bootstrap.
        seed: of the draws.

    Raises:
        ValueError: no arm, a target that is not finite, fewer than one draw, arms that differ in seeds, examples or
            outcomes at strength 0, or a suite of which no example is scored under every arm, strength and seed.
    """
    if not np.isfinite(target):
        raise ValueError(f"the target is {target}, accepted: a finite safety")
    data = Examples.of(curves)
    drawn = data.draw(curves, draws, seed)
    arms = {name: _arm_cost(data, name, drawn[name], target) for name in curves}
    differences = {
        pair: cost_difference(data, {name: drawn[name] for name in pair}, target) for pair in combinations(curves, 2)
    }
    return EqualSafety(
        target=float(target),
        arms=arms,
        differences=differences,
        n_seeds=data.n_seeds,
        n_prompts=data.safety.n,
        n_items=tuple(part.n for part in data.costs),
        unscored_prompts=data.safety.unscored,
        unscored_items=tuple(part.unscored for part in data.costs),
        draws=draws,
    )


def adjusted(costs: Mapping[str, EqualSafety]) -> dict[str, EqualSafety]:
    """Several costs of the same arms, with the first arm's differences from every other adjusted together (Holm)."""
    asked = [
        (cost, pair) for cost, found in costs.items() for pair in found.differences if pair[0] == next(iter(found.arms))
    ]
    p_values = holm([costs[cost].differences[pair].p for cost, pair in asked])
    made = {cost: dict(found.differences) for cost, found in costs.items()}
    for (cost, pair), p in zip(asked, p_values, strict=True):
        made[cost][pair] = replace(made[cost][pair], p_adjusted=p, n_comparisons=len(asked))
    return {cost: replace(found, differences=made[cost]) for cost, found in costs.items()}


def cost_bands(
    curves: Mapping[str, Curve], *, points: int = 41, draws: int = 2000, seed: int = 0
) -> dict[str, CostBand]:
    """Cost of every arm at every safety it reaches, each with the interval that `equal_safety` gives for it.

    Both ends are NaN where a suite has one example.

    Args:
        curves: as for `equal_safety`.
        points: of each arm's grid, evenly spaced in safety.
        draws: of the bootstrap.
        seed: of the draws.

    Raises:
        ValueError: as `equal_safety`, or fewer than two points.
    """
    if points < 2:
        raise ValueError(f"points is {points}, accepted: 2 or more")
    data, bands = Examples.of(curves), {}
    for name, arm in data.draw(curves, draws, seed).items():
        lowest, *_, highest = arm.measured.safety_RJ[0]
        safety_G = np.linspace(lowest, highest, points)
        cost_G = np.array([arm.measured.at(target)[0][0] for target in safety_G])
        ends = [drawn_ends(arm.drawn(cost_spread(data, {name: arm}, target)).at(target)[0]) for target in safety_G]
        low_G, high_G = np.transpose(ends) if data.can_vary else np.full((2, points), np.nan)
        bands[name] = CostBand(safety_G, cost_G, low_G, high_G)
    return bands


def cost_difference(data: Examples, pair: Mapping[str, ArmCurves], target: float) -> CostDifference:
    """Of the two arms' drawn curves, the first minus the second."""
    spread = cost_spread(data, pair, target)
    one_R, two_R = (arm.drawn(spread).at(target)[0] for arm in pair.values())
    any_R, both_R = np.isfinite(one_R) | np.isfinite(two_R), np.isfinite(one_R) & np.isfinite(two_R)
    one, two = (float(arm.measured.at(target)[0][0]) for arm in pair.values())
    shown = data.can_vary and any_R.mean() > 0.5
    interval = drawn_interval(one_R[any_R] - two_R[any_R], one_R, two_R) if shown else None
    return CostDifference(
        value=one - two if math.isfinite(one) and math.isfinite(two) else None,
        interval=interval,
        both_share=float(both_R.mean()),
        neither_share=float((~any_R).mean()),
        p=None if interval is None else _p_of(one_R[any_R] - two_R[any_R]),
    )


def cost_spread(data: Examples, arms: Mapping[str, ArmCurves], target: float, times: float = 1.0) -> Spread:
    """Of the cost of one arm, or of the first minus so many times the second.

    Where an arm has no cost, the larger of the spreads of both, with that of its safety at full strength for it.
    """
    if data.n_seeds == 1:
        return data.spread({})
    slopes = {name: arm.slopes(target) for name, arm in arms.items()}
    known = {name: slope for name, slope in slopes.items() if slope is not None}
    if len(known) == len(arms):
        factors = dict(zip(arms, (1.0, -times), strict=False))
        return data.spread({name: (factors[name] * by[0], factors[name] * by[1]) for name, by in known.items()})
    each = [data.spread({name: known.get(name, arm.full_safety)}) for name, arm in arms.items()]
    return Spread(*np.max(each, axis=0).tolist())


def _p_of(drawn_R: Floats) -> float:
    """Two-sided: twice the share of draws on the rarer side of 0, the measured difference counted as one on each."""
    rarer = min(int((drawn_R <= 0).sum()), int((drawn_R >= 0).sum()))
    return min(1.0, 2 * (rarer + 1) / (len(drawn_R) + 1))


def drawn_interval(drawn_R: Floats, *of_arms: Floats) -> Interval | None:
    """Percentiles of draws; None where all are one finite number, but for the rounding of the arms' own draws."""
    largest = max(float(np.abs(part_R[np.isfinite(part_R)]).max(initial=0.0)) for part_R in of_arms)
    return None if np.isfinite(drawn_R).all() and np.ptp(drawn_R) <= 1e-12 * largest else drawn_ends(drawn_R)


def drawn_ends(drawn_R: Floats) -> Interval:
    """Percentiles of draws that may be infinite: as many lie below the lower end as above the upper one."""
    outside = max(int(ENDS[0] * (len(drawn_R) + 1)), 1) - 1
    sorted_R = np.sort(drawn_R)
    return Interval(float(sorted_R[outside]), float(sorted_R[-1 - outside]))


def _arm_cost(data: Examples, name: str, arm: ArmCurves, target: float) -> ArmCost:
    cost_R = arm.drawn(cost_spread(data, {name: arm}, target)).at(target)[0]
    value, strength = (float(found_R[0]) for found_R in arm.measured.at(target))
    reached, x_J = math.isfinite(strength), arm.strengths_J
    above = max(int(np.searchsorted(x_J, strength)), 1)
    return ArmCost(
        value=value if reached else None,
        interval=drawn_interval(cost_R, cost_R) if data.can_vary else None,
        strength=strength if reached else None,
        between=(float(x_J[above - 1]), float(x_J[above])) if reached else None,
        reached_share=float(np.isfinite(cost_R).mean()),
    )
