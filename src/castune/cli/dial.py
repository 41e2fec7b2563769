"""One adapter at several strengths: the trade-off, the strength for a target, and an adapter at it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer

from castune.cli.options import Arm, Run
from castune.cli.values import numbers
from castune.console import say, show_certificate
from castune.errors import CastuneError, NothingScored
from castune.purposes import PURPOSES

if TYPE_CHECKING:
    from castune.artifacts import ScaledAdapter
    from castune.stats.dial import StrengthCurves

# What the refusals of harmful prompts are called for short.
_SHORT = {"refused": "safety"}


class Target(NamedTuple):
    """A purpose and the value it is to have."""

    purpose: str
    value: float


def dial(
    run_directory: Run,
    arm: Arm = None,
    strengths: Annotated[
        str | None,
        typer.Option(
            metavar="X,X,...",
            help="Strengths to measure, above 0, at most 2. Default: 0.25,0.5,0.75,1,1.25,1.5; none with --strength "
            "alone.",
        ),
    ] = None,
    target: Annotated[
        str | None,
        typer.Option(
            metavar="MEASURE=X",
            help="Find the strength for this: the smallest that reaches a goal (refused=0.9), the largest that keeps a "
            "limit (over-refusal=0.1).",
        ),
    ] = None,
    strength: Annotated[float | None, typer.Option(metavar="X", help="Use this strength.")] = None,
    export: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Write the adapter at the strength of --target or --strength."),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an adapter that castune dial wrote.")] = False,
) -> None:
    """Show what an adapter does at several strengths, and pick one.

    Scales the adapter's update without training, and measures what the run measures. The same command continues an
    interrupted one and measures only what is missing.

    Examples:
        castune dial runs/first
        castune dial runs/first --target refused=0.9 --export adapters/refuses-90
        castune dial runs/first --strength 0.5 --export adapters/half
    """
    from castune.artifacts.files import check_vacant
    from castune.artifacts.scaled_adapter import SCALE_FILE
    from castune.evaluation.suites import load_suites
    from castune.steps.dial import STRENGTHS, checked_strengths, dial_step, export_at_strength, require_adapter
    from castune.steps.directory import RunDirectory

    _check_options(target, strength, export)
    wanted = STRENGTHS if strengths is None else numbers(strengths, "--strengths", float, "0.25,0.5,0.75,1")
    checked_strengths(wanted)
    folder = RunDirectory(run_directory)
    recipe, of_arm = folder.load_recipe(), folder.arm(arm)
    require_adapter(folder, of_arm)
    if export is not None and not (overwrite and (export / SCALE_FILE).is_file()):
        check_vacant(export, "--export")
    aim = None
    is_measured = strength is not None and folder.is_evaluated(of_arm.name, strength)
    # Without anything to write, a strength alone is there to be looked at.
    if strength is None or strengths is not None or (is_measured and export is None):
        wanted = wanted if strengths is not None or strength is None else (strength,)
        config = recipe.evaluate
        suites = load_suites(config.suites, limit=config.limit, seed=config.seed)
        aim = None if target is None else _target(target, {suite.purpose for suite in suites})
        curves = dial_step(folder, recipe, of_arm, suites, wanted)
        _show_curves(curves, of_arm.name, folder.dial(of_arm.name))
        if aim is not None:
            strength = _aim(curves, aim)
        elif strength is not None:
            _show_level(curves, strength)
            is_measured = any(math.isclose(strength, one, abs_tol=1e-6) for one in curves.strengths_J.tolist())
    if aim is None and strength is not None and not is_measured:
        say(f"note: strength {strength:g} has not been measured; --strengths {strength:g} measures it")
    if export is None:
        return
    if strength is None:
        raise CastuneError(
            f"--export {export}: no strength was found for {target} (see above), so nothing is written; give one with "
            "--strength"
        )
    made = export_at_strength(folder, recipe, of_arm, export, strength=strength, target=aim, overwrite=overwrite)
    _show_export(made, export)


def _check_options(target: str | None, strength: float | None, export: Path | None) -> None:
    """Refuse options that leave open which strength is meant."""
    from castune.steps.dial import checked_strengths

    if target is not None and strength is not None:
        raise CastuneError("choose one of --target, which finds a strength, and --strength, which gives it")
    if strength is not None:
        checked_strengths([strength])
    if export is not None and target is None and strength is None:
        raise CastuneError(f"--export {export} needs a strength: add --strength X, or --target MEASURE=X to find one")


def _target(text: str, measured: set[str]) -> Target:
    """What was typed as a target, if the run measures it."""
    name, _, number = text.partition("=")
    purpose = _SHORT.get(name.strip(), name.strip())
    short = {long: name for name, long in _SHORT.items()}
    accepted = [short.get(known, known) for known in PURPOSES if known in measured]
    if purpose not in measured:
        raise CastuneError(f"--target {text}: this run measures {', '.join(accepted)}; try {accepted[0]}=0.9")
    try:
        value = float(number)
    except ValueError:
        value = float("nan")
    is_share = PURPOSES[purpose].unit == "share"
    # No comparison holds for what is no number.
    if not (0 <= value <= 1 if is_share else abs(value) < float("inf")):
        unit = "a share from 0 to 1" if is_share else "a number in nats per token"
        raise CastuneError(f"--target {text}: expected {unit}, as in {name}=0.9")
    return Target(purpose, value)


def _show_curves(curves: StrengthCurves, arm: str, file: Path) -> None:
    from castune.report.dial import curve_tables, rule

    say(f"Arm {arm}: the adapter's update times the strength; nothing is trained. Strength 1 is the trained adapter.")
    for text in (*curve_tables(curves), rule()):
        say(f"\n{text}")
    say(f"\nfull table: {file}")


def _aim(curves: StrengthCurves, aim: Target) -> float | None:
    """Tell where the target is reached; the strength to take, None where there is none."""
    from castune.report.dial import caution, filled, target_sentences
    from castune.steps.dial import chosen_strength, is_goal

    if aim.purpose not in curves.measures:
        raise NothingScored(f"{aim.purpose}: not one example was scored at every strength, so no strength can be found")
    reached = curves.reach(*aim)
    strength = chosen_strength(reached)
    say("")
    for sentence in target_sentences(reached, strength, goal=is_goal(reached)):
        say(filled(sentence))
    if strength is not None:
        _show_level(curves, strength)
        say(filled(caution(reached, curves.at(strength)[aim.purpose], curves.measures[aim.purpose].n)))
    return strength


def _show_level(curves: StrengthCurves, strength: float) -> None:
    from castune.report.dial import level_table

    if strength <= curves.strengths_J[-1]:
        levels = curves.at(strength)
        say(f"\n{level_table(strength, levels, [name for name in curves.measures if name not in levels])}\n")


def _show_export(made: ScaledAdapter, folder: Path) -> None:
    show_certificate(made.certificate)
    say(f"adapter at strength {made.strength:g}: {folder}")
