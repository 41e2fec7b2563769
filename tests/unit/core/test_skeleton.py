"""Models from a config alone: shapes of the real one, slices that run, depth that comes back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from castune.core.heads import HeadLayout
from castune.core.skeleton import at_depth, random_slice, skeleton

CPU = torch.device("cpu")


def test_a_skeleton_has_the_shapes_and_heads_of_the_model(any_tiny_model: Any) -> None:
    model = skeleton(any_tiny_model.config, torch.bfloat16)
    assert {p.device.type for p in model.parameters()} == {"meta"}
    shapes = {name: p.shape for name, p in any_tiny_model.named_parameters()}
    assert {name: p.shape for name, p in model.named_parameters()} == shapes
    found, proven = HeadLayout.unproven(model), HeadLayout.of(any_tiny_model)
    assert found.attention == proven.attention


def test_a_slice_has_the_first_layers_and_runs(any_tiny_model: Any) -> None:
    cut = random_slice(any_tiny_model.config, 2, dtype=torch.float32, device=CPU)
    layout = HeadLayout.of(cut)
    assert layout.attention == HeadLayout.of(any_tiny_model).attention[:2]
    logits = cut(input_ids=torch.arange(8)[None], use_cache=False).logits
    assert torch.isfinite(logits).all()
    assert any_tiny_model.config.get_text_config(decoder=True).num_hidden_layers == 3, "the config was changed"


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text", "falcon"])
def test_depth_equals_a_model_of_that_depth_and_comes_back(tiny_model: Callable[..., Any], family: str) -> None:
    model = tiny_model(family)
    layout = HeadLayout.of(model)
    ids = torch.arange(12)[None]
    before = model(input_ids=ids, use_cache=False).logits
    shallow = random_slice(model.config, 1, dtype=torch.float32, device=CPU)
    shallow.load_state_dict(model.state_dict(), strict=False)
    with pytest.raises(KeyError), at_depth(model, layout, 1):
        assert len(layout.decoder_layers(model)) == 1
        torch.testing.assert_close(model(input_ids=ids).logits, shallow(input_ids=ids).logits, rtol=0, atol=0)
        model.generate(input_ids=ids, max_new_tokens=2, do_sample=False)
        raise KeyError
    assert torch.equal(model(input_ids=ids, use_cache=False).logits, before)
