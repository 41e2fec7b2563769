"""Training the selected heads."""

from __future__ import annotations

from typing import Annotated

import typer

from castune.cli.help import ADAPTER, READS, USES_UTILITY, WRITES
from castune.cli.of_run import data_of_run, settings_of_run
from castune.cli.options import ALIGN, TUNING, UTILITY_DRAWN, Run
from castune.cli.settings import Typed, Values
from castune.cli.values import names
from castune.config import DataConfig
from castune.console import say, selected_in, show_certificate, show_null_space, show_selections, show_surgery
from castune.names import ArmName


def tune(
    run_directory: Run,
    *,
    align: Annotated[Typed, ALIGN],
    held_out: Annotated[
        str | None,
        typer.Option(
            metavar="SUITES",
            rich_help_panel=READS,
            help="Drop training examples whose prompts are in these suites. Comma-separated.",
        ),
    ] = None,
    arm: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            rich_help_panel=ADAPTER,
            help="Arm to train: one made with castune select --beside, or safe, risky-50, random, layer-matched, all, "
            "bucket-2-of-4, safe-gradient, ... Append +pcgrad, +dpo, +replay-10 or +nullspace-95 to train it "
            "differently. The main selection by default.",
        ),
    ] = None,
    settings: Annotated[Typed, TUNING],
    utility: Annotated[
        list[str] | None,
        typer.Option(
            metavar="DATA",
            rich_help_panel=USES_UTILITY,
            help="D_util for --surgery, --replay and --null-space: questions, or prompts with replies. Repeatable.",
        ),
    ] = None,
    of_utility: Annotated[Values, UTILITY_DRAWN],
    overwrite: Annotated[
        bool, typer.Option("--overwrite", rich_help_panel=WRITES, help="Replace an existing adapter.")
    ] = False,
) -> None:
    """Train the selected heads and write a certified adapter.

    Writes a PEFT adapter, and a certificate that nothing outside the selected heads changed. The same command continues
    an interrupted training run. Data and settings that are not given are those of the run, so that its arms differ in
    their heads alone; a new run has the defaults below.

    Examples:
        castune tune runs/first --data starter-align --max-steps 100
        castune tune runs/first --arm random
    """
    from castune.core.shards import Shard
    from castune.steps.directory import RunDirectory
    from castune.steps.tune import tune_arm

    folder = RunDirectory(run_directory)
    recipe = folder.load_recipe()
    changes = dict(ArmName.parse(arm).changes) if arm is not None and ArmName.is_name(arm) else {}
    trained, result = tune_arm(
        folder,
        arm,
        settings_of_run(recipe.tune, settings, but=changes),
        typed=settings,
        align=data_of_run(recipe.align, align),
        held_out=names(held_out or ""),
        utility=[DataConfig(source=source, **of_utility) for source in utility or ()],
        overwrite=overwrite,
    )
    if not Shard.is_main_process():
        return
    budget = result.budget
    say(
        f"{trained.name}: {selected_in(budget)}, {budget['trainable_parameters']:,} trainable parameters, "
        f"{result.steps} steps"
    )
    show_surgery(trained.name, result)
    show_null_space(trained.name, result)
    show_selections(trained.name, result)
    show_certificate(result.certificate)
    say(f"adapter: {trained.adapter}")
