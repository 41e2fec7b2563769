"""The shape of a tiny model, and the forwards that it does."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from castune.core.heads import HeadLayout
from castune.core.units import UnitLayout
from castune.names import KINDS
from castune.plan.shape import ModelShape
from castune.plan.skeleton import skeleton


def shape_of(config: Any, *kinds: str, dtype: torch.dtype = torch.float32) -> ModelShape:
    """The shape of a config's model, with units of these kinds; of query heads by default."""
    model = skeleton(config, dtype)
    heads = HeadLayout.unproven(model)
    return ModelShape.of(
        model, UnitLayout.of(model, heads, [KINDS[kind] for kind in kinds or ("q_heads",)], n_mlp_groups=4, prove=False)
    )


@contextmanager
def counting(model: Any) -> Iterator[list[tuple[int, ...]]]:
    """Shapes of the input ids of every forward."""
    found: list[tuple[int, ...]] = []
    handle = model.register_forward_pre_hook(
        lambda _m, _a, kwargs: found.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    try:
        yield found
    finally:
        handle.remove()
