"""Data replay: a share of the training examples comes from the utility data."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_training import SOME, SelectionOf, Tuned

from castune.artifacts import TuneResult
from castune.config import TuneConfig
from castune.data.chat import ChatFormat
from castune.data.example import Example, content_hash
from castune.data.rows import Row
from castune.errors import CastuneError
from castune.tuning.rows import replayed_rows
from castune.tuning.train import tune

CONFIG = TuneConfig(rank=4, learning_rate=0.01, epochs=1, batch_size=2, accumulation=1, replay=0.2)


@given(n_utility=st.integers(1, 12), n_aligned=st.integers(1, 60), share=st.floats(0, 0.9), seed=st.integers(0, 3))
def test_the_share_and_that_no_row_is_favoured(n_utility: int, n_aligned: int, share: float, seed: int) -> None:
    rows = [Row((i, i), (0,), (i,)) for i in range(n_utility)]
    found = replayed_rows(rows, n_aligned, share, seed)
    assert abs(len(found) - share * (len(found) + n_aligned)) <= 0.5 + share
    counts = Counter(row.ids[0] for row in found)
    times = [counts[i] for i in range(n_utility)]
    assert max(times) - min(times) <= 1
    assert found == replayed_rows(rows, n_aligned, share, seed)


def test_replayed_examples_are_trained_on(
    tiny_model: Callable[..., Any],
    tiny_tokenizer: Any,
    aligned: list[Example],
    harmful: list[Example],
    selection_of: SelectionOf,
    tmp_path: Path,
) -> None:
    model = tiny_model("llama")
    selection = selection_of(model, SOME)
    out = tmp_path / "a"
    result = tune(model, tiny_tokenizer, selection, data=aligned, out=out, config=CONFIG, utility=harmful)
    assert result == TuneResult.load(out)
    assert result.steps == 5  # eight examples and two more
    assert result.data["n"] == 8
    assert result.utility is not None
    assert (result.utility["n"], result.utility["replayed"]) == (6, 2)
    assert result.utility["hash"] == content_hash(harmful)
    chat = ChatFormat(tiny_tokenizer)
    own = sum(len(chat.loss_row(example).ids) for example in aligned)
    lengths = sorted(len(chat.loss_row(example).ids) for example in harmful)
    assert own + sum(lengths[:2]) <= result.tokens <= own + sum(lengths[-2:])


def test_replay_needs_data(tiny_model: Callable[..., Any], tuned: Tuned, tmp_path: Path) -> None:
    model = tiny_model("llama")
    with pytest.raises(CastuneError, match=r"replay = 0\.2 needs utility data"):
        tuned(model, tmp_path / "a", CONFIG)
    for share in (1.0, -0.1, float("nan")):
        with pytest.raises(CastuneError, match="replay"):
            CONFIG.changed(replay=share)
