"""Whatever is in a file or on the command line: a result, or one line that says what is wrong. Never a traceback.

`CASTUNE_FUZZ=100` tries a hundred times as many inputs; `make test-all` four times as many.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from castune.artifacts import Certificate, ConflictMap, EvalResult, HeadSelection, TuneResult
from castune.artifacts.attack_result import AttackResult
from castune.artifacts.drift_result import DriftResult
from castune.artifacts.lm_eval_result import LmEvalResult
from castune.config import Recipe, to_toml
from castune.config.gate import GatePolicy, GateRule
from castune.core.shards import Shard
from castune.data.sources import examples
from castune.errors import CastuneError
from castune.evaluation.suites import load_suite
from castune.names import ArmName, JudgeName
from castune.secrets import has_secret, redacted
from castune.steps.directory import RunDirectory
from castune.tuning.workspace import Workspace

TIMES = int(os.environ.get("CASTUNE_FUZZ", "1"))
TRIES = settings(
    max_examples=25 * TIMES,
    deadline=5000,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

SCALARS = st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=20)
JSON = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
)
# What parsers stumble over more often than over random text.
NASTY = st.sampled_from(
    ["", "\0", "\ud800", "../../etc/passwd", "a" * 10_000, "NaN", "-0", "1e999", "٣", "=", "@", "#", "#-1", "x#", "=x", "+", "a+", "[", "{", "$(id)", "%s", "\x7f", "\u2028", "-", "--"]
)  # fmt: skip
TEXT = st.text(max_size=40) | NASTY


def survives(parse: Callable[[], Any]) -> Any:
    """The result, or None where the input was refused in words."""
    try:
        return parse()
    except CastuneError as refused:
        told = str(refused)
    assert told.strip()
    return None


# -- text on the command line and in recipes


@given(text=TEXT)
@TRIES
def test_names(text: str) -> None:
    for parse in (ArmName.parse, JudgeName.parse, Shard.of):
        survives(lambda parse=parse: parse(text))  # type: ignore[misc]
    survives(lambda: load_suite(text))


@given(
    overrides=st.lists(TEXT.map(lambda t: f"tune.{t}") | TEXT | TEXT.map(lambda t: f"evaluate.suites={t}"), max_size=3)
)
@TRIES
def test_settings(overrides: list[str], tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text('out = "run"\n')
    survives(lambda: Recipe.load(path, overrides))


@given(content=st.binary(max_size=200) | TEXT.map(lambda t: t.encode("utf-8", "replace")))
@TRIES
def test_recipes_of_any_bytes(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_bytes(content)
    survives(lambda: Recipe.load(tmp_path / "recipe.toml"))


FIELDS = sorted(
    f"{table}.{field}"
    for table, config in Recipe.model_fields.items()
    for field in getattr(config.annotation, "model_fields", {"": 0})
)


@given(field=st.sampled_from(FIELDS), value=JSON)
@TRIES
def test_recipes_with_any_value_of_any_key(field: str, value: Any) -> None:
    table, _, key = field.partition(".")
    values = {"out": "run", table: {key: value} if key else value}
    recipe = survives(lambda: Recipe.of(**values))
    if recipe is not None and not has_surrogate(recipe.model_dump(mode="json")):
        import tomllib

        # What is accepted can be written, and read back as it is.
        assert Recipe.of(**tomllib.loads(recipe.to_toml())) == recipe


def has_surrogate(value: Any) -> bool:
    return any("\\ud" in json.dumps(part) for part in [value])


@given(
    content=st.binary(max_size=200)
    | TEXT.map(lambda t: f'[[rule]]\nmetric = "{t}"\nat_least = 0.5'.encode("utf-8", "replace"))
)
@TRIES
def test_policies_of_any_bytes(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "gate.toml").write_bytes(content)
    survives(lambda: GatePolicy.load(tmp_path / "gate.toml"))


@given(
    rules=JSON
    | st.lists(st.dictionaries(st.sampled_from(sorted(GateRule.model_fields)) | st.text(max_size=8), JSON, max_size=4)),
    key=st.just("rule") | st.text(max_size=8),
)
@TRIES
def test_policies_with_any_value_of_any_key(rules: Any, key: str) -> None:
    policy = survives(lambda: GatePolicy.of({key: rules}))
    assert policy is None or all(rule.words for rule in policy.rule)


@given(st.dictionaries(st.from_regex(r"[a-z_]{1,8}", fullmatch=True), st.text(max_size=20) | st.floats(allow_nan=False, allow_infinity=False) | st.integers(-(2**62), 2**62), max_size=5))  # fmt: skip
@TRIES
def test_toml_is_read_back(values: dict[str, Any]) -> None:
    import tomllib

    if not has_surrogate(values):
        assert tomllib.loads(to_toml(values)) == values


@given(
    TEXT, st.sampled_from(["hf_abcdefghijklmnopqrst", "sk-abcdefghijklmnopqrstuvwxyz", "https://me:secretword@host/x"])
)
@TRIES
def test_secrets_do_not_survive_anything_around_them(text: str, secret: str) -> None:
    hidden = redacted(f"{text} {secret} {text}")
    assert secret not in hidden
    assert "secretword" not in hidden
    assert has_secret(secret)


# -- data


@given(
    content=st.binary(max_size=300)
    | st.lists(JSON, max_size=4).map(lambda rows: "\n".join(map(dump, rows)).encode("utf-8", "replace"))
)
@TRIES
def test_data_of_any_bytes(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_bytes(content)
    survives(lambda: examples(tmp_path / "data.jsonl"))


COLUMNS = ["id", "prompt", "target", "completion", "choices", "answer", "scoring", "messages", "chosen", "rejected", "instruction", "input", "output", "subject", "category"]  # fmt: skip


@given(rows=st.lists(st.dictionaries(st.sampled_from(COLUMNS), JSON | TEXT, max_size=6), min_size=1, max_size=3))
@TRIES
def test_data_with_any_value_in_any_column(rows: list[dict[str, Any]], tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_text("".join(dump(row) + "\n" for row in rows), encoding="utf-8")
    found = survives(lambda: examples(tmp_path / "data.jsonl"))
    for example in found or ():
        # What is accepted has all that a tokenizer is given, as text.
        assert all(isinstance(turn["content"], str) for turn in example.messages())
        assert example.right_reply is None or isinstance(example.right_reply, str)


@given(name=st.sampled_from(["mmlu", "csqa", "gsm8k", "math", "xstest", "wildguard", "harmbench", "advbench"]), row=st.dictionaries(st.sampled_from(["question", "choices", "answer", "prompt", "label", "id", "problem", "solution", "answerKey", "Behavior"]), JSON, max_size=6))  # fmt: skip
@TRIES
def test_local_copies_with_any_columns(name: str, row: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "copy.jsonl").write_text(dump(row) + "\n", encoding="utf-8")
    survives(lambda: examples(f"{name}={tmp_path / 'copy.jsonl'}"))


def dump(value: Any) -> str:
    return json.dumps(value, allow_nan=True)


# -- artifacts


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import sys

    sys.path.insert(0, str(Path(__file__).parents[1] / "pipeline"))
    from bad_input import finished_run

    return finished_run(tmp_path_factory.mktemp("fuzz"))


JSON_ARTIFACTS: dict[str, Callable[[Path], Any]] = {
    "selection.json": HeadSelection.load,
    "adapter/tune.json": TuneResult.load,
    "adapter/certificate.json": Certificate.load,
    "evaluation/base/metrics.json": lambda path: EvalResult.load(path.parent),
}


@pytest.mark.parametrize("name", JSON_ARTIFACTS)
@given(data=st.data())
@TRIES
def test_artifacts_with_any_value_anywhere(name: str, data: st.DataObject, run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    if not folder.exists():
        shutil.copytree(run, folder)
    record = json.loads((run / name).read_text(encoding="utf-8"))
    record.pop("digest")
    changed = mutated(record, data)
    (folder / name).write_text(dump(changed), encoding="utf-8", errors="replace")
    survives(lambda: JSON_ARTIFACTS[name](folder / name))


@pytest.mark.parametrize(
    ("load", "kind"),
    [
        (DriftResult.load, "conflict drift"),
        (LmEvalResult.load, "lm-eval result"),
        (AttackResult.load, "attack result"),
    ],
)
@given(value=JSON)
@TRIES
def test_other_artifacts_of_any_json(load: Callable[[Path], Any], kind: str, value: Any, tmp_path: Path) -> None:
    for content in (value, {"kind": kind, "schema_version": 1, **(value if isinstance(value, dict) else {})}):
        (tmp_path / "a.json").write_text(dump(content), encoding="utf-8", errors="replace")
        survives(lambda: load(tmp_path / "a.json"))


DEEP = b"[" * 100_000


@given(content=st.binary(max_size=300) | st.just(DEEP) | JSON.map(lambda value: dump(value).encode("utf-8", "replace")))
@TRIES
def test_what_runs_keep_beside_artifacts_of_any_bytes(content: bytes, run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    if not folder.exists():
        shutil.copytree(run, folder)
    (folder / "provenance.json").write_bytes(content)
    survives(lambda: RunDirectory(folder).record_step("diagnose", {}))
    evaluation = folder / "evaluation" / "base"
    for name in ("samples.jsonl", ".metrics.json.next"):
        (evaluation / name).write_bytes(content)
    EvalResult.settle(evaluation)
    survives(lambda: EvalResult.load(evaluation))
    workspace = Workspace(tmp_path / "arm.training")
    (workspace.folder / "checkpoint-1").mkdir(parents=True, exist_ok=True)
    for name in ("training.json", "checkpoint-1/castune.json"):
        (workspace.folder / name).write_bytes(content)
    survives(workspace.last_checkpoint)
    workspace.remove_of({}, {})


def mutated(record: Any, data: st.DataObject) -> Any:
    """A copy with one value, somewhere, replaced or taken out."""
    record = copy.deepcopy(record)
    parent, key = None, None
    node = record
    while isinstance(node, dict | list) and node and data.draw(st.integers(0, 4)) > 0:
        parent, key = node, data.draw(st.sampled_from(sorted(node) if isinstance(node, dict) else range(len(node))))
        node = node[key]
    if parent is None:
        return data.draw(JSON)
    if data.draw(st.booleans()):
        parent[key] = data.draw(JSON)
    else:
        del parent[key]
    return record


@given(data=st.data())
@TRIES
def test_maps_with_any_metadata(data: st.DataObject, run: Path, tmp_path: Path) -> None:
    table = pq.read_table(run / "conflict_map.parquet")
    header = json.loads(table.schema.metadata[b"castune"])
    header.pop("digest")
    changed = dump(mutated(header, data)).encode("utf-8", "replace")
    pq.write_table(table.replace_schema_metadata({b"castune": changed}), tmp_path / "m.parquet")
    survives(lambda: ConflictMap.load(tmp_path / "m.parquet"))


@given(place=st.integers(0, 10**6), content=st.binary(min_size=1, max_size=30), cut=st.booleans())
@TRIES
def test_maps_with_any_bytes_changed(place: int, content: bytes, cut: bool, run: Path, tmp_path: Path) -> None:
    whole = (run / "conflict_map.parquet").read_bytes()
    place %= len(whole)
    changed = whole[:place] if cut else whole[:place] + content + whole[place + len(content) :]
    (tmp_path / "m.parquet").write_bytes(changed)
    survives(lambda: ConflictMap.load(tmp_path / "m.parquet"))


@given(
    columns=st.lists(
        st.tuples(st.text(max_size=6), st.sampled_from([pa.string(), pa.int32(), pa.float64()])), max_size=5
    )
)
@TRIES
def test_parquet_files_of_any_columns(columns: list[tuple[str, pa.DataType]], tmp_path: Path) -> None:
    schema = pa.schema([(name.encode("utf-8", "replace").decode(), kind) for name, kind in columns])
    pq.write_table(schema.empty_table(), tmp_path / "m.parquet")
    survives(lambda: ConflictMap.load(tmp_path / "m.parquet"))


@given(place=st.integers(0, 10**6), content=st.binary(min_size=1, max_size=16), cut=st.booleans())
@settings(parent=TRIES, max_examples=10 * TIMES)
def test_adapters_with_any_bytes_changed(
    place: int, content: bytes, cut: bool, run: Path, tmp_path: Path, tiny_model: Callable[..., Any]
) -> None:
    """Headers of safetensors that lie about sizes and places, files that are too short: refused before they are used."""
    from castune.tuning.verify import certify

    folder = tmp_path / "adapter"
    shutil.copytree(run / "adapter", folder, dirs_exist_ok=True)
    whole = (run / "adapter" / "adapter_model.safetensors").read_bytes()
    # Half of them in the header, which is what is parsed.
    place %= len(whole) if place % 2 else min(len(whole), 400)
    changed = whole[:place] if cut else whole[:place] + content + whole[place + len(content) :]
    (folder / "adapter_model.safetensors").write_bytes(changed)
    selection = HeadSelection.load(run)
    survives(lambda: certify(tiny_model("llama"), folder, selection))


@given(data=st.data())
@settings(parent=TRIES, max_examples=10 * TIMES)
def test_adapters_with_any_configuration(
    data: st.DataObject, run: Path, tmp_path: Path, tiny_model: Callable[..., Any]
) -> None:
    from castune.tuning.verify import certify

    folder = tmp_path / "adapter"
    shutil.copytree(run / "adapter", folder, dirs_exist_ok=True)
    record = json.loads((run / "adapter" / "adapter_config.json").read_text(encoding="utf-8"))
    (folder / "adapter_config.json").write_text(dump(mutated(record, data)), encoding="utf-8", errors="replace")
    selection = HeadSelection.load(run)
    survives(lambda: certify(tiny_model("llama"), folder, selection))


def test_an_adapter_of_another_shape_is_refused(run: Path, tmp_path: Path, tiny_model: Callable[..., Any]) -> None:
    from castune.tuning.verify import certify

    folder = tmp_path / "adapter"
    shutil.copytree(run / "adapter", folder)
    tensors = load_file(folder / "adapter_model.safetensors")
    for name in list(tensors):
        save_file({**tensors, name: tensors[name][:, :1].contiguous()}, folder / "adapter_model.safetensors")
        with pytest.raises(CastuneError):
            certify(tiny_model("llama"), folder, HeadSelection.load(run))
