"""What a model and its adapters can do, and refuse."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from castune.cli.options import EVALUATION, JUDGE, Run
from castune.cli.settings import Values
from castune.cli.values import names
from castune.config import EvaluateConfig, Recipe
from castune.console import show_evaluations, show_lm_eval


def evaluate(
    run_directory: Run,
    settings: Annotated[Values, EVALUATION],
    allow_overlap: Annotated[
        bool, typer.Option("--allow-overlap", help="Measure suites that hold prompts of the training data too.")
    ] = False,
) -> None:
    """Measure the base model and every tuned arm on the same examples."""
    from castune.evaluation.suites import load_suites
    from castune.steps.changes import all_cost_ratios
    from castune.steps.directory import RunDirectory
    from castune.steps.equal_safety import costs_at_equal_safety
    from castune.steps.evaluate import evaluate_step, require_scored
    from castune.steps.held_out import check_held_out

    folder = RunDirectory(run_directory)
    recipe = folder.load_recipe()
    config = EvaluateConfig(**settings, overlap="allow" if allow_overlap else "refuse")
    recipe = Recipe(**{**dict(recipe), "evaluate": config})
    loaded = load_suites(config.suites, limit=config.limit, seed=config.seed)
    check_held_out(recipe, loaded, folder=folder)
    found = evaluate_step(folder, recipe, loaded)
    folder.save_recipe(recipe)
    show_evaluations(found, all_cost_ratios(found), costs_at_equal_safety(folder))
    require_scored(found)


def judge(
    run_directory: Run,
    settings: Annotated[Values, JUDGE],
) -> None:
    """Judge the stored replies of all evaluations again; nothing is generated."""
    from castune.steps.changes import all_cost_ratios
    from castune.steps.directory import RunDirectory
    from castune.steps.equal_safety import costs_at_equal_safety
    from castune.steps.evaluate import judge_step, require_scored

    folder = RunDirectory(run_directory)
    found = judge_step(folder, settings["judge"])
    show_evaluations(found, all_cost_ratios(found), costs_at_equal_safety(folder))
    require_scored(found)


def lm_eval(
    run_directory: Run,
    tasks: Annotated[str, typer.Option(help="Comma-separated tasks or groups of lm-eval: mmlu, gsm8k, ...")],
    limit: Annotated[int | None, typer.Option(help="Documents a task; all when absent.")] = None,
    num_fewshot: Annotated[
        int | None, typer.Option(help="Examples shown before each question; the task's own number when absent.")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Rows of a forward.")] = 8,
    apply_chat_template: Annotated[
        bool, typer.Option("--apply-chat-template", help="Put prompts into the model's chat template.")
    ] = False,
    include_path: Annotated[Path | None, typer.Option(help="Directory with task files (YAML) of your own.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the examples shown; lm-eval's own by default.")] = 1234,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Forget what was measured with other options.")
    ] = False,
) -> None:
    """lm-evaluation-harness's own tasks on the same models: its protocol beside castune's."""
    from castune.steps.directory import RunDirectory
    from castune.steps.lm_eval import lm_eval_step

    folder = RunDirectory(run_directory)
    options = {
        "limit": limit,
        "num_fewshot": num_fewshot,
        "batch_size": batch_size,
        "apply_chat_template": apply_chat_template,
        "include_path": None if include_path is None else str(include_path),
        "seed": seed,
    }
    show_lm_eval(lm_eval_step(folder, folder.load_recipe(), names(tasks), overwrite=overwrite, **options))
