"""Tokens through the chat template: what is trained, what is cut, where a turn ends."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from castune.data.chat import PLAIN_TEMPLATE, ChatFormat
from castune.data.example import Example, Message
from castune.data.rows import Row
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
def test_prompt_and_reply_are_tokenised_apart(tiny_tokenizer: Any, prompt: str, reply: str) -> None:
    chat = ChatFormat(tiny_tokenizer, max_length=10_000)
    row = chat.loss_row(example(prompt, reply))
    at_generation, cut = chat.prompt_ids(example(prompt, reply))
    assert not cut
    # What the model is asked to continue at generation time is exactly what stands before the trained tokens.
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
@given(prompt_length=st.integers(1, 80), reply_length=st.integers(1, 40), limit=st.integers(45, 120))
def test_only_the_left_of_the_prompt_is_cut(
    tiny_tokenizer: Any, prompt_length: int, reply_length: int, limit: int
) -> None:
    prompt = "".join(chr(ord("a") + i % 26) for i in range(prompt_length))
    whole = ChatFormat(tiny_tokenizer, max_length=10_000).loss_row(example(prompt, "r" * reply_length))
    row = ChatFormat(tiny_tokenizer, max_length=limit).loss_row(example(prompt, "r" * reply_length))
    total = len(whole.ids) + 1  # the last reply token is predicted, never an input
    assert row.tokens == whole.tokens
    assert row.cut == (total > limit)
    assert len(row.ids) + 1 == min(total, limit)
    assert whole.ids[len(whole.ids) - len(row.ids) :] == row.ids
    assert not whole.cut


def test_a_reply_that_fills_the_limit_leaves_no_prompt_and_is_refused(tiny_tokenizer: Any) -> None:
    chat = ChatFormat(tiny_tokenizer, max_length=11)
    assert len(chat.loss_row(example(reply="r" * 9)).ids) == 10
    with pytest.raises(DataError, match=r"'e'.*11 tokens.*11"):
        chat.loss_row(example(reply="r" * 10))


def test_a_row_needs_a_reply(tiny_tokenizer: Any) -> None:
    with pytest.raises(DataError, match="'e' has no reply"):
        ChatFormat(tiny_tokenizer).loss_row(Example(id="e", prompt="Why?"))


def test_choices_are_scored_without_the_end_of_turn(tiny_tokenizer: Any) -> None:
    chat = ChatFormat(tiny_tokenizer)
    assert IM_END not in chat.reply_row(example(), "blue", end_of_turn=False).tokens
    assert chat.reply_row(example(), "blue").tokens[-1] == IM_END


def test_letters_are_single_tokens_or_refused(tiny_tokenizer: Any) -> None:
    chat = ChatFormat(tiny_tokenizer)
    tokens = [chat.letter_token(i) for i in range(10)]
    assert tiny_tokenizer.convert_ids_to_tokens(tokens) == list("ABCDEFGHIJ")

    class Splitting:
        def __getattr__(self, name: str) -> Any:
            return getattr(tiny_tokenizer, name)

        def __call__(self, text: str, **options: Any) -> Any:
            return tiny_tokenizer(f"_{text}", **options)

    with pytest.raises(DataError, match='letter A is 2 tokens.*"likelihood"'):
        ChatFormat(Splitting()).letter_token(0)


def test_a_row_scores_reply_tokens_at_the_positions_before_them() -> None:
    row = Row.of_replies([10, 11, 12], [[20, 21]])
    assert (row.ids, row.positions, row.tokens, row.cut) == ((10, 11, 12, 20), (2, 3), (20, 21), False)
    assert row.places == [0, 1, 2, 3]
    assert Row.of_replies([10], [[20]], cut=True).cut


def test_replies_that_share_a_prompt_are_each_scored_behind_it() -> None:
    row = Row.of_replies([10, 11], [[20, 21, 22], [30], [40, 41]])
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
    with pytest.raises(DataError, match="'e'.*no tokens"):
        ChatFormat(tiny_tokenizer).reply_row(example(), "", end_of_turn=False)
