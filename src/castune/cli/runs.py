"""Whole runs: made, reported, made again, and how much of one to train."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from castune.cli.options import Overrides, Run
from castune.config import Recipe
from castune.console import (
    say,
    show_conditions,
    show_diagnosis,
    show_evaluations,
    show_reproduction,
    show_selections,
    show_surgery,
)


def run(
    recipe: Annotated[Path | None, typer.Argument(help="A TOML recipe; the quickstart when absent.")] = None,
    overrides: Overrides = None,
    out: Annotated[str | None, typer.Option(help="Run directory, instead of the recipe's.")] = None,
) -> None:
    """The whole job: diagnose, select, tune, evaluate, report. Continues an interrupted run."""
    from castune import pipeline
    from castune.steps.changes import all_cost_ratios
    from castune.steps.equal_safety import costs_at_equal_safety
    from castune.steps.evaluate import require_scored

    folder = pipeline.run(recipe_of(recipe or quickstart_recipe(), overrides, out))
    cmap = folder.load_map()
    show_diagnosis(cmap)
    for arm in folder.arms():
        # Selections made beside a run need not be trained.
        if arm.is_trained:
            result = folder.load_tuning(arm, folder.load_selection(arm, cmap))
            show_surgery(arm.name, result)
            show_selections(arm.name, result)
    found = folder.load_evaluations()
    show_evaluations(found, all_cost_ratios(found), costs_at_equal_safety(folder))
    say(f"report: {folder.report_file}")
    require_scored(found)


def recipe_of(path: Path, overrides: list[str] | None, out: str | None) -> Recipe:
    """A recipe with the changes of the command line."""
    changes = list(overrides or [])
    if out is not None:
        changes.append(f"out={out!r}")
    return Recipe.load(path, changes)


def quickstart_recipe() -> Path:
    """The quickstart recipe: beside the package in a wheel, in the checkout otherwise."""
    package = Path(__file__).parents[1]
    candidates = (package / "recipes" / "quickstart.toml", package.parents[1] / "recipes" / "quickstart.toml")
    return next(path for path in candidates if path.is_file())


def budget(
    run_directory: Run,
    max_loss: Annotated[
        float | None, typer.Option(help="What may be lost, in the unit of --cost; needs --anchor.")
    ] = None,
    anchor: Annotated[
        str | None, typer.Option(help="A trained and evaluated arm whose loss sets the scale: all, or a safe zone.")
    ] = None,
    cost: Annotated[
        str, typer.Option(help="What is lost: utility (points of accuracy), nll or kl (nats a token over base).")
    ] = "utility",
) -> None:
    """How many heads to train: the predicted cost of every share of the safest, and the largest within a loss."""
    from castune.steps.directory import RunDirectory
    from castune.study.budget import show_budget

    show_budget(RunDirectory(run_directory), max_loss=max_loss, anchor=anchor, cost=cost)


def report(run_directory: Run) -> None:
    """Write report.html and the figures from what the run directory holds."""
    from castune.steps.directory import RunDirectory
    from castune.steps.report import report_step

    say(f"report: {report_step(RunDirectory(run_directory))}")


def reproduce(
    run_directory: Run,
    out: Annotated[
        Path | None, typer.Option(help="Directory of what is made again; RUN-reproduced beside it when absent.")
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Only tell which conditions are not what they were; compute nothing.")
    ] = False,
) -> None:
    """Make a run again from its records, and compare every result. Exit code 1 where one decides otherwise."""
    from castune.steps import reproduce as again
    from castune.steps.directory import RunDirectory

    if check:
        show_conditions(again.conditions(RunDirectory(run_directory)))
        return
    here = run_directory.resolve()
    target = out or here.with_name(f"{here.name}-reproduced")
    found = again.reproduce(run_directory, target)
    show_reproduction(found)
    say(f"details: {target / again.REPRODUCTION_FILE}")
    if not found.is_reproduced:
        raise typer.Exit(1)
