"""One adapter over its strength: what is measured at every strength, and the strength that reaches a target. Pure.

The strength multiplies an adapter's update: 0 is the base model, 1 the adapter as it was trained.

Shape letters: J strength, N example, R draw.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from castune.stats.distributions import Interval
from castune.stats.equal_safety import drawn_interval
from castune.stats.strength_curves import Fitted, Outcomes, monotone

Floats = NDArray[np.float64]


class Mean(NamedTuple):
    """A mean with its 95 % interval; None where no draw differs from another: what did not occur shows no spread."""

    value: float
    interval: Interval | None


@dataclass(frozen=True)
class Level:
    """A measure at one strength: its mean, and its change from the base model, paired by example."""

    mean: Mean
    change: Mean


@dataclass(frozen=True)
class Reached:
    """Where a measure comes to a target on its way from the base model.

    Attributes:
        measure: which one.
        target: in its unit.
        rises: whether the target lies above the base model, or the measure has to fall to it.
        strength: the smallest that reaches the target, 0 where the base model is there; None where none does.
        interval: 95 % of the strength. A draw that does not reach the target counts as infinite, so the upper end may
            be infinite. None where one example was measured, or no draw differs from another.
        between: the measured strengths around it. In between it is interpolated, and the interval does not know by how
            much that errs.
        reached_share: share of the draws that reach the target.
        extreme: the measured strength at which the mean goes furthest towards the target or past it, and that mean.
        left_out: strengths that were not looked at (`Measure.left_out`).
    """

    measure: str
    target: float
    rises: bool
    strength: float | None
    interval: Interval | None
    between: tuple[float, float] | None
    reached_share: float
    extreme: tuple[float, float]
    left_out: tuple[float, ...] = ()


@dataclass(frozen=True, eq=False)
class Measure:
    """Means of one measure at every strength, and what they are in every draw of a bootstrap over examples.

    Attributes:
        strengths_J: rising from 0, the base model, without those that are left out.
        mean_J: means over suites of their means over examples.
        drawn_RJ: the same in every draw.
        n: examples scored at every strength.
        unscored: examples left out.
        left_out: strengths at which the measure is not known, for too few examples are scored there.
    """

    strengths_J: Floats
    mean_J: Floats
    drawn_RJ: Floats
    n: int
    unscored: int
    left_out: tuple[float, ...]

    @classmethod
    def of(
        cls,
        name: str,
        strengths_J: Floats,
        suites: Sequence[Floats],
        left_out: Collection[float],
        draws: int,
        rng: np.random.Generator,
    ) -> Measure:
        """Of outcomes [J, N] of every suite; suites count alike, whatever their number of examples."""
        kept_J = ~np.isin(strengths_J, list(left_out))
        parts = [Outcomes.of(name, [outcomes_JN[None, kept_J]], above_base=False) for outcomes_JN in suites]
        mean_J = np.mean([part.mean_L for part in parts], axis=0)
        drawn_RJ = mean_J + np.mean([part.resampled(draws, rng) for part in parts], axis=0)
        n, unscored = sum(part.n for part in parts), sum(part.unscored for part in parts)
        return cls(strengths_J[kept_J], mean_J, drawn_RJ, n, unscored, tuple(strengths_J[~kept_J].tolist()))

    def at(self, strength: float) -> Level | None:
        """At a strength: as measured, else interpolated between those that were; None where it is not known."""
        from scipy.interpolate import PchipInterpolator

        strengths_J = self.strengths_J
        if strength in self.left_out or strength > strengths_J[-1]:
            return None
        mean, base = float(PchipInterpolator(strengths_J, self.mean_J)(strength)), float(self.mean_J[0])
        drawn_R, base_R = PchipInterpolator(strengths_J, self.drawn_RJ, axis=1)(strength), self.drawn_RJ[:, 0]
        change = Mean(mean - base, drawn_interval(drawn_R - base_R, drawn_R, base_R))
        return Level(Mean(mean, drawn_interval(drawn_R, drawn_R)), change)


@dataclass(frozen=True, eq=False)
class StrengthCurves:
    """Everything that was measured of one adapter, over its strength.

    Attributes:
        strengths_J: rising from 0, the base model; a measure may lack some.
        measures: by name.
    """

    strengths_J: Floats
    measures: Mapping[str, Measure]

    @classmethod
    def of(
        cls,
        strengths: Sequence[float],
        outcomes: Mapping[str, Sequence[Floats]],
        *,
        left_out: Mapping[str, Collection[float]] | None = None,
        draws: int = 2000,
        seed: int = 0,
    ) -> StrengthCurves:
        """Curves with a bootstrap over examples: of every suite for itself, the same ones at all strengths.

        Args:
            strengths: rising from 0, the base model, with at least one more.
            outcomes: of every measure its suites' outcomes, each [strengths, examples]; NaN = unscored.
            left_out: by measure strengths that its curve is made without, such as those at which the model is silent.
            draws: of the bootstrap.
            seed: of the draws.

        Raises:
            ValueError: strengths that do not rise from 0, no measure, another number of rows than strengths, a suite
                without an example that is scored at every strength, a measure of which the base or all else is left
                out, or fewer than one draw.
        """
        left_out = left_out or {}
        strengths_J = np.asarray(strengths, dtype=float)
        rises = len(strengths_J) > 1 and strengths_J[0] == 0 and np.isfinite(strengths_J).all()
        if not (rises and (np.diff(strengths_J) > 0).all()):
            raise ValueError(f"strengths are {list(strengths)}, accepted: 0 (the base), and one or more above, rising")
        if not outcomes or not all(outcomes.values()):
            raise ValueError("no outcomes; every measure needs a suite, as an array [strengths, examples]")
        if draws < 1:
            raise ValueError(f"draws is {draws}, accepted: 1 or more")
        for name, suites in outcomes.items():
            for outcomes_JN in suites:
                if outcomes_JN.ndim != 2 or len(outcomes_JN) != len(strengths_J):
                    raise ValueError(
                        f"{name} has the shape {outcomes_JN.shape}, accepted: [{len(strengths_J)} strengths, examples]"
                    )
            without = left_out.get(name, ())
            if 0 in without or set(strengths_J[1:].tolist()) <= set(without):
                raise ValueError(
                    f"{name}: left out are {list(without)}, but the base and one strength above are needed"
                )
        rng = np.random.default_rng(seed)
        measures = {
            name: Measure.of(name, strengths_J, suites, left_out.get(name, ()), draws, rng)
            for name, suites in outcomes.items()
        }
        return cls(strengths_J, measures)

    def levels(self, name: str) -> list[Level | None]:
        """A measure at every strength, the base model first; None where it is left out."""
        return [self.measures[name].at(float(strength)) for strength in self.strengths_J]

    def at(self, strength: float) -> dict[str, Level]:
        """Every measure that is known at one strength, measured or between two that were.

        Intervals are for other examples and this one strength.

        Raises:
            ValueError: the strength is none that was measured, nor between two.
        """
        if not 0 <= strength <= self.strengths_J[-1]:
            raise ValueError(f"strength is {strength}, accepted: 0 to {self.strengths_J[-1]:g}, the highest measured")
        found = {name: measure.at(strength) for name, measure in self.measures.items()}
        return {name: level for name, level in found.items() if level is not None}

    def reach(self, name: str, target: float) -> Reached:
        """The smallest strength at which a measure comes to a target.

        The curve goes from the base model to the strength at which the measured mean goes furthest in the direction of
        the target: past it the adapter does no more, or breaks the model. So a target is reached if and only if a
        measured mean reaches it. On the way the curve is the closest that never turns back, interpolated by PCHIP, as
        in `stats.equal_safety`.

        In simulations (seven strengths from 0 to 1.5; 60, 120 and 300 prompts; refusals logistic, linear or level over
        the strength, or falling again above 1; 400 tries each) the interval held the true strength in 94 to 96 % of
        cases. For a target 2 to 3 points below the highest that the arm reaches it was 90, 92 and 94 %, with no upper
        end in 61, 42 and 16 % of cases. At the strength that was found, intervals of refusals held what is true there
        in 94 to 98 %, though it was chosen on the same prompts, and those of a cost in 94 to 95 %.

        Args:
            name: of the measure.
            target: in its unit. Above the base model's mean the measure has to rise to it, below it to fall.

        Raises:
            ValueError: the target is not finite.
        """
        if not math.isfinite(target):
            raise ValueError(f"the target is {target}, accepted: a finite number")
        measure = self.measures[name]
        strengths_J = measure.strengths_J
        sign = 1.0 if target >= measure.mean_J[0] else -1.0
        furthest = int(np.argmax(sign * measure.mean_J))

        def strengths(mean_RJ: Floats) -> Floats:
            way_RJ = monotone(sign * mean_RJ[:, : furthest + 1])
            # Level from there on, so that it is interpolated on the way as `Measure.at` interpolates.
            level_RJ = np.repeat(way_RJ[:, -1:], len(strengths_J) - furthest - 1, axis=1)
            curve_RJ = np.concatenate([way_RJ, level_RJ], axis=1)
            return Fitted.of(strengths_J, curve_RJ, curve_RJ).at(sign * target)[1]

        [strength], strength_R = strengths(measure.mean_J[None]), strengths(measure.drawn_RJ)
        if math.isclose(target, measure.mean_J[0], abs_tol=1e-12):
            strength = 0.0  # though the curve may begin below, where the measure turns back at first
        reached = math.isfinite(strength)
        # The end of the halvings may lie a rounding error beside a measured strength.
        above = max(int(np.searchsorted(strengths_J, strength - 1e-9)), 1)
        return Reached(
            measure=name,
            target=float(target),
            rises=sign > 0,
            strength=float(strength) if reached else None,
            interval=drawn_interval(strength_R, strength_R) if measure.n > 1 else None,
            between=(float(strengths_J[above - 1]), float(strengths_J[above])) if reached else None,
            reached_share=float(np.isfinite(strength_R).mean()),
            extreme=(float(strengths_J[furthest]), float(measure.mean_J[furthest])),
            left_out=measure.left_out,
        )
