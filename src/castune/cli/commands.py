"""All commands, in the groups and the order in which `castune --help` shows them."""

from __future__ import annotations

from typing import Annotated

import typer
from typer.completion import Shells, get_completion_script

from castune import __version__
from castune.cli.adapters import export, mask, project
from castune.cli.attack import attack
from castune.cli.diagnosis import diagnose, drift, group, plan, select
from castune.cli.dial import dial
from castune.cli.evaluation import evaluate, judge, lm_eval
from castune.cli.gate import gate
from castune.cli.help import HelpfulCommand, HelpfulGroup, text_and_examples
from castune.cli.inspection import inspect, repair
from castune.cli.machine import doctor
from castune.cli.runs import budget, report, reproduce, run
from castune.cli.settings import with_settings
from castune.cli.studies import study, watch
from castune.cli.tuning import tune
from castune.console import say

NAME = "castune"

app = typer.Typer(
    name=NAME,
    cls=HelpfulGroup,
    help="Score attention heads by safety-utility conflict before training; fine-tune only the low-conflict ones.",
    epilog="castune doctor\ncastune run\ncastune plan default --accelerator h100",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

GROUPS = {
    "Core commands": (run, plan, diagnose, select, tune, evaluate, report),
    "Studies": (study, watch, budget, group, drift),
    "Adapters": (inspect, repair, dial, attack, mask, project, export),
    "Tools": (judge, lm_eval, gate, reproduce, doctor),
}
for panel, commands in GROUPS.items():
    for command in commands:
        text, examples = text_and_examples(command)
        register = app.command(cls=HelpfulCommand, help=text, epilog=examples, rich_help_panel=panel)
        register(with_settings(command))


@app.callback(invoke_without_command=True)
def _options(
    version: Annotated[bool, typer.Option("--version", help="Show the version and exit.", is_eager=True)] = False,
    show_completion: Annotated[
        Shells | None,
        typer.Option(
            metavar="SHELL",
            help="Print the completion script of a shell: bash, zsh, fish or powershell.",
        ),
    ] = None,
) -> None:
    if version:
        say(f"castune {__version__}")
        raise typer.Exit
    if show_completion is not None:
        shell = show_completion.value
        say(get_completion_script(prog_name=NAME, complete_var=f"_{NAME.upper()}_COMPLETE", shell=shell))
        raise typer.Exit
