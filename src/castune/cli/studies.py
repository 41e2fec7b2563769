"""Studies: many runs, compared."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from castune.cli.help import PLANS, RUNS, WRITES
from castune.cli.options import Overrides
from castune.cli.runs import recipe_of


def study(
    recipe: Annotated[
        Path, typer.Argument(metavar="RECIPE", help="A TOML recipe. Its table [study] says what to compare.")
    ],
    overrides: Overrides = None,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", rich_help_panel=PLANS, help="Show the graph and its estimated cost. Do nothing."),
    ] = False,
    accelerator: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            rich_help_panel=PLANS,
            help="Estimate the dry run from the data sheet of an a100, h100, h200 or l40s.",
        ),
    ] = None,
    executor: Annotated[
        str,
        typer.Option(
            metavar="EXECUTOR",
            rich_help_panel=RUNS,
            help="local: processes on this machine. ray: tasks of a Ray cluster.",
            autocompletion=lambda: ["local", "ray"],
        ),
    ] = "local",
    workers: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            rich_help_panel=RUNS,
            help="Units to run in parallel (local, or on a Ray started here). By default, what fits the machine.",
        ),
    ] = None,
    threads: Annotated[
        int | None,
        typer.Option(
            metavar="N", rich_help_panel=RUNS, help="CPU threads per unit. By default, all cores are divided up."
        ),
    ] = None,
    gpus: Annotated[
        int | None,
        typer.Option(metavar="N", rich_help_panel=RUNS, help="Accelerators per unit. By default 1 if there are any."),
    ] = None,
    memory: Annotated[
        float | None,
        typer.Option(metavar="X", rich_help_panel=RUNS, help="Gigabytes of memory that Ray reserves per unit."),
    ] = None,
    address: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS",
            rich_help_panel=RUNS,
            help="Address of a running Ray cluster, or auto. By default, one is started here.",
        ),
    ] = None,
    shards: Annotated[
        int, typer.Option(metavar="N", rich_help_panel=RUNS, help="Number of units to split a diagnosis into.")
    ] = 1,
    shard: Annotated[
        str | None,
        typer.Option(
            metavar="I/N",
            rich_help_panel=RUNS,
            help="Do only shard I of N. All shards use the same --out. Afterwards, run once without it.",
        ),
    ] = None,
    launch: Annotated[
        str | None,
        typer.Option(
            metavar="COMMAND",
            rich_help_panel=RUNS,
            help="Launcher of the processes of one diagnosis or training, such as 'torchrun --standalone "
            "--nproc_per_node 8', or accelerate launch with a config.",
        ),
    ] = None,
    out: Annotated[
        str | None,
        typer.Option(metavar="DIR", rich_help_panel=WRITES, help="Study directory. The recipe's by default."),
    ] = None,
) -> None:
    """Compare arms over seeds and buckets: the paper's tables.

    Writes tables, figures and a report. The same command continues where it stopped and retries failed units.

    Examples:
        castune study recipes/study.toml --dry-run
        castune study recipes/study.toml --workers 2 --out runs/study
    """
    from castune.study.run import Options, show_graph, show_study

    found = recipe_of(recipe, overrides, out)
    if dry_run:
        show_graph(found, accelerator=accelerator)
        return
    options = Options(executor, workers, threads, gpus, memory, address, shards, shard, launch)
    if not show_study(found, options):
        raise typer.Exit(1)


def watch(
    study_directory: Annotated[Path, typer.Argument(metavar="STUDY", help="A study directory.")],
    interval: Annotated[float, typer.Option(metavar="X", help="Refresh interval in seconds.")] = 5.0,
    once: Annotated[bool, typer.Option("--once", help="Show the state once and exit.")] = False,
) -> None:
    """Show the progress of a study.

    Shows finished and running units with their losses, the time left, and the reliability of maps.

    Examples:
        castune watch runs/study
        castune watch runs/study --once
    """
    from castune.study import watch as watching

    watching.watch(study_directory, interval=interval, once=once)
