"""Relearning: it trains, on top of the adapter, and leaves nothing behind."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor

from castune.core.checksum import checksums
from castune.core.losses import RowBatch, reply_nll
from castune.data.chat import ChatFormat
from castune.data.example import Example
from castune.data.rows import Row
from castune.errors import TrainingError
from castune.tuning.relearning import _batches, relearnt

Tiny = Callable[..., Any]
IDS = torch.arange(40, 80).reshape(2, 20)
QUERY = {"llama": "q_proj", "gpt2": "c_attn"}


@pytest.fixture(params=["llama", "gpt2"])
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def adapted(family: str, tiny_model: Tiny, tmp_path: Path) -> PeftModel:
    """A model with an adapter on one projection of some layers, read back from disk, as it is evaluated."""
    torch.manual_seed(0)
    config = LoraConfig(
        r=2,
        target_modules=[QUERY[family]],
        layers_to_transform=[0, 2],
        init_lora_weights=False,
        fan_in_fan_out=family == "gpt2",
    )
    get_peft_model(tiny_model(family), config).save_pretrained(tmp_path / "adapter")
    return PeftModel.from_pretrained(tiny_model(family), tmp_path / "adapter").eval()


@pytest.fixture
def rows(tiny_tokenizer: Any) -> list[Row]:
    chat = ChatFormat(tiny_tokenizer, max_length=200)
    return [chat.loss_row(Example(id=str(n), prompt=f"Say {n}.", reply=f"It is {n}.")) for n in range(6)]


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(input_ids=IDS, use_cache=False).logits


@torch.no_grad()
def loss(model: Any, rows: list[Row]) -> float:
    return float(reply_nll(model, RowBatch.of(rows)).mean())


def plain_sums(model: Any) -> dict[str, tuple[int, int]]:
    """Checksums of all weights, whether PEFT has wrapped their layers or not."""
    return {name.replace(".base_layer", ""): sums for name, sums in checksums(model).items()}


def test_it_learns_the_rows_on_top_of_the_adapter(adapted: PeftModel, rows: list[Row]) -> None:
    before = loss(adapted, rows)
    with adapted.disable_adapter():
        bare = loss(adapted, rows)
    assert before != bare
    with relearnt(adapted, rows, steps=1, learning_rate=1e-9, seed=0):
        # With hardly a step the sum is the adapter, and not the bare model.
        assert loss(adapted, rows) == pytest.approx(before, abs=1e-5)
    with relearnt(adapted, rows, steps=30, learning_rate=0.01, seed=0) as made:
        assert loss(adapted, rows) < before - 0.5
        assert made.last_loss < made.first_loss
        assert not any(parameter.requires_grad for parameter in adapted.parameters())


def test_nothing_of_it_is_left(adapted: PeftModel, rows: list[Row]) -> None:
    sums, expected = plain_sums(adapted), logits(adapted)
    with relearnt(adapted, rows, steps=3, learning_rate=0.01, seed=0):
        assert not torch.equal(logits(adapted), expected)
    assert torch.equal(logits(adapted), expected)
    assert plain_sums(adapted) == sums
    assert not any("lora" in name for name, _ in adapted.unload().named_modules())


def test_a_training_that_breaks_leaves_nothing_either(adapted: PeftModel, rows: list[Row]) -> None:
    expected = logits(adapted)
    with (
        pytest.raises(TrainingError, match="below 1e"),
        relearnt(adapted, rows, steps=50, learning_rate=1e30, seed=0),
    ):
        raise AssertionError("nothing may be measured")
    assert torch.equal(logits(adapted), expected)


def test_the_seed_decides_and_nothing_else(adapted: PeftModel, rows: list[Row]) -> None:
    def digest(seed: int) -> str:
        torch.rand(3)
        with relearnt(adapted, rows, steps=2, learning_rate=0.01, seed=seed) as made:
            return made.digest

    assert digest(0) == digest(0)
    assert digest(0) != digest(1)


def test_the_global_generator_is_not_asked_for_the_order(rows: list[Row]) -> None:
    first = list(_batches(rows, 3, seed=4))
    torch.manual_seed(1)
    assert list(_batches(rows, 3, seed=4)) == first
    assert [len(batch) for batch in first] == [4, 4, 4]
    # Six rows in twelve places: each comes twice, and none twice before all came once.
    flat = [id(row) for batch in first for row in batch]
    assert len(set(flat[:6])) == 6
    assert sorted(flat[:6]) == sorted(flat[6:])
