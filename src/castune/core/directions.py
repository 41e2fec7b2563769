"""The direction in the residual stream that tells harmful prompts from harmless ones (Arditi et al. 2024).

Shape letters: L layer, N prompt, S sequence position, D model width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from castune.core.ablation import record_residuals
from castune.core.heads import HeadLayout
from castune.core.losses import batches_by_length, run_batches
from castune.errors import CastuneError


@dataclass(frozen=True, eq=False)
class Direction:
    """A difference of means.

    Attributes:
        unit_D: of length 1, in float64, on the CPU.
        layer: the decoder layer at whose input it was found.
        separation: how far apart the two means lie, in units of the distance of a prompt from its own mean.
    """

    unit_D: Tensor
    layer: int
    separation: float


@torch.no_grad()
def last_states(
    model: Any, layout: HeadLayout, prompts: Sequence[Sequence[int]], *, batch_tokens: int = 2048
) -> Tensor:
    """The residual stream at the last token of every prompt and the input of every layer, `[L, N, D]` float64.

    Args:
        model: the model `layout` was taken from, also with adapters injected.
        layout: its head layout.
        prompts: token ids of each prompt, generation prompt included.
        batch_tokens: limit of rows x longest prompt of a batch.
    """
    device = next(model.parameters()).device

    def run(indices: list[int]) -> Tensor:
        rows = [list(prompts[index]) for index in indices]
        longest = max(map(len, rows))
        # Padded on the right: with causal attention the last token sees none of it.
        ids_BS = torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows], device=device)
        residuals: dict[int, Tensor] = {}
        with record_residuals(model, layout, residuals):
            model(input_ids=ids_BS, use_cache=False, logits_to_keep=1)
        last_B = torch.tensor([len(row) - 1 for row in rows])
        numbers_B = torch.arange(len(rows))
        states = [residuals[layer].cpu()[numbers_B, last_B].double() for layer in range(layout.n_layers)]
        return torch.stack(states)

    found: dict[int, Tensor] = {}
    for indices, states_LBD in run_batches(batches_by_length([len(p) for p in prompts], batch_tokens), run):
        found.update(zip(indices, states_LBD.unbind(1), strict=True))
    return torch.stack([found[index] for index in range(len(prompts))], dim=1)


def middle_layers(n_layers: int) -> range:
    """From a quarter of the layers to three quarters: before, prompts are words; behind, they are the next word."""
    first = min(max(1, -(-n_layers // 4)), n_layers - 1)
    return range(first, max(first + 1, 3 * n_layers // 4 + 1))


def refusal_direction(harmful_LND: Tensor, harmless_LND: Tensor) -> Direction:
    """The mean of harmful prompts minus that of harmless ones, at the middle layer where these lie furthest apart.

    Arditi et al. try the direction of every layer and position on further prompts and take the one that works best.
    This takes the last token, and the layer by distance alone, so that no prompt has to be answered for the choice.

    Args:
        harmful_LND: `last_states` of harmful prompts.
        harmless_LND: of harmless ones.

    Raises:
        CastuneError: the two do not differ, or are not finite.
    """
    difference_LD = harmful_LND.mean(1) - harmless_LND.mean(1)
    harmful_L, harmless_L = (
        (states_LND - states_LND.mean(1, keepdim=True)).square().sum((1, 2))
        for states_LND in (harmful_LND, harmless_LND)
    )
    n_free = harmful_LND.shape[1] + harmless_LND.shape[1] - 2
    separation_L = difference_LD.norm(dim=1) / ((harmful_L + harmless_L) / max(n_free, 1)).sqrt().clamp_min(1e-12)
    layer = max(middle_layers(len(separation_L)), key=lambda one: float(separation_L[one]))
    length, separation = float(difference_LD[layer].norm()), float(separation_L[layer])
    if not (length > 0 and separation < float("inf")):
        raise CastuneError(
            "no refusal direction: at the last token the model has the same states for the harmful and the harmless "
            "prompts, or states that are not finite"
        )
    return Direction(difference_LD[layer] / length, layer, separation)
