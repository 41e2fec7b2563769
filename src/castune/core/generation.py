"""Greedy generation in batches: sorted by length, padded on the left, the model's own end-of-turn tokens."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from transformers import Cache, GenerationConfig, StoppingCriteria, StoppingCriteriaList

from castune.core.losses import batches_by_length, run_batches
from castune.core.progress import Advance, no_progress

logger = logging.getLogger(__name__)


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
        around: a context for each batch, from the numbers of its prompts in batch order.
        advance: called with the number of replies of each finished batch.
    """
    replies: list[Reply | None] = [None] * len(prompts)
    device = next(model.parameters()).device
    end, pad = set(end_tokens), end_tokens[0]
    begun = begun or [()] * len(prompts)
    inputs = [[*prompt, *first] for prompt, first in zip(prompts, begun, strict=True)]

    def generate(indices: list[int]) -> tuple[int, Any]:
        longest = max(len(inputs[i]) for i in indices)
        ids = [[pad] * (longest - len(inputs[i])) + inputs[i] for i in indices]
        mask = [[0] * (longest - len(inputs[i])) + [1] * len(inputs[i]) for i in indices]
        greedy = GenerationConfig(
            max_new_tokens=max(max_new_tokens - len(begun[i]) for i in indices),
            eos_token_id=sorted(end),
            pad_token_id=pad,
            do_sample=False,
            num_beams=1,
        )
        stopping = StoppingCriteriaList()
        if is_settled is not None:
            stopping.append(_Settled(tokenizer, is_settled, [begun[i] for i in indices], longest))
        with _generation_config(model, greedy), around(indices) if around is not None else nullcontext():
            output = model.generate(
                input_ids=torch.tensor(ids, device=device),
                attention_mask=torch.tensor(mask, device=device),
                stopping_criteria=stopping,
                past_key_values=None if recorded is None else recorded(indices),
            )
        return longest, output

    batches = batches_by_length([len(prompt) + max_new_tokens for prompt in prompts], batch_tokens)
    for indices, (longest, output) in run_batches(batches, generate):
        for index, new in zip(indices, output[:, longest:].tolist(), strict=True):
            tokens = [*begun[index], *new][:max_new_tokens]
            stop = next((t for t, token in enumerate(tokens) if token in end), None)
            kept = tuple(tokens if stop is None else tokens[:stop])
            replies[index] = Reply(tokenizer.decode(kept, skip_special_tokens=True), kept, stop is not None)
        advance(len(indices))
    return [reply for reply in replies if reply is not None]


class _Settled(StoppingCriteria):
    """Ends each row of a batch as soon as its text is settled."""

    def __init__(
        self, tokenizer: Any, is_settled: Callable[[str], bool], begun: Sequence[Sequence[int]], n_input: int
    ) -> None:
        self.tokenizer, self.is_settled, self.begun, self.n_input = tokenizer, is_settled, begun, n_input

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_options: Any) -> Any:
        texts = (
            self.tokenizer.decode([*first, *new], skip_special_tokens=True)
            for first, new in zip(self.begun, input_ids[:, self.n_input :].tolist(), strict=True)
        )
        return torch.tensor([self.is_settled(text) for text in texts], device=input_ids.device)


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
