"""How much the zones of two maps have in common, and what they would have by chance. Pure.

Shape letters: H head (all heads of the model in one axis), R resample.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from castune.diagnosis.score import Floats
from castune.stats.ranking import bucket_numbers

_BUCKETS = 4


@dataclass(frozen=True)
class ZoneStability:
    """Mean Jaccard overlap (shared heads / heads of either) of the zones of pairs of maps.

    Attributes:
        safe: of the safe zones, the quarter of the heads with the lowest C; None without such heads or pairs.
        risky: of the risky zones, the quarter with the highest C.
        safe_by_chance: what two independent random zones of the safe zone's size would overlap.
        risky_by_chance: the same for the risky zone.
        n_pairs: pairs in which every head has a score; the others have no zones.
    """

    safe: float | None
    risky: float | None
    safe_by_chance: float | None
    risky_by_chance: float | None
    n_pairs: int


def zone_stability(one_RH: Floats, other_RH: Floats) -> ZoneStability:
    """Overlap of the zones of two maps' C, row by row; the zones are those of `bucket_numbers`."""
    scored_R = (np.isfinite(one_RH) & np.isfinite(other_RH)).all(1)
    bucket_RH, other_bucket_RH = (bucket_numbers(c_RH[scored_R], _BUCKETS) for c_RH in (one_RH, other_RH))
    n_heads = one_RH.shape[1]
    # Which heads are in a zone does not matter to its size.
    sizes = np.bincount(bucket_numbers(np.zeros(n_heads), _BUCKETS), minlength=_BUCKETS + 1)

    def overlap(zone: int) -> tuple[float | None, float | None]:
        size = int(sizes[zone])
        if not size:
            return None, None
        shared_R = ((bucket_RH == zone) & (other_bucket_RH == zone)).sum(1)
        mean = float(np.mean(shared_R / (2 * size - shared_R))) if len(shared_R) else None
        return mean, expected_jaccard(size, n_heads)

    (safe, safe_by_chance), (risky, risky_by_chance) = overlap(_BUCKETS), overlap(1)
    return ZoneStability(safe, risky, safe_by_chance, risky_by_chance, int(scored_R.sum()))


def expected_jaccard(size: int, n_heads: int) -> float:
    """Mean Jaccard overlap of two random sets of `size` out of `n_heads` heads (hypergeometric)."""
    return sum(
        k / (2 * size - k) * (math.comb(size, k) * math.comb(n_heads - size, size - k) / math.comb(n_heads, size))
        for k in range(1, size + 1)
    )


def safe_border(score_H: Floats) -> float:
    """The score between the quarter of the lowest, the safe zone, and the others."""
    ordered, inside = np.sort(score_H), int((bucket_numbers(score_H, _BUCKETS) == _BUCKETS).sum())
    return float(ordered[max(0, inside - 1) : inside + 1].mean())
