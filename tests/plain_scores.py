"""Log-probabilities by plain transformers: one conversation a forward, no batch, no padding, nothing of castune's."""

from __future__ import annotations

from typing import Any

import torch


def opened(tokenizer: Any, text: str) -> list[int]:
    """Ids of a conversation of one turn up to the reply."""
    turns = [{"role": "user", "content": text}]
    whole = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    return tokenizer(whole, add_special_tokens=False)["input_ids"]


def replied(tokenizer: Any, text: str, reply: str) -> list[int]:
    """Ids of a reply with the end of its turn."""
    turns = [{"role": "user", "content": text}, {"role": "assistant", "content": reply}]
    whole = tokenizer(tokenizer.apply_chat_template(turns, tokenize=False), add_special_tokens=False)["input_ids"]
    ids = whole[len(opened(tokenizer, text)) :]
    # What the template puts behind the end of the turn is no part of it.
    end = max(i for i, token in enumerate(ids) if token == tokenizer.eos_token_id)
    return ids[: end + 1]


@torch.no_grad()
def logs(model: Any, start: list[int], reply: list[int]) -> torch.Tensor:
    """Log-probabilities over the vocabulary before each token of a reply, [T, V]."""
    logits = model(input_ids=torch.tensor([start + reply])).logits[0].double()
    return logits[len(start) - 1 : -1].log_softmax(-1)


def mean_log(model: Any, start: list[int], reply: list[int]) -> float:
    found = logs(model, start, reply)
    return sum(found[t, token].item() for t, token in enumerate(reply)) / len(reply)
