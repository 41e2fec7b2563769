"""Replies that go on from recorded keys and values, against forwards of everything."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from castune.core.ablation import record_residuals, resume_from
from castune.core.continuation import cache_of, can_continue, context_of, read_keys_values
from castune.core.heads import HeadLayout
from castune.core.losses import RowBatch, scored_logits
from castune.core.scoring import can_share_prompts
from castune.data.rows import Row

# Linear attention keeps a state in place of keys.
NO_KEYS = ("qwen3_next",)
PROMPTS = ((5, 6, 7, 8, 21), (5, 6, 9))
REPLIES = ((10, 11, 12, 13), (14, 15))
NEXT = 16


@torch.no_grad()
def next_logits(model: Any, rows: list[Row], ends: list[tuple[int, int]], *, resumed: int = 0) -> torch.Tensor:
    """Logits behind NEXT, which continues the rows at `ends` (row, position); recorded from layer `resumed` on."""
    layout, batch = HeadLayout.of(model), RowBatch.of(rows)
    residuals: dict[int, torch.Tensor] = {}
    whole, upper = DynamicCache(), DynamicCache()
    with record_residuals(model, layout, residuals):
        scored_logits(model, batch, whole)
    with resume_from(model, layout, resumed, residuals[resumed]):
        scored_logits(model, batch, upper)
    recorded = [read_keys_values(cache, layout.n_layers) for cache in (upper, whole)]
    contexts = [context_of(rows[b], position, [(found, b) for found in recorded]) for b, position in ends]
    lengths = torch.tensor([len(context[0][0]) + 1 for context in contexts])
    longest = int(lengths.max())
    mask = (torch.arange(longest) >= longest - lengths[:, None]).long()
    output = model(
        input_ids=torch.full((len(ends), 1), NEXT),
        attention_mask=mask,
        position_ids=lengths[:, None] - 1,
        past_key_values=cache_of(model, contexts),
        use_cache=True,
    )
    return output.logits[:, -1]


@torch.no_grad()
def logits_alone(model: Any, ids: list[int]) -> torch.Tensor:
    return model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]


def cuts(row_of: Callable[[int], tuple[int, int]]) -> tuple[list[tuple[int, int]], list[list[int]]]:
    """Ends inside every reply, where `row_of` says its row and the shift of its positions; ids up to them, and NEXT."""
    ends, ids = [], []
    for n, (prompt, reply) in enumerate(zip(PROMPTS, REPLIES, strict=True)):
        for kept in range(len(reply)):
            row, first = row_of(n)
            ends.append((row, len(prompt) - 1 if kept == 0 else first + kept - 1))
            ids.append([*prompt, *reply[:kept], NEXT])
    return ends, ids


def test_rows_go_on_from_any_position(any_tiny_model: Any) -> None:
    layout = HeadLayout.of(any_tiny_model)
    assert can_continue(any_tiny_model, layout) == (any_tiny_model.config.model_type not in NO_KEYS)
    if any_tiny_model.config.model_type in NO_KEYS:
        return
    rows = [Row.of_replies(prompt, [reply]) for prompt, reply in zip(PROMPTS, REPLIES, strict=True)]
    ends, ids = cuts(lambda n: (n, len(PROMPTS[n])))
    for resumed in range(layout.n_layers):
        found = next_logits(any_tiny_model, rows, ends, resumed=resumed)
        expected = torch.stack([logits_alone(any_tiny_model, one) for one in ids])
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_replies_of_one_packed_row_go_on_each_from_its_own_tokens(any_tiny_model: Any) -> None:
    if not can_share_prompts(any_tiny_model, longest=12):
        pytest.skip("takes no trees")
    rows = [Row.of_replies(prompt, [reply]) for prompt, reply in zip(PROMPTS, REPLIES, strict=True)]
    packed = Row.packed(rows)
    starts = [0, len(REPLIES[0])]
    ends, ids = [], []
    for start, prompt, reply in zip(starts, PROMPTS, REPLIES, strict=True):
        for kept in range(len(reply)):
            ends.append((0, packed.positions[start + kept]))
            ids.append([*prompt, *reply[:kept], NEXT])
    found = next_logits(any_tiny_model, [packed], ends)
    torch.testing.assert_close(
        found, torch.stack([logits_alone(any_tiny_model, one) for one in ids]), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("family", ["mistral", "gemma2", "gemma3_text", "gpt_oss", "cohere2", "llama4_text"])
def test_contexts_longer_than_a_window(tiny_model: Callable[..., Any], family: str) -> None:
    """Layers that see a sliding window, or a chunk."""
    limit = "attention_chunk_size" if family == "llama4_text" else "sliding_window"
    model = tiny_model(family, **{limit: 4})
    rows = [Row.of_replies(prompt, [reply]) for prompt, reply in zip(PROMPTS, REPLIES, strict=True)]
    ends, ids = cuts(lambda n: (n, len(PROMPTS[n])))
    expected = torch.stack([logits_alone(model, one) for one in ids])
    torch.testing.assert_close(next_logits(model, rows, ends), expected, rtol=1e-4, atol=1e-4)
    wider = tiny_model(family, **{limit: 64})
    wider.load_state_dict(model.state_dict())
    assert (logits_alone(wider, ids[3]) - expected[3]).abs().max() > 1e-4, "the window must matter here"


def test_a_layer_that_nobody_recorded_is_an_error(tiny_model: Callable[..., Any]) -> None:
    row = Row.of_replies(PROMPTS[0], [REPLIES[0]])
    cache = DynamicCache()
    scored_logits(tiny_model("llama"), RowBatch.of([row]), cache)
    recorded = read_keys_values(cache, 2)
    with pytest.raises(IndexError, match="layer 1"):
        context_of(row, 3, [([recorded[0], None], 0)])
