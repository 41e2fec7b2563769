"""How far a map by attribution agrees with exact ablation, on units that were measured both ways. Pure.

Shape letters: H unit (all units of the map in one axis), K checked unit, N example.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from castune.artifacts import Unit
from castune.diagnosis.measurements import Measurements
from castune.diagnosis.reliability import spearman
from castune.diagnosis.score import Floats
from castune.stats.correlations import fisher_interval
from castune.stats.ranking import equal_parts

# Of the conflict scores: below it, heads should be measured exactly.
FAITHFUL = 0.9
_COMPARED = ("utility_shift", "safety_shift", "functional_sensitivity", "conflict_score")
_N_WORST = 3


@dataclass(frozen=True)
class Miss:
    """A unit on which estimate and exact value differ most."""

    unit: list[str | int]
    estimated: float
    exact: float


@dataclass(frozen=True)
class Fidelity:
    """Agreement of one column over the checked units.

    Attributes:
        spearman: rank correlation of estimates and exact values; None where a side is constant.
        low: lower end of its 95 % interval (Fisher's z).
        high: upper end.
        slope: of exact values on estimates, through the origin: 1 without a bias in scale.
        worst: the largest differences.
    """

    spearman: float | None
    low: float | None
    high: float | None
    slope: float | None
    worst: list[Miss]

    @classmethod
    def of(cls, estimated_K: Floats, exact_K: Floats, units: Sequence[Unit]) -> Fidelity:
        """The agreement of two columns."""
        rho = spearman(estimated_K, exact_K)
        interval = fisher_interval(rho, len(units))
        square = float(estimated_K @ estimated_K)
        worst = np.argsort(-np.abs(estimated_K - exact_K), kind="stable")[:_N_WORST]
        return cls(
            spearman=rho,
            low=None if interval is None else interval[0],
            high=None if interval is None else interval[1],
            slope=float(estimated_K @ exact_K) / square if square else None,
            worst=[Miss(list(units[i]), float(estimated_K[i]), float(exact_K[i])) for i in worst],
        )


def units_to_check(units: Sequence[Unit], score_H: Floats, n: int) -> list[int]:
    """Numbers of `n` units spread over depth and score: of every quarter of the layers, evenly over its scores."""
    if n >= len(units):
        return list(range(len(units)))
    by_depth = sorted(range(len(units)), key=lambda i: (units[i].layer, units[i].index))
    strata = equal_parts(by_depth, min(4, n))
    order = [i for stratum in strata for i in sorted(stratum, key=lambda i: (score_H[i], i))]
    # The middle of each of n equal stretches.
    return sorted(order[(2 * k + 1) * len(order) // (2 * n)] for k in range(n))


def compared(
    estimated: Measurements, exact: Measurements, units: Sequence[Unit], numbers: Sequence[int], *, verified: bool
) -> dict[str, Any]:
    """Agreement of every column of two maps of the same examples on the units that were measured exactly.

    Args:
        estimated: all units by attribution.
        exact: the same, with the exact outcomes of the checked units in their place. What is ranked among all units is
            then that of a map in which they alone are exact.
        units: all units.
        numbers: of the checked ones.
        verified: whether units near the border of the safe zone are measured exactly anyway.

    Returns:
        Plain JSON: `columns`, `units` and `warnings`.
    """
    one, other = estimated.columns(estimated.whole), exact.columns(exact.whole)
    checked = [units[i] for i in numbers]
    columns = {name: Fidelity.of(one[name][0, numbers], other[name][0, numbers], checked) for name in _COMPARED}
    return {
        "units": [list(unit) for unit in checked],
        "columns": {name: asdict(found) for name, found in columns.items()},
        "warnings": _warnings(columns["conflict_score"], len(checked), verified),
    }


def _warnings(score: Fidelity, n: int, verified: bool) -> list[str]:
    if score.spearman is not None and score.spearman >= FAITHFUL:
        return []
    found = "is undefined" if score.spearman is None else f"is {score.spearman:.2f}"
    near = "" if verified else 'those near the border of the safe zone (diagnose.verify = "zone"), or '
    return [
        f"The rank correlation of attributed and exact conflict scores {found} over {n} units, below {FAITHFUL}: "
        f'measure exactly {near}all units (diagnose.measure = "margin").'
    ]
