"""Stand-ins for data that are not here: of the right number, kind and lengths, and told apart from the real ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from castune.core.loading import load_config
from castune.data.named import NAMED_SOURCES
from castune.data.sources import examples
from castune.errors import DataError, SourceUnreachable
from castune.plan.stand_ins import TYPICAL_SOURCES, DataOrStandIns, lengths_of, stand_ins


def test_every_named_source_has_a_size_and_lengths() -> None:
    assert TYPICAL_SOURCES.keys() == NAMED_SOURCES.keys()
    for name, source in NAMED_SOURCES.items():
        assert source.size in (None, TYPICAL_SOURCES[name].size)


@pytest.mark.parametrize("name", TYPICAL_SOURCES)
def test_stand_ins_are_examples_of_their_kind(name: str) -> None:
    found = stand_ins(name, limit=30, seed=3)
    typical = TYPICAL_SOURCES[name]
    assert len(found) == len({example.id for example in found}) == 30
    assert {example.is_question for example in found} == {typical.scoring == "letter"}
    assert {example.is_problem for example in found} == {typical.scoring in ("number", "boxed")}
    assert all((example.reply is None) == (typical.reply is None) for example in found)
    assert found == stand_ins(name, limit=30, seed=3)
    # Prompts that began alike would be packed as no real ones are.
    assert len({example.prompt.split()[0] for example in found}) > 5


@pytest.mark.parametrize("name", ["mmlu", "dan", "wildjailbreak-train"])
def test_stand_ins_have_the_lengths_of_the_table(name: str) -> None:
    _, tokenizer = load_config("default")
    typical, n = TYPICAL_SOURCES[name], 200

    def tokens(text: str) -> int:
        return len(tokenizer(text, add_special_tokens=False)["input_ids"])

    found = stand_ins(name, limit=n)
    prompts = [
        tokens("\n".join([example.prompt, *(f"A. {choice}" for choice in example.choices)])) for example in found
    ]
    assert sorted(prompts) == pytest.approx(lengths_of(typical.prompt, n), abs=2, rel=0.02)
    if typical.reply:
        assert sum(tokens(str(e.reply)) for e in found) == pytest.approx(sum(lengths_of(typical.reply, n)), rel=0.02)


@given(deciles=st.lists(st.integers(1, 5000), min_size=11, max_size=11).map(sorted), n=st.integers(1, 300))
def test_lengths_lie_within_their_deciles(deciles: list[int], n: int) -> None:
    found = lengths_of(deciles, n)
    assert len(found) == n
    assert found == sorted(found)
    assert deciles[0] <= found[0]
    assert found[-1] <= deciles[-1]


def test_what_is_not_to_be_had_is_stood_in_for_with_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def unreachable(name: str, *_rest: Any) -> Any:
        asked.append(name)
        raise SourceUnreachable(f"{name}: no network")

    monkeypatch.setattr("castune.data.sources._read_hub", unreachable)
    read = DataOrStandIns()
    assert len(read("wildguard")) == 754
    assert len(read("wildguard", limit=5)) == 5
    assert asked == ["wildguard"], "a hub that cannot be reached is asked once"
    assert len(read("gsm8k@v1", limit=7)) == 7
    assert [note.split(":")[0] for note in read.notes] == ["wildguard", "wildguard", "gsm8k"]
    assert "assumed" in read.notes[0]
    assert "measured" in read.notes[2]
    with pytest.raises(DataError, match="no network"):
        read("owner/name")


def test_real_data_are_taken_where_they_are(tmp_path: Path) -> None:
    read = DataOrStandIns()
    assert read("starter-utility", limit=3, seed=1) == examples("starter-utility", limit=3, seed=1)
    assert read.notes == []
    for source in (f"mmlu={tmp_path}/absent.jsonl", "absent.jsonl"):
        with pytest.raises(DataError, match="absent"):
            read(source)


@pytest.mark.parametrize(("name", "limit", "said"), [("mmlu", 0, "at least 1"), ("nowhere", 3, "known: mmlu")])
def test_bad_stand_ins_are_refused(name: str, limit: int, said: str) -> None:
    with pytest.raises(DataError, match=said):
        stand_ins(name, limit=limit)
