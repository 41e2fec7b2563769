"""The loss, against cross entropy of each row alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from castune.core.losses import RowBatch, batches_by_length, loss_batches, reply_nll, token_log_probs
from castune.data.rows import Row

# Prompts and replies of different lengths, some beyond the sliding windows of 16; token 0 is also the padding.
CONVERSATIONS = [
    (list(range(40, 70)), [90, 0, 92, 93, 94]),
    (list(range(5, 8)), [7]),
    (list(range(100, 118)), [0, 1]),
    ([9], list(range(120, 140))),
]


@torch.no_grad()
def nll_alone(model: Any, prompt: list[int], reply: list[int]) -> Tensor:
    """Per-token NLL of a reply: the whole sequence, no padding, PyTorch's own cross entropy."""
    ids = torch.tensor([prompt + reply])
    logits = model(input_ids=ids).logits[0, len(prompt) - 1 : -1]
    return F.cross_entropy(logits, torch.tensor(reply), reduction="none")


def test_a_row_scores_the_reply_and_nothing_else() -> None:
    row = Row.of_replies([1, 2, 3], [[7, 8, 9]])
    assert row.ids == (1, 2, 3, 7, 8)
    assert row.positions == (2, 3, 4)
    assert row.tokens == (7, 8, 9)
    assert row.branches == ()


def test_padded_batches_equal_each_row_alone(any_tiny_model: Any) -> None:
    rows = [Row.of_replies(prompt, [reply]) for prompt, reply in CONVERSATIONS]
    with torch.no_grad():
        nll = reply_nll(any_tiny_model, RowBatch.of(rows))
        log_probs = token_log_probs(any_tiny_model, RowBatch.of(rows))
    for i, (prompt, reply) in enumerate(CONVERSATIONS):
        expected = nll_alone(any_tiny_model, prompt, reply)
        torch.testing.assert_close(nll[i], expected.mean(), rtol=0, atol=2e-5)
        torch.testing.assert_close(log_probs[i, : len(reply)], -expected, rtol=0, atol=2e-5)
        assert (log_probs[i, len(reply) :] == 0).all()


def test_the_neighbours_of_a_row_do_not_matter(any_tiny_model: Any) -> None:
    row = Row.of_replies(*(lambda p, r: (p, [r]))(*CONVERSATIONS[1]))
    others = [Row.of_replies(prompt, [reply]) for prompt, reply in CONVERSATIONS if prompt != list(row.ids[:3])]
    with torch.no_grad():
        alone = reply_nll(any_tiny_model, RowBatch.of([row]))[0]
        for other in others:
            torch.testing.assert_close(
                reply_nll(any_tiny_model, RowBatch.of([other, row]))[1], alone, rtol=0, atol=2e-5
            )


def test_the_loss_has_the_gradient_of_cross_entropy(any_tiny_model: Any) -> None:
    rows = [Row.of_replies(prompt, [reply]) for prompt, reply in CONVERSATIONS]
    parameter = next(p for name, p in any_tiny_model.named_parameters() if "norm" in name or "ln_1" in name)
    (found,) = torch.autograd.grad(reply_nll(any_tiny_model, RowBatch.of(rows)).mean(), parameter)
    losses = []
    for prompt, reply in CONVERSATIONS:
        logits = any_tiny_model(input_ids=torch.tensor([prompt + reply])).logits[0, len(prompt) - 1 : -1]
        losses.append(F.cross_entropy(logits, torch.tensor(reply)))
    (expected,) = torch.autograd.grad(torch.stack(losses).mean(), parameter)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)


def test_real_tokens_end_with_the_last_scored_position() -> None:
    rows = [Row.of_replies([1, 2, 3], [[7, 8]]), Row((1, 2, 3, 4, 5), (1, 1), (8, 9)), Row.of_replies([1], [[0]])]
    assert RowBatch.of(rows).real_BS.tolist() == [
        [True, True, True, True, False],
        [True, True, False, False, False],
        [True, False, False, False, False],
    ]


@given(st.lists(st.integers(1, 300), max_size=60), st.integers(1, 1000))
def test_batches_cover_every_index_once_within_the_limit(lengths: list[int], batch_tokens: int) -> None:
    batches = list(batches_by_length(lengths, batch_tokens))
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= batch_tokens
    sizes = [lengths[i] for batch in batches for i in batch]
    assert sizes == sorted(sizes, reverse=True), "longest first"
    assert batches == list(batches_by_length(lengths, batch_tokens))


@given(st.lists(st.integers(1, 300), min_size=2, max_size=60), st.integers(1, 1000))
def test_batches_are_not_smaller_than_needed(lengths: list[int], batch_tokens: int) -> None:
    """The longest row of the next batch would not have fitted into this one."""
    batches = list(batches_by_length(lengths, batch_tokens))
    for batch in batches[:-1]:
        assert (len(batch) + 1) * max(lengths[i] for i in batch) > batch_tokens


@given(st.lists(st.tuples(st.integers(0, 200), st.integers(1, 200)), min_size=1, max_size=60), st.integers(2, 1000))
def test_batches_of_a_loss_leave_room_for_gradients_of_logits(sizes: list[tuple[int, int]], batch_tokens: int) -> None:
    rows = [Row((0,) * (prompt + reply), (0,) * reply, (0,) * reply) for prompt, reply in sizes]
    batches = list(loss_batches(rows, batch_tokens))
    assert sorted(i for batch in batches for i in batch) == list(range(len(rows)))
    for batch in batches:
        if len(batch) > 1:
            assert len(batch) * max(len(rows[i].ids) for i in batch) <= batch_tokens
            assert len(batch) * max(len(rows[i].tokens) for i in batch) <= batch_tokens / 2
    if all(reply <= prompt for prompt, reply in sizes):
        assert batches == list(batches_by_length([len(row.ids) for row in rows], batch_tokens))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_log_probs_are_computed_in_float32(dtype: torch.dtype) -> None:
    """Half precision has no room for a sum over a vocabulary: logits are widened first."""

    class Fixed(torch.nn.Module):
        def forward(self, input_ids: Tensor, logits_to_keep: Tensor, **_: Any) -> Any:
            logits = torch.zeros(*logits_to_keep.shape, 50_000, dtype=dtype)
            return type("Output", (), {"logits": logits})

    log_probs = token_log_probs(Fixed(), RowBatch.of([Row.of_replies([1, 2], [[7, 8]])]))
    assert log_probs.dtype == torch.float32
    torch.testing.assert_close(log_probs[:, :2], torch.full((1, 2), -10.8197782844), rtol=0, atol=1e-5)


def test_the_fused_loss_is_the_same_loss(any_tiny_model: Any) -> None:
    rows = [Row.of_replies([5, 6, 7], [[9, 10, 11]]), Row.of_replies([8, 9], [[12]]), Row.of_replies([1], [[2, 3]])]
    weight = any_tiny_model.get_input_embeddings().weight
    losses, gradients = [], []
    for fused in (False, True):
        any_tiny_model.zero_grad()
        loss_B = reply_nll(any_tiny_model, RowBatch.of(rows), fused=fused)
        loss_B.mean().backward()
        losses.append(loss_B.detach())
        gradients.append(weight.grad.clone())
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=1e-6)
    # Rounded apart, by a few units of float32's seventh digit of the largest entry.
    torch.testing.assert_close(gradients[0], gradients[1], rtol=0, atol=2e-5 * gradients[0].abs().max().item())
