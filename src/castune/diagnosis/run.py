"""`diagnose`: from a model and its calibration sets to its conflict map."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from castune.artifacts import ConflictMap
from castune.artifacts.conflict_map import MAP_FILE
from castune.artifacts.files import locked
from castune.artifacts.records import AdapterRecord, DataRecord, ModelRecord, Provenance
from castune.artifacts.unit import only_heads
from castune.config import DiagnoseConfig
from castune.core.batching import tuned_batch_tokens
from castune.core.checksum import unchanged
from castune.core.journal import Journal
from castune.core.memory import return_freed_memory
from castune.core.modes import evaluation_mode
from castune.core.provenance import model_record, provenance
from castune.core.shards import Shard
from castune.data.example import Example
from castune.data.record import data_record
from castune.diagnosis.ablator import distinct
from castune.diagnosis.checking import check_units
from castune.diagnosis.domains import Utility
from castune.diagnosis.grams import Gram, journaled_grams
from castune.diagnosis.maps import Results, conflict_map
from castune.diagnosis.objectives import Measured, Objectives
from castune.diagnosis.stored import save_gradients, save_outcomes
from castune.diagnosis.sweep import Outcomes
from castune.diagnosis.task import Task
from castune.diagnosis.verifying import verified
from castune.errors import CastuneError, MapUnfinished

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


def diagnose(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
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
        utility: D_util: questions, problems with worked solutions, or harmless prompts with replies (see
            `DiagnoseConfig.reply_domains`); or several such sets, by the names of their domains.
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
    place = _Place.of(out, shard)
    task = Task.of(model, tokenizer, safety, utility, config)
    origin = _Origin.of(task, sources or {}, seed, adapter)
    journal = Journal.of(place.out, origin.key)
    results, metadata = _measured(task, origin, place, journal)
    cmap = conflict_map(results, config, metadata)
    for warning in cmap.warnings:
        logger.warning(warning)
    return place.keep(cmap, results, task.examples, journal)


def current_map(task: Task) -> ConflictMap:
    """The map of the model as it is now, by this process alone, whatever others of a torchrun job do.

    For a model in training, which is measured again and again: nothing is written or warned of, and no unit of an
    attribution is measured exactly as well.
    """
    origin = _Origin.of(task, {}, None, None)
    place = _Place(None, Shard(), was_there=False, started=time.perf_counter())
    results, metadata = _measured(task, origin, place, Journal.of(None, None), check=False)
    return conflict_map(results, task.config, metadata)


def measure_gradients(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    safety: Sequence[Example],
    utility: Utility,
    config: DiagnoseConfig,
    out: Path,
) -> None:
    """Write `gradients.parquet` alone, for a map of query heads that was made before it was kept.

    The arguments are those of `diagnose`.
    """
    task = Task.of(model, tokenizer, safety, utility, config)
    with unchanged(model, "measuring gradients"), evaluation_mode(model):
        save_gradients(out, task.units, task.grams(Journal.of(None, None)))


@dataclass(frozen=True)
class _Origin:
    """What a map is made from, for the record: the model, its data by objective, and versions, machine and time."""

    model: ModelRecord
    data: dict[str, DataRecord]
    provenance: Provenance
    settings: dict[str, Any]

    @classmethod
    def of(
        cls, task: Task, sources: Mapping[str, str | None], seed: int | None, adapter: AdapterRecord | None
    ) -> _Origin:
        model = model_record(task.model, task.tokenizer)
        if adapter is not None:
            model["adapter"] = adapter
        data = {
            name: data_record(name, sources.get(name), found, task.rows[name]) for name, found in task.examples.items()
        }
        return cls(model, data, provenance(seed), task.config.model_dump(mode="json"))

    @property
    def key(self) -> list[Any]:
        """What a diagnosis that is continued must have in common with this one."""
        made_by: list[object] = [self.model["fingerprint"], self.model["chat_template"], self.model["dtype"]]
        made_by += [self.provenance["versions"]["castune"], self.provenance["rules"]]
        # A fingerprint samples weights: it need not see a small update.
        made_by += [self.model["adapter"]] if "adapter" in self.model else []
        # How domains are combined changes nothing that is measured.
        measured_by = {key: value for key, value in self.settings.items() if key != "domains"}
        return [*made_by, measured_by, self.data]


@dataclass(frozen=True)
class _Place:
    """Where a diagnosis leaves what it measured, and its share of the work.

    Attributes:
        out: the run directory; None: nothing is written.
        share: this process's share.
        was_there: whether a map lay there when it began.
        started: when it began, in seconds.
    """

    out: Path | None
    share: Shard
    was_there: bool
    started: float

    @classmethod
    def of(cls, out: str | Path | None, shard: str | None) -> _Place:
        share = Shard.of(shard)
        if share.count > 1 and out is None:
            raise CastuneError("processes share their work through the run directory: give `out`")
        folder = None if out is None else Path(out)
        return cls(folder, share, folder is not None and (folder / MAP_FILE).is_file(), time.perf_counter())

    def keep(
        self, cmap: ConflictMap, results: Results, examples: Mapping[str, Sequence[Example]], journal: Journal
    ) -> ConflictMap:
        """Write the map and what it was made from, and remove the journal; returns the map that is there then."""
        self.share.wait()  # all ranks have read the journal before it is removed
        if self.out is not None and self.share.writes:
            self.out.mkdir(parents=True, exist_ok=True)
            with locked(self.out):
                if (self.out / MAP_FILE).is_file() and not self.was_there:
                    # The same command twice: arms may have been chosen from the other's map, whose last digits may
                    # differ.
                    cmap = ConflictMap.load(self.out)
                else:
                    save_outcomes(self.out, results, examples)
                    if only_heads(results.heads):
                        save_gradients(self.out, results.heads, results.grams)
                    cmap.save(self.out)
            journal.remove()
        self.share.wait()
        return cmap


def _measured(
    task: Task, origin: _Origin, place: _Place, journal: Journal, *, check: bool = True
) -> tuple[Results, dict[str, Any]]:
    """Gradients, then the ablations of every objective; and the metadata of the map.

    Args:
        task: what is measured.
        origin: what the map is made from.
        place: where results go, and this process's share.
        journal: of the diagnosis.
        check: measure some units of an attribution exactly as well.

    Raises:
        MapUnfinished: other shares are missing.
    """
    share = place.share
    with unchanged(task.model, "diagnosing"), evaluation_mode(task.model):
        task = replace(task, config=_with_batch_tokens(task.model, task.config, journal, share))
        # The first share's work, which costs no more than a few heads.
        grams = task.grams(journal) if share.is_first else {}
        return_freed_memory()
        swept, twins = distinct(task.layout, task.units)
        ablator = task.ablator(swept)
        objectives = Objectives(ablator, task.tokenizer, task.chat, task.config)
        of_utility = {one.objective: objectives.utility(one, journal, share) for one in task.sets}
        return_freed_memory()
        replies = objectives.replies(task.examples["safety"])
        of_safety = objectives.safety(task.examples["safety"], replies, journal, share)
        grams = grams or journaled_grams(journal)
        measured = _all_there({**of_utility, "safety": of_safety}, grams, share)
        checked = None
        if check and task.config.measure == "attribution":
            checked = check_units(task, objectives, measured, grams, replies, journal, share)
        of_units = {name: one.of(twins) for name, one in measured.items()}
        safety = of_units.pop("safety")
        found = Results(
            heads=task.units,
            sets=task.sets,
            data=origin.data,
            grams=grams,
            utility=of_units,
            safety=safety,
            checked=checked,
        )
        if checked is not None and task.config.verify == "zone":
            found = verified(task, objectives, found, replies, journal, share)
    metadata = {
        "model": origin.model,
        "settings": origin.settings,
        "measures": {"safety": task.config.measure, **{one.objective: one.measure(task.config) for one in task.sets}},
        "batch_tokens": task.config.batch_tokens,
        "resumed": ablator.resumable,
        "replies": _reply_counts(measured["safety"].outcomes, task.config),
        "seconds": round(time.perf_counter() - place.started, 2),
        "provenance": origin.provenance,
    }
    return found, metadata


def _all_there(found: Mapping[str, Measured | None], grams: Mapping[str, Gram], share: Shard) -> dict[str, Measured]:
    """What was measured of every objective.

    Raises:
        MapUnfinished: other shares are missing.
    """
    measured = {name: one for name, one in found.items() if one is not None}
    if measured.keys() != found.keys() or not grams.keys() >= found.keys() - {"safety"}:
        raise MapUnfinished(
            f"share {share.index + 1} of {share.count} is done, others are missing; the last one to end makes the map, "
            "or the same command without a shard does what is missing"
        )
    return measured


def _with_batch_tokens(
    model: PreTrainedModel, config: DiagnoseConfig, journal: Journal, share: Shard
) -> DiagnoseConfig:
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


def _reply_counts(outcomes: Outcomes, config: DiagnoseConfig) -> dict[str, int] | None:
    """How many replies were verified and how many of them decoded; None where none are generated under ablation."""
    if config.measure != "decision":
        return None
    return {"verified": outcomes.ablated_HN.size, "decoded": outcomes.n_decoded}
