"""castune's ablation sweep against the loop one would write with transformers; prints one table.

Same prompts, same dtype, same heads, one run. The ratio counts; absolute seconds depend on the machine.
"""

from __future__ import annotations

import argparse
import time

import numpy as np
import torch

import castune as ct
from castune.core.ablation import can_resume
from castune.core.heads import HeadLayout
from castune.core.scoring import choice_scores, is_correct, question_rows, shared_if_exact
from castune.data.chat import ChatFormat
from castune.diagnose.ablate import Ablator, scored_outcomes


def plain_loop(model, chat, layout, heads, questions) -> list[list[bool]]:
    """One head, one question, one choice at a time: a forward pre-hook on the output projection."""
    found = []
    for layer, head in heads:
        columns = layout.output_columns(layer, head)

        def zero(_module, args, columns=columns):
            z = args[0].clone()
            z[..., columns] = 0
            return (z,)

        handle = layout.output_projection(model, layer).register_forward_pre_hook(zero)
        outcomes = []
        for question in questions:
            scores = []
            for choice in question.choices:
                prompt, _ = chat.prompt_ids(question)
                reply = chat.reply_ids(choice, end_of_turn=False)
                with torch.no_grad():
                    logits = model(torch.tensor([[*prompt, *reply]]), use_cache=False).logits[0].float()
                log_probs = logits.log_softmax(-1)[len(prompt) - 1 : -1]
                scores.append(log_probs.gather(1, torch.tensor(reply)[:, None]).mean().item())
            outcomes.append(int(np.argmax(scores)) == question.answer)
        handle.remove()
        found.append(outcomes)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--heads", type=int, default=20)
    parser.add_argument("--questions", type=int, default=8)
    parser.add_argument("--dtype", default="float32")
    options = parser.parse_args()
    model, tokenizer = ct.load("default", dtype=options.dtype)
    chat, layout = ChatFormat(tokenizer), HeadLayout.of(model)
    heads = [layout.heads[i] for i in np.linspace(0, len(layout.heads) - 1, options.heads).astype(int)]
    questions = ct.examples("starter-utility", limit=options.questions)

    started = time.perf_counter()
    expected = plain_loop(model, chat, layout, heads, questions)
    plain_seconds = time.perf_counter() - started

    started = time.perf_counter()
    rows_of = shared_if_exact(model, lambda share: [question_rows(chat, q, share_prompt=share) for q in questions])
    ablator = Ablator(model, layout, heads, can_resume(model, layout))
    outcomes = scored_outcomes(
        ablator,
        rows_of,
        lambda n, values: is_correct(questions[n], choice_scores(chat, questions[n], values)),
        batch_tokens=2048,
    )
    castune_seconds = time.perf_counter() - started

    agreement = np.mean(np.array(expected) == outcomes.ablated_HN.astype(bool))
    print(f"utility sweep, default model, {options.dtype}, {len(heads)} heads x {len(questions)} questions")
    print(f"{'':24}{'seconds':>10}{'ratio':>8}")
    print(f"{'plain hook loop':24}{plain_seconds:10.1f}{1:8.1f}")
    print(f"{'castune':24}{castune_seconds:10.1f}{plain_seconds / castune_seconds:8.1f}")
    print(f"decisions that agree: {agreement:.4f}")


if __name__ == "__main__":
    main()
