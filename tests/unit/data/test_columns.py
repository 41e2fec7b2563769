"""Fields of rows and turns: what means something is used or refused by its name, whatever file it stands in."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from castune.data.example import Example, Message, require_solutions
from castune.data.sources import examples
from castune.errors import DataError

Row = dict[str, Any]
PLAIN = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]


def read(folder: Path, *rows: Row) -> list[Example]:
    path = folder / "own.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return examples(path)


def talk(**fields: Any) -> Row:
    return {"messages": [PLAIN[0], {**PLAIN[1], **fields}]}


# -- used


def test_system_and_history_of_instruction_rows_are_turns(tmp_path: Path) -> None:
    row = {"instruction": "And then?", "input": "", "output": "Venus.", "system": "One sentence."}
    [example] = read(tmp_path, {**row, "history": [["Which first?", "Mercury."]]})
    assert example.history == (
        Message("system", "One sentence."),
        Message("user", "Which first?"),
        Message("assistant", "Mercury."),
    )
    assert (example.prompt, example.reply) == ("And then?", "Venus.")
    [same] = read(tmp_path, {**row, "history": [{"role": "user", "content": "Which first?"}, {"role": "assistant", "content": "Mercury."}]})  # fmt: skip
    assert same == example


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "How are you?", "chosen": "Arr!", "rejected": "Fine."},
        {"prompt": "How are you?", "completion": "Arr!"},
        {"prompt": [{"role": "user", "content": "How are you?"}], "completion": "Arr!"},
        {"prompt": "How are you?", "completion": [{"role": "assistant", "content": "Arr!"}]},
        {"messages": [{"role": "user", "content": "How are you?"}, {"role": "assistant", "content": "Arr!"}]},
        {"instruction": "How are you?", "chosen": "Arr!", "rejected": "Fine."},
    ],
)
def test_a_system_column_stands_before_the_prompt(tmp_path: Path, row: Row) -> None:
    [example] = read(tmp_path, {**row, "system": "As a pirate."})
    assert example.messages() == [
        {"role": "system", "content": "As a pirate."},
        {"role": "user", "content": "How are you?"},
    ]
    assert example.reply == "Arr!"


def test_a_problem_may_bring_its_worked_solution(tmp_path: Path) -> None:
    row = {"prompt": "2 + 2?", "completion": r"2 + 2 = 4, so \boxed{4}.", "answer": "4", "scoring": "number"}
    [example] = read(tmp_path, row)
    assert (example.reply, example.target, example.scoring) == (row["completion"], "4", "number")
    require_solutions([example], "utility")


@pytest.mark.parametrize("nothing", [None, float("nan")])
def test_what_is_absent_counts_as_absent(tmp_path: Path, nothing: Any) -> None:
    row = {"instruction": "Name a colour.", "input": nothing, "output": "Blue.", "system": nothing, "history": nothing}
    [example] = read(tmp_path, {**row, "tools": nothing, "images": nothing, "id": "a"})
    assert example == Example(id="a", prompt="Name a colour.", reply="Blue.")
    [example] = read(tmp_path, talk(tool_calls=nothing, weight=1, reasoning_content=nothing, name=nothing))
    assert (example.prompt, example.reply, example.history) == ("Hi", "Hello.", ())


def test_parts_of_text_are_joined(tmp_path: Path) -> None:
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo."}]
    assert read(tmp_path, talk(content=parts))[0].reply == "Hello."


# -- refused by name


@pytest.mark.parametrize(
    ("row", "named"),
    [
        (talk(tool_calls=[{"id": "c", "function": {"name": "weather"}}], content=None), "turn 2.*'tool_calls'"),
        ({"messages": [{"role": "tool", "content": "9 degrees"}, *PLAIN]}, "turn 1.*'tool'"),
        (talk(function_call={"name": "f"}), "'function_call'"),
        (talk(reasoning_content="They greet me."), "'reasoning_content'"),
        (talk(thinking="They greet me."), "'thinking'"),
        (talk(refusal="No.", content=None), "'refusal'"),
        (talk(weight=0), "'weight'"),
        (talk(train=False), "'train'"),
        (talk(prefix=True), "'prefix'"),
        (talk(content=None), "turn 2: content is None, accepted: text"),
        (talk(content=[{"type": "image_url", "image_url": "x"}]), "image_url.*accepted: text"),
        ({**talk(), "tools": [{"name": "weather"}]}, "column 'tools'"),
        ({**talk(), "images": ["cat.png"]}, "column 'images'"),
        ({**talk(), "chat_template_kwargs": {"enable_thinking": False}}, "'chat_template_kwargs'"),
        ({**talk(), "system": "Be brief.", "messages": [{"role": "system", "content": "No."}, *PLAIN]}, "'system'"),
        ({**talk(), "history": [["a", "b"]], "messages": [*PLAIN, *PLAIN]}, "'history'"),
        ({"prompt": "Hi", "completion": "A", "messages": PLAIN}, "'messages' and 'prompt'"),
        ({"prompt": "Hi", "completion": "A", "target": "B"}, "'completion' and 'target'"),
        ({"prompt": "Hi", "completion": "A", "label": False}, "'label'"),
        ({"prompt": "Hi", "completion": "A", "weight": 0.5}, "weight"),
        ({"conversations": [{"from": "human", "value": "Hi"}]}, "'conversations'"),
        ({"prompt": PLAIN, "chosen": "A", "rejected": "B"}, "prompt ends with an unfinished assistant turn"),
        ({"instruction": "a", "output": "b", "history": [["only one"]]}, "history.*pairs"),
        ({"instruction": "a", "output": "b", "system": ["x"]}, "system"),
        ({"prompt": "Q", "choices": ["a", "b"], "answer": "B"}, "answer is 'B', accepted: the 0-based index"),
        ({"prompt": "Q", "choices": ["a", "b"], "answer": 1, "completion": "b, for ..."}, "completion or target"),
        ({"prompt": "Q", "target": "42", "scoring": "number"}, "scoring is 'number'"),
        ({"prompt": "Q", "answer": 42}, "answer is 42; found: .*; accepted: the answer to a problem as text"),
        # Text or answers beside what tells another kind of row.
        ({"prompt": "Hi", "output": "A"}, "'output' is not used in a row with 'prompt'"),
        ({"prompt": "Hi", "input": "A", "completion": "B"}, "'input' is not used"),
        ({"messages": PLAIN[:1], "completion": "A"}, "'completion' is not used in a row with 'messages'"),
        ({"messages": PLAIN[:1], "answer": "42"}, "'answer' is not used"),
        ({"messages": PLAIN[:1], "choices": ["a", "b"], "answer": 0}, "'choices' is not used"),
        ({"messages": PLAIN, "chosen": "A", "rejected": "B"}, "'chosen' is not used"),
        ({"prompt": "Hi", "chosen": "A", "rejected": "B", "completion": "C"}, "'completion' is not used"),
        ({"instruction": "a", "output": "b", "answer": "42"}, "'answer' is not used"),
        ({"prompt": PLAIN[:1], "answer": "42"}, "the prompt of a row with answer is a text"),
        ({"prompt": "Hi", "completion": "A", "system_prompt": "Be brief."}, "'system_prompt'.*name it system"),
        # Names that are nearly those.
        ({"prompt": "Hi", " completion": "A"}, "' completion' is not known; name it 'completion'"),
        ({"Prompt": "Hi", "completion": "A"}, "name it 'prompt'"),
        ({"prompt": "Hi", "completion": "A", "Category": "x"}, "name it 'category'"),
        # Truth values, weights and turns as text.
        ({"prompt": "Hi", "completion": "A", "label": "False"}, "'label'"),
        ({"prompt": "Hi", "completion": "A", "weight": "0"}, "weight"),
        ({"prompt": json.dumps(PLAIN[:1]), "completion": "A"}, "prompt is a list of turns that is written out as text"),
        ({"prompt": "Hi", "chosen": str(PLAIN[1:]), "rejected": "A"}, "chosen is a list of turns"),
    ],
)
def test_what_cannot_be_used_is_refused_with_its_name_and_line(tmp_path: Path, row: Row, named: str) -> None:
    with pytest.raises(DataError, match=rf"own\.jsonl line 2: .*({named})") as caught:
        read(tmp_path, {"messages": PLAIN}, row)
    assert "\n" not in str(caught.value)


def test_a_name_that_occurs_twice_in_a_row_is_refused(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text('{"prompt": "a", "completion": "c"}\n{"prompt": "a", "prompt": "b"}\n')
    with pytest.raises(DataError, match=r"t\.jsonl line 2: malformed JSON: 'prompt' is there twice"):
        examples(tmp_path / "t.jsonl")
    table = pa.Table.from_arrays([pa.array([text]) for text in "abc"], names=["prompt", "prompt", "completion"])
    pa.parquet.write_table(table, tmp_path / "t.parquet")
    with pytest.raises(DataError, match=r"t\.parquet: column 'prompt' is there twice"):
        examples(tmp_path / "t.parquet")


def test_a_weight_of_one_and_a_label_that_is_no_truth_value_change_nothing(tmp_path: Path) -> None:
    for extra in ({"weight": 1}, {"weight": "1.0"}, {"weight": "heavy"}, {"label": "safe"}, {"label": 0}):
        assert len(read(tmp_path, {"prompt": "Hi", "completion": "A", **extra})) == 1


def test_a_kind_may_be_zero(tmp_path: Path) -> None:
    assert read(tmp_path, {"prompt": "Hi", "kind": 0})[0].group == "0"


def test_a_time_beyond_the_calendar_is_named_in_one_line(tmp_path: Path) -> None:
    times = pa.array([2**62], pa.timestamp("us"))
    pa.parquet.write_table(pa.table({"prompt": ["a"], "at": times}), tmp_path / "t.parquet")
    with pytest.raises(DataError, match=r"t\.parquet: not readable as parquet"):
        examples(tmp_path / "t.parquet")


def test_an_earlier_reply_need_not_be_trained(tmp_path: Path) -> None:
    [example] = read(tmp_path, {"messages": [PLAIN[0], {**PLAIN[1], "weight": 0}, *PLAIN]})
    assert len(example.history) == 2


@pytest.mark.parametrize(
    ("source", "row", "said"),
    [
        ("mmlu", {"question": "Q", "choices": ["a", "b"], "answer": "B"}, "answer is 'B', accepted"),
        ("mmlu", {"question": "Q", "choices": "['a', 'b', 'c', 'd']", "answer": 1}, "choices is .*accepted: a list"),
        ("csqa", {"id": "1", "question": "Q", "choices": {"label": ["A"], "text": ["x"]}, "answerKey": ""}, "answerKey is ''"),
        ("csqa", {"id": "1", "question": "Q", "choices": ["x", "y"], "answerKey": "A"}, "choices is .*label and text"),
        ("gsm8k", {"question": "Q", "answer": "It is 2."}, "'####'"),
        ("gsm8k", {"question": "Q", "answer": None}, "answer is None, accepted"),
        ("math", {"problem": "Q", "solution": "S", "answer": math.nan}, "answer is None, accepted"),
    ],
)  # fmt: skip
def test_named_sources_say_what_they_accept(tmp_path: Path, source: str, row: Row, said: str) -> None:
    path = tmp_path / "copy.jsonl"
    path.write_text(json.dumps(row))
    with pytest.raises(DataError, match=rf"copy\.jsonl line 1: .*{said}"):
        examples(f"{source}={path}")


@pytest.mark.parametrize("nothing", [math.nan, None])
def test_an_empty_cell_of_a_named_source_says_nothing(tmp_path: Path, nothing: float | None) -> None:
    for source, row in {
        "harmbench": {"prompt": "P", "context": nothing, "category": nothing, "BehaviorID": nothing},
        "jailbreakbench": {"Goal": "P", "Index": nothing, "Category": nothing},
        "strongreject": {"prompt": nothing, "forbidden_prompt": "P", "category": nothing},
        "xstest": {"id": nothing, "prompt": "P", "label": "safe", "type": nothing},
        "dan": {"prompt": "P", "community": nothing},
    }.items():
        (tmp_path / "copy.jsonl").write_text(json.dumps(row))
        [example] = examples(f"{source}={tmp_path / 'copy.jsonl'}")
        assert (example.id, example.prompt, example.group) == (f"{source}-00000", "P", None)


# -- tables


def as_file(rows: list[Row], path: Path) -> Path:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    if path.suffix == ".jsonl":
        path.write_text("\n".join(map(json.dumps, rows)))
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=1))
    elif path.suffix == ".parquet":
        # Of a list of rows pyarrow takes the columns of the first.
        pa.parquet.write_table(pa.Table.from_pylist([{name: row.get(name) for name in columns} for row in rows]), path)
    else:
        with path.open("w", newline="") as file:
            table = csv.writer(file, delimiter="\t" if path.suffix == ".tsv" else ",")
            table.writerow(columns)
            for row in rows:
                cells = [row.get(name, "") for name in columns]
                table.writerow([json.dumps(cell) if isinstance(cell, list) else cell for cell in cells])
    return path


CELLS = ["NA", "None", "null", "nan", "007", "1e5", "3.10", "True", "  two spaces ", 'a "quote", a comma', "a\nline", "1,000", "-", "2020-01-01"]  # fmt: skip


@pytest.mark.parametrize("suffix", [".json", ".parquet", ".csv", ".tsv"])
@pytest.mark.parametrize(
    "rows",
    [
        [{"id": f"0{n}", "prompt": text, "completion": text} for n, text in enumerate(CELLS)],
        [{"id": text, "prompt": "p", "completion": "c"} for text in ("1", "01", "1.0", "NA", "None")],
        [{"prompt": "Q", "choices": ["NA", "None", "1.0"], "answer": 2, "scoring": "likelihood"}],
        [{"prompt": "Code?", "answer": "007", "scoring": "number"}, {"prompt": "V?", "answer": "3.10", "scoring": "number"}],
        [{"messages": PLAIN}],
        [{"prompt": PLAIN[:1], "completion": PLAIN[1:]}],
        [{"prompt": "[{a}]", "completion": "[1, 2]"}],
        [{"prompt": "Hi", "chosen": PLAIN[1:], "rejected": [{"role": "assistant", "content": "No."}]}],
        [{"instruction": "a", "input": "", "output": "b"}, {"instruction": "c", "input": "NA", "output": "d"}],
        [{"prompt": "a", "target": "No."}, {"prompt": "b", "completion": "Yes."}],
    ],
    ids=["cells", "ids", "choices", "answers", "turns", "prompt of turns", "text in brackets", "preferences", "instructions", "two kinds"],
)  # fmt: skip
def test_the_same_rows_give_the_same_examples_in_every_format(tmp_path: Path, rows: list[Row], suffix: str) -> None:
    expected = examples(as_file(rows, tmp_path / "same.jsonl"))
    assert examples(as_file(rows, tmp_path / f"same{suffix}")) == expected
    assert len(expected) == len(rows)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("prompt,completion\na,b\nc,d,e\n", "line 3: 3 cells for 2 columns"),
        ("prompt,completion\na,b\nc\n", "line 3: 1 cells for 2 columns"),
        ("prompt,completion,completion\na,b,c\n", "line 1: column 'completion' is there twice"),
        ('prompt,completion\na,b\n"c,d\ne,f\n', "line 3: malformed table"),
        ('prompt,completion\n"a"b,c\n', "line 2: malformed table"),
    ],
)
def test_a_table_that_does_not_add_up_is_refused(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(DataError, match=rf"t\.csv {said}"):
        examples(tmp_path / "t.csv")


def test_a_missing_column_of_turns_in_a_table_of_many_rows_blames_its_row(tmp_path: Path) -> None:
    """Parquet gives every row every field: the null ones of others mean nothing."""
    rows = [talk(), talk(reasoning_content="They greet me.")]
    with pytest.raises(DataError, match="row 2: .*'reasoning_content'"):
        examples(as_file(rows, tmp_path / "t.parquet"))


def test_one_conversation_is_a_row_and_no_list_of_them(tmp_path: Path) -> None:
    (tmp_path / "t.json").write_text(json.dumps({"messages": PLAIN}))
    assert [example.reply for example in examples(tmp_path / "t.json")] == ["Hello."]


@pytest.mark.parametrize(
    "text", ['{"prompt": "a"}\n{"prompt": "b"}\n', '[{"prompt": "a"},\n {"prompt": "b"}]', '{"data": [{"prompt": "a"}, {"prompt": "b"}]}']
)  # fmt: skip
def test_layouts_of_json(tmp_path: Path, text: str) -> None:
    (tmp_path / "t.json").write_text(text)
    assert [example.prompt for example in examples(tmp_path / "t.json")] == ["a", "b"]


# -- balance


@pytest.fixture
def kinds(tmp_path: Path) -> Callable[..., Path]:
    def write(**counts: int) -> Path:
        return as_file(rows_of_kinds(counts), tmp_path / "kinds.jsonl")

    return write


def rows_of_kinds(counts: dict[str, int]) -> list[Row]:
    return [{"prompt": f"{kind} {n}", "completion": "x", "kind": kind} for kind, k in counts.items() for n in range(k)]


def counted(found: list[Example]) -> dict[str, int]:
    return {kind: sum(e.group == kind for e in found) for kind in sorted({str(e.group) for e in found})}


def test_a_balanced_draw_takes_equally_many_of_each_kind(
    kinds: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    path = kinds(a=50, b=9, c=30, d=20)
    assert counted(examples(path, limit=32, balance="kind")) == {"a": 8, "b": 8, "c": 8, "d": 8}
    assert counted(examples(path, limit=10, balance="kind")) == {"a": 3, "b": 3, "c": 2, "d": 2}
    assert counted(examples(path, balance="kind")) == dict.fromkeys("abcd", 9)
    assert not caplog.text
    assert counted(examples(path, limit=48, balance="kind")) == {"a": 12, "b": 9, "c": 12, "d": 12}
    assert "b has only 9 of the 12 rows of its share" in caplog.text
    one, same, other = (examples(path, limit=16, seed=seed, balance="kind") for seed in (1, 1, 2))
    assert one == same != other
    assert [e.id for e in one] == sorted(e.id for e in one)


def test_a_column_that_is_not_there_cannot_be_balanced_by(kinds: Callable[..., Path]) -> None:
    with pytest.raises(DataError, match="line 1: column 'sort' is missing; found: .*kind"):
        examples(kinds(a=2), balance="sort")


# -- shares

SHARES = st.dictionaries(st.sampled_from("abcde"), st.integers(1, 9) | st.floats(0.01, 10), min_size=1)


@settings(max_examples=60, deadline=None)
@given(
    counts=st.fixed_dictionaries({kind: st.integers(1, 25) for kind in "abcde"}),
    shares=SHARES,
    limits=st.tuples(st.integers(1, 130), st.integers(1, 130)),
    seed=st.integers(0, 9),
)
def test_every_kind_has_its_share_to_less_than_one_example(
    tmp_path_factory: pytest.TempPathFactory,
    counts: dict[str, int],
    shares: dict[str, float],
    limits: tuple[int, int],
    seed: int,
) -> None:
    path = as_file(rows_of_kinds(counts), tmp_path_factory.getbasetemp() / "shares.jsonl")
    whole = sum(Fraction(str(share)) for share in shares.values())
    parts = {kind: Fraction(str(share)) / whole for kind, share in shares.items()}
    everything = examples(path)
    drawn = {limit: examples(path, shares=shares, limit=limit, seed=seed) for limit in (*limits, None)}
    for limit, found in drawn.items():
        assert found == [example for example in everything if example in found], "in the order of the source"
        assert found == examples(path, shares=shares, limit=limit, seed=seed, balance="kind")
        assert all(abs(sum(e.group == kind for e in found) - part * len(found)) < 1 for kind, part in parts.items())
        assert {example.group for example in found} <= shares.keys()
    most = len(drawn[None])
    assert most == math.floor(min(counts[kind] / part for kind, part in parts.items())), "the scarcest kind ends it"
    for limit in limits:
        assert len(drawn[limit]) == min(limit, most)
    small, large = sorted(drawn.values(), key=len)[:2]
    assert {e.id for e in small} <= {e.id for e in large} <= {e.id for e in drawn[None]}


def test_shares_are_in_proportion_and_the_seed_draws(
    kinds: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    path = kinds(a=30, b=20, c=10)
    found = examples(path, shares={"a": 0.5, "b": 0.5})
    assert counted(found) == {"a": 20, "b": 20}
    assert found == examples(path, shares={"b": 3, "a": 3})
    assert {e.id for e in found} != {e.id for e in examples(path, shares={"a": 1, "b": 1}, seed=1)}
    assert counted(examples(path, shares={"a": 2, "c": 1}, limit=9)) == {"a": 6, "c": 3}
    assert not caplog.text
    assert counted(examples(path, shares={"a": 1, "c": 1}, limit=50)) == {"a": 10, "c": 10}
    assert "shares of kind: 20 rows instead of 50, for c has only 10" in caplog.text


def test_shares_are_of_the_column_that_balance_names(tmp_path: Path) -> None:
    rows = [{"prompt": str(n), "completion": "x", "hard": n % 3 == 0, "level": n % 2} for n in range(12)]
    path = as_file(rows, tmp_path / "t.jsonl")
    found = examples(path, balance="hard", shares={"True": 1, "False": 2})
    assert sorted(int(e.prompt) % 3 == 0 for e in found) == [False] * 8 + [True] * 4
    assert len(examples(path, balance="level", shares={"0": 1})) == 6
    with pytest.raises(DataError, match="line 1: column 'kind' is missing; found: prompt, completion, hard, level"):
        examples(path, shares={"True": 1})


@pytest.mark.parametrize("bad", [0, -1, -0.0, math.nan, math.inf, -math.inf])
def test_a_share_that_is_none_is_refused(kinds: Callable[..., Path], bad: float) -> None:
    with pytest.raises(DataError, match="shares of kind are .*accepted: a number above 0 for every value"):
        examples(kinds(a=3, b=3), shares={"a": 0.5, "b": bad})
    with pytest.raises(DataError, match="shares of kind are {}, accepted: a number above 0"):
        examples(kinds(a=3), shares={})


def test_shares_of_what_is_not_there_list_what_is(kinds: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(DataError, match="shares of kind: no row has 'A', 'c'; accepted: a, b$"):
        examples(kinds(a=3, b=3), shares={"a": 1, "A": 1, "c": 2})
    rows = [{"prompt": "x", "completion": "x", "kind": f"k{n:03}"} for n in range(150)]
    with pytest.raises(DataError, match="accepted: k000, .*, k019 and 130 more$"):
        examples(as_file(rows, tmp_path / "many.jsonl"), shares={"k": 1})
