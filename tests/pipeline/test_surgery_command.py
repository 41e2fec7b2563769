"""Gradient surgery through recipe and command line."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from command_line import assert_one_error, castune

from castune.artifacts import TuneResult
from castune.config import DataConfig, Recipe
from castune.core.loading import load
from castune.data.example import content_hash
from castune.data.sources import examples
from castune.errors import ArtifactError, CastuneError
from castune.pipeline import run
from castune.steps.directory import RunDirectory
from castune.steps.inputs import TrainingData
from castune.steps.tune import tune_step
from castune.tuning import surgery as surgery_module

Models = Callable[..., Path]
RecipeOf = Callable[..., Recipe]


def test_a_recipe_takes_all_utility_domains_together(
    models: Models, recipe_of: RecipeOf, own_data: dict[str, Path], tmp_path: Path
) -> None:
    sums = tmp_path / "sums.jsonl"
    rows = [{"id": f"s{i}", "prompt": f"Is {i} odd?", "choices": ["yes", "no"], "answer": i % 2} for i in range(3)]
    sums.write_text("".join(json.dumps(row) + "\n" for row in rows))
    utility = {"words": str(own_data["utility"]), "sums": str(sums)}
    recipe = recipe_of(models(), utility=utility, evaluate__overlap="allow")
    recipe = Recipe(**{**recipe.model_dump(), "tune": {**recipe.tune.model_dump(), "surgery": "pcgrad"}})
    folder = run(recipe)
    expected = [*examples(str(sums)), *examples(str(own_data["utility"]))]
    for adapter in (folder.path / "adapter", folder.path / "arms" / "risky" / "adapter"):
        found = TuneResult.load(adapter)
        assert found.utility == {
            "source": f"{sums}, {own_data['utility']}", "n": 7, "hash": content_hash(expected), "cut": 0, "replies_cut": 0, "replayed": 0,
        }  # fmt: skip
        assert found.surgery is not None
        assert found.surgery["steps"] == 2
    assert Recipe.load(folder.recipe_file) == recipe

    # The same again is already there; another method is not. Arms that were never trained have nothing to tell.
    before = (folder.path / "adapter" / "tune.json").read_bytes()
    assert castune("select", folder.path, "--zone", "all", "--beside", cwd=tmp_path).returncode == 0
    done = castune("run", folder.recipe_file, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert [line.partition(",")[0] for line in done.stdout.splitlines() if "surgery" in line] == [
        "safe: surgery pcgrad (global)",
        "risky: surgery pcgrad (global)",
    ]
    assert (folder.path / "adapter" / "tune.json").read_bytes() == before
    with pytest.raises(CastuneError, match=r"tune\.surgery"):
        run(Recipe(**{**recipe.model_dump(), "tune": {**recipe.tune.model_dump(), "surgery": "pcgrad-symmetric"}}))


@pytest.fixture
def finished(finished_run: Callable[..., Path]) -> Path:
    """A run without a comparison arm and without surgery."""
    return finished_run(select__compare=[])


def test_the_command_line(finished: Path, own_data: dict[str, Path], tmp_path: Path) -> None:
    options: list[Any] = ["--data", own_data["align"], "--max-steps", "2", "--rank", "4", "--overwrite"]
    tune = ["tune", finished, *options]
    before = (finished / "adapter" / "tune.json").read_bytes()
    for more, said in (
        (["--surgery", "pcgrad"], ('surgery = "pcgrad"', "--utility SOURCE")),
        (["--utility", own_data["utility"]], ("--utility", "add --surgery")),
        (["--surgery", "scalpel", "--utility", own_data["utility"]], ("surgery = 'scalpel'", "pcgrad-symmetric")),
        (
            ["--surgery", "pcgrad", "--utility", own_data["utility"], "--surgery-granularity", "toe"],
            ("surgery_granularity = 'toe'", "global", "tensor", "head"),
        ),
        (["--surgery", "pcgrad", "--utility", tmp_path / "absent.jsonl"], (r"absent\.jsonl: no such file",)),
    ):
        assert_one_error(castune(*tune, *more, cwd=tmp_path), *said)
    assert (finished / "adapter" / "tune.json").read_bytes() == before

    reference = ["--utility", own_data["utility"], "--utility", own_data["align"], "--utility-limit", "3"]
    more = ["--surgery", "pcgrad", *reference, "--surgery-granularity", "head", "--surgery-batch-size", "2"]
    done = castune(*tune, *more, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "surgery pcgrad (head), alignment and utility gradients conflicted in" in done.stdout
    assert "of 2 steps, mean cosine" in done.stdout
    result = TuneResult.load(finished / "adapter")
    assert result.surgery is not None
    assert result.utility is not None
    assert result.utility["n"] == 6
    assert (result.settings["surgery_granularity"], result.settings["surgery_batch_size"]) == ("head", 2)
    assert castune("report", finished, cwd=tmp_path).returncode == 0


def test_a_missing_method_is_found_out_before_the_diagnosis(
    models: Models, recipe_of: RecipeOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nothing_there(name: str) -> Any:
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(surgery_module, "import_module", nothing_there)
    recipe = recipe_of(models())
    recipe = Recipe(**{**recipe.model_dump(), "tune": {**recipe.tune.model_dump(), "surgery": "mgda"}})
    with pytest.raises(CastuneError, match=r'pip install "torchjd==0\.18\.0"'):
        run(recipe)
    assert not Path(recipe.out).exists()


def test_an_adapter_made_before_there_was_surgery_is_already_there(
    models: Models, recipe_of: RecipeOf, finished: Path, own_data: dict[str, Path]
) -> None:
    path = finished / "adapter" / "tune.json"
    record = json.loads(path.read_text())
    del record["surgery"], record["digest"]
    record["settings"] = {key: value for key, value in record["settings"].items() if not key.startswith("surgery")}
    path.write_text(json.dumps(record))
    before = path.read_bytes()
    run(recipe_of(models(), select__compare=[]))
    assert path.read_bytes() == before


def test_utility_data_that_changed_is_noticed(
    models: Models, recipe_of: RecipeOf, finished: Path, own_data: dict[str, Path]
) -> None:
    recipe = recipe_of(models(), select__compare=[])
    loaded = load(recipe.model, dtype="float32", device="cpu")
    folder = RunDirectory(finished)
    config = recipe.tune.model_copy(update={"surgery": "pcgrad"})
    data, utility = examples(str(own_data["align"])), examples(str(own_data["utility"]))
    of = TrainingData(data, DataConfig(source="own"), utility=utility)
    tune_step(folder, folder.arm(None), loaded, of, config, overwrite=True)
    tune_step(folder, folder.arm(None), loaded, of, config)
    with pytest.raises(ArtifactError, match="utility data"):
        tune_step(folder, folder.arm(None), loaded, replace(of, utility=utility[:3]), config)
