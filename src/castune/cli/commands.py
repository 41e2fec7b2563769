"""All commands, in the order in which `castune --help` shows them."""

from __future__ import annotations

from typing import Annotated

import typer

from castune import __version__
from castune.cli.adapters import export, mask
from castune.cli.diagnosis import diagnose, drift, group, plan, select
from castune.cli.evaluation import evaluate, judge, lm_eval
from castune.cli.inspection import inspect, repair
from castune.cli.machine import doctor
from castune.cli.runs import budget, report, reproduce, run
from castune.cli.settings import with_settings
from castune.cli.studies import study, watch
from castune.cli.tuning import tune
from castune.console import say

app = typer.Typer(
    name="castune",
    help="Find the attention heads your fine-tuning would break, before you train; then train only the others.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

# In the order of the help: whole runs and studies, the steps of a run, what is made of it.
for command in (
    run, study, watch, budget,
    plan, diagnose, select, group, tune, drift, inspect, repair, mask, export, evaluate, judge, lm_eval,
    report, reproduce, doctor,
):  # fmt: skip
    app.command()(with_settings(command))


@app.callback(invoke_without_command=True)
def _options(
    version: Annotated[bool, typer.Option("--version", help="Show the version and exit.", is_eager=True)] = False,
) -> None:
    if version:
        say(f"castune {__version__}")
        raise typer.Exit
