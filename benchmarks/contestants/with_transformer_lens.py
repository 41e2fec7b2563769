"""The same with TransformerLens: `run_with_hooks`, a head zeroed in `hook_z`.

Attribution uses the first half of its `attribution_patch`, activations and gradients of one forward and backward. The
other half wants a second prompt, whose activations replace those of the first; here zero does.

The bridge wraps the transformers model, switches it to eager attention and computes attention step by step so that
every hook point fires; it has `start_at_layer`, but the layers below still run.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformer_lens import TransformerBridge
from transformer_lens.tools.analysis.attribution_patching import cache_activation_and_gradient
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
            found.append(margin(mean_log_probs(logits, question.choices), question.answer).item())
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


def attributed_utility(model: Any, work: Work) -> Outcome:
    """What zeroing each head changes in the margins of questions, to first order."""
    return _attributed(model, work, work.questions)


def attributed_safety(model: Any, work: Work) -> Outcome:
    """The same in the margins of refusals over the model's own replies."""
    return _attributed(model, work, work.pairs)


@torch.enable_grad()
def _attributed(model: Any, work: Work, questions: list[Question]) -> Outcome:
    """One forward and backward an example, for all heads; it cannot pass `logits_to_keep` on."""
    names = [f"blocks.{layer}.attn.hook_z" for layer in work.layers]
    found = []
    for question in questions:
        ids, n_scored = choice_batch(question)

        def outcome(logits: Tensor, question: Question = question, n_scored: int = n_scored) -> Tensor:
            return margin(mean_log_probs(logits[:, -n_scored:], question.choices), question.answer)

        # What a hook of `hook_z` gets is a view that the model does not use: the backward pass needs a goal below.
        cache = cache_activation_and_gradient(model, ids, outcome, ["hook_embed", *names])
        changes = [
            head_changes(cache.activations[name].flatten(2), cache.gradients[name].flatten(2), model.cfg.n_heads)
            for name in names
        ]
        found.append(torch.cat(changes))
    return {"changes": torch.stack(found, dim=1).tolist()}


if __name__ == "__main__":
    main(
        load,
        {
            "utility": utility,
            "safety": safety,
            "attributed-utility": attributed_utility,
            "attributed-safety": attributed_safety,
        },
    )
