"""The same with nnsight: one trace a head and question, which edits the input of the output projection.

Attribution is one trace a question, with the backward pass in it.
"""

from __future__ import annotations

from typing import Any

import nnsight
import torch
from nnsight import TransformersModel
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
    # `backward` would compute and keep the gradient of every weight.
    model.requires_grad_(False)
    return TransformersModel(model, tokenizer=tokenizer, task="text-generation")


def utility(model: Any, work: Work) -> Outcome:
    """One trace a head and question; logits of the choices' positions only."""
    width = model.config.hidden_size // model.config.num_attention_heads
    margins = []
    for layer, head in work.heads:
        columns = slice(head * width, (head + 1) * width)
        projection = model.model.layers[layer].self_attn.o_proj
        found = []
        for question in work.questions:
            ids, n_scored = choice_batch(question)
            with model.trace(ids, use_cache=False, logits_to_keep=n_scored):
                projection.input[..., columns] = 0
                logits = model.lm_head.output.save()
            found.append(margin(mean_log_probs(logits, question.choices), question.answer).item())
        margins.append(found)
    return {"margins": margins}


def safety(model: Any, work: Work) -> Outcome:
    """One traced `generate` a head for all prompts; the head is zeroed at every step."""
    width = model.config.hidden_size // model.config.num_attention_heads
    ids, mask = left_padded(work.prompts, work.end_tokens[0])
    options = {
        "max_new_tokens": work.max_new_tokens,
        "do_sample": False,
        "eos_token_id": work.end_tokens,
        "pad_token_id": work.end_tokens[0],
    }
    judged, texts = [], []
    for layer, head in work.heads:
        columns = slice(head * width, (head + 1) * width)
        projection = model.model.layers[layer].self_attn.o_proj
        # The open loop ends with the generation and takes what follows in its block with it, so the result is read
        # in an invoke of its own.
        with model.generate(**options) as tracer:
            with tracer.invoke({"input_ids": ids, "attention_mask": mask}):
                for _step in tracer.iter[:]:
                    projection.input[..., columns] = 0
            with tracer.invoke():
                output = tracer.result.save()
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
    """One trace with its backward pass an example, for all heads; logits of the choices' positions only."""
    projections = [model.model.layers[layer].self_attn.o_proj for layer in work.layers]
    n_heads = model.config.num_attention_heads
    found = []
    for question in questions:
        ids, n_scored = choice_batch(question)
        with model.trace(ids, use_cache=False, logits_to_keep=n_scored):
            changes = nnsight.save([])
            passed = []
            for projection in projections:
                passed.append(projection.input.requires_grad_())
            outcome = margin(mean_log_probs(model.lm_head.output, question.choices), question.answer)
            with outcome.backward():
                # Gradients have to be asked for in the order in which they come.
                for z in reversed(passed):
                    changes.append(head_changes(z, z.grad, n_heads))
        found.append(torch.cat(changes[::-1]))
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
