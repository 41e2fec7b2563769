"""Artifacts: what was saved is what is loaded, files are whole or absent, damage is named."""

from __future__ import annotations

import dataclasses
import errno
import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from castune.artifacts import (
    Certificate,
    ConflictMap,
    EvalResult,
    HeadSelection,
    ScaledAdapter,
    SuiteResult,
    TuneResult,
)
from castune.artifacts.conflict_map import SCHEMA
from castune.artifacts.files import new_directory, replacing, write_text
from castune.artifacts.formats import SCHEMA_VERSION, write_json
from castune.artifacts.unit import joined
from castune.errors import ArtifactError

MODEL = {"name": "tiny", "fingerprint": "0123456789abcdef", "parameters": 7}


def conflict_map(**columns: Any) -> ConflictMap:
    n = 6
    values: dict[str, Any] = {field.name: np.linspace(0.1, 0.7, n) for field in SCHEMA if field.type == pa.float64()}
    values |= {
        "unit": ["q_head"] * n, "layer": [0, 0, 0, 1, 1, 1], "head": [0, 1, 2, 0, 1, 2], "bucket": [1, 1, 2, 2, 3, 4],
        "safety_shift_se": [None, 0.1, 0.2, 0.3, None, 0.5],
    }  # fmt: skip
    return ConflictMap(
        pa.table({**values, **columns}, schema=SCHEMA), {"model": MODEL, "seconds": 1.5, "ties": {"ü": None}}
    )


def without_digest(path: Path) -> dict[str, Any]:
    """A JSON artifact as one who edits it on purpose leaves it."""
    return {key: value for key, value in json.loads(path.read_text(encoding="utf-8")).items() if key != "digest"}


SELECTION = HeadSelection(
    units=joined([(1, 2), (0, 1)]), zone="safe", fraction=0.25, buckets=None, bucket=None, score="conflict", seed=None,
    n_total=6, model_fingerprint="0123456789abcdef", conflict_map_hash="fedcba9876543210",
)  # fmt: skip
MIXED = dataclasses.replace(
    SELECTION,
    units=joined([(1, 2), (0, 1)], [("o_head", 1, 0), ("mlp_group", 0, 3), ("mlp_group", 0, 1)]),
    mlp_groups=4,
)
CERTIFICATE = Certificate(
    model_fingerprint="0123456789abcdef", units=joined([(0, 1), (1, 2)]), adapter_hash="aa", checked_rows=16,
    checked_tensors=3, changed_rows=15, selected_rows=16, largest_change=0.125,
)  # fmt: skip
MIXED_CERTIFICATE = dataclasses.replace(
    CERTIFICATE, units=MIXED.units, mlp_groups=4, checked_columns=5, changed_columns=2, selected_columns=3
)
TUNING = TuneResult(
    adapter="adapter", certificate=CERTIFICATE, budget={"heads": 2}, settings={"rank": 4, "max_steps": None},
    data={"source": "x", "n": 3, "hash": "h", "cut": 0}, losses=((1, 2.5), (2, 0.1 + 0.2)), steps=2, tokens=99,
    seconds=0.5, model=MODEL, provenance={"seed": 21},
    surgery={"steps": 2, "conflicting_steps": 1, "mean_cosine": None, "utility": {"source": None, "n": 3}},
)  # fmt: skip
RESELECTED = dataclasses.replace(
    TUNING,
    selections=(
        {"step": 0, "units": [["q_head", 0, 1], ["q_head", 1, 2]], "map_hash": "fe"},
        {"step": 1, "units": [["q_head", 1, 2]], "map_hash": "dc"},
    ),
)
IN_NULL_SPACE = dataclasses.replace(
    TUNING, null_space={"share": 0.95, "tokens": 640, "directions": {"model.layers.0.self_attn.q_proj": (12, 576)}}
)
SCALED = ScaledAdapter(
    certificate=CERTIFICATE, zone="safe", n_total=6, source={"name": "safe of run", "hash": "0a-0b", "r": 4, "alpha": 8.0},
    strength=0.625, target={"purpose": "safety", "value": 0.9}, model=MODEL, provenance={"seed": None},
)  # fmt: skip
SUITE = SuiteResult(
    suite="own", purpose="safety", metric="refusal_rate", value=2 / 3, standard_error=1 / 3, n=3, unscored=1,
    judge="prefix", max_new_tokens=32, extra={"answer_margin": None}, data_hash="h", seconds=0.1,
)  # fmt: skip
SAMPLES = tuple(
    {"suite": "own", "id": f"s{i}", "prompt": "naïve\u2028 line\n\x85", "reply": "\ud7ff</script>", "outcome": outcome}
    for i, outcome in enumerate((True, False, True, None))
)
EVALUATION = EvalResult(
    name="base", suites=(SUITE,), samples=SAMPLES, settings={"limit": None}, model=MODEL, provenance={"seed": 0}
)

ARTIFACTS = {
    "map": (conflict_map(), "conflict_map.parquet"),
    "selection": (SELECTION, "selection.json"),
    "mixed selection": (MIXED, "selection.json"),
    "certificate": (CERTIFICATE, "certificate.json"),
    "mixed certificate": (MIXED_CERTIFICATE, "certificate.json"),
    "tuning": (TUNING, "tune.json"),
    "reselected tuning": (RESELECTED, "tune.json"),
    "tuning in a null space": (IN_NULL_SPACE, "tune.json"),
    "scaled adapter": (SCALED, "scale.json"),
    "evaluation": (EVALUATION, "metrics.json"),
}
JSON_ARTIFACTS = [name for name, (_, file) in ARTIFACTS.items() if file.endswith(".json")]


@pytest.mark.parametrize("name", list(ARTIFACTS))
def test_save_and_load_is_equality(tmp_path: Path, name: str) -> None:
    artifact, file = ARTIFACTS[name]
    folder = tmp_path / "new" / "run"
    artifact.save(folder)
    assert (folder / file).is_file()
    loaded = type(artifact).load(folder)
    assert loaded == artifact
    assert loaded is not artifact
    # Saving what was loaded gives the same bytes: nothing is lost on the way, not even types.
    loaded.save(tmp_path / "again")
    assert (tmp_path / "again" / file).read_bytes() == (folder / file).read_bytes()


def with_domains() -> ConflictMap:
    """A combined map with the maps of two domains."""
    domains = {"maths": conflict_map(), "a-b_C": conflict_map(conflict_score=np.zeros(6))}
    records = {name: {"map_hash": cmap.content_hash} for name, cmap in domains.items()}
    metadata = {**conflict_map().metadata, "combined": "mean", "domains": records}
    return ConflictMap(conflict_map().table, metadata, domains)


def test_maps_of_domains_lie_beside_the_combined_one(tmp_path: Path) -> None:
    cmap = with_domains()
    cmap.save(tmp_path / "run")
    assert sorted(path.name for path in (tmp_path / "run" / "domains").iterdir()) == ["a-b_C.parquet", "maths.parquet"]
    assert ConflictMap.load(tmp_path / "run") == cmap
    assert ConflictMap.load(tmp_path / "run" / "domains" / "maths.parquet") == cmap.domains["maths"]
    assert cmap != ConflictMap(cmap.table, cmap.metadata, {**cmap.domains, "c": conflict_map()})
    with pytest.raises(ArtifactError, match="utility domain 'maths' is missing"):
        ConflictMap(cmap.table, cmap.metadata)
    with pytest.raises(
        ArtifactError, match=f"'a-b_C' is {conflict_map().content_hash}, the combined map was made from"
    ):
        ConflictMap(cmap.table, cmap.metadata, {**cmap.domains, "a-b_C": conflict_map()})


def test_an_interrupt_between_the_maps_leaves_no_combined_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the combined map is, those of its domains are."""
    plain, written = pq.write_table, []

    def write(table: pa.Table, path: Path, **options: Any) -> None:
        written.append(path)
        if len(written) == 3:
            raise KeyboardInterrupt
        plain(table, path, **options)

    monkeypatch.setattr(pq, "write_table", write)
    with pytest.raises(KeyboardInterrupt):
        with_domains().save(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["domains"]


def test_equality_sees_every_field(tmp_path: Path) -> None:
    for artifact in (MIXED, CERTIFICATE, TUNING, EVALUATION, SUITE):
        for field in dataclasses.fields(artifact):
            changed = {"units": joined([], [("mlp_group", 0, 0)])}.get(field.name, "changed")
            assert dataclasses.replace(artifact, **{field.name: changed}) != artifact
    assert conflict_map() != conflict_map(conflict_score=np.zeros(6))
    other = ConflictMap(conflict_map().table, {**conflict_map().metadata, "seconds": 2.0})
    assert other != conflict_map()


def test_samples_with_line_separators_inside_are_one_line_each(tmp_path: Path) -> None:
    EVALUATION.save(tmp_path)
    assert EvalResult.load(tmp_path).samples == SAMPLES
    assert (tmp_path / "samples.jsonl").read_bytes().count(b"\n") == len(SAMPLES)


def test_what_was_trained_is_the_union_of_all_selections() -> None:
    first = dataclasses.replace(SELECTION, units=joined([(0, 1), (1, 2)]))
    tuning = dataclasses.replace(
        RESELECTED, selections=(*RESELECTED.selections, {"step": 2, "units": [["q_head", 1, 0]], "map_hash": "ba"})
    )
    assert tuning.trained(first) == dataclasses.replace(first, units=joined([(0, 1), (1, 0), (1, 2)]))
    assert tuning.began_with(first)
    assert not tuning.began_with(dataclasses.replace(first, units=joined([(0, 1)])))
    assert TUNING.trained(first) == first
    assert MIXED.joined([SELECTION]) == MIXED


def test_selection_sorts_its_heads_and_refuses_doubles() -> None:
    assert SELECTION.heads == ((0, 1), (1, 2))
    assert SELECTION.layers == (0, 1)
    assert SELECTION.heads_of(1) == (2,)
    with pytest.raises(ValueError, match="twice"):
        dataclasses.replace(SELECTION, units=joined([(0, 1), (0, 1)]))


# -- atomic writes


def test_a_failing_writer_leaves_the_old_file_and_no_temporary_one(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text("old")
    with pytest.raises(RuntimeError, match="half way"), replacing(path) as temporary:
        temporary.write_text("new, half")
        assert path.read_text() == "old"
        raise RuntimeError("half way")
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]


def test_an_error_names_the_place_that_was_to_be_made_not_the_one_aside(tmp_path: Path) -> None:
    path = tmp_path / "made"
    with pytest.raises(ArtifactError) as caught, new_directory(path) as inside:
        raise ArtifactError(f"{inside / 'weights'}: not finite")
    assert str(caught.value) == f"{path / 'weights'}: not finite"
    assert not list(tmp_path.iterdir())


def test_a_directory_is_whole_whatever_happens_while_another_takes_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "adapter"
    path.mkdir()
    (path / "weights").write_text("old")
    plain = Path.rename
    for fault in (OSError(errno.EIO, "the disk is gone"), KeyboardInterrupt()):

        def failing(self: Path, target: Path, fault: BaseException = fault) -> Path:
            if self.name == "adapter" and self.parent != tmp_path:
                raise fault
            return plain(self, target)

        with monkeypatch.context() as patch:
            patch.setattr(Path, "rename", failing)
            with pytest.raises(type(fault)), new_directory(path, replace=True) as inside:
                (inside / "weights").write_text("new")
        assert (path / "weights").read_text() == "old"
    # Two make the same: the second is told, and the first one's stays.
    other = tmp_path / "export"
    with pytest.raises(ArtifactError, match="another process has just made it"), new_directory(other) as inside:
        (inside / "weights").write_text("second")
        other.mkdir()
        (other / "weights").write_text("first")
    assert (other / "weights").read_text() == "first"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "export"]


def test_an_interrupt_leaves_no_temporary_file(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), replacing(tmp_path / "x.json"):
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_the_new_file_appears_at_once_with_usual_permissions(tmp_path: Path) -> None:
    (tmp_path / "plain").write_text("")
    with replacing(tmp_path / "deep" / "x.txt") as temporary:
        temporary.write_text("whole")
        # Beside its target: replacing across file systems would not be atomic.
        assert temporary.parent == tmp_path / "deep"
        assert not (tmp_path / "deep" / "x.txt").exists()
    assert (tmp_path / "deep" / "x.txt").read_text() == "whole"
    assert os.stat(tmp_path / "deep" / "x.txt").st_mode == os.stat(tmp_path / "plain").st_mode


@pytest.mark.parametrize("name", list(ARTIFACTS))
def test_saving_something_unsavable_keeps_what_was_there(tmp_path: Path, name: str) -> None:
    artifact, file = ARTIFACTS[name]
    artifact.save(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    if name == "map":
        bad: Any = ConflictMap(artifact.table, {**artifact.metadata, "bad": object()})
    else:
        first = next(f.name for f in dataclasses.fields(artifact) if f.type.startswith(("str", "int", "float", "dict")))
        bad = dataclasses.replace(artifact, **{first: object()})
    with pytest.raises(TypeError):
        bad.save(tmp_path)
    assert (tmp_path / file).read_bytes() == before[file]
    assert {path.name for path in tmp_path.iterdir()} == set(before)


# -- no number is better than NaN


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nan_and_infinity_are_refused(tmp_path: Path, bad: float) -> None:
    broken: list[Any] = [
        dataclasses.replace(CERTIFICATE, largest_change=bad),
        dataclasses.replace(TUNING, losses=((1, bad),)),
        dataclasses.replace(EVALUATION, suites=(dataclasses.replace(SUITE, value=bad),)),
        dataclasses.replace(EVALUATION, samples=({**SAMPLES[0], "margin": bad},)),
        ConflictMap(conflict_map().table, {"model": MODEL, "seconds": bad}),
    ]
    for number, artifact in enumerate(broken):
        with pytest.raises(ValueError):
            artifact.save(tmp_path / str(number))
        found = {path.name for path in (tmp_path / str(number)).glob("*")}
        assert not found & {"tune.json", "metrics.json", "conflict_map.parquet"}
    with pytest.raises(ValueError):
        write_json(tmp_path / "x.json", "thing", {"value": bad})
    assert not (tmp_path / "x.json").exists()


# -- damage


@pytest.mark.parametrize("name", list(ARTIFACTS))
def test_missing_artifact_says_which_command_makes_it(tmp_path: Path, name: str) -> None:
    artifact, file = ARTIFACTS[name]
    with pytest.raises(ArtifactError, match=rf"{file}: no such .*castune \w+"):
        type(artifact).load(tmp_path)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[]", b"null", b"PAR1PAR1"])
@pytest.mark.parametrize("name", list(ARTIFACTS))
def test_damaged_artifact_is_named(tmp_path: Path, name: str, content: bytes) -> None:
    artifact, file = ARTIFACTS[name]
    artifact.save(tmp_path)
    (tmp_path / file).write_bytes(content)
    with pytest.raises(ArtifactError, match=file):
        type(artifact).load(tmp_path)


def test_truncated_parquet_is_damaged(tmp_path: Path) -> None:
    path = conflict_map().save(tmp_path)
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ArtifactError, match="conflict_map"):
        ConflictMap.load(tmp_path)


@pytest.mark.parametrize("name", JSON_ARTIFACTS)
def test_another_kind_names_both_sides(tmp_path: Path, name: str) -> None:
    artifact, file = ARTIFACTS[name]
    artifact.save(tmp_path)
    record = json.loads((tmp_path / file).read_text())
    kind = record["kind"]
    write_text(tmp_path / file, json.dumps({**record, "kind": "recipe for soup"}))
    with pytest.raises(ArtifactError, match=f"{file}.*expected a {kind}, found recipe for soup"):
        type(artifact).load(tmp_path)


@pytest.mark.parametrize("name", JSON_ARTIFACTS)
@pytest.mark.parametrize("version", [SCHEMA_VERSION + 1, 0, None])
def test_another_schema_version_names_both_sides(tmp_path: Path, name: str, version: int | None) -> None:
    artifact, file = ARTIFACTS[name]
    artifact.save(tmp_path)
    record = json.loads((tmp_path / file).read_text())
    assert record["schema_version"] == SCHEMA_VERSION
    write_text(tmp_path / file, json.dumps({**record, "schema_version": version}))
    with pytest.raises(ArtifactError, match=f"{file}.*{version}.*{SCHEMA_VERSION}"):
        type(artifact).load(tmp_path)


def rewritten(path: Path, header: dict[str, Any] | None) -> None:
    table = pq.read_table(path)
    metadata = None if header is None else {b"castune": json.dumps(header).encode()}
    pq.write_table(table.replace_schema_metadata(metadata), path)


def test_map_of_another_kind_or_version_or_none(tmp_path: Path) -> None:
    path = conflict_map().save(tmp_path)
    header = json.loads(pq.read_table(path).schema.metadata[b"castune"])
    assert (header["kind"], header["schema_version"]) == ("conflict map", SCHEMA_VERSION)
    rewritten(path, {**header, "schema_version": 99})
    with pytest.raises(ArtifactError, match=f"99.*{SCHEMA_VERSION}"):
        ConflictMap.load(path)
    rewritten(path, {**header, "kind": "soup"})
    with pytest.raises(ArtifactError, match="expected a conflict map, found soup"):
        ConflictMap.load(path)
    rewritten(path, None)
    with pytest.raises(ArtifactError, match="not a conflict map"):
        ConflictMap.load(path)


def test_map_with_other_columns_names_both_sides() -> None:
    table = conflict_map().table
    with pytest.raises(ArtifactError, match="columns are .*expected .*conflict_score"):
        ConflictMap(table.drop_columns(["conflict_score"]), {"model": MODEL})
    with pytest.raises(ArtifactError, match="expected"):
        ConflictMap(table.set_column(1, "layer", table["layer"].cast(pa.int64())), {"model": MODEL})


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("selection", "heads", [[0, 1], [0, 1]]),
        ("selection", "heads", [[0, 1, 2]]),
        ("selection", "heads", [["x", 1]]),
        ("selection", "heads", 5),
        ("certificate", "selection", [[0]]),
        ("certificate", "selection", None),
        ("tuning", "losses", [[1]]),
        ("tuning", "losses", [[1, "x"]]),
        ("tuning", "selections", [{"step": 0, "units": [["q_head", 0]], "map_hash": "fe"}]),
        ("tuning", "selections", [{"step": 0, "units": []}]),
        ("tuning", "selections", None),
        ("evaluation", "suites", [{"suite": "only a name"}]),
        ("evaluation", "suites", None),
    ],
)
def test_ill_formed_fields_are_a_damaged_artifact(tmp_path: Path, name: str, key: str, value: Any) -> None:
    artifact, file = ARTIFACTS[name]
    artifact.save(tmp_path)
    record = without_digest(tmp_path / file)
    write_text(tmp_path / file, json.dumps({**record, key: value}))
    with pytest.raises(ArtifactError, match=f"{file}.*damaged"):
        type(artifact).load(tmp_path)


@pytest.mark.parametrize("name", JSON_ARTIFACTS)
def test_every_missing_field_is_a_damaged_artifact(tmp_path: Path, name: str) -> None:
    artifact, file = ARTIFACTS[name]
    artifact.save(tmp_path)
    record = without_digest(tmp_path / file)
    # Records from before there was something (gradient surgery, other units, intervals) do not have it.
    optional = {field.name for field in dataclasses.fields(artifact) if field.default is not dataclasses.MISSING}
    assert optional < {"surgery", "utility", "selections", "null_space", "mlp_groups", "samples_hash"} | {
        f"{what}_columns" for what in ("checked", "changed", "selected")
    }
    # Query heads are apart in a file: `units` are others.
    for key in record.keys() - optional - {"units", "kind", "schema_version", "samples_hash"}:
        write_text(tmp_path / file, json.dumps({k: v for k, v in record.items() if k != key}))
        with pytest.raises(ArtifactError, match=f"{file}.*{key}"):
            type(artifact).load(tmp_path)


@pytest.mark.parametrize("content", [b'{"suite": "own"', b"\xff\xff\n", b""])
def test_damaged_or_shortened_samples_are_named(tmp_path: Path, content: bytes) -> None:
    EVALUATION.save(tmp_path)
    (tmp_path / "samples.jsonl").write_bytes(content)
    # An empty file is readable but holds other samples than metrics.json was computed from.
    with pytest.raises(ArtifactError, match=r"samples\.jsonl"):
        EvalResult.load(tmp_path)


def test_missing_companions_are_named(tmp_path: Path) -> None:
    EVALUATION.save(tmp_path)
    (tmp_path / "samples.jsonl").unlink()
    with pytest.raises(ArtifactError, match=r"samples\.jsonl"):
        EvalResult.load(tmp_path)
    TUNING.save(tmp_path)
    (tmp_path / "certificate.json").unlink()
    with pytest.raises(ArtifactError, match=r"certificate\.json"):
        TuneResult.load(tmp_path)


# -- identity of a map


def test_content_hash_changes_with_every_column_and_the_model() -> None:
    whole = conflict_map()
    hashes = {whole.content_hash}
    for field in SCHEMA:
        values = whole.table[field.name].to_pylist()
        changed = {
            "unit": [*values[:-1], "kv_head"],
            "layer": [*values[:-1], 9],
            "head": [*values[:-1], 9],
            "bucket": [*values[:-1], 9],
        }.get(field.name) or [*values[:-1], math.nextafter(values[-1], 1)]
        hashes.add(conflict_map(**{field.name: changed}).content_hash)
    hashes.add(conflict_map(safety_shift_se=[0.0, 0.1, 0.2, 0.3, None, 0.5]).content_hash)
    hashes.add(ConflictMap(whole.table, {"model": {**MODEL, "fingerprint": "other"}}).content_hash)
    assert len(hashes) == len(SCHEMA) + 3


def test_content_hash_is_about_the_measurement_not_the_occasion(tmp_path: Path) -> None:
    whole = conflict_map()
    later = ConflictMap(whole.table, {**whole.metadata, "seconds": 99.0})
    assert later.content_hash == whole.content_hash
    assert ConflictMap.load(whole.save(tmp_path)).content_hash == whole.content_hash


def test_columns_come_out_as_they_went_in(tmp_path: Path) -> None:
    cmap = ConflictMap.load(conflict_map().save(tmp_path))
    assert cmap.heads == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]
    assert np.isnan(cmap.column("safety_shift_se")).tolist() == [True, False, False, False, True, False]
    assert list(cmap.to_pandas().columns) == SCHEMA.names
    with pytest.raises(KeyError, match="conflict_score"):
        cmap.column("nothing")


def test_means_average_the_suites_of_a_purpose_and_never_invent_one() -> None:
    def result(*rates: tuple[str, float | None]) -> EvalResult:
        suites = (dataclasses.replace(SUITE, purpose=purpose, value=value) for purpose, value in rates)
        return dataclasses.replace(EVALUATION, suites=tuple(suites))

    assert result(("safety", 0.2), ("utility", 1.0), ("safety", 0.6)).mean("safety") == pytest.approx(0.4)
    assert result(("safety", 0.0)).mean("safety") == 0.0
    assert result(("safety", 0.2), ("safety", None)).mean("safety") is None
    assert result(("utility", 0.2)).mean("safety") is None


# -- digests


@pytest.mark.parametrize("name", JSON_ARTIFACTS)
def test_any_changed_character_of_a_value_is_noticed(tmp_path: Path, name: str) -> None:
    artifact, file = ARTIFACTS[name]
    artifact.save(tmp_path)
    text = (tmp_path / file).read_text(encoding="utf-8")
    places = [i for i, character in enumerate(text) if character.isalnum()]
    assert len(places) > 100
    # The key of the digest too: an artifact without one was edited on purpose, one that has it by another name was not.
    key = range(text.index('"digest"') + 1, text.index('"digest"') + 7)
    for place in [*places[:: max(1, len(places) // 150)], *key]:
        other = "8" if text[place] != "8" else "9"
        (tmp_path / file).write_text(text[:place] + other + text[place + 1 :], encoding="utf-8")
        with pytest.raises(ArtifactError, match=file):
            type(artifact).load(tmp_path)
    # How it is laid out does not matter, and who edits it on purpose may.
    (tmp_path / file).write_text(json.dumps(json.loads(text), indent=4), encoding="utf-8")
    assert type(artifact).load(tmp_path) == artifact
    (tmp_path / file).write_text(json.dumps(without_digest(tmp_path / file)), encoding="utf-8")
    assert type(artifact).load(tmp_path) == artifact


def test_any_changed_byte_of_a_map_is_noticed_or_changes_nothing(tmp_path: Path) -> None:
    cmap = conflict_map()
    path = cmap.save(tmp_path)
    whole = path.read_bytes()
    noticed = 0
    for place in range(0, len(whole), 7):
        changed = bytearray(whole)
        changed[place] ^= 1 << (place % 8)
        path.write_bytes(changed)
        try:
            found = ConflictMap.load(path)
        except ArtifactError:
            noticed += 1
        else:
            # Statistics and names of writers in the footer are not part of the map, nor is a key that nobody reads.
            assert found.table.equals(cmap.table)
            assert found.metadata.items() >= cmap.metadata.items()
    assert noticed > len(whole) / 7 / 2


def test_samples_are_those_of_their_metrics_whenever_it_was_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An evaluation in the place of another: at any moment what is loaded is one or the other, whole."""
    other = dataclasses.replace(
        EVALUATION, samples=tuple({**sample, "note": "judged again"} for sample in EVALUATION.samples), name="again"
    )
    for moment in range(1, 8):
        EVALUATION.save(tmp_path)
        seen = 0
        plain = Path.replace

        def replace(self: Path, target: Path, at: int = moment, plain: Any = plain) -> Path:
            nonlocal seen
            seen += 1
            if seen == at:
                raise KeyboardInterrupt
            return plain(self, target)  # type: ignore[no-any-return]

        with monkeypatch.context() as patch:
            patch.setattr(Path, "replace", replace)
            try:
                other.save(tmp_path)
                ended = True
            except KeyboardInterrupt:
                ended = False
        found = EvalResult.load(tmp_path)
        assert found == (other if ended else found)
        assert found in (EVALUATION, other)
        # Whoever copies the two files without knowing of this has it whole too.
        EvalResult.settle(tmp_path)
        copy = tmp_path / f"copy-{moment}"
        copy.mkdir()
        for name in ("samples.jsonl", "metrics.json"):
            (copy / name).write_bytes((tmp_path / name).read_bytes())
        assert EvalResult.load(copy) == found
    assert ended


def test_replies_are_for_their_owner_alone(tmp_path: Path) -> None:
    os.umask(0o022)
    EVALUATION.save(tmp_path)
    EVALUATION.save(tmp_path)  # also where they take the place of others
    assert (tmp_path / "samples.jsonl").stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "metrics.json").stat().st_mode & 0o777 == 0o644


def test_a_map_does_not_lead_to_files_elsewhere(tmp_path: Path) -> None:
    conflict_map().save(tmp_path / "secret.parquet")
    cmap = with_domains()
    path = cmap.save(tmp_path / "run" / "conflict_map.parquet")
    table = pq.read_table(path)
    header = json.loads(table.schema.metadata[b"castune"])
    header["domains"] = {"../../secret": {"map_hash": conflict_map().content_hash}}
    header.pop("digest")
    pq.write_table(table.replace_schema_metadata({b"castune": json.dumps(header).encode()}), path)
    with pytest.raises(ArtifactError, match="no name of a utility domain"):
        ConflictMap.load(path)
