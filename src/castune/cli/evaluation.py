"""What a model and its adapters can do, and refuse."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from castune.cli.help import READS
from castune.cli.of_run import settings_of_run
from castune.cli.options import EVALUATION, JUDGE, Run
from castune.cli.settings import Typed
from castune.cli.values import names
from castune.config import Recipe
from castune.console import show_evaluations, show_lm_eval


def evaluate(
    run_directory: Run,
    settings: Annotated[Typed, EVALUATION],
    allow_overlap: Annotated[
        bool,
        typer.Option(
            "--allow-overlap", rich_help_panel=READS, help="Also measure suites that contain training prompts."
        ),
    ] = False,
) -> None:
    """Evaluate the base model and every arm on the same examples.

    The same command continues an interrupted evaluation. Settings that are not given are those of the run; a new run
    has the defaults below.

    Examples:
        castune evaluate runs/first --limit 20
        castune evaluate runs/first --suites starter-safety-eval,xstest
    """
    from castune.evaluation.suites import load_suites
    from castune.steps.changes import all_cost_ratios
    from castune.steps.directory import RunDirectory
    from castune.steps.equal_safety import costs_at_equal_safety
    from castune.steps.evaluate import evaluate_step, require_scored
    from castune.steps.held_out import check_held_out

    folder = RunDirectory(run_directory)
    recipe = folder.load_recipe()
    if settings.get("backend", "openai") != "openai":
        settings.setdefault("served_model", None)  # the run's is of another backend
    # Allowed for once: a run keeps what it was made with.
    overlap = recipe.evaluate.overlap
    config = settings_of_run(recipe.evaluate, {**settings, "overlap": "allow" if allow_overlap else overlap})
    recipe = Recipe(**{**dict(recipe), "evaluate": config})
    loaded = load_suites(config.suites, limit=config.limit, seed=config.seed)
    check_held_out(recipe, loaded, folder=folder)
    found = evaluate_step(folder, recipe, loaded)
    folder.save_recipe(Recipe(**{**dict(recipe), "evaluate": config.model_copy(update={"overlap": overlap})}))
    show_evaluations(found, all_cost_ratios(found), costs_at_equal_safety(folder))
    require_scored(found)


def judge(
    run_directory: Run,
    settings: Annotated[Typed, JUDGE],
) -> None:
    """Rejudge the stored replies of a run with another judge.

    No replies are generated. Without --judge the run's own judge reads them again.

    Examples:
        castune judge runs/first --judge prefix+opening
    """
    from castune.steps.changes import all_cost_ratios
    from castune.steps.directory import RunDirectory
    from castune.steps.equal_safety import costs_at_equal_safety
    from castune.steps.evaluate import judge_step, require_scored

    folder = RunDirectory(run_directory)
    found = judge_step(folder, settings.get("judge", folder.load_recipe().evaluate.judge))
    show_evaluations(found, all_cost_ratios(found), costs_at_equal_safety(folder))
    require_scored(found)


def lm_eval(
    run_directory: Run,
    tasks: Annotated[
        str, typer.Option(metavar="TASKS", help="Tasks or groups of lm-eval, such as mmlu or gsm8k. Comma-separated.")
    ],
    limit: Annotated[int | None, typer.Option(metavar="N", help="Documents per task. All by default.")] = None,
    num_fewshot: Annotated[
        int | None, typer.Option(metavar="N", help="Few-shot examples per question. The task's own number by default.")
    ] = None,
    batch_size: Annotated[int, typer.Option(metavar="N", help="Rows per forward pass.")] = 8,
    apply_chat_template: Annotated[
        bool, typer.Option("--apply-chat-template", help="Apply the model's chat template to prompts.")
    ] = False,
    include_path: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Directory with your own task files (YAML).")
    ] = None,
    seed: Annotated[int, typer.Option(metavar="N", help="Seed of the few-shot examples.")] = 1234,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Discard results that were measured with other options.")
    ] = False,
) -> None:
    """Run lm-evaluation-harness tasks on the models of a run.

    Uses lm-eval's own protocol. Needs the extra lm-eval.

    Examples:
        castune lm-eval runs/first --tasks mmlu,gsm8k --limit 100
    """
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
