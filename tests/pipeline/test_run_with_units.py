"""The whole job on query heads and groups of neurons together."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from command_line import castune

from castune.artifacts import ConflictMap, HeadSelection, TuneResult
from castune.artifacts.formats import read_json
from castune.config import Recipe
from castune.core.loading import LoadedModel, load_model
from castune.errors import CastuneError
from castune.pipeline import run
from castune.steps.diagnose import group_step
from castune.steps.directory import RunDirectory
from castune.steps.inputs import load_calibration

Models = Callable[..., Path]
RecipeOf = Callable[..., Recipe]


def test_the_whole_recipe_with_two_kinds_of_unit(models: Models, recipe_of: RecipeOf, tmp_path: Path) -> None:
    recipe = recipe_of(
        models(),
        diagnose__units=["q_heads", "mlp_groups"],
        diagnose__mlp_groups=4,
        diagnose__measure="margin",
        select__compare=["risky", "layer-matched"],
        select__seed=3,
        evaluate__suites=[str(tmp_path / "utility.jsonl")],
    )
    folder = run(recipe).path
    cmap = ConflictMap.load(folder)
    assert [len(cmap.rows_of(kind)) for kind in ("q_head", "mlp_group")] == [12, 12]
    assert Recipe.load(folder / "recipe.toml") == recipe
    run_directory = RunDirectory(folder)
    selections = {arm.name: run_directory.load_selection(arm, cmap) for arm in run_directory.arms()}
    assert list(selections) == ["safe", "layer-matched", "risky"]
    assert all((len(one.heads), len(one.units)) == (3, 6) for one in selections.values())
    assert not set(selections["safe"].units) & set(selections["risky"].units)
    for arm in run_directory.arms():
        certificate = TuneResult.load(arm.adapter).certificate
        assert certificate.units == selections[arm.name].units
        assert certificate.changed_rows == certificate.selected_rows == 3 * 8 + 2 * 3 * 12
        assert certificate.changed_columns == certificate.selected_columns == 3 * 12
    report = (folder / "report.html").read_text(encoding="utf-8")
    assert "12 query heads, 12 groups of MLP neurons" in report
    assert "Groups of MLP neurons</h3>" in report
    run(recipe)  # everything is there already

    model, tokenizer = load_model(recipe)
    records = group_step(run_directory, recipe, LoadedModel(model, tokenizer), load_calibration(recipe), buckets=4)
    assert [record["heads"] for record in records] == [6, 6, 6, 6]
    assert read_json(folder / "group_ablation.json", "group ablation", "")["buckets"] == records

    done = castune("export", folder, "--merged", "--out", tmp_path / "merged", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "96 of 96 selected rows and 36 of 36 selected columns changed" in done.stdout
    card = (tmp_path / "merged" / "README.md").read_text(encoding="utf-8")
    assert "the rows and columns of 6 of 24 units" in card
    # An adapter alone knows its units too.
    done = castune("export", folder, "--out", tmp_path / "adapter", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    done = castune("export", tmp_path / "adapter", "--merged", "--out", tmp_path / "again", cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_units_on_the_command_line(models: Models, own_data: dict[str, Path], tmp_path: Path) -> None:
    model = models("gpt2")
    options: list[Any] = ["--safety", own_data["safety"], "--utility", own_data["utility"], "--measure", "margin"]
    done = castune(
        "diagnose", model, *options, "--units", "v_groups,mlp_blocks", "--out", tmp_path / "run", "--dtype", "float32",
        cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "12 KV groups by values, 3 whole MLPs, measure margin" in done.stdout
    done = castune("select", tmp_path / "run", "--fraction", "0.3", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert re.search(r"5 of 15 units \((4 KV groups by values|, |1 whole MLP){3}\)", done.stdout)
    selection = HeadSelection.load(tmp_path / "run")
    assert not selection.heads
    assert len(selection.units) == 5
    done = castune("tune", tmp_path / "run", "--data", own_data["align"], "--max-steps", "1", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "bit-identical" in done.stdout
    done = castune("diagnose", model, *options, "--units", "neurons", "--out", tmp_path / "other", cwd=tmp_path)
    assert done.returncode == 2
    assert "units" in done.stderr
    assert "mlp_groups" in done.stderr


def test_a_map_of_other_units_is_not_taken_for_this_one(models: Models, recipe_of: RecipeOf, tmp_path: Path) -> None:
    model, suites = models(), [str(tmp_path / "utility.jsonl")]
    run(recipe_of(model, diagnose__measure="margin", evaluate__suites=suites, select__compare=[]))
    with pytest.raises(CastuneError, match="diagnose.units"):
        run(
            recipe_of(
                model,
                diagnose__measure="margin",
                diagnose__units=["o_heads"],
                evaluate__suites=suites,
                select__compare=[],
            )
        )
