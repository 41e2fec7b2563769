"""Partial gradients against plain autograd; what is left behind."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from castune import CastuneError, HeadLayout
from castune.core.units import UnitLayout
from castune.data.rows import Row
from castune.diagnosis.gradients import gram_matrices, partial_gradients

CONVERSATIONS = [
    (list(range(40, 40 + n)), list(range(90, 90 + m))) for n, m in ((9, 3), (25, 1), (4, 6), (14, 2), (7, 7))
]
ROWS = [Row.of_replies(prompt, [reply]) for prompt, reply in CONVERSATIONS]


def query_paths(layout: HeadLayout, layers: Sequence[int] = (0, 1, 2)) -> list[str]:
    return [layout.at(layer).query_path for layer in layers]


def plain_gradients(model: Any, layout: HeadLayout) -> list[Tensor]:
    losses = []
    for prompt, reply in CONVERSATIONS:
        logits = model(input_ids=torch.tensor([prompt + reply])).logits[0, len(prompt) - 1 : -1]
        losses.append(F.cross_entropy(logits, torch.tensor(reply)))
    weights = [layout.query_projection(model, layer).weight for layer in layout.layers_with_heads]
    return list(torch.autograd.grad(torch.stack(losses).mean(), weights))


def test_chunks_sum_to_the_whole_gradient(any_tiny_model: Any) -> None:
    layout = HeadLayout.of(any_tiny_model)
    expected = plain_gradients(any_tiny_model, layout)
    for n_chunks, batch_tokens in ((1, 10_000), (2, 40), (5, 1), (99, 30)):
        paths = query_paths(layout, layout.layers_with_heads)
        chunks = partial_gradients(any_tiny_model, paths, ROWS, n_chunks=n_chunks, batch_tokens=batch_tokens)
        assert len(chunks) == min(n_chunks, len(ROWS))
        for path, gradient in zip(paths, expected, strict=True):
            total = sum(chunk[path] for chunk in chunks)
            torch.testing.assert_close(total, gradient, rtol=1e-4, atol=1e-6)
            assert gradient.abs().max() > 1e-4


def test_gradients_of_some_layers_are_those_of_all(tiny_model: Callable[..., Any]) -> None:
    model = tiny_model("llama")
    layout = HeadLayout.of(model)
    (every,) = partial_gradients(model, query_paths(layout), ROWS, n_chunks=1, batch_tokens=100)
    (some,) = partial_gradients(model, query_paths(layout, (1,)), ROWS, n_chunks=1, batch_tokens=100)
    (path,) = query_paths(layout, (1,))
    assert list(some) == [path]
    assert torch.equal(some[path], every[path])


def test_gram_is_the_inner_products_of_head_blocks(any_tiny_model: Any) -> None:
    layout = HeadLayout.of(any_tiny_model)
    units = UnitLayout(layout)
    chunks = partial_gradients(any_tiny_model, query_paths(layout, (1, 2)), ROWS, n_chunks=3, batch_tokens=100)
    grams = gram_matrices(units, [one for one in units.units if one.layer > 0], chunks)
    assert grams.shape == (8, 3, 3)
    assert grams.dtype == np.float64
    for number, (layer, head) in enumerate([(layer, head) for layer in (1, 2) for head in range(4)]):
        rows, path = layout.query_rows(layer, head), layout.at(layer).query_path
        parts = [
            (chunk[path].t() if layout.at(layer).transposed else chunk[path])[rows].double().flatten()
            for chunk in chunks
        ]
        expected = [[float(a @ b) for b in parts] for a in parts]
        np.testing.assert_allclose(grams[number], expected, rtol=1e-9)


@pytest.mark.parametrize("fails", [False, True])
def test_requires_grad_is_restored(tiny_model: Callable[..., Any], fails: bool) -> None:
    model = tiny_model("gpt2")
    for number, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(number % 3 > 0)
    before = [p.requires_grad for p in model.parameters()]
    layout = HeadLayout.of(model)
    if fails:
        with torch.no_grad():
            model.transformer.h[1].mlp.c_fc.weight[0, 0] = torch.nan
        with pytest.raises(CastuneError, match=r"loss .* is nan in torch.float32"):
            partial_gradients(model, query_paths(layout), ROWS, n_chunks=2, batch_tokens=100)
    else:
        partial_gradients(model, query_paths(layout), ROWS, n_chunks=2, batch_tokens=100)
    assert [p.requires_grad for p in model.parameters()] == before
    assert all(p.grad is None for p in model.parameters())


def test_gradients_already_there_are_kept(tiny_model: Callable[..., Any]) -> None:
    model = tiny_model("llama")
    weight = model.model.layers[0].self_attn.q_proj.weight
    weight.grad = torch.ones_like(weight)
    partial_gradients(model, query_paths(HeadLayout.of(model)), ROWS, n_chunks=2, batch_tokens=100)
    assert torch.equal(weight.grad, torch.ones_like(weight))


def test_progress_counts_every_row_once(tiny_model: Callable[..., Any]) -> None:
    model, done = tiny_model("llama"), []
    layout = HeadLayout.of(model)
    partial_gradients(model, query_paths(layout, (0,)), ROWS, n_chunks=2, batch_tokens=30, advance=done.append)
    assert sum(done) == len(ROWS)
