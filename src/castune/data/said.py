"""What a reply says to the user: the reasoning before it taken off, in whatever notation it is written. Pure.

Models mark their reasoning in ways of their own, and a reply that was cut off may end inside it: then nothing is said
yet. Judges, diagnoses and whatever reads answers look at what is said, never at reasoning that weighs a refusal or an
option.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

# Beginning and end of reasoning, in lower case: DeepSeek, Qwen and many more; others in XML; Seed; Magistral; Kimi;
# Cohere; OpenThoughts; Apertus; MedGemma; Gemma; Granite and Apriel, in words.
_MARKS = {
    "<think>": "</think>",
    "<thinking>": "</thinking>",
    "<thought>": "</thought>",
    "<thoughts>": "</thoughts>",
    "<reasoning>": "</reasoning>",
    "<reflection>": "</reflection>",
    "<scratchpad>": "</scratchpad>",
    "<seed:think>": "</seed:think>",
    "[think]": "[/think]",
    "◁think▷": "◁/think▷",
    "<|start_thinking|>": "<|end_thinking|>",
    "<|begin_of_thought|>": "<|end_of_thought|>",
    "<|inner_prefix|>": "<|inner_suffix|>",
    "<unused94>": "<unused95>",
    "<|channel>thought": "<channel|>",
    "here is my thought process:": "here is my response:",
    "here's my thought process:": "here's my response:",
    "here are my reasoning steps:": "[begin final response]",
}
# Headers of a turn, and special tokens that mark no reasoning, may precede it.
_BEFORE = re.compile(
    r"(?:\s|<\|(?:im_start|start_header_id|start)\|>\s*assistant(?:<\|end_header_id\|>)?|</?(?:s|pad|bos|eos)>"
    r"|<\|(?!channel\||start_thinking|begin_of_thought|inner_prefix)[^|<>\s]{1,30}\|>)*",
    re.IGNORECASE,
)
# Harmony (gpt-oss): messages in channels. A tokenizer that skips special tokens leaves the bare words of their headers.
_CHANNEL = re.compile(r"<\|channel\|>\s*(?P<name>\w+)[^<]*(?:<\|constrain\|>[^<]*)?<\|message\|>")
_BARE_CHANNEL = re.compile(r"(?:analysis|commentary)(?=[^\W_])")
_BARE_FINAL = "assistantfinal"
_END_OF_MESSAGE = re.compile(r"<\|(?:return|end|call|start)\|>")
_HARMONY = {"<|start|>", "<|channel|>", "<|constrain|>", "<|message|>", "<|end|>", "<|call|>", "<|return|>"}
# Tokens of which a mark is made with the word behind them.
_HALF_MARKS = {"<|channel>", "<channel|>"}
# Some models wrap what they say as well.
_OPENS_ANSWER = r"(?:<answer>|<response>|<\|begin_of_solution\|>|<\|start_response\|>)"
_ANSWER = re.compile(
    rf"(?=\s*{_OPENS_ANSWER}|.*\[end final response\]\s*\Z)\s*{_OPENS_ANSWER}?(?P<said>.*?)"
    r"(?:(?:</answer>|</response>|<\|end_of_solution\|>|<\|end_response\|>|\[end final response\])\s*)?",
    re.DOTALL | re.IGNORECASE,
)


def said(reply: str, *, in_thought: bool | None = None) -> str:
    """What a reply says after its reasoning; empty where the reasoning has no end.

    Args:
        reply: the reply, with or without the special tokens of its notation.
        in_thought: whether the chat template has opened the reasoning already, so that a reply is reasoning until its
            end. None: not known; then an end without a beginning tells.
    """
    channels = list(_CHANNEL.finditer(reply))
    if channels and (in_thought is not False or channels[0].start() == _place(reply)):
        final = next((channel for channel in channels if channel["name"] == "final"), None)
        return "" if final is None else _END_OF_MESSAGE.split(reply[final.end() :], maxsplit=1)[0].strip()
    if _BARE_CHANNEL.match(reply) or (in_thought and _BARE_FINAL in reply):
        return reply.partition(_BARE_FINAL)[2].strip()
    text = reply
    if in_thought is not False:
        end = _lone_end(reply)
        if end is None and in_thought and _begins(reply) is None:
            return ""
        text = reply[end or 0 :]
    while begins := _begins(text):
        place, mark = begins
        end = _end_of(text, place, mark)
        if end is None:
            return ""
        # A model that marks its reasoning may go back to it: what it said before and after is said.
        text = _without_thoughts(text[end:], mark)
    answer = _ANSWER.fullmatch(text)
    # Without reasoning it is the reply itself, in every character.
    return answer["said"].strip() if answer else text if text is reply else text.strip()


def opens_thought(prompt: str) -> bool:
    """Whether a prompt ends inside reasoning that its chat template has begun."""
    lower = prompt.lower()
    return any(lower.rfind(begin) > lower.rfind(end) for begin, end in _MARKS.items())


def is_reasoning_mark(text: str) -> bool:
    """Whether a text is the beginning or the end of reasoning, in any notation."""
    return text.lower() in _MARKS or text.lower() in _MARKS.values()


def notation(tokens: Iterable[str]) -> set[str]:
    """Those of a tokenizer's special tokens that tell reasoning from what is said; `said` needs them in a reply."""
    known = set(tokens)
    found = {token for token in known if is_reasoning_mark(token) or token in _HALF_MARKS}
    return found | (_HARMONY & known if "<|channel|>" in known else set())


def _place(text: str) -> int:
    """Where a text begins, behind headers and special tokens."""
    before = _BEFORE.match(text)
    return before.end() if before else 0


def _begins(text: str) -> tuple[int, str] | None:
    """Where the reasoning that a text begins with starts, behind its mark, and that mark; None without."""
    place = _place(text)
    lower = text[place : place + 32].lower()
    return next(((place + len(begin), begin) for begin in _MARKS if lower.startswith(begin)), None)


def _end_of(text: str, place: int, begin: str) -> int | None:
    """Behind the end of reasoning that begins before `place`; a thought within it has an end of its own."""
    lower, end, depth = text.lower(), _MARKS[begin], 1
    for found in re.finditer(f"({re.escape(begin)})|{re.escape(end)}", lower[place:]):
        depth += 1 if found[1] else -1
        if not depth:
            return place + found.end()
    return None


def _without_thoughts(text: str, begin: str) -> str:
    """What follows a thought, without further ones in the same marks; the last may have no end."""
    said = ""
    while (place := text.lower().find(begin)) >= 0 and _begins(text) is None:
        end = _end_of(text, place + len(begin), begin)
        said += text[:place]
        text = "" if end is None else text[end:]
    return said + text


def _lone_end(text: str) -> int | None:
    """Behind the last mark that ends reasoning which does not begin in the text; None without."""
    lower = text.lower()
    ends = [
        place + len(end)
        for begin, end in _MARKS.items()
        if (place := lower.rfind(end)) >= 0 and begin not in lower[:place]
    ]
    return max(ends, default=None)
