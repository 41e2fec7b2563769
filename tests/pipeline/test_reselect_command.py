"""Selecting again while training, from the command line and from a recipe: maps, certificate, export, drift, kills."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import assert_one_error, castune, command, refused
from peft import PeftModel
from processes import run_command
from transformers import AutoModelForCausalLM

from castune.artifacts import ConflictMap, HeadSelection, TuneResult
from castune.artifacts.drift_result import DriftResult
from castune.config import Recipe
from castune.core.loading import LoadedModel, load, load_model
from castune.diagnosis.run import diagnose
from castune.errors import ArtifactError, CastuneError
from castune.pipeline import run
from castune.selection import select
from castune.steps.diagnose import diagnose_step
from castune.steps.directory import RunDirectory
from castune.steps.inputs import load_calibration
from castune.steps.select import select_step
from castune.tuning.verify import certify

CASTUNE = str(Path(sys.executable).with_name("castune"))
Models = Callable[..., Path]
RecipeOf = Callable[..., Recipe]
TUNE = (
    "--rank", "4", "--batch-size", "2", "--accumulation", "1", "--learning-rate", "0.05", "--weight-decay", "0.1",
    "--max-steps", "6", "--epochs", "9",
)  # fmt: skip
EVERY_2 = {
    "tune": {
        "rank": 4, "learning_rate": 0.05, "max_steps": 5, "batch_size": 2, "accumulation": 1, "epochs": 9,
        "reselect_steps": 2,
    }
}  # fmt: skip


@pytest.fixture
def selected(models: Models, recipe_of: RecipeOf) -> Path:
    """A run with a map and a selection."""
    return diagnosed(recipe_of(models()))


def diagnosed(recipe: Recipe) -> Path:
    folder = RunDirectory(Path(recipe.out))
    model, tokenizer = load_model(recipe)
    cmap = diagnose_step(folder, recipe, LoadedModel(model, tokenizer), load_calibration(recipe))
    folder.save_recipe(recipe)
    select_step(folder, recipe.select.model_copy(update={"compare": ()}), cmap)
    return folder.path


def heads_of(record: dict[str, Any]) -> list[tuple[int, int]]:
    return [(layer, head) for _, layer, head in record["units"]]


def cut(adapter: Path, out: Path, rank: int, layers: list[int]) -> Path:
    """The first `rank` ranks of a stacked adapter in some layers: what it was after its first phases."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(adapter, out, ignore=shutil.ignore_patterns("reselections", "snapshots"))
    tensors = load_file(out / "adapter_model.safetensors")
    kept = {
        name: (tensor[:rank] if "lora_A" in name else tensor[:, :rank]).contiguous()
        for name, tensor in tensors.items()
        if any(f".layers.{layer}." in name for layer in layers)
    }
    save_file(kept, out / "adapter_model.safetensors", metadata={"format": "pt"})
    config = json.loads((out / "adapter_config.json").read_text())
    alpha = config["lora_alpha"] * rank / config["r"]
    (out / "adapter_config.json").write_text(
        json.dumps({**config, "r": rank, "lora_alpha": alpha, "layers_to_transform": layers})
    )
    return out


@pytest.mark.parametrize("rule", [("--zone", "risky", "--fraction", "0.5"), ("--buckets", "3", "--bucket", "2")])
def test_every_selection_is_that_of_the_map_of_the_model_as_it_is_then(
    selected: Path, own_data: dict[str, Path], tmp_path: Path, rule: tuple[str, ...]
) -> None:
    command("select", selected, *rule)
    said = command("tune", selected, "--data", own_data["align"], *TUNE, "--reselect-steps", 2)
    folder = RunDirectory(selected)
    first, recipe = HeadSelection.load(selected), folder.load_recipe()
    assert recipe.tune.reselect_steps == 2
    result = folder.load_tuning(folder.arm(None), first)
    assert [record["step"] for record in result.selections] == [0, 2, 4]
    assert heads_of(result.selections[0]) == list(first.heads)
    assert result.selections[0]["map_hash"] == folder.load_map().content_hash == first.conflict_map_hash
    assert "reselected after step 2," in said
    assert "reselected after step 4," in said
    union: set[tuple[int, int]] = set()
    for number, record in enumerate(result.selections):
        step = record["step"]
        if step:
            stored = ConflictMap.load(selected / "adapter" / "reselections" / str(step))
            model, tokenizer = load(recipe.model, dtype="float32", device="cpu")
            layers = sorted({layer for layer, _ in union})
            before = cut(selected / "adapter", tmp_path / str(step), 4 * number, layers)
            merged = PeftModel.from_pretrained(model, before).merge_and_unload()
            safety, utility = load_calibration(recipe)
            wanted = diagnose(
                merged, tokenizer, safety=safety, utility=utility, config=recipe.diagnose, seed=recipe.seed
            )
            assert stored.table.equals(wanted.table)
            assert stored.content_hash == record["map_hash"]
            again = select(
                wanted, zone=first.zone if first.bucket is None else "safe", fraction=first.fraction or 1.0,
                buckets=first.buckets, bucket=first.bucket,
            )  # fmt: skip
            assert heads_of(record) == list(again.heads)
        union |= set(heads_of(record))
    assert result.certificate.heads == tuple(sorted(union))


def test_a_whole_run_from_a_recipe_its_export_and_its_drift(
    models: Models, recipe_of: RecipeOf, tmp_path: Path
) -> None:
    settings = {"tune": {**EVERY_2["tune"], "snapshot_steps": 1}}
    recipe = recipe_of(models(), select__compare=["risky", "layer-matched"], select__seed=21, **settings)
    folder = run(recipe)
    cmap = folder.load_map()
    for arm in folder.arms():
        selection = folder.load_selection(arm, cmap)
        result = folder.load_tuning(arm, selection)
        assert [record["step"] for record in result.selections] == [0, 2, 4]
        model, _ = load(recipe.model, dtype="float32", device="cpu")
        assert certify(model, arm.adapter, result.trained(selection)) == result.certificate
        # Any other heads than those of the training are refused.
        with pytest.raises(ArtifactError, match="another selection"):
            folder.load_tuning(arm, replace(selection, units=result.certificate.units[:1]))
    # The same run again finds everything there.
    stamps = {path: path.stat().st_mtime_ns for path in folder.path.rglob("adapter/*")}
    run(recipe)
    assert {path: path.stat().st_mtime_ns for path in folder.path.rglob("adapter/*")} == stamps

    command("export", folder.path, "--merged", "--out", tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    model, _ = load(recipe.model, dtype="float32", device="cpu")
    adapted = PeftModel.from_pretrained(model, folder.path / "adapter").eval()
    ids = torch.arange(5, 30)[None]
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, adapted(ids).logits, atol=1e-5, rtol=1e-5)
    command("export", folder.path, "--out", tmp_path / "exported")
    assert not (tmp_path / "exported" / "reselections").exists()

    command("drift", folder.path)
    steps = DriftResult.load(folder.path / "drift" / "safe").steps
    assert [step.step for step in steps] == [1, 2, 3, 4, 5]
    # The map of the drift is the one that heads were selected from.
    by_step = {
        record["step"]: record["map_hash"]
        for record in folder.load_tuning(folder.arm(None), HeadSelection.load(folder.path)).selections
    }
    for step in steps:
        if step.step in by_step:
            assert step.map_hash == by_step[step.step]


def test_one_phase_is_plain_training(selected: Path, own_data: dict[str, Path]) -> None:
    adapters = []
    for more in ((), ("--reselect-steps", 6)):
        command("tune", selected, "--data", own_data["align"], *TUNE, "--overwrite", *more)
        adapters.append((selected / "adapter" / "adapter_model.safetensors").read_bytes())
    assert adapters[0] == adapters[1]
    assert len(TuneResult.load(selected / "adapter").selections) == 1


# -- kills


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def whole(adapter: Path) -> dict[str, bytes]:
    names = ("adapter_model.safetensors", "adapter_config.json", "certificate.json")
    return {str(path.relative_to(adapter)): path.read_bytes() for path in adapter.rglob("*") if path.name in names}


@pytest.mark.slow
def test_a_training_killed_again_and_again_ends_with_the_same_adapter(
    selected: Path, own_data: dict[str, Path], tmp_path: Path
) -> None:
    killed = tmp_path / "killed"
    shutil.copytree(selected, killed)

    def arguments(run_directory: Path) -> list[str]:
        return [
            CASTUNE, "tune", str(run_directory), "--data", str(own_data["align"]), *TUNE, "--checkpoint-steps", "1",
            "--reselect-steps", "2", "--snapshot-steps", "3",
        ]  # fmt: skip

    run_command(arguments(selected), env=environment()).check_returncode()
    adapter, unfinished = killed / "adapter", killed / ".adapter.unfinished"
    # Before the first phase ends, while a map is measured, between selection and training, in a phase, at its end.
    for wanted in (
        "checkpoint-1/castune.json", "phases/2/stacked", "phases/2/map/journal/*/*.jsonl", "phases/2/selection.json",
        "checkpoint-3/castune.json", "phases/4/adapter", "phases/4/map/conflict_map.parquet",
        "checkpoint-5/castune.json",
    ):  # fmt: skip
        process = subprocess.Popen(
            arguments(killed), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment()
        )
        while not list(unfinished.glob(wanted)):
            assert process.poll() is None, f"it ended before it could be stopped at {wanted}"
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not adapter.exists()
    run_command(arguments(killed), env=environment()).check_returncode()
    assert whole(adapter) == whole(selected / "adapter")
    assert len(whole(adapter)) == 2 * 3
    results = TuneResult.load(adapter), TuneResult.load(selected / "adapter")
    assert results[0].selections == results[1].selections
    assert results[0].losses == results[1].losses
    assert not unfinished.exists()


# -- what is refused


def test_what_cannot_be_selected_again_is_told(
    selected: Path, own_data: dict[str, Path], models: Models, recipe_of: RecipeOf, tmp_path: Path
) -> None:
    before = sorted(path.name for path in selected.rglob("*"))
    tune = ("tune", selected, "--data", own_data["align"], "--reselect-steps", 2)
    for arm in ("random", "all"):
        assert f"zone {arm} are not chosen from a map" in refused(*tune, "--arm", arm)
    assert "safe, risky, bucket, layer-matched" in refused(*tune, "--arm", "random")
    assert 'method = "dpo"' in refused(*tune, "--method", "dpo")
    assert 'method = "dpo"' in refused(*tune, "--arm", "safe+dpo")
    assert 'quantization = "nf4"' in refused(*tune, "--quantization", "nf4")
    assert "freeze_a" in refused(*tune, "--freeze-a")
    surgery = ("--surgery", "pcgrad", "--utility", own_data["utility"], "--surgery-granularity", "head")
    assert 'surgery_granularity = "head"' in refused(*tune, *surgery)
    assert "reselect_steps" in refused(*tune[:-1], 0)
    assert sorted(path.name for path in selected.rglob("*")) == before
    assert_one_error(castune(*tune, "--arm", "all", cwd=tmp_path), "zone all", "reselect_steps")

    heads = HeadSelection.load(selected)
    custom = HeadSelection.custom(heads.heads, n_total=heads.n_total, model_fingerprint=heads.model_fingerprint)
    (selected / "arms" / "mine").mkdir(parents=True)
    custom.save(selected / "arms" / "mine")
    assert "zone custom" in refused(*tune, "--arm", "mine")

    for changes, said in (
        ({"select__compare": ["random"], "select__seed": 21}, "zone random"),
        ({"select__zone": "all", "select__compare": []}, "zone all"),
        ({"diagnose__units": ["q_heads", "k_groups"]}, "tune.reselect_steps works with query heads only"),
        ({"select__compare": ["safe+dpo"]}, 'method = "dpo"'),
    ):
        recipe = recipe_of(models(), out="new", tune__reselect_steps=1, **changes)
        with pytest.raises(CastuneError, match="reselect_steps") as error:
            run(recipe)
        assert said in str(error.value)
        assert not Path(recipe.out).exists()


def test_a_map_of_other_units_is_refused(models: Models, recipe_of: RecipeOf, own_data: dict[str, Path]) -> None:
    folder = diagnosed(recipe_of(models(), diagnose__units=["q_heads", "k_groups"]))
    assert "works only on maps of query heads" in refused(
        "tune", folder, "--data", own_data["align"], "--reselect-steps", 2
    )


def test_several_processes_are_refused(
    selected: Path, own_data: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    said = refused("tune", selected, "--data", own_data["align"], "--reselect-steps", 2)
    assert "works in one process, and there are 2" in said
