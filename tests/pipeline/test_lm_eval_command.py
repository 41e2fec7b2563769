"""`castune lm-eval` on a run: every model once, and again only where something changed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from command_line import assert_one_error, castune

from castune.config import Recipe
from castune.errors import ArtifactError
from castune.steps.directory import RunDirectory
from castune.steps.lm_eval import lm_eval_step
from castune.steps.report import report_step

pytest.importorskip("lm_eval")

OPTIONS = {"limit": None, "num_fewshot": 0, "batch_size": 4, "apply_chat_template": False, "seed": 0}


@pytest.fixture
def finished(finished_run: Callable[..., Path]) -> tuple[Recipe, Path]:
    path = finished_run()
    return Recipe.load(path / "recipe.toml"), path


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    folder = tmp_path / "tasks"
    folder.mkdir()
    rows = [{"q": f"word {i}", "choices": ["yes", "no"], "answer": i % 2} for i in range(6)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = {
        "task": "own_choice", "dataset_path": "json", "test_split": "test", "output_type": "multiple_choice",
        "dataset_kwargs": {"data_files": {"test": str(folder / "rows.jsonl")}, "cache_dir": str(folder / "cache")},
        "doc_to_text": "{{q}}", "doc_to_choice": "choices", "doc_to_target": "answer",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}], "metadata": {"version": 1},
    }  # fmt: skip
    for name in ("own_choice", "own_other"):
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({**config, "task": name}))
    return folder


@pytest.mark.slow
def test_base_and_arms_are_measured_once(finished: tuple[Recipe, Path], tasks: Path) -> None:
    recipe, path = finished
    folder, options = RunDirectory(path), {**OPTIONS, "include_path": str(tasks)}
    found = lm_eval_step(folder, recipe, ["own_choice"], **options)
    assert list(found) == ["base", "safe", "risky"]
    assert {score.n for result in found.values() for score in result.tasks} == {6}
    assert found["base"].model["adapter"] is None
    assert len({result.model["adapter"] for result in found.values()}) == 3
    files = {name: (folder.evaluation(name) / "lm_eval.json").stat().st_mtime_ns for name in found}
    assert lm_eval_step(folder, recipe, ["own_choice"], **options) == found
    assert files == {name: (folder.evaluation(name) / "lm_eval.json").stat().st_mtime_ns for name in found}
    other = {**options, "limit": 2}
    with pytest.raises(ArtifactError, match="limit = None, but now it is 2; use the same options, or --overwrite"):
        lm_eval_step(folder, recipe, ["own_choice"], **other)
    assert folder.load_lm_eval() == found, "nothing was lost"
    both = lm_eval_step(folder, recipe, ["own_choice", "own_other"], **options)["safe"]
    assert [score.task for score in both.tasks] == ["own_choice", "own_other"]
    assert both.tasks[0] == found["safe"].tasks[0]
    assert lm_eval_step(folder, recipe, ["own_choice"], overwrite=True, **other)["base"].tasks[0].n == 2
    html = report_step(folder).read_text(encoding="utf-8")
    assert "By lm-eval" in html
    assert "own_choice" in html


def test_the_command_says_what_is_wrong(finished: tuple[Recipe, Path], tasks: Path) -> None:
    _, path = finished
    assert_one_error(
        castune("lm-eval", path, "--tasks", "own_choise", "--include-path", tasks, cwd=path), "own_choise", "own_choice"
    )
    assert_one_error(castune("lm-eval", path.parent, "--tasks", "mmlu", cwd=path), "not a run directory")
