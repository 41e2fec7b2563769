"""One type of unit from the map to the certificate: a tuple with an order, one text form, and one way into files."""

from __future__ import annotations

import json
import random

from castune.artifacts import Unit
from castune.artifacts.unit import heads_of, joined, layers_of, only_heads
from castune.names import KINDS, kind_words, plural, units_counted

SORTED = [
    Unit("q_head", 0, 3), Unit("q_head", 10, 0), Unit("k_group", 2, 0), Unit("mlp_block", 0, 0), Unit("mlp_group", 0, 1),
    Unit("o_head", 0, 0), Unit("o_head", 0, 2), Unit("o_head", 1, 1), Unit("v_group", 0, 0),
]  # fmt: skip


def test_query_heads_come_first_and_other_kinds_by_name() -> None:
    mixed = random.Random(0).sample(SORTED, len(SORTED))
    assert sorted(mixed) == SORTED
    assert (min(mixed), max(mixed)) == (SORTED[0], SORTED[-1])
    for one, other in zip(SORTED, SORTED[1:], strict=False):
        assert one < other
        assert one <= other
        assert other > one
        assert other >= one
        assert not one > other
    assert SORTED[0] <= SORTED[0]


def test_a_unit_is_a_tuple_to_everybody_else() -> None:
    unit = Unit("o_head", 2, 5)
    assert unit == ("o_head", 2, 5)
    assert json.dumps([unit]) == '[["o_head", 2, 5]]'
    assert (str(unit), unit.place) == ("o_head 2.5", ("o_head", 2))
    assert Unit.head(1, 2) == Unit("q_head", 1, 2)


def test_texts_are_of_one_unit_each() -> None:
    assert len({str(one) for one in SORTED}) == len(SORTED)


def test_heads_apart_from_the_others_and_back() -> None:
    others = [one for one in SORTED if not one.is_head]
    assert heads_of(SORTED) == ((0, 3), (10, 0))
    assert joined(heads_of(SORTED), others) == tuple(SORTED)
    assert (only_heads(SORTED), only_heads(SORTED[:2]), only_heads([])) == (False, True, True)
    assert layers_of(SORTED) == (0, 1, 2, 10)


def test_kinds_have_one_spelling_for_one_and_one_for_many() -> None:
    assert {plural(single): single for single in KINDS.values()} == KINDS
    assert plural("neuron") == "neuron"


def test_people_read_words_for_every_kind() -> None:
    words = {kind: (kind_words(kind, 1), kind_words(kind)) for kind in KINDS.values()}
    assert len({word for pair in words.values() for word in pair}) == 2 * len(KINDS)
    assert not any("_" in word for pair in words.values() for word in pair)
    # Query heads are plain heads only where nothing else is spoken of.
    for kind in KINDS.values():
        alone = (kind_words(kind, 1, alone=True), kind_words(kind, alone=True))
        assert alone == (("head", "heads") if kind == "q_head" else words[kind])
    assert (kind_words("neuron", 1), kind_words("neuron")) == ("neuron", "neuron")


def test_units_are_counted_in_words() -> None:
    assert units_counted({"q_head": 1}) == "1 head"
    assert units_counted({"q_head": 1200, "mlp_group": 1}) == "1,200 query heads, 1 group of MLP neurons"
    assert units_counted({"k_group": 4}) == "4 KV groups by keys"
