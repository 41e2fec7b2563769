"""Batched greedy replies against plain generation, one prompt at a time."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from castune.core.generation import Reply, ReplyText, generate_replies
from castune.data.said import said

END = 257
# Unsorted lengths, some beyond the sliding windows of 16.
PROMPTS = [list(range(40, 40 + n)) for n in (5, 30, 1, 18, 5, 11)]


@torch.no_grad()
def greedy_alone(model: Any, prompt: list[int], n_tokens: int, end: set[int]) -> list[int]:
    """Argmax, append, repeat: no generate, no cache."""
    ids = list(prompt)
    for _ in range(n_tokens):
        ids.append(int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
        if ids[-1] in end:
            break
    return ids[len(prompt) :]


def replies_of(model: Any, tokenizer: Any, end: list[int] | None = None, **changes: Any) -> list[Reply]:
    settings = {"max_new_tokens": 8, "batch_tokens": 120, "end_tokens": end or [END], **changes}
    return generate_replies(model, tokenizer, PROMPTS, **settings)


def test_batches_equal_one_by_one_in_order(any_tiny_model: Any, tiny_tokenizer: Any) -> None:
    expected = [greedy_alone(any_tiny_model, prompt, 8, {END}) for prompt in PROMPTS]
    assert len({tuple(e) for e in expected}) > 3, "replies must differ, or their order proves nothing"
    for batch_tokens in (1, 120, 10_000):
        found = replies_of(any_tiny_model, tiny_tokenizer, batch_tokens=batch_tokens)
        assert [list(reply.tokens) for reply in found] == [e[:-1] if e[-1] == END else e for e in expected]
        assert [reply.text for reply in found] == [
            tiny_tokenizer.decode(reply.tokens, skip_special_tokens=True) for reply in found
        ]
        assert [reply.finished for reply in found] == [e[-1] == END for e in expected]


def test_replies_end_at_any_end_token_which_is_cut_off(tiny_model: Callable[..., Any], tiny_tokenizer: Any) -> None:
    model = tiny_model("llama")
    free = [greedy_alone(model, prompt, 8, set()) for prompt in PROMPTS]
    first, second = free[0][3], free[1][2]
    found = replies_of(model, tiny_tokenizer, end=[first, second])
    for reply, tokens in zip(found, free, strict=True):
        stop = next((t for t, token in enumerate(tokens) if token in (first, second)), None)
        assert list(reply.tokens) == tokens[:stop]
        assert reply.finished is (stop is not None)
    assert any(reply.finished for reply in found)


def test_a_reply_that_ends_at_once_is_empty(tiny_model: Callable[..., Any], tiny_tokenizer: Any) -> None:
    model = tiny_model("llama")
    first = greedy_alone(model, PROMPTS[3], 1, set())[0]
    assert replies_of(model, tiny_tokenizer, end=[first])[3] == Reply("", (), True)


def test_a_prompt_full_of_padding_tokens_is_read(tiny_model: Callable[..., Any], tiny_tokenizer: Any) -> None:
    """The padding token is the end of turn, which stands in every conversation."""
    model = tiny_model("gpt2")
    prompts = [[END, 40, END, 41, END], [42] * 12]
    found = generate_replies(model, tiny_tokenizer, prompts, max_new_tokens=6, end_tokens=[END], batch_tokens=1000)
    for reply, prompt in zip(found, prompts, strict=True):
        expected = greedy_alone(model, prompt, 6, {END})
        assert list(reply.tokens) == (expected[:-1] if expected[-1] == END else expected)


@pytest.mark.parametrize(
    "shipped",
    [
        {"repetition_penalty": 5.0},
        {"do_sample": True, "temperature": 9.0, "top_k": 50, "top_p": 0.5},
        {"num_beams": 3},
        {"no_repeat_ngram_size": 1},
        {"max_length": 3},
        {"max_new_tokens": 2},
        {"eos_token_id": 40},
        {"num_return_sequences": 1, "do_sample": True, "min_p": 0.2},
        {"min_new_tokens": 8},
        {"suppress_tokens": list(range(100, 257))},
        {"bad_words_ids": [[t] for t in range(100, 257)]},
        {"encoder_repetition_penalty": 3.0},
    ],
    ids=lambda shipped: next(iter(shipped)),
)
def test_a_shipped_generation_config_bends_nothing(
    tiny_model: Callable[..., Any], tiny_tokenizer: Any, shipped: dict[str, Any]
) -> None:
    model = tiny_model("llama")
    # An end token that comes early, so that a minimum length would show.
    end = [greedy_alone(model, PROMPTS[0], 8, set())[2]]
    expected = replies_of(model, tiny_tokenizer, end=end)
    assert expected[0].finished
    for name, value in shipped.items():
        setattr(model.generation_config, name, value)
    assert replies_of(model, tiny_tokenizer, end=end) == expected


def test_progress_counts_every_reply_once(tiny_model: Callable[..., Any], tiny_tokenizer: Any) -> None:
    done: list[float] = []
    replies_of(tiny_model("llama"), tiny_tokenizer, batch_tokens=60, advance=done.append)
    assert sum(done) == len(PROMPTS)
    assert len(done) > 1


def test_replies_continue_from_their_first_tokens(any_tiny_model: Any, tiny_tokenizer: Any) -> None:
    """The rest of a greedy reply is the same when its first tokens are given; so is the rest of any other beginning."""
    whole = replies_of(any_tiny_model, tiny_tokenizer)
    begun = [reply.tokens[: i % 4] for i, reply in enumerate(whole)]
    assert replies_of(any_tiny_model, tiny_tokenizer, begun=begun) == whole
    other = [[45 + i] for i in range(len(PROMPTS))]
    found = replies_of(any_tiny_model, tiny_tokenizer, begun=other)
    for prompt, first, reply in zip(PROMPTS, other, found, strict=True):
        expected = [*first, *greedy_alone(any_tiny_model, prompt + first, 7, {END})]
        assert list(reply.tokens) == (expected[:-1] if expected[-1] == END else expected)


def test_an_end_beyond_the_limit_is_not_reached(tiny_model: Callable[..., Any], tiny_tokenizer: Any) -> None:
    """A reply that began with many tokens shares its batch with one that needs more steps, and ends at the limit."""
    model = tiny_model("llama")
    tokens = greedy_alone(model, PROMPTS[0], 12, set())
    end = next(t for t in tokens[8:] if t not in tokens[:8])
    found = generate_replies(
        model, tiny_tokenizer, [PROMPTS[0], PROMPTS[1]], max_new_tokens=8, end_tokens=[end], batch_tokens=10_000,
        begun=[tokens[:7], []],
    )  # fmt: skip
    assert found[0].tokens == tuple(tokens[:8])
    assert not found[0].finished


def test_complete_replies_leave_their_batch(any_tiny_model: Any, tiny_tokenizer: Any) -> None:
    """After a few steps only rows that are not complete are run, each with the keys of its own prompt."""
    free = [greedy_alone(any_tiny_model, prompt, 20, set()) for prompt in PROMPTS]
    # The token with which most replies end soon, but not all.
    ends = {token: sum(token in tokens[:8] for tokens in free) for tokens in free for token in tokens}
    end = max((token for token, n in ends.items() if n < len(PROMPTS)), key=lambda token: (ends[token], token))
    sizes: list[int] = []
    handle = any_tiny_model.register_forward_pre_hook(
        lambda _model, _args, options: sizes.append(len(options["input_ids"])), with_kwargs=True
    )
    found = replies_of(any_tiny_model, tiny_tokenizer, end=[end], max_new_tokens=20, batch_tokens=10_000)
    handle.remove()
    for tokens, reply in zip(free, found, strict=True):
        expected = tokens[: tokens.index(end)] if end in tokens else tokens
        assert list(reply.tokens) == expected
        assert reply.finished == (end in tokens)
    assert sizes[0] == len(PROMPTS)
    ended = sum(end in tokens[:8] for tokens in free)
    assert ended > 0
    if any_tiny_model.config.model_type != "qwen3_next":
        assert sizes[-1] <= len(PROMPTS) - ended


def test_a_reply_ends_where_it_is_settled(tiny_model: Callable[..., Any], tiny_tokenizer: Any) -> None:
    model = tiny_model("llama")
    whole = replies_of(model, tiny_tokenizer)
    found = replies_of(model, tiny_tokenizer, is_settled=lambda text: len(text) >= 3)
    for reply, full in zip(found, whole, strict=True):
        assert full.tokens[: len(reply.tokens)] == reply.tokens
        assert len(reply.text) >= 3 or reply == full
        shorter = tiny_tokenizer.decode(reply.tokens[:-1], skip_special_tokens=True)
        assert len(shorter) < 3, "it went on after it was settled"


def test_every_batch_runs_inside_its_context(tiny_model: Callable[..., Any], tiny_tokenizer: Any) -> None:
    inside: list[list[int]] = []

    @contextmanager
    def around(indices: Sequence[int]) -> Iterator[None]:
        inside.append(list(indices))
        yield

    replies_of(tiny_model("llama"), tiny_tokenizer, around=around, batch_tokens=60)
    assert len(inside) > 1
    assert sorted(i for batch in inside for i in batch) == list(range(len(PROMPTS)))


@pytest.mark.parametrize(
    ("special", "reply", "said_of_it"),
    [
        (["[THINK]", "[/THINK]"], "[THINK]I cannot help? I can.[/THINK]Sure.<|im_end|>", "Sure."),
        (["<|START_THINKING|>", "<|END_THINKING|>"], "<|START_THINKING|>No.<|END_THINKING|>Yes.", "Yes."),
        (["<|channel|>", "<|message|>", "<|end|>", "<|start|>"],
         "<|channel|>analysis<|message|>No.<|end|><|start|>assistant<|channel|>final<|message|>Yes.", "Yes."),
        (["[THINK]", "[/THINK]"], "[THINK]I cannot help", ""),
        (["<|pad|>"], "<|pad|>Yes.<|pad|>", "Yes."),
    ],
)  # fmt: skip
def test_marks_of_reasoning_that_are_special_tokens_stay_in_the_text(
    tiny_tokenizer: Any, special: list[str], reply: str, said_of_it: str
) -> None:
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": special})
    ids = tokenizer(reply, add_special_tokens=False)["input_ids"]
    assert set(tokenizer.convert_tokens_to_ids(special)) & set(ids)
    text = ReplyText(tokenizer)(ids)
    assert said(text, in_thought=False) == said_of_it
    assert "<|im_end|>" not in text
