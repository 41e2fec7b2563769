"""Greedy generation in batches: sorted by length, padded on the left, the model's own end-of-turn tokens."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import Cache, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
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
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
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
    decoding = _Decoding(
        model=model,
        prompts=prompts,
        begun=begun or [()] * len(prompts),
        max_new_tokens=max_new_tokens,
        end_tokens=end_tokens,
        text_of=ReplyText(tokenizer),
        is_settled=is_settled,
        recorded=recorded,
        around=around,
    )
    replies: list[Reply | None] = [None] * len(prompts)
    batches = batches_by_length([len(prompt) + max_new_tokens for prompt in prompts], batch_tokens)
    with _contiguous_at(model.get_output_embeddings()):
        for indices, found in run_batches(batches, decoding.run):
            for index, reply in found.items():
                replies[index] = reply
            advance(len(indices))
    return [reply for reply in replies if reply is not None]


@contextmanager
def _contiguous_at(head: object) -> Iterator[None]:
    """Give the output head contiguous inputs inside the `with` block.

    The last position of a prompt is a strided view of all. torch's matmul then copies the weights once for every row
    where they are frozen, as under PEFT: 3.4 GB for 60 prompts of the default model, half of the time of their replies.
    """
    handle = None
    if isinstance(head, torch.nn.Module):
        handle = head.register_forward_pre_hook(lambda _head, args: (args[0].contiguous(), *args[1:]))
    try:
        yield
    finally:
        if handle is not None:
            handle.remove()


@dataclass(frozen=True)
class _Decoding:
    """What `generate_replies` is asked for, and the replies of a batch."""

    model: PreTrainedModel
    prompts: Sequence[Sequence[int]]
    begun: Sequence[Sequence[int]]
    max_new_tokens: int
    end_tokens: Sequence[int]
    text_of: ReplyText
    is_settled: Callable[[str], bool] | None
    recorded: Callable[[Sequence[int]], Cache] | None
    around: Callable[[Sequence[int]], AbstractContextManager[None]] | None

    def run(self, indices: list[int]) -> dict[int, Reply]:
        """The replies to some prompts, a few steps at a time: complete ones leave the batch."""
        done: dict[int, Reply] = {}
        inputs = [[*self.prompts[i], *self.begun[i]] for i in indices]
        longest, pad = max(map(len, inputs)), self.end_tokens[0]
        device = next(self.model.parameters()).device
        ids_BS = torch.tensor([[pad] * (longest - len(row)) + row for row in inputs], device=device)
        mask_BS = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in inputs], device=device)
        cache = None if self.recorded is None else self.recorded(indices)
        live, tokens = list(indices), {i: list(self.begun[i]) for i in indices}
        while live:
            n_steps = min(ROUND, max(self.max_new_tokens - len(tokens[i]) for i in live))
            ids_BS, mask_BS, cache = self._steps(live, ids_BS, mask_BS, cache, n_steps)
            for i, row in zip(live, ids_BS.tolist(), strict=True):
                tokens[i] = [*self.begun[i], *row[longest:]]
                if i not in done and (reply := self._complete(i, tokens[i])) is not None:
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

    def _steps(
        self, live: list[int], ids_BS: Tensor, mask_BS: Tensor, cache: Cache | None, n_steps: int
    ) -> tuple[Tensor, Tensor, Cache]:
        """The rows after at most `n_steps` more tokens, their attention mask, and their keys and values."""
        greedy = GenerationConfig(
            max_new_tokens=n_steps,
            eos_token_id=sorted(set(self.end_tokens)),
            pad_token_id=self.end_tokens[0],
            do_sample=False,
            num_beams=1,
        )
        with _generation_config(self.model, greedy), nullcontext() if self.around is None else self.around(live):
            output = self.model.generate(
                input_ids=ids_BS, attention_mask=mask_BS, past_key_values=cache, return_dict_in_generate=True
            )
        n_new = output.sequences.shape[1] - ids_BS.shape[1]
        return output.sequences, torch.nn.functional.pad(mask_BS, (0, n_new), value=1), output.past_key_values

    def _complete(self, index: int, tokens: Sequence[int]) -> Reply | None:
        """The reply these tokens make, if it is complete."""
        # Rows of a batch that began with more tokens than others run past the limit.
        tokens = tokens[: self.max_new_tokens]
        end = set(self.end_tokens)
        stop = next((t for t, token in enumerate(tokens) if token in end), None)
        kept = tuple(tokens if stop is None else tokens[:stop])
        if self.is_settled is not None and self.is_settled(self.text_of(kept)):
            begun = len(self.begun[index])
            first = next(n for n in range(begun, len(kept) + 1) if self.is_settled(self.text_of(kept[:n])))
            stop, kept = None, kept[:first]
        elif stop is None and len(tokens) < self.max_new_tokens:
            return None
        return Reply(self.text_of(kept), kept, stop is not None)


class ReplyText:
    """The text of reply tokens: without special tokens, but for those that tell reasoning from what is said.

    Args:
        tokenizer: the model's.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
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
def _generation_config(model: PreTrainedModel, config: GenerationConfig) -> Iterator[None]:
    # A PEFT model hands its config to the model it wraps only where its adapter names a task.
    owners = [model, *([model.get_base_model()] if hasattr(model, "get_base_model") else [])]
    shipped = [vars(owner).get("generation_config") for owner in owners]
    try:
        for owner in owners:
            owner.generation_config = config
        yield
    finally:
        for owner, before in zip(owners, shipped, strict=True):
            if before is not None:
                owner.generation_config = before
            elif "generation_config" in vars(owner):
                # It shows that of the model it wraps, and shall go on to.
                del owner.generation_config
