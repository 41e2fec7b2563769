"""Selections of tiny models, small training sets, trainings on them, and the state a model must be left in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_training import SOME, Interrupter, SelectionOf, Tuned
from torch import Tensor

from castune.artifacts import HeadSelection, TuneResult
from castune.artifacts.unit import joined
from castune.config import TuneConfig
from castune.core.heads import HeadLayout
from castune.core.provenance import fingerprint
from castune.data.example import Example
from castune.tuning.train import tune


def make_selection(
    model: Any, heads: Sequence[tuple[int, int]], others: Sequence[tuple[str, int, int]] = (), **changes: Any
) -> HeadSelection:
    values: dict[str, Any] = {
        "units": joined(heads, others), "zone": "custom", "fraction": None, "buckets": None, "bucket": None, "score": "conflict",
        "seed": None, "n_total": len(HeadLayout.of(model).heads), "model_fingerprint": fingerprint(model),
        "conflict_map_hash": None,
    }  # fmt: skip
    return HeadSelection(**{**values, **changes})


@pytest.fixture
def selection_of() -> SelectionOf:
    return make_selection


@pytest.fixture
def aligned() -> list[Example]:
    """Replies of several lengths, so that batches are padded."""
    words = ["tea", "a long walk", "rain", "the sea at night", "bread", "snow", "music", "a train"]
    return [
        Example(id=f"a{i}", prompt=f"Tell me about {w}.", reply=f"I like {w}{'!' * i}") for i, w in enumerate(words)
    ]


@pytest.fixture
def tuned(tiny_tokenizer: Any, aligned: list[Example]) -> Tuned:
    """`tune` of the heads `SOME` on `aligned`, or with whatever else is given."""

    def call(model: Any, out: Path, config: TuneConfig, **given: Any) -> TuneResult:
        selection = given.pop("selection", None) or make_selection(model, SOME)
        return tune(model, tiny_tokenizer, selection, out=out, config=config, **{"data": aligned, **given})

    return call


@pytest.fixture
def interrupter(monkeypatch: pytest.MonkeyPatch) -> Interrupter:
    return Interrupter(monkeypatch)


@pytest.fixture
def state_of() -> Callable[[Any], dict[str, Any]]:
    """Everything about a model that `tune` must leave as it was; tensors as copies."""

    def state(model: Any) -> dict[str, Any]:
        return {
            "tensors": {name: tensor.clone() for name, tensor in model.state_dict().items()},
            "modules": {name: type(module) for name, module in model.named_modules()},
            "hooks": sum(
                len(module._forward_hooks) + len(module._forward_pre_hooks) + len(module._backward_hooks)
                for module in model.modules()
            ),
            "requires_grad": {name: p.requires_grad for name, p in model.named_parameters()},
            "gradients": {name for name, p in model.named_parameters() if p.grad is not None},
            "training": model.training,
            "config": model.config.to_dict(),
            "attributes": set(vars(model)),
        }

    return state


def bits_equal(one: Tensor, other: Tensor) -> bool:
    """Equal in shape, type and every bit, the sign of zero included."""
    return (
        one.shape == other.shape
        and one.dtype == other.dtype
        and torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))
    )


@pytest.fixture
def same_bits() -> Callable[[Tensor, Tensor], bool]:
    return bits_equal
