"""Arms by name: one command each, side by side in one run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from command_line import assert_one_error, castune

from castune.artifacts import HeadSelection, TuneResult
from castune.config import Recipe
from castune.pipeline import run
from castune.steps.directory import RunDirectory

Models = Callable[..., Path]
RecipeOf = Callable[..., Recipe]

ARMS = (
    "all", "random", "risky", "bucket-2-of-4", "safe-50", "risky-75", "layer-matched", "safe-gradient",
    "risky-sensitivity", "safe+pcgrad", "risky+pcgrad", "safe+replay-20", "safe+nullspace-90",
)  # fmt: skip


@pytest.fixture
def finished(finished_run: Callable[..., Path]) -> Path:
    """A run with its main arm only."""
    return finished_run(select__compare=[])


def test_a_name_belongs_to_one_arm(finished: Path, tmp_path: Path) -> None:
    castune("select", finished, "--zone", "risky", "--beside", cwd=tmp_path).check_returncode()
    refused = castune("select", finished, "--zone", "risky", cwd=tmp_path)
    assert_one_error(refused, "already has an arm 'risky' beside the main one", "--beside, or remove")


def test_a_recipe_trains_every_arm_it_names(models: Models, recipe_of: RecipeOf) -> None:
    # What an arm with replay trains on is measured too.
    recipe = recipe_of(
        models(), select__seed=21, select__compare=[*ARMS], tune__freeze_a=True, evaluate__overlap="allow"
    )
    folder = run(recipe)
    assert {arm.name for arm in folder.arms()} == {"safe", *ARMS}
    cmap = folder.load_map()
    trained: dict[str, tuple[HeadSelection, TuneResult]] = {}
    for arm in folder.arms():
        selection = folder.load_selection(arm, cmap)
        trained[arm.name] = selection, folder.load_tuning(arm, selection)
    heads = {name: selection.heads for name, (selection, _) in trained.items()}
    results = {name: result for name, (_, result) in trained.items()}
    assert heads["safe"] == heads["safe+pcgrad"] == heads["safe+replay-20"] == heads["safe+nullspace-90"]
    assert len(heads["all"]) == 12
    assert (len(heads["safe-50"]), len(heads["risky-75"])) == (6, 9)
    assert [layer for layer, _ in heads["layer-matched"]] == [layer for layer, _ in heads["safe"]]
    for name, result in results.items():
        assert (result.surgery is not None) == name.endswith("+pcgrad")
        assert (result.null_space is not None) == (result.settings["null_space"] == 0.9) == name.endswith("space-90")
        assert (result.settings["surgery"], result.settings["replay"]) == (
            "pcgrad" if name.endswith("+pcgrad") else "none",
            0.2 if name.endswith("+replay-20") else 0.0,
        )
        # A frozen, the budget is that of the heads, to the parameter.
        assert result.budget["heads"] == len(heads[name])
        assert result.budget["effective_parameters"] == len(heads[name]) * 8 * 4
        assert result.budget["a_matrices"] == 0
    assert set(folder.load_evaluations()) == {"base", "safe", *ARMS}
    assert "safe+pcgrad" in folder.report_file.read_text()


def test_one_command_an_arm(finished: Path, own_data: dict[str, Path], tmp_path: Path) -> None:
    options: list[Any] = ["--data", own_data["align"], "--max-steps", "1", "--rank", "4", "--batch-size", "2"]
    utility = ["--utility", own_data["utility"]]
    names = ["layer-matched-50", "safe+nullspace-90", "safe+pcgrad"]
    for name, more in zip(names, ([], utility, utility), strict=True):
        done = castune("tune", finished, "--arm", name, *options, *more, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert f"{name}:" in done.stdout
        assert ("A is free of the leading" in done.stdout) == (name == "safe+nullspace-90")
    folder = RunDirectory(finished)
    assert [arm.name for arm in folder.arms()] == ["safe", *names]
    # The main arm and the recipe stay as they were.
    assert folder.load_recipe().tune.max_steps == 2
    assert (
        folder.load_tuning(folder.arm("safe"), folder.load_selection(folder.arm("safe"), folder.load_map())).steps == 2
    )

    for name, more, said in (
        ("risky+pcgrad", [], ('surgery = "pcgrad"', "--utility SOURCE")),
        ("risky+replay-20", [], ("replay = 0.2", "--utility SOURCE")),
        ("../../risky", [], ("accepted: safe",)),
        ("risky+nullspace-90", [], ("null_space = 0.9", "--utility SOURCE")),
        ("safe+pcgrad", ["--surgery", "pcgrad-symmetric", *utility], ("contradict",)),
        ("safe+nullspace-90", ["--null-space", "0.8", *utility], ("--null-space 0.8 contradict",)),
    ):
        assert_one_error(castune("tune", finished, "--arm", name, *options, *more, cwd=tmp_path), *said)
    assert len(folder.arms()) == 4

    # A selection made by other means keeps the name it was given.
    folder.load_selection(folder.arm("safe"), folder.load_map()).save(finished / "arms" / "mine")
    done = castune("tune", finished, "--arm", "mine", *options, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (finished / "arms" / "mine" / "adapter" / "certificate.json").is_file()


def test_preferences_by_the_command_line(finished: Path, own_data: dict[str, Path], tmp_path: Path) -> None:
    pytest.importorskip("trl")
    file = tmp_path / "pairs.jsonl"
    file.write_text(
        '{"prompt": "Tell me of tea.", "chosen": "It is warm.", "rejected": "No."}\n'
        '{"prompt": "Tell me of snow.", "chosen": "It is cold and white.", "rejected": "No."}\n'
    )
    tune = ["tune", finished, "--max-steps", "1", "--rank", "4", "--batch-size", "2", "--arm", "risky+dpo"]
    assert_one_error(castune(*tune, "--data", own_data["align"], cwd=tmp_path), "prompt, chosen, rejected")
    done = castune(*tune, "--data", file, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    folder = RunDirectory(finished)
    arm = folder.arm("risky+dpo")
    result = folder.load_tuning(arm, folder.load_selection(arm, folder.load_map()))
    assert result.settings["method"] == "dpo"
    assert result.losses[0][1] == pytest.approx(0.6931, abs=1e-3)
