"""Going on from recorded keys and values, so that a reply is decoded without its prompt being run again.

A forward that verifies replies has computed the keys and values of all tokens before the place where a reply goes
another way. They are taken out of its cache token by token, which also takes shared prefixes apart, and padded on the
left as `generate` wants them.

Shape letters: B batch row, S sequence position, N token of a context, H key-value head, K head width.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import Cache, DynamicCache

from castune.core.ablation import record_residuals, resume_from
from castune.core.heads import HeadLayout
from castune.core.losses import RowBatch, scored_logits
from castune.data.rows import Row

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

KeysValues = list[tuple[Tensor, Tensor] | None]
"""Keys and values of every decoder layer, `[B, H, S, K]`; None where a forward skipped the layer."""

Context = list[tuple[Tensor, Tensor]]
"""Keys and values `[N, H, K]` of the tokens one reply goes on from, of every decoder layer."""


def read_keys_values(cache: Cache, n_layers: int) -> KeysValues:
    """What a forward left in a cache it found empty."""
    found: KeysValues = [(layer.keys, layer.values) if layer.is_initialized else None for layer in cache.layers]
    return found + [None] * (n_layers - len(found))


def context_of(row: Row, position: int, places: Sequence[tuple[KeysValues, int]]) -> Context:
    """The keys and values of all tokens that `position` of a row sees, its own included.

    Args:
        row: the row that was run.
        position: of one of its input tokens.
        places: what was recorded, and the batch row there; of a layer the first that has it is taken.

    Raises:
        IndexError: a layer that nobody recorded.
    """
    tokens = row.context(position)
    index_on: dict[torch.device, Tensor] = {}
    context: Context = []
    for layer in range(len(places[0][0])):
        held = next(((found, b) for recorded, b in places if (found := recorded[layer]) is not None), None)
        if held is None:
            raise IndexError(f"keys and values of layer {layer} were not recorded")
        (keys_BHSK, values_BHSK), b = held
        if keys_BHSK.device not in index_on:
            index_on[keys_BHSK.device] = torch.tensor(tokens, device=keys_BHSK.device)
        index_N = index_on[keys_BHSK.device]
        context.append((keys_BHSK[b][:, index_N].transpose(0, 1), values_BHSK[b][:, index_N].transpose(0, 1)))
    return context


def cache_of(model: PreTrainedModel, contexts: Sequence[Context]) -> Cache:
    """A cache in which every batch row holds a context, padded on the left to the longest."""

    def padded(contexts_NHK: Sequence[Tensor]) -> Tensor:
        return pad_sequence(list(contexts_NHK), batch_first=True, padding_side="left").transpose(1, 2)

    layers = [
        (padded([keys for keys, _ in of_layer]), padded([values for _, values in of_layer]))
        for of_layer in zip(*contexts, strict=True)
    ]
    return DynamicCache(layers, config=model.config)


@torch.no_grad()
def can_continue(model: PreTrainedModel, layout: HeadLayout) -> bool:
    """Whether this model goes on from recorded keys and values as if it had run everything.

    Checked on two rows of unequal length, with a forward that begins at the middle layer. Families that keep another
    kind of state (linear attention) cannot; their replies are decoded from the prompt on, which is slower and as exact.
    """
    device = next(model.parameters()).device
    rows = [Row.of_replies([5, 6, 7, 8], [[9, 10]]), Row.of_replies([11, 12, 13], [[14]])]
    batch = RowBatch.of(rows, device)
    residuals: dict[int, Tensor] = {}
    lower, upper = DynamicCache(), DynamicCache()
    middle = layout.n_layers // 2
    try:
        with record_residuals(model, layout, residuals):
            scored_logits(model, batch, lower)
        with resume_from(model, layout, middle, residuals[middle]):
            scored_logits(model, batch, upper)
        recorded = [read_keys_values(cache, layout.n_layers) for cache in (upper, lower)]
        contexts = [context_of(row, len(row.ids) - 1, [(r, b) for r in recorded]) for b, row in enumerate(rows)]
        ids = torch.tensor([[5, 6, 7, 8, 9, 15], [0, 0, 11, 12, 13, 16]], device=device)
        mask = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1]], device=device)
        # All of it once more than the rows hold: the last token is new.
        whole = {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
        expected = model(input_ids=ids, use_cache=False, **whole).logits[:, -1].float()
        found = model(
            input_ids=ids[:, -1:],
            attention_mask=mask,
            position_ids=whole["position_ids"][:, -1:],
            past_key_values=cache_of(model, contexts),
            use_cache=True,
        ).logits[:, -1]
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError, IndexError) as error:
        logger.warning("this model cannot continue from recorded keys (%r): replies are decoded from scratch", error)
        return False
    # bfloat16 keeps 8 bits, of logits as of log-probabilities.
    tolerance = 1e-4 if next(model.parameters()).dtype == torch.float32 else 0.2
    return bool((found.float() - expected).abs().max() <= tolerance * max(1.0, float(expected.abs().max()) / 10))
