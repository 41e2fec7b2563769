"""A run made again from its own records: the same bit for bit here, and what differs is named with its severity."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from command_line import command, refused

from castune.artifacts import ConflictMap, EvalResult, TuneResult
from castune.config import Recipe
from castune.core.loading import load_model
from castune.steps.compare import compare_adapters, compare_evaluations, compare_maps
from castune.steps.directory import RunDirectory
from castune.steps.reproduce import REPRODUCTION_FILE, Reproduction, conditions, reproduce
from castune.tuning.mask import mask_adapter

Models = Callable[..., Path]
RecipeOf = Callable[..., Recipe]


@pytest.fixture
def finished(finished_run: Callable[..., Path]) -> Path:
    return finished_run()


def outcomes(found: Reproduction) -> dict[str, str]:
    return {one.what: one.outcome for one in found.comparisons}


def test_a_run_is_reproduced_bit_for_bit(finished: Path, own_data: dict[str, Path], tmp_path: Path) -> None:
    before = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}
    found = reproduce(finished, tmp_path / "again")
    assert found.differences == ()
    assert outcomes(found) == {
        "conflict map": "same",
        **{f"{what} of {arm}": "same" for arm in ("safe", "risky") for what in ("heads", "adapter")},
        **{f"{own_data['utility']} of {arm}": "same" for arm in ("base", "safe", "risky")},
        **{
            f"{own_data[name]} of {arm}": "same" for arm in ("base", "safe", "risky") for name in ("held-out", "benign")
        },
    }
    assert found.is_reproduced
    # The run itself is left alone.
    assert {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()} == before
    record = json.loads((tmp_path / "again" / REPRODUCTION_FILE).read_text(encoding="utf-8"))
    assert len(record["comparisons"]) == len(found.comparisons)
    # What has been made again is a run, and can be made again.
    assert reproduce(tmp_path / "again", tmp_path / "third").is_reproduced


def test_records_decide_and_not_the_recipe_that_lies_there_now(finished: Path, tmp_path: Path) -> None:
    recipe = RunDirectory(finished).load_recipe()
    changed = {**recipe.model_dump(), "tune": {**recipe.tune.model_dump(), "learning_rate": 0.5, "max_steps": 1}}
    RunDirectory(finished).save_recipe(Recipe.of(**changed))
    assert reproduce(finished, tmp_path / "again").is_reproduced


def test_an_interrupted_reproduction_goes_on(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import castune.steps.reproduce as module

    plain, seen = module.evaluate_step, []

    def interrupted(*arguments: Any, **options: Any) -> Any:
        seen.append(1)
        if len(seen) == 1:
            raise KeyboardInterrupt
        return plain(*arguments, **options)

    monkeypatch.setattr(module, "evaluate_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        reproduce(finished, tmp_path / "again")
    map_file = tmp_path / "again" / "conflict_map.parquet"
    made = map_file.stat().st_mtime_ns
    assert reproduce(finished, tmp_path / "again").is_reproduced
    assert map_file.stat().st_mtime_ns == made


def test_changed_data_are_told_and_what_depends_on_them_is_not_compared(
    finished: Path, own_data: dict[str, Path], tmp_path: Path
) -> None:
    own_data["align"].write_text(own_data["align"].read_text().replace("Rather not", "Please not"))
    own_data["held-out"].write_text(own_data["held-out"].read_text().replace("Explain", "Tell"))
    found = conditions(RunDirectory(finished))
    assert [(one.what, one.severity) for one in found] == [
        ("training data of safe", "other input"),
        ("training data of risky", "other input"),
        (f"examples of {own_data['held-out']}", "other input"),
    ]
    again = reproduce(finished, tmp_path / "again")
    assert outcomes(again)["conflict map"] == "same"
    assert outcomes(again)["adapter of safe"] == "not compared"
    assert outcomes(again)[f"{own_data['held-out']} of base"] == "not compared"
    own_data["align"].unlink()
    assert any("no such file" in one.now for one in conditions(RunDirectory(finished)))


def test_conditions_are_ordered_by_what_they_mean(finished: Path, own_data: dict[str, Path]) -> None:
    cmap = ConflictMap.load(finished)
    record = cmap.metadata["provenance"]
    record["versions"] |= {"torch": "1.0", "datasets": "0.1", "vllm": None}
    record["machine"] = "Plan9 vax"
    record["threads"] = 4096
    record["accelerators"] = []
    record["code"] = {"commit": "0" * 40, "dirty": True}
    cmap.save(finished)
    own_data["safety"].write_text(own_data["safety"].read_text().replace("cannot", "will not"))
    found = conditions(RunDirectory(finished))
    order = ["other input", "other arithmetic", "other program"]
    assert [order.index(one.severity) for one in found] == sorted(order.index(one.severity) for one in found)
    severity = {one.what: one.severity for one in found}
    assert severity == {
        "safety data": "other input",
        "version of torch": "other arithmetic",
        "machine": "other arithmetic",
        "version of datasets": "other program",
        "threads": "other program",
        "castune's code": "other program",
    }


def test_another_model_is_a_difference(finished: Path, models: Models, tmp_path: Path) -> None:
    models(seed=1)  # in the place of the first
    found = reproduce(finished, tmp_path / "again")
    assert outcomes(found)["conflict map"] == "different"
    assert not found.is_reproduced


def test_adapters_made_of_others_and_heads_chosen_by_hand(finished: Path, tmp_path: Path) -> None:
    folder = RunDirectory(finished)
    arm = folder.new_arm("kept")
    selection = folder.load_selection(folder.arm("risky"), folder.load_map())
    model, _ = load_model(folder.load_recipe())
    mask_adapter(model, [folder.arm("risky").adapter], selection, arm.adapter)
    selection.save(arm.folder)
    found = outcomes(reproduce(finished, tmp_path / "again"))
    assert found["adapter of kept"] == "not compared"
    assert found["adapter of risky"] == "same"


def test_the_command_line(finished: Path, tmp_path: Path) -> None:
    assert "conditions: unchanged" in command("reproduce", finished, "--check")
    assert not finished.with_name("run-reproduced").exists()
    said = command("reproduce", finished)
    assert "reproduced" in said.splitlines()[-2]
    assert (finished.with_name("run-reproduced") / REPRODUCTION_FILE).is_file()
    assert "another directory" in refused("reproduce", finished, "--out", finished)
    assert "no such conflict map" in refused("reproduce", tmp_path)
    models = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps({**models, "model_type": "nothing"}))
    assert "no model config" in refused("reproduce", finished, "--check")


# -- comparisons, on results that differ by a known amount


def test_maps_that_differ_in_the_last_digits_are_close_and_in_buckets_different(finished: Path) -> None:
    cmap = ConflictMap.load(finished)
    nudged = cmap.table.set_column(
        cmap.table.schema.get_field_index("conflict_score"),
        "conflict_score",
        [[value * (1 + 1e-12) for value in cmap.table["conflict_score"].to_pylist()]],
    )
    assert compare_maps(cmap, ConflictMap(nudged, cmap.metadata)).outcome == "close"
    buckets = cmap.table["bucket"].to_pylist()
    swapped = [5 - bucket for bucket in buckets]
    import pyarrow as pa

    index = cmap.table.schema.get_field_index("bucket")
    moved = cmap.table.set_column(index, "bucket", pa.array(swapped, pa.int32()))
    found = compare_maps(cmap, ConflictMap(moved, cmap.metadata))
    assert found.outcome == "different"
    assert f"{len(cmap)} of {len(cmap)} heads" in found.detail


def test_adapters_are_compared_by_their_weights(finished: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    adapter, result = finished / "adapter", TuneResult.load(finished / "adapter")
    other = tmp_path / "other"
    for scale, outcome in ((1 + 1e-6, "close"), (2.0, "different")):
        shutil.copytree(adapter, other, dirs_exist_ok=True)
        file = other / "adapter_model.safetensors"
        save_file({name: tensor * scale for name, tensor in load_file(adapter / file.name).items()}, file)
        found = compare_adapters("adapter", (adapter, result), (other, result))
        assert found.outcome == outcome
        share = float(found.detail.split("differ by ")[1].split()[0])
        assert share == pytest.approx(scale - 1, rel=0.2)


def test_evaluations_are_compared_example_by_example(finished: Path) -> None:
    import dataclasses

    result = EvalResult.load(finished / "evaluation" / "base")
    assert {one.outcome for one in compare_evaluations("base", result, result)} == {"same"}
    first = result.suites[1].suite
    for change, outcome in (({"reply": "other words"}, "close"), ({"outcome": None}, "different")):
        samples = [dict(sample) for sample in result.samples]
        place = next(i for i, sample in enumerate(samples) if sample["suite"] == first)
        samples[place] |= change
        found = {
            one.what: one
            for one in compare_evaluations("base", result, dataclasses.replace(result, samples=tuple(samples)))
        }
        assert found[f"{first} of base"].outcome == outcome
        assert sum(one.outcome != "same" for one in found.values()) == 1
