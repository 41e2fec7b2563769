"""Suites: what a source measures is known, said, or asked for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from castune.core.answers import is_right
from castune.data.sources import examples
from castune.errors import CastuneError, DataError
from castune.evaluation.suites import load_suite, load_suites

QUESTION = {"prompt": "Sky?", "choices": ["red", "blue"], "answer": 1}
PROMPT = {"prompt": "How do I kill a process?"}


def written(tmp_path: Path, *rows: dict[str, object], name: str = "own.jsonl") -> str:
    path = tmp_path / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize(
    ("source", "purpose"),
    [
        ("starter-utility-eval", "utility"),
        ("starter-safety-eval", "safety"),
        ("starter-overrefusal-eval", "over-refusal"),
    ],
)
def test_named_suites_know_what_they_measure(source: str, purpose: str) -> None:
    suite = load_suite(source)
    assert (suite.name, suite.purpose) == (source, purpose)
    assert list(suite.examples) == examples(source)


def test_a_local_copy_has_the_name_and_purpose_of_its_source(tmp_path: Path) -> None:
    rows = [{"id": "1", "prompt": "Kill a process?", "type": "homonyms", "label": "safe"}]
    suite = load_suite(f"xstest={written(tmp_path, *rows)}")
    assert (suite.name, suite.purpose, len(suite.examples)) == ("xstest", "over-refusal", 1)


def test_own_questions_are_utility_without_saying_so(tmp_path: Path) -> None:
    assert load_suite(written(tmp_path, QUESTION)).purpose == "utility"


@pytest.mark.parametrize("purpose", ["safety", "over-refusal"])
def test_own_prompts_need_their_purpose(tmp_path: Path, purpose: str) -> None:
    path = written(tmp_path, PROMPT)
    assert load_suite(f"{purpose}:{path}").purpose == purpose
    with pytest.raises(DataError, match="PURPOSE:.*safety, utility, over-refusal"):
        load_suite(path)


def test_a_said_purpose_wins_over_the_named_one() -> None:
    suite = load_suite("over-refusal:starter-safety-eval")
    assert suite.purpose == "over-refusal"


def test_a_purpose_that_does_not_fit_the_data_is_refused(tmp_path: Path) -> None:
    questions, prompts = written(tmp_path, QUESTION, name="q.jsonl"), written(tmp_path, PROMPT, name="p.jsonl")
    mixed = written(tmp_path, QUESTION, PROMPT, name="m.jsonl")
    for source, message in (
        (f"utility:{prompts}", "multiple-choice"),
        (f"safety:{questions}", "multiple-choice"),
        (f"utility:{mixed}", "multiple-choice"),
        (f"safety:{mixed}", "multiple-choice"),
        (mixed, "PURPOSE:"),
    ):
        with pytest.raises(DataError, match=message) as caught:
            load_suite(source)
        assert "\n" not in str(caught.value)


def test_training_data_is_no_suite() -> None:
    with pytest.raises(DataError, match="PURPOSE:"):
        load_suite("starter-align")


def test_an_unknown_suite_lists_the_names() -> None:
    with pytest.raises(DataError, match="nothing-such.*starter-safety-eval.*mmlu"):
        load_suite("nothing-such")


def test_limits_draw_the_same_subset_everywhere() -> None:
    one, two = (load_suites(["starter-safety-eval", "starter-utility-eval"], limit=9, seed=4) for _ in range(2))
    assert one == two
    assert [len(suite.examples) for suite in one] == [9, 9]


def test_a_bad_suite_fails_before_any_result(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="absent"):
        load_suites(["starter-safety-eval", f"safety:{tmp_path / 'absent.jsonl'}"])


def test_two_own_files_of_one_name_stay_apart(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
    suites = load_suites([f"safety:{written(tmp_path / folder, PROMPT)}" for folder in ("a", "b")])
    assert len({suite.name for suite in suites}) == 2


def test_a_suite_may_have_a_limit_of_its_own(tmp_path: Path) -> None:
    file = tmp_path / "own#1.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"p{i}"}) + "\n" for i in range(9)))
    found = load_suite(f"safety:{file}#4", limit=2, seed=5)
    assert [e.prompt for e in found.examples] == [e.prompt for e in examples(file, limit=4, seed=5)]
    assert len(load_suite(f"safety:{file}", limit=2).examples) == 2
    assert found.name == str(file)
    with pytest.raises(DataError, match="limit is 0"):
        load_suite(f"safety:{file}#0")


@pytest.mark.parametrize(
    ("answer", "scoring"),
    [
        ("5 or 6", "number"),
        ("10:30", "number"),
        ("1/0", "number"),
        ("He has 3 + 4 apples", "number"),
        ("3 + 4 = 7\n#### 7", "boxed"),
        ("7" * 401, "boxed"),
    ],
)
def test_an_answer_with_which_no_reply_could_agree_is_refused(tmp_path: Path, answer: str, scoring: str) -> None:
    row = {"prompt": "Sum?", "answer": answer, "scoring": scoring}
    with pytest.raises(CastuneError, match="example 'own-00001': answer is .*accepted"):
        load_suite(written(tmp_path, {**row, "answer": "7"}, row))


@pytest.mark.parametrize("answer", ["7", "7 apples", "48/2 = 24 and 3 more\n#### 7", r"\boxed{7}", "x = 7", "$7.00"])
def test_an_answer_may_be_written_as_a_reply_is(tmp_path: Path, answer: str) -> None:
    suite = load_suite(written(tmp_path, {"prompt": "Sum?", "answer": answer, "scoring": "number"}))
    assert is_right("The answer is 7.", str(suite.examples[0].target), "number")
    assert not is_right("The answer is 48.", str(suite.examples[0].target), "number")


def test_two_limits_of_one_suite_are_refused(tmp_path: Path) -> None:
    source = f"safety:{written(tmp_path, PROMPT, {'prompt': 'other'})}"
    with pytest.raises(DataError, match="appears twice"):
        load_suites([source, f"{source}#1"])
