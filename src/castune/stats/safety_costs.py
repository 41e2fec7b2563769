"""Several costs of several arms at one safety, as a report speaks of them. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from castune.stats.distributions import Interval
from castune.stats.equal_safety import CostBand, EqualSafety


class Point(NamedTuple):
    """An arm at one strength: means over the examples that are scored at all strengths, costs above base."""

    strength: float
    safety: float
    cost: float


class Gain(NamedTuple):
    """What an arm at full strength gains in safety: mean of its paired changes, and their 95 % interval (Student's)."""

    value: float
    interval: Interval | None


@dataclass(frozen=True)
class SafetyCosts:
    """Costs of arms at one safety.

    Attributes:
        safety: the purpose whose number is the safety, of all its suites' prompts together.
        target: the safety at which arms are compared; None where no arm is safer than base.
        gains: of every arm.
        costs: what every arm that is compared pays, by purpose; empty without a target. Of `utility` right answers
            lost, of others their rise.
        bands: cost over safety, by purpose and arm.
        points: every arm at every strength, the base at 0, by purpose and arm.
        not_safer: arms that are not compared, because they are not seen to be safer than base at any strength: what the
            others pay would be compared at next to no safety.
        left_out: arms that were measured at full strength alone, or at other strengths by other settings.
        unscored: arms without a score at some strength, of safety or of a cost that most trainings have.
        few_seeds: arms of a study with too few of the others' seeds.
    """

    safety: str
    target: float | None
    gains: Mapping[str, Gain]
    costs: Mapping[str, EqualSafety]
    bands: Mapping[str, Mapping[str, CostBand]]
    points: Mapping[str, Mapping[str, list[Point]]]
    not_safer: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()
    unscored: tuple[str, ...] = ()
    few_seeds: tuple[str, ...] = ()

    @property
    def arms(self) -> list[str]:
        """The arms that are compared, in the order given."""
        return [arm for arm in self.gains if arm not in self.not_safer]
