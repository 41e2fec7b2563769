"""From a conflict map to the heads that are trained (Section 3.5 of the paper). Pure."""

from __future__ import annotations

import math
import random
from collections import Counter

from castune.arms import SEEDED_ZONES, ZONES
from castune.artifacts import ConflictMap, HeadSelection
from castune.core.ranking import by_descending, equal_parts
from castune.errors import CastuneError

SCORE_COLUMNS = {
    "conflict": "conflict_score",
    "gradient": "optimization_conflict",
    "sensitivity": "functional_sensitivity",
}


def select(
    cmap: ConflictMap,
    *,
    zone: str = "safe",
    fraction: float = 0.25,
    buckets: int | None = None,
    bucket: int | None = None,
    score: str = "conflict",
    seed: int | None = None,
) -> HeadSelection:
    """Choose heads by their score.

    Heads are sorted by score, highest first; equal scores keep the order of layer and head, so that a selection is
    reproducible.

    Args:
        cmap: the conflict map.
        zone: `safe` takes the lowest scores, `risky` the highest, `random` any (by `seed`), `layer-matched` any with as
            many in each layer as `safe` (which tells whether the heads matter or only their layers), `all` all heads.
        fraction: share of heads in (0, 1], rounded to the nearest number of heads, at least one.
        buckets: cut the sorted heads into this many equal buckets B_1..B_M; sizes differ by at most one.
        bucket: take this bucket, 1 (highest scores) to `buckets`; `zone` and `fraction` are then not used.
        score: `conflict` C(h), `gradient` O(h) alone, `sensitivity` S(h) alone (Table 8).
        seed: seed of a random or layer-matched selection; required for it.

    Raises:
        CastuneError: an argument outside its range; the message lists what is accepted.
    """
    if score not in SCORE_COLUMNS:
        raise CastuneError(f"score is {score!r}, accepted: {', '.join(SCORE_COLUMNS)}")
    ordered = by_descending(cmap.heads, cmap.column(SCORE_COLUMNS[score]))
    if buckets is not None or bucket is not None:
        if buckets is None or bucket is None:
            raise CastuneError("buckets and bucket go together, for example --buckets 4 --bucket 1")
        if not 1 <= buckets <= len(ordered):
            raise CastuneError(f"buckets is {buckets}, accepted: 1 to {len(ordered)}, the number of heads")
        if not 1 <= bucket <= buckets:
            raise CastuneError(f"bucket is {bucket}, accepted: 1 (highest conflict) to {buckets}")
        chosen, zone, share = equal_parts(ordered, buckets)[bucket - 1], "bucket", None
    else:
        if not 0 < fraction <= 1 or math.isnan(fraction):
            raise CastuneError(f"fraction is {fraction}, accepted: above 0, at most 1")
        chosen, share = _zone(ordered, zone, max(1, round(fraction * len(ordered))), seed), fraction
    return HeadSelection(
        heads=tuple(chosen),
        zone=zone,
        fraction=1.0 if zone == "all" else share,
        buckets=buckets,
        bucket=bucket,
        score=score,
        seed=seed if zone in SEEDED_ZONES else None,
        n_total=len(ordered),
        model_fingerprint=cmap.fingerprint,
        conflict_map_hash=cmap.content_hash,
    )


def _zone(ordered: list[tuple[int, int]], zone: str, count: int, seed: int | None) -> list[tuple[int, int]]:
    if zone == "safe":
        return ordered[-count:]
    if zone == "risky":
        return ordered[:count]
    if zone == "all":
        return ordered
    if zone in SEEDED_ZONES:
        if seed is None:
            raise CastuneError(f"a {zone} selection needs a seed, for example --seed 21")
        generator = random.Random(seed)
        if zone == "random":
            return generator.sample(sorted(ordered), count)
        layers = Counter(layer for layer, _ in ordered[-count:])
        return [
            head
            for layer, n in sorted(layers.items())
            for head in generator.sample(sorted(h for h in ordered if h[0] == layer), n)
        ]
    raise CastuneError(f"zone is {zone!r}, accepted: {', '.join(ZONES)}")
