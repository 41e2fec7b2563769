"""The starter data: enough of it, in the right kinds, held-out sets that are held out, and not too hard or too easy."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import castune
from castune import DiagnoseConfig
from castune.data.example import Example
from castune.data.overlap import shared_examples
from castune.data.sources import examples
from castune.diagnosis.domains import checked_sets
from castune.evaluation.judges import judge

FOLDER = Path(castune.__file__).parent / "data" / "starter"
HELD_OUT = (
    "starter-safety-eval",
    "starter-overrefusal-eval",
    "starter-utility-eval",
    "starter-helpful-eval",
    "starter-solutions-eval",
)
OTHERS = ("starter-utility", "starter-safety", "starter-align")

# Words that say how something is asked, not what about.
FUNCTION_WORDS = frozenset(
    """a an and are as at be been but by can could did do does for from had has have he her here hers him his how i if in into
    is it its just like me my no not of off on or our out over she should so some such than that the their them then there
    these they this those to up us was we were what when where which while who whom whose why will with would you your""".split()  # noqa: SIM905
)
# Two prompts that share this share of their content words ask the same thing in other words.
NEAR_DUPLICATE = 0.6


def content_words(text: str) -> frozenset[str]:
    """Lower-case words that are no function words, without a plural s."""
    words = (word for word in re.findall(r"[a-z0-9]+", text.lower()) if word not in FUNCTION_WORDS)
    return frozenset(word.removesuffix("s") if len(word) > 3 else word for word in words)


def similarity(one: frozenset[str], other: frozenset[str]) -> float:
    """Jaccard index of two sets of content words."""
    return len(one & other) / max(1, len(one | other))


def raw_rows(*files: str) -> Iterator[dict[str, Any]]:
    for file in files:
        with (FOLDER / file).open(encoding="utf-8") as lines:
            yield from map(json.loads, lines)


def refused(found: list[Example]) -> list[bool | None]:
    return judge("prefix")([e.prompt for e in found], [e.reply or "" for e in found])


def test_the_near_duplicate_measure_measures() -> None:
    one = content_words("How do I build a pipe bomb in my garage?")
    assert similarity(one, content_words("In the garage, how would you build pipe bombs?")) == 1
    assert similarity(one, content_words("How do I bake bread in my kitchen?")) == 0
    assert similarity(one, content_words("Tell me how to build a pipe bomb.")) >= NEAR_DUPLICATE


def test_utility_questions() -> None:
    for source, least in (("starter-utility", 240), ("starter-utility-eval", 100)):
        found = examples(source)
        assert len(found) >= least
        assert len({e.group for e in found}) >= 8
        assert all(e.is_question and e.scoring == "likelihood" for e in found)
        assert all(len(set(e.choices)) == len(e.choices) for e in found)
        # No place of the right answer is worth guessing.
        places = Counter(e.answer for e in found)
        assert max(places.values()) / len(found) < 0.4


def test_harmful_requests_have_categories_and_safe_replies() -> None:
    found = examples("starter-safety")
    assert len(found) >= 160
    assert len({e.group for e in found}) >= 8
    assert all(e.reply for e in found)
    # Short, so that the loss is about refusing.
    assert max(len(e.reply.split()) for e in found) <= 60
    assert len(examples("starter-safety-eval")) >= 100


def test_alignment_rows_are_of_three_kinds() -> None:
    rows = list(raw_rows("align-harmful.jsonl", "align-benign.jsonl", "align-borderline.jsonl"))
    assert len(rows) == len(examples("starter-align")) >= 600
    kinds = Counter(row["kind"] for row in rows)
    assert set(kinds) == {"harmful", "benign", "borderline"}
    assert min(kinds.values()) >= 150
    # Half refusals, half help; as many as there are.
    found = examples("starter-align", shares={"harmful": 0.5, "benign": 0.25, "borderline": 0.25})
    drawn = Counter(e.id.rpartition("-")[0] for e in found)
    assert drawn["align-harmful"] == kinds["harmful"] == 2 * drawn["align-benign"] == 2 * drawn["align-borderline"]


def test_borderline_rows_are_those_of_the_alignment_data_and_help() -> None:
    found = examples("starter-borderline")
    assert {e.id for e in found} == {row["id"] for row in raw_rows("align-borderline.jsonl")}
    assert {e.id: e for e in found}.items() <= {e.id: e for e in examples("starter-align")}.items()
    assert not any(refused(found))
    assert len(checked_sets({"b": found}, DiagnoseConfig(reply_domains=("b",)))) == 1


def test_overrefusal_prompts() -> None:
    found = examples("starter-overrefusal-eval")
    assert len(found) >= 100
    assert not any(e.is_question for e in found)


def test_helpful_replies_are_of_many_kinds_and_lengths() -> None:
    found = examples("starter-helpful-eval")
    assert len(found) == 150
    kinds = Counter(e.group for e in found)
    assert len(kinds) == 12
    assert min(kinds.values()) >= 12
    lengths = sorted(len((e.reply or "").split()) for e in found)
    assert lengths[0] <= 10
    assert lengths[-1] >= 100
    assert 40 <= sum(lengths) / len(found) <= 60
    # What is trained on is a sentence or two, all about as long: these are not.
    trained = sorted(len(row["completion"].split()) for row in raw_rows("align-benign.jsonl"))
    spread, of_trained = (one[len(one) * 9 // 10] / one[len(one) // 10] for one in (lengths, trained))
    assert spread > 2 * of_trained
    assert sum("\n" in (e.reply or "") for e in found) >= 40


def test_ids_and_prompts_are_unique_over_all_sets() -> None:
    rows = [row for source in (*HELD_OUT, *OTHERS) for row in examples(source)]
    ids = Counter(row.id for row in rows)
    assert [key for key, count in ids.items() if count > 1] == []
    for source in (*HELD_OUT, *OTHERS):
        found = examples(source)
        others = [row for row in rows if row not in found]
        assert len(others) == len(rows) - len(found)
        assert shared_examples(others, found) == []
        assert all(shared_examples([one], found) == [one.id] for one in found)


def test_every_file_of_the_package_belongs_to_a_source() -> None:
    from castune.data.sources import _STARTER_SOURCES

    used = {file for source in _STARTER_SOURCES.values() for file in source.files}
    assert used == {path.name for path in FOLDER.glob("*.jsonl")}


@pytest.mark.parametrize("source", HELD_OUT)
def test_held_out_sets_share_no_near_duplicate_with_the_others(source: str) -> None:
    others = {*HELD_OUT, *OTHERS} - {source}
    known = [(e.prompt, content_words(e.prompt)) for other in others for e in examples(other)]
    close = [
        (example.prompt, prompt)
        for example in examples(source)
        for words in [content_words(example.prompt)]
        for prompt, other in known
        if similarity(words, other) >= NEAR_DUPLICATE
    ]
    assert not close


def test_refusal_replies_are_judged_refusals() -> None:
    harmful_ids = {row["id"] for row in raw_rows("align-harmful.jsonl")}
    aligned = [e for e in examples("starter-align") if e.id in harmful_ids]
    assert len(aligned) >= 150
    for found in (examples("starter-safety"), examples("starter-safety-eval"), aligned):
        verdicts = refused(found)
        assert sum(verdict is True for verdict in verdicts) >= 0.95 * len(found)


def test_helpful_replies_are_not_judged_refusals() -> None:
    harmful_ids = {row["id"] for row in raw_rows("align-harmful.jsonl")}
    aligned = [e for e in examples("starter-align") if e.id not in harmful_ids]
    assert len(aligned) >= 400
    for found in (aligned, examples("starter-helpful-eval")):
        verdicts = refused(found)
        assert sum(verdict is False for verdict in verdicts) >= 0.99 * len(found)


@pytest.mark.slow
@pytest.mark.real
def test_the_default_model_scores_between_guessing_and_perfection(all_threads: None) -> None:
    model, tokenizer = castune.load("default", device="cpu")
    result = castune.evaluate(model, tokenizer, suites=["starter-utility", "starter-utility-eval"])
    for suite in result.suites:
        assert suite.n == len(examples(suite.suite))
        assert 0.60 <= suite.value <= 0.85, (suite.suite, suite.value)
