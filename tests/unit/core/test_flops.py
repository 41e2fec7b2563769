"""FLOPs from shapes, against torch's own counter of what a forward computes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from castune.core.flops import ForwardFlops
from castune.core.heads import HeadLayout

DENSE = ["llama", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "gpt2", "gpt_neox", "opt", "cohere2"]


def counted(model: Any, n_rows: int, length: int) -> int:
    """FLOPs of a forward as torch counts them, attention written out as matrix products."""
    model.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=torch.ones(n_rows, length, dtype=torch.long), use_cache=False)
    return counter.get_total_flops()


@pytest.mark.parametrize("family", DENSE)
def test_counts_equal_those_of_torch(tiny_model: Callable[..., Any], family: str) -> None:
    model = tiny_model(family)
    flops = ForwardFlops.of(model, HeadLayout.of(model))
    found = flops.forward(n_rows=2, length=40, n_scored=80)
    # The rotary angles are a product of a vector and a scalar that nobody would call work.
    assert found == pytest.approx(counted(model, 2, 40), rel=0.005)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_of_experts_those_count_that_a_token_is_sent_to(tiny_model: Callable[..., Any], family: str) -> None:
    two, four = (
        ForwardFlops.of(model, HeadLayout.unproven(model))
        for model in (tiny_model(family, num_experts_per_tok=k) for k in (2, 4))
    )
    experts = sum(
        2 * parameter.numel()
        for name, parameter in tiny_model(family).model.layers[0].named_parameters()
        if "experts" in name.split(".") and parameter.dim() > 1
    )
    assert four.token_L[0] - two.token_L[0] == experts / 2


def test_layers_that_are_skipped_cost_nothing(any_tiny_model: Any) -> None:
    flops = ForwardFlops.of(any_tiny_model, HeadLayout.of(any_tiny_model))
    size = {"n_rows": 3, "length": 17}
    by_first = [flops.forward(**size, n_scored=5, first_layer=first) for first in range(4)]
    assert by_first[3] == 5 * flops.scored
    assert by_first == sorted(by_first, reverse=True)
    for layer in range(3):
        expected = 51 * (flops.token_L[layer] + 17 * flops.pair_L[layer])
        assert by_first[layer] - by_first[layer + 1] == pytest.approx(expected)
