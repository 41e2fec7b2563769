"""The same loop with nnsight: one trace a head and question, which edits the input of the output projection."""

from __future__ import annotations

from typing import Any

from nnsight import TransformersModel
from work import Outcome, Work, choice_batch, left_padded, main, margin, mean_log_probs, refusals

import castune as ct


def load(work: Work) -> Any:
    model, tokenizer = ct.load("default", dtype=work.dtype)
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
            found.append(margin(mean_log_probs(logits, question.choices), question.answer))
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


if __name__ == "__main__":
    main(load, {"utility": utility, "safety": safety})
