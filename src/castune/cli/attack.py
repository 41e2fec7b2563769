"""The safety of a run's arms under attack: is it more brittle where it is concentrated in few heads?"""

from __future__ import annotations

from typing import Annotated

import typer

from castune.cli.help import MEASURES, READS
from castune.cli.options import ATTACK, Run
from castune.cli.settings import Values
from castune.config import AttackConfig
from castune.console import say, show_attacks
from castune.errors import CastuneError


def attack(
    run_directory: Run,
    settings: Annotated[Values, ATTACK],
    arms: Annotated[
        list[str] | None,
        typer.Option(
            "--arm",
            metavar="NAME",
            rich_help_panel=READS,
            help="Arm of the run. Repeatable; the others are compared with the first. By default all that have an "
            "adapter and were evaluated, compared with all if the run has it.",
        ),
    ] = None,
    kinds: Annotated[
        list[str] | None,
        typer.Option(
            "--kind",
            metavar="KIND",
            rich_help_panel=MEASURES,
            help="Attack: relearn (train on a few benign rows), direction (project the refusal direction out), "
            "quantise (store the base in 4 bits) or dial (turn the adapter down). Repeatable. By default all of them "
            "that this machine can do.",
        ),
    ] = None,
    rows: Annotated[
        str | None,
        typer.Option(
            metavar="SOURCE",
            rich_help_panel=READS,
            help="Benign prompts with replies to relearn on. By default the benign rows of starter-align.",
        ),
    ] = None,
    prompts: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SUITE",
            rich_help_panel=READS,
            help="Harmful prompts on which refusals are counted. Repeatable. By default the run's safety suites.",
        ),
    ] = None,
) -> None:
    """Attack the safety of a run's arms, and see which one breaks.

    Counts refusals before and after, with all arms equally safe before. Attacked models stay in memory and are never
    written. The same command continues an interrupted one.

    Examples:
        castune attack runs/first
        castune attack runs/first --kind relearn --rows mine.jsonl --n-rows 10,50
        castune attack runs/first --arm all --arm safe --kind direction
    """
    from castune.artifacts.attack_result import ATTACKS_FILE, KINDS
    from castune.steps.attack import attack_step
    from castune.steps.attack_inputs import attack_inputs
    from castune.steps.directory import RunDirectory

    if unknown := [kind for kind in kinds or () if kind not in KINDS]:
        raise CastuneError(f"--kind {unknown[0]}: no such attack; accepted: {', '.join(KINDS)}")
    config = AttackConfig(**{**settings, "kinds": kinds or None})
    folder = RunDirectory(run_directory)
    recipe = folder.load_recipe()
    inputs = attack_inputs(folder, recipe, config, arms=arms or (), rows=rows, prompts=prompts or ())
    show_attacks(attack_step(folder, recipe, config, inputs))
    say(f"full results: {folder.attacks / ATTACKS_FILE}; castune report {run_directory} shows them next to the gain")
