"""Shapes: what a plan knows of a model without weights is what the model has."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from shapes import shape_of

from castune.core.heads import HeadLayout


def test_keys_and_values_are_those_of_a_cache(any_tiny_model: Any) -> None:
    ids = torch.zeros(1, 4, dtype=torch.long)
    with torch.no_grad():
        cache = any_tiny_model(input_ids=ids, use_cache=True).past_key_values
    held = [getattr(layer, name, None) for layer in cache.layers for name in ("keys", "values")]
    n_bytes = sum(tensor.numel() * 4 for tensor in held if tensor is not None) / 4
    assert shape_of(any_tiny_model.config).key_bytes == n_bytes


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3"])
def test_what_a_layer_keeps_are_the_outputs_of_its_projections(tiny_model: Callable[..., Any], family: str) -> None:
    model = tiny_model(family)
    layer = HeadLayout.of(model).decoder_layers(model)[0]
    widths: list[int] = []
    for module in layer.modules():
        if getattr(getattr(module, "weight", None), "dim", int)() == 2:
            module.register_forward_hook(lambda _module, _inputs, output: widths.append(output.shape[-1]))
    model(input_ids=torch.zeros(1, 4, dtype=torch.long))
    assert shape_of(model.config).outputs_L[0] == (sum(widths), max(widths))
