"""What is said after the reasoning, in every notation: properties, and what is no reasoning."""

from __future__ import annotations

import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from castune.core.refusals import decides_by, is_settled, read_by
from castune.data.chat import ChatFormat
from castune.data.said import opens_thought, said

# (beginning, end) as models write them, and what a tokenizer leaves that skips special tokens.
NOTATIONS = [
    ("<think>\n", "\n</think>\n\n"),
    ("<THINK>", "</THINK>"),
    ("<thinking>", "</thinking>\n"),
    ("<thought>", "</thought>"),
    ("<reasoning>\n", "\n</reasoning>\n"),
    ("<seed:think>", "</seed:think>"),
    ("[THINK]", "[/THINK]"),
    ("◁think▷", "◁/think▷"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("<|begin_of_thought|>", "<|end_of_thought|>"),
    ("<|im_start|>assistant\n<think>", "</think>"),
    ("<|inner_prefix|>", "<|inner_suffix|>"),
    ("Here are my reasoning steps:\n", "\n[BEGIN FINAL RESPONSE]\n"),
    ("<unused94>thought\n", "<unused95>"),
    ("<|channel>thought\n", "<channel|>"),
    ("<|channel|>analysis<|message|>", "<|end|><|start|>assistant<|channel|>final<|message|>"),
    ("<|start|>assistant<|channel|>analysis<|message|>", "<|end|><|start|>assistant<|channel|>final<|message|>"),
    ("analysis", "assistantfinal"),
]
REASONING = "I cannot help with bombs. But this asks for bread, option A, #### 7, so I say yes."
ANSWERS = ["I'm sorry, but I can't help with that.", "Sure, first take the flour.", "The answer is B.", "#### 42"]


@pytest.mark.parametrize(("begin", "end"), NOTATIONS)
@pytest.mark.parametrize("answer", ANSWERS)
def test_reasoning_is_taken_off_and_without_an_end_nothing_is_said(begin: str, end: str, answer: str) -> None:
    for in_thought in (None, False):
        assert said(f"{begin}{REASONING}{end}{answer}", in_thought=in_thought) == answer
        assert said(f"{begin}{REASONING}", in_thought=in_thought) == ""
    for name in ("prefix", "opening"):
        assert read_by(name)(["p"], [f"{begin}{REASONING}{end}{answer}"]) == [answer.startswith("I'm sorry")]
        assert (
            read_by(name)(["p"], [f"{begin}{REASONING}"]) == decides_by(name)(["p"], [f"{begin}{REASONING}"]) == [None]
        )
        assert not is_settled(name, f"{begin}{REASONING * 20}")


@pytest.mark.parametrize(("begin", "end"), [pair for pair in NOTATIONS if pair[0] not in ("analysis",)])
def test_where_the_template_opens_the_reasoning_a_reply_is_reasoning_until_its_end(begin: str, end: str) -> None:
    assert opens_thought(f"<user>hello{begin}") is not begin.startswith(("<|channel|>", "<|start|>"))
    for answer in ANSWERS:
        assert said(f"{REASONING}{end}{answer}", in_thought=True) == answer
        # A judge of stored replies does not know the template: an end without a beginning tells.
        assert said(f"{REASONING}{end}{answer}") == answer
    assert said(REASONING, in_thought=True) == ""
    assert not is_settled("prefix", REASONING * 20, in_thought=True)
    assert decides_by("prefix", in_thought=True)(["p"], [REASONING]) == [None]


def has_marks(text: str) -> bool:
    """Whether a text may hold a mark of some notation, plain words among them."""
    words = ("assistantfinal", "thought process:", "my response:", "reasoning steps:")
    return any(mark in text.lower() for mark in ("<", ">", "[", "]", "▷", "◁", *words))


@given(st.text(max_size=200))
def test_a_reply_without_marks_is_what_is_said(text: str) -> None:
    if not has_marks(text) and not text.startswith(("analysis", "commentary")):
        assert said(text) == said(text, in_thought=False) == text


@given(st.text(max_size=80), st.sampled_from(NOTATIONS), st.text(max_size=80))
def test_nothing_of_the_reasoning_is_left(reasoning: str, marks: tuple[str, str], answer: str) -> None:
    begin, end = marks
    if not has_marks(reasoning + answer):
        assert said(f"{begin}x{reasoning}{end}{answer}") == answer.strip()


@pytest.mark.parametrize(
    "reply",
    [
        "Analysis of the poem: it rhymes.",
        "analysis: it rhymes.",
        "Use the tag <thinking> to mark thoughts in XML.",
        "The final answer is 4.",
        "I think </b> closes bold text.",
    ],
)
def test_what_is_no_reasoning_stays(reply: str) -> None:
    assert said(reply) == reply


def test_one_reasoning_after_another_and_an_answer_in_a_tag() -> None:
    assert said("<think>a</think>\n<think>b</think>\nYes.") == "Yes."
    assert said("<think>a</think>\n<answer>B</answer>") == "B"
    assert said("<think>a</think> <answer>B") == "B"
    assert said("<think>a</think>\n<response>\nB\n</response>\n") == "B"
    assert said("<|begin_of_thought|>a<|end_of_thought|><|begin_of_solution|>B<|end_of_solution|>") == "B"
    assert said("Here are my reasoning steps:\na\n[BEGIN FINAL RESPONSE]\nB\n[END FINAL RESPONSE]") == "B"


@pytest.mark.parametrize(
    "piece", ["<think></think>", "<think>", "</think>", "<|channel|>", "<answer>", "analysis", "<|a|>"]
)
def test_the_time_does_not_explode(piece: str) -> None:
    start = time.perf_counter()
    said(piece * (20_000 // len(piece)))
    assert time.perf_counter() - start < 2


def test_a_template_that_opens_the_reasoning_is_known(tiny_tokenizer: Any) -> None:
    assert not ChatFormat(tiny_tokenizer).opens_thought
    ends = "{% if add_generation_prompt %}<|im_start|>assistant\n"
    assert ends in tiny_tokenizer.chat_template
    try:
        original = tiny_tokenizer.chat_template
        tiny_tokenizer.chat_template = original.replace(ends, ends + "<think>\n")
        assert ChatFormat(tiny_tokenizer).opens_thought
        tiny_tokenizer.chat_template = original.replace(ends, ends + "<think>\n\n</think>\n\n")
        assert not ChatFormat(tiny_tokenizer).opens_thought
    finally:
        tiny_tokenizer.chat_template = original
