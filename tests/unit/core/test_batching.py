"""Packed rows and batches: every example once, and every token scored as it is alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from castune.core.batching import example_batches, tuned_batch_tokens
from castune.core.heads import HeadLayout
from castune.core.scoring import can_share_prompts, score_batch
from castune.data.rows import Row, shared_prefix

PREFIX = list(range(60, 72))
TOKENS = st.lists(st.integers(0, 250), min_size=1, max_size=4)
# A prompt behind the prefix, and its replies.
CONVERSATIONS = st.lists(st.tuples(st.lists(st.integers(0, 250), max_size=5), st.lists(TOKENS, min_size=1, max_size=3)))


def rows_of(conversations: Sequence[tuple[list[int], list[list[int]]]], prefix: Sequence[int] = PREFIX) -> list[Row]:
    return [Row.of_replies([*prefix, *prompt], replies) for prompt, replies in conversations]


SEVERAL = rows_of(
    [
        ([1, 2, 3], [[7, 8], [9]]),
        ([], [[10]]),
        ([1, 2], [[7], [11, 12, 13]]),
        ([4, 5, 6, 7], [[14, 15]]),
        ([1, 2, 3], [[7, 8], [9]]),
    ]
)


def scores_alone(model: Any, rows: Sequence[Row]) -> list[np.ndarray]:
    return [score_batch(model, [row])[0] for row in rows]


def test_packed_rows_score_as_alone(any_tiny_model: Any) -> None:
    packed = Row.packed(SEVERAL)
    if not can_share_prompts(any_tiny_model, longest=len(packed.ids)):
        pytest.skip("this model takes no trees, or not of this length; example_batches leaves its rows alone")
    expected = np.concatenate(scores_alone(any_tiny_model, SEVERAL))
    assert len(packed.ids) < sum(len(row.ids) for row in SEVERAL)
    # Beside a plain row, which is padded, and inside a pack of packs.
    found = score_batch(any_tiny_model, [packed, SEVERAL[1], Row.packed([packed, SEVERAL[0]])])
    np.testing.assert_allclose(found[0], expected, atol=2e-5)
    np.testing.assert_allclose(found[1], expected[3:4], atol=2e-5)
    np.testing.assert_allclose(found[2], [*expected, *expected[:3]], atol=2e-5)


@settings(deadline=None)
@given(CONVERSATIONS.filter(lambda found: len(found) > 1))
def test_packing_loses_and_invents_nothing(conversations: list[tuple[list[int], list[list[int]]]]) -> None:
    rows = rows_of(conversations)
    packed, n_shared = Row.packed(rows), shared_prefix(rows)
    assert n_shared >= len(PREFIX)
    assert packed.tokens == tuple(token for row in rows for token in row.tokens)
    assert len(packed.ids) == n_shared + sum(len(row.ids) - n_shared for row in rows)
    sees = packed.sees()

    def context(position: int) -> list[int]:
        branch = packed.branches[position]
        seen = [i for i in range(position + 1) if sees[branch][packed.branches[i]]]
        assert [packed.places[i] for i in seen] == list(range(len(seen))), "places count what a token sees"
        return [packed.ids[i] for i in seen]

    def context_alone(row: Row, position: int) -> list[int]:
        if not row.branches:
            return list(row.ids[: position + 1])
        own = row.branches[position]
        return [row.ids[i] for i in range(position + 1) if row.branches[i] in (0, own)]

    positions = iter(packed.positions)
    for row in rows:
        for position in row.positions:
            assert context(next(positions)) == context_alone(row, position)


def test_a_single_row_is_packed_as_it_is() -> None:
    assert Row.packed(SEVERAL[:1]) == SEVERAL[0]


def test_rows_without_a_common_prefix_can_be_packed(tiny_model: Callable[..., Any]) -> None:
    rows = rows_of([([1, 2], [[3]]), ([5, 6], [[7], [8]])], prefix=[])
    assert shared_prefix(rows) == 0
    expected = np.concatenate(scores_alone(tiny_model("llama"), rows))
    np.testing.assert_allclose(score_batch(tiny_model("llama"), [Row.packed(rows)])[0], expected, atol=2e-5)


@pytest.mark.parametrize("batch_tokens", [1, 30, 64, 10_000])
@pytest.mark.parametrize("split", [False, True])
def test_every_example_is_in_one_batch_with_its_own_values(
    tiny_model: Callable[..., Any], batch_tokens: int, split: bool
) -> None:
    """`split`: several rows an example, which are never packed."""
    model = tiny_model("qwen2")
    of = [[row] if not split else [row, SEVERAL[1]] for row in SEVERAL]
    batches = example_batches(model, HeadLayout.of(model), of, batch_tokens)
    assert sorted(n for batch in batches for n in batch.examples) == list(range(len(of)))
    for batch in batches:
        longest = max(len(row.ids) for row in batch.rows)
        alone = len(batch.examples) == 1
        assert alone or len(batch.rows) * longest <= batch_tokens
        assert batch.n_tokens == len(batch.rows) * longest
        values = batch.by_example(score_batch(model, batch.rows))
        for n, found in zip(batch.examples, values, strict=True):
            for one, expected in zip(found, scores_alone(model, of[n]), strict=True):
                np.testing.assert_allclose(one, expected, atol=2e-5)


def test_long_common_prefixes_are_packed_and_long_examples_are_not(tiny_model: Callable[..., Any]) -> None:
    model = tiny_model("llama")
    prefix = [(7 * i) % 250 for i in range(60)]
    alike = rows_of([([i], [[5]]) for i in range(8)], prefix)
    (batch,) = example_batches(model, HeadLayout.of(model), [[row] for row in alike], 10_000)
    assert len(batch.rows) < len(alike)
    assert batch.n_tokens < sum(len(row.ids) for row in alike) / 2
    long = rows_of([([(3 * i + k) % 250 for i in range(300)], [[5]]) for k in range(3)], prefix)
    batches = example_batches(model, HeadLayout.of(model), [[row] for row in [*alike, *long]], 10_000)
    lengths = [len(row.ids) for batch in batches for row in batch.rows]
    assert max(lengths) == 360, "an example that is long already shares its row with none"


def test_models_without_trees_keep_their_rows_apart(tiny_model: Callable[..., Any]) -> None:
    model = tiny_model("bloom")
    batches = example_batches(model, HeadLayout.of(model), [[SEVERAL[1]], [SEVERAL[3]]], 10_000)
    assert [len(parts) for batch in batches for parts in batch.parts] == [1, 1]


def test_the_measured_batch_size_is_a_power_of_two(tiny_model: Callable[..., Any]) -> None:
    found = tuned_batch_tokens(tiny_model("llama"))
    assert found in (512, 1024, 2048, 4096)
