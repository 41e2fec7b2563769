"""O(h): gradients of the two mean losses on every head's query rows, from one backward a batch (Eq. 2).

Shape letters: L layer, H query head, K head width, D model width, C gradient chunk, P = K * D.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from castune.core.heads import HeadLayout
from castune.core.losses import RowBatch, batches_by_length, reply_nll, run_batches
from castune.core.memory import return_freed_memory
from castune.core.progress import Advance, no_progress
from castune.core.ranking import equal_parts
from castune.data.rows import Row
from castune.diagnose.score import Floats
from castune.errors import CastuneError


def partial_gradients(
    model: nn.Module,
    layout: HeadLayout,
    layers: Sequence[int],
    rows: Sequence[Row],
    *,
    n_chunks: int,
    batch_tokens: int,
    advance: Advance = no_progress,
) -> list[dict[int, Tensor]]:
    """Partial gradients of the mean NLL of `rows`: their sum over chunks is the whole gradient.

    Only the query projections require gradients; one backward serves all heads of all layers. Sums are kept in
    float32 on the CPU, n_chunks x the query projections' size.

    Args:
        model: the model, in evaluation mode.
        layout: its head layout.
        layers: layers whose gradients are wanted.
        rows: one row an example; its scored tokens are the reply.
        n_chunks: into how many parts the examples are cut (at most one a row).
        batch_tokens: rows x tokens of one forward and backward.
        advance: called with the number of rows done.

    Returns:
        A dict for each chunk: layer -> gradient shaped like the query projection's weight.

    Raises:
        CastuneError: a loss is not finite; the message names the dtype.
    """
    weights = [layout.query_projection(model, layer).weight for layer in layers]
    parts = equal_parts(rows, min(n_chunks, len(rows)))
    # One allocation: sums that are allocated between forwards would scatter over the memory these have freed.
    sums = torch.zeros(len(parts), sum(weight.numel() for weight in weights))
    chunks: list[dict[int, Tensor]] = []
    with _only_these_require_grad(model, weights):
        for chunk, sum_P in zip(parts, sums, strict=True):
            flat = sum_P.split([weight.numel() for weight in weights])
            total = {layer: part.view_as(weight) for layer, part, weight in zip(layers, flat, weights, strict=True)}

            def backward(indices: list[int], chunk: Sequence[Row] = chunk) -> tuple[Tensor, tuple[Tensor, ...]]:
                loss = reply_nll(model, RowBatch.of([chunk[i] for i in indices], weights[0].device)).sum() / len(rows)
                return loss, torch.autograd.grad(loss, weights)

            batches = batches_by_length([len(row.ids) for row in chunk], batch_tokens)
            for indices, (loss, gradients) in run_batches(batches, backward):
                if not torch.isfinite(loss):
                    raise CastuneError(
                        f"the loss of a calibration batch is {loss.item()} in {weights[0].dtype}; "
                        "try --dtype float32, and check the data for extreme inputs"
                    )
                for layer, gradient in zip(layers, gradients, strict=True):
                    if not torch.isfinite(gradient).all():
                        raise CastuneError(
                            f"gradients of layer {layer} are not finite in {gradient.dtype}; try --dtype float32"
                        )
                    total[layer] += gradient.detach().float().cpu()
                return_freed_memory()
                advance(len(indices))
            chunks.append(total)
    return chunks


def gram_matrices(layout: HeadLayout, layers: Sequence[int], chunks: Sequence[dict[int, Tensor]]) -> Floats:
    """Inner products of partial gradients on each head's rows, `[H, C, C]` over all heads of `layers`."""
    grams = []
    for layer in layers:
        parts_CHP = torch.stack([layout.by_head(layer, chunk[layer]).flatten(1) for chunk in chunks])
        # float64: an inner product of ten thousands of products keeps ten digits, which a cosine near 1 needs.
        parts_HCP = parts_CHP.transpose(0, 1).double()
        grams.append(parts_HCP @ parts_HCP.transpose(1, 2))
    return np.asarray(torch.cat(grams).numpy())


@contextmanager
def _only_these_require_grad(model: nn.Module, weights: Sequence[Any]) -> Iterator[None]:
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    try:
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        for weight in weights:
            weight.requires_grad_(True)
        yield
    finally:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(before[name])
