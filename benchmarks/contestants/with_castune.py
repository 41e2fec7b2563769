"""castune's own sweeps. Nothing else in this benchmark calls its engine: change this file when the engine changes."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from work import Outcome, Question, Work, main

import castune as ct
from castune.artifacts.unit import joined
from castune.core.ablation import can_resume
from castune.core.flops import ForwardFlops
from castune.core.generation import generate_replies
from castune.core.heads import HeadLayout
from castune.core.journal import Journal
from castune.core.refusals import is_settled, read_by
from castune.core.scoring import reply_rows, shared_if_exact
from castune.core.shards import Shard
from castune.core.units import UnitLayout
from castune.data.chat import ChatFormat
from castune.data.example import Example
from castune.diagnosis.ablator import Ablator
from castune.diagnosis.decode import ReplyMeasure
from castune.diagnosis.objectives import Objectives
from castune.diagnosis.outcomes import Outcome as Margins
from castune.diagnosis.outcomes import Preference
from castune.diagnosis.sweep import Measure, Outcomes, sweep

Loaded = tuple[Any, Any]

# A diagnosis measures the best number once at its start; here it is fixed, so that runs can be compared.
BATCH_TOKENS = 2048


def load(work: Work) -> Loaded:
    return ct.load("default", dtype=work.dtype)


def refusal_pairs(loaded: Loaded, examples: Sequence[Example], *, max_new_tokens: int) -> list[Question]:
    """`Work.pairs` of harmful prompts; the model's own replies are generated as a diagnosis does it."""
    model, tokenizer = loaded
    chat, n_tokens = ChatFormat(tokenizer), ct.DiagnoseConfig().margin_tokens
    prompts = [chat.prompt_ids(example)[0] for example in examples]
    replies = generate_replies(
        model,
        tokenizer,
        prompts,
        max_new_tokens=max_new_tokens,
        end_tokens=chat.end_tokens(model),
        batch_tokens=BATCH_TOKENS,
    )
    pairs = []
    for example, asked, reply in zip(examples, prompts, replies, strict=True):
        assert example.reply is not None
        prompt, [refusal] = chat.continuations(example, [example.reply])
        own = [*asked[len(prompt) :], *reply.tokens, *([chat.end_token] if reply.finished else [])]
        pairs.append(Question(prompt, [refusal[:n_tokens], own[:n_tokens]], 0))
    return pairs


def _ablator(model: Any, work: Work) -> Ablator:
    layout = HeadLayout.of(model)
    return Ablator(model, UnitLayout(layout), joined(work.heads), can_resume(model, layout))


def _swept(name: str, ablator: Ablator, measure: Measure) -> Outcomes:
    outcomes = sweep(name, ablator, measure, journal=Journal(None, "benchmark"), shard=Shard())
    assert outcomes is not None
    return outcomes


def _ablated(name: str, ablator: Ablator, measure: Measure) -> list[list[float]]:
    values: list[list[float]] = _swept(name, ablator, measure).ablated_HN.tolist()
    return values


def _objectives(loaded: Loaded, work: Work) -> Objectives:
    model, tokenizer = loaded
    config = ct.DiagnoseConfig(measure="margin", max_new_tokens=work.max_new_tokens, batch_tokens=BATCH_TOKENS)
    return Objectives(_ablator(model, work), tokenizer, ChatFormat(tokenizer), config)


def utility(loaded: Loaded, work: Work) -> Outcome:
    """The utility sweep as `castune diagnose` runs it; its checks at the start and the whole model are timed too."""
    objectives = _objectives(loaded, work)
    measure = objectives.utility_measure(_questions(work))
    return {"margins": _ablated("utility", objectives.ablator, measure), "flops": _flops(objectives.ablator, measure)}


def _questions(work: Work) -> list[Example]:
    return ct.examples("starter-utility", limit=work.n_questions, seed=work.example_seed)[: len(work.questions)]


def _harmful(work: Work) -> list[Example]:
    return ct.examples("starter-safety", limit=work.n_prompts, seed=work.example_seed)[: len(work.prompts)]


def _flops(ablator: Ablator, measure: Measure) -> float:
    """FLOPs of a sweep: every batch once for the whole model, and once without each head."""
    of_forward = ForwardFlops.of(ablator.model, ablator.layout)
    first_layers = [0, *(ablator.first_layer(head.layer) for head in ablator.heads)]
    return sum(batch.flops(of_forward, first_layer=layer) for batch in measure.batches for layer in first_layers)


def safety_margins(loaded: Loaded, work: Work) -> Outcome:
    """The safety sweep by margins, which nobody else has: the whole model's replies are generated, no ablated ones."""
    return _margins(_objectives(loaded, work), work)


def safety_long_margins(loaded: Loaded, work: Work) -> Outcome:
    """The same over all tokens of the replies, not only the first ones."""
    objectives = _objectives(loaded, work)
    config = objectives.config.model_copy(update={"margin_tokens": work.max_new_tokens})
    return _margins(replace(objectives, config=config), work)


def _margins(objectives: Objectives, work: Work) -> Outcome:
    examples = _harmful(work)
    measure = objectives.margin_measure(examples, objectives.replies(examples))
    margins = _ablated("safety", objectives.ablator, measure)
    return {"refusals": None, "replies": None, "margins": margins, "flops": _flops(objectives.ablator, measure)}


def attributed_utility(loaded: Loaded, work: Work) -> Outcome:
    """The utility sweep of a map by attribution, as `castune diagnose` runs it."""
    objectives = _objectives(loaded, work)
    return _attributed(objectives, objectives.utility_outcome(_questions(work)), work)


def attributed_safety(loaded: Loaded, work: Work) -> Outcome:
    """The safety sweep of such a map without the model's own replies, which are given here, as to the others."""
    objectives = _objectives(loaded, work)
    given = list(zip(_harmful(work), work.pairs, strict=True))
    rows_of = shared_if_exact(
        objectives.ablator.model,
        lambda share: [
            reply_rows(objectives.chat, example, pair.prompt, pair.choices, share_prompt=share)
            for example, pair in given
        ],
    )
    return _attributed(objectives, Preference(rows_of), work)


def attributed_safety_with_replies(loaded: Loaded, work: Work) -> Outcome:
    """The safety sweep of such a map as `castune diagnose` runs it: the model's own replies are generated first."""
    objectives, examples = _objectives(loaded, work), _harmful(work)
    return _attributed(objectives, objectives.refusal_outcome(examples, objectives.replies(examples)), work)


def _attributed(objectives: Objectives, outcome: Margins, work: Work) -> Outcome:
    """All heads of the layers, as for the others: they come from the same backward pass."""
    ablator = objectives.ablator
    heads = joined(head for head in ablator.layout.heads if head.layer in work.layers)
    objectives = replace(objectives, ablator=replace(ablator, heads=heads))
    outcomes = _swept("attribution", objectives.ablator, objectives.attributed_measure(outcome))
    return {"changes": (outcomes.ablated_HN - outcomes.baseline_N).tolist()}


def safety(loaded: Loaded, work: Work) -> Outcome:
    """The safety sweep as `castune diagnose` runs it; its checks at the start and the whole model are timed too.

    Replies are decoded only as far as the judge needs them, so there are no full replies to compare.
    """
    found = _safety(loaded, work, read_by("prefix"), partial(is_settled, "prefix"))
    return {"refusals": [[None if r != r else bool(r) for r in refused] for refused in found], "replies": None}


def safety_replies(loaded: Loaded, work: Work) -> Outcome:
    """The same sweep with a judge that tells replies apart instead of judging them, so that all are decoded in full.

    For comparison with the others' replies, not for timing: where a model refuses nothing, equal verdicts say little.
    """
    texts: dict[int, str] = {}

    def name(_prompts: Sequence[str], replies: Sequence[str]) -> list[Any]:
        names = [zlib.crc32(reply.encode()) for reply in replies]
        texts.update(zip(names, replies, strict=True))
        return names

    found = _safety(loaded, work, name, lambda _reply: False)
    return {"refusals": None, "replies": [[texts[int(reply)] for reply in replies] for replies in found]}


def _safety(
    loaded: Loaded,
    work: Work,
    judge: Callable[[Sequence[str], Sequence[str]], list[bool | None]],
    settled: Callable[[str], bool],
) -> list[list[float]]:
    model, tokenizer = loaded
    ablator = _ablator(model, work)
    replies = generate_replies(
        model,
        tokenizer,
        work.prompts,
        max_new_tokens=work.max_new_tokens,
        end_tokens=work.end_tokens,
        batch_tokens=BATCH_TOKENS,
    )
    measure = ReplyMeasure(
        ablator,
        tokenizer,
        work.prompts,
        work.prompt_texts,
        replies,
        end_tokens=work.end_tokens,
        judge=judge,
        is_settled=settled,
        max_new_tokens=work.max_new_tokens,
        batch_tokens=BATCH_TOKENS,
    )
    return _ablated("safety", ablator, measure)


if __name__ == "__main__":
    main(
        load,
        {
            "utility": utility,
            "safety": safety,
            "safety-replies": safety_replies,
            "safety-margins": safety_margins,
            "safety-long-margins": safety_long_margins,
            "attributed-utility": attributed_utility,
            "attributed-safety": attributed_safety,
            "attributed-safety-with-replies": attributed_safety_with_replies,
        },
    )
