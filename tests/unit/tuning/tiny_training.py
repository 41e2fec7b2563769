"""What tests of trainings have in common: which heads of a tiny model, with which settings, and a look at what was made."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from castune.artifacts import HeadSelection, TuneResult
from castune.config import TuneConfig
from castune.core.losses import reply_nll

SelectionOf = Callable[..., HeadSelection]
Tuned = Callable[..., TuneResult]

SOME = ((0, 1), (0, 3), (2, 0))  # layer 1 holds none
CONFIG = TuneConfig(
    rank=4, alpha=8, learning_rate=0.02, max_steps=3, batch_size=2, accumulation=2, weight_decay=0.1, max_length=128
)
THREE_EPOCHS = CONFIG.changed(max_steps=None, epochs=3)
N_STEPS = 6  # of three epochs: eight examples, four a step
IDS = torch.arange(5, 45).reshape(2, 20) * 3 % 250


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model.eval()(input_ids=IDS).logits


def weights(adapter: Path) -> bytes:
    return (adapter / "adapter_model.safetensors").read_bytes()


def edit_config(adapter: Path, **changes: Any) -> None:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


class Interrupter:
    """A loss of training that raises KeyboardInterrupt at a given micro-batch, as a user might."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.countdown: int | None = None
        monkeypatch.setattr(importlib.import_module("castune.tuning.trainer"), "reply_nll", self)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.countdown is not None:
            self.countdown -= 1
            if self.countdown == 0:
                self.countdown = None
                raise KeyboardInterrupt
        return reply_nll(*args, **kwargs)
