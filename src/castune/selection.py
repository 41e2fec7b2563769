"""From a conflict map to the heads, or units of other kinds, that are trained (Section 3.5 of the paper). Pure."""

from __future__ import annotations

import math
import random
from collections import Counter
from itertools import chain

from castune.artifacts import ConflictMap, HeadSelection, Unit
from castune.errors import CastuneError
from castune.names import SEEDED_ZONES, ZONES
from castune.stats.ranking import by_descending, equal_parts

SCORE_COLUMNS = {
    "conflict": "conflict_score",
    "gradient": "optimization_conflict",
    "sensitivity": "functional_sensitivity",
    "magnitude": "conflict_magnitude",
}

RULES = ("safe", "risky", "bucket", "layer-matched")
"""Zones whose heads another map would change."""


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
    reproducible. With several kinds of unit in the map everything is done within each kind, so that each gives the same
    share of its units: scores are made of ranks within a kind and do not compare between kinds.

    Args:
        cmap: the conflict map.
        zone: `safe` takes the lowest scores, `risky` the highest, `random` any (by `seed`), `layer-matched` any with as
            many in each layer as `safe` (which tells whether the heads matter or only their layers), `all` all heads.
        fraction: share of heads (of the units of each kind) in (0, 1], rounded to the nearest number, at least one.
        buckets: cut the sorted heads into this many equal buckets B_1..B_M; sizes differ by at most one.
        bucket: take this bucket, 1 (highest scores) to `buckets`; `zone` and `fraction` are then not used.
        score: `conflict` C(h), `gradient` O(h) alone, `sensitivity` S(h) alone (Table 8), or `magnitude` O(h) times the
            sizes of both gradients.
        seed: seed of a random or layer-matched selection; required for it.

    Raises:
        CastuneError: an argument outside its range; the message lists what is accepted.
        ArtifactError: `magnitude`, from a map of an earlier version that does not hold it.
    """
    if score not in SCORE_COLUMNS:
        raise CastuneError(f"score is {score!r}, accepted: {', '.join(SCORE_COLUMNS)}")
    units, scores = cmap.units, cmap.column(SCORE_COLUMNS[score])
    ordered_by_kind = [
        by_descending([units[row] for row in rows], scores[rows]) for rows in map(cmap.rows_of, cmap.kinds)
    ]
    share = None
    if buckets is not None or bucket is not None:
        zone, parts = "bucket", _bucket(ordered_by_kind, buckets, bucket)
    else:
        share, parts = fraction, _zone(ordered_by_kind, zone, fraction, seed)
    return HeadSelection(
        units=tuple(chain(*parts)),
        zone=zone,
        fraction=1.0 if zone == "all" else share,
        buckets=buckets,
        bucket=bucket,
        score=score,
        seed=seed if zone in SEEDED_ZONES else None,
        n_total=len(cmap),
        model_fingerprint=cmap.fingerprint,
        conflict_map_hash=cmap.content_hash,
        mlp_groups=cmap.mlp_groups,
    )


def choose_again(selection: HeadSelection, cmap: ConflictMap) -> HeadSelection:
    """The heads that the rule of an earlier selection takes from another map.

    Raises:
        CastuneError: no map decides on them.
    """
    require_rule(selection.zone)
    return select(
        cmap,
        zone="safe" if selection.zone == "bucket" else selection.zone,
        fraction=1.0 if selection.fraction is None else selection.fraction,
        buckets=selection.buckets,
        bucket=selection.bucket,
        score=selection.score,
        seed=selection.seed,
    )


def require_rule(zone: str) -> None:
    """Refuse to select again what no map decides on.

    Raises:
        CastuneError: random, all or custom heads.
    """
    if zone not in RULES:
        raise CastuneError(
            f"heads of zone {zone} are not chosen from a map, so that reselect_steps has no effect on them; leave it "
            f"out for this arm. Selected again can be: {', '.join(RULES)}"
        )


def _bucket(ordered_by_kind: list[list[Unit]], buckets: int | None, bucket: int | None) -> list[list[Unit]]:
    """One of equal parts of the units of each kind."""
    if buckets is None or bucket is None:
        raise CastuneError("buckets and bucket go together, for example --buckets 4 --bucket 1")
    fewest = min(map(len, ordered_by_kind))
    if not 1 <= buckets <= fewest:
        raise CastuneError(f"buckets is {buckets}, accepted: 1 to {fewest}, the number of heads")
    if not 1 <= bucket <= buckets:
        raise CastuneError(f"bucket is {bucket}, accepted: 1 (highest conflict) to {buckets}")
    return [equal_parts(ordered, buckets)[bucket - 1] for ordered in ordered_by_kind]


def _zone(ordered_by_kind: list[list[Unit]], zone: str, fraction: float, seed: int | None) -> list[list[Unit]]:
    """The same share of the units of each kind."""
    if not 0 < fraction <= 1 or math.isnan(fraction):
        raise CastuneError(f"fraction is {fraction}, accepted: above 0, at most 1")
    return [_of_kind(ordered, zone, max(1, round(fraction * len(ordered))), seed) for ordered in ordered_by_kind]


def _of_kind(ordered: list[Unit], zone: str, count: int, seed: int | None) -> list[Unit]:
    if zone == "safe":
        return ordered[-count:]
    if zone == "risky":
        return ordered[:count]
    if zone == "all":
        return ordered
    if zone in SEEDED_ZONES:
        if seed is None:
            raise CastuneError(f"a {zone} selection needs a seed, for example --seed 21")
        first = ordered[0]
        # Kinds with as many units must not get the same draws.
        generator = random.Random(seed if first.is_head else f"{seed} {first.kind}")
        if zone == "random":
            return generator.sample(sorted(ordered), count)
        layers = Counter(one.layer for one in ordered[-count:])
        return [
            one
            for layer, n in sorted(layers.items())
            for one in generator.sample(sorted(other for other in ordered if other.layer == layer), n)
        ]
    raise CastuneError(f"zone is {zone!r}, accepted: {', '.join(ZONES)}")
