"""Names of arms: what they say, and that every selection's name leads back to it."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from castune.config import SelectConfig
from castune.errors import CastuneError
from castune.names import SCORES, ZONES, ArmName, heads_name


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("safe", ArmName("safe")),
        ("risky-50", ArmName("risky", fraction=0.5)),
        ("safe-12.5-gradient", ArmName("safe", fraction=0.125, score="gradient")),
        ("layer-matched", ArmName("layer-matched")),
        ("bucket-2-of-4-sensitivity", ArmName(bucket=2, buckets=4, score="sensitivity")),
        ("all+pcgrad-symmetric", ArmName("all", changes=(("surgery", "pcgrad-symmetric"),))),
        ("random-75+dpo+pcgrad", ArmName("random", fraction=0.75, changes=(("method", "dpo"), ("surgery", "pcgrad")))),
        ("safe+replay-10", ArmName("safe", changes=(("replay", 0.1),))),
        ("safe+nullspace-95", ArmName("safe", changes=(("null_space", 0.95),))),
        ("risky+pcgrad+nullspace-99.5", ArmName("risky", changes=(("null_space", 0.995), ("surgery", "pcgrad")))),
    ],
)
def test_what_a_name_says(text: str, expected: ArmName) -> None:
    assert ArmName.parse(text) == expected


@given(
    zone=st.sampled_from([zone for zone in ZONES if zone != "all"]),
    percent=st.integers(1, 100),
    score=st.sampled_from(SCORES),
)
def test_the_name_of_a_selection_leads_back_to_it(zone: str, percent: int, score: str) -> None:
    name = ArmName.parse(heads_name(zone, percent / 100, None, None, score))
    assert name.zone == zone
    assert name.fraction in (percent / 100, None)
    assert (name.fraction is None) == (percent == 25)
    # Random heads are the same whatever they are sorted by.
    assert (name.score or "conflict") == ("conflict" if zone == "random" else score)


@given(word=st.sampled_from(["replay", "nullspace"]), tenths=st.integers(1, 999))
def test_the_suffix_of_a_name_leads_back_to_its_changes(word: str, tenths: int) -> None:
    name = ArmName.parse(f"safe+dpo+{word}-{tenths / 10:g}")
    assert ArmName.parse(f"safe{name.suffix}") == name
    assert f"+{word}-{tenths / 10:g}" in name.suffix


def test_names_differ_where_selections_do() -> None:
    names = [heads_name(*parts, None, None, "conflict") for parts in itertools.product(("safe", "risky"), (0.5, 0.25))]
    assert len(set(names)) == 4


@pytest.mark.parametrize("share", [0.25, 68 / 270, 67 / 270])
def test_a_quarter_rounded_to_heads_is_a_quarter(share: float) -> None:
    assert heads_name("risky", share, None, None, "conflict") == "risky"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "accepted: safe"),
        ("nowhere", "accepted: safe"),
        ("safe-0", "above 0"),
        ("safe-101", "at most 100"),
        ("safe-", "accepted: safe"),
        ("bucket-5-of-4", "numbered 1"),
        ("bucket-0-of-4", "numbered 1"),
        ("bucket-1", "bucket-1-of-4"),
        ("safe+", r"\+pcgrad"),
        ("safe+scalpel", r"\+pcgrad"),
        ("safe+replay-100", "below 100"),
        ("safe+replay-0", "above 0"),
        ("safe+nullspace-100", "below 100"),
        ("safe+nullspace-0", "above 0"),
        ("safe+nullspace", r"\+nullspace-PERCENT"),
        ("safe+nullspace-90+nullspace-95", "twice"),
        ("safe+pcgrad+cagrad", "twice"),
        ("../safe", "accepted: safe"),
        ("safe/../x", "accepted: safe"),
        ("safe\n", "accepted: safe"),
    ],
)
def test_what_is_no_name(text: str, said: str) -> None:
    with pytest.raises(CastuneError, match=said):
        ArmName.parse(text)


@pytest.mark.parametrize("names", [["random"], ["layer-matched-50"], ["safe"], ["risky", "risky"], ["nowhere"]])
def test_a_recipe_refuses_what_it_cannot_compare(names: list[str]) -> None:
    with pytest.raises(CastuneError, match="compare|seed|arm"):
        SelectConfig(compare=names)


def test_a_recipe_takes_every_kind_of_arm() -> None:
    names = ["risky", "random", "layer-matched", "all", "bucket-2-of-4", "safe-50", "safe-gradient", "safe+pcgrad"]
    assert SelectConfig(compare=names, seed=1).compare == tuple(names)


@pytest.mark.parametrize(
    ("text", "key", "share"), [("safe+nullspace-99.9", "null_space", 0.999), ("safe+replay-0.7", "replay", 0.007)]
)
def test_shares_are_the_numbers_that_are_typed(text: str, key: str, share: float) -> None:
    assert ArmName.parse(text).changes == ((key, share),)
