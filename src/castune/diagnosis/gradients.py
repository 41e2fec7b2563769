"""O(h): gradients of the two mean losses on what every unit owns, from one backward a batch (Eq. 2).

Shape letters: H unit (all units of the model in one axis), C gradient chunk, P elements of what a unit owns.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from castune.artifacts import Unit
from castune.core.losses import RowBatch, loss_batches, reply_nll, run_batches
from castune.core.memory import return_freed_memory
from castune.core.progress import Advance, no_progress
from castune.core.units import Part, UnitLayout
from castune.data.rows import Row
from castune.diagnosis.score import Floats
from castune.errors import CastuneError
from castune.stats.ranking import equal_parts

# Elements of partial gradients that are copied at once for their inner products, 3 GB with the copy in float64.
_MOST_ELEMENTS = 1 << 28


def partial_gradients(
    model: nn.Module,
    paths: Sequence[str],
    rows: Sequence[Row],
    *,
    n_chunks: int,
    batch_tokens: int,
    advance: Advance = no_progress,
) -> list[dict[str, Tensor]]:
    """Partial gradients of the mean NLL of `rows`: their sum over chunks is the whole gradient.

    Only the weights at `paths` require gradients; one backward serves them all. Held at once are their sums in float32
    on the CPU, n_chunks x the size of these weights, and one batch's gradients on the model's device.

    Args:
        model: the model, in evaluation mode.
        paths: module paths of the projections whose gradients are wanted.
        rows: one row an example; its scored tokens are the reply.
        n_chunks: into how many parts the examples are cut (at most one a row).
        batch_tokens: rows x tokens of one forward and backward (`loss_batches`).
        advance: called with the number of rows done.

    Returns:
        A dict for each chunk: path -> gradient shaped like the projection's weight.

    Raises:
        CastuneError: a loss is not finite; the message names the dtype.
    """
    weights: list[Any] = [model.get_submodule(path).weight for path in paths]
    parts = equal_parts(rows, min(n_chunks, len(rows)))
    # One allocation: sums that are allocated between forwards would scatter over the memory these have freed.
    sums = torch.zeros(len(parts), sum(weight.numel() for weight in weights))
    chunks: list[dict[str, Tensor]] = []
    with only_these_require_grad(model, weights):
        for chunk, sum_P in zip(parts, sums, strict=True):
            flat = sum_P.split([weight.numel() for weight in weights])
            total = {path: part.view_as(weight) for path, part, weight in zip(paths, flat, weights, strict=True)}

            def backward(indices: list[int], chunk: Sequence[Row] = chunk) -> tuple[Tensor, tuple[Tensor, ...]]:
                loss = reply_nll(model, RowBatch.of([chunk[i] for i in indices], weights[0].device)).sum() / len(rows)
                return loss, torch.autograd.grad(loss, weights)

            batches = loss_batches(chunk, batch_tokens)
            for indices, (loss, gradients) in run_batches(batches, backward):
                if not torch.isfinite(loss):
                    raise CastuneError(
                        f"the loss of a calibration batch is {loss.item()} in {weights[0].dtype}; "
                        "try --dtype float32, and check the data for extreme inputs"
                    )
                for path, gradient in zip(paths, gradients, strict=True):
                    if not torch.isfinite(gradient).all():
                        raise CastuneError(
                            f"gradients of {path} are not finite in {gradient.dtype}; try --dtype float32"
                        )
                    total[path] += gradient.detach().float().cpu()
                return_freed_memory()
                advance(len(indices))
            chunks.append(total)
    return chunks


def gram_matrices(layout: UnitLayout, units: Sequence[Unit], chunks: Sequence[dict[str, Tensor]]) -> Floats:
    """Inner products of partial gradients on what each unit owns, `[H, C, C]`.

    Of a unit that owns slices of several projections only those in `chunks` count: inner products are sums over
    projections, so that some can be measured after others.
    """
    grams_HCC = torch.zeros(len(units), len(chunks), len(chunks), dtype=torch.float64)
    alike: dict[tuple[str, int], list[tuple[int, Part]]] = {}
    for number, one in enumerate(units):
        for part in layout.parts(one):
            if part.path in chunks[0]:
                alike.setdefault((part.path, part.at.stop - part.at.start), []).append((number, part))
    for (path, _), owners in alike.items():
        n_elements = len(chunks) * owners[0][1].of(chunks[0][path]).numel()
        n_together = max(1, _MOST_ELEMENTS // n_elements)
        for start in range(0, len(owners), n_together):
            together = owners[start : start + n_together]
            # Numbers may repeat: gate and up of one group of neurons may lie in one projection.
            numbers = torch.tensor([number for number, _ in together])
            blocks_CH = [torch.stack([part.of(chunk[path]) for _, part in together]) for chunk in chunks]
            n_rows = max(1, blocks_CH[0].shape[1] * _MOST_ELEMENTS // max(n_elements, _MOST_ELEMENTS))
            for pieces_C in zip(*(block.split(n_rows, dim=1) for block in blocks_CH), strict=True):
                # float64: an inner product of ten thousands of products keeps ten digits, which a cosine near 1 needs.
                parts_HCP = torch.stack([piece.flatten(1) for piece in pieces_C]).transpose(0, 1).double()
                grams_HCC.index_add_(0, numbers, parts_HCP @ parts_HCP.transpose(1, 2))
    return np.asarray(grams_HCC.numpy())


def gradient_passes(
    model: nn.Module, layout: UnitLayout, units: Sequence[Unit], *, n_chunks: int, limit: float
) -> list[list[str]]:
    """`passes_over` all projections that units own slices of."""
    paths = dict.fromkeys(part.path for one in units for part in layout.parts(one))
    return passes_over(model, paths, n_chunks=n_chunks, limit=limit)


def passes_over(model: nn.Module, paths: Iterable[str], *, n_chunks: int, limit: float) -> list[list[str]]:
    """Module paths of some projections, in passes whose gradient sums stay within a limit.

    Each pass runs all examples again, forwards and backwards (the latter down to its first layer only). A projection
    whose sums alone are more than the limit is a pass of its own.

    Args:
        model: the model.
        paths: of the projections.
        n_chunks: gradient chunks that are held at once, those of both losses of a diagnosis.
        limit: bytes.
    """
    passes: list[list[str]] = []
    room = 0.0
    for path in paths:
        weight: Any = model.get_submodule(path).weight
        size = 4 * n_chunks * weight.numel()
        if not passes or size > room:
            passes.append([])
            room = limit
        passes[-1].append(path)
        room -= size
    return passes


@contextmanager
def only_these_require_grad(model: nn.Module, weights: Sequence[Any]) -> Iterator[None]:
    """Let gradients reach these weights alone inside the `with` block; of none, no weight has a gradient."""
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
