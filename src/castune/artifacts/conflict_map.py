"""The conflict map: one row a head, or unit of another kind, and what it was measured from."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

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
from castune.artifacts.records import DataRecord, ModelRecord, Provenance
from castune.artifacts.rules import warn_of_old_rules
from castune.artifacts.unit import Unit
from castune.errors import ArtifactError
from castune.names import kind_words

if TYPE_CHECKING:
    import pandas as pd

MAP_FILE = "conflict_map.parquet"
# Beside it, the maps of the utility domains.
DOMAINS_FOLDER = "domains"
_KIND = "conflict map"
_METADATA_KEY = b"castune"
# Of every row O(h) |g_safe| |g_util|, beside the table: the columns are relied on, and the hash is of them alone.
MAGNITUDE = "conflict_magnitude"

# `_se` columns are standard errors of the column they are named after, `_low` and `_high` ends of its 95 % interval;
# null where none could be computed.
SCHEMA = pa.schema(
    [
        ("unit", pa.string()),
        ("layer", pa.int32()),
        ("head", pa.int32()),
        ("optimization_conflict", pa.float64()),
        ("optimization_conflict_se", pa.float64()),
        ("optimization_conflict_low", pa.float64()),
        ("optimization_conflict_high", pa.float64()),
        ("utility_shift", pa.float64()),
        ("utility_shift_se", pa.float64()),
        ("utility_shift_low", pa.float64()),
        ("utility_shift_high", pa.float64()),
        ("safety_shift", pa.float64()),
        ("safety_shift_se", pa.float64()),
        ("safety_shift_low", pa.float64()),
        ("safety_shift_high", pa.float64()),
        ("utility_rank", pa.float64()),
        ("safety_rank", pa.float64()),
        ("functional_sensitivity", pa.float64()),
        ("functional_sensitivity_low", pa.float64()),
        ("functional_sensitivity_high", pa.float64()),
        ("conflict_score", pa.float64()),
        ("conflict_score_low", pa.float64()),
        ("conflict_score_high", pa.float64()),
        ("bucket", pa.int32()),
    ]
)


@dataclass(frozen=True, eq=False)
class ConflictMap:
    """O(h), H(h), S(h) and C(h) of every head (Eqs. 2-6 of the paper).

    Attributes:
        table: the columns of `SCHEMA`, kind by kind of unit, sorted by layer and head (number of the unit). Ranks and
            buckets are within a kind: shifts and gradients of a whole MLP and of a head have other scales.
        metadata: model, data, settings, baselines, ties, reliability, seconds, provenance, and `conflict_magnitude`, a
            number a row (the score `magnitude`); plain JSON. With several
            utility domains also `domains`, a record each, and `combined`, how their maps became this one. With several
            kinds of unit also `kinds`: n, ties and reliability of each; `ties`, `reliability` (its warnings aside,
            which are those of all) and what `domains` tells are those of the first kind.
        domains: the map of each utility domain by name, where there are several.
    """

    table: pa.Table
    metadata: dict[str, Any]
    domains: Mapping[str, ConflictMap] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.table.schema.equals(SCHEMA):
            raise ArtifactError(f"conflict map columns are {self.table.schema.names}, expected {SCHEMA.names}")
        if len(self.metadata.get(MAGNITUDE, self)) != len(self):
            raise ArtifactError(f"conflict map: {len(self.metadata[MAGNITUDE])} of {MAGNITUDE} for {len(self)} rows")
        for name, record in self.metadata.get("domains", {}).items():
            found = self.domains[name].content_hash if name in self.domains else "missing"
            if found != record["map_hash"]:
                raise ArtifactError(
                    f"the map of utility domain {name!r} is {found}, the combined map was made from "
                    f"{record['map_hash']}; keep the folder domains with the map, or diagnose again"
                )

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, ConflictMap):
            return NotImplemented
        same = self.metadata == other.metadata and self.table.equals(other.table)
        return same and self.domains == other.domains

    def __len__(self) -> int:
        return int(self.table.num_rows)

    @property
    def heads(self) -> list[tuple[int, int]]:
        """(layer, head) of every row; of other units than heads (layer, index)."""
        return list(zip(self.table["layer"].to_pylist(), self.table["head"].to_pylist(), strict=True))

    @property
    def units(self) -> list[Unit]:
        """(kind, layer, index) of every row."""
        return [Unit(kind, layer, index) for kind, (layer, index) in zip(self._kinds, self.heads, strict=True)]

    @property
    def kinds(self) -> list[str]:
        """The kinds of unit there are, in the order of the rows."""
        return list(dict.fromkeys(self._kinds))

    @property
    def kind_words(self) -> dict[str, str]:
        """What its units are called where people read of them, by kind: `heads` in a map of query heads alone."""
        kinds = self.kinds
        return {kind: kind_words(kind, alone=len(kinds) == 1) for kind in kinds}

    def rows_of(self, kind: str) -> list[int]:
        """Numbers of the rows of a kind of unit."""
        return [row for row, found in enumerate(self._kinds) if found == kind]

    def only(self, kind: str) -> ConflictMap:
        """The rows of one kind of unit, to be shown: its metadata are those of the whole map."""
        if self.kinds == [kind]:
            return self
        metadata = {key: value for key, value in self.metadata.items() if key != "domains"}
        if self.has_magnitudes:
            metadata[MAGNITUDE] = [self.metadata[MAGNITUDE][row] for row in self.rows_of(kind)]
        domains = {name: cmap.only(kind) for name, cmap in self.domains.items()}
        return ConflictMap(self.table.take(self.rows_of(kind)), metadata, domains)

    @property
    def mlp_groups(self) -> int | None:
        """Into how many groups the neurons of a layer were cut; None in a map without such groups."""
        return int(self.metadata["settings"]["mlp_groups"]) if "mlp_group" in self.kinds else None

    @property
    def _kinds(self) -> list[str]:
        return [str(kind) for kind in self.table["unit"].to_pylist()]

    @property
    def model(self) -> ModelRecord:
        """Identity of the model the map belongs to."""
        found: ModelRecord = self.metadata["model"]
        return found

    @property
    def data(self) -> dict[str, DataRecord]:
        """What it was measured on, by objective: `safety`, `utility`, and `utility:NAME` of several domains."""
        found: dict[str, DataRecord] = self.metadata["data"]
        return found

    @property
    def utility_examples(self) -> str:
        """What the examples of its utility sets are called."""
        return self._words("questions", "harmless prompts", " and ")

    @property
    def utility_rate(self) -> str:
        """What the rate of the whole model on them is called."""
        return self._words("accuracy", "share answered", " or ")

    def _words(self, usual: str, of_replies: str, joined_by: str) -> str:
        named = self.metadata.get("settings", {}).get("reply_domains", ())
        # A set that is alone is the one that is named.
        kinds = {name in named for name in self.domains} or {bool(named)}
        return joined_by.join(word for word, kind in ((usual, False), (of_replies, True)) if kind in kinds)

    @property
    def fidelity(self) -> dict[str, Any]:
        """Of a map by attribution, how far each kind of unit agrees with exact ablation; empty for other maps."""
        return self._told_of_kinds("fidelity")

    @property
    def standing(self) -> dict[str, Any]:
        """Of a map by attribution, which units may be on the other side of the safe zone's border, by kind."""
        return self._told_of_kinds("standing")

    def _told_of_kinds(self, what: str) -> dict[str, Any]:
        told = self.metadata.get("kinds") or dict.fromkeys(self.kinds, self.metadata)
        return {kind: told[kind][what] for kind in self.kinds if what in told[kind]}

    @property
    def warnings(self) -> list[str]:
        """What a user should know before heads are chosen by it."""
        fidelity = self.metadata.get("fidelity") or {}
        return [*self.metadata.get("reliability", {}).get("warnings", ()), *fidelity.get("warnings", ())]

    @property
    def fingerprint(self) -> str:
        """Fingerprint of the model the map belongs to."""
        return str(self.model["fingerprint"])

    @property
    def content_hash(self) -> str:
        """Digest of all columns and the model they belong to (first 16 hex digits of SHA-256)."""
        digest = hashlib.sha256(self.fingerprint.encode())
        for name in SCHEMA.names:
            digest.update(json.dumps([name, self.table[name].to_pylist()]).encode())
        return digest.hexdigest()[:16]

    @property
    def has_magnitudes(self) -> bool:
        """Whether it holds `conflict_magnitude`: maps of castune 0.1 do not."""
        return MAGNITUDE in self.metadata

    def column(self, name: str) -> NDArray[np.float64]:
        """A column, or `conflict_magnitude`, as float64, in the order of `heads`; missing values are NaN.

        Raises:
            ArtifactError: `conflict_magnitude` of a map that does not hold it.
        """
        if name == MAGNITUDE:
            if not self.has_magnitudes:
                raise ArtifactError(
                    "this conflict map was made by an earlier version of castune and does not hold the size of its "
                    "gradients, which score magnitude needs: diagnose into another directory, or choose another score"
                )
            return np.asarray(self.metadata[MAGNITUDE], dtype=np.float64)
        if name not in SCHEMA.names:
            raise KeyError(f"no column {name!r}; columns: {', '.join(SCHEMA.names)}")
        return np.asarray(self.table[name].to_numpy(zero_copy_only=False), dtype=np.float64)

    def to_pandas(self) -> pd.DataFrame:
        """The table as a pandas DataFrame."""
        frame: pd.DataFrame = self.table.to_pandas()
        return frame

    def save(self, path: str | Path) -> Path:
        """Write a Parquet file, atomically; `path` may be a run directory. Returns the file.

        The maps of utility domains go into the folder `domains` beside it, and before it: where the file is, they are.
        """
        path = _file(path)
        for name, cmap in self.domains.items():
            cmap.save(_domain_file(path, name))
        header = {"kind": _KIND, "schema_version": SCHEMA_VERSION, **self.metadata, "table": self.content_hash}
        header[DIGEST] = json_digest(header)
        table = self.table.replace_schema_metadata({_METADATA_KEY: json.dumps(header, allow_nan=False).encode()})
        write_parquet(path, table)
        return path

    @classmethod
    def load(cls, path: str | Path) -> ConflictMap:
        """Read a map from its file or its run directory, with the maps of its utility domains.

        Raises:
            ArtifactError: missing, damaged, of another schema version, or beside the domains of another map.
        """
        path = _file(path)
        if not path.is_file():
            raise ArtifactError(
                f"{path}: no such conflict map; make it with: castune diagnose MODEL --out {path.parent}"
            )
        again = f"castune diagnose MODEL --out {path.parent}"
        try:
            table = read_parquet(path)
            header = json.loads((table.schema.metadata or {})[_METADATA_KEY])
        except (pa.ArrowException, KeyError, ValueError, RecursionError, OSError) as error:
            raise ArtifactError(
                f"{path}: damaged, or not a conflict map written by castune ({type(error).__name__}: "
                f"{' '.join(str(error).split())[:200]}); remove it and run: {again}"
            ) from None
        check_schema(header, path, _KIND)
        check_digest(header, path, _KIND, again)
        metadata = {key: value for key, value in header.items() if key not in ("kind", "schema_version", "table")}
        # Names become files: a map that came from elsewhere must not lead to others.
        names = parsed(path, _KIND, lambda: _checked_domains(metadata.get("domains", {})))
        files = {name: _domain_file(path, name) for name in names}
        domains = {name: cls.load(file) for name, file in files.items() if file.is_file()}
        try:
            cmap = cls(table.replace_schema_metadata(None), metadata, domains)
        except ValueError as error:  # also names of columns that are no text
            raise ArtifactError(f"{path}: {error}") from None
        found = parsed(path, _KIND, lambda: cmap.content_hash)
        if found != header.get("table", found):
            raise ArtifactError(
                f"{path}: damaged: its table has digest {found}, recorded: {header['table']}; "
                f"remove it and run: {again}"
            )
        warn_of_old_rules(path, _KIND, parsed(path, _KIND, lambda: Provenance(**(metadata.get("provenance") or {}))))
        return cmap


def _checked_domains(domains: Any) -> list[str]:
    for name in domains:
        if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_-]{1,100}", name):
            raise ValueError(f"{name!r} is no name of a utility domain")
    return list(domains)


def _domain_file(path: Path, name: str) -> Path:
    return path.parent / DOMAINS_FOLDER / f"{name}.parquet"


def _file(path: str | Path) -> Path:
    path = Path(path)
    return path if path.suffix == ".parquet" else path / MAP_FILE
