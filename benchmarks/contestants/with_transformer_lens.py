"""The same loop with TransformerLens: `run_with_hooks`, a head zeroed in `hook_z`.

The bridge wraps the transformers model, switches it to eager attention and computes attention step by step so that
every hook point fires; it has `start_at_layer`, but the layers below still run.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformer_lens import TransformerBridge
from work import Outcome, Work, choice_batch, left_padded, main, margin, mean_log_probs, refusals

import castune as ct


def load(work: Work) -> Any:
    model, tokenizer = ct.load("default", dtype=work.dtype)
    # The name is only a label: configuration and weights are those of `hf_model`.
    return TransformerBridge.boot_transformers(
        "HuggingFaceTB/SmolLM2-135M-Instruct", hf_model=model, tokenizer=tokenizer, device="cpu", dtype=model.dtype
    )


def zero(head: int) -> Callable[..., Any]:
    def hook(z_BSHK: Any, hook: Any) -> Any:
        z_BSHK[:, :, head] = 0
        return z_BSHK

    return hook


def utility(model: Any, work: Work) -> Outcome:
    """One `run_with_hooks` a head and question; logits of the choices' positions only."""
    margins = []
    for layer, head in work.heads:
        hooks = [(f"blocks.{layer}.attn.hook_z", zero(head))]
        found = []
        for question in work.questions:
            ids, n_scored = choice_batch(question)
            logits = model.run_with_hooks(ids, fwd_hooks=hooks, use_cache=False, logits_to_keep=n_scored)
            found.append(margin(mean_log_probs(logits, question.choices), question.answer))
        margins.append(found)
    return {"margins": margins}


def safety(model: Any, work: Work) -> Outcome:
    """One `generate` a head for all prompts, inside the hook's context."""
    ids, mask = left_padded(work.prompts, work.end_tokens[0])
    judged, texts = [], []
    for layer, head in work.heads:
        with model.hooks(fwd_hooks=[(f"blocks.{layer}.attn.hook_z", zero(head))]):
            output = model.generate(
                ids,
                attention_mask=mask,
                max_new_tokens=work.max_new_tokens,
                do_sample=False,
                eos_token_id=work.end_tokens[0],
                return_type="tokens",
                verbose=False,
            )
        verdicts, replied = refusals(work, model.tokenizer, output[:, ids.shape[1] :].tolist())
        judged.append(verdicts)
        texts.append(replied)
    return {"refusals": judged, "replies": texts}


if __name__ == "__main__":
    main(load, {"utility": utility, "safety": safety})
