"""The run directory: arms, and the refusals when what lies there was made from something else."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from castune.artifacts import Certificate, ConflictMap, EvalResult, HeadSelection, TuneResult
from castune.artifacts.conflict_map import SCHEMA
from castune.artifacts.tune_result import adapter_hash
from castune.artifacts.unit import joined
from castune.config import Recipe
from castune.errors import ArtifactError
from castune.selection import select
from castune.steps.arm import Arm, arm_name
from castune.steps.directory import RunDirectory


def make_map(shift: float = 0.0, fingerprint: str = "aaaa") -> ConflictMap:
    columns = {field.name: np.arange(8.0) + shift for field in SCHEMA}
    columns |= {"unit": ["q_head"] * 8, "layer": [0] * 4 + [1] * 4, "head": [0, 1, 2, 3] * 2, "bucket": [1] * 8}
    return ConflictMap(pa.table(columns, schema=SCHEMA), {"model": {"name": "tiny", "fingerprint": fingerprint}})


def save_tuning(selection: HeadSelection, adapter: Path, *later: tuple[int, int]) -> TuneResult:
    """Of a training that began with a selection, and selected `later` heads afterwards."""
    adapter.mkdir(parents=True, exist_ok=True)
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        (adapter / name).write_text(name)
    units = tuple(sorted({*selection.units, *joined(later)}))
    certificate = Certificate(selection.model_fingerprint, units, adapter_hash(adapter), 1, 1, 1, 1, 0.5)
    phases = [selection.heads, later] if later else []
    selections = tuple(
        {"step": step, "units": [["q_head", *head] for head in phase], "map_hash": "x"}
        for step, phase in enumerate(phases)
    )
    result = TuneResult("adapter", certificate, {}, {}, {}, (), 1, 1, 1.0, {}, {}, selections=selections)
    result.save(adapter)
    return result


def make_evaluation(name: str, adapter: str | None = None) -> EvalResult:
    return EvalResult(name, (), (), {}, {"adapter": adapter}, {})


@pytest.fixture
def folder(tmp_path: Path) -> RunDirectory:
    return RunDirectory(tmp_path / "run")


@pytest.fixture
def recipe(folder: RunDirectory) -> Recipe:
    return Recipe(out=str(folder.path))


# -- one recipe a directory


def finish(folder: RunDirectory, recipe: Recipe, *, tuned: bool = True) -> None:
    folder.save_recipe(recipe)
    cmap = make_map()
    cmap.save(folder.path)
    select(cmap, zone="safe").save(folder.path)
    if tuned:
        save_tuning(select(cmap, zone="safe"), folder.path / "adapter")


def test_the_recipe_is_stored_resolved(folder: RunDirectory, recipe: Recipe) -> None:
    folder.save_recipe(recipe)
    assert folder.load_recipe() == recipe
    folder.check(recipe)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"model": "other/model"}, "model = 'default', but this recipe has 'other/model'"),
        ({"seed": 22}, "seed = 21, but this recipe has 22"),
        ({"tune": {"rank": 4}}, "tune.rank = 32, but this recipe has 4"),
        ({"safety": {"source": "starter-safety", "limit": 3}}, "safety.limit = None, but this recipe has 3"),
        ({"select": {"zone": "risky"}}, "select.zone = 'safe', but this recipe has 'risky'"),
    ],
)
def test_check_refuses_another_recipe_naming_the_key_and_both_sides(
    folder: RunDirectory, recipe: Recipe, change: dict[str, object], named: str
) -> None:
    finish(folder, recipe)
    before = folder.recipe_file.read_bytes()
    with pytest.raises(ArtifactError, match=named) as caught:
        folder.check(Recipe(**{**dict(recipe), **change}))
    assert str(folder.path) in str(caught.value)
    assert folder.recipe_file.read_bytes() == before


def test_settings_of_a_stage_that_left_nothing_are_free(folder: RunDirectory, recipe: Recipe) -> None:
    finish(folder, recipe, tuned=False)
    folder.check(Recipe(**{**dict(recipe), "tune": {"rank": 4}, "evaluate": {"suites": ["mmlu"]}}))
    with pytest.raises(ArtifactError, match="seed"):
        folder.check(Recipe(**{**dict(recipe), "seed": 22}))


def test_where_a_training_is_logged_is_free(folder: RunDirectory, recipe: Recipe) -> None:
    finish(folder, recipe)
    folder.check(Recipe(**{**dict(recipe), "tune": {"report_to": ["tensorboard"]}}))


def test_check_counts_the_other_differences(folder: RunDirectory, recipe: Recipe) -> None:
    finish(folder, recipe)
    with pytest.raises(ArtifactError, match="and 2 more settings differ"):
        folder.check(Recipe(**{**dict(recipe), "seed": 1, "dtype": "float32", "tune": {"rank": 4}}))


def test_a_run_may_be_moved(folder: RunDirectory, recipe: Recipe, tmp_path: Path) -> None:
    finish(folder, recipe)
    folder.path.rename(tmp_path / "moved")
    RunDirectory(tmp_path / "moved").check(Recipe(out=str(tmp_path / "moved")))


def test_a_damaged_recipe_is_named(folder: RunDirectory, recipe: Recipe) -> None:
    folder.path.mkdir(parents=True)
    folder.recipe_file.write_text("model = ")
    with pytest.raises(ValueError, match=r"recipe\.toml") as caught:
        folder.check(recipe)
    assert type(caught.value).__module__ == "castune.errors"


def test_a_folder_without_recipe_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="not a run directory.*castune diagnose"):
        RunDirectory(tmp_path).load_recipe()


# -- arms


def test_arms_are_the_main_selection_first_then_those_beside_it(folder: RunDirectory) -> None:
    cmap = make_map()
    select(cmap, zone="safe").save(folder.path)
    for zone in ("risky", "all"):
        select(cmap, zone=zone).save(folder.side_arm(zone).folder)
    assert [arm.name for arm in folder.arms()] == ["safe", "all", "risky"]
    assert folder.arm(None).folder == folder.path
    assert folder.arm("risky").adapter == folder.path / "arms" / "risky" / "adapter"
    with pytest.raises(ArtifactError, match="no selection named '?safer'?; available: safe, all, risky"):
        folder.arm("safer")


def test_a_main_arm_is_not_made_up(folder: RunDirectory) -> None:
    with pytest.raises(ArtifactError, match="available: none; make one with: castune select"):
        folder.arm(None)
    select(make_map(), zone="risky").save(folder.side_arm("risky").folder)
    with pytest.raises(ArtifactError, match="risky"):
        folder.arm(None)


def test_different_selections_of_a_map_have_different_names() -> None:
    cmap = make_map()
    selections = [
        *(
            select(cmap, zone=zone, score=score)
            for zone in ("safe", "risky")
            for score in ("conflict", "gradient", "sensitivity")
        ),
        *(select(cmap, buckets=4, bucket=b) for b in (1, 2, 3, 4)),
        select(cmap, buckets=2, bucket=1),
        select(cmap, zone="all"),
        select(cmap, zone="random", seed=1),
    ]
    names = [arm_name(selection) for selection in selections]
    assert len(set(names)) == len(names)
    assert not [name for name in names if "/" in name or name in (".", "..", "base")]


# -- what lies there must belong together


def test_a_map_of_another_model_names_both(folder: RunDirectory) -> None:
    make_map(fingerprint="aaaa").save(folder.path)
    assert folder.load_map("aaaa") == make_map()
    with pytest.raises(ArtifactError, match="aaaa.*bbbb"):
        folder.load_map("bbbb")


def test_a_selection_of_another_map_names_both(folder: RunDirectory) -> None:
    one, other = make_map(), make_map(shift=1.0)
    selection = select(one)
    selection.save(folder.path)
    arm = folder.arm(None)
    assert folder.load_selection(arm, one) == selection
    with pytest.raises(ArtifactError, match=f"{one.content_hash}.*{other.content_hash}"):
        folder.load_selection(arm, other)


def test_an_adapter_of_several_selections_belongs_to_the_first(folder: RunDirectory) -> None:
    cmap = make_map()
    selection = select(cmap, zone="safe")
    selection.save(folder.path)
    arm = folder.arm(None)
    saved = save_tuning(selection, arm.adapter, *select(cmap, zone="risky").heads)
    assert len(saved.certificate.units) == 2 * len(selection.heads)
    assert folder.load_tuning(arm, selection) == folder.load_adapter(arm, selection) == saved
    for other in (select(cmap, zone="risky"), saved.trained(selection)):
        with pytest.raises(ArtifactError, match="another selection"):
            folder.load_tuning(arm, other)
    # A certificate for fewer heads, or for more, is that of another adapter.
    for units in (saved.certificate.units[:-1], (*saved.certificate.units, *joined([(1, 3), (0, 3)]))):
        dataclasses.replace(saved.certificate, units=units).save(arm.adapter)
        with pytest.raises(ArtifactError, match="another selection"):
            folder.load_tuning(arm, selection)


def test_an_adapter_of_another_selection_or_model_is_refused(folder: RunDirectory) -> None:
    cmap = make_map()
    selection = select(cmap, zone="safe")
    selection.save(folder.path)
    arm = folder.arm(None)
    saved = save_tuning(selection, arm.adapter)
    assert folder.load_tuning(arm, selection) == saved
    with pytest.raises(ArtifactError, match="another selection"):
        folder.load_tuning(arm, select(cmap, zone="risky"))
    with pytest.raises(ArtifactError, match="another"):
        folder.load_tuning(arm, dataclasses.replace(selection, model_fingerprint="bbbb"))


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json"])
def test_an_adapter_that_was_changed_after_its_certificate_is_refused(folder: RunDirectory, name: str) -> None:
    selection = select(make_map(), zone="safe")
    selection.save(folder.path)
    arm = folder.arm(None)
    save_tuning(selection, arm.adapter)
    (arm.adapter / name).write_text("another")
    with pytest.raises(ArtifactError, match="certificate"):
        folder.load_tuning(arm, selection)
    (arm.adapter / name).unlink()
    with pytest.raises(ArtifactError, match="missing"):
        folder.load_tuning(arm, selection)


def test_evaluations_come_base_first(folder: RunDirectory) -> None:
    for arm in two_trained_arms(folder):
        make_evaluation(arm.name, adapter_hash(arm.adapter)).save(folder.evaluation(arm.name))
    make_evaluation("base").save(folder.evaluation("base"))
    assert list(folder.load_evaluations()) == ["base", "safe", "risky"]


def two_trained_arms(folder: RunDirectory) -> list[Arm]:
    cmap = make_map()
    for zone, place in (("safe", folder.path), ("risky", folder.side_arm("risky").folder)):
        selection = select(cmap, zone=zone)
        selection.save(place)
        save_tuning(selection, place / "adapter")
    return folder.arms()


def test_evaluations_of_an_adapter_that_is_gone_are_left_out(
    folder: RunDirectory, caplog: pytest.LogCaptureFixture
) -> None:
    safe, risky = two_trained_arms(folder)
    for arm in (safe, risky):
        make_evaluation(arm.name, adapter_hash(arm.adapter)).save(folder.evaluation(arm.name))
    # Trained again, and not yet evaluated again.
    (safe.adapter / "adapter_model.safetensors").write_text("other weights")
    assert list(folder.load_evaluations()) == ["risky"]
    assert "evaluation/safe belongs to an adapter that no longer exists" in caplog.text
    (risky.adapter / "adapter_model.safetensors").unlink()
    assert folder.load_evaluations() == {}


def test_a_selection_for_another_model_is_refused(folder: RunDirectory) -> None:
    # One without a map of its own: it was chosen by hand, or came with an adapter.
    HeadSelection.custom([(0, 1)], n_total=8, model_fingerprint="bbbb").save(folder.side_arm("kept").folder)
    make_map().save(folder.path)
    with pytest.raises(ArtifactError, match=r"bbbb, but the map here is for aaaa; remove .*kept"):
        folder.load_selection(folder.arm("kept"), folder.load_map())


def test_steps_are_appended(folder: RunDirectory) -> None:
    folder.path.mkdir(parents=True)
    folder.record_step("diagnose", {"seed": 1})
    folder.record_step("tune safe", {"seed": 2})
    record = json.loads((folder.path / "provenance.json").read_text(encoding="utf-8"))
    assert record["steps"] == [{"stage": "diagnose", "seed": 1}, {"stage": "tune safe", "seed": 2}]


def test_a_damaged_provenance_is_a_user_error(folder: RunDirectory) -> None:
    folder.path.mkdir(parents=True)
    (folder.path / "provenance.json").write_text("{")
    with pytest.raises(ArtifactError, match=r"provenance\.json"):
        folder.record_step("diagnose", {})
