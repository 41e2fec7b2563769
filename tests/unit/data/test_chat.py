"""Tokens through the chat template: what is trained, what is cut, where a turn ends."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import normalizers

from castune.data.chat import ChatFormat
from castune.data.example import Example, Message
from castune.data.rows import Row
from castune.data.template import PLAIN_TEMPLATE
from castune.errors import DataError

IM_END = 257
TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=30)


def example(prompt: str = "Why?", reply: str = "Because.") -> Example:
    return Example(id="e", prompt=prompt, reply=reply)


def test_end_of_turn_is_found_although_it_is_the_padding_token(tiny_tokenizer: Any) -> None:
    assert tiny_tokenizer.pad_token_id == tiny_tokenizer.eos_token_id == IM_END
    assert ChatFormat(tiny_tokenizer).end_token == IM_END


def test_end_of_turn_is_the_templates_not_the_end_of_sequence(tiny_tokenizer: Any) -> None:
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.add_special_tokens({"eos_token": "<|endoftext|>"})
    assert tokenizer.eos_token_id != IM_END
    assert ChatFormat(tokenizer).end_token == IM_END


def test_a_template_without_end_mark_ends_with_the_end_of_sequence(tiny_tokenizer: Any) -> None:
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = PLAIN_TEMPLATE
    chat = ChatFormat(tokenizer)
    assert chat.end_token == tokenizer.eos_token_id
    assert tokenizer.decode(chat.prompt_ids(example("Why?"))[0]) == "### User:\nWhy?\n\n### Assistant:\n"


def test_no_end_token_at_all_is_refused(tiny_tokenizer: Any) -> None:
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template, tokenizer.eos_token = PLAIN_TEMPLATE, None
    with pytest.raises(DataError, match="end-of-turn"):
        ChatFormat(tokenizer)


@pytest.mark.parametrize("configured", [None, 5, [5, IM_END, 6]])
def test_end_tokens_start_with_the_end_of_turn_and_hold_the_models_own(tiny_tokenizer: Any, configured: Any) -> None:
    model = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=configured))
    tokens = ChatFormat(tiny_tokenizer).end_tokens(model)
    assert tokens[0] == IM_END
    assert len(tokens) == len(set(tokens))
    own = configured if isinstance(configured, list) else [configured]
    assert set(tokens) == {IM_END, *own} - {None}


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(prompt=TEXT, reply=TEXT)
def test_the_reply_is_trained_behind_what_the_model_is_asked_to_continue(
    tiny_tokenizer: Any, prompt: str, reply: str
) -> None:
    chat = ChatFormat(tiny_tokenizer, max_length=10_000)
    row = chat.loss_row(example(prompt, reply))
    at_generation, cut = chat.prompt_ids(example(prompt, reply))
    assert not cut
    assert list(row.ids[: len(at_generation)]) == at_generation
    assert list(row.tokens) == [*tiny_tokenizer(reply, add_special_tokens=False)["input_ids"], IM_END]
    assert row.positions == tuple(range(len(at_generation) - 1, len(at_generation) - 1 + len(row.tokens)))
    # Every scored token is the one that follows its position.
    following = [*row.ids, row.tokens[-1]]
    assert [following[p + 1] for p in row.positions] == list(row.tokens)


def test_end_of_turn_is_trained_although_it_is_padding(tiny_tokenizer: Any) -> None:
    assert ChatFormat(tiny_tokenizer).loss_row(example()).tokens[-1] == tiny_tokenizer.pad_token_id


def test_history_stands_before_the_prompt(tiny_tokenizer: Any) -> None:
    talk = Example(id="e", prompt="Two?", reply="Two.", history=(Message("user", "One?"), Message("assistant", "One.")))
    text = tiny_tokenizer.decode(ChatFormat(tiny_tokenizer).prompt_ids(talk)[0])
    assert text == (
        "<|im_start|>user\nOne?<|im_end|>\n<|im_start|>assistant\nOne.<|im_end|>\n"
        "<|im_start|>user\nTwo?<|im_end|>\n<|im_start|>assistant\n"
    )


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(prompt_length=st.integers(1, 80), reply_length=st.integers(1, 120), limit=st.integers(4, 120))
def test_what_is_cut_is_the_left_of_the_prompt_then_the_end_of_the_reply(
    tiny_tokenizer: Any, prompt_length: int, reply_length: int, limit: int
) -> None:
    prompt = "".join(chr(ord("a") + i % 26) for i in range(prompt_length))
    asked = example(prompt, "r" * reply_length)
    whole = ChatFormat(tiny_tokenizer, max_length=10_000).loss_row(asked)
    row = ChatFormat(tiny_tokenizer, max_length=limit).loss_row(asked)
    n_prompt, n_reply = len(whole.ids) + 1 - len(whole.tokens), len(whole.tokens)
    kept_reply = len(row.tokens)
    kept_prompt = len(row.ids) + 1 - kept_reply  # the last reply token is predicted, never an input
    assert kept_prompt + kept_reply == min(n_prompt + n_reply, limit)
    # Neither is cut for the other's sake beyond the half of the limit that is its own.
    assert kept_prompt >= min(n_prompt, limit // 2)
    assert kept_reply >= min(n_reply, limit - limit // 2)
    assert (row.cut, row.reply_cut) == (kept_prompt < n_prompt, kept_reply < n_reply)
    assert row.tokens == whole.tokens[:kept_reply]
    assert row.ids[:kept_prompt] == whole.ids[n_prompt - kept_prompt : n_prompt]
    # A reply that was cut does not teach the model to stop there.
    assert (row.tokens[-1] == IM_END) == (not row.reply_cut)
    assert not whole.cut
    assert not whole.reply_cut


def test_the_token_that_begins_a_sequence_stays_when_a_prompt_is_cut(tiny_tokenizer: Any) -> None:
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = "{{ bos_token }}" + tokenizer.chat_template.replace("<|im_start|>", "")
    ids, cut = ChatFormat(tokenizer, max_length=12).prompt_ids(example("a" * 40), reserve=2)
    assert cut
    assert len(ids) == 10
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.bos_token_id not in ids[1:]


def test_prompts_leave_room_for_a_reply_or_are_refused(tiny_tokenizer: Any) -> None:
    chat = ChatFormat(tiny_tokenizer, max_length=11)
    assert len(chat.prompt_ids(example(), reserve=10)[0]) == 1
    with pytest.raises(DataError, match=r"'e'.*11 tokens.*11"):
        chat.prompt_ids(example(), reserve=11)
    with pytest.raises(DataError, match=r"'e'.*12 tokens.*11"):
        chat.row(example(), [1, 2], [[3] * 12])


def test_the_loss_of_a_lettered_question_is_that_of_the_letter(tiny_tokenizer: Any) -> None:
    """The next token, which the paper predicts: the end of the turn would be half of the loss."""
    chat = ChatFormat(tiny_tokenizer)
    question = Example(id="q", prompt="Sky?", choices=("red", "blue"), answer=1, scoring="letter")
    row = chat.loss_row(question)
    assert row.tokens == (chat.letter_token(1),)
    assert row.positions == (len(row.ids) - 1,)
    assert list(row.ids) == chat.prompt_ids(question)[0]
    text = chat.loss_row(Example(id="q", prompt="Sky?", choices=("red", "blue"), answer=1, scoring="likelihood"))
    assert tiny_tokenizer.decode(text.tokens) == "blue<|im_end|>"


def test_a_row_needs_a_reply(tiny_tokenizer: Any) -> None:
    with pytest.raises(DataError, match="'e' has no reply"):
        ChatFormat(tiny_tokenizer).loss_row(Example(id="e", prompt="Why?"))


def test_choices_are_scored_without_the_end_of_turn(tiny_tokenizer: Any) -> None:
    chat = ChatFormat(tiny_tokenizer)
    _, [without] = chat.continuations(example(), ["blue"], end_of_turn=False)
    _, [with_end] = chat.continuations(example(), ["blue"])
    assert tiny_tokenizer.decode(without) == "blue"
    assert with_end == [*without, IM_END]


def test_letters_are_single_tokens_or_refused(tiny_tokenizer: Any) -> None:
    chat = ChatFormat(tiny_tokenizer)
    tokens = [chat.letter_token(i) for i in range(10)]
    assert tiny_tokenizer.convert_ids_to_tokens(tokens) == list("ABCDEFGHIJ")

    splitting = copy.deepcopy(tiny_tokenizer)
    splitting.backend_tokenizer.normalizer = normalizers.Replace("A", "_A")
    with pytest.raises(DataError, match='letter A is 2 tokens.*"likelihood"'):
        ChatFormat(splitting).letter_token(0)


def test_a_row_scores_reply_tokens_at_the_positions_before_them() -> None:
    row = Row.of_replies([10, 11, 12], [[20, 21]])
    assert (row.ids, row.positions, row.tokens, row.cut) == ((10, 11, 12, 20), (2, 3), (20, 21), False)
    assert row.places == [0, 1, 2, 3]
    assert Row.of_replies([10], [[20]], cut=True).cut
    assert row.reply_lengths == [2]


def test_replies_that_share_a_prompt_are_each_scored_behind_it() -> None:
    row = Row.of_replies([10, 11], [[20, 21, 22], [30], [40, 41]])
    assert row.reply_lengths == [3, 1, 2]
    assert row.tokens == (20, 21, 22, 30, 40, 41)
    # What a scored token follows, seen from its own branch: the prompt's end, then its reply so far.
    before = [row.ids[p] for p in row.positions]
    assert before == [11, 20, 21, 11, 11, 40]
    by_position = dict(zip(range(len(row.ids)), row.places, strict=True))
    assert [by_position[p] + 1 for p in row.positions] == [2, 3, 4, 2, 2, 3]
    branch_of = dict(zip(row.ids, row.branches, strict=True))
    assert branch_of[10] == branch_of[11] == 0
    assert len({branch_of[20], branch_of[40]}) == 2
    assert branch_of[20] == branch_of[21]


def test_an_empty_reply_has_nothing_to_score(tiny_tokenizer: Any) -> None:
    chat = ChatFormat(tiny_tokenizer)
    prompt, replies = chat.continuations(example(), [""], end_of_turn=False)
    with pytest.raises(DataError, match="'e'.*no tokens"):
        chat.row(example(), prompt, replies)
