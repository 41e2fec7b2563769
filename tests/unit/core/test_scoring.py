"""Scores of choices, one question at a time and without castune's rows; rows that share a prompt."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from castune.core.scoring import (
    answer_margin,
    can_share_prompts,
    is_correct,
    question_rows,
    reply_means,
    score_batch,
    score_rows,
    shared_if_exact,
)
from castune.data.chat import ChatFormat
from castune.data.example import Example
from castune.data.rows import Row

# Linear attention reads past any mask, and bloom builds its position biases from a mask of two dimensions.
UNSHARED = ("qwen3_next", "bloom")


@torch.no_grad()
def log_probs_alone(model: Any, prompt: list[int], reply: list[int]) -> torch.Tensor:
    logits = model(input_ids=torch.tensor([prompt + reply])).logits[0, len(prompt) - 1 : -1]
    return logits.double().log_softmax(-1).gather(1, torch.tensor(reply)[:, None])[:, 0]


@pytest.mark.parametrize("share", [True, False])
def test_choice_scores_equal_each_choice_alone(
    tiny_model: Callable[..., Any], tiny_tokenizer: Any, questions: list[Example], share: bool
) -> None:
    """Letter: the option letters at the first reply token. Likelihood: mean over the choice's tokens, no end of turn."""
    model, chat = tiny_model("llama"), ChatFormat(tiny_tokenizer)
    for question in questions:
        rows = question_rows(chat, question, share_prompt=share)
        scores = reply_means(rows, score_rows(model, rows, batch_tokens=300))
        turn = [{"role": "user", "content": question.user_text}]
        prompt = tiny_tokenizer.apply_chat_template(turn, add_generation_prompt=True)["input_ids"]
        replies = "ABCD"[: len(question.choices)] if question.scoring == "letter" else question.choices
        expected = [
            float(log_probs_alone(model, prompt, tiny_tokenizer.encode(r, add_special_tokens=False)).mean())
            for r in replies
        ]
        np.testing.assert_allclose(scores, expected, rtol=0, atol=2e-5)
        assert is_correct(question, scores) == (np.argmax(expected) == question.answer)


@torch.no_grad()
def test_letters_are_scored_from_float32_logits_in_any_dtype(
    tiny_model: Callable[..., Any], tiny_tokenizer: Any, questions: list[Example]
) -> None:
    """The model runs in bfloat16 to its last hidden state; only the output head is exact. Then it is as it was."""
    model, chat = tiny_model("llama").to(torch.bfloat16), ChatFormat(tiny_tokenizer)
    letters = [question for question in questions if question.scoring == "letter"]
    rows = [row for question in letters for row in question_rows(chat, question, share_prompt=False)]
    for row, scores in zip(rows, score_rows(model, rows, batch_tokens=1), strict=True):
        output = model(input_ids=torch.tensor([row.ids]), output_hidden_states=True)
        logits_V = output.hidden_states[-1][0, -1].float() @ model.lm_head.weight.float().T
        expected = logits_V.double().log_softmax(-1)[list(row.tokens)].numpy()
        np.testing.assert_allclose(scores, expected, rtol=0, atol=1e-5)
        assert output.logits.dtype == torch.bfloat16
        assert np.abs(expected - output.logits[0, -1].double().log_softmax(-1)[list(row.tokens)].numpy()).max() > 1e-5


def test_letters_are_one_row_and_likelihoods_one_a_choice_unless_shared(
    tiny_tokenizer: Any, questions: list[Example]
) -> None:
    chat = ChatFormat(tiny_tokenizer)
    for question in questions:
        alone, shared = (question_rows(chat, question, share_prompt=share) for share in (False, True))
        assert len(shared) == 1
        assert len(alone) == (1 if question.scoring == "letter" else len(question.choices))
        assert sum((row.tokens for row in alone), ()) == shared[0].tokens


def test_replies_that_share_a_prompt_score_as_alone(any_tiny_model: Any) -> None:
    """Every family that takes an explicit mask, mixed with plain rows in one batch; below the windows of 16."""
    if any_tiny_model.config.model_type in UNSHARED:
        pytest.skip("takes no explicit mask; that it is found out is tested below")
    prompts = [[40, 41, 42, 43, 44], [50, 51], [60, 61, 62]]
    replies = [[[7, 8, 9], [10], [11, 12]], [[0, 0, 0, 0]], [[9, 8], [9, 8], [9, 7]]]
    rows = [Row.of_replies(p, r) for p, r in zip(prompts, replies, strict=True)]
    assert max(len(row.ids) for row in rows) <= 16
    for prompt, answers, values in zip(prompts, replies, score_batch(any_tiny_model, rows), strict=True):
        expected = torch.cat([log_probs_alone(any_tiny_model, prompt, answer) for answer in answers])
        np.testing.assert_allclose(values, expected.numpy(), rtol=0, atol=2e-5)


def test_sharing_is_allowed_where_it_is_exact(any_tiny_model: Any) -> None:
    """An explicit mask is not narrowed by a sliding window or a chunk, so beyond it rows must not share."""
    config = any_tiny_model.config
    window = getattr(config, "sliding_window", None) or getattr(config, "attention_chunk_size", None)
    shares = config.model_type not in UNSHARED
    assert can_share_prompts(any_tiny_model, longest=16) is shares
    assert can_share_prompts(any_tiny_model, longest=17) is (shares and (window is None or window > 16))


def test_long_rows_score_as_alone_whatever_the_family(
    any_tiny_model: Any, tiny_tokenizer: Any, questions: list[Example]
) -> None:
    """Prompts of many windows: what `shared_if_exact` picks must be exact."""
    chat = ChatFormat(tiny_tokenizer)
    likelihood = [q for q in questions if q.scoring == "likelihood"]
    rows_of = shared_if_exact(
        any_tiny_model, lambda share: [question_rows(chat, q, share_prompt=share) for q in likelihood]
    )
    for question, rows in zip(likelihood, rows_of, strict=True):
        scores = reply_means(rows, score_rows(any_tiny_model, rows, batch_tokens=400))
        prompt = chat.prompt_ids(question)[0]
        expected = [
            float(log_probs_alone(any_tiny_model, prompt, tiny_tokenizer.encode(c, add_special_tokens=False)).mean())
            for c in question.choices
        ]
        np.testing.assert_allclose(scores, expected, rtol=0, atol=2e-5)


def test_models_that_ignore_the_mask_do_not_share(tiny_model: Callable[..., Any]) -> None:
    model = tiny_model("llama")
    forward = model.forward
    model.forward = lambda *args, attention_mask=None, **kwargs: forward(*args, **kwargs)
    assert not can_share_prompts(model, longest=10)
    model.forward = lambda input_ids, logits_to_keep, use_cache: forward(
        input_ids=input_ids, logits_to_keep=logits_to_keep, use_cache=use_cache
    )
    assert not can_share_prompts(model, longest=10)


def test_score_rows_keeps_the_order_whatever_the_batches(tiny_model: Callable[..., Any]) -> None:
    model = tiny_model("qwen2")
    rows = [
        Row.of_replies(list(range(40, 40 + n)), [list(range(7, 7 + m))]) for n, m in ((3, 2), (20, 1), (7, 9), (3, 4))
    ]
    one_by_one = [score_batch(model, [row])[0] for row in rows]
    for batch_tokens in (1, 24, 10_000):
        for found, expected in zip(score_rows(model, rows, batch_tokens=batch_tokens), one_by_one, strict=True):
            np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5)


@given(st.lists(st.lists(st.floats(-50, 0), min_size=1, max_size=6), min_size=1, max_size=5))
def test_reply_means_do_not_depend_on_sharing(replies: list[list[float]]) -> None:
    tokens = [[7] * len(reply) for reply in replies]
    separate = [np.array(reply) for reply in replies]
    expected = [sum(reply) / len(reply) for reply in replies]
    rows = [Row.of_replies([1, 2], [reply]) for reply in tokens]
    np.testing.assert_allclose(reply_means(rows, separate), expected, rtol=1e-9, atol=1e-9)
    shared = [Row.of_replies([1, 2], tokens)]
    np.testing.assert_allclose(reply_means(shared, [np.concatenate(separate)]), expected, rtol=1e-9, atol=1e-9)


def _question(n_choices: int, answer: int) -> Example:
    return Example(id="q", prompt="?", choices=("x",) * n_choices, answer=answer, scoring="letter")


# Few different values, so that ties come up: bfloat16 logits tie often.
SCORES = st.lists(st.integers(-4, 0).map(lambda i: i / 4), min_size=2, max_size=6)


@given(SCORES, st.data())
def test_the_margin_is_positive_exactly_when_correct(scores: list[float], data: st.DataObject) -> None:
    question = _question(len(scores), data.draw(st.integers(0, len(scores) - 1)))
    values = np.array(scores)
    assert (answer_margin(question, values) > 0) == is_correct(question, values)


@given(SCORES, st.floats(-3, 3))
def test_margins_are_blind_to_a_shift_of_all_scores(scores: list[float], shift: float) -> None:
    question = _question(len(scores), 1)
    moved = np.array(scores) + shift
    assert answer_margin(question, moved) == pytest.approx(answer_margin(question, np.array(scores)), abs=1e-9)


@given(st.permutations([-1.0, -2.0, -3.0, -4.0]))
def test_the_choice_with_the_highest_score_decides(scores: list[float]) -> None:
    best = scores.index(-1.0)
    for answer in range(4):
        assert bool(is_correct(_question(4, answer), np.array(scores))) is (answer == best)
    assert answer_margin(_question(4, best), np.array(scores)) == 1.0
