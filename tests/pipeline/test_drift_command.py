"""Conflict drift from the command line: a training that keeps its adapters, the maps at each, and the report."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import assert_one_error, castune, command, refused
from loopback import needs_loopback
from peft import PeftModel
from processes import run_command

from castune.artifacts import Certificate, ConflictMap
from castune.artifacts.drift_result import DriftResult
from castune.artifacts.tune_result import snapshots_of
from castune.config import Recipe
from castune.core.loading import load, load_model
from castune.diagnosis.run import diagnose
from castune.pipeline import run
from castune.steps.diagnose import diagnose_step
from castune.steps.directory import RunDirectory
from castune.steps.drift import drift_step
from castune.steps.inputs import TrainingData, load_calibration, load_data
from castune.steps.select import select_step
from castune.steps.tune import tune_step

CASTUNE = str(Path(sys.executable).with_name("castune"))
Models = Callable[..., Path]
RecipeOf = Callable[..., Recipe]
Made = Callable[..., Path]
TUNE = ("--rank", "4", "--batch-size", "2", "--accumulation", "1", "--learning-rate", "0.05")


@pytest.fixture
def finished(models: Models, recipe_of: RecipeOf, made: Made) -> Path:
    """A run, not evaluated, whose main arm kept the adapters of steps 2 and 4 of 5."""
    recipe = recipe_of(models(), **kept_every(2, of=5))
    return made(Path(recipe.out), f"trained: {recipe.to_toml()}", lambda: trained(recipe))


def trained(recipe: Recipe) -> Path:
    """The steps of a run up to its main arm's adapter."""
    folder = RunDirectory(Path(recipe.out))
    loaded = load_model(recipe)
    cmap = diagnose_step(folder, recipe, loaded, load_calibration(recipe))
    folder.save_recipe(recipe)
    [(arm, _)] = select_step(folder, recipe.select.model_copy(update={"compare": ()}), cmap)
    data = TrainingData(load_data(recipe.align, recipe.seed), recipe.align)
    tune_step(folder, arm, loaded, data, recipe.tune)
    return folder.path


def drifted(finished: Path, name: str | None = None) -> DriftResult:
    result = drift_step(RunDirectory(finished), name)
    assert result is not None
    return result


def kept_every(steps: int, *, of: int) -> dict[str, Any]:
    return {
        "tune": {
            "rank": 4, "learning_rate": 0.05, "max_steps": of, "batch_size": 2, "accumulation": 1, "epochs": 9,
            "snapshot_steps": steps,
        }
    }  # fmt: skip


def maps_of(finished: Path, arm: str = "safe") -> dict[int, ConflictMap]:
    folders = (finished / "drift" / arm).glob("*/conflict_map.parquet")
    return {int(path.parent.name): ConflictMap.load(path) for path in sorted(folders)}


@pytest.mark.parametrize(
    ("family", "measure"),
    [
        ("llama", "decision"),
        pytest.param("gpt2", "attribution", marks=pytest.mark.slow),
        pytest.param("phi3", "margin", marks=pytest.mark.slow),
    ],
)
def test_every_map_is_that_of_the_merged_model(models: Models, recipe_of: RecipeOf, family: str, measure: str) -> None:
    settings = {"diagnose": {"max_new_tokens": 4, "gradient_chunks": 2, "measure": measure}}
    finished = trained(recipe_of(models(family), **kept_every(2, of=5), **settings))
    drifted(finished)
    recipe = Recipe.load(finished / "recipe.toml")
    safety, utility = load_calibration(recipe)
    adapters = {**snapshots_of(finished / "adapter"), 5: finished / "adapter"}
    maps = maps_of(finished)
    assert list(maps) == list(adapters) == [2, 4, 5]
    for step, adapter in adapters.items():
        model, tokenizer = load(recipe.model, dtype="float32", device="cpu")
        merged = PeftModel.from_pretrained(model, adapter).merge_and_unload()
        wanted = diagnose(merged, tokenizer, safety=safety, utility=utility, config=recipe.diagnose, seed=recipe.seed)
        assert maps[step].table.equals(wanted.table)
        about = maps[step].metadata["model"]["adapter"]
        assert (about["step"], about["arm"]) == (step, "safe")
        assert about["hash"] == Certificate.load(adapter).adapter_hash
        assert about["base"] == ConflictMap.load(finished).fingerprint != maps[step].fingerprint
    result = DriftResult.load(finished / "drift" / "safe")
    assert [step.step for step in result.steps] == [2, 4, 5]
    assert [step.map_hash for step in result.steps] == [cmap.content_hash for cmap in maps.values()]
    assert not list(finished.rglob("journal"))
    # Every reliability is that of the map itself.
    for record, cmap in zip(result.steps, maps.values(), strict=True):
        for of_map, name in ((ConflictMap.load(finished), "reliability_first"), (cmap, "reliability_now")):
            halves = of_map.metadata["reliability"]["split_half"]["columns"]
            for column, found in record.columns.items():
                assert getattr(found, name) == pytest.approx(halves[column]["full"], abs=1e-9)


def test_the_command_line_and_the_report(models: Models, recipe_of: RecipeOf, tmp_path: Path) -> None:
    folder = run(recipe_of(models(), select__compare=[], **kept_every(2, of=5)))
    assert 'id="drift"' not in folder.report_file.read_text()
    done = castune("drift", folder.path, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert [f"step {step}:" in done.stdout for step in (2, 4, 5)] == [True] * 3
    assert "n = 4 utility examples and 4 harmful prompts" in done.stdout
    steps = json.loads((folder.path / "provenance.json").read_text())["steps"]
    assert steps[-1]["stage"] == "drift safe"
    command("report", folder.path)
    html = folder.report_file.read_text()
    assert 'id="drift"' in html
    assert "Conflict drift" in html
    command("export", folder.path, "--out", tmp_path / "exported")
    assert not [path for path in (tmp_path / "exported").rglob("*") if "snapshot" in path.name]


def test_nothing_is_measured_twice(finished: Path, caplog: pytest.LogCaptureFixture) -> None:
    before = drifted(finished)
    stamps = {path: path.stat().st_mtime_ns for path in finished.glob("drift/safe/*/*.parquet")}
    assert len(stamps) == 3 * 3
    # A map that is lost is measured again, and comes out the same.
    lost = finished / "drift" / "safe" / "4"
    table = ConflictMap.load(lost).table
    shutil.rmtree(lost)
    # One that was killed when its map was just saved has left its journal.
    (finished / "drift" / "safe" / "2" / "journal" / "0123456789abcdef").mkdir(parents=True)
    caplog.clear()
    caplog.set_level("INFO")
    assert drifted(finished, "safe").steps == before.steps
    assert not (finished / "drift" / "safe" / "2" / "journal").exists()
    assert caplog.text.count("already done") == 3  # the run's own map, and two
    assert ConflictMap.load(lost).table.equals(table)
    assert {p: p.stat().st_mtime_ns for p in stamps if p.parent != lost} == {
        p: stamp for p, stamp in stamps.items() if p.parent != lost
    }


@pytest.mark.slow
def test_the_model_is_left_as_it_was(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = Recipe.load(finished / "recipe.toml")
    loaded = load(recipe.model, dtype="float32", device="cpu")
    before = {name: tensor.clone() for name, tensor in loaded[0].state_dict().items()}
    monkeypatch.setattr("castune.steps.drift.load_model", lambda _recipe: loaded)
    drifted(finished)
    after = loaded[0].state_dict()
    assert all(torch.equal(after[name].view(torch.int32), tensor.view(torch.int32)) for name, tensor in before.items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in loaded[0].parameters())


def test_a_learning_rate_of_almost_nothing_drifts_nowhere(models: Models, recipe_of: RecipeOf) -> None:
    settings = kept_every(1, of=2)
    settings["tune"]["learning_rate"] = 1e-12
    result = drifted(trained(recipe_of(models(), **settings)))
    for step in result.steps:
        assert not step.changes
        assert all(zone.kept == zone.size for zone in step.zones.values())
        assert step.reselected == {"heads": 3, "kept": 3, "by_chance": 0.75}
        for name, column in step.columns.items():
            assert column.spearman in (None, pytest.approx(1)), name
            assert column.corrected in (None, pytest.approx(1)), name
            assert not column.is_seen


@pytest.mark.slow
def test_another_training_is_measured_anew_and_an_old_result_left_out(
    finished: Path, own_data: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    before = drifted(finished)
    command(
        "tune", finished, "--data", own_data["align"], *TUNE, "--max-steps", 5, "--epochs", 9, "--overwrite", "--seed", 5,
        "--snapshot-steps", 4,
    )  # fmt: skip
    assert list(snapshots_of(finished / "adapter")) == [4]
    folder = RunDirectory(finished)
    cmap = folder.load_map()
    assert folder.load_drifts(cmap) == {}
    assert "belongs to another map or adapter" in caplog.text
    after = drifted(finished)
    assert [step.step for step in after.steps] == [4, 5]
    assert after.adapter_hash != before.adapter_hash
    assert after.steps[0].adapter_hash != before.steps[1].adapter_hash
    assert folder.load_drifts(cmap) == {"safe": after}


@pytest.mark.slow
def test_a_run_from_before_gradients_were_kept(finished: Path) -> None:
    kept = (finished / "gradients.parquet").read_bytes()
    first = drifted(finished)
    (finished / "gradients.parquet").unlink()
    assert drifted(finished).steps == first.steps
    assert (finished / "gradients.parquet").read_bytes() == kept


def test_domains(models: Models, recipe_of: RecipeOf, own_data: dict[str, Path]) -> None:
    """One of questions, and one of prompts with the reply to give."""
    domains = {"one": str(own_data["utility"]), "other": str(own_data["align"])}
    recipe = recipe_of(models(), utility=domains, diagnose__reply_domains=["other"], **kept_every(2, of=3))
    result = drifted(trained(recipe))
    assert result.n["utility"] == 12
    assert [step.step for step in result.steps] == [2, 3]
    assert set(maps_of(Path(recipe.out))[2].domains) == {"one", "other"}


# -- processes


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.mark.slow
def test_two_shares_make_what_one_process_makes(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "shared")
    assert "other shards are missing" in command("drift", tmp_path / "shared", "--shard", "2/2")
    assert not list((tmp_path / "shared" / "drift").rglob("*.json"))
    assert "step 5:" in command("drift", tmp_path / "shared", "--shard", "1/2")
    assert DriftResult.load(tmp_path / "shared" / "drift" / "safe").steps == drifted(finished).steps


@pytest.mark.slow
@needs_loopback
def test_two_ranks_make_what_one_process_makes(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "shared")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "--no-python"]
    arguments = [*torchrun, CASTUNE, "drift", str(tmp_path / "shared")]
    done = run_command(arguments, env=environment())
    assert done.returncode == 0, done.stderr
    assert DriftResult.load(tmp_path / "shared" / "drift" / "safe").steps == drifted(finished).steps


def snapshot_bytes(adapter: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(adapter)): path.read_bytes()
        for path in sorted(adapter.rglob("*"))
        if path.name in ("adapter_model.safetensors", "certificate.json", "adapter_config.json")
    }


@pytest.mark.slow
def test_a_training_killed_again_and_again_ends_with_the_same_snapshots(
    finished: Path, own_data: dict[str, Path], tmp_path: Path
) -> None:
    def arguments(arm: str) -> list[str]:
        return [
            CASTUNE, "tune", str(finished), "--data", str(own_data["align"]), "--arm", arm, *TUNE, "--max-steps", "30",
            "--epochs", "99", "--checkpoint-steps", "4", "--snapshot-steps", "3",
        ]  # fmt: skip

    # The same heads by two names.
    run_command(arguments("risky-50"), env=environment()).check_returncode()
    adapter = finished / "arms" / "bucket-1-of-2" / "adapter"
    unfinished = adapter.parent / ".adapter.unfinished"
    # A snapshot without a checkpoint after it; one with; a checkpoint just written.
    for wanted in ("snapshots/3", "snapshots/15", "checkpoint-24/castune.json"):
        process = subprocess.Popen(
            arguments("bucket-1-of-2"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment()
        )
        while not (unfinished / wanted).exists():
            assert process.poll() is None, "it ended before it could be stopped"
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not adapter.exists()
    run_command(arguments("bucket-1-of-2"), env=environment()).check_returncode()
    whole = snapshot_bytes(finished / "arms" / "risky-50" / "adapter")
    assert len(whole) == 3 * (9 + 1)
    assert snapshot_bytes(adapter) == whole
    assert not unfinished.exists()


@pytest.mark.slow
def test_a_drift_killed_comes_to_the_same_result(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "killed")
    arguments = [CASTUNE, "drift", str(tmp_path / "killed")]
    for wanted in ("2/journal/*/*.jsonl", "2/conflict_map.parquet", "5/journal/*/*.jsonl"):
        process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment())
        while not list((tmp_path / "killed" / "drift" / "safe").glob(wanted)) and process.poll() is None:
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert drifted(tmp_path / "killed").steps == drifted(finished).steps


# -- what is refused


def test_what_cannot_be_measured_is_told(finished: Path, own_data: dict[str, Path], tmp_path: Path) -> None:
    assert "not a run directory" in refused("drift", tmp_path / "nowhere")
    assert_one_error(
        castune("drift", finished, "--arm", "risky", cwd=tmp_path), "no selection named risky", "available: safe"
    )
    command("select", finished, "--zone", "risky", "--beside")
    assert "castune tune" in refused("drift", finished, "--arm", "risky")
    # Without --snapshot-steps, and with no fewer of them than steps.
    for more in ((), ("--snapshot-steps", 2, "--overwrite")):
        command("tune", finished, "--data", own_data["align"], *TUNE, "--max-steps", 2, "--arm", "risky", *more)
        said = refused("drift", finished, "--arm", "risky")
        assert "has no snapshots of its 2 steps" in said
        assert f"castune tune {finished} --arm risky --overwrite --snapshot-steps N" in said
    # Before anything else is found wrong.
    assert "accepted: 1/n to n/n" in refused("drift", finished, "--arm", "risky", "--shard", "3/2")
    command("mask", finished / "adapter", "--run", finished, "--as", "masked")
    assert "made from other adapters" in refused("drift", finished, "--arm", "masked")
    assert "snapshot_steps" in refused("tune", finished, "--data", own_data["align"], "--snapshot-steps", 0)
    assert not (finished / "drift").exists()


@pytest.mark.slow
def test_a_damaged_result_or_snapshot_is_told(finished: Path) -> None:
    drifted(finished)
    file = finished / "drift" / "safe" / "drift.json"
    whole = file.read_text()
    record = json.loads(whole)
    for damaged in ("{", "[]", json.dumps({**record, "steps": []}), json.dumps({**record, "steps": [{"step": 1}]})):
        file.write_text(damaged)
        assert str(file) in refused("report", finished)
    file.write_text(json.dumps({**record, "schema_version": 99}))
    assert "schema version 99" in refused("report", finished)
    file.write_text(whole)

    # A file beside the map that is not its own, and one that is none.
    gradients, outcomes = (finished / "drift" / "safe" / "2" / f"{name}.parquet" for name in ("gradients", "ablation"))
    kept = gradients.read_bytes(), outcomes.read_bytes()
    shutil.copyfile(gradients, outcomes)
    assert "ablation.parquet: damaged" in refused("drift", finished)
    outcomes.write_bytes(b"not parquet")
    assert "ablation.parquet: damaged" in refused("drift", finished)
    outcomes.write_bytes(kept[1])
    shutil.copyfile(finished / "gradients.parquet", gradients)
    assert "gradients.parquet does not belong to the map" in refused("drift", finished)
    gradients.unlink()
    command("drift", finished)
    assert gradients.read_bytes() == kept[0]

    snapshot = finished / "adapter" / "snapshots" / "2"
    shutil.copyfile(finished / "adapter" / "adapter_model.safetensors", snapshot / "adapter_model.safetensors")
    assert "is not the one its certificate was made for" in refused("drift", finished)
    (snapshot / "adapter_model.safetensors").write_bytes(b"\0" * 40)
    assert "no readable safetensors file" in refused("drift", finished)
    shutil.rmtree(snapshot)
    assert [step.step for step in drifted(finished).steps] == [4, 5]


def test_other_data_than_the_maps_is_refused(finished: Path, own_data: dict[str, Path]) -> None:
    rows = own_data["safety"].read_text().splitlines(keepends=True)
    own_data["safety"].write_text("".join(rows[:-1]))
    assert "safety data" in refused("drift", finished)


@pytest.mark.slow
def test_a_map_of_some_layers(models: Models, recipe_of: RecipeOf) -> None:
    settings = {"diagnose": {"max_new_tokens": 4, "gradient_chunks": 2, "layers": [0, 2]}}
    result = drifted(trained(recipe_of(models(), **kept_every(2, of=3), **settings)))
    assert result.n["heads"] == 8
    assert result.steps[0].zones["safe"].by_chance == 0.5
