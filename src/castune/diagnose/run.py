"""`diagnose`: from a model and two calibration sets to its conflict map."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from castune.artifacts import ConflictMap
from castune.artifacts.conflict_map import SCHEMA
from castune.artifacts.files import replacing
from castune.config import DiagnoseConfig
from castune.core.ablation import can_resume
from castune.core.generation import generate_replies
from castune.core.heads import HeadId, HeadLayout
from castune.core.judges import judge as judge_named
from castune.core.modes import evaluation_mode
from castune.core.progress import progress
from castune.core.provenance import model_record, provenance
from castune.core.ranking import bucket_numbers, percentile_rank, tie_share
from castune.core.scoring import (
    answer_margin,
    choice_scores,
    is_correct,
    question_rows,
    reply_means,
    reply_rows,
    shared_if_exact,
)
from castune.data.chat import ChatFormat
from castune.data.example import Example, content_hash, require_questions, require_replies
from castune.data.rows import Row
from castune.diagnose.ablate import Ablator, Outcomes, mean_replacements, refusal_outcomes, scored_outcomes
from castune.diagnose.gradients import gram_matrices, partial_gradients
from castune.diagnose.score import (
    Floats,
    conflict_from_gram,
    conflict_score,
    conflict_standard_error,
    decision_shift,
    functional_sensitivity,
    margin_shift,
)
from castune.errors import CastuneError, DataError


def diagnose(
    model: Any,
    tokenizer: Any,
    *,
    safety: Sequence[Example],
    utility: Sequence[Example],
    config: DiagnoseConfig | None = None,
    out: str | Path | None = None,
    sources: dict[str, str] | None = None,
    seed: int | None = None,
) -> ConflictMap:
    """Measure O(h), H_gen(h), H_safe(h), S(h) and C(h) of every head (Sections 3.2-3.4 of the paper).

    Args:
        model: a transformers model for causal language modelling; it is left as it was.
        tokenizer: its tokenizer, with a chat template.
        safety: D_safe, harmful prompts with a safe reply each.
        utility: D_util, multiple-choice questions.
        config: settings; the paper's by default.
        out: a run directory to write `conflict_map.parquet` and `ablation.parquet` into.
        sources: names of the data sources, `{"safety": ..., "utility": ...}`, for the record.
        seed: seed the subsets were drawn with, for the record.

    Returns:
        The conflict map, one row a head.

    Raises:
        UnsupportedArchitecture: the heads of this model could not be located.
        CastuneError: data without replies or answers, layers that do not exist, a loss that is not finite.
    """
    config = config or DiagnoseConfig()
    started = time.perf_counter()
    chat = ChatFormat(tokenizer, max_length=config.max_length)
    safety_rows, utility_rows = _loss_rows(chat, safety, utility)
    layout = HeadLayout.of(model)
    heads = _heads(layout, config.layers)
    with evaluation_mode(model):
        gram = _gradients(model, layout, heads, safety_rows, utility_rows, config)
        ablator = _ablator(model, layout, heads, [*safety_rows, *utility_rows], config)
        of_utility = _measure_utility(ablator, chat, utility, config)
        of_safety = _measure_safety(ablator, tokenizer, chat, safety, config)

    sources = sources or {}
    metadata = {
        "model": model_record(model),
        "settings": config.model_dump(mode="json"),
        "data": {
            "safety": _data_record(sources.get("safety"), safety, safety_rows),
            "utility": _data_record(sources.get("utility"), utility, utility_rows),
        },
        "baseline": {
            "utility_accuracy": _rate(of_utility.decisions_N),
            "refusal_rate": _rate(of_safety.decisions_N),
        },
        "resumed": ablator.resumable,
        "seconds": round(time.perf_counter() - started, 2),
        "provenance": provenance(seed),
    }
    cmap = _conflict_map(heads, gram, of_utility.outcomes, of_safety.outcomes, config, metadata)
    if out is not None:
        _save_outcomes(Path(out), heads, utility, of_utility.outcomes, safety, of_safety.outcomes)
        cmap.save(out)
    return cmap


@dataclass(frozen=True)
class _Measured:
    """Outcomes of one set, and the whole model's decisions (NaN: unscored) on it."""

    outcomes: Outcomes
    decisions_N: Floats


@dataclass(frozen=True)
class _Gram:
    """Inner products of partial gradients; the first `n_safety` belong to the safety loss."""

    products_HCC: Floats
    n_safety: int


def _loss_rows(chat: ChatFormat, safety: Sequence[Example], utility: Sequence[Example]) -> tuple[list[Row], list[Row]]:
    for name, examples in (("safety", safety), ("utility", utility)):
        if len(examples) < 2:
            raise DataError(f"{name}: {len(examples)} examples, a diagnosis needs at least 2")
    require_replies(safety, "safety", "prompt, target")
    require_questions(utility, "utility")
    return [chat.loss_row(e) for e in safety], [chat.loss_row(e) for e in utility]


def _heads(layout: HeadLayout, layers: Sequence[int] | None) -> list[HeadId]:
    if layers is None:
        return list(layout.heads)
    unknown = [layer for layer in layers if layer >= layout.n_layers or not layout.n_heads(layer)]
    if unknown or not layers:
        raise CastuneError(f"layers {list(layers)}: accepted are layers with heads, of 0 to {layout.n_layers - 1}")
    return [head for head in layout.heads if head.layer in layers]


def _gradients(
    model: Any,
    layout: HeadLayout,
    heads: Sequence[HeadId],
    safety_rows: Sequence[Row],
    utility_rows: Sequence[Row],
    config: DiagnoseConfig,
) -> _Gram:
    layers = sorted({head.layer for head in heads})
    with progress("gradients", len(safety_rows) + len(utility_rows)) as advance:
        safety, utility = (
            partial_gradients(
                model,
                layout,
                layers,
                rows,
                n_chunks=config.gradient_chunks,
                batch_tokens=config.batch_tokens,
                advance=advance,
            )
            for rows in (safety_rows, utility_rows)
        )
    return _Gram(gram_matrices(layout, layers, [*safety, *utility]), len(safety))


def _ablator(
    model: Any, layout: HeadLayout, heads: Sequence[HeadId], rows: Sequence[Row], config: DiagnoseConfig
) -> Ablator:
    filling = None
    if config.ablation == "mean":
        filling = mean_replacements(model, layout, rows, batch_tokens=config.batch_tokens)
    return Ablator(model, layout, heads, can_resume(model, layout), filling)


def _measure_utility(
    ablator: Ablator, chat: ChatFormat, examples: Sequence[Example], config: DiagnoseConfig
) -> _Measured:
    rows_of = shared_if_exact(
        ablator.model, lambda share: [question_rows(chat, e, share_prompt=share) for e in examples]
    )

    def outcome(n: int, values: Sequence[Floats]) -> float:
        scores = choice_scores(chat, examples[n], values)
        if not np.isfinite(scores).all():
            return np.nan
        return answer_margin(examples[n], scores) if config.measure == "margin" else is_correct(examples[n], scores)

    with progress("ablations, utility", ablator.work_per_row * sum(map(len, rows_of))) as advance:
        outcomes = scored_outcomes(ablator, rows_of, outcome, batch_tokens=config.batch_tokens, advance=advance)
    decisions_N = outcomes.baseline_N
    return _Measured(outcomes, (decisions_N > 0).astype(float) if config.measure == "margin" else decisions_N)


def _measure_safety(
    ablator: Ablator, tokenizer: Any, chat: ChatFormat, examples: Sequence[Example], config: DiagnoseConfig
) -> _Measured:
    if config.measure == "margin":
        return _refusal_margins(ablator, tokenizer, chat, examples, config)
    with progress("ablations, safety", len(examples) * (1 + len(ablator.heads))) as advance:
        outcomes = refusal_outcomes(
            ablator,
            tokenizer,
            chat,
            examples,
            judge_named(config.judge),
            max_new_tokens=config.max_new_tokens,
            batch_tokens=config.batch_tokens,
            advance=advance,
        )
    return _Measured(outcomes, outcomes.baseline_N)


def _refusal_margins(
    ablator: Ablator, tokenizer: Any, chat: ChatFormat, examples: Sequence[Example], config: DiagnoseConfig
) -> _Measured:
    """Mean log-probability a token of the refusal minus that of the model's own reply, over their first tokens."""
    prompts = [chat.prompt_ids(example, reserve=config.max_new_tokens)[0] for example in examples]
    replies = generate_replies(
        ablator.model,
        tokenizer,
        prompts,
        max_new_tokens=config.max_new_tokens,
        end_tokens=chat.end_tokens(ablator.model),
        batch_tokens=config.batch_tokens,
    )
    pairs = []
    for example, reply in zip(examples, replies, strict=True):
        own = [*reply.tokens, *([chat.end_token] if reply.finished else [])]
        assert example.reply is not None
        pairs.append([chat.reply_ids(example.reply)[: config.max_new_tokens], own[: config.max_new_tokens]])
    rows_of = shared_if_exact(
        ablator.model,
        lambda share: [reply_rows(chat, e, pair, share_prompt=share) for e, pair in zip(examples, pairs, strict=True)],
    )

    def margin(n: int, values: Sequence[Floats]) -> float:
        refusal, own = reply_means([len(tokens) for tokens in pairs[n]], values)
        return float(refusal - own)

    with progress("ablations, safety", ablator.work_per_row * sum(map(len, rows_of))) as advance:
        outcomes = scored_outcomes(ablator, rows_of, margin, batch_tokens=config.batch_tokens, advance=advance)
    verdicts = judge_named(config.judge)([e.prompt for e in examples], [reply.text for reply in replies])
    return _Measured(outcomes, np.array([np.nan if v is None else float(v) for v in verdicts]))


def _conflict_map(
    heads: Sequence[HeadId],
    gram: _Gram,
    utility: Outcomes,
    safety: Outcomes,
    config: DiagnoseConfig,
    metadata: dict[str, Any],
) -> ConflictMap:
    shift = margin_shift if config.measure == "margin" else decision_shift
    utility_shift, utility_se = shift(utility.ablated_HN, utility.baseline_N)
    safety_shift, safety_se = shift(safety.ablated_HN, safety.baseline_N)
    for name, values in (("utility", utility_shift), ("safety", safety_shift)):
        if not np.isfinite(values).all():
            raise CastuneError(
                f"the {name} shift of {int((~np.isfinite(values)).sum())} heads could not be measured: no example was "
                "scored with and without them (empty replies, or scores that are not finite); try --dtype float32"
            )
    conflict = conflict_from_gram(gram.products_HCC, gram.n_safety)
    sensitivity = functional_sensitivity(utility_shift, safety_shift, rank=config.sensitivity_rank)
    score = conflict_score(conflict, sensitivity)
    columns = {
        "unit": ["q_head"] * len(heads),
        "layer": [head.layer for head in heads],
        "head": [head.head for head in heads],
        "optimization_conflict": conflict,
        "optimization_conflict_se": _nullable(conflict_standard_error(gram.products_HCC, gram.n_safety)),
        "utility_shift": utility_shift,
        "utility_shift_se": _nullable(utility_se),
        "safety_shift": safety_shift,
        "safety_shift_se": _nullable(safety_se),
        "utility_rank": percentile_rank(utility_shift),
        "safety_rank": percentile_rank(safety_shift),
        "functional_sensitivity": sensitivity,
        "conflict_score": score,
        "bucket": bucket_numbers(score),
    }
    ties = {"utility_shift": tie_share(utility_shift), "safety_shift": tie_share(safety_shift)}
    return ConflictMap(pa.table(columns, schema=SCHEMA), {**metadata, "ties": ties})


def _nullable(values: Floats) -> list[float | None]:
    return [float(value) if np.isfinite(value) else None for value in values]


def _data_record(source: str | None, examples: Sequence[Example], rows: Sequence[Row]) -> dict[str, Any]:
    return {
        "source": source,
        "n": len(examples),
        "hash": content_hash(examples),
        "cut": sum(row.cut for row in rows),
    }


def _rate(decisions_N: Floats) -> dict[str, Any]:
    scored = decisions_N[np.isfinite(decisions_N)]
    n = len(scored)
    return {
        "value": float(scored.mean()) if n else None,
        "standard_error": float(scored.std(ddof=1) / np.sqrt(n)) if n > 1 else None,
        "n": n,
        "unscored": len(decisions_N) - n,
    }


def _save_outcomes(
    out: Path,
    heads: Sequence[HeadId],
    utility: Sequence[Example],
    utility_outcomes: Outcomes,
    safety: Sequence[Example],
    safety_outcomes: Outcomes,
) -> None:
    """`ablation.parquet`: head x example outcomes of both sets, null where unscored."""
    tables = []
    for objective, examples, outcomes in (
        ("utility", utility, utility_outcomes),
        ("safety", safety, safety_outcomes),
    ):
        n_heads, n_examples = outcomes.ablated_HN.shape
        tables.append(
            pa.table(
                {
                    "objective": [objective] * (n_heads * n_examples),
                    "layer": pa.array(np.repeat([h.layer for h in heads], n_examples), pa.int32()),
                    "head": pa.array(np.repeat([h.head for h in heads], n_examples), pa.int32()),
                    "example": [example.id for example in examples] * n_heads,
                    "baseline": pa.array(np.tile(outcomes.baseline_N, n_heads), from_pandas=True),
                    "ablated": pa.array(outcomes.ablated_HN.ravel(), from_pandas=True),
                }
            )
        )
    with replacing(out / "ablation.parquet") as temporary:
        pq.write_table(pa.concat_tables(tables), temporary)
