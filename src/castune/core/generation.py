"""Greedy generation in batches: sorted by length, padded on the left, the model's own end-of-turn tokens."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from transformers import Cache, GenerationConfig
from transformers.cache_utils import DynamicLayer, LinearAttentionLayer

from castune.core.losses import batches_by_length, run_batches
from castune.core.progress import Advance, no_progress
from castune.data.said import notation

logger = logging.getLogger(__name__)

# Steps after which complete replies leave their batch.
ROUND = 8


@dataclass(frozen=True)
class Reply:
    """A generated reply. `finished`: it ended by itself, with an end-of-turn token."""

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
    begun: Sequence[Sequence[int]] | None = None,
    recorded: Callable[[Sequence[int]], Cache] | None = None,
    is_settled: Callable[[str], bool] | None = None,
    around: Callable[[Sequence[int]], AbstractContextManager[None]] | None = None,
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
        begun: first tokens of each reply, where they are known already.
        recorded: the keys and values of all but the last known token, padded on the left, for a batch of prompts.
        is_settled: tells from a reply's text that it is long enough; the reply then ends there, not `finished`.
        around: a context for each run of a batch, from the numbers of the prompts that are in it, in batch order.
        advance: called with the number of replies of each finished batch.
    """
    replies: list[Reply | None] = [None] * len(prompts)
    text_of = ReplyText(tokenizer)
    device = next(model.parameters()).device
    end, pad = set(end_tokens), end_tokens[0]
    begun = begun or [()] * len(prompts)

    def reply_of(index: int, tokens: Sequence[int]) -> Reply | None:
        """The reply these tokens make, if it is complete."""
        # Rows of a batch that began with more tokens than others run past the limit.
        tokens = tokens[:max_new_tokens]
        stop = next((t for t, token in enumerate(tokens) if token in end), None)
        kept = tuple(tokens if stop is None else tokens[:stop])
        if is_settled is not None and is_settled(text_of(kept)):
            first = next(n for n in range(len(begun[index]), len(kept) + 1) if is_settled(text_of(kept[:n])))
            stop, kept = None, kept[:first]
        elif stop is None and len(tokens) < max_new_tokens:
            return None
        return Reply(text_of(kept), kept, stop is not None)

    def generate(indices: list[int]) -> dict[int, Reply]:
        done: dict[int, Reply] = {}
        inputs = [[*prompts[i], *begun[i]] for i in indices]
        longest = max(map(len, inputs))
        ids_BS = torch.tensor([[pad] * (longest - len(row)) + row for row in inputs], device=device)
        mask_BS = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in inputs], device=device)
        cache = None if recorded is None else recorded(indices)
        live, tokens = list(indices), {i: list(begun[i]) for i in indices}
        while live:
            n_steps = min(ROUND, max(max_new_tokens - len(tokens[i]) for i in live))
            greedy = GenerationConfig(
                max_new_tokens=n_steps, eos_token_id=sorted(end), pad_token_id=pad, do_sample=False, num_beams=1
            )
            with _generation_config(model, greedy), around(live) if around is not None else nullcontext():
                output = model.generate(
                    input_ids=ids_BS, attention_mask=mask_BS, past_key_values=cache, return_dict_in_generate=True
                )
            n_new = output.sequences.shape[1] - ids_BS.shape[1]
            ids_BS, cache = output.sequences, output.past_key_values
            mask_BS = torch.nn.functional.pad(mask_BS, (0, n_new), value=1)
            for i, new in zip(live, ids_BS[:, -n_new:].tolist(), strict=True):
                tokens[i] += new
                if i not in done and (reply := reply_of(i, tokens[i])) is not None:
                    done[i] = reply
            kept = [b for b, i in enumerate(live) if i not in done]
            if kept and not _takes_rows_out(cache):
                continue
            if kept and len(kept) < len(live):
                index = torch.tensor(kept, device=device)
                cache.batch_select_indices(index)
                ids_BS, mask_BS = ids_BS[index], mask_BS[index]
            live = [live[b] for b in kept]
        return done

    batches = batches_by_length([len(prompt) + max_new_tokens for prompt in prompts], batch_tokens)
    for indices, found in run_batches(batches, generate):
        for index, reply in found.items():
            replies[index] = reply
        advance(len(indices))
    return [reply for reply in replies if reply is not None]


class ReplyText:
    """The text of reply tokens: without special tokens, but for those that tell reasoning from what is said.

    Args:
        tokenizer: the model's.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        special = {
            token: str(added.content) for token, added in tokenizer.added_tokens_decoder.items() if added.special
        }
        kept = notation(special.values())
        self._dropped = {token for token, text in special.items() if text not in kept} if kept else None

    def __call__(self, tokens: Sequence[int]) -> str:
        """The text of some tokens."""
        if self._dropped is None:
            return str(self.tokenizer.decode(list(tokens), skip_special_tokens=True))
        return str(self.tokenizer.decode([token for token in tokens if token not in self._dropped]))


def _takes_rows_out(cache: Cache) -> bool:
    """Whether rows can be taken out of this cache, which linear attention has no way for."""
    layers = cache.layers
    return all(isinstance(layer, DynamicLayer) and not isinstance(layer, LinearAttentionLayer) for layer in layers)


@contextmanager
def _generation_config(model: Any, config: GenerationConfig) -> Iterator[None]:
    # A PEFT model hands its config to the model it wraps, so both are restored.
    owners = [model, *([model.get_base_model()] if hasattr(model, "get_base_model") else [])]
    shipped = [vars(owner).get("generation_config") for owner in owners]
    try:
        model.generation_config = config
        yield
    finally:
        for owner, before in zip(owners, shipped, strict=True):
            if before is not None:
                owner.generation_config = before
            elif "generation_config" in vars(owner):
                # It shows that of the model it wraps, and shall go on to.
                del owner.generation_config
