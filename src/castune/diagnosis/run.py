"""`diagnose`: from a model and its calibration sets to its conflict map."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from castune.artifacts import ConflictMap
from castune.artifacts.conflict_map import MAP_FILE
from castune.artifacts.files import locked, write_parquet
from castune.artifacts.records import AdapterRecord
from castune.config import DiagnoseConfig
from castune.core.ablation import can_resume
from castune.core.answers import require_math_verify
from castune.core.batching import tuned_batch_tokens
from castune.core.checksum import unchanged
from castune.core.heads import HeadId, HeadLayout
from castune.core.journal import Journal
from castune.core.memory import return_freed_memory
from castune.core.modes import evaluation_mode
from castune.core.provenance import model_record, provenance
from castune.core.quantisation import is_quantised
from castune.core.shards import Shard
from castune.core.units import Unit, UnitLayout
from castune.data.chat import ChatFormat
from castune.data.example import Example, require_replies
from castune.data.record import data_record
from castune.data.rows import Row
from castune.diagnosis.ablate import mean_replacements
from castune.diagnosis.domains import Utility, UtilitySet, utility_sets
from castune.diagnosis.grams import journaled_grams, measure_grams
from castune.diagnosis.maps import Results, conflict_map
from castune.diagnosis.objectives import Measured, Objectives
from castune.diagnosis.stored import OUTCOMES_FILE, save_gradients
from castune.diagnosis.sweep import Ablator, Outcomes, distinct, place_of
from castune.errors import CastuneError, DataError, MapUnfinished

logger = logging.getLogger(__name__)


def diagnose(
    model: Any,
    tokenizer: Any,
    *,
    safety: Sequence[Example],
    utility: Utility,
    config: DiagnoseConfig | None = None,
    out: str | Path | None = None,
    shard: str | None = None,
    sources: Mapping[str, str | None] | None = None,
    seed: int | None = None,
    adapter: AdapterRecord | None = None,
) -> ConflictMap:
    """Measure O(h), H_gen(h), H_safe(h), S(h) and C(h) of every head (Sections 3.2-3.4 of the paper).

    With `out`, every result is in a journal there as soon as it is known: the same call continues after an
    interruption at any point. Under `torchrun` the ranks share the work and all return the map.

    Args:
        model: a transformers model for causal language modelling; it is left as it was.
        tokenizer: its tokenizer, with a chat template.
        safety: D_safe, harmful prompts with a safe reply each.
        utility: D_util, multiple-choice questions; or several such sets, by the names of their domains.
        config: settings; the paper's by default.
        out: a run directory to write `conflict_map.parquet`, `ablation.parquet`, `gradients.parquet` and, of several
            domains, `domains/NAME.parquet` into.
        shard: `"i/n"`: do this share only, of n jobs that have `out` in common. The last to end returns the map.
        sources: names of the data sources, `{"safety": ..., "utility": ...}`, for the record; `utility:NAME` are the
            keys of several domains.
        seed: seed the subsets were drawn with, for the record.
        adapter: of a model into whose weights an adapter is merged: which one (plain JSON), for the record. A diagnosis
            is continued only where it is the same.

    Returns:
        The conflict map, one row a head; of several domains the combined one, with each domain's own in `domains`.

    Raises:
        UnsupportedArchitecture: the heads of this model could not be located.
        CastuneError: data without replies or answers, layers that do not exist, a loss that is not finite, a quantised
            model.
        WeightsChanged: weights of the model are not what they were when the diagnosis began.
        MapUnfinished: this share is done, others are missing.
    """
    config = config or DiagnoseConfig()
    started = time.perf_counter()
    was_there = out is not None and (Path(out) / MAP_FILE).is_file()
    chat = ChatFormat(tokenizer, max_length=config.max_length)
    sets = _checked(safety, utility, config)
    examples = {"safety": safety, **{one.objective: one.examples for one in sets}}
    rows = {name: [chat.loss_row(example) for example in found] for name, found in examples.items()}
    if is_quantised(model):
        raise CastuneError(
            "the model is quantised, and its packed weights have no gradients; diagnose the full model. Its selections "
            "can be trained on the quantised one (castune tune --quantization nf4)"
        )
    layout = HeadLayout.of(model)
    layers = _layers(layout, config)
    units = UnitLayout.of(model, layout, config.units, n_mlp_groups=config.mlp_groups, layers=layers)
    heads = [one for one in units.units if layers is None or one.layer in layers]
    share = Shard.of(shard)
    if share.count > 1 and out is None:
        raise CastuneError("processes share their work through the run directory: give `out`")
    identity = model_record(model, tokenizer)
    if adapter is not None:
        identity["adapter"] = adapter
    data = {name: data_record(name, (sources or {}).get(name), found, rows[name]) for name, found in examples.items()}
    settings, record = config.model_dump(mode="json"), provenance(seed)
    # How domains are combined changes nothing that is measured.
    measured_by = {key: value for key, value in settings.items() if key != "domains"}
    made_by: list[object] = [identity["fingerprint"], identity["chat_template"], identity["dtype"]]
    made_by += [record["versions"]["castune"], record["rules"]]
    # A fingerprint samples weights: it need not see a small update.
    made_by += [] if adapter is None else [adapter]
    journal = Journal.of(None if out is None else Path(out), [*made_by, measured_by, data])
    with unchanged(model, "diagnosing"), evaluation_mode(model):
        config = _with_batch_tokens(model, config, journal, share)
        # The first share's work, which costs no more than a few heads.
        grams = measure_grams(model, units, heads, rows, config, journal) if share.is_first else {}
        return_freed_memory()
        swept, twins = distinct(units, heads)
        ablator = _ablator(model, units, swept, list(chain(*rows.values())), config)
        objectives = Objectives(ablator, tokenizer, chat, config)
        of_utility = {one.objective: objectives.utility(one, journal, share) for one in sets}
        return_freed_memory()
        of_safety = objectives.safety(safety, journal, share)
    grams = grams or journaled_grams(journal)
    complete = {objective: measured for objective, measured in of_utility.items() if measured is not None}
    if of_safety is None or not of_utility.keys() == grams.keys() == complete.keys():
        raise MapUnfinished(
            f"share {share.index + 1} of {share.count} is done, others are missing; the last one to end makes the map, "
            "or the same command without a shard does what is missing"
        )
    metadata = {
        "model": identity,
        "settings": settings,
        "measures": {"safety": config.measure, **{one.objective: one.measure(config) for one in sets}},
        "batch_tokens": config.batch_tokens,
        "resumed": ablator.resumable,
        "replies": _reply_counts(of_safety.outcomes, config),
        "seconds": round(time.perf_counter() - started, 2),
        "provenance": record,
    }
    complete = {objective: measured.of(twins) for objective, measured in complete.items()}
    of_safety = of_safety.of(twins)
    results = Results(heads=heads, grams=grams, utility=complete, safety=of_safety, sets=sets, data=data)
    cmap = conflict_map(results, config, metadata)
    for warning in cmap.metadata["reliability"]["warnings"]:
        logger.warning(warning)
    share.wait()  # all ranks have read the journal before it is removed
    if out is not None and share.writes:
        Path(out).mkdir(parents=True, exist_ok=True)
        with locked(out):
            if (Path(out) / MAP_FILE).is_file() and not was_there:
                # The same command twice: arms may have been chosen from the other's map, whose last digits may differ.
                cmap = ConflictMap.load(out)
            else:
                _save_outcomes(Path(out), heads, examples, {**complete, "safety": of_safety})
                if cmap.kinds == ["q_head"]:
                    save_gradients(Path(out), query_heads(layout, config), grams)
                cmap.save(out)
        journal.remove()
    share.wait()
    return cmap


def measure_gradients(
    model: Any, tokenizer: Any, *, safety: Sequence[Example], utility: Utility, config: DiagnoseConfig, out: Path
) -> None:
    """Write `gradients.parquet` alone, for a map of query heads that was made before it was kept.

    The arguments are those of `diagnose`.
    """
    chat = ChatFormat(tokenizer, max_length=config.max_length)
    examples = {"safety": safety, **{one.objective: one.examples for one in _checked(safety, utility, config)}}
    rows = {name: [chat.loss_row(example) for example in found] for name, found in examples.items()}
    layout = HeadLayout.of(model)
    heads = query_heads(layout, config)
    with unchanged(model, "measuring gradients"), evaluation_mode(model):
        grams = measure_grams(model, UnitLayout(layout), heads, rows, config, Journal.of(None, None))
        save_gradients(out, heads, grams)


def query_heads(layout: HeadLayout, config: DiagnoseConfig) -> list[HeadId]:
    """The query heads of the layers that are diagnosed."""
    layers = _layers(layout, config)
    return [head for head in layout.heads if layers is None or head.layer in layers]


def _checked(safety: Sequence[Example], utility: Utility, config: DiagnoseConfig) -> list[UtilitySet]:
    """The utility sets; refuses data that cannot be diagnosed."""
    if len(safety) < 2:
        raise DataError(f"safety: {len(safety)} examples, a diagnosis needs at least 2")
    require_replies(safety, "safety", "prompt, target")
    sets = utility_sets(utility)
    for one in sets:
        if one.is_of_problems and one.measure(config) == "decision":
            if any(example.scoring == "boxed" for example in one.examples):
                require_math_verify()
            logger.warning(
                "%s: %d problems are answered in up to %d tokens without every head, which costs far more than "
                "anything else (castune plan says how much); diagnose.problems = margin takes the log-probability of "
                "their worked solutions instead",
                one.objective,
                len(one.examples),
                config.solution_tokens,
            )
    if len(sets) == 1 and config.domains != DiagnoseConfig.model_fields["domains"].default:
        logger.warning("diagnose.domains = %r has no effect: there is one utility set", config.domains)
    return sets


def _layers(layout: HeadLayout, config: DiagnoseConfig) -> Sequence[int] | None:
    """The layers that are diagnosed, None for all; refuses those that have no units."""
    layers = config.layers
    if layers is None:
        return None
    of_mlps = {"mlp_blocks", "mlp_groups"} & set(config.units)
    unknown = [layer for layer in layers if layer >= layout.n_layers or not (of_mlps or layout.n_heads(layer))]
    if unknown or not layers:
        what = "layers" if of_mlps else "layers with heads"
        raise CastuneError(f"layers {list(layers)}: accepted are {what}, of 0 to {layout.n_layers - 1}")
    return layers


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


def _ablator(
    model: Any, units: UnitLayout, heads: Sequence[Unit], rows: Sequence[Row], config: DiagnoseConfig
) -> Ablator:
    filling = None
    assert config.batch_tokens != "auto"
    if config.ablation == "mean":
        sites = dict.fromkeys(units.site(*place_of(one)) for one in heads)
        filling = mean_replacements(model, sites, rows, batch_tokens=config.batch_tokens)
    return Ablator(model, units.heads, heads, can_resume(model, units.heads), filling, units)


def _reply_counts(outcomes: Outcomes, config: DiagnoseConfig) -> dict[str, int] | None:
    """How many replies were verified and how many of them decoded; None where none are generated under ablation."""
    if config.measure == "margin":
        return None
    return {"verified": outcomes.ablated_HN.size, "decoded": outcomes.n_decoded}


def _save_outcomes(
    out: Path, heads: Sequence[Unit], examples: Mapping[str, Sequence[Example]], measured: Mapping[str, Measured]
) -> None:
    """`ablation.parquet`: head x example outcomes by objective, null where unscored."""
    tables = []
    for objective, outcomes in ((name, one.outcomes) for name, one in measured.items()):
        n_heads, n_examples = outcomes.ablated_HN.shape
        # Of query heads alone the table is as it was before there were other units.
        kinds = (
            {} if all(h.kind == "q_head" for h in heads) else {"unit": np.repeat([h.kind for h in heads], n_examples)}
        )
        tables.append(
            pa.table(
                {
                    "objective": [objective] * (n_heads * n_examples),
                    **kinds,
                    "layer": pa.array(np.repeat([h.layer for h in heads], n_examples), pa.int32()),
                    "head": pa.array(np.repeat([h.number for h in heads], n_examples), pa.int32()),
                    "example": [example.id for example in examples[objective]] * n_heads,
                    "baseline": pa.array(np.tile(outcomes.baseline_N, n_heads), from_pandas=True),
                    "ablated": pa.array(outcomes.ablated_HN.ravel(), from_pandas=True),
                }
            )
        )
    write_parquet(out / OUTCOMES_FILE, pa.concat_tables(tables))
