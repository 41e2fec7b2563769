"""Studies of which the truth is known: populations of arms, and outcomes drawn from them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.special import expit, ndtr, ndtri

from castune.stats.cost_ratio import cost_ratio, ratio_verdict
from castune.stats.equal_safety import SHARE, common_target
from castune.stats.power import power
from castune.stats.strength_curves import Curve

Floats = NDArray[np.float64]
STRENGTHS = np.array([0, 0.25, 0.5, 0.75, 1.0])
# Standard deviation over trainings of the strength at which safety has risen by half.
SHIFT_SD = 0.05


@dataclass(frozen=True)
class Population:
    """An arm whose population is known: logistic safety over strength, a power of the strength as cost."""

    top: float
    middle: float = 0.4
    width: float = 0.15
    full: float = 0.15
    power: float = 2.0

    def safety(self, x: Any, shift: Any = 0.0) -> Any:
        start, end = expit((0 - self.middle - shift) / self.width), expit((1 - self.middle - shift) / self.width)
        return 0.2 + (self.top - 0.2) * (expit((x - self.middle - shift) / self.width) - start) / (end - start)

    def cost(self, target: float, shift_sd: float) -> float:
        """At the strength at which safety, averaged over trainings, reaches the target; infinite if it never does."""
        shifts = shift_sd * ndtri((np.arange(100) + 0.5) / 100)

        def gap(x: float) -> float:
            return float(np.mean(self.safety(x, shifts))) - target

        return math.inf if gap(1) < 0 else self.full * float(brentq(gap, 0, 1)) ** self.power


def simulated(
    arms: Mapping[str, Population],
    n_seeds: int,
    n: int,
    m: int,
    rng: np.random.Generator,
    *,
    strengths: Floats = STRENGTHS,
    skewed: bool = False,
    seed_spread: float = 0.15,
) -> dict[str, Curve]:
    """Prompts refuse beyond thresholds that arms share in part, and not always; an item's cost grows in its own proportion.

    The sd of items is their mean at full strength.

    Args:
        arms: the populations.
        n_seeds: trainings of each; one is that of the population, several differ from it, each in its own way.
        n: prompts.
        m: items of the cost suite.
        rng: source of chance.
        strengths: rising from 0.
        skewed: items' costs are exponential, not normal.
        seed_spread: sd of the trainings' costs, relative to the cost; they also move the middle of safety (`SHIFT_SD`).
    """
    many, n_strengths = n_seeds > 1, len(strengths)

    def items(*shape: int) -> Floats:
        return rng.exponential(size=shape) - 1 if skewed else rng.standard_normal(shape)

    base_N, prompt_N, item_M, curves = rng.standard_normal(n), rng.standard_normal(n), items(m), {}
    for name, arm in arms.items():
        own = (
            rng.standard_normal(n),
            rng.standard_normal((n_seeds, 1, n)),
            rng.standard_normal((n_seeds, n_strengths, n)),
        )
        threshold = (
            math.sqrt(0.48) * prompt_N + math.sqrt(0.22) * own[0] + math.sqrt(0.1) * own[1] + math.sqrt(0.2) * own[2]
        )
        rate = arm.safety(strengths, SHIFT_SD * many * rng.standard_normal((n_seeds, 1)))
        safety = ndtr(threshold) < rate[:, :, None]
        safety[:, 0] = ndtr(math.sqrt(0.48) * prompt_N + math.sqrt(0.52) * base_N) < 0.2
        size = 1 + seed_spread * many * rng.standard_normal((n_seeds, 1, 1))
        per_item = 1 + math.sqrt(0.6) * item_M + math.sqrt(0.28) * items(m) + math.sqrt(0.12) * items(n_seeds, 1, m)
        rest = 0.08 * rng.standard_normal((n_seeds, n_strengths, m)) * np.sqrt(strengths * (1 - strengths))[:, None]
        cost = arm.full * (strengths[:, None] ** arm.power * size * per_item + rest)
        curves[name] = Curve(strengths, safety, [cost])
    return curves


def risky_and_safe(ratio: float, *, unlike: bool = False) -> dict[str, Population]:
    """Two arms of which the first costs `ratio` times as much where both are equally safe.

    Alike in all else, so at any safety; unlike, the first is also safer, at less strength, and the ratio is that at
    the safety at which a study would compare them.
    """
    safe = Population(0.9)
    if not unlike:
        return {"risky": replace(safe, full=ratio * safe.full), "safe": safe}
    risky, target = Population(0.95, middle=0.35, power=1.5), 0.2 + SHARE * (safe.top - 0.2)
    by_chance = risky.cost(target, SHIFT_SD) / safe.cost(target, SHIFT_SD)
    return {"risky": replace(risky, full=risky.full * ratio / by_chance), "safe": safe}


@dataclass(frozen=True)
class Tried:
    """What many studies of one truth found.

    Attributes:
        seen: share in which the first arm is seen to cost more.
        refuted: share in which half as much again is refuted.
        undecided: share with an interval and neither.
        undefined: share without an interval.
        held: of the intervals the share that hold the true ratio.
        width: their median width.
        ratio: mean of the measured ratios.
        difference_seen: share in which the difference of the costs is seen, in either direction.
        power: what `stats.power` foretells of that share, from the true difference and the root mean squares of
            the measured standard deviations over seeds and errors by items.
    """

    seen: float
    refuted: float
    undecided: float
    undefined: float
    held: float
    width: float
    ratio: float
    difference_seen: float
    power: float


def tried(
    arms: Mapping[str, Population],
    *,
    tries: int,
    n_seeds: int = 8,
    n: int = 120,
    m: int = 50,
    strengths: Sequence[float] = (0, 0.35, 0.65, 1),
    seed_spread: float = 0.15,
    draws: int = 2000,
    seed: int = 0,
) -> Tried:
    """Studies of the first arm against the second, each compared where a study would compare them.

    Args:
        arms: the populations.
        tries: studies.
        n_seeds: trainings of each arm, two or more.
        n: prompts.
        m: items of the cost suite; their costs are skewed.
        strengths: rising from 0.
        seed_spread: as for `simulated`.
        draws: of each bootstrap.
        seed: source of chance.
    """
    rng, (first, second) = np.random.default_rng(seed), arms
    found, true = [], []
    for place in range(tries):
        curves = simulated(
            arms, n_seeds, n, m, rng, strengths=np.asarray(strengths), skewed=True, seed_spread=seed_spread
        )
        target = common_target(curves)
        assert target is not None
        found.append(cost_ratio(curves, first, second, target, draws=draws, seed=seed + place))
        true.append([arm.cost(target, SHIFT_SD) for arm in arms.values()])
    verdicts = [ratio_verdict(one) for one in found]
    known = [(one.interval, costs[0] / costs[1]) for one, costs in zip(found, true, strict=True) if one.interval]
    undefined = 1 - len(known) / tries
    seeds_sd, items_se = (
        float(np.sqrt(np.mean([value**2 for value in values if value is not None])))
        for values in ([one.seeds_sd for one in found], [one.items_se for one in found])
    )
    return Tried(
        seen=float(np.mean([verdict.is_seen for verdict in verdicts])),
        refuted=float(np.mean([verdict.is_refuted for verdict in verdicts])),
        undecided=float(np.mean([verdict.is_undecided for verdict in verdicts])) - undefined,
        undefined=undefined,
        held=float(np.mean([interval.holds(ratio) for interval, ratio in known])),
        width=float(np.median([interval.high - interval.low for interval, _ in known])),
        ratio=float(np.mean([one.value for one in found if one.value is not None])),
        difference_seen=float(np.mean([one.difference.is_seen for one in found])),
        power=power(float(np.mean(np.diff(true))), seeds_sd=seeds_sd, n_seeds=n_seeds, items_se=items_se),
    )
