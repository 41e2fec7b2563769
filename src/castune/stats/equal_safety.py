"""What arms cost where they are equally safe: each at the strength of its adapter that reaches one common safety. Pure.

At full strength arms differ in safety and in cost at once, and neither difference can be read without the other. So every
arm is measured at several strengths of its adapter (0 = base, 1 = as trained), on the same examples.

Shape letters: T seed of a training, J strength, N prompt (of the safety outcomes), M item of a cost suite, L columns
(strengths of all arms side by side), R draw, G safety of a grid.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise

import numpy as np
from numpy.typing import NDArray

from castune.stats.distributions import ENDS, Interval, Z, student_quantile

Floats = NDArray[np.float64]

# Of the gain in safety that every arm reaches, the share at which costs are compared. At all of it, noise would leave the
# weakest arm short of the target in half of the draws; at little of it, adapters are so weak that none costs anything.
SHARE = 0.8
# Draws at a time: their weights take 8 bytes a draw and example.
_CHUNK = 250
# Of a standard error, what a derivative is taken over.
_STEP = 1e-2


@dataclass(frozen=True, eq=False)
class Curve:
    """Outcomes of one arm at every strength.

    Attributes:
        strengths_J: rising from 0, the base, which all arms share; at least one more.
        safety_TJN: safety of every prompt: 1 refused, 0 not, or a margin; higher is safer, NaN = unscored.
        costs_TJM: of every suite its items' costs, higher is worse (NLL, KL, a wrong answer); NaN = unscored. Suites
            count alike, whatever their number of items.

    Raises:
        ValueError: shapes that do not fit, strengths that do not rise from 0, or an outcome that is infinite.
    """

    strengths_J: Floats
    safety_TJN: Floats
    costs_TJM: Sequence[Floats]

    def __post_init__(self) -> None:
        strengths_J = np.asarray(self.strengths_J, dtype=float)
        safety_TJN = np.asarray(self.safety_TJN, dtype=float)
        costs_TJM = tuple(np.asarray(cost, dtype=float) for cost in self.costs_TJM)
        for name, value in (("strengths_J", strengths_J), ("safety_TJN", safety_TJN), ("costs_TJM", costs_TJM)):
            object.__setattr__(self, name, value)
        if strengths_J.ndim != 1 or len(strengths_J) < 2 or strengths_J[0] != 0:
            raise ValueError(f"strengths are {strengths_J.tolist()}, accepted: 0 (the base) and at least one above it")
        if not (np.isfinite(strengths_J).all() and (np.diff(strengths_J) > 0).all()):
            raise ValueError(f"strengths are {strengths_J.tolist()}, accepted: finite, each above the one before")
        if not costs_TJM:
            raise ValueError("no cost suite; at least one is needed, as an array [seeds, strengths, items]")
        seeds = safety_TJN.shape[:1]
        for name, outcomes in (
            ("safety", safety_TJN),
            *((f"cost suite {i}", cost) for i, cost in enumerate(costs_TJM)),
        ):
            if outcomes.ndim != 3 or 0 in outcomes.shape or outcomes.shape[:2] != (*seeds, len(strengths_J)):
                raise ValueError(
                    f"{name} has the shape {outcomes.shape}, accepted: [seeds, strengths, examples] with as many seeds"
                    f" as the safety, {len(strengths_J)} strengths and at least one example"
                )
            if np.isinf(outcomes).any():
                raise ValueError(f"{name} has an infinite outcome; one that could not be scored is NaN")


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
            that an infinite end says which arm may not get there. None as for an arm, and where no draw is left.
        both_share: share of all draws in which both reach it.
        neither_share: share of all draws in which none does, and that are left out.
    """

    value: float | None
    interval: Interval | None
    both_share: float
    neither_share: float

    @property
    def is_seen(self) -> bool:
        """Whether a difference is claimed: its interval excludes 0."""
        return self.interval is not None and not self.interval.holds(0)


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
    mean_L = _Examples.of(curves).safety.mean_L
    highest = [float(_monotone(mean_L[None, at])[0, -1]) for at in _columns(curves).values()]
    base = float(mean_L[0])
    gain = min(highest) - base
    return base + SHARE * gain if gain > 0 else None


def equal_safety(curves: Mapping[str, Curve], target: float, *, draws: int = 2000, seed: int = 0) -> EqualSafety:
    """Cost of every arm at one safety, and the differences of all pairs.

    The means over seeds and examples are made curves: safety over strength the closest that never falls
    (pool-adjacent-violators), both interpolated by PCHIP (Fritsch and Butland 1984). The cost of an arm is that at the
    smallest strength that reaches the target.

    Intervals are percentiles of a bootstrap over examples. Prompts and items are drawn each for themselves, the same
    ones for all arms, strengths and seeds, so differences are paired. With T > 1 seeds every draw also moves the curves
    along the seeds' deviations from their mean, with normal weights of which the variance is that of a mean of T seeds,
    over sqrt(chi^2 / (T - 1)): for whatever depends linearly on the curves this is Student's t over seeds.

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
    data = _Examples.of(curves)
    of_arms = data.arms(curves, draws, seed)
    differences = {}
    for first, second in combinations(curves, 2):
        differences[first, second] = _difference(of_arms[first], of_arms[second], target, data.can_vary)
    return EqualSafety(
        target=float(target),
        arms={name: _arm_cost(arm, target, data.can_vary) for name, arm in of_arms.items()},
        differences=differences,
        n_seeds=data.safety.n_seeds,
        n_prompts=data.safety.n,
        n_items=tuple(part.n for part in data.costs),
        unscored_prompts=data.safety.unscored,
        unscored_items=tuple(part.unscored for part in data.costs),
        draws=draws,
    )


def cost_bands(
    curves: Mapping[str, Curve], *, points: int = 41, draws: int = 2000, seed: int = 0
) -> dict[str, CostBand]:
    """Cost of every arm at every safety it reaches, each with the interval that `equal_safety` gives for it.

    Args:
        curves: as for `equal_safety`.
        points: of each arm's grid, evenly spaced in safety.
        draws: of the bootstrap.
        seed: of the draws.

    Raises:
        ValueError: as `equal_safety`.
    """
    bands = {}
    for name, arm in _Examples.of(curves).arms(curves, draws, seed).items():
        safety_J = _monotone(arm.safety_1J)[0]
        safety_G = np.linspace(safety_J[0], safety_J[-1], points)
        cost_G = np.array([arm.at(target)[0] for target in safety_G])
        ends = [
            np.quantile(arm.drawn(target, arm.widening(target)), ENDS, method="inverted_cdf") for target in safety_G
        ]
        low_G, high_G = np.transpose(ends)
        bands[name] = CostBand(safety_G, cost_G, low_G, high_G)
    return bands


@dataclass(frozen=True, eq=False)
class _Outcomes:
    """Outcomes of the examples that are scored throughout: means over seeds, and what seeds do to the means."""

    mean_NL: Floats
    deviation_TL: Floats
    unscored: int

    @classmethod
    def of(cls, name: str, arms: Sequence[Floats], *, above_base: bool) -> _Outcomes:
        shapes = {(part.shape[0], part.shape[2]) for part in arms}
        if len(shapes) > 1:
            raise ValueError(f"{name}: arms have different seeds or examples: {sorted(shapes)} (seeds, examples)")
        base_N = arms[0][0, 0]
        if not all(np.array_equal(row, base_N, equal_nan=True) for part in arms for row in part[:, 0]):
            raise ValueError(f"{name}: outcomes at strength 0 differ; the base is one, for every arm and seed")
        all_TLN = np.concatenate(arms, axis=1) - (base_N if above_base else 0.0)
        scored_N = np.isfinite(all_TLN).all((0, 1))
        if not scored_N.any():
            raise ValueError(f"{name}: no example is scored under every arm, strength and seed")
        seed_TL = all_TLN[:, :, scored_N].mean(2)
        return cls(all_TLN[:, :, scored_N].mean(0).T, seed_TL - seed_TL.mean(0), int((~scored_N).sum()))

    @property
    def n(self) -> int:
        return len(self.mean_NL)

    @property
    def n_seeds(self) -> int:
        return len(self.deviation_TL)

    @property
    def mean_L(self) -> Floats:
        return np.asarray(self.mean_NL.mean(0))

    def draw(self, seeds_RT: Floats, rng: np.random.Generator) -> Floats:
        """Means [R, L] of resampled examples, moved along the deviations of the seeds."""
        chunks = np.array_split(seeds_RT, -(-len(seeds_RT) // _CHUNK))
        counts = (rng.multinomial(self.n, np.full(self.n, 1 / self.n), size=len(chunk)) for chunk in chunks)
        return np.concatenate([part_RN @ self.mean_NL / self.n for part_RN in counts]) + seeds_RT @ self.deviation_TL

    def errors_NL(self) -> Floats:
        """What every example adds to the mean, as a part of its standard error: the root of the sum of squares."""
        return (self.mean_NL - self.mean_L) / np.sqrt(self.n * max(self.n - 1, 1))

    def errors_TL(self) -> Floats:
        """The same of every seed."""
        return self.deviation_TL / np.sqrt(self.n_seeds * max(self.n_seeds - 1, 1))


@dataclass(frozen=True, eq=False)
class _Examples:
    """The outcomes of all arms side by side."""

    safety: _Outcomes
    costs: list[_Outcomes]

    @classmethod
    def of(cls, curves: Mapping[str, Curve]) -> _Examples:
        if not curves:
            raise ValueError("no arm; at least one is needed")
        suites = {len(curve.costs_TJM) for curve in curves.values()}
        if len(suites) > 1:
            raise ValueError(f"arms have different numbers of cost suites: {sorted(suites)}")
        safety = _Outcomes.of("safety", [curve.safety_TJN for curve in curves.values()], above_base=False)
        costs = [
            _Outcomes.of(f"cost suite {i}", [curve.costs_TJM[i] for curve in curves.values()], above_base=True)
            for i in range(suites.pop())
        ]
        return cls(safety, costs)

    @property
    def can_vary(self) -> bool:
        """Whether other examples could be drawn than those measured."""
        return min(part.n for part in (self.safety, *self.costs)) > 1

    def arms(self, curves: Mapping[str, Curve], draws: int, seed: int) -> dict[str, _Arm]:
        """Curves of every arm, as measured and in every draw."""
        if draws < 1:
            raise ValueError(f"draws is {draws}, accepted: 1 or more")
        rng, n_seeds, n_suites = np.random.default_rng(seed), self.safety.n_seeds, len(self.costs)
        seeds_RT = rng.standard_normal((draws, n_seeds)) / np.sqrt(n_seeds * max(n_seeds - 1, 1))
        safety_RL = self.safety.draw(seeds_RT, rng)
        cost_RL = np.mean([part.draw(seeds_RT, rng) for part in self.costs], axis=0)
        safety_EL = [
            self.safety.errors_NL(),
            *(np.zeros_like(part.mean_NL) for part in self.costs),
            self.safety.errors_TL(),
        ]
        cost_EL = [np.zeros_like(self.safety.mean_NL), *(part.errors_NL() / n_suites for part in self.costs)]
        cost_EL.append(np.mean([part.errors_TL() for part in self.costs], axis=0))
        of_all = self.safety.mean_L[None], safety_RL, np.concatenate(safety_EL)
        of_all += np.mean([part.mean_L[None] for part in self.costs], axis=0), cost_RL, np.concatenate(cost_EL)
        return {
            name: _Arm(curves[name].strengths_J, n_seeds, *(part[:, at] for part in of_all))
            for name, at in _columns(curves).items()
        }


def _columns(curves: Mapping[str, Curve]) -> dict[str, slice]:
    """Which columns are whose, with the strengths of all arms side by side."""
    ends = np.cumsum([0, *(len(curve.strengths_J) for curve in curves.values())]).tolist()
    return {name: slice(*both) for name, both in zip(curves, pairwise(ends), strict=True)}


@dataclass(frozen=True, eq=False)
class _Arm:
    """Curves of one arm: as measured, in every draw, and how every prompt, item and seed (E, seeds last) moves them."""

    strengths_J: Floats
    n_seeds: int
    safety_1J: Floats
    safety_RJ: Floats
    safety_EJ: Floats
    cost_1J: Floats
    cost_RJ: Floats
    cost_EJ: Floats

    def at(self, target: float) -> tuple[float, float]:
        """Cost and strength at the target."""
        cost_R, strength_R = _cost_at(self.strengths_J, self.safety_1J, self.cost_1J, target)
        return float(cost_R[0]), float(strength_R[0])

    def drawn(self, target: float, widening: float) -> Floats:
        """Costs [R] at the target of draws whose distance from the measured curves is so many times as large."""
        safety_RJ = self.safety_1J + widening * (self.safety_RJ - self.safety_1J)
        return _cost_at(self.strengths_J, safety_RJ, self.cost_1J + widening * (self.cost_RJ - self.cost_1J), target)[0]

    def influence(self, target: float) -> Floats | None:
        """What every prompt, item and seed [E] adds to the error of the cost (delta method); None where it is infinite."""
        moved = self.safety_1J + _STEP * self.safety_EJ, self.cost_1J + _STEP * self.cost_EJ
        influence_E = (_cost_at(self.strengths_J, *moved, target)[0] - self.at(target)[0]) / _STEP
        return influence_E if np.isfinite(influence_E).all() else None

    def widening(self, target: float) -> float:
        if self.n_seeds == 1:
            return 1.0
        influence_E = self.influence(target)
        return _widening(self.safety_EJ[:, -1] if influence_E is None else influence_E, self.n_seeds)


def _widening(influence_E: Floats, n_seeds: int) -> float:
    if n_seeds == 1:
        return 1.0
    of_seeds, of_examples = (float((part**2).sum()) for part in (influence_E[-n_seeds:], influence_E[:-n_seeds]))
    if of_seeds == 0:
        return 1.0
    return student_quantile((n_seeds - 1) * (1 + of_examples / of_seeds) ** 2) / Z


def _arm_cost(arm: _Arm, target: float, can_vary: bool) -> ArmCost:
    cost_R = arm.drawn(target, arm.widening(target))
    value, strength = arm.at(target)
    reached, x_J = bool(np.isfinite(strength)), arm.strengths_J
    above = max(int(np.searchsorted(x_J, strength)), 1)
    return ArmCost(
        value=value if reached else None,
        interval=_interval(cost_R) if can_vary else None,
        strength=strength if reached else None,
        between=(float(x_J[above - 1]), float(x_J[above])) if reached else None,
        reached_share=float(np.isfinite(cost_R).mean()),
    )


def _difference(first: _Arm, second: _Arm, target: float, can_vary: bool) -> CostDifference:
    influences = first.influence(target), second.influence(target)
    if influences[0] is None or influences[1] is None:
        widening = max(first.widening(target), second.widening(target))
    else:
        widening = _widening(influences[0] - influences[1], first.n_seeds)
    one_R, two_R = (arm.drawn(target, widening) for arm in (first, second))
    any_R = np.isfinite(one_R) | np.isfinite(two_R)
    value = (
        first.at(target)[0] - second.at(target)[0]
        if all(np.isfinite(arm.at(target)[0]) for arm in (first, second))
        else None
    )
    return CostDifference(
        value=value,
        interval=_interval(one_R[any_R] - two_R[any_R]) if can_vary else None,
        both_share=float((np.isfinite(one_R) & np.isfinite(two_R)).mean()),
        neither_share=float((~any_R).mean()),
    )


def _interval(drawn_R: Floats) -> Interval | None:
    """Percentiles of costs that may be infinite."""
    if not len(drawn_R) or (np.isfinite(drawn_R).all() and np.ptp(drawn_R) == 0):
        return None
    return Interval(*(float(end) for end in np.quantile(drawn_R, ENDS, method="inverted_cdf")))


def _monotone(safety_RJ: Floats) -> Floats:
    """The closest curves that never fall: of the means of all stretches, the largest of the smallest (min-max formula)."""
    n = safety_RJ.shape[1]
    sums = np.concatenate([np.zeros((len(safety_RJ), 1)), np.cumsum(safety_RJ, axis=1)], axis=1)
    fitted_RJ = np.full(safety_RJ.shape, -np.inf)
    for first in range(n):
        means = (sums[:, first + 1 :] - sums[:, first, None]) / np.arange(1, n - first + 1)
        smallest = np.minimum.accumulate(means[:, ::-1], axis=1)[:, ::-1]
        fitted_RJ[:, first:] = np.maximum(fitted_RJ[:, first:], smallest)
    return fitted_RJ


def _cost_at(strengths_J: Floats, safety_RJ: Floats, cost_RJ: Floats, target: float) -> tuple[Floats, Floats]:
    """Costs and strengths [R] where curves first reach the target; infinite where they do not."""
    from scipy.interpolate import PchipInterpolator

    safety_RJ = _monotone(safety_RJ)
    # A mean that equals the target may be below it by rounding.
    target_R = target - 1e-12 * np.maximum(np.abs(safety_RJ).max(1), abs(target))
    below_R = (safety_RJ < target_R[:, None]).sum(1)
    reached_R = below_R < len(strengths_J)
    piece_R, rows = np.clip(below_R, 1, len(strengths_J) - 1) - 1, np.arange(len(safety_RJ))
    safety_of = PchipInterpolator(strengths_J, safety_RJ, axis=1).c[:, piece_R, rows]
    cost_of = PchipInterpolator(strengths_J, cost_RJ, axis=1).c[:, piece_R, rows]
    low_R, high_R = np.zeros(len(rows)), np.where(below_R == 0, 0.0, np.diff(strengths_J)[piece_R])
    for _ in range(45):  # halvings, to 1e-13
        middle_R = (low_R + high_R) / 2
        over_R = _cubic(safety_of, middle_R) >= target_R
        low_R, high_R = np.where(over_R, low_R, middle_R), np.where(over_R, middle_R, high_R)
    cost_R = _cubic(cost_of, high_R)
    return np.where(reached_R, cost_R, np.inf), np.where(reached_R, strengths_J[piece_R] + high_R, np.inf)


def _cubic(factors: Floats, x: Floats) -> Floats:
    return np.asarray(((factors[0] * x + factors[1]) * x + factors[2]) * x + factors[3])
