"""Selection: zones and buckets of a sorted list of heads."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from castune.artifacts import ConflictMap, HeadSelection, Unit
from castune.artifacts.conflict_map import SCHEMA
from castune.errors import ArtifactError, CastuneError
from castune.selection import choose_again, require_rule, select

SCORES = st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0, 2.5]) | st.floats(0, 3), min_size=1, max_size=40)


def make_map(
    conflict: Sequence[float], *, gradient: Sequence[float] | None = None, sensitivity: Sequence[float] | None = None
) -> ConflictMap:
    n = len(conflict)
    columns = {field.name: [0.5] * n for field in SCHEMA}
    columns |= {
        "unit": ["q_head"] * n, "layer": [i // 3 for i in range(n)], "head": [i % 3 for i in range(n)], "bucket": [1] * n,
        "conflict_score": conflict, "optimization_conflict": gradient or [0.5] * n,
        "functional_sensitivity": sensitivity or [0.5] * n,
    }  # fmt: skip
    return ConflictMap(pa.table(columns, schema=SCHEMA), {"model": {"fingerprint": "abc"}})


def with_magnitudes(cmap: ConflictMap, values: Sequence[float]) -> ConflictMap:
    return ConflictMap(cmap.table, {**cmap.metadata, "conflict_magnitude": list(values)})


def scores_of(cmap: ConflictMap, heads: Sequence[tuple[int, int]], column: str = "conflict_score") -> list[float]:
    table = dict(zip(cmap.heads, cmap.column(column), strict=True))
    return [table[head] for head in heads]


@settings(max_examples=60, deadline=None)
@given(scores=SCORES, fraction=st.floats(0.01, 1))
def test_safe_takes_the_lowest_and_risky_the_highest(scores: list[float], fraction: float) -> None:
    cmap = make_map(scores)
    for zone, sign in (("safe", 1), ("risky", -1)):
        chosen = select(cmap, zone=zone, fraction=fraction).heads
        left = set(cmap.heads) - set(chosen)
        inside, outside = (np.array(scores_of(cmap, list(heads))) * sign for heads in (chosen, left))
        assert not len(outside) or inside.max() <= outside.min()
        assert list(chosen) == sorted(set(chosen))
        assert abs(len(chosen) - fraction * len(scores)) <= 0.5 or len(chosen) == 1


@settings(max_examples=60, deadline=None)
@given(scores=SCORES, data=st.data())
def test_buckets_partition_all_heads_in_order_of_their_score(scores: list[float], data: st.DataObject) -> None:
    cmap = make_map(scores)
    buckets = data.draw(st.integers(1, len(scores)))
    parts = [select(cmap, buckets=buckets, bucket=number).heads for number in range(1, buckets + 1)]
    assert sorted(head for part in parts for head in part) == sorted(cmap.heads)
    sizes = [len(part) for part in parts]
    assert max(sizes) - min(sizes) <= 1
    values = [scores_of(cmap, part) for part in parts]
    for higher, lower in zip(values, values[1:], strict=False):
        assert min(higher) >= max(lower), "bucket 1 has the highest conflict"


def test_four_buckets_of_270_heads_are_those_of_the_paper() -> None:
    # 270 = 2 * 68 + 2 * 67, and B_1 and B_4 are the risky and the safe quarter.
    cmap = make_map(list(np.random.default_rng(0).random(270)))
    parts = [select(cmap, buckets=4, bucket=number) for number in (1, 2, 3, 4)]
    assert [len(part.heads) for part in parts] == [68, 68, 67, 67]
    assert set(parts[3].heads) <= set(select(cmap, zone="safe", fraction=0.25).heads)
    assert set(parts[0].heads) == set(select(cmap, zone="risky", fraction=0.25).heads)


def test_ties_keep_the_order_of_layer_and_head() -> None:
    flat = make_map([1.0] * 7)
    assert select(flat, zone="risky", fraction=3 / 7).heads == ((0, 0), (0, 1), (0, 2))
    assert select(flat, zone="safe", fraction=3 / 7).heads == ((1, 1), (1, 2), (2, 0))
    assert select(flat, buckets=3, bucket=1).heads == ((0, 0), (0, 1), (0, 2))
    mixed = make_map([1.0, 2.0, 1.0, 2.0, 1.0, 0.0])
    assert select(mixed, zone="risky", fraction=0.5).heads == ((0, 0), (0, 1), (1, 0))


@pytest.mark.parametrize(
    ("fraction", "n", "count"),
    [(1.0, 7, 7), (1e-12, 7, 1), (0.25, 270, 68), (0.25, 9, 2), (0.49, 2, 1), (0.999, 7, 7), (0.2, 1, 1), (1, 3, 3)],
)
def test_fraction_edge_cases(fraction: float, n: int, count: int) -> None:
    cmap = make_map([i / n for i in range(n)])
    for zone in ("safe", "risky", "random"):
        assert len(select(cmap, zone=zone, fraction=fraction, seed=1).heads) == count


@pytest.mark.parametrize("fraction", [0, -0.1, 1.0000001, math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("zone", ["safe", "risky", "random", "all"])
def test_fraction_outside_its_range_is_refused(zone: str, fraction: float) -> None:
    with pytest.raises(CastuneError, match=r"fraction is .*above 0, at most 1"):
        select(make_map([1.0, 2.0]), zone=zone, fraction=fraction, seed=1)


@pytest.mark.parametrize("seed", [0, 21])
def test_random_needs_a_seed_and_is_reproducible(seed: int) -> None:
    cmap = make_map([i / 40 for i in range(40)])
    with pytest.raises(CastuneError, match="seed"):
        select(cmap, zone="random")
    one, again = (select(cmap, zone="random", seed=seed) for _ in range(2))
    assert one == again
    assert one.seed == seed
    assert len(one.heads) == 10
    assert one.heads != select(cmap, zone="random", seed=seed + 1).heads


def test_random_does_not_look_at_the_scores() -> None:
    ascending, descending = (make_map([sign * i for i in range(40)]) for sign in (1, -1))
    assert select(ascending, zone="random", seed=3).heads == select(descending, zone="random", seed=3).heads


def test_random_reaches_every_head() -> None:
    cmap = make_map([1.0] * 12)
    seen = {head for seed in range(60) for head in select(cmap, zone="random", seed=seed).heads}
    assert seen == set(cmap.heads)


def test_all_takes_all() -> None:
    cmap = make_map([3.0, 1.0, 2.0])
    chosen = select(cmap, zone="all", fraction=0.25)
    assert chosen.heads == tuple(cmap.heads)
    assert chosen.fraction == 1.0


def test_the_safe_quarter_by_conflict_is_chosen_unless_told_otherwise() -> None:
    cmap = make_map([float(i * 7 % 12) for i in range(12)], gradient=[float(i) for i in range(12)])
    assert select(cmap) == select(cmap, zone="safe", fraction=0.25, score="conflict")
    assert sorted(scores_of(cmap, select(cmap).heads)) == [0, 1, 2]


def test_score_decides_the_column() -> None:
    cmap = make_map([3, 2, 1, 0], gradient=[0, 1, 2, 3], sensitivity=[1, 3, 0, 2])
    top = {
        score: select(cmap, zone="risky", fraction=0.25, score=score).heads
        for score in ("conflict", "gradient", "sensitivity")
    }
    assert top == {"conflict": ((0, 0),), "gradient": ((1, 0),), "sensitivity": ((0, 1),)}


def test_the_selection_says_what_it_was_made_from() -> None:
    cmap = make_map([1.0, 2.0, 3.0, 4.0])
    chosen = select(cmap, zone="safe", fraction=0.5, seed=5)
    assert (chosen.zone, chosen.fraction, chosen.buckets, chosen.bucket, chosen.score) == (
        "safe",
        0.5,
        None,
        None,
        "conflict",
    )
    assert (chosen.n_total, chosen.model_fingerprint, chosen.conflict_map_hash) == (4, "abc", cmap.content_hash)
    assert chosen.seed is None, "a seed that decided nothing is not recorded"
    part = select(cmap, buckets=2, bucket=2)
    assert (part.zone, part.fraction, part.buckets, part.bucket) == ("bucket", None, 2, 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"zone": "middle"}, "zone is 'middle', accepted: safe, risky, random, layer-matched, all"),
        ({"score": "luck"}, "score is 'luck', accepted: conflict, gradient, sensitivity"),
        ({"buckets": 4}, "go together"),
        ({"bucket": 1}, "go together"),
        ({"buckets": 0, "bucket": 1}, "buckets is 0, accepted: 1 to 4"),
        ({"buckets": 5, "bucket": 1}, "buckets is 5, accepted: 1 to 4"),
        ({"buckets": 4, "bucket": 0}, r"bucket is 0, accepted: 1 .*to 4"),
        ({"buckets": 4, "bucket": 5}, r"bucket is 5, accepted: 1 .*to 4"),
    ],
)
def test_arguments_outside_their_range_list_what_is_accepted(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(CastuneError, match=message):
        select(make_map([1.0, 2.0, 3.0, 4.0]), **arguments)


@settings(max_examples=60, deadline=None)
@given(scores=SCORES, fraction=st.floats(0.01, 1), seed=st.integers(0, 3))
def test_layer_matched_takes_as_many_heads_of_every_layer_as_safe(
    scores: list[float], fraction: float, seed: int
) -> None:
    cmap = make_map(scores)
    safe = select(cmap, zone="safe", fraction=fraction).heads
    matched = select(cmap, zone="layer-matched", fraction=fraction, seed=seed)
    assert sorted(layer for layer, _ in matched.heads) == sorted(layer for layer, _ in safe)
    assert matched == select(cmap, zone="layer-matched", fraction=fraction, seed=seed)
    assert matched.seed == seed


def test_layer_matched_heads_are_drawn_from_all_heads_of_a_layer() -> None:
    cmap = make_map([float(i) for i in range(30)])
    drawn = {select(cmap, zone="layer-matched", fraction=0.1, seed=seed).heads for seed in range(40)}
    assert len(drawn) == 1, "all three heads of layer 0 are the safe ones"
    drawn = {select(cmap, zone="layer-matched", fraction=1 / 30, seed=seed).heads for seed in range(40)}
    assert drawn == {((0, 0),), ((0, 1),), ((0, 2),)}


def test_layer_matched_needs_a_seed() -> None:
    with pytest.raises(CastuneError, match="layer-matched selection needs a seed"):
        select(make_map([1.0, 2.0]), zone="layer-matched")


# -- several kinds of unit


def mixed_map() -> ConflictMap:
    """Twelve query heads, twelve columns of heads and six groups of neurons, whose scores are ten times as high."""
    kinds = ["q_head"] * 12 + ["o_head"] * 12 + ["mlp_group"] * 6
    places = [(i // 4, i % 4) for i in range(12)] * 2 + [(i // 2, i % 2) for i in range(6)]
    scores = [*range(12), *range(12, 0, -1), *(10 * i for i in range(1, 7))]
    columns = {field.name: [0.5] * 30 for field in SCHEMA}
    columns |= {
        "unit": kinds, "layer": [layer for layer, _ in places], "head": [head for _, head in places],
        "conflict_score": [float(score) for score in scores], "bucket": [1] * 30,
    }  # fmt: skip
    metadata = {"model": {"fingerprint": "abc"}, "settings": {"mlp_groups": 2}}
    return ConflictMap(pa.table(columns, schema=SCHEMA), metadata)


def others(selection: HeadSelection) -> tuple[Unit, ...]:
    """What is selected beside query heads."""
    return tuple(one for one in selection.units if not one.is_head)


def test_every_kind_gives_the_same_share() -> None:
    """Whatever the scale of its scores."""
    safe = select(mixed_map(), zone="safe", fraction=1 / 3)
    assert safe.heads == ((0, 0), (0, 1), (0, 2), (0, 3))
    assert others(safe) == (
        ("mlp_group", 0, 0), ("mlp_group", 0, 1), ("o_head", 2, 0), ("o_head", 2, 1), ("o_head", 2, 2), ("o_head", 2, 3),
    )  # fmt: skip
    assert (safe.n_total, safe.mlp_groups, safe.fraction) == (30, 2, 1 / 3)
    assert safe.kinds == ("q_head", "mlp_group", "o_head")
    assert safe.layers == (0, 2)
    risky = select(mixed_map(), zone="risky", fraction=1 / 3)
    assert len(risky.heads) == 4
    assert ("mlp_group", 2, 1) in risky.units
    assert len(select(mixed_map(), zone="all").units) == 30


def test_buckets_partition_every_kind() -> None:
    parts = [select(mixed_map(), buckets=3, bucket=number) for number in (1, 2, 3)]
    assert sorted(one for part in parts for one in part.units) == sorted(mixed_map().units)
    assert [(len(part.heads), len(others(part))) for part in parts] == [(4, 6)] * 3
    assert ("mlp_group", 2, 1) in parts[0].units
    with pytest.raises(CastuneError, match="accepted: 1 to 6"):
        select(mixed_map(), buckets=7, bucket=1)


def test_random_draws_of_kinds_are_not_the_same() -> None:
    drawn = select(mixed_map(), zone="random", fraction=0.5, seed=3)
    assert drawn == select(mixed_map(), zone="random", fraction=0.5, seed=3)
    columns = {(layer, number) for kind, layer, number in drawn.units if kind == "o_head"}
    assert len(drawn.heads) == len(columns) == 6
    assert set(drawn.heads) != columns
    # Query heads are drawn as they are without other units.
    alone = ConflictMap(mixed_map().table.slice(0, 12), {"model": {"fingerprint": "abc"}})
    assert drawn.heads == select(alone, zone="random", fraction=0.5, seed=3).heads


def test_layer_matched_draws_match_the_layers_of_each_kind() -> None:
    matched, safe = (select(mixed_map(), zone=zone, fraction=1 / 3, seed=1) for zone in ("layer-matched", "safe"))
    for kind in ("q_head", "o_head", "mlp_group"):
        layers = [sorted(layer for k, layer, _ in one.units if k == kind) for one in (matched, safe)]
        assert layers[0] == layers[1]


def test_a_seed_draws_the_same_units_for_ever() -> None:
    """A run keeps the seed of an arm: with other draws of it, the same recipe would train other units."""
    random = select(mixed_map(), zone="random", fraction=1 / 3, seed=21)
    assert random.heads == ((0, 2), (1, 0), (1, 2), (2, 2))
    assert others(random) == (
        ("mlp_group", 0, 0), ("mlp_group", 1, 1), ("o_head", 0, 2), ("o_head", 1, 1), ("o_head", 2, 2), ("o_head", 2, 3),
    )  # fmt: skip
    matched = select(mixed_map(), zone="layer-matched", fraction=1 / 4, seed=21)
    assert matched.heads == ((0, 1), (0, 2), (0, 3))
    assert others(matched) == (
        ("mlp_group", 0, 0), ("mlp_group", 0, 1), ("o_head", 2, 0), ("o_head", 2, 2), ("o_head", 2, 3),
    )  # fmt: skip


# -- choosing again


@pytest.mark.parametrize(
    "rule",
    [
        {"zone": "safe", "fraction": 0.4, "score": "gradient"},
        {"zone": "risky", "fraction": 0.6, "score": "sensitivity"},
        {"zone": "layer-matched", "fraction": 0.3, "seed": 5},
        {"buckets": 3, "bucket": 2, "score": "gradient"},
    ],
)
def test_the_rule_of_a_selection_chooses_from_another_map(rule: dict[str, Any]) -> None:
    chance = np.random.default_rng(0)
    first, later = (
        make_map(list(chance.random(30)), gradient=list(chance.random(30)), sensitivity=list(chance.random(30)))
        for _ in range(2)
    )
    selection = select(first, **rule)
    assert choose_again(selection, first) == selection
    assert choose_again(selection, later) == select(later, **rule)
    assert choose_again(selection, later).heads != selection.heads


def test_heads_that_no_map_decides_on_are_not_chosen_again() -> None:
    cmap = make_map([1.0, 2.0, 3.0])
    custom = HeadSelection.custom([(0, 1)], n_total=3, model_fingerprint="abc")
    for selection in (select(cmap, zone="random", seed=1), select(cmap, zone="all"), custom):
        said = f"zone {selection.zone} .*Selected again can be: safe, risky, bucket, layer-matched$"
        with pytest.raises(CastuneError, match=said):
            choose_again(selection, cmap)
    for zone in ("safe", "risky", "bucket", "layer-matched"):
        require_rule(zone)


@given(scores=SCORES, fraction=st.floats(0.01, 1))
def test_magnitude_sorts_by_what_lies_beside_the_table(scores: list[float], fraction: float) -> None:
    cmap = with_magnitudes(make_map([0.5] * len(scores)), scores)
    chosen = select(cmap, fraction=fraction, score="magnitude")
    assert chosen.heads == select(make_map(scores), fraction=fraction).heads
    assert chosen.score == "magnitude"


def test_a_map_without_magnitudes_says_what_to_do() -> None:
    with pytest.raises(ArtifactError, match="earlier version of castune.*diagnose into another directory"):
        select(make_map([0.1, 0.2]), score="magnitude")


def test_magnitudes_belong_to_the_rows_of_their_map(tmp_path: Path) -> None:
    cmap = with_magnitudes(make_map([0.1, 0.2, 0.3]), [3.0, 1.0, 2.0])
    assert cmap.content_hash == make_map([0.1, 0.2, 0.3]).content_hash  # old selections stay those of their map
    assert ConflictMap.load(cmap.save(tmp_path)).column("conflict_magnitude").tolist() == [3.0, 1.0, 2.0]
    with pytest.raises(ArtifactError, match="2 of conflict_magnitude for 3 rows"):
        with_magnitudes(cmap, [1.0, 2.0])
