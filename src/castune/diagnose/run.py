"""`diagnose`: from a model and two calibration sets to its conflict map."""

from __future__ import annotations

import logging
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
from castune.core.batching import tuned_batch_tokens
from castune.core.heads import HeadId, HeadLayout
from castune.core.modes import evaluation_mode
from castune.core.progress import progress
from castune.core.provenance import model_record, provenance
from castune.core.ranking import bucket_numbers, percentile_rank, tie_share
from castune.core.shards import Shard
from castune.data.chat import ChatFormat
from castune.data.example import Example, content_hash, require_questions, require_replies
from castune.data.rows import Row
from castune.diagnose.ablate import mean_replacements
from castune.diagnose.gradients import gram_matrices, partial_gradients
from castune.diagnose.journal import Journal
from castune.diagnose.measurements import Measurements
from castune.diagnose.objectives import Objectives
from castune.diagnose.reliability import reliability
from castune.diagnose.score import (
    Floats,
    conflict_from_gram,
    conflict_score,
    conflict_standard_error,
    decision_shift,
    functional_sensitivity,
    margin_shift,
)
from castune.diagnose.sweep import Ablator, Outcomes
from castune.errors import CastuneError, DataError, MapUnfinished

logger = logging.getLogger(__name__)


def diagnose(
    model: Any,
    tokenizer: Any,
    *,
    safety: Sequence[Example],
    utility: Sequence[Example],
    config: DiagnoseConfig | None = None,
    out: str | Path | None = None,
    shard: str | None = None,
    sources: dict[str, str] | None = None,
    seed: int | None = None,
) -> ConflictMap:
    """Measure O(h), H_gen(h), H_safe(h), S(h) and C(h) of every head (Sections 3.2-3.4 of the paper).

    With `out`, every result is in a journal there as soon as it is known: the same call continues after an
    interruption at any point. Under `torchrun` the ranks share the work and all return the map.

    Args:
        model: a transformers model for causal language modelling; it is left as it was.
        tokenizer: its tokenizer, with a chat template.
        safety: D_safe, harmful prompts with a safe reply each.
        utility: D_util, multiple-choice questions.
        config: settings; the paper's by default.
        out: a run directory to write `conflict_map.parquet` and `ablation.parquet` into.
        shard: `"i/n"`: do this share only, of n jobs that have `out` in common. The last to end returns the map.
        sources: names of the data sources, `{"safety": ..., "utility": ...}`, for the record.
        seed: seed the subsets were drawn with, for the record.

    Returns:
        The conflict map, one row a head.

    Raises:
        UnsupportedArchitecture: the heads of this model could not be located.
        CastuneError: data without replies or answers, layers that do not exist, a loss that is not finite.
        MapUnfinished: this share is done, others are missing.
    """
    config = config or DiagnoseConfig()
    started = time.perf_counter()
    chat = ChatFormat(tokenizer, max_length=config.max_length)
    safety_rows, utility_rows = _loss_rows(chat, safety, utility)
    layout = HeadLayout.of(model)
    heads = _heads(layout, config.layers)
    share = Shard.of(shard)
    if share.count > 1 and out is None:
        raise CastuneError("processes share their work through the run directory: give `out`")
    identity = model_record(model)
    data = {
        "safety": _data_record((sources or {}).get("safety"), safety, safety_rows),
        "utility": _data_record((sources or {}).get("utility"), utility, utility_rows),
    }
    settings, record = config.model_dump(mode="json"), provenance(seed)
    made_by = [identity["fingerprint"], identity["dtype"], record["versions"]["castune"]]
    journal = Journal.of(None if out is None else Path(out), [*made_by, settings, data])
    with evaluation_mode(model):
        config = _with_batch_tokens(model, config, journal, share)
        gram = _gradients(model, layout, heads, safety_rows, utility_rows, config, journal, share)
        ablator = _ablator(model, layout, heads, [*safety_rows, *utility_rows], config)
        objectives = Objectives(ablator, tokenizer, chat, config)
        of_utility = objectives.utility(utility, journal, share)
        of_safety = objectives.safety(safety, journal, share)
    if gram is None:
        gram = _journaled_gram(journal)
    if gram is None or of_utility is None or of_safety is None:
        raise MapUnfinished(
            f"share {share.index + 1} of {share.count} is done, others are missing; the last one to end makes the map, "
            "or the same command without a shard does what is missing"
        )
    metadata = {
        "model": identity,
        "settings": settings,
        "data": data,
        "batch_tokens": config.batch_tokens,
        "baseline": {
            "utility_accuracy": _rate(of_utility.decisions_N),
            "refusal_rate": _rate(of_safety.decisions_N),
        },
        "resumed": ablator.resumable,
        "replies": _reply_counts(of_safety.outcomes, config),
        "seconds": round(time.perf_counter() - started, 2),
        "provenance": record,
    }
    cmap = _conflict_map(heads, gram, of_utility.outcomes, of_safety.outcomes, config, metadata)
    share.wait()  # all ranks have read the journal before it is removed
    if out is not None and share.writes:
        _save_outcomes(Path(out), heads, utility, of_utility.outcomes, safety, of_safety.outcomes)
        cmap.save(out)
        journal.remove()
    share.wait()
    return cmap


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


def _with_batch_tokens(model: Any, config: DiagnoseConfig, journal: Journal, share: Shard) -> DiagnoseConfig:
    """The settings with `batch_tokens` as a number: what this diagnosis began with, else what is measured now."""

    def noted() -> int | None:
        return next((record["batch_tokens"] for record in journal.records() if "batch_tokens" in record), None)

    if config.batch_tokens != "auto":
        return config
    if noted() is None and share.writes:
        journal.append({"batch_tokens": (found := tuned_batch_tokens(model))})
        config = config.model_copy(update={"batch_tokens": found})
    share.wait()
    return config.model_copy(update={"batch_tokens": noted() or config.batch_tokens})


def _gradients(
    model: Any,
    layout: HeadLayout,
    heads: Sequence[HeadId],
    safety_rows: Sequence[Row],
    utility_rows: Sequence[Row],
    config: DiagnoseConfig,
    journal: Journal,
    share: Shard,
) -> _Gram | None:
    """The first share's work, which costs no more than a few heads; None for the others."""
    if not share.is_first:
        return None
    known = _journaled_gram(journal)
    if known is not None:
        return known
    layers = sorted({head.layer for head in heads})
    assert config.batch_tokens != "auto"
    parts = []
    with progress("gradients", len(safety_rows) + len(utility_rows)) as advance:
        for rows in (safety_rows, utility_rows):
            parts.append(
                partial_gradients(
                    model,
                    layout,
                    layers,
                    rows,
                    n_chunks=config.gradient_chunks,
                    batch_tokens=config.batch_tokens,
                    advance=advance,
                )
            )
    safety, utility = parts
    gram = _Gram(gram_matrices(layout, layers, [*safety, *utility]), len(safety))
    journal.append({"gram": gram.products_HCC.tolist(), "n_safety": gram.n_safety})
    return gram


def _journaled_gram(journal: Journal) -> _Gram | None:
    for record in journal.records():
        if "gram" in record:
            return _Gram(np.array(record["gram"]), record["n_safety"])
    return None


def _ablator(
    model: Any, layout: HeadLayout, heads: Sequence[HeadId], rows: Sequence[Row], config: DiagnoseConfig
) -> Ablator:
    filling = None
    assert config.batch_tokens != "auto"
    if config.ablation == "mean":
        filling = mean_replacements(model, layout, rows, batch_tokens=config.batch_tokens)
    return Ablator(model, layout, heads, can_resume(model, layout), filling)


def _reply_counts(outcomes: Outcomes, config: DiagnoseConfig) -> dict[str, int] | None:
    """How many replies were verified and how many of them decoded; None where none are generated under ablation."""
    if config.measure == "margin":
        return None
    return {"verified": outcomes.ablated_HN.size, "decoded": outcomes.n_decoded}


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
    measurements = Measurements(
        gram_HCC=gram.products_HCC,
        n_safety=gram.n_safety,
        utility=utility,
        safety=safety,
        measure=config.measure,
        sensitivity_rank=config.sensitivity_rank,
    )
    intervals, summary = reliability(measurements, seed=metadata["provenance"]["seed"] or 0)
    for warning in summary.warnings():
        logger.warning(warning)
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
        **{name: _nullable(values) for name, values in intervals.items()},
    }
    ties = {"utility_shift": tie_share(utility_shift), "safety_shift": tie_share(safety_shift)}
    return ConflictMap(pa.table(columns, schema=SCHEMA), {**metadata, "ties": ties, "reliability": summary.to_json()})


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
