"""What one writes with transformers alone: a forward pre-hook on the output projection.

Ablation zeroes head after head in it; attribution keeps what passes, and takes its gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from work import (
    Outcome,
    Question,
    Work,
    choice_batch,
    head_changes,
    left_padded,
    main,
    margin,
    mean_log_probs,
    refusals,
)

import castune as ct

Loaded = tuple[Any, Any]
Score = Callable[[Any, Question], Tensor]
"""Scores `[C]` of a question's choices."""


def load(work: Work) -> Loaded:
    return ct.load("default", dtype=work.dtype)


@contextmanager
def without(model: Any, layer: int, head: int) -> Iterator[None]:
    width = model.config.hidden_size // model.config.num_attention_heads

    def zero(_module: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        z = args[0].clone()
        z[..., head * width : (head + 1) * width] = 0
        return (z,)

    handle = model.model.layers[layer].self_attn.o_proj.register_forward_pre_hook(zero)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def taped(model: Any, layers: list[int]) -> Iterator[list[list[Tensor]]]:
    """Keep what enters the output projection of some layers, a list a layer with one entry a forward."""
    kept: list[list[Tensor]] = [[] for _ in layers]
    handles = []
    for layer, of_layer in zip(layers, kept, strict=True):
        projection = model.model.layers[layer].self_attn.o_proj
        handles.append(projection.register_forward_pre_hook(lambda _, args, z=of_layer: z.append(args[0])))
    try:
        yield kept
    finally:
        for handle in handles:
            handle.remove()


def choice_by_choice(model: Any, question: Question) -> Tensor:
    """One choice a forward, logits of every position: the first version anybody writes."""
    scores = []
    for choice in question.choices:
        ids = torch.tensor([[*question.prompt, *choice]])
        logits = model(input_ids=ids, use_cache=False).logits
        scores.append(mean_log_probs(logits[:, len(question.prompt) - 1 :], [choice]))
    return torch.cat(scores)


def batched(model: Any, question: Question) -> Tensor:
    """All choices in one forward, logits of the choices' positions only: the tuned version."""
    ids, n_scored = choice_batch(question)
    logits = model(input_ids=ids, use_cache=False, logits_to_keep=n_scored).logits
    return mean_log_probs(logits, question.choices)


def utility(score: Score, loaded: Loaded, work: Work) -> Outcome:
    """Margins without each head."""
    model, _ = loaded
    margins = []
    for layer, head in work.heads:
        with without(model, layer, head):
            margins.append([margin(score(model, question), question.answer).item() for question in work.questions])
    return {"margins": margins}


def attributed_utility(score: Score, loaded: Loaded, work: Work) -> Outcome:
    """What zeroing each head changes in the margins of questions, to first order."""
    return _attributed(score, loaded, work, work.questions)


def attributed_safety(score: Score, loaded: Loaded, work: Work) -> Outcome:
    """The same in the margins of refusals over the model's own replies."""
    return _attributed(score, loaded, work, work.pairs)


@torch.enable_grad()
def _attributed(score: Score, loaded: Loaded, work: Work, questions: list[Question]) -> Outcome:
    """One backward pass an example, for all heads."""
    model, _ = loaded
    found = []
    for question in questions:
        with taped(model, work.layers) as kept:
            outcome = margin(score(model, question), question.answer)
        passed = [z for of_layer in kept for z in of_layer]
        # Choices that are not the best wrong one have no part in the margin.
        gradients = torch.autograd.grad(outcome, passed, materialize_grads=True)
        changes = [
            head_changes(z, gradient, model.config.num_attention_heads)
            for z, gradient in zip(passed, gradients, strict=True)
        ]
        found.append(torch.stack(changes).unflatten(0, (len(kept), -1)).sum(1).flatten())
    return {"changes": torch.stack(found, dim=1).tolist()}


def safety_prompt_by_prompt(loaded: Loaded, work: Work) -> Outcome:
    """One `generate` a head and prompt."""
    return _generated(loaded, work, [[number] for number in range(len(work.prompts))])


def safety(loaded: Loaded, work: Work) -> Outcome:
    """One `generate` a head for all prompts, padded on the left."""
    return _generated(loaded, work, [list(range(len(work.prompts)))])


def _generated(loaded: Loaded, work: Work, batches: list[list[int]]) -> Outcome:
    model, tokenizer = loaded
    judged, texts = [], []
    for layer, head in work.heads:
        replies = []
        with without(model, layer, head):
            for batch in batches:
                ids, mask = left_padded([work.prompts[number] for number in batch], work.end_tokens[0])
                output = model.generate(
                    input_ids=ids,
                    attention_mask=mask,
                    max_new_tokens=work.max_new_tokens,
                    do_sample=False,
                    eos_token_id=work.end_tokens,
                    pad_token_id=work.end_tokens[0],
                )
                replies += output[:, ids.shape[1] :].tolist()
        verdicts, replied = refusals(work, tokenizer, replies)
        judged.append(verdicts)
        texts.append(replied)
    return {"refusals": judged, "replies": texts}


if __name__ == "__main__":
    main(
        load,
        {
            "utility": partial(utility, batched),
            "utility-choice-by-choice": partial(utility, choice_by_choice),
            "safety": safety,
            "safety-prompt-by-prompt": safety_prompt_by_prompt,
            "attributed-utility": partial(attributed_utility, batched),
            "attributed-utility-choice-by-choice": partial(attributed_utility, choice_by_choice),
            "attributed-safety": partial(attributed_safety, batched),
            "attributed-safety-reply-by-reply": partial(attributed_safety, choice_by_choice),
        },
    )
