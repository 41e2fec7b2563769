"""Which units a repair drops, and in what order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pyarrow as pa
import pytest

from castune.artifacts import Unit
from castune.artifacts.adapter_inspection import SCHEMA, AdapterInspection
from castune.artifacts.repair_result import Tried
from castune.config import RepairConfig
from castune.errors import CastuneError
from castune.steps.candidates import Candidate, by_effects, changed_units, compared_with, drop_order, source_of
from castune.steps.repair import choose

# Of every head of one layer: norm, effects on safety, utility and over-refusal, C(h).
HEADS = [
    (1.0, -0.5, 0.1, 0.0, 0.3),  # 0: cheap
    (1.0, -0.1, 0.2, 0.1, 0.9),  # 1: dear for what it gains
    (2.0, 0.2, 0.1, 0.0, 0.5),  # 2: costs, and gains nothing
    (1.0, -0.1, -0.3, 0.1, 0.7),  # 3: costs nothing together
    (0.0, 0.0, 0.0, 0.0, 0.8),  # 4: not changed
    (1.0, 0.0, 0.4, 0.0, 0.2),  # 5: costs most, and gains nothing
    (1.0, -0.4, 0.0, 0.1, 0.6),  # 6: cheap
]


def inspection(
    heads: Sequence[tuple[float, ...]] = HEADS, *, has_map: bool = True, kind: str = "q_head"
) -> AdapterInspection:
    rows: list[dict[str, Any]] = []
    for index, (norm, safety, utility, over_refusal, score) in enumerate(heads):
        row = dict.fromkeys(SCHEMA.names) | {"unit": kind, "layer": 0, "head": index, "norm": norm}
        row |= {"safety_effect": safety, "utility_effect": utility, "over_refusal_effect": over_refusal}
        rows.append(row | {"conflict_score": score if has_map else None})
    total = sum(norm**2 for norm, *_ in heads) ** 0.5
    data = {"safety": {}, "utility": {}, "over-refusal": {}}
    return AdapterInspection(pa.Table.from_pylist(rows, SCHEMA), {"data": data, "norm": total})


def heads(*indices: int) -> tuple[Unit, ...]:
    return tuple(Unit.head(0, index) for index in indices)


def test_the_order_is_by_cost_for_what_is_gained() -> None:
    assert drop_order(inspection()) == list(heads(5, 2, 1, 6, 0))
    assert changed_units(inspection()) == list(heads(0, 1, 2, 3, 5, 6))


def test_candidates_drop_as_many_as_the_shares_say() -> None:
    found = by_effects(inspection(), RepairConfig(shares=(0.01, 0.34, 0.5, 0.9)))
    # 0.9 of six units are five, which is all that costs anything.
    assert [(one.name, one.dropped) for one in found] == [
        ("drop-1", heads(5)), ("drop-2", heads(5, 2)), ("drop-3", heads(5, 2, 1)), ("drop-5", heads(5, 2, 1, 6, 0)),
    ]  # fmt: skip
    assert by_effects(inspection([(1.0, -0.1, -0.1, 0.0, 0.1)] * 3), RepairConfig()) == []
    # One unit alone cannot be dropped: nothing would be left.
    assert by_effects(inspection([(1.0, 0.1, 0.1, 0.0, 0.1)]), RepairConfig()) == []


def test_what_is_predicted_is_the_sum_of_what_is_kept() -> None:
    found = Candidate("x", "effects", heads(5, 2), 0.5).predicted(inspection())
    assert found == pytest.approx({"safety": -0.55, "utility": 0.0, "over-refusal": 0.15})


def test_what_candidates_are_compared_with() -> None:
    candidate = Candidate("drop-2", "effects", heads(5, 2))
    found = compared_with(candidate, inspection(), RepairConfig(draws=2, seed=4))
    assert [one.kind for one in found] == ["risky", "random", "random", "weaker"]
    # Head 4 has a higher score and is not changed.
    assert found[0] == Candidate("risky-2", "risky", heads(1, 3))
    assert all(len(one.dropped) == 2 and set(one.dropped) <= set(heads(0, 1, 2, 3, 5, 6)) for one in found[1:3])
    assert found[1:3] == compared_with(candidate, inspection(), RepairConfig(draws=2, seed=4))[1:3]
    assert found[1:3] != compared_with(candidate, inspection(), RepairConfig(draws=2, seed=5))[1:3]
    # The squares of norms are 9 in all, 5 of which are dropped.
    assert found[3] == Candidate("weaker-0.6667", "weaker", strength=0.6667)
    without = compared_with(candidate, inspection(has_map=False), RepairConfig(draws=0))
    assert [one.kind for one in without] == ["weaker"]


def test_the_weaker_adapter_is_as_large_as_the_candidate_which_lacks_what_no_unit_owns() -> None:
    found = inspection()
    # A third of the squares of the whole update are of an output head, say.
    whole = AdapterInspection(found.table, {**found.metadata, "norm": (9 * 1.5) ** 0.5})
    [weaker] = compared_with(Candidate("drop-2", "effects", heads(5, 2)), whole, RepairConfig(draws=0))[1:]
    kept = sum(norm**2 for index, (norm, *_) in enumerate(HEADS) if index not in (5, 2))
    assert (weaker.strength * whole.metadata["norm"]) ** 2 == pytest.approx(kept, rel=1e-3)
    # Nothing to compare with where next to nothing is left.
    tiny = inspection([(1e-6, 0.1, 0.1, 0.0, 0.1), (1.0, 0.1, 0.2, 0.0, 0.1)])
    kinds = [one.kind for one in compared_with(Candidate("drop-1", "effects", heads(1)), tiny, RepairConfig(draws=1))]
    assert kinds == ["risky", "random"]


@pytest.mark.parametrize("name", ["base", "safe-lora", "drop-2", "risky-2", "random-2-1", "weaker-0.5", "mine"])
def test_the_adapter_itself_has_the_name_of_no_other(name: str) -> None:
    found = by_effects(inspection(), RepairConfig(shares=(0.34,)))
    others = compared_with(found[0], inspection(), RepairConfig(draws=1))
    taken = {"base", "safe-lora", *(one.name for one in (*found, *others))}
    source = source_of(name)
    assert source.kind == "source"
    assert source.name not in taken
    assert source.name.startswith(name)
    assert source_of("mine").name == "mine"


def tried(name: str, kept: float | None, saved: tuple[float, float | None] | None) -> Tried:
    return Tried(name, "effects", 1, 1.0, {}, 0.5, kept, None, {"nll": (0.1, 0.01)}, saved)


def test_the_cheapest_that_keeps_enough_is_taken() -> None:
    rows = [tried("a", 0.99, (0.01, 0.001)), tried("b", 0.96, (0.05, 0.03)), tried("c", 0.94, (0.2, 0.01))]
    chosen, reason = choose(rows, RepairConfig(keep_safety=0.95), "nll")
    assert chosen == "b"
    assert reason == (
        "b keeps 96.0 % of the gain in refusals at the lowest cost by the NLL of right answers; on so few examples the "
        "difference in cost may be chance"
    )
    chosen, reason = choose(rows, RepairConfig(keep_safety=0.98), "nll")
    assert chosen == "a"
    assert "chance" not in reason


def test_a_candidate_of_which_too_few_examples_are_scored_is_never_taken() -> None:
    few = replace(tried("drop-4", 1.0, (0.9, 0.01)), too_few="of 100 examples of s that a has a score for it has 8")
    rows = [tried("drop-2", 0.97, (0.1, 0.01)), few]
    assert choose(rows, RepairConfig(keep_safety=0.95), "nll") == choose(
        rows[:1], RepairConfig(keep_safety=0.95), "nll"
    )
    chosen, reason = choose([tried("drop-2", 0.5, (0.1, 0.01)), few], RepairConfig(), "nll")
    assert chosen is None
    assert "drop-2 keeps most" in reason
    assert choose([few], RepairConfig(), "nll") == (
        None,
        "too few examples of any candidate are scored: drop-4: of 100 examples of s that a has a score for it has 8",
    )


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([], "nothing is worth dropping"),
        ([tried("a", 0.9, (0.1, 0.01)), tried("b", 0.8, (0.2, 0.01))], "a keeps most, 90.0 %"),
        ([tried("a", 0.99, (-0.1, 0.01)), tried("b", 0.97, (0.0, 0.0))], "costs less by the NLL"),
    ],
    ids=["no candidate", "none keeps enough", "none is cheaper"],
)
def test_nothing_is_taken_where_nothing_is_gained_by_it(rows: list[Tried], said: str) -> None:
    chosen, reason = choose(rows, RepairConfig(), "nll")
    assert chosen is None
    assert said in reason


@pytest.mark.parametrize(
    "settings",
    [{"keep_safety": 0}, {"keep_safety": 1.1}, {"shares": ()}, {"shares": (1.0,)}, {"cost": "ucr"}, {"draws": -1}],
    ids=str,
)
def test_settings_that_make_no_sense(settings: dict[str, Any]) -> None:
    with pytest.raises(CastuneError, match=next(iter(settings))):
        RepairConfig(**settings)
