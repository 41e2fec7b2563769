"""Curves of safety and cost over the strength of an adapter: as measured, and in every draw of a bootstrap. Pure.

Shape letters: T seed of a training, J strength, N prompt (of the safety outcomes), M item of a cost suite, L strengths
of all arms side by side, R draw.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from castune.stats.distributions import Z, student_quantile

Floats = NDArray[np.float64]

# Draws at a time: their weights take 8 bytes a draw and example.
_CHUNK = 250


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


@dataclass(frozen=True, eq=False)
class Outcomes:
    """Outcomes of one suite under all arms, of the examples that are scored throughout.

    Attributes:
        mean_NL: means over seeds.
        deviation_TL: means over examples under every seed, minus those over all seeds.
        rest_TNL: what neither the example nor the seed explains.
        unscored: examples left out.
    """

    mean_NL: Floats
    deviation_TL: Floats
    rest_TNL: Floats
    unscored: int

    @classmethod
    def of(cls, name: str, arms: Sequence[Floats], *, above_base: bool) -> Outcomes:
        """Of the arms' outcomes [T, J, N], as they are or as differences from strength 0."""
        shapes = {(part.shape[0], part.shape[2]) for part in arms}
        if len(shapes) > 1:
            raise ValueError(f"{name}: arms have different seeds or examples: {sorted(shapes)} (seeds, examples)")
        base_N = arms[0][0, 0]
        if not all(np.array_equal(row, base_N, equal_nan=True) for part in arms for row in part[:, 0]):
            raise ValueError(f"{name}: outcomes at strength 0 differ; the base is one, for every arm and seed")
        all_TNL = np.swapaxes(np.concatenate(arms, axis=1) - (base_N if above_base else 0.0), 1, 2)
        scored_N = np.isfinite(all_TNL).all((0, 2))
        if not scored_N.any():
            raise ValueError(f"{name}: no example is scored under every arm, strength and seed")
        all_TNL = all_TNL[:, scored_N]
        mean_NL = all_TNL.mean(0)
        deviation_TL = all_TNL.mean(1) - mean_NL.mean(0)
        return cls(mean_NL, deviation_TL, all_TNL - mean_NL - deviation_TL[:, None], int((~scored_N).sum()))

    @property
    def n(self) -> int:
        """Examples."""
        return len(self.mean_NL)

    @property
    def mean_L(self) -> Floats:
        """Means over examples and seeds."""
        return np.asarray(self.mean_NL.mean(0))

    def resampled(self, draws: int, rng: np.random.Generator) -> Floats:
        """Means [R, L] of examples drawn with replacement, minus those of all examples."""
        sizes = (min(_CHUNK, draws - done) for done in range(0, draws, _CHUNK))
        counts = (rng.multinomial(self.n, np.full(self.n, 1 / self.n), size=size) for size in sizes)
        return np.concatenate([part_RN @ self.mean_NL / self.n for part_RN in counts]) - self.mean_L

    def variances(self, slope_L: Floats) -> tuple[float, float]:
        """Of the mean of outcomes @ slope: the variance by the choice of examples, and the part of it that is rest."""
        n_seeds, pairs = len(self.deviation_TL), self.n * max(self.n - 1, 1)
        by_example_N, rest_TN = (self.mean_NL - self.mean_L) @ slope_L, self.rest_TNL @ slope_L
        rest = float((rest_TN**2).sum()) / (pairs * n_seeds * max(n_seeds - 1, 1))
        return float((by_example_N**2).sum()) / pairs, rest


class Variances(NamedTuple):
    """Of the mean of a quantity over seeds and examples.

    Attributes:
        seeds: variance of the mean of the seeds' means; 0 with one.
        examples: of the mean of the examples' means.
        rest: what neither explains. It is in both of the others.
    """

    seeds: float
    examples: float
    rest: float


class Spread(NamedTuple):
    """How far draws lie from the measured curves.

    Attributes:
        seeds: factor of what seeds do; below 1, for the deviations of few seeds are in part those of examples.
        widening: factor of the whole, for the variance over few seeds is itself uncertain.
    """

    seeds: float
    widening: float


@dataclass(frozen=True, eq=False)
class Examples:
    """The outcomes of all arms side by side, and which columns are whose."""

    columns: dict[str, slice]
    safety: Outcomes
    costs: list[Outcomes]

    @classmethod
    def of(cls, curves: Mapping[str, Curve]) -> Examples:
        """Raises ValueError where the arms differ in seeds, examples, suites or outcomes at strength 0."""
        if not curves:
            raise ValueError("no arm; at least one is needed")
        suites = {len(curve.costs_TJM) for curve in curves.values()}
        if len(suites) > 1:
            raise ValueError(f"arms have different numbers of cost suites: {sorted(suites)}")
        ends = np.cumsum([0, *(len(curve.strengths_J) for curve in curves.values())]).tolist()
        columns = {name: slice(*both) for name, both in zip(curves, pairwise(ends), strict=True)}
        safety = Outcomes.of("safety", [curve.safety_TJN for curve in curves.values()], above_base=False)
        costs = [
            Outcomes.of(f"cost suite {suite}", [curve.costs_TJM[suite] for curve in curves.values()], above_base=True)
            for suite in range(suites.pop())
        ]
        return cls(columns, safety, costs)

    @property
    def n_seeds(self) -> int:
        """T."""
        return len(self.safety.deviation_TL)

    @property
    def can_vary(self) -> bool:
        """Whether there are other examples to draw than those measured."""
        return min(part.n for part in (self.safety, *self.costs)) > 1

    def draw(self, curves: Mapping[str, Curve], draws: int, seed: int) -> dict[str, ArmCurves]:
        """Curves of every arm: prompts and items are drawn each for themselves, the same for all arms and strengths.

        Raises:
            ValueError: fewer than one draw.
        """
        if draws < 1:
            raise ValueError(f"draws is {draws}, accepted: 1 or more")
        rng = np.random.default_rng(seed)
        weight_RT = rng.standard_normal((draws, self.n_seeds)) / math.sqrt(self.n_seeds * max(self.n_seeds - 1, 1))
        sides = [
            (
                np.mean([part.mean_L for part in parts], axis=0),
                np.mean([part.resampled(draws, rng) for part in parts], axis=0),
                weight_RT @ np.mean([part.deviation_TL for part in parts], axis=0),
            )
            for parts in ([self.safety], self.costs)
        ]
        return {
            name: ArmCurves(curves[name].strengths_J, *(_Side(*(part[..., at] for part in side)) for side in sides))
            for name, at in self.columns.items()
        }

    def variances(self, slopes: Mapping[str, tuple[Floats, Floats]]) -> Variances:
        """Of a quantity that changes with the arms' safety and cost curves by these slopes [J]."""
        safety_L, cost_L = np.zeros((2, len(self.safety.mean_L)))
        for name, (safety_J, cost_J) in slopes.items():
            safety_L[self.columns[name]], cost_L[self.columns[name]] = safety_J, cost_J
        suites = len(self.costs)
        parts = [(self.safety, safety_L), *((part, cost_L / suites) for part in self.costs)]
        examples, rest = np.sum([part.variances(slope_L) for part, slope_L in parts], axis=0).tolist()
        seed_T = np.sum([part.deviation_TL @ slope_L for part, slope_L in parts], axis=0)
        return Variances(float((seed_T**2).sum()) / (self.n_seeds * max(self.n_seeds - 1, 1)), examples, rest)

    def spread(self, slopes: Mapping[str, tuple[Floats, Floats]]) -> Spread:
        """The spread for a quantity that changes with the arms' safety and cost curves by these slopes [J].

        As in `comparisons.compare`: with V_T and V_N the variances of the means of seeds and of examples, and V_R that
        of the rest, which is in both, the variance is V_N + V_T - V_R, with Satterthwaite's degrees of freedom; the
        normal draws are widened to Student's quantile, and to no less than the seeds need alone.
        """
        if self.n_seeds == 1:
            return Spread(0.0, 1.0)
        seeds, examples, rest = self.variances(slopes)
        df = self.n_seeds - 1
        own = max(0.0, seeds - rest)
        both = examples + own
        if seeds == 0 or both == 0:
            return Spread(0.0, 1.0)
        half = student_quantile(df * max((both / seeds) ** 2, 1.0)) * math.sqrt(both)
        half = max(half, student_quantile(df) * math.sqrt(own))
        return Spread(math.sqrt(own / seeds), half / Z / math.sqrt(both))


class _Side(NamedTuple):
    """Safety or cost of one arm: its curve, and what examples and seeds add to it in every draw."""

    mean_J: Floats
    by_examples_RJ: Floats
    by_seeds_RJ: Floats

    def drawn(self, spread: Spread) -> Floats:
        deviation_RJ = self.by_examples_RJ + spread.seeds * self.by_seeds_RJ
        return np.asarray(self.mean_J + spread.widening * deviation_RJ)


@dataclass(frozen=True, eq=False)
class ArmCurves:
    """Curves of one arm, as measured and in every draw."""

    strengths_J: Floats
    safety: _Side
    cost: _Side

    @cached_property
    def measured(self) -> Fitted:
        """The one curve of the means."""
        return Fitted.of(self.strengths_J, self.safety.mean_J[None], self.cost.mean_J[None])

    @cached_property
    def _by_examples(self) -> Fitted:
        return self._drawn(Spread(0.0, 1.0))

    def drawn(self, spread: Spread) -> Fitted:
        """The curves of all draws."""
        return self._by_examples if spread == Spread(0.0, 1.0) else self._drawn(spread)

    def _drawn(self, spread: Spread) -> Fitted:
        return Fitted.of(self.strengths_J, self.safety.drawn(spread), self.cost.drawn(spread))

    @cached_property
    def _moved(self) -> tuple[Fitted, Floats]:
        """Curves of which one point of safety, or of cost, is a step higher, and these steps."""
        n = len(self.strengths_J)
        steps = np.repeat([1e-4 * (np.ptp(side.mean_J) or 1.0) for side in (self.safety, self.cost)], n)
        moves = np.diag(steps)
        moved = Fitted.of(self.strengths_J, self.safety.mean_J + moves[:, :n], self.cost.mean_J + moves[:, n:])
        return moved, steps

    def slopes(self, target: float) -> tuple[Floats, Floats] | None:
        """Derivatives of the cost at the target by safety and cost [J] at every strength; None where it is infinite."""
        moved, steps = self._moved
        change = moved.at(target)[0] - self.measured.at(target)[0] if self.measured.reaches(target) else None
        if change is None or not np.isfinite(change).all():
            return None
        safety_J, cost_J = np.split(change / steps, 2)
        return safety_J, cost_J

    @property
    def full_safety(self) -> tuple[Floats, Floats]:
        """The same derivatives of the safety at full strength."""
        return np.eye(len(self.strengths_J))[-1], np.zeros(len(self.strengths_J))


@dataclass(frozen=True, eq=False)
class Fitted:
    """Curves of many draws: monotone safety at the strengths, and the cubics [4, J - 1, R] of safety and cost."""

    strengths_J: Floats
    safety_RJ: Floats
    safety_cubics: Floats
    cost_cubics: Floats

    @classmethod
    def of(cls, strengths_J: Floats, safety_RJ: Floats, cost_RJ: Floats) -> Fitted:
        """Through means of safety, made monotone, and of cost."""
        from scipy.interpolate import PchipInterpolator

        fitted_RJ = monotone(safety_RJ)
        cubics = (PchipInterpolator(strengths_J, part_RJ, axis=1).c for part_RJ in (fitted_RJ, cost_RJ))
        return cls(strengths_J, fitted_RJ, *cubics)

    def reaches(self, target: float) -> bool:
        """Whether all of them reach the target."""
        return bool(np.isfinite(self.at(target)[0]).all())

    def at(self, target: float) -> tuple[Floats, Floats]:
        """Costs and strengths [R] where safety first reaches the target; infinite where it does not."""
        # A mean that equals the target may be below it by rounding; the halvings then end where it was measured.
        rounding_R = 1e-12 * np.maximum(np.abs(self.safety_RJ).max(1), abs(target))
        below_R = (self.safety_RJ < target - rounding_R[:, None]).sum(1)
        reached_R = below_R < len(self.strengths_J)
        piece_R, rows = np.clip(below_R, 1, len(self.strengths_J) - 1) - 1, np.arange(len(below_R))
        safety_of = self.safety_cubics[:, piece_R, rows]
        low_R, high_R = np.zeros(len(rows)), np.where(below_R == 0, 0.0, np.diff(self.strengths_J)[piece_R])
        for _ in range(45):  # to 1e-13
            middle_R = (low_R + high_R) / 2
            over_R = _cubic(safety_of, middle_R) >= target
            low_R, high_R = np.where(over_R, low_R, middle_R), np.where(over_R, middle_R, high_R)
        cost_R = _cubic(self.cost_cubics[:, piece_R, rows], high_R)
        return np.where(reached_R, cost_R, np.inf), np.where(reached_R, self.strengths_J[piece_R] + high_R, np.inf)


def _cubic(factors: Floats, x: Floats) -> Floats:
    return np.asarray(((factors[0] * x + factors[1]) * x + factors[2]) * x + factors[3])


def monotone(safety_RJ: Floats) -> Floats:
    """The closest curves that never fall: of means of stretches, the largest over starts of the smallest over ends."""
    n = safety_RJ.shape[1]
    sums = np.concatenate([np.zeros((len(safety_RJ), 1)), np.cumsum(safety_RJ, axis=1)], axis=1)
    fitted_RJ = np.full(safety_RJ.shape, -np.inf)
    for first in range(n):
        means = (sums[:, first + 1 :] - sums[:, first, None]) / np.arange(1, n - first + 1)
        smallest = np.minimum.accumulate(means[:, ::-1], axis=1)[:, ::-1]
        fitted_RJ[:, first:] = np.maximum(fitted_RJ[:, first:], smallest)
    return fitted_RJ
