"""Studies: many runs, compared."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from castune.cli.options import Overrides
from castune.cli.runs import recipe_of


def study(
    recipe: Annotated[Path, typer.Argument(help="A TOML recipe; its table [study] says what is compared.")],
    overrides: Overrides = None,
    out: Annotated[str | None, typer.Option(help="Study directory, instead of the recipe's.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the graph and its cost; do nothing.")] = False,
    accelerator: Annotated[
        str | None, typer.Option(help="Of the dry run: a100, h100, h200 or l40s, projected from its data sheet.")
    ] = None,
    executor: Annotated[str, typer.Option(help="local: processes here; ray: tasks of a Ray cluster.")] = "local",
    workers: Annotated[
        int | None, typer.Option(help="Units beside each other (local, or a Ray started here); by the machine.")
    ] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads a unit; shared out when absent.")] = None,
    gpus: Annotated[int | None, typer.Option(help="Accelerators a unit; one where there are any.")] = None,
    memory: Annotated[float | None, typer.Option(help="Gigabytes a unit, for Ray to place it.")] = None,
    address: Annotated[
        str | None, typer.Option(help="Of a running Ray cluster, or auto; one is started here when absent.")
    ] = None,
    shards: Annotated[int, typer.Option(help="Units a diagnosis is split into.")] = 1,
    shard: Annotated[
        str | None,
        typer.Option(metavar="I/N", help="Do share I of N; the jobs have --out in common. Without it at the end."),
    ] = None,
    launch: Annotated[
        str | None,
        typer.Option(
            help="What starts the processes of one diagnosis or training: 'torchrun --standalone --nproc_per_node 8' "
            "or accelerate launch with a config."
        ),
    ] = None,
) -> None:
    """Arms x seeds x buckets: the paper's tables and figures. Continues where it was; retries what failed."""
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
    interval: Annotated[float, typer.Option(help="Seconds between two looks.")] = 5.0,
    once: Annotated[bool, typer.Option("--once", help="Look once.")] = False,
) -> None:
    """How far a study is: units, time left, what runs now with its loss, maps with their reliability."""
    from castune.study import watch as watching

    watching.watch(study_directory, interval=interval, once=once)
