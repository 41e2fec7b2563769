"""Data sources: starter data of the package, named public sets, files and hub ids.

`examples("starter-utility")`, `examples("mmlu")` (from the hub), `examples("mmlu@REVISION")` (a branch, tag or commit),
`examples("mmlu=my/copy.jsonl")` (a local copy with the hub's columns), `examples("my/data.jsonl")` (castune's own
columns) and `examples("owner/name")` all give `list[Example]`.
"""

from __future__ import annotations

import json
import logging
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TextIO

from castune.data.example import LETTERS, PROBLEM_SCORINGS, QUESTION_SCORINGS, Example, Message
from castune.errors import DataError

logger = logging.getLogger(__name__)

Row = dict[str, Any]

_STARTER = Path(__file__).parent / "starter"
_FILE_FORMATS = {".jsonl": "jsonl", ".json": "json", ".parquet": "parquet", ".csv": "csv", ".tsv": "csv"}

# Columns that hold a text or a list of turns.
_TURNS = ("prompt", "completion", "chosen", "rejected")
COLUMNS = (
    "multiple choice: prompt, choices, answer; problems: prompt, answer (text); harmful prompts: prompt, target; "
    "alignment data: prompt, completion, or messages, or instruction, output; preferences: prompt, chosen, rejected; "
    "prompts alone: prompt"
)


@dataclass(frozen=True)
class NamedSource:
    """A public data set and how its rows become examples (`None`: the row is not part of the set)."""

    purpose: str  # what it measures: utility | safety | over-refusal; training sets: alignment
    hub_id: str
    config: str | None
    split: str
    licence: str
    convert: Callable[[Row], Example | None]
    gated: bool = False
    size: int | None = None  # examples it is known to have; None where nobody here has counted


@dataclass(frozen=True)
class _StarterSource:
    purpose: str
    files: tuple[str, ...]


_STARTER_SOURCES = {
    "starter-utility": _StarterSource("utility", ("utility.jsonl",)),
    "starter-utility-eval": _StarterSource("utility", ("utility-eval.jsonl",)),
    "starter-safety": _StarterSource("safety", ("safety.jsonl",)),
    "starter-safety-eval": _StarterSource("safety", ("safety-eval.jsonl",)),
    "starter-overrefusal-eval": _StarterSource("over-refusal", ("overrefusal-eval.jsonl",)),
    "starter-align": _StarterSource(
        "alignment", ("align-harmful.jsonl", "align-benign.jsonl", "align-borderline.jsonl")
    ),
}


def _mmlu(row: Row) -> Example:
    return Example(
        id="",
        prompt=row["question"],
        choices=tuple(row["choices"]),
        answer=int(row["answer"]),
        scoring="letter",
        group=row.get("subject"),
    )


def _commonsense_qa(row: Row) -> Example:
    return Example(
        id=str(row["id"]),
        prompt=row["question"],
        choices=tuple(row["choices"]["text"]),
        answer=list(row["choices"]["label"]).index(row["answerKey"]),
        scoring="letter",
        group=row.get("question_concept"),
    )


def _gsm8k(row: Row) -> Example:
    solution, marked, target = row["answer"].rpartition("####")
    if not marked:
        raise ValueError("column answer has no final number after '####'")
    return Example(
        id="", prompt=row["question"], reply=solution.strip() or None, target=target.strip(), scoring="number"
    )


def _math(row: Row) -> Example:
    return Example(
        id=str(row.get("unique_id") or ""),
        prompt=row["problem"],
        reply=row["solution"],
        target=row["answer"],
        scoring="boxed",
        group=row.get("subject"),
    )


def _prompt_and_category(row: Row) -> Example:
    return Example(id="", prompt=row["prompt"], group=row.get("category"))


def _strong_reject(row: Row) -> Example:
    return Example(id="", prompt=row.get("forbidden_prompt") or row["prompt"], group=row.get("category"))


def _advbench(row: Row) -> Example:
    # The hub's copy has prompt, target; the original csv goal, target. The target is the harmful opening, no reply.
    return Example(id="", prompt=row.get("prompt") or row["goal"])


def _harmbench(row: Row) -> Example:
    context = row.get("ContextString") or row.get("context") or ""
    behaviour = row.get("prompt") or row["Behavior"]
    return Example(
        id=str(row.get("BehaviorID") or ""),
        prompt=f"{context}\n\n{behaviour}" if context else behaviour,
        group=row.get("SemanticCategory") or row.get("category"),
    )


def _jailbreakbench(row: Row) -> Example:
    return Example(id=str(row.get("Index", "")), prompt=row["Goal"], group=row.get("Category"))


def _xstest(label: str) -> Callable[[Row], Example | None]:
    def convert(row: Row) -> Example | None:
        if row["label"] != label:
            return None
        return Example(id=str(row["id"]), prompt=row["prompt"], group=row.get("type"))

    return convert


def _wildjailbreak(row: Row) -> Example:
    prompt = row["vanilla"] if str(row["data_type"]).startswith("vanilla") else row["adversarial"]
    return Example(id="", prompt=prompt, reply=row["completion"], group=row["data_type"])


def _wildjailbreak_vanilla_harmful(row: Row) -> Example | None:
    return _wildjailbreak(row) if row["data_type"] == "vanilla_harmful" else None


def _wildjailbreak_eval(row: Row) -> Example | None:
    if row["data_type"] != "adversarial_harmful":
        return None
    return Example(id="", prompt=row["adversarial"], group=row["data_type"])


def _wildguard(row: Row) -> Example | None:
    if row["prompt_harm_label"] != "harmful":
        return None
    return Example(id="", prompt=row["prompt"], group=row.get("subcategory"))


def _in_the_wild(row: Row) -> Example:
    return Example(id="", prompt=row["prompt"], group=row.get("community"))


NAMED_SOURCES: dict[str, NamedSource] = {
    "mmlu": NamedSource("utility", "cais/mmlu", "all", "test", "MIT", _mmlu, size=14042),
    "csqa": NamedSource("utility", "tau/commonsense_qa", None, "validation", "MIT", _commonsense_qa, size=1221),
    "gsm8k": NamedSource("utility", "openai/gsm8k", "main", "test", "MIT", _gsm8k, size=1319),
    "math": NamedSource("utility", "HuggingFaceH4/MATH-500", None, "test", "MIT", _math, size=500),
    "advbench": NamedSource("safety", "walledai/AdvBench", None, "train", "MIT", _advbench, gated=True, size=520),
    "harmbench": NamedSource("safety", "walledai/HarmBench", "standard", "train", "MIT", _harmbench, gated=True),
    "strongreject": NamedSource(
        "safety", "walledai/StrongREJECT", None, "train", "MIT", _strong_reject, gated=True, size=313
    ),
    "or-bench": NamedSource(
        "over-refusal", "bench-llm/or-bench", "or-bench-hard-1k", "train", "CC BY 4.0", _prompt_and_category, size=1319
    ),
    "jailbreakbench": NamedSource(
        "safety", "JailbreakBench/JBB-Behaviors", "behaviors", "harmful", "MIT", _jailbreakbench, size=100
    ),
    "jailbreakbench-benign": NamedSource(
        "over-refusal", "JailbreakBench/JBB-Behaviors", "behaviors", "benign", "MIT", _jailbreakbench, size=100
    ),
    "xstest": NamedSource("over-refusal", "Paul/XSTest", None, "test", "CC BY 4.0", _xstest("safe"), size=250),
    "xstest-unsafe": NamedSource("safety", "Paul/XSTest", None, "test", "CC BY 4.0", _xstest("unsafe"), size=200),
    "dan": NamedSource(
        "safety",
        "TrustAIRLab/in-the-wild-jailbreak-prompts",
        "jailbreak_2023_12_25",
        "train",
        "MIT",
        _in_the_wild,
        size=1405,
    ),
    "wildjailbreak-train": NamedSource(
        "alignment", "allenai/wildjailbreak", "train", "train", "ODC-BY", _wildjailbreak, gated=True
    ),
    "wildjailbreak-vanilla-harmful": NamedSource(
        "safety", "allenai/wildjailbreak", "train", "train", "ODC-BY", _wildjailbreak_vanilla_harmful, gated=True
    ),
    "wildjailbreak": NamedSource(
        "safety", "allenai/wildjailbreak", "eval", "train", "ODC-BY", _wildjailbreak_eval, gated=True, size=2000
    ),
    "wildguard": NamedSource(
        "safety", "allenai/wildguardmix", "wildguardtest", "test", "ODC-BY", _wildguard, gated=True, size=754
    ),
}

SOURCE_NAMES = (*_STARTER_SOURCES, *NAMED_SOURCES)


def examples(source: str | Path, *, limit: int | None = None, seed: int = 0) -> list[Example]:
    """Examples of a data source.

    Args:
        source: a named source, `name=path` (a local copy with the hub's columns), a path, or a hub id; of the hub,
            `@revision` behind it takes that branch, tag or commit.
        limit: how many to draw; the subset depends on `seed` alone and keeps the source's order.
        seed: seed of the subset.

    Raises:
        DataError: the source is unknown, missing, malformed (file and line are named), empty, or lacks columns.
    """
    source = str(source)
    found = list(_converted(source))
    if not found:
        raise DataError(f"{source}: no examples in it")
    if limit is not None:
        if limit < 1:
            raise DataError(f"{source}: limit is {limit}, accepted: at least 1")
        if limit < len(found):
            chosen = random.Random(seed).sample(range(len(found)), limit)
            found = [found[i] for i in sorted(chosen)]
    return found


def purpose_of(source: str) -> str | None:
    """What a named source measures (utility, safety, over-refusal) or is for (alignment); None for any other."""
    name = source_name(source)
    if name in _STARTER_SOURCES:
        return _STARTER_SOURCES[name].purpose
    return NAMED_SOURCES[name].purpose if name in NAMED_SOURCES else None


def source_name(source: str) -> str:
    """A source without the place or revision it is read from: `mmlu` of `mmlu=my/copy.jsonl` and of `mmlu@v1`."""
    for mark in "=@":
        name = source.partition(mark)[0]
        if name in NAMED_SOURCES:
            return name
    return source


def _converted(source: str) -> Iterator[Example]:
    name, equals, path = source.partition("=")
    on_hub, _, revision = source.partition("@")
    if _is_file(Path(source)):
        yield from _own_columns(Path(source))
    elif source in _STARTER_SOURCES:
        for file in _STARTER_SOURCES[source].files:
            yield from _own_columns(_STARTER / file)
    elif equals:
        if name not in NAMED_SOURCES:
            raise DataError(f"{source}: unknown named source {name!r}; accepted: {', '.join(NAMED_SOURCES)}")
        yield from _convert_all(NAMED_SOURCES[name].convert, _read_file(Path(path)), name)
    elif on_hub in NAMED_SOURCES:
        named = NAMED_SOURCES[on_hub]
        found = list(_convert_all(named.convert, _read_hub(on_hub, named, revision), on_hub))
        if named.size not in (None, len(found)):
            logger.warning(
                "%s: %d examples on the hub, %d when castune was written: numbers will not compare with older ones",
                source,
                len(found),
                named.size,
            )
        yield from found
    elif Path(source).suffix in _FILE_FORMATS or _exists(Path(source)):
        yield from _own_columns(Path(source))
    elif on_hub.count("/") == 1:
        yield from _convert_all(_example_of, _read_hub(on_hub, None, revision), on_hub)
    else:
        raise DataError(
            f"{source}: no such file and no named source; named sources: {', '.join(SOURCE_NAMES)}; "
            "a hub id has the form owner/name"
        )


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # no name a file system takes
        return False


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:
        return False


def _own_columns(path: Path) -> Iterator[Example]:
    yield from _convert_all(_example_of, _read_file(path), path.stem)


def _convert_all(
    convert: Callable[[Row], Example | None], rows: Iterator[tuple[str, Row]], name: str
) -> Iterator[Example]:
    seen: set[str] = set()
    for index, (where, row) in enumerate(rows):
        try:
            example = convert(row)
        except KeyError as error:
            raise DataError(
                f"{where}: column {error.args[0]!r} is missing; found: {', '.join(map(str, row))}"
            ) from None
        except (TypeError, ValueError, AttributeError) as error:
            raise DataError(f"{where}: {error}") from None
        if example is None:
            continue
        _check(example, where)
        _check_text(example, where)
        identifier = example.id or f"{name}-{index:05d}"
        if identifier in seen:
            raise DataError(f"{where}: id {identifier!r} stands there twice; ids must be unique")
        seen.add(identifier)
        yield replace(example, id=identifier)


def _check(example: Example, where: str) -> None:
    if not isinstance(example.prompt, str) or not example.prompt.strip():
        raise DataError(f"{where}: the prompt is empty or not text")
    if example.reply is not None and (not isinstance(example.reply, str) or not example.reply.strip()):
        raise DataError(f"{where}: the reply is empty or not text")
    if example.is_question:
        if not 2 <= len(example.choices) <= len(LETTERS):
            raise DataError(f"{where}: {len(example.choices)} choices, accepted: 2 to {len(LETTERS)}")
        if not all(isinstance(choice, str) and choice.strip() for choice in example.choices):
            raise DataError(f"{where}: a choice is empty or not text")
        if example.answer is None or not 0 <= example.answer < len(example.choices):
            raise DataError(
                f"{where}: answer is {example.answer!r}, accepted: the 0-based index of a choice, "
                f"0 to {len(example.choices) - 1}"
            )
        if example.scoring not in QUESTION_SCORINGS:
            raise DataError(f"{where}: scoring is {example.scoring!r}, accepted: {', '.join(QUESTION_SCORINGS)}")
    if example.is_problem:
        if not isinstance(example.target, str) or not example.target.strip():
            raise DataError(f"{where}: the answer is empty or not text")
        if example.scoring not in PROBLEM_SCORINGS:
            raise DataError(f"{where}: scoring is {example.scoring!r}, accepted: {', '.join(PROBLEM_SCORINGS)}")
        if example.scoring == "number" and not re.search(r"\d", example.target):
            raise DataError(f"{where}: answer is {example.target!r}, and scoring by number needs a number")


def _check_text(example: Example, where: str) -> None:
    """JSON can hold halves of surrogate pairs, which no tokenizer takes and no file can hold."""
    turns = [text for turn in example.history for text in (turn.role, turn.content)]
    texts = [example.id, example.prompt, example.reply, example.rejected, example.target, example.group]
    for text in (*texts, *example.choices, *turns):
        if text is not None and not isinstance(text, str):
            raise DataError(f"{where}: expected text, found {type(text).__name__}")
        if text is not None and any("\ud800" <= character <= "\udfff" for character in text):
            raise DataError(f"{where}: half of a surrogate pair in {text[:40]!a}; the text was cut inside a character")


def _example_of(row: Row) -> Example:
    """An example from castune's own columns, TRL's message lists, or instruction-tuning columns."""
    # Tables that join several kinds of rows have every column in every row.
    row = {key: value for key, value in row.items() if value is not None}
    identifier = str(row.get("id", ""))
    group = next((str(row[key]) for key in ("subject", "category", "kind") if row.get(key)), None)
    for column, value in row.items():
        if column == "messages" or (isinstance(value, list) and column in _TURNS):
            _check_turns(column, value)
    if "messages" in row:
        return _conversation(row["messages"], None, identifier, group)
    if "instruction" in row:
        extra = row.get("input") or ""
        prompt = f"{row['instruction']}\n\n{extra}" if extra else row["instruction"]
        return Example(id=identifier, prompt=prompt, reply=row["output"], group=group)
    if "prompt" not in row:
        raise DataError(f"column 'prompt' is missing; found: {', '.join(map(str, row))}; accepted columns: {COLUMNS}")
    if "chosen" in row or "rejected" in row:
        return _preference(row, identifier, group)
    if isinstance(row["prompt"], list):
        return _conversation(row["prompt"], row.get("completion"), identifier, group)
    if isinstance(row.get("answer"), str) and "choices" not in row:
        scoring = row.get("scoring") or "boxed"
        return Example(id=identifier, prompt=row["prompt"], target=row["answer"], scoring=scoring, group=group)
    if "choices" in row or "answer" in row:
        answer = row["answer"]
        if not isinstance(answer, int) or isinstance(answer, bool):
            raise DataError(f"answer is {answer!r}, accepted: the 0-based index of the right choice")
        if not isinstance(row["choices"], list) or not row["choices"]:
            raise DataError(f"choices is {row['choices']!r}, accepted: a list of texts")
        return Example(
            id=identifier,
            prompt=row["prompt"],
            choices=tuple(row["choices"]),
            answer=answer,
            scoring=row.get("scoring") or "letter",
            group=group,
        )
    reply = row.get("completion", row.get("target"))
    return Example(id=identifier, prompt=row["prompt"], reply=reply, group=group)


def _check_turns(column: str, turns: Any) -> None:
    is_so = isinstance(turns, list) and all(
        isinstance(turn, dict) and {"role", "content"} <= turn.keys() for turn in turns
    )
    if not is_so:
        raise DataError(f"{column} is {str(turns)[:60]!r}, accepted: a list of turns, each with 'role' and 'content'")


def _preference(row: Row, identifier: str, group: str | None) -> Example:
    """A prompt with a chosen and a rejected reply, each as text or as TRL's list of one assistant message."""
    turns = row["prompt"] if isinstance(row["prompt"], list) else [{"role": "user", "content": row["prompt"]}]
    replies = []
    for column in ("chosen", "rejected"):
        value = row[column]
        if isinstance(value, list):
            # Some data sets repeat the prompt before the reply.
            value = value[len(turns) :] if value[: len(turns)] == turns else value
            if len(value) != 1 or value[0]["role"] != "assistant":
                raise DataError(f"{column}: accepted is a text, or a list of one assistant message")
            value = value[0]["content"]
        if not isinstance(value, str) or not value.strip():
            raise DataError(f"{column}: the reply is empty or not text")
        replies.append(value)
    return replace(_conversation(turns, None, identifier, group), reply=replies[0], rejected=replies[1])


def _conversation(turns: list[Row], completion: list[Row] | None, identifier: str, group: str | None) -> Example:
    messages = [Message(turn["role"], turn["content"]) for turn in [*turns, *(completion or [])]]
    reply = messages.pop().content if messages and messages[-1].role == "assistant" else None
    if not messages or messages[-1].role != "user":
        raise DataError("a conversation must end with a user turn, or a user turn and its assistant reply")
    prompt = messages.pop().content
    return Example(id=identifier, prompt=prompt, reply=reply, group=group, history=tuple(messages))


def _read_file(path: Path) -> Iterator[tuple[str, Row]]:
    """Rows of a file with where each stands, for error messages."""
    if not _is_file(path):
        raise DataError(f"{path}: no such file")
    file_format = _FILE_FORMATS.get(path.suffix)
    if file_format is None:
        raise DataError(f"{path}: unknown file type; accepted: {', '.join(_FILE_FORMATS)}")
    if file_format == "jsonl":
        yield from _read_jsonl(path)
        return
    import datasets

    options = {"sep": "\t"} if path.suffix == ".tsv" else {}
    datasets.disable_progress_bars()
    try:
        table = datasets.load_dataset(file_format, data_files=str(path), split="train", **options)
    except Exception as error:  # datasets raises many kinds for a malformed file
        raise DataError(f"{path}: not readable as {file_format}: {_one_line(error)}") from error
    for index, row in enumerate(table):
        yield f"{path} row {index + 1}", dict(row)


def _read_jsonl(path: Path) -> Iterator[tuple[str, Row]]:
    # Iterating over the file splits at newlines only; str.splitlines would also split inside strings at U+2028.
    # Editors of some systems begin a file with a byte order mark.
    with _opened(path) as lines:
        try:
            for number, line in enumerate(lines, start=1):
                if not line.strip():
                    continue
                where = f"{path} line {number}"
                try:
                    row = json.loads(line)
                except json.JSONDecodeError as error:
                    raise DataError(f"{where}: malformed JSON: {error.msg} at column {error.colno}") from None
                except (ValueError, RecursionError) as error:  # a number of thousands of digits, a list in lists
                    raise DataError(f"{where}: malformed JSON: {_one_line(error)}") from None
                if not isinstance(row, dict):
                    raise DataError(f"{where}: expected a JSON object, found {type(row).__name__}")
                yield where, row
        except UnicodeDecodeError as error:
            raise DataError(f"{path}: not UTF-8: {error.reason} at byte {error.start}") from None


def _opened(path: Path) -> TextIO:
    try:
        return path.open(encoding="utf-8-sig")
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None


def _read_hub(name: str, source: NamedSource | None, revision: str) -> Iterator[tuple[str, Row]]:
    import datasets

    hub_id, config, split = (name, None, "train") if source is None else (source.hub_id, source.config, source.split)
    datasets.disable_progress_bars()
    try:
        table = datasets.load_dataset(hub_id, config, split=split, revision=revision or None)
    except Exception as error:  # network, gating, missing data set: datasets and its clients raise many kinds
        gated = (
            f" {hub_id} is gated: accept its terms on its hub page and log in first." if source and source.gated else ""
        )
        local = f" Or give a local copy: {name}=PATH." if source else ""
        raise DataError(f"{name}: could not load {hub_id} from the hub ({_one_line(error)}).{gated}{local}") from error
    for index, row in enumerate(table):
        yield f"{hub_id} row {index + 1}", dict(row)


def _one_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__
