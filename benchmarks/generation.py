"""Replies in batches against one `generate` a prompt: tokens a second, and whether the replies are the same.

    python benchmarks/generation.py --source xstest=PATH --examples 64 --max-new-tokens 128 --dtype float32

One run, the same model in memory, the same prompts and tokens; both are greedy, by the same end-of-turn tokens. The
two alternate in blocks of prompts, so that what else the machine does meets both.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
from transformers import GenerationConfig

import castune as ct
from castune.core.generation import generate_replies
from castune.data.chat import ChatFormat


@torch.no_grad()
def one_by_one(model: Any, prompts: list[list[int]], max_new_tokens: int, end: list[int]) -> list[tuple[int, ...]]:
    """What one writes with transformers: a call a prompt."""
    config = GenerationConfig(max_new_tokens=max_new_tokens, eos_token_id=end, pad_token_id=end[0], do_sample=False)
    model.generation_config = config
    replies = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        tokens = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids))[0, len(prompt) :].tolist()
        replies.append(tuple(tokens[: next((n for n, t in enumerate(tokens) if t in end), None)]))
    return replies


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="default")
    parser.add_argument("--source", default="starter-overrefusal-eval")
    parser.add_argument("--examples", type=int, default=64)
    parser.add_argument("--blocks", type=int, default=2)
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--batch-tokens", type=int, default=65536, help="16 times that of `castune evaluate`")
    parser.add_argument("--dtype", default="float32")
    arguments = parser.parse_args()
    model, tokenizer = ct.load(arguments.model, dtype=arguments.dtype)
    chat = ChatFormat(tokenizer, max_length=2048)
    examples = ct.examples(arguments.source, limit=arguments.examples)
    prompts = [chat.prompt_ids(example)[0] for example in examples]
    end = chat.end_tokens(model)
    seconds = {"one by one": 0.0, "batched": 0.0}
    n_tokens, n_same = {"one by one": 0, "batched": 0}, 0
    size = -(-len(prompts) // arguments.blocks)
    for start in range(0, len(prompts), size):
        block = prompts[start : start + size]
        started = time.perf_counter()
        single = one_by_one(model, block, arguments.max_new_tokens, end)
        between = time.perf_counter()
        batched = generate_replies(
            model,
            tokenizer,
            block,
            max_new_tokens=arguments.max_new_tokens,
            end_tokens=end,
            batch_tokens=arguments.batch_tokens,
        )
        seconds["one by one"] += between - started
        seconds["batched"] += time.perf_counter() - between
        n_tokens["one by one"] += sum(map(len, single))
        n_tokens["batched"] += sum(len(reply.tokens) for reply in batched)
        n_same += sum(one == other.tokens for one, other in zip(single, batched, strict=True))
    print(f"{arguments.model}, {arguments.dtype}, {len(prompts)} prompts, limit {arguments.max_new_tokens} new tokens")
    print(f"{'':12}{'tokens':>9}{'seconds':>9}{'tokens/s':>10}")
    for name, took in seconds.items():
        print(f"{name:12}{n_tokens[name]:9,}{took:9.1f}{n_tokens[name] / took:10.1f}")
    speed = {name: n_tokens[name] / took for name, took in seconds.items()}
    ratio = speed["batched"] / speed["one by one"]
    print(f"batched is {ratio:.2f} times as fast; {n_same} of {len(prompts)} replies equal")


if __name__ == "__main__":
    main()
