"""Which units a repair drops: those that cost most for the refusals they buy, and others for comparison. Pure."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from castune.artifacts import Unit
from castune.artifacts.adapter_inspection import OBJECTIVES, AdapterInspection
from castune.config import RepairConfig

# Names of the base model and of candidates, which an adapter that is repaired may have as well.
_TAKEN = re.compile(r"base|safe-lora|(drop|risky|random|weaker)-.*")


@dataclass(frozen=True)
class Candidate:
    """An adapter that is to be evaluated.

    Attributes:
        name: of it.
        kind: source | effects | risky | random | weaker | safe-lora (`artifacts.repair_result.Tried`).
        dropped: units that are dropped.
        strength: what the update is multiplied by.
        adapter: directory of one that is made already, and not of units; None: it is made by dropping some.
    """

    name: str
    kind: str
    dropped: tuple[Unit, ...] = ()
    strength: float = 1.0
    adapter: Path | None = None

    def predicted(self, inspection: AdapterInspection) -> dict[str, float]:
        """To first order, the change of every objective's mean loss; nothing where it is not made of units."""
        if self.adapter is not None:
            return {}
        dropped = set(self.dropped)
        kept_H = np.array([one not in dropped for one in inspection.units])
        names = [name for name in OBJECTIVES if name in inspection.data]
        return {name: self.strength * float(inspection.effect(name)[kept_H].sum()) for name in names}


def source_of(name: str) -> Candidate:
    """The adapter as it is, by its name; by another where the base model or a candidate may have that one.

    Candidates are told apart by their names, and one that was written before may be repaired again.
    """
    return Candidate(f"{name}-itself" if _TAKEN.fullmatch(name) else name, "source")


def changed_units(inspection: AdapterInspection) -> list[Unit]:
    """Units that the adapter changes at all."""
    return [one for one, norm in zip(inspection.units, inspection.column("norm"), strict=True) if norm > 0]


def drop_order(inspection: AdapterInspection) -> list[Unit]:
    """Units whose update costs something, in the order in which they are dropped.

    Cost is what a unit adds to the losses of right answers and of helpful replies, gain what it takes off that of
    refusals, all to first order. First come units that cost and gain nothing, the costliest first; then those of the
    highest cost for each nat gained. Units that cost nothing are never dropped.
    """
    cost_H = inspection.effect("utility") + inspection.effect("over-refusal")
    gain_H = -inspection.effect("safety")
    units = inspection.units
    useless = [row for row in range(len(units)) if cost_H[row] > 0 >= gain_H[row]]
    useful = [row for row in range(len(units)) if cost_H[row] > 0 and gain_H[row] > 0]
    order = sorted(useless, key=lambda row: -cost_H[row]) + sorted(useful, key=lambda row: -cost_H[row] / gain_H[row])
    return [units[row] for row in order]


def by_effects(inspection: AdapterInspection, config: RepairConfig) -> list[Candidate]:
    """The candidates: the first units of `drop_order` dropped, as many as the shares of all changed units say."""
    order, n = drop_order(inspection), len(changed_units(inspection))
    counts = sorted({min(max(1, round(share * n)), len(order)) for share in config.shares} - {0, n})
    return [Candidate(f"drop-{count}", "effects", tuple(order[:count])) for count in counts]


def compared_with(candidate: Candidate, inspection: AdapterInspection, config: RepairConfig) -> list[Candidate]:
    """What a candidate is compared with: as many of the riskiest or of random units dropped, and a weaker adapter.

    The weaker adapter has as large an update as the candidate (in Frobenius norm): what is to be had without choosing.
    There is none where that is next to nothing.
    """
    changed, count = changed_units(inspection), len(candidate.dropped)
    found = []
    risky = _riskiest(inspection, changed)
    if len(risky) >= count:
        found.append(Candidate(f"risky-{count}", "risky", tuple(risky[:count])))
    for draw in range(1, config.draws + 1):
        drawn = random.Random(f"{config.seed} {draw}").sample(changed, count)
        found.append(Candidate(f"random-{count}-{draw}", "random", tuple(sorted(drawn))))
    dropped = set(candidate.dropped)
    norms = zip(inspection.units, inspection.column("norm").tolist(), strict=True)
    # Of what units own alone: a candidate has nothing else of the update.
    kept = sum(norm**2 for one, norm in norms if one not in dropped)
    strength = round(float((kept / inspection.metadata["norm"] ** 2) ** 0.5), 4)
    return [*found, *([Candidate(f"weaker-{strength:g}", "weaker", strength=strength)] if strength else [])]


def _riskiest(inspection: AdapterInspection, changed: Sequence[Unit]) -> list[Unit]:
    """Changed units by conflict score, highest first; none without a map. Scores compare within a kind alone."""
    score_H = inspection.column("conflict_score").tolist()
    scores = {one: score for one, score in zip(inspection.units, score_H, strict=True) if np.isfinite(score)}
    kinds = {one.kind for one in scores}
    if len(kinds) != 1:
        return []
    return sorted((one for one in changed if one in scores), key=lambda one: (-scores[one], one))
