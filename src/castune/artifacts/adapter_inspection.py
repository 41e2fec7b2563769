"""What an adapter does, unit by unit: how large its update is there, and its effect on losses to first order."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from castune.artifacts.files import replacing
from castune.artifacts.formats import (
    DIGEST,
    SCHEMA_VERSION,
    check_digest,
    check_schema,
    json_digest,
    parsed,
    read_parquet,
    write_parquet,
)
from castune.artifacts.records import DataRecord, ModelRecord
from castune.artifacts.unit import Unit
from castune.errors import ArtifactError

TABLE_FILE, CSV_FILE, PAGE_FILE = "inspection.parquet", "inspection.csv", "inspection.html"
_KIND = "adapter inspection"
_METADATA_KEY = b"castune"

# What the effects are on, with the name of their columns.
OBJECTIVES = {"safety": "safety_effect", "utility": "utility_effect", "over-refusal": "over_refusal_effect"}

# An effect is the first-order change of a mean loss in nats per token: below zero the loss falls. `_se` columns are
# standard errors. Null: not measured, or (effective rank, share of the largest direction) nothing is changed there.
SCHEMA = pa.schema(
    [
        ("unit", pa.string()),
        ("layer", pa.int32()),
        ("head", pa.int32()),
        ("norm", pa.float64()),
        ("relative_norm", pa.float64()),
        ("effective_rank", pa.float64()),
        ("top_share", pa.float64()),
        *((name, pa.float64()) for column in OBJECTIVES.values() for name in (column, f"{column}_se")),
        ("selected", pa.bool_()),
        ("conflict_score", pa.float64()),
        ("bucket", pa.int32()),
    ]
)


@dataclass(frozen=True, eq=False)
class AdapterInspection:
    """What an adapter does to every unit of the kinds that it changes.

    Attributes:
        table: the columns of `SCHEMA`, kind by kind of unit, sorted by layer and head (number of the unit). `norm` is
            the Frobenius norm of the unit's share of the update, `relative_norm` that over the norm of its weights.
            `selected`: whether the training was to touch it, where that is known.
        metadata: plain JSON: `adapter` (name, hash, kind, modules), `model`, `data` by objective, `settings`, `whole`
            (by objective the first-order change along the whole update, `covered` by units, and the exact one),
            `uncovered` (what no unit owns), `odd` (findings, each with `what`, `where` and a sentence), `map` (the
            hash of the conflict map laid over it, or None), `seconds`, `provenance`.
    """

    table: pa.Table
    metadata: dict[str, Any]

    def __post_init__(self) -> None:
        if not self.table.schema.equals(SCHEMA):
            raise ArtifactError(f"inspection columns are {self.table.schema.names}, expected {SCHEMA.names}")

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, AdapterInspection):
            return NotImplemented
        return self.metadata == other.metadata and self.table.equals(other.table)

    def __len__(self) -> int:
        return int(self.table.num_rows)

    @property
    def units(self) -> list[Unit]:
        """(kind, layer, index) of every row."""
        columns = (self.table[name].to_pylist() for name in ("unit", "layer", "head"))
        return [Unit(kind, layer, index) for kind, layer, index in zip(*columns, strict=True)]

    @property
    def kinds(self) -> list[str]:
        """The kinds of unit there are, in the order of the rows."""
        return list(dict.fromkeys(one.kind for one in self.units))

    @property
    def model(self) -> ModelRecord:
        """Identity of the base model."""
        found: ModelRecord = self.metadata["model"]
        return found

    @property
    def data(self) -> dict[str, DataRecord]:
        """What effects were measured on, by objective."""
        found: dict[str, DataRecord] = self.metadata["data"]
        return found

    @property
    def has_map(self) -> bool:
        """Whether a conflict map is laid over it."""
        return self.metadata["map"] is not None

    def column(self, name: str) -> NDArray[np.float64]:
        """A column of numbers as float64, in the order of `units`; missing values are NaN."""
        if name not in SCHEMA.names[3:]:
            raise KeyError(f"no column {name!r}; columns: {', '.join(SCHEMA.names[3:])}")
        return np.array([np.nan if value is None else value for value in self.table[name].to_pylist()], dtype=float)

    def effect(self, objective: str) -> NDArray[np.float64]:
        """What every unit's update does to the loss of an objective (`OBJECTIVES`); zeros where it was not measured."""
        return np.nan_to_num(self.column(OBJECTIVES[objective]))

    @property
    def content_hash(self) -> str:
        """Digest of all columns."""
        return json_digest([self.table[name].to_pylist() for name in SCHEMA.names])

    def to_json(self) -> dict[str, Any]:
        """Metadata and rows as plain JSON."""
        return {**self.metadata, "units": self.table.to_pylist()}

    def save(self, directory: str | Path) -> Path:
        """Write `inspection.parquet` and the same rows as `inspection.csv`, atomically. Returns the first."""
        import pyarrow.csv

        directory = Path(directory)
        with replacing(directory / CSV_FILE) as temporary:
            pyarrow.csv.write_csv(self.table, temporary)
        header = {"kind": _KIND, "schema_version": SCHEMA_VERSION, **self.metadata, "table": self.content_hash}
        header[DIGEST] = json_digest(header)
        table = self.table.replace_schema_metadata({_METADATA_KEY: json.dumps(header, allow_nan=False).encode()})
        write_parquet(directory / TABLE_FILE, table)
        return directory / TABLE_FILE

    @classmethod
    def load(cls, directory: str | Path) -> AdapterInspection:
        """Read an inspection from its directory.

        Raises:
            ArtifactError: missing, damaged, or of another schema version.
        """
        path, again = Path(directory) / TABLE_FILE, "castune inspect ADAPTER"
        if not path.is_file():
            raise ArtifactError(f"{path}: no such inspection; make it with: {again}")
        try:
            table = read_parquet(path)
            header = json.loads((table.schema.metadata or {})[_METADATA_KEY])
        except (pa.ArrowException, KeyError, ValueError, RecursionError, OSError) as error:
            raise ArtifactError(
                f"{path}: damaged, or not an inspection written by castune ({type(error).__name__}: "
                f"{' '.join(str(error).split())[:200]}); remove it and run: {again}"
            ) from None
        check_schema(header, path, _KIND)
        if DIGEST not in header:  # every inspection was written with one
            raise ArtifactError(f"{path}: damaged {_KIND}: it has no digest; remove it and run: {again}")
        check_digest(header, path, _KIND, again)
        noted = header.pop("table", None)
        metadata = {key: value for key, value in header.items() if key not in ("kind", "schema_version")}
        try:
            found = cls(table.replace_schema_metadata(None), metadata)
        except ValueError as error:
            raise ArtifactError(f"{path}: {error}") from None
        if (digest := parsed(path, _KIND, lambda: found.content_hash)) != noted:
            raise ArtifactError(
                f"{path}: damaged: its table has digest {digest}, recorded: {noted}; remove it and run: {again}"
            )
        return found
