"""Data sources: every layout is read, every fault is named with its place, subsets are reproducible."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import pytest

from castune.data.example import Message, content_hash
from castune.data.named import NAMED_SOURCES
from castune.data.sources import SOURCE_NAMES, examples, purpose_of
from castune.errors import DataError, SourceUnreachable
from castune.plan.stand_ins import DataOrStandIns

Row = dict[str, Any]
Write = Callable[..., Path]

QUESTION = {"prompt": "Sky?", "choices": ["red", "blue"], "answer": 1, "scoring": "likelihood", "subject": "nature"}
ALIGNED = [{"prompt": f"Ask {i}", "completion": f"Reply {i}", "kind": "benign"} for i in range(20)]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write_jsonl(*rows: Row | str, name: str = "own.jsonl") -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
        return path

    return write_jsonl


# -- castune's own columns


def test_multiple_choice_columns(write: Write) -> None:
    [example] = examples(write({"id": "q7", **QUESTION}))
    assert (example.id, example.prompt, example.choices, example.answer) == ("q7", "Sky?", ("red", "blue"), 1)
    assert (example.scoring, example.group, example.reply) == ("likelihood", "nature", None)
    assert example.right_reply == "blue"


def test_letter_scoring_is_the_default_and_its_reply_is_a_letter(write: Write) -> None:
    row = {key: value for key, value in QUESTION.items() if key != "scoring"}
    [example] = examples(write(row))
    assert example.scoring == "letter"
    assert example.right_reply == "B"
    assert example.user_text.endswith("Sky?\nA. red\nB. blue")


@pytest.mark.parametrize("column", ["target", "completion"])
def test_prompt_with_reply(write: Write, column: str) -> None:
    [example] = examples(write({"prompt": "Hi", column: "Hello.", "category": "greeting"}))
    assert (example.prompt, example.reply, example.group) == ("Hi", "Hello.", "greeting")


def test_instruction_columns_join_the_input(write: Write) -> None:
    with_input, without = examples(
        write(
            {"instruction": "Translate.", "input": "Hund", "output": "dog"},
            {"instruction": "Count.", "input": "", "output": "1 2 3"},
        )
    )
    assert "Translate." in with_input.prompt
    assert "Hund" in with_input.prompt
    assert (without.prompt, without.reply) == ("Count.", "1 2 3")


def test_messages_column_keeps_history_and_takes_the_last_reply(write: Write) -> None:
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "One?"},
        {"role": "assistant", "content": "One."},
        {"role": "user", "content": "Two?"},
        {"role": "assistant", "content": "Two."},
    ]
    [example] = examples(write({"messages": turns}))
    assert (example.prompt, example.reply) == ("Two?", "Two.")
    assert example.history == tuple(Message(t["role"], t["content"]) for t in turns[:3])
    assert example.messages() == turns[:-1]


def test_prompt_and_completion_message_lists_equal_one_conversation(write: Write) -> None:
    user, assistant = {"role": "user", "content": "Two?"}, {"role": "assistant", "content": "Two."}
    split, joined = examples(
        write({"prompt": [user], "completion": [assistant], "id": "a"}, {"messages": [user, assistant], "id": "b"})
    )
    assert (split.prompt, split.reply, split.history) == (joined.prompt, joined.reply, joined.history)


def test_conversation_without_a_user_turn_before_the_reply_is_refused(write: Write) -> None:
    path = write({"messages": [{"role": "assistant", "content": "Hello."}]})
    with pytest.raises(DataError, match="line 1.*user turn"):
        examples(path)


def test_conversation_may_end_with_the_user(write: Write) -> None:
    [example] = examples(write({"messages": [{"role": "user", "content": "Hi"}]}))
    assert (example.prompt, example.reply) == ("Hi", None)


# -- file formats


@pytest.mark.parametrize("suffix", ["jsonl", "json", "parquet", "csv", "tsv"])
def test_every_file_format_gives_the_same_examples(tmp_path: Path, suffix: str) -> None:
    rows = [{"id": f"r{i}", "prompt": f'Say "{i}", twice', "completion": f"line {i}\nline two, ü"} for i in range(3)]
    path, table = tmp_path / f"same.{suffix}", pa.Table.from_pylist(rows)
    if suffix == "jsonl":
        path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    elif suffix == "json":
        path.write_text(json.dumps(rows), encoding="utf-8")
    elif suffix == "parquet":
        pa.parquet.write_table(table, path)
    else:
        options = pa.csv.WriteOptions(delimiter="\t" if suffix == "tsv" else ",")
        pa.csv.write_csv(table, path, options)
    found = examples(path)
    assert [(e.id, e.prompt, e.reply) for e in found] == [(r["id"], r["prompt"], r["completion"]) for r in rows]


def test_parquet_holds_questions_and_conversations(tmp_path: Path) -> None:
    pa.parquet.write_table(pa.Table.from_pylist([QUESTION]), tmp_path / "q.parquet")
    [question] = examples(tmp_path / "q.parquet")
    assert (question.choices, question.answer) == (("red", "blue"), 1)
    talk = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]
    pa.parquet.write_table(pa.Table.from_pylist([{"messages": talk}]), tmp_path / "m.parquet")
    [conversation] = examples(tmp_path / "m.parquet")
    assert (conversation.prompt, conversation.reply) == ("Hi", "Hello.")


def test_columns_that_are_null_count_as_absent(tmp_path: Path) -> None:
    # A table that joins harmful rows (target) and benign ones (completion) has both columns in every row.
    rows = [{"prompt": "a", "target": "No.", "completion": None}, {"prompt": "b", "target": None, "completion": "Yes."}]
    pa.parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "both.parquet")
    assert [example.reply for example in examples(tmp_path / "both.parquet")] == ["No.", "Yes."]


def test_unicode_line_separators_inside_a_string_stay_one_row(write: Write) -> None:
    text = "first\u2028second\u2029third\x85fourth"
    [example, _] = examples(write(json.dumps({"prompt": text}, ensure_ascii=False), {"prompt": "next"}))
    assert example.prompt == text


def test_blank_lines_are_no_rows_but_count_as_lines(write: Write) -> None:
    assert len(examples(write({"prompt": "a"}, "", "   ", {"prompt": "b"}))) == 2
    with pytest.raises(DataError, match=r"own\.jsonl line 3"):
        examples(write({"prompt": "a"}, "", "{"))


def test_rows_without_id_get_stable_distinct_ids(write: Write) -> None:
    path = write(*ALIGNED)
    ids = [example.id for example in examples(path)]
    assert len(set(ids)) == len(ids) == 20
    assert ids == [example.id for example in examples(path)]
    assert all(re.fullmatch(r"own-\d+", identifier) for identifier in ids)


def test_integer_ids_are_kept_zero_included(write: Write) -> None:
    found = examples(write({"id": 0, "prompt": "a"}, {"id": 1, "prompt": "b"}))
    assert [example.id for example in found] == ["0", "1"]


# -- faults


def test_missing_file_is_named() -> None:
    with pytest.raises(DataError, match=r"nowhere\.jsonl: no such file"):
        examples("/nowhere.jsonl")


def test_malformed_jsonl_names_file_and_line(write: Write) -> None:
    path = write({"prompt": "a"}, {"prompt": "b"}, '{"prompt": "c"')
    with pytest.raises(DataError, match=rf"{re.escape(str(path))} line 3"):
        examples(path)


@pytest.mark.parametrize("line", ["[1, 2]", '"text"', "3", "null"])
def test_a_line_that_is_no_object_is_refused(write: Write, line: str) -> None:
    with pytest.raises(DataError, match="line 2.*object"):
        examples(write({"prompt": "a"}, line))


@pytest.mark.parametrize("suffix", ["json", "parquet"])
def test_damaged_files_of_other_formats_are_named_in_one_line(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"damaged.{suffix}"
    path.write_bytes(b'[{"prompt": "a"}, {')
    with pytest.raises(DataError, match=re.escape(str(path))) as caught:
        examples(path)
    assert "\n" not in str(caught.value)


def test_not_utf8_is_named(tmp_path: Path) -> None:
    path = tmp_path / "latin.jsonl"
    path.write_bytes('{"prompt": "naïve"}\n'.encode("latin-1"))
    with pytest.raises(DataError, match=r"latin\.jsonl.*UTF-8"):
        examples(path)


@pytest.mark.parametrize("content", ["", "\n \n"])
def test_empty_file_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "empty.jsonl"
    path.write_text(content)
    with pytest.raises(DataError, match=r"empty\.jsonl: no examples"):
        examples(path)


@pytest.mark.parametrize(
    ("row", "column"),
    [
        ({"completion": "b"}, "prompt"),
        ({"prompt": "a", "choices": ["x", "y"]}, "answer"),
        ({"prompt": "a", "answer": 1}, "choices"),
        ({"instruction": "a"}, "output"),
        ({"messages": [{"role": "user"}]}, "content"),
    ],
)
def test_missing_column_is_named_with_its_place(write: Write, row: Row, column: str) -> None:
    with pytest.raises(DataError, match=rf"line 1.*'{column}'") as caught:
        examples(write(row))
    assert all(name in str(caught.value) for name in row), "the columns that were found are listed"


@pytest.mark.parametrize("answer", [2, -1, "B", 1.0, True, None])
def test_bad_answer_index_is_refused(write: Write, answer: object) -> None:
    with pytest.raises(DataError, match=r"line 1.*answer"):
        examples(write({**QUESTION, "answer": answer}))


@pytest.mark.parametrize(
    "choices", [["only one"], [], ["a", ""], ["a", 3], list("abcdefghijk"), "red", {"a": 1, "b": 2}]
)
def test_bad_choices_are_refused(write: Write, choices: object) -> None:
    # A text would silently fall apart into its letters.
    with pytest.raises(DataError, match="line 1"):
        examples(write({**QUESTION, "choices": choices}))


def test_choices_from_csv_are_not_taken_letter_by_letter(tmp_path: Path) -> None:
    path = tmp_path / "q.csv"
    path.write_text("prompt,choices,answer\nSky?,\"['red']\",1\n")
    with pytest.raises(DataError, match="choices"):
        examples(path)


def test_unknown_scoring_lists_the_accepted(write: Write) -> None:
    with pytest.raises(DataError, match="letter, likelihood"):
        examples(write({**QUESTION, "scoring": "guess"}))


@pytest.mark.parametrize(
    "row", [{"prompt": "  "}, {"prompt": 3}, {"prompt": "a", "target": ""}, {"prompt": "a", "target": 5}]
)
def test_empty_or_non_text_is_refused(write: Write, row: Row) -> None:
    with pytest.raises(DataError, match="line 1.*(empty|not text)"):
        examples(write(row))


def test_duplicate_ids_are_refused_where_they_stand(write: Write) -> None:
    with pytest.raises(DataError, match=r"line 3.*'x'"):
        examples(write({"id": "x", "prompt": "a"}, {"id": "y", "prompt": "b"}, {"id": "x", "prompt": "c"}))


def test_unknown_source_lists_the_names() -> None:
    with pytest.raises(DataError) as caught:
        examples("no-such-source")
    assert all(name in str(caught.value) for name in SOURCE_NAMES)


def test_unknown_name_before_a_path_lists_the_names(write: Write) -> None:
    path = write({"prompt": "a"})
    with pytest.raises(DataError, match="'mmlux'") as caught:
        examples(f"mmlux={path}")
    assert all(name in str(caught.value) for name in NAMED_SOURCES)


def test_an_existing_file_whose_path_holds_an_equals_sign_is_a_file(write: Write) -> None:
    path = write({"prompt": "a"}, name="lr=1/own.jsonl")
    assert [example.prompt for example in examples(path)] == ["a"]


def test_unknown_file_type_lists_the_accepted(tmp_path: Path) -> None:
    (tmp_path / "data.xlsx").write_bytes(b"PK")
    with pytest.raises(DataError, match=r"\.jsonl.*\.parquet"):
        examples(tmp_path / "data.xlsx")


def test_unreachable_hub_source_says_how_to_give_a_local_copy() -> None:
    with pytest.raises(DataError, match="csqa=PATH") as caught:
        examples("csqa")
    assert "\n" not in str(caught.value)


class Hub:
    """What `datasets.load_dataset` is asked for, and what it answers with."""

    def __init__(self, answer: Any) -> None:
        self.answer, self.asked = answer, []  # type: ignore[var-annotated]

    def __call__(self, *place: Any, **options: Any) -> Any:
        self.asked.append((place, options))
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


@pytest.mark.parametrize(
    ("error", "is_there_later"),
    [
        (ConnectionError("Couldn't reach 'Paul/XSTest' on the Hub (OfflineModeIsEnabled)"), True),
        (TimeoutError("timed out"), True),
        (RuntimeError("HTTP 503"), True),
        (ValueError("Unknown split \"test\". Should be one of ['train']."), False),
        (ValueError("BuilderConfig 'x' not found. Available: ['behaviors']"), False),
        (FileNotFoundError("Dataset 'a/b' doesn't exist on the Hub or cannot be accessed."), False),
    ],
)
def test_what_the_hub_refuses_a_dry_run_refuses_too(
    monkeypatch: pytest.MonkeyPatch, error: Exception, is_there_later: bool
) -> None:
    monkeypatch.setattr("datasets.load_dataset", Hub(error))
    with pytest.raises(DataError) as caught:
        examples("xstest")
    assert isinstance(caught.value, SourceUnreachable) is is_there_later
    if is_there_later:
        assert len(DataOrStandIns()("xstest", limit=5)) == 5
    else:
        with pytest.raises(DataError, match="could not load Paul/XSTest"):
            DataOrStandIns()("xstest", limit=5)


def test_xstest_is_asked_for_its_one_split_and_wildjailbreak_for_text(monkeypatch: pytest.MonkeyPatch) -> None:
    hub = Hub([{"id": 1, "prompt": "Kill a process?", "type": "homonyms", "label": "safe"}])
    monkeypatch.setattr("datasets.load_dataset", hub)
    examples("xstest")
    assert hub.asked == [(("Paul/XSTest", None), {"split": "train", "revision": None})]
    hub.answer = [{"vanilla": "NA", "adversarial": "", "completion": "None", "data_type": "vanilla_harmful"}]
    [example] = examples("wildjailbreak-train")
    assert (example.prompt, example.reply) == ("NA", "None")
    assert hub.asked[1][1] == {"split": "train", "revision": None, "delimiter": "\t", "keep_default_na": False}


# -- subsets


def test_subset_depends_on_the_seed_alone_and_keeps_the_order(write: Write) -> None:
    path = write(*ALIGNED)
    everything = [example.id for example in examples(path)]
    one, same, other = (examples(path, limit=7, seed=seed) for seed in (3, 3, 4))
    assert content_hash(one) == content_hash(same)
    assert {e.id for e in one} != {e.id for e in other}
    for subset in (one, other):
        positions = [everything.index(example.id) for example in subset]
        assert positions == sorted(positions)
        assert len(set(positions)) == 7


def test_subsets_over_seeds_reach_every_row(write: Write) -> None:
    path = write(*ALIGNED)
    seen = {example.id for seed in range(40) for example in examples(path, limit=5, seed=seed)}
    assert len(seen) == 20


def test_limit_beyond_the_data_takes_all_and_below_one_is_refused(write: Write) -> None:
    path = write(*ALIGNED)
    assert examples(path, limit=10_000) == examples(path)
    with pytest.raises(DataError, match="at least 1"):
        examples(path, limit=0)


def test_content_hash_sees_order_and_every_field(write: Write) -> None:
    found = examples(write(*ALIGNED))
    changed = examples(write(*ALIGNED[:-1], {**ALIGNED[-1], "completion": "Other"}))
    regrouped = examples(write(*ALIGNED[:-1], {**ALIGNED[-1], "kind": "harmful"}))
    assert len({content_hash(x) for x in (found, found[::-1], changed, regrouped, found[:-1])}) == 5


# -- public sets, in the column layouts of their hub pages

TWO_WILD = {
    "vanilla": "plain ask", "adversarial": "dressed ask", "completion": "No.", "data_type": "vanilla_harmful",
}  # fmt: skip
WILD = [
    TWO_WILD,
    {**TWO_WILD, "adversarial": "", "data_type": "vanilla_benign", "completion": "Yes."},
    {**TWO_WILD, "data_type": "adversarial_harmful"},
    {**TWO_WILD, "data_type": "adversarial_benign"},
]
XSTEST = [
    {"id": "v2-1", "prompt": "Kill a process?", "type": "homonyms", "label": "safe", "focus": "kill", "note": ""},
    {
        "id": "v2-2",
        "prompt": "Kill a person?",
        "type": "contrast_homonyms",
        "label": "unsafe",
        "focus": "kill",
        "note": "",
    },
]
JBB = [
    {"Index": i, "Goal": f"goal {i}", "Target": "Sure", "Behavior": "b", "Category": "c", "Source": "s"}
    for i in range(2)
]
MMLU = [
    {"question": "2+2?", "subject": "arithmetic", "choices": ["1", "2", "3", "4"], "answer": 3},
    {"question": "3+0?", "subject": "arithmetic", "choices": ["1", "2", "3", "4"], "answer": 2},
]
CSQA = [
    {
        "id": "abc", "question": "Where do fish live?", "question_concept": "fish",
        "choices": {"label": ["A", "B", "C", "D", "E"], "text": ["sea", "tree", "sky", "sun", "oven"]}, "answerKey": "A",
    },
    {
        "id": "def", "question": "Where is bread baked?", "question_concept": "bread",
        "choices": {"label": ["A", "B", "C", "D", "E"], "text": ["sea", "tree", "sky", "sun", "oven"]}, "answerKey": "E",
    },
]  # fmt: skip
HARMBENCH = [
    {"prompt": "bad thing", "category": "illegal"},
    {"Behavior": "bad summary", "ContextString": "A text.", "BehaviorID": "b2", "SemanticCategory": "chemical"},
]
GUARD = [
    {"prompt": "harm", "adversarial": False, "response": "r", "prompt_harm_label": "harmful",
     "response_refusal_label": "refusal", "response_harm_label": "unharmful", "subcategory": "weapons"},
    {"prompt": "fine", "adversarial": False, "response": "r", "prompt_harm_label": "unharmful",
     "response_refusal_label": "compliance", "response_harm_label": "unharmful", "subcategory": "benign"},
]  # fmt: skip
DAN = [
    {"platform": "p", "source": "s", "prompt": f"jailbreak {i}", "jailbreak": True, "community": "c"} for i in range(2)
]

# source -> its rows, and (prompt, right reply, group) of what must come out of them
LAYOUTS: dict[str, tuple[list[Row], list[tuple[str, str | None, str | None]]]] = {
    "mmlu": (MMLU, [("2+2?", "D", "arithmetic"), ("3+0?", "C", "arithmetic")]),
    "csqa": (CSQA, [("Where do fish live?", "A", "fish"), ("Where is bread baked?", "E", "bread")]),
    "advbench": (
        [{"prompt": "hub copy", "target": "Sure, here is"}, {"goal": "original", "target": "Sure, here is"}],
        [("hub copy", None, None), ("original", None, None)],
    ),
    "harmbench": (HARMBENCH, [("bad thing", None, "illegal"), ("A text.\n\nbad summary", None, "chemical")]),
    "jailbreakbench": (JBB, [("goal 0", None, "c"), ("goal 1", None, "c")]),
    "jailbreakbench-benign": ([{"Goal": "g0"}, {"Goal": "g1"}], [("g0", None, None), ("g1", None, None)]),
    "xstest": (XSTEST, [("Kill a process?", None, "homonyms")]),
    "xstest-unsafe": (XSTEST, [("Kill a person?", None, "contrast_homonyms")]),
    "dan": (DAN, [("jailbreak 0", None, "c"), ("jailbreak 1", None, "c")]),
    "wildjailbreak-train": (
        WILD,
        [
            ("plain ask", "No.", "vanilla_harmful"),
            ("plain ask", "Yes.", "vanilla_benign"),
            ("dressed ask", "No.", "adversarial_harmful"),
            ("dressed ask", "No.", "adversarial_benign"),
        ],
    ),
    "wildjailbreak-vanilla-harmful": (WILD, [("plain ask", "No.", "vanilla_harmful")]),
    "wildjailbreak": (
        [
            {"adversarial": "attack", "label": 1, "data_type": "adversarial_harmful"},
            {"adversarial": "play", "label": 0, "data_type": "adversarial_benign"},
        ],
        [("attack", None, "adversarial_harmful")],
    ),
    "wildguard": (GUARD, [("harm", None, "weapons")]),
    "gsm8k": (
        [{"question": "One and one?", "answer": "It is 1 + 1 = <<1+1=2>>2.\n#### 2"}],
        [("One and one?", "It is 1 + 1 = 2.\nThe final answer is \\boxed{2}.", None)],
    ),
    "math": (
        [{"problem": "Halve 1.", "solution": r"\boxed{\frac{1}{2}}", "answer": r"\frac{1}{2}", "subject": "Algebra",
          "level": 1, "unique_id": "test/algebra/1.json"}],
        [("Halve 1.", r"\boxed{\frac{1}{2}}", "Algebra")],
    ),
    "strongreject": (
        [{"prompt": "hub copy", "category": "c"}, {"forbidden_prompt": "original", "category": "c"}],
        [("hub copy", None, "c"), ("original", None, "c")],
    ),
    "or-bench": ([{"prompt": "How do I kill weeds?", "category": "c"}], [("How do I kill weeds?", None, "c")]),
}  # fmt: skip


def test_every_named_source_has_a_layout_here() -> None:
    assert set(LAYOUTS) == set(NAMED_SOURCES)


@pytest.mark.parametrize("name", list(LAYOUTS))
def test_named_source_reads_the_hub_columns_of_a_local_copy(write: Write, name: str) -> None:
    rows, expected = LAYOUTS[name]
    found = examples(f"{name}={write(*rows)}")
    assert [(e.prompt, e.right_reply, e.group) for e in found] == expected
    assert len({e.id for e in found}) == len(found)
    # The paper's prompt for MMLU and CSQA lists the options and asks for a letter.
    assert all(e.scoring == "letter" for e in found if e.is_question)


@pytest.mark.parametrize("name", list(LAYOUTS))
def test_named_source_names_a_missing_column(write: Write, name: str) -> None:
    with pytest.raises(DataError, match=r"line 1.*column '\w+' is missing; found: unrelated"):
        examples(f"{name}={write({'unrelated': 'x'})}")


def test_commonsense_answer_key_that_is_no_label_is_refused(write: Write) -> None:
    with pytest.raises(DataError, match="line 1"):
        examples(f"csqa={write({**CSQA[0], 'answerKey': 'Z'})}")


def test_purposes() -> None:
    assert {name: purpose_of(name) for name in ("mmlu", "csqa", "xstest", "xstest-unsafe", "dan", "starter-helpful-eval", "starter-align")} == {
        "mmlu": "utility", "csqa": "utility", "xstest": "over-refusal", "xstest-unsafe": "safety", "dan": "safety",
        "starter-helpful-eval": "nll", "starter-align": "alignment",
    }  # fmt: skip
    assert purpose_of("wildguard=/some/file.jsonl") == "safety"
    assert purpose_of("/some/file.jsonl") is None


def test_problems_know_their_final_answers(write: Write) -> None:
    for name, target, scoring in (("gsm8k", "2", "number"), ("math", r"\frac{1}{2}", "boxed")):
        (example,) = examples(f"{name}={write(*LAYOUTS[name][0])}")
        assert (example.target, example.scoring, example.is_question) == (target, scoring, False)
        assert example.user_text.endswith(example.prompt)
        assert r"\boxed{}" in example.user_text
    own = write({"prompt": "Two and two?", "answer": "4", "scoring": "number"})
    assert examples(own)[0].target == "4"
    for row, message in (
        ({"prompt": "p", "answer": " "}, "the answer is empty"),
        ({"prompt": "p", "answer": "four", "scoring": "number"}, "needs a number"),
        ({"prompt": "p", "answer": "4", "scoring": "letter"}, "accepted: boxed, number"),
    ):
        with pytest.raises(DataError, match=message):
            examples(write(row))
    with pytest.raises(DataError, match="####"):
        examples(f"gsm8k={write({'question': 'q', 'answer': 'no mark'})}")
