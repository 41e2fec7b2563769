"""What a diagnosis measured, kept beside its map: from it every statistic of the map can be made again.

`ablation.parquet` has the outcome of every example without every head, `gradients.parquet` the inner products of the
partial gradients of every head.

Shape letters: H head (all heads of the model in one axis), N example, C gradient chunk.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from castune.artifacts import ConflictMap, Unit
from castune.artifacts.conflict_map import SCHEMA
from castune.artifacts.formats import read_parquet, write_parquet
from castune.artifacts.unit import only_heads
from castune.config import DiagnoseConfig, SensitivityRank
from castune.data.example import Example
from castune.diagnosis.grams import Gram
from castune.diagnosis.maps import Results, finished
from castune.diagnosis.measurements import Domain, Measurements
from castune.diagnosis.score import (
    Floats,
    conflict_from_gram,
    conflict_score,
    functional_sensitivity,
    shift_of,
)
from castune.errors import ArtifactError

GRADIENTS_FILE = "gradients.parquet"
OUTCOMES_FILE = "ablation.parquet"
# Gradients that are measured again on other hardware differ by rounding; those of another model by far more.
_SAME_CONFLICT = 0.01


@dataclass(frozen=True)
class _Pairs:
    baseline_N: Floats
    ablated_HN: Floats


def save_gradients(out: Path, heads: Sequence[Unit], grams: Mapping[str, Gram]) -> None:
    """Write `gradients.parquet`, atomically: a row a head and utility objective, the matrix row by row."""
    tables = [
        pa.table(
            {
                "objective": [objective] * len(heads),
                "layer": pa.array([head.layer for head in heads], pa.int32()),
                "head": pa.array([head.index for head in heads], pa.int32()),
                "n_safety": pa.array([gram.n_safety] * len(heads), pa.int32()),
                "products": pa.array(list(gram.products_HCC.reshape(len(heads), -1)), pa.list_(pa.float64())),
            }
        )
        for objective, gram in sorted(grams.items())
    ]
    write_parquet(out / GRADIENTS_FILE, pa.concat_tables(tables))


def save_outcomes(out: Path, results: Results, examples: Mapping[str, Sequence[Example]]) -> None:
    """Write `ablation.parquet`, atomically: head x example outcomes by objective, null where unscored."""
    tables, heads = [], results.heads
    for objective, measured in {**results.utility, "safety": results.safety}.items():
        outcomes = measured.outcomes
        n_heads, n_examples = outcomes.ablated_HN.shape
        columns: dict[str, Any] = {"objective": [objective] * (n_heads * n_examples)}
        if not only_heads(heads):
            columns["unit"] = np.repeat([h.kind for h in heads], n_examples)
        columns |= {
            "layer": pa.array(np.repeat([h.layer for h in heads], n_examples), pa.int32()),
            "head": pa.array(np.repeat([h.index for h in heads], n_examples), pa.int32()),
            "example": [example.id for example in examples[objective]] * n_heads,
            "baseline": pa.array(np.tile(outcomes.baseline_N, n_heads), from_pandas=True),
            "ablated": pa.array(outcomes.ablated_HN.ravel(), from_pandas=True),
        }
        tables.append(pa.table(columns))
    write_parquet(out / OUTCOMES_FILE, pa.concat_tables(tables))


def stored_measurements(folder: Path, cmap: ConflictMap, made_by: str) -> Measurements:
    """What the map of a folder was made from.

    Args:
        folder: where `ablation.parquet` and `gradients.parquet` lie.
        cmap: the map.
        made_by: the command that makes the files again, for the message.

    Raises:
        ArtifactError: a file is missing, damaged, or does not belong to the map.
    """
    maps = {f"utility:{name}": one for name, one in cmap.domains.items()} or {"utility": cmap}
    path = folder / GRADIENTS_FILE
    try:
        grams = _grams(path, cmap, [*maps])
        path = folder / OUTCOMES_FILE
        outcomes = _outcomes(path, cmap, [*maps, "safety"])
        n_safety = next(iter(grams.values())).n_safety
        settings = DiagnoseConfig(**cmap.metadata["settings"])
        # Maps from before it was noted have one measure.
        measures = {one: cmap.metadata.get("measures", {}).get(one, settings.measure) for one in maps}
        found = {one: Domain(grams[one].products_HCC, outcomes[one], measures[one]) for one in maps}
        measurements = Measurements(
            domains=list(found.values()),
            n_safety=n_safety,
            safety=outcomes["safety"],
            measure=settings.measure,
            sensitivity_rank=settings.sensitivity_rank,
            combination=settings.domains,
        )
    except FileNotFoundError:
        raise ArtifactError(f"{path}: missing; make it with: {made_by}") from None
    except (pa.ArrowException, OSError, KeyError, ValueError, TypeError) as error:
        raise ArtifactError(f"{path}: damaged ({error!r}); remove it and run: {made_by}") from None
    safety_shift, _ = shift_of(settings.measure)(outcomes["safety"].ablated_HN, outcomes["safety"].baseline_N)
    for objective, domain in found.items():
        utility_shift, _ = shift_of(measures[objective])(domain.utility.ablated_HN, domain.utility.baseline_N)
        pairs = [
            (OUTCOMES_FILE, "utility_shift", utility_shift, 1e-9),
            (OUTCOMES_FILE, "safety_shift", safety_shift, 1e-9),
            (GRADIENTS_FILE, "optimization_conflict", conflict_from_gram(domain.gram_HCC, n_safety), _SAME_CONFLICT),
        ]
        for file, column, values_H, tolerance in pairs:
            if not np.allclose(values_H, maps[objective].column(column), rtol=0, atol=tolerance):
                raise ArtifactError(
                    f"{folder / file} does not belong to the map beside it: {column} comes out differently; "
                    f"remove it and run: {made_by}"
                )
    return measurements


def reranked(folder: Path, cmap: ConflictMap, sensitivity_rank: SensitivityRank, made_by: str) -> ConflictMap:
    """The map of a folder with S(h) ranked otherwise, and what follows from S(h); nothing is measured.

    Args:
        folder: where `ablation.parquet` and `gradients.parquet` lie.
        cmap: its map, of query heads on one utility set.
        sensitivity_rank: see `functional_sensitivity`.
        made_by: the command that makes the files again, for the message.

    Raises:
        ArtifactError: a file is missing, damaged, or does not belong to the map.
    """
    measurements = replace(stored_measurements(folder, cmap, made_by), sensitivity_rank=sensitivity_rank)
    columns: dict[str, Any] = {name: cmap.table[name] for name in SCHEMA.names}
    sensitivity = functional_sensitivity(
        cmap.column("utility_shift"), cmap.column("safety_shift"), rank=sensitivity_rank
    )
    columns["functional_sensitivity"] = sensitivity
    columns["conflict_score"] = conflict_score(cmap.column("optimization_conflict"), sensitivity)
    # How far an attribution's S and C agree with exact ones, and who stands where, depends on the ranking.
    kept = {name: value for name, value in cmap.metadata.items() if name not in ("fidelity", "standing")}
    metadata = {
        **kept,
        "settings": {**cmap.metadata["settings"], "sensitivity_rank": sensitivity_rank},
        "reranked_from": cmap.content_hash,
    }
    return finished(columns, measurements, metadata)


def _grams(path: Path, cmap: ConflictMap, objectives: Sequence[str]) -> dict[str, Gram]:
    found = {}
    for objective, part in _parts(path, objectives).items():
        _check_heads(part, cmap, 1)
        products = np.array(part["products"].to_pylist(), dtype=np.float64)
        n_chunks = round(products.shape[1] ** 0.5)
        found[objective] = Gram(products.reshape(len(cmap), n_chunks, n_chunks), int(part["n_safety"][0].as_py()))
    return found


def _outcomes(path: Path, cmap: ConflictMap, objectives: Sequence[str]) -> dict[str, _Pairs]:
    found = {}
    for objective, part in _parts(path, objectives).items():
        n_examples, rest = divmod(part.num_rows, len(cmap))
        if rest:
            raise ValueError(f"{part.num_rows} rows of {objective} for {len(cmap)} heads")
        _check_heads(part, cmap, n_examples)
        baseline, ablated = (
            np.asarray(part[name].to_numpy(zero_copy_only=False), dtype=np.float64).reshape(len(cmap), n_examples)
            for name in ("baseline", "ablated")
        )
        found[objective] = _Pairs(baseline[0], ablated)
    return found


def _parts(path: Path, objectives: Sequence[str]) -> dict[str, Any]:
    table = read_parquet(path)
    found = set(table["objective"].unique().to_pylist())
    if found != set(objectives):
        raise ValueError(f"objectives {sorted(found)}, expected {sorted(objectives)}")
    return {objective: table.filter(pc.equal(table["objective"], objective)) for objective in objectives}


def _check_heads(part: Any, cmap: ConflictMap, times: int) -> None:
    heads = list(zip(part["layer"].to_pylist(), part["head"].to_pylist(), strict=True))
    if heads != [head for head in cmap.heads for _ in range(times)]:
        raise ValueError("its heads are not those of the map")
