"""Conflict drift of an arm: the map again at every adapter its training kept, compared with the run's own map.

The paper measures the map once, before training, and names conflict drift as a limitation.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from castune.artifacts import Certificate, ConflictMap, HeadSelection
from castune.artifacts.conflict_map import MAP_FILE
from castune.artifacts.drift_result import DriftResult, StepDrift
from castune.artifacts.records import AdapterRecord
from castune.artifacts.tune_result import snapshots_of
from castune.config import DiagnoseConfig
from castune.core.journal import Journal
from castune.core.loading import load_model
from castune.core.provenance import provenance
from castune.core.shards import Shard
from castune.diagnosis.drift import N_RESAMPLES, N_SPLITS, drift, kept_heads, zone_changes
from castune.diagnosis.run import measure_gradients
from castune.diagnosis.stored import GRADIENTS_FILE, OUTCOMES_FILE, stored_measurements
from castune.errors import ArtifactError, MapUnfinished
from castune.selection import choose_again
from castune.steps.arm import Arm
from castune.steps.diagnose import diagnose_step
from castune.steps.directory import RunDirectory
from castune.steps.inputs import load_calibration
from castune.steps.remeasure import Remeasure, require_query_heads
from castune.tuning.verify import certify

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)


def drift_step(folder: RunDirectory, name: str | None, *, shard: str | None = None) -> DriftResult | None:
    """Measure the map at every adapter of an arm and write `drift/ARM/drift.json`; maps that are there stay.

    Args:
        folder: the run.
        name: of the arm; the main one for None.
        shard: this process's share of the measuring.

    Returns:
        The result; None in the processes of a torchrun job that do not write it.

    Raises:
        CastuneError: no such arm, an arm without snapshots, or data and model that are not those of the run's map.
        MapUnfinished: this share is done, others are missing.
    """
    Shard.of(shard)  # refused before a model is loaded
    recipe, arm = folder.load_recipe(), folder.arm(name)
    cmap = folder.load_map()
    require_query_heads(cmap, f"{folder.path}: drift can be measured")
    first_selection = folder.load_selection(arm, cmap)
    adapters, selection = _adapters(folder, arm, first_selection)
    calibration = load_calibration(recipe)
    loaded = load_model(recipe)
    # It is there: this compares model, data and settings with it.
    first = diagnose_step(folder, recipe, loaded, calibration)
    certificates = {step: _certificate(loaded.model, adapter, selection) for step, adapter in adapters.items()}
    remeasure = Remeasure(loaded, calibration, recipe, first, arm.name)
    maps, unfinished = {}, []
    for step, adapter in adapters.items():
        out = folder.drift(arm) / str(step)
        found = _stored_map(out, first, remeasure.about(adapter, step), remeasure.config)
        if found is not None:
            logger.info("map at step %d: already done", step)
            Journal.remove_all(out)  # of a command that was killed when the map was just made
            maps[step] = found
            continue
        logger.info("map at step %d of %s", step, arm.name)
        if not certificates[step].changed_rows:
            logger.warning("in %s the adapter of step %d changes no weight of the model", loaded.model.dtype, step)
        try:
            maps[step] = remeasure(adapter, selection, step, out, shard=shard)
        except MapUnfinished:
            unfinished.append(step)
    if unfinished:
        raise MapUnfinished(
            f"this shard of the maps at steps {', '.join(map(str, unfinished))} is done, other shards are missing; the "
            "last shard to finish writes the result, or run the command without --shard to do what is missing"
        )
    if not Shard.of(shard).writes:
        return None
    _require_gradients(folder, remeasure)
    result = _result(folder, arm, first_selection, first, maps, certificates)
    result.save(folder.drift(arm))
    folder.record_step(f"drift {arm.name}", result.provenance)
    return result


def _adapters(folder: RunDirectory, arm: Arm, selection: HeadSelection) -> tuple[dict[int, Path], HeadSelection]:
    """The adapters of an arm by optimiser step, the finished one last, and the heads that they may change."""
    if arm.is_made_of_others:
        raise ArtifactError(
            f"{arm.adapter} was made from other adapters, so there is no training to measure drift "
            "over; choose a trained arm with --arm"
        )
    result = folder.load_tuning(arm, selection)
    found = snapshots_of(arm.adapter)
    if not found:
        option = "" if arm.folder == folder.path else f" --arm {arm.name}"
        raise ArtifactError(
            f"{arm.adapter} has no snapshots of its {result.steps} steps; train it again with the same options and: "
            f"castune tune {folder.path}{option} --overwrite --snapshot-steps N, with N below {result.steps}"
        )
    return {**found, result.steps: arm.adapter}, result.trained(selection)


def _certificate(model: PreTrainedModel, adapter: Path, selection: HeadSelection) -> Certificate:
    """The proof for an adapter, made again; refused when the adapter has changed since it was trained."""
    before, now = Certificate.load(adapter), certify(model, adapter, selection)
    if before.adapter_hash != now.adapter_hash:
        raise ArtifactError(
            f"{adapter}: the adapter ({now.adapter_hash}) is not the one its certificate was made for "
            f"({before.adapter_hash}); train the arm again"
        )
    return now


def _stored_map(out: Path, first: ConflictMap, adapter: AdapterRecord, config: DiagnoseConfig) -> ConflictMap | None:
    """The map in a folder, if it is that of this adapter, measured as the first one, with what it was made from."""
    if not all((out / name).is_file() for name in (MAP_FILE, GRADIENTS_FILE, OUTCOMES_FILE)):
        return None
    found = ConflictMap.load(out)

    def made_from(cmap: ConflictMap) -> Any:
        return {name: record["hash"] for name, record in cmap.data.items()}, cmap.heads

    same = (
        found.model.get("adapter") == adapter
        and found.metadata["settings"] == config.model_dump(mode="json")
        and made_from(found) == made_from(first)
    )
    return found if same else None


def _require_gradients(folder: RunDirectory, remeasure: Remeasure) -> None:
    if (folder.path / GRADIENTS_FILE).is_file():
        return
    logger.info("gradients of the first map were not stored; measuring them again")
    safety, utility = remeasure.calibration
    measure_gradients(*remeasure.loaded, safety=safety, utility=utility, config=remeasure.config, out=folder.path)


def _result(
    folder: RunDirectory,
    arm: Arm,
    selection: HeadSelection,
    first: ConflictMap,
    maps: dict[int, ConflictMap],
    certificates: dict[int, Certificate],
) -> DriftResult:
    again = f"castune drift {folder.path} --arm {arm.name}"
    seed = first.metadata["provenance"]["seed"] or 0
    # The run's own map is not measured again over the choices that were made from it.
    measured = stored_measurements(folder.path, first, "castune diagnose MODEL --out DIR, in another directory")
    steps = []
    for step, cmap in maps.items():
        found = drift(measured, stored_measurements(folder.drift(arm) / str(step), cmap, again), seed=seed)
        steps.append(
            StepDrift(
                step=step,
                adapter_hash=certificates[step].adapter_hash,
                map_hash=cmap.content_hash,
                changed_rows=certificates[step].changed_rows,
                columns=found.columns,
                zones=found.zones,
                changes=zone_changes(first.heads, first.column("conflict_score"), cmap.column("conflict_score")),
                reselected=_reselected(selection, cmap),
                baseline=cmap.metadata["baseline"],
            )
        )
    data = first.data
    return DriftResult(
        arm=arm.name,
        steps=tuple(steps),
        first_map_hash=first.content_hash,
        adapter_hash=certificates[max(certificates)].adapter_hash,
        n={"heads": len(first), "utility": data["utility"]["n"], "safety": data["safety"]["n"]},
        settings=first.metadata["settings"],
        seed=seed,
        n_splits=N_SPLITS,
        n_resamples=N_RESAMPLES,
        baseline=first.metadata["baseline"],
        model=first.model,
        seconds=round(sum(cmap.metadata["seconds"] for cmap in maps.values()), 2),
        provenance=provenance(seed),
    )


def _reselected(selection: HeadSelection, cmap: ConflictMap) -> dict[str, float] | None:
    """How many of the arm's heads its own rule would choose from a later map; None where no map decides on them."""
    if selection.zone not in ("safe", "risky", "bucket"):
        return None
    return kept_heads(selection.heads, choose_again(selection, cmap).heads, len(cmap))
