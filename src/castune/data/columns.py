"""From a row of castune's own columns, TRL's or instruction-tuning ones, to an example.

What means something is used or refused by its name; it is neither dropped nor invented.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from castune.data.example import LETTERS, PROBLEM_SCORINGS, QUESTION_SCORINGS, Example, Message
from castune.data.tables import Row
from castune.errors import DataError

COLUMNS = (
    "multiple choice: prompt, choices, answer; problems: prompt, answer (text); harmful prompts: prompt, target; "
    "alignment data: prompt, completion, or messages, or instruction, output; preferences: prompt, chosen, rejected; "
    "prompts alone: prompt; with each: system, history"
)
# Columns that hold a text or a list of turns.
_TURNS = ("prompt", "completion", "chosen", "rejected")
# What tells a kind of row, and the columns of text or answers that it uses; the first that is there.
_USED = {
    "messages": ("messages",),
    "chosen": ("prompt", "instruction", "input", "chosen", "rejected"),
    "instruction": ("instruction", "input", "output"),
    "choices": ("prompt", "choices", "answer"),
    "answer": ("prompt", "answer", "completion", "target"),
    "prompt": ("prompt", "completion", "target"),
}
_CONTENT = tuple(dict.fromkeys(name for names in _USED.values() for name in names))
_KNOWN = (*_CONTENT, "system", "history", "scoring", "id", "subject", "category", "kind")
# Columns that say what a row's prompt is, one of which a row has.
_PROMPTS = ("messages", "instruction", "prompt")
_REPLIES = ("completion", "target", "output")
# What changes a conversation or how it is trained, and what castune cannot do with it.
_REFUSED_COLUMNS = {
    **dict.fromkeys(("tools", "functions"), "castune trains no tool calls"),
    **dict.fromkeys(
        ("images", "image", "videos", "video", "audios", "audio", "documents"), "castune trains on text alone"
    ),
    "chat_template_kwargs": "the chat template is the same for all rows",
    "system_prompt": "name it system",
    "conversations": 'name it messages, each turn with "role" and "content"',
}
_REFUSED_KEYS = {
    **dict.fromkeys(("tool_calls", "function_call", "tool_call_id", "tool_responses"), "castune trains no tool calls"),
    **dict.fromkeys(
        ("reasoning_content", "reasoning", "thinking"), "put the reasoning into content, as the model writes it"
    ),
    **dict.fromkeys(("images", "image", "audio", "video"), "castune trains on text alone"),
    "refusal": "put it into content",
    "prefix": "an assistant's turn that is begun cannot be trained on",
    "name": "turns are told apart by role alone",
}
_TURNS_AS_TEXT = re.compile(r"""\s*\[\s*\{\s*["'](?:role|content)["']\s*:""")
_ROLES_OF_TOOLS = ("tool", "function", "ipython", "tool_response")


def example_of(row: Row) -> Example:
    """An example from castune's own columns, TRL's message lists, or instruction-tuning columns.

    Raises:
        DataError: a column is missing, of another kind than it should be, or means something that is not supported.
    """
    # Tables that join several kinds of rows have every column in every row.
    row = {key: value for key, value in row.items() if not _is_absent(value)}
    _refuse_columns(row)
    row = {key: _turns(key, value) if _holds_turns(key, value) else value for key, value in row.items()}
    identifier = _text_of(row.get("id", ""))
    group = next((_text_of(row[key]) for key in ("subject", "category", "kind") if not _is_nothing(row.get(key))), None)
    found = replace(_example(row), id=identifier, group=group)
    _refuse_unused(row)
    return replace(found, history=(*_history(row, found.history), *found.history))


def _example(row: Row) -> Example:
    if "messages" in row:
        return _conversation(row["messages"])
    if "instruction" in row:
        extra = row.get("input") or ""
        prompt = f"{row['instruction']}\n\n{extra}" if extra else row["instruction"]
        if "chosen" in row or "rejected" in row:
            return _preference({**row, "prompt": prompt})
        return Example(id="", prompt=prompt, reply=row["output"])
    if "prompt" not in row:
        raise DataError(f"column 'prompt' is missing; found: {', '.join(map(str, row))}; accepted columns: {COLUMNS}")
    if "chosen" in row or "rejected" in row:
        return _preference(row)
    reply = row.get("completion", row.get("target"))
    if isinstance(row["prompt"], list):
        if with_answer := next((name for name in ("choices", "answer") if not _is_nothing(row.get(name))), None):
            raise DataError(f"the prompt of a row with {with_answer} is a text, not a list of turns")
        completion = reply if isinstance(reply, list) else [] if reply is None else [_assistant(reply)]
        return _conversation([*row["prompt"], *completion])
    if isinstance(reply, list):
        return _conversation([{"role": "user", "content": row["prompt"]}, *reply])
    if isinstance(row.get("answer"), str) and "choices" not in row:
        scoring = row.get("scoring") or "boxed"
        return Example(id="", prompt=row["prompt"], reply=reply, target=row["answer"], scoring=scoring)
    if "answer" in row and "choices" not in row and not isinstance(row["answer"], str):
        raise DataError(
            f"column 'choices' is missing, and answer is {row['answer']!r}; found: {', '.join(map(str, row))}; "
            "accepted: the answer to a problem as text, or choices and the 0-based index of the right one"
        )
    if "choices" in row or "answer" in row:
        if reply is not None:
            raise DataError("the reply to a question is its answer: remove its completion or target")
        return _question(row)
    if not _is_nothing(row.get("scoring")):
        raise DataError(f"scoring is {row['scoring']!r}, and there is neither an answer nor choices to score")
    return Example(id="", prompt=row["prompt"], reply=reply)


def _question(row: Row) -> Example:
    answer = row["answer"]
    if not isinstance(answer, int) or isinstance(answer, bool):
        raise DataError(f"answer is {answer!r}, accepted: the 0-based index of the right choice")
    if not isinstance(row["choices"], list) or not row["choices"]:
        raise DataError(f"choices is {row['choices']!r}, accepted: a list of texts")
    return Example(
        id="",
        prompt=row["prompt"],
        choices=tuple(row["choices"]),
        answer=answer,
        scoring=row.get("scoring") or "letter",
    )


def _is_absent(value: object) -> bool:
    return value is None or is_nan(value)


def is_nan(value: object) -> bool:
    """Whether a value is NaN, by which tables of numbers say that a cell is empty."""
    return isinstance(value, float) and math.isnan(value)


def _is_nothing(value: object) -> bool:
    """Whether a value says nothing: absent, or empty of whatever kind."""
    return _is_absent(value) or (isinstance(value, (str, list, dict)) and not value)


def _text_of(value: object) -> str:
    """A name as text; tables may hold whole numbers as floats."""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def _refuse_unused(row: Row) -> None:
    """Refuse text or answers that this kind of row does not use, which would be dropped without a word."""
    kind = next(name for name in _USED if name in row)
    unused = [name for name in _CONTENT if name not in _USED[kind] and not _is_nothing(row.get(name))]
    if unused:
        raise DataError(
            f"column {unused[0]!r} is not used in a row with {kind!r}: remove one of the two; accepted columns: "
            f"{COLUMNS}"
        )


def _refuse_columns(row: Row) -> None:
    for name in row:
        meant = str(name).strip().lower()
        if meant != name and meant in _KNOWN and meant not in row:
            raise DataError(f"column {name!r} is not known; name it {meant!r}")
    for name, why in _REFUSED_COLUMNS.items():
        if not _is_nothing(row.get(name)):
            raise DataError(f"column {name!r} is not supported: {why}; remove it, or the row")
    # Tables of text have no truth values and no numbers.
    if str(row.get("label")).strip().lower() in ("true", "false") and "completion" in row:
        raise DataError(
            "column 'label' is not supported: castune trains on every completion; take out the rows with label false, "
            "and the column"
        )
    if not _is_one(row.get("weight", 1)):
        raise DataError(f"weight is {row['weight']!r}: castune trains all rows alike; remove the row or the column")
    for name in (*_TURNS, "messages"):
        if isinstance(row.get(name), str) and _TURNS_AS_TEXT.match(row[name]):
            raise DataError(f"{name} is a list of turns that is written out as text; make it a list")
    for names in (_PROMPTS, _REPLIES):
        given = [name for name in names if not _is_nothing(row.get(name))]
        if len(given) > 1:
            raise DataError(f"columns {given[0]!r} and {given[1]!r} both hold text, and only one can be used")


def _is_one(weight: object) -> bool:
    """Whether a weight is 1, as a number or as the text of one; what is neither weighs nothing."""
    try:
        return isinstance(weight, bool) or not isinstance(weight, (int, float, str)) or float(weight) == 1
    except ValueError:
        return True


def _holds_turns(column: str, value: object) -> bool:
    return column == "messages" or (isinstance(value, list) and column in _TURNS)


def _turns(column: str, turns: Any) -> list[dict[str, str]]:
    """Turns with nothing but role and content."""
    is_so = isinstance(turns, list) and all(
        isinstance(turn, dict) and {"role", "content"} <= turn.keys() for turn in turns
    )
    if not is_so:
        raise DataError(f"{column} is {str(turns)[:60]!r}, accepted: a list of turns, each with 'role' and 'content'")
    return [_turn(f"{column}, turn {n}", turn, is_last=n == len(turns)) for n, turn in enumerate(turns, start=1)]


def _turn(where: str, turn: Mapping[str, Any], *, is_last: bool) -> dict[str, str]:
    role = turn["role"]
    if not isinstance(role, str) or not role.strip():
        raise DataError(f"{where}: role is {role!r}, accepted: system, user, assistant")
    if role in _ROLES_OF_TOOLS:
        raise DataError(f"{where}: role {role!r} is not supported: castune cannot train on tool calls; remove the row")
    for key, why in _REFUSED_KEYS.items():
        if not _is_nothing(turn.get(key)):
            raise DataError(f"{where}: {key!r} is not supported: {why}")
    # Of turns before the last nothing is trained anyway.
    if is_last and (turn.get("weight") in (0, 0.0) or turn.get("train") is False):
        key = "weight" if "weight" in turn else "train"
        raise DataError(f"{where}: {key!r} says that this reply is not trained on; remove the row")
    return {"role": role, "content": _content(where, turn["content"])}


def _content(where: str, content: object) -> str:
    if isinstance(content, list):
        parts = [
            part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None for part in content
        ]
        if not parts or not all(isinstance(part, str) for part in parts):
            kinds = [str(part.get("type")) if isinstance(part, dict) else type(part).__name__ for part in content]
            raise DataError(f"{where}: content has parts of kind {', '.join(kinds) or 'none'}; accepted: text")
        return "".join(str(part) for part in parts)
    if not isinstance(content, str):
        raise DataError(f"{where}: content is {content!r}, accepted: text")
    return content


def _history(row: Row, turns: Sequence[Message]) -> tuple[Message, ...]:
    """Turns that come before those of a row's prompt: `system`, and `history` as pairs of what was said and replied."""
    found: list[Message] = []
    system = row.get("system")
    if not _is_nothing(system):
        if not isinstance(system, str):
            raise DataError(f"system is {str(system)[:60]!r}, accepted: text")
        if any(turn.role == "system" for turn in turns):
            raise DataError("column 'system' is set, but the conversation already has a system turn")
        found.append(Message("system", system))
    history = row.get("history")
    if _is_nothing(history):
        return tuple(found)
    if turns:
        raise DataError("column 'history' is set, but the prompt already has turns")
    pairs = history if isinstance(history, list) else [history]
    if all(isinstance(pair, dict) for pair in pairs):
        return (*found, *(Message(turn["role"], turn["content"]) for turn in _turns("history", pairs)))
    for pair in pairs:
        if not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair)):
            raise DataError(f"history is {str(history)[:60]!r}, accepted: a list of pairs [user, assistant]")
        found += [Message("user", pair[0]), Message("assistant", pair[1])]
    return tuple(found)


def _preference(row: Row) -> Example:
    """A prompt with a chosen and a rejected reply, each as text or as TRL's list of one assistant message."""
    turns = row["prompt"] if isinstance(row["prompt"], list) else [{"role": "user", "content": row["prompt"]}]
    if turns and turns[-1]["role"] == "assistant":
        raise DataError(
            "prompt ends with an unfinished assistant turn, which cannot be trained on; end it with a user turn"
        )
    replies = []
    for column in ("chosen", "rejected"):
        value = row[column]
        if isinstance(value, list):
            # Some data sets repeat the prompt before the reply.
            value = value[len(turns) :] if value[: len(turns)] == turns else value
            if len(value) != 1 or value[0]["role"] != "assistant":
                raise DataError(f"{column}: accepted: a text, or a list of one assistant message")
            value = value[0]["content"]
        if not isinstance(value, str) or not value.strip():
            raise DataError(f"{column}: the reply is empty or not text")
        replies.append(value)
    return replace(_conversation(turns), reply=replies[0], rejected=replies[1])


def _conversation(turns: Sequence[Mapping[str, str]]) -> Example:
    messages = [Message(turn["role"], turn["content"]) for turn in turns]
    reply = messages.pop().content if messages and messages[-1].role == "assistant" else None
    if not messages or messages[-1].role != "user":
        raise DataError("a conversation must end with a user turn, or a user turn and its assistant reply")
    prompt = messages.pop().content
    return Example(id="", prompt=prompt, reply=reply, history=tuple(messages))


def _assistant(content: str) -> dict[str, str]:
    return {"role": "assistant", "content": content}


def check_example(example: Example, where: str) -> None:
    """Refuse an example that is empty, or not what its kind needs.

    Raises:
        DataError: the message names `where`.
    """
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
    _check_text(example, where)


def _check_text(example: Example, where: str) -> None:
    """JSON can hold halves of surrogate pairs, which no tokenizer takes and no file can hold."""
    turns = [text for turn in example.history for text in (turn.role, turn.content)]
    texts = [example.id, example.prompt, example.reply, example.rejected, example.target, example.group]
    for text in (*texts, *example.choices, *turns):
        if text is not None and not isinstance(text, str):
            raise DataError(f"{where}: expected text, found {type(text).__name__}")
        if text is not None and any("\ud800" <= character <= "\udfff" for character in text):
            raise DataError(f"{where}: half of a surrogate pair in {text[:40]!a}; the text was cut inside a character")
