"""From evaluations before and after attacks to the numbers of their result."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from castune.artifacts import EvalResult
from castune.artifacts.attack_result import Attack, AttackRow, KeptComparison, RefusalRate
from castune.errors import NothingScored
from castune.stats.comparisons import holm
from castune.stats.estimates import estimate, paired_difference, paired_rate_interval, wilson_interval
from castune.stats.kept_refusals import kept, kept_difference

logger = logging.getLogger(__name__)

Outcomes = list[bool | None]


@dataclass(frozen=True)
class Measured:
    """An evaluation of an arm before an attack or after one.

    Attributes:
        result: it, on the suites of harmful prompts alone.
        folder: where its replies are, in the run directory.
        strength: of the adapter.
        details: what the attack came to.
    """

    result: EvalResult
    folder: str
    strength: float
    details: dict[str, float]

    def outcomes(self, suites: Sequence[str]) -> Outcomes:
        """Whether each prompt was refused, suite after suite."""
        return [None if one is None else bool(one) for suite in suites for one in self.result.outcomes_of(suite)]


# By arm and attack; None is before any.
AllMeasured = Mapping[tuple[str, Attack | None], Measured]


def require_refusals(measured: AllMeasured, suites: Sequence[str]) -> None:
    """Refuse a result in which nothing is known: no arm has a scored reply before and one after an attack.

    Where one arm has none before, or under one attack, the others are shown all the same: a warning names it.

    Raises:
        NothingScored: the message names the first arm without a scored reply.
    """
    silent = [key for key, one in measured.items() if all(outcome is None for outcome in one.outcomes(suites))]
    said = [
        f"arm {arm}, {'before any attack' if attack is None else f'under {attack.name}'}: none of the replies to "
        f"{', '.join(suites)} could be scored"
        for arm, attack in silent
    ]
    is_known = any(
        attack is not None and (arm, attack) not in silent and (arm, None) not in silent for arm, attack in measured
    )
    if said and not is_known:
        raise NothingScored(said[0])
    for one in said:
        logger.warning("%s, so what it keeps is not known", one)


def row_of(arm: str, attack: Attack, before: Measured, after: Measured, suites: Sequence[str]) -> AttackRow:
    """One attack on one arm, paired by prompt."""
    pair = before.outcomes(suites), after.outcomes(suites)
    change, left = paired_difference(*pair), kept(*pair)
    return AttackRow(
        arm=arm,
        attack=attack,
        strength=after.strength,
        before=_rate(pair[0], before.folder),
        after=_rate(pair[1], after.folder),
        change=change.value,
        change_error=change.standard_error,
        change_interval=paired_rate_interval(change.gained, change.lost, change.n),
        gained=change.gained,
        lost=change.lost,
        p=change.p,
        kept=left.value,
        kept_interval=None if left.interval is None else (left.interval.low, left.interval.high),
        details=after.details,
        change_unscored=change.unscored,
        kept_unscored=left.unscored,
    )


def comparisons(
    arms: Sequence[str], attacks: Sequence[Attack], measured: AllMeasured, suites: Sequence[str]
) -> list[KeptComparison]:
    """Every other arm with the first one under every attack, adjusted together (Holm)."""
    reference, *others = arms
    found = []
    for attack in attacks:
        for arm in others:
            pairs = [
                (measured[name, None].outcomes(suites), measured[name, attack].outcomes(suites))
                for name in (arm, reference)
            ]
            one = kept_difference(*pairs)
            found.append(
                KeptComparison(
                    arm=arm,
                    reference=reference,
                    attack=attack,
                    value=one.value,
                    interval=None if one.interval is None else (one.interval.low, one.interval.high),
                    p=one.p,
                    p_adjusted=None,
                    smallest=one.smallest,
                    n=one.n,
                    unscored=one.unscored,
                )
            )
    adjusted = holm([one.p for one in found])
    return [replace(one, p_adjusted=p) for one, p in zip(found, adjusted, strict=True)]


def _rate(outcomes: Outcomes, folder: str) -> RefusalRate:
    rate, refused = estimate(outcomes), sum(outcome is True for outcome in outcomes)
    return RefusalRate(
        value=rate.value,
        standard_error=rate.standard_error,
        interval=wilson_interval(refused, rate.n),
        refused=refused,
        n=rate.n,
        unscored=rate.unscored,
        folder=folder,
    )
