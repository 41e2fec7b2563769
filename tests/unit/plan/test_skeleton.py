"""Models from a config alone: shapes of the real one, slices that run, depth that comes back."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from castune.core.heads import HeadLayout
from castune.core.loading import load_config
from castune.plan.skeleton import at_depth, random_slice, skeleton

CPU = torch.device("cpu")
CONFIGS = Path(__file__).parents[3] / "recipes" / "configs"


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


def test_no_two_matrices_of_a_slice_are_equal_row_by_row() -> None:
    """Qwen2.5-7B's widths, where tokens used to attend to themselves alone and no head could be proven."""
    config = AutoConfig.for_model(
        "qwen2",
        hidden_size=3584,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=28,
        num_key_value_heads=4,
        vocab_size=300,
    )
    model = random_slice(config, 1, dtype=torch.bfloat16, device=CPU)
    assert len(HeadLayout.of(model).heads) == 28
    matrices = [parameter for parameter in model.parameters() if parameter.dim() == 2]
    starts = [tuple(matrix.flatten()[:4].tolist()) for matrix in matrices]
    assert len(set(starts)) == len(matrices)


# Billions of parameters as the models' cards give them, and query heads.
@pytest.mark.parametrize(
    ("name", "billions", "n_heads"),
    [("llama3.1-8b", 8.03, 1024), ("qwen2.5-7b", 7.62, 784), ("mistral-7b-v0.2", 7.24, 1024)],
)
def test_the_shipped_configs_are_those_of_the_papers_models(name: str, billions: float, n_heads: int) -> None:
    config, tokenizer = load_config(CONFIGS / name)
    model = skeleton(config, torch.bfloat16)
    assert round(sum(parameter.numel() for parameter in model.parameters()) / 1e9, 2) == billions
    assert len(HeadLayout.unproven(model).heads) == n_heads
    assert tokenizer is None, "a config alone has no tokenizer"
