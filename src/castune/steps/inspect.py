"""`castune inspect`: what an adapter of whatever trainer does to its base, unit by unit."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from castune.artifacts import Certificate, ConflictMap, Unit
from castune.artifacts.adapter_inspection import OBJECTIVES, SCHEMA, TABLE_FILE, AdapterInspection
from castune.artifacts.records import DataRecord
from castune.artifacts.tune_result import CERTIFICATE_FILE, adapter_hash
from castune.core.heads import HeadLayout
from castune.core.modes import evaluation_mode
from castune.core.provenance import model_record, provenance
from castune.core.quantisation import dense_weight, is_quantised
from castune.core.units import UnitLayout
from castune.core.updates import Effects, Floats, Size, unit_size, with_error
from castune.data.chat import ChatFormat
from castune.data.record import data_record
from castune.data.rows import Row
from castune.diagnosis.update_effects import exact_changes, measure_effects
from castune.errors import CastuneError
from castune.report.inspection_page import write_page
from castune.stats.estimates import estimate
from castune.steps.inspection_data import InspectionData
from castune.steps.readiness import require_ready
from castune.steps.subject import Subject
from castune.tuning.adapter_update import AdapterUpdate, adapted, read_update
from castune.tuning.oddities import Finding, findings

if TYPE_CHECKING:
    from torch import nn

logger = logging.getLogger(__name__)


def inspect_step(subject: Subject, data: InspectionData, out: Path | None = None) -> AdapterInspection:
    """What an adapter does, measured unless it lies in `out` already; table and page are written there.

    Args:
        subject: the adapter, its base model and its run.
        data: what effects are measured on.
        out: directory for the result; `Subject.inspection` when absent.

    Raises:
        CastuneError: no LoRA adapter that can be read, another base model, or examples without a reply to score.
    """
    out = out or subject.inspection
    task = _Task.of(subject, data)
    if (out / TABLE_FILE).is_file() and task.made(found := AdapterInspection.load(out)):
        logger.info("inspection of %s: already there", subject.name)
    else:
        found = task.measured()
        found.save(out)
    write_page(out, found)
    return found


@dataclass(frozen=True)
class _Task:
    """An adapter to inspect, checked.

    Attributes:
        subject: the adapter, its base model and its run.
        data: what effects are measured on.
        rows: the same as tokens.
        records: of the data, by objective.
        update: what the adapter adds.
        layout: the units, of all kinds that could be located.
        reasons: why others could not.
        units: those of the kinds that it changes.
        selected: what the training was to touch.
        cmap: the conflict map that is laid over it.
    """

    subject: Subject
    data: InspectionData
    rows: dict[str, list[Row]]
    records: dict[str, DataRecord]
    update: AdapterUpdate
    layout: UnitLayout
    reasons: list[str]
    units: list[Unit]
    selected: Sequence[Unit] | None
    cmap: ConflictMap | None

    @classmethod
    def of(cls, subject: Subject, data: InspectionData) -> _Task:
        selected, config = subject.selected, subject.recipe.diagnose
        model, tokenizer = subject.loaded
        if is_quantised(model):
            raise CastuneError(
                "the base model is quantised, and its packed weights have no gradients; give the full model"
            )
        cmap, update = subject.cmap, read_update(model, subject.adapter)
        chat = ChatFormat(tokenizer, max_length=config.max_length)
        rows = {name: [chat.loss_row(example) for example in found] for name, found in data.examples.items()}
        require_ready(
            subject.loaded,
            (
                (name, example, (*row.ids, *row.tokens))
                for name in rows
                for example, row in zip(data.examples[name], rows[name], strict=True)
            ),
        )
        records = {name: data_record(name, data.sources[name], data.examples[name], rows[name]) for name in rows}
        n_groups = config.mlp_groups if _has_groups(selected, cmap) else 0
        layout, reasons = UnitLayout.locatable(model, HeadLayout.of(model), n_mlp_groups=n_groups)
        changed = {one.kind for one in layout.units if any(part.path in update.updates for part in layout.parts(one))}
        units = [one for one in layout.units if one.kind in changed]
        return cls(subject, data, rows, records, update, layout, reasons, units, selected, cmap)

    @property
    def about(self) -> dict[str, Any]:
        """The adapter, for the record."""
        modules = Counter(path.rpartition(".")[2] for path in self.update.updates)
        return {
            "name": self.subject.name,
            "hash": adapter_hash(self.subject.adapter),
            "kind": self.update.kind,
            "modules": dict(modules),
        }

    @property
    def settings(self) -> dict[str, Any]:
        """What of the settings decides on the numbers."""
        config = self.subject.recipe.diagnose
        return {"gradient_chunks": config.gradient_chunks, "max_length": config.max_length}

    def made(self, found: AdapterInspection) -> bool:
        """Whether an inspection is this one."""
        keys = ("fingerprint", "dtype", "chat_template")
        model = model_record(*self.subject.loaded)
        return (
            found.metadata["adapter"] == self.about
            and all(found.model.get(key) == model.get(key) for key in keys)
            and {name: one["hash"] for name, one in found.data.items()}
            == {name: one["hash"] for name, one in self.records.items()}
            and found.metadata["settings"] == self.settings
            and found.metadata["map"] == (None if self.cmap is None else self.cmap.content_hash)
            and found.table["selected"].to_pylist() == self._selected()
        )

    def measured(self) -> AdapterInspection:
        """The inspection."""
        started, updates = time.perf_counter(), self.update.updates
        effects, exact = self._measured_effects() if updates else ({}, {})
        self._require_finite("effect to first order", *(found.total_C for found in effects.values()))
        self._require_finite("effect on losses", *exact.values())
        sizes = {one: unit_size(self.layout, one, updates) for one in self.units}
        without_unit = self._without_unit()
        stale, known = self._has_stale_certificate(), self.selected
        odd = findings(self.update, sizes, selected=known, without_unit=without_unit, stale_certificate=stale)
        odd += [Finding("no-unit", f"not told apart: {reason}", ()) for reason in self.reasons if without_unit]
        whole = {name: _whole(effects.get(name), exact.get(name)) for name in self.rows}
        odd += _beyond_first_order(whole)
        metadata = {
            "adapter": self.about,
            "model": model_record(*self.subject.loaded),
            "data": self.records,
            "settings": self.settings,
            "norm": float(np.sqrt(sum(update.norm**2 for update in updates.values()))),
            "whole": whole,
            "uncovered": without_unit,
            "odd": [{**asdict(one), "where": list(one.where)} for one in odd],
            "map": None if self.cmap is None else self.cmap.content_hash,
            "seconds": round(time.perf_counter() - started, 2),
            "provenance": provenance(self.subject.recipe.seed),
        }
        return AdapterInspection(self._table(sizes, effects), metadata)

    def _require_finite(self, what: str, *numbers: Floats) -> None:
        """Refuse an adapter with values so large that nothing can be computed with them."""
        if not all(np.isfinite(some).all() for some in numbers):
            raise CastuneError(
                f"{self.subject.adapter}: its {what} is no finite number: its values, though finite, are too large to "
                "be computed with; train it again with a lower learning rate, or scale it down"
            )

    def _measured_effects(self) -> tuple[dict[str, Effects], dict[str, Floats]]:
        """First-order effects by objective, and exact changes of the losses, which some adapters do not have."""
        model, config = self.subject.loaded.model, self.subject.recipe.diagnose
        # `auto` is for the many forwards of a diagnosis; here there are few.
        batch_tokens = config.batch_tokens if isinstance(config.batch_tokens, int) else 2048
        with evaluation_mode(model):
            effects = measure_effects(
                model,
                self.layout,
                self.units,
                self.update.updates,
                self.rows,
                n_chunks=config.gradient_chunks,
                batch_tokens=batch_tokens,
                gradient_memory=config.gradient_memory,
            )
            if not self.update.is_of_projections:
                return effects, {}
            with_adapter = adapted(model, self.subject.adapter)
            return effects, exact_changes(model, with_adapter, self.rows, batch_tokens=batch_tokens)

    def _table(self, sizes: Mapping[Unit, Size], effects: Mapping[str, Effects]) -> pa.Table:
        base = [_weight_norm(self.subject.loaded.model, self.layout, one) for one in self.units]
        columns: dict[str, list[Any]] = {
            "unit": [one.kind for one in self.units],
            "layer": [one.layer for one in self.units],
            "head": [one.index for one in self.units],
            "norm": [size.norm for size in sizes.values()],
            "relative_norm": [s.norm / norm if norm else None for s, norm in zip(sizes.values(), base, strict=True)],
            "effective_rank": [size.effective_rank for size in sizes.values()],
            "top_share": [size.top_share for size in sizes.values()],
            "selected": self._selected(),
        }
        for name, column in OBJECTIVES.items():
            found = [with_error(effect_C) for effect_C in effects[name].units_HC] if name in effects else []
            columns[column] = [value for value, _ in found] or [None] * len(self.units)
            columns[f"{column}_se"] = [error for _, error in found] or [None] * len(self.units)
        columns |= self._of_map()
        return pa.table({name: columns[name] for name in SCHEMA.names}, schema=SCHEMA)

    def _selected(self) -> list[bool | None]:
        chosen = None if self.selected is None else set(self.selected)
        return [None if chosen is None else one in chosen for one in self.units]

    def _of_map(self) -> dict[str, list[Any]]:
        rows = {} if self.cmap is None else {one: row for row, one in enumerate(self.cmap.units)}
        found: dict[str, list[Any]] = {}
        for name in ("conflict_score", "bucket"):
            values = [] if self.cmap is None else self.cmap.table[name].to_pylist()
            found[name] = [values[rows[one]] if one in rows else None for one in self.units]
        return found

    def _without_unit(self) -> list[str]:
        """Updated projections of which a part belongs to no unit."""
        owned, size = Counter[str](), dict[str, int]()
        for one in self.units:
            for part in self.layout.parts(one):
                owned[part.path] += part.at.stop - part.at.start
                size[part.path] = part.size
        return [path for path in self.update.updates if owned[path] != size.get(path)]

    def _has_stale_certificate(self) -> bool:
        certified = (self.subject.adapter / CERTIFICATE_FILE).is_file()
        return certified and Certificate.load(self.subject.adapter).adapter_hash != adapter_hash(self.subject.adapter)


def _has_groups(selected: Sequence[Unit] | None, cmap: ConflictMap | None) -> bool:
    """Whether MLPs are told apart by groups of neurons, by what was selected or by the map."""
    kinds = [*(one.kind for one in selected or ()), *(cmap.kinds if cmap is not None else ())]
    return "mlp_group" in kinds


def _whole(effects: Effects | None, exact_N: Floats | None) -> dict[str, Any]:
    """The change of a loss along the whole update, to first order and exactly."""
    first, error = (0.0, 0.0) if effects is None else with_error(effects.total_C)
    covered = 0.0 if effects is None else float(effects.units_HC.sum())
    exact = None if exact_N is None else estimate(exact_N.tolist())
    return {
        "first_order": first,
        "first_order_se": error,
        "covered": covered,
        "exact": None if exact is None else exact.value,
        "exact_se": None if exact is None else exact.standard_error,
    }


def _beyond_first_order(whole: Mapping[str, Mapping[str, float | None]]) -> list[Finding]:
    """A finding where the update goes so far that first order says little of it: it is off by more than twofold."""
    off = []
    for name, found in whole.items():
        first, exact, error = found["first_order"], found["exact"], found["exact_se"]
        if first is None or exact is None or abs(first - exact) <= 2 * (error or 0.0):
            continue
        if not 0.5 <= (first / exact if exact else 0.0) <= 2:
            off.append(name)
    if not off:
        return []
    said = (
        f"the update goes beyond its first order ({', '.join(off)}): effects of units say how it begins to act, and "
        "their order need not hold for the whole of it"
    )
    return [Finding("first-order", said, tuple(off))]


def _weight_norm(model: nn.Module, layout: UnitLayout, one: Unit) -> float:
    """Frobenius norm of the weights that a unit owns."""
    parts = [part.of(dense_weight(model.get_submodule(part.path))) for part in layout.parts(one)]
    return float(np.sqrt(sum(float(weight.float().square().sum()) for weight in parts)))
