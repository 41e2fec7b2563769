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
    show_null_space,
    show_reproduction,
    show_selections,
    show_surgery,
)


def run(
    recipe: Annotated[
        Path | None, typer.Argument(metavar="RECIPE", help="A TOML recipe. The quickstart by default.")
    ] = None,
    overrides: Overrides = None,
    out: Annotated[str | None, typer.Option(metavar="DIR", help="Run directory. The recipe's by default.")] = None,
) -> None:
    """Run the whole job: diagnose, select, tune, evaluate, report.

    The same command continues an interrupted run.

    Examples:
        castune run
        castune run --set tune.max_steps=50 --out runs/short
    """
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
            show_null_space(arm.name, result)
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
        float | None,
        typer.Option(metavar="X", help="Largest acceptable loss, in the unit of --cost. Needs --anchor."),
    ] = None,
    anchor: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="Trained and evaluated arm that sets the scale: all, or a safe zone. Needs --max-loss."
        ),
    ] = None,
    cost: Annotated[
        str,
        typer.Option(
            metavar="COST",
            help="Unit of the loss: utility (points of accuracy), or nll or kl (nats per token above the base model).",
        ),
    ] = "utility",
) -> None:
    """Predict the cost of training more or fewer heads.

    Shows the predicted cost for several shares of the safest heads. With --max-loss and --anchor, also the largest
    number of heads whose predicted loss stays within the limit.

    Examples:
        castune budget runs/quickstart
        castune budget runs/quickstart --max-loss 2 --anchor all
    """
    from castune.steps.directory import RunDirectory
    from castune.study.budget import show_budget

    show_budget(RunDirectory(run_directory), max_loss=max_loss, anchor=anchor, cost=cost)


def report(run_directory: Run) -> None:
    """Write report.html and the figures of a run.

    Reports whatever the run directory holds so far.

    Examples:
        castune report runs/quickstart
    """
    from castune.steps.directory import RunDirectory
    from castune.steps.report import report_step

    say(f"report: {report_step(RunDirectory(run_directory))}")


def reproduce(
    run_directory: Run,
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Directory for the repeated run. By default RUN-reproduced."),
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Only list the conditions that have changed. Compute nothing.")
    ] = False,
) -> None:
    """Repeat a run from its own records and compare every result.

    Exits with code 1 if a result leads to a different decision.

    Examples:
        castune reproduce runs/quickstart --check
        castune reproduce runs/quickstart
    """
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
