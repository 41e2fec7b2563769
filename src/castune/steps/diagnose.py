"""The conflict map of a run, measured, ranked otherwise, or by groups of heads."""

from __future__ import annotations

import logging
import shutil
from math import isfinite
from typing import Any

from castune.artifacts import ConflictMap
from castune.artifacts.files import replacing
from castune.artifacts.formats import write_json
from castune.config import DataConfig, DiagnoseConfig, Recipe
from castune.core.journal import Journal
from castune.core.loading import LoadedModel
from castune.core.provenance import fingerprint, provenance
from castune.core.shards import Shard
from castune.data.example import content_hash
from castune.diagnosis.domains import utility_hash, utility_sets
from castune.diagnosis.groups import ablate_groups
from castune.diagnosis.run import diagnose
from castune.diagnosis.stored import GRADIENTS_FILE, OUTCOMES_FILE, reranked
from castune.selection import select
from castune.steps.directory import RunDirectory
from castune.steps.inputs import Calibration
from castune.steps.readiness import calibration_tokens, require_ready
from castune.steps.same import check_same, check_template

logger = logging.getLogger(__name__)


def diagnose_step(
    folder: RunDirectory,
    recipe: Recipe,
    loaded: LoadedModel,
    calibration: Calibration,
    *,
    shard: str | None = None,
) -> ConflictMap:
    """The conflict map of the run, measured unless it is there; `shard` is this process's share of the measuring."""
    model, tokenizer = loaded
    safety, utility = calibration
    sets = utility_sets(utility)
    if folder.map_file.is_file():
        cmap = folder.load_map(fingerprint(model))
        # A map that knows nothing of a setting was made before there was a choice, with what is the default now.
        found = DiagnoseConfig(**cmap.metadata["settings"]).model_dump(mode="json")
        check_same("the conflict map", found, recipe.diagnose.model_dump(mode="json"), folder)
        for name, digest in (("safety", content_hash(safety)), ("utility", utility_hash(sets))):
            check_same(f"the conflict map's {name} data", cmap.data[name]["hash"], digest, folder)
        check_template("the conflict map", cmap.model, tokenizer, folder)
        logger.info("diagnosis: already done")
        Journal.remove_all(folder.path)  # of a command that was killed when the map was just made
        return cmap
    require_ready(loaded, calibration_tokens(tokenizer, recipe.diagnose, safety, utility))
    n_utility = sum(len(one.examples) for one in sets)
    logger.info("diagnosis: %d harmful prompts, %d utility examples", len(safety), n_utility)
    configs = {"utility": recipe.utility} if isinstance(recipe.utility, DataConfig) else recipe.utility
    cmap = diagnose(
        model,
        tokenizer,
        safety=safety,
        utility=utility,
        config=recipe.diagnose,
        out=folder.path,
        shard=shard,
        sources={"safety": recipe.safety.source, **{one.objective: configs[one.name].source for one in sets}},
        seed=recipe.seed,
    )
    if Shard.of(shard).writes:
        folder.record_step("diagnose", cmap.metadata["provenance"])
    return cmap


def rerank_step(folder: RunDirectory, recipe: Recipe, source: RunDirectory) -> ConflictMap:
    """The conflict map of the run from what another run's map was made from: S(h) and C(h) are ranked otherwise."""
    if not folder.map_file.is_file():
        cmap = source.load_map()
        again = f"castune diagnose {recipe.model} --out {source.path}"
        found = reranked(source.path, cmap, recipe.diagnose.sensitivity_rank, again)
        for name in (OUTCOMES_FILE, GRADIENTS_FILE):
            with replacing(folder.path / name) as temporary:
                shutil.copyfile(source.path / name, temporary)
        found.save(folder.path)
    return folder.load_map()


def group_step(
    folder: RunDirectory,
    recipe: Recipe,
    loaded: LoadedModel,
    calibration: Calibration,
    *,
    buckets: int,
) -> list[dict[str, Any]]:
    """Joint shifts of every bucket beside the sums of its heads' own; written to `group_ablation.json`.

    With several utility domains, utility shifts are means over the domains, of buckets and of single heads.

    Returns:
        A record a bucket, the riskiest first: `bucket`, `heads`, and for both sets the joint shift with its standard
        error and the sum over its heads ablated one at a time.
    """
    cmap = folder.load_map(fingerprint(loaded.model))
    groups = [select(cmap, buckets=buckets, bucket=number).units for number in range(1, buckets + 1)]
    safety, utility = calibration
    shifts = ablate_groups(*loaded, groups=groups, safety=safety, utility=utility, config=recipe.diagnose)
    row_of = {one: row for row, one in enumerate(cmap.units)}
    # The combined map may hold of each head the shift on its worst domain only.
    maps = list(cmap.domains.values()) or [cmap]
    records = []
    for number, group in enumerate(groups):
        rows = [row_of[one] for one in group]
        record: dict[str, Any] = {"bucket": number + 1, "heads": len(group)}
        for name in ("utility_shift", "safety_shift"):
            error = float(getattr(shifts, f"{name}_se")[number])
            record[name] = float(getattr(shifts, name)[number])
            record[f"{name}_se"] = error if isfinite(error) else None
            record[f"{name}_sum"] = sum(float(one.column(name)[rows].sum()) for one in maps) / len(maps)
        records.append(record)
    content = {
        "conflict_map_hash": cmap.content_hash,
        "buckets": records,
        "settings": recipe.diagnose.model_dump(mode="json"),
        "provenance": provenance(recipe.seed),
    }
    write_json(folder.groups_file, "group ablation", content)
    return records
