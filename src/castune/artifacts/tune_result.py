"""What training did, and the proof of what it did not touch."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from castune.artifacts.files import file_hash
from castune.artifacts.formats import parsed, read_json, typed, write_json
from castune.artifacts.head_selection import HeadSelection
from castune.artifacts.records import DataRecord, ModelRecord, NullSpaceRecord, Phase, Provenance, Settings
from castune.artifacts.rules import warn_of_old_rules
from castune.artifacts.unit import Unit, heads_of, joined, layers_of, only_heads

_CERTIFICATE = "certificate"
_TUNE_RESULT = "tune result"
TUNE_FILE = "tune.json"
CERTIFICATE_FILE = "certificate.json"
# What PEFT calls the files of an adapter.
ADAPTER_WEIGHTS, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
SNAPSHOTS = "snapshots"
RESELECTIONS = "reselections"
# Fields that only certificates with units of other kinds than query heads have, beside these units.
_OF_OTHERS = ("mlp_groups", "checked_columns", "changed_columns", "selected_columns")


def adapter_hash(adapter: Path) -> str:
    """Digest of the two files that make a PEFT adapter: its weights and its configuration."""
    return "-".join(file_hash(adapter / name) for name in (ADAPTER_WEIGHTS, ADAPTER_CONFIG))


def snapshots_of(adapter: Path) -> dict[int, Path]:
    """The adapters that a training kept on its way to this one, by optimiser step."""
    found = {int(path.name): path for path in (adapter / SNAPSHOTS).glob("*") if path.name.isdecimal()}
    return dict(sorted(found.items()))


@dataclass(frozen=True)
class _Written:
    """Units as they stand in a certificate's file: query heads apart from the others."""

    selection: tuple[tuple[int, int], ...]
    units: tuple[tuple[str, int, int], ...] = ()


@dataclass(frozen=True)
class Certificate:
    """Proof that an adapter changes nothing but the rows and columns that the selected heads and other units own.

    Attributes:
        model_fingerprint: the base model.
        units: the selected units, sorted.
        adapter_hash: hash of the adapter's weights and configuration (`adapter_hash`).
        checked_rows: rows of the adapted projections outside the selection that were compared bit by bit, all
            identical; of query heads alone these are query rows.
        checked_tensors: tensors of the merged model compared bit by bit with the base, all identical outside
            the selected rows.
        changed_rows: selected rows whose merged weight differs from the base.
        selected_rows: rows of the selected heads and other units.
        largest_change: largest absolute change of a merged weight.
        mlp_groups: into how many groups the neurons of a layer are cut; None without such groups.
        checked_columns: as `checked_rows`, of projections of which units own columns.
        changed_columns: as `changed_rows`.
        selected_columns: as `selected_rows`.
    """

    model_fingerprint: str
    units: tuple[Unit, ...]
    adapter_hash: str
    checked_rows: int
    checked_tensors: int
    changed_rows: int
    selected_rows: int
    largest_change: float
    mlp_groups: int | None = None
    checked_columns: int = 0
    changed_columns: int = 0
    selected_columns: int = 0

    @property
    def changed(self) -> str:
        """How much of what may change has changed, in words."""
        text = f"{self.changed_rows:,} of {self.selected_rows:,} selected rows"
        if self.selected_columns:
            text += f" and {self.changed_columns:,} of {self.selected_columns:,} selected columns"
        return f"{text} changed"

    @property
    def heads(self) -> tuple[tuple[int, int], ...]:
        """Sorted (layer, head) pairs of the selected query heads."""
        return heads_of(self.units)

    @property
    def only_heads(self) -> bool:
        """Whether no unit of another kind than query heads was selected."""
        return only_heads(self.units)

    @property
    def layers(self) -> tuple[int, ...]:
        """Layers that hold a selected unit, sorted."""
        return layers_of(self.units)

    def save(self, path: str | Path) -> Path:
        """Write `certificate.json` into an adapter directory (or to the given file), atomically."""
        path = _named(path, CERTIFICATE_FILE)
        content = asdict(self)
        del content["units"]
        columns = {name: content.pop(name) for name in _OF_OTHERS}
        fingerprint = content.pop("model_fingerprint")
        content = {"model_fingerprint": fingerprint, "selection": self.heads, **content}
        if not self.only_heads:
            content |= {"units": [one for one in self.units if not one.is_head], **columns}
        write_json(path, _CERTIFICATE, content)
        return path

    @classmethod
    def load(cls, path: str | Path) -> Certificate:
        """Read a certificate from its file or its adapter directory."""
        path = _named(path, CERTIFICATE_FILE)
        record = read_json(path, _CERTIFICATE, f"castune tune {path.parent.parent} --data DATA")
        written = typed(path, _CERTIFICATE, _Written, record)
        return typed(path, _CERTIFICATE, cls, {**record, "units": joined(written.selection, written.units)})


@dataclass(frozen=True)
class TuneResult:
    """A finished training: where the adapter is, what it cost, what it was made from.

    Attributes:
        adapter: adapter directory, relative to the run directory.
        certificate: the proof.
        budget: heads, query rows, A matrices, trainable and effective parameters.
        settings: the resolved `TuneConfig`.
        data: source, n, hash, and how many examples were cut.
        losses: (step, loss) pairs as logged.
        steps: optimiser steps.
        tokens: tokens that passed through the model.
        seconds: wall time of the training loop.
        model: identity of the base model.
        provenance: versions, machine, command, time.
        surgery: of a training with gradient surgery: steps, conflicting_steps, mean_cosine of alignment and utility
            gradient (None: undefined at every step). None without.
        utility: of a training with gradient surgery, data replay or a null space: source, n, hash, cut of the utility
            data, and how many of the training examples are `replayed` from it. None without.
        selections: of a training that selected again: for every phase the `step` after which it began, the selected
            `units` ([kind, layer, number]), and the `map_hash` of the map they were chosen from. `budget` is that
            of the last phase, the certificate's selection that of all. Empty without.
        null_space: of a training in the null space of the utility activations: which directions were left out. None
            without.
    """

    adapter: str
    certificate: Certificate
    budget: dict[str, int]
    settings: Settings
    data: DataRecord
    losses: tuple[tuple[int, float], ...]
    steps: int
    tokens: int
    seconds: float
    model: ModelRecord
    provenance: Provenance
    surgery: dict[str, Any] | None = None
    utility: DataRecord | None = None
    selections: tuple[Phase, ...] = ()
    null_space: NullSpaceRecord | None = None

    def trained(self, selection: HeadSelection) -> HeadSelection:
        """Everything that was trained at any time, of the arm that began with `selection`."""
        phases = [tuple(Unit(str(k), int(layer), int(i)) for k, layer, i in one["units"]) for one in self.selections]
        return selection.joined(replace(selection, units=units) for units in phases)

    def began_with(self, selection: HeadSelection) -> bool:
        """Whether the training began with these heads; True where it was not noted, and they never changed."""
        return not self.selections or self.selections[0]["units"] == [list(one) for one in selection.units]

    def save(self, path: str | Path) -> Path:
        """Write `tune.json` into an adapter directory (or to the given file), atomically."""
        path = _named(path, TUNE_FILE)
        content = asdict(self)
        del content["certificate"]  # it has a file of its own
        if not self.selections:
            del content["selections"]
        if self.null_space is None:
            del content["null_space"]
        self.certificate.save(path.parent)
        write_json(path, _TUNE_RESULT, content)
        return path

    @classmethod
    def load(cls, path: str | Path) -> TuneResult:
        """Read a tune result, and the certificate beside it, from its file or its adapter directory."""
        path = _named(path, TUNE_FILE)
        record = read_json(path, _TUNE_RESULT, f"castune tune {path.parent.parent} --data DATA")
        # Of a training that did not select again there are none.
        selections = parsed(path, _TUNE_RESULT, lambda: [_phase(one) for one in record.get("selections", ())])
        certificate = asdict(Certificate.load(path.parent))
        found = typed(path, _TUNE_RESULT, cls, {**record, "certificate": certificate, "selections": selections})
        if found.utility is not None:  # without utility data its loss was what it is now
            warn_of_old_rules(path.parent, "adapter", found.provenance)
        return found


def _phase(record: dict[str, Any]) -> Phase:
    units: list[list[str | int]] = [[str(kind), int(layer), int(number)] for kind, layer, number in record["units"]]
    return {"step": int(record["step"]), "units": units, "map_hash": record["map_hash"]}


def _named(path: str | Path, name: str) -> Path:
    path = Path(path)
    return path if path.suffix == ".json" else path / name
