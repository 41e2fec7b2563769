"""Greedy generation in batches: sorted by length, padded on the left, the model's own end-of-turn tokens."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig

from castune.core.losses import batches_by_length
from castune.core.progress import Advance, no_progress

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Reply:
    """A generated reply. `finished`: it ended by itself before `max_new_tokens`."""

    text: str
    tokens: tuple[int, ...]
    finished: bool


@torch.no_grad()
def generate_replies(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    end_tokens: Sequence[int],
    batch_tokens: int,
    advance: Advance = no_progress,
) -> list[Reply]:
    """Pure greedy replies to tokenised prompts, in their order.

    The model's shipped generation config is set aside: it may bend greedy decoding (Qwen2.5's has a repetition
    penalty), and `generate` fills in from it whatever its caller leaves open.

    Args:
        model: a transformers model with `generate`.
        tokenizer: its tokenizer.
        prompts: token ids of each prompt, generation prompt included.
        max_new_tokens: length limit of a reply.
        end_tokens: tokens that end a reply; they are not part of the text.
        batch_tokens: limit of rows x (longest prompt + `max_new_tokens`) of a batch.
        advance: called with the number of replies of each finished batch.
    """
    replies: list[Reply | None] = [None] * len(prompts)
    device = next(model.parameters()).device
    end, pad = set(end_tokens), end_tokens[0]
    greedy = GenerationConfig(
        max_new_tokens=max_new_tokens, eos_token_id=sorted(end), pad_token_id=pad, do_sample=False, num_beams=1
    )
    for indices in batches_by_length([len(p) + max_new_tokens for p in prompts], batch_tokens):
        longest = max(len(prompts[i]) for i in indices)
        ids = [[pad] * (longest - len(prompts[i])) + list(prompts[i]) for i in indices]
        mask = [[0] * (longest - len(prompts[i])) + [1] * len(prompts[i]) for i in indices]
        with _generation_config(model, greedy):
            output = model.generate(
                input_ids=torch.tensor(ids, device=device), attention_mask=torch.tensor(mask, device=device)
            )
        for index, tokens in zip(indices, output[:, longest:].tolist(), strict=True):
            stop = next((t for t, token in enumerate(tokens) if token in end), None)
            kept = tuple(tokens if stop is None else tokens[:stop])
            replies[index] = Reply(tokenizer.decode(kept, skip_special_tokens=True), kept, stop is not None)
        advance(len(indices))
    return [reply for reply in replies if reply is not None]


@contextmanager
def _generation_config(model: Any, config: GenerationConfig) -> Iterator[None]:
    # A PEFT model hands its config to the model it wraps, so both are restored.
    owners = [model, *([model.get_base_model()] if hasattr(model, "get_base_model") else [])]
    shipped = [owner.generation_config for owner in owners]
    try:
        model.generation_config = config
        yield
    finally:
        for owner, before in zip(owners, shipped, strict=True):
            owner.generation_config = before
