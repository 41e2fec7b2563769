"""What is kept beside a map is what it was made from, and nothing else passes for it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

import castune
from castune import DiagnoseConfig
from castune.artifacts import ConflictMap
from castune.data.example import Example
from castune.diagnosis.measurements import COLUMNS
from castune.diagnosis.run import measure_gradients
from castune.diagnosis.stored import reranked, stored_measurements
from castune.errors import ArtifactError

Files = ("gradients.parquet", "ablation.parquet")


@pytest.mark.parametrize("measure", ["margin", "decision"])
@pytest.mark.parametrize("domains", [None, "mean", "worst"])
def test_every_column_of_the_map_can_be_made_again(
    tiny_model: Callable[..., Any],
    tiny_tokenizer: Any,
    questions: list[Example],
    harmful: list[Example],
    tmp_path: Path,
    measure: Any,
    domains: Any,
) -> None:
    config = DiagnoseConfig(measure=measure, max_new_tokens=4, gradient_chunks=2, domains=domains or "mean")
    utility = questions if domains is None else {"b": questions[:3], "a": questions[2:]}
    model = tiny_model("llama")
    cmap = castune.diagnose(model, tiny_tokenizer, safety=harmful, utility=utility, config=config, out=tmp_path)
    found = stored_measurements(tmp_path, ConflictMap.load(tmp_path), "again")
    for name in COLUMNS:
        assert found.columns(found.whole)[name][0] == pytest.approx(cmap.column(name), abs=1e-9), name
    kept = (tmp_path / "gradients.parquet").read_bytes()
    measure_gradients(model, tiny_tokenizer, safety=harmful, utility=utility, config=config, out=tmp_path)
    assert (tmp_path / "gradients.parquet").read_bytes() == kept


def test_what_is_not_the_maps_is_refused(
    tiny_model: Callable[..., Any],
    tiny_tokenizer: Any,
    questions: list[Example],
    harmful: list[Example],
    tmp_path: Path,
) -> None:
    config = DiagnoseConfig(measure="margin", max_new_tokens=4, gradient_chunks=2)
    for seed in (0, 1):
        castune.diagnose(
            tiny_model("llama", seed=seed), tiny_tokenizer, safety=harmful, utility=questions, config=config,
            out=tmp_path / str(seed),
        )  # fmt: skip
    cmap = ConflictMap.load(tmp_path / "0")
    folder = tmp_path / "tried"
    for name in Files:
        other = Files[1 - Files.index(name)]
        table = pq.read_table(tmp_path / "0" / name)
        some = next(i for i, kind in enumerate(table.schema.names) if kind in ("products", "ablated"))
        tries: dict[str, Any] = {
            "missing": Path.unlink,
            "damaged": lambda path: path.write_bytes(path.read_bytes()[:-9]),
            "does not belong": lambda path, name=name: shutil.copyfile(tmp_path / "1" / name, path),
        }
        for said, spoil in tries.items():
            check(tmp_path / "0", folder, cmap, name, spoil, said)
        check(tmp_path / "0", folder, cmap, name, lambda p, o=other: shutil.copyfile(tmp_path / "0" / o, p), "damaged")
        for changed in (table.slice(1), table.drop_columns([table.schema.names[some]]), table.slice(0, 0)):
            check(tmp_path / "0", folder, cmap, name, lambda p, t=changed: pq.write_table(t, p), "damaged")
    assert np.isfinite(stored_measurements(tmp_path / "0", cmap, "again").safety.ablated_HN).all()


def check(source: Path, folder: Path, cmap: ConflictMap, name: str, spoil: Callable[[Path], Any], said: str) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(source, folder)
    spoil(folder / name)
    with pytest.raises(ArtifactError, match=said) as error:
        stored_measurements(folder, cmap, "castune drift RUN")
    assert str(folder / name) in str(error.value)
    assert "castune drift RUN" in str(error.value)


@pytest.mark.parametrize("measure", ["margin", "decision"])
def test_a_map_ranked_otherwise_is_the_one_a_diagnosis_would_give(
    tiny_model: Callable[..., Any],
    tiny_tokenizer: Any,
    questions: list[Example],
    harmful: list[Example],
    tmp_path: Path,
    measure: Any,
) -> None:
    config = DiagnoseConfig(measure=measure, max_new_tokens=4, gradient_chunks=2)
    model, data = tiny_model("llama"), {"safety": harmful, "utility": questions}
    cmap = castune.diagnose(model, tiny_tokenizer, **data, config=config, out=tmp_path, seed=3)
    other = config.model_copy(update={"sensitivity_rank": "of-difference"})
    expected = castune.diagnose(model, tiny_tokenizer, **data, config=other, seed=3)
    found = reranked(tmp_path, cmap, "of-difference", "again")
    assert found.table.equals(expected.table)
    assert not found.table.equals(cmap.table)
    for key in ("settings", "ties", "reliability", "baseline", "data"):
        assert found.metadata[key] == expected.metadata[key], key
    assert found.metadata["reranked_from"] == cmap.content_hash
