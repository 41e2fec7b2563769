"""The loop one writes with transformers alone: a forward pre-hook on the output projection, head after head."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from work import Outcome, Work, choice_batch, left_padded, main, margin, mean_log_probs, refusals

import castune as ct

Loaded = tuple[Any, Any]


def load(work: Work) -> Loaded:
    return ct.load("default", dtype=work.dtype)


@contextmanager
def without(model: Any, layer: int, head: int) -> Iterator[None]:
    width = model.config.hidden_size // model.config.num_attention_heads

    def zero(_module: Any, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        z = args[0].clone()
        z[..., head * width : (head + 1) * width] = 0
        return (z,)

    handle = model.model.layers[layer].self_attn.o_proj.register_forward_pre_hook(zero)
    try:
        yield
    finally:
        handle.remove()


def utility_choice_by_choice(loaded: Loaded, work: Work) -> Outcome:
    """One choice a forward, logits of every position: the first version anybody writes."""
    model, _ = loaded
    margins = []
    for layer, head in work.heads:
        with without(model, layer, head):
            found = []
            for question in work.questions:
                scores = []
                for choice in question.choices:
                    ids = torch.tensor([[*question.prompt, *choice]])
                    logits = model(input_ids=ids, use_cache=False).logits
                    scores += mean_log_probs(logits[:, len(question.prompt) - 1 :], [choice])
                found.append(margin(scores, question.answer))
        margins.append(found)
    return {"margins": margins}


def utility(loaded: Loaded, work: Work) -> Outcome:
    """All choices of a question in one forward, logits of the choices' positions only: the tuned version."""
    model, _ = loaded
    margins = []
    for layer, head in work.heads:
        with without(model, layer, head):
            found = []
            for question in work.questions:
                ids, n_scored = choice_batch(question)
                logits = model(input_ids=ids, use_cache=False, logits_to_keep=n_scored).logits
                found.append(margin(mean_log_probs(logits, question.choices), question.answer))
        margins.append(found)
    return {"margins": margins}


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
            "utility": utility,
            "utility-choice-by-choice": utility_choice_by_choice,
            "safety": safety,
            "safety-prompt-by-prompt": safety_prompt_by_prompt,
        },
    )
