"""The conflict map: what it will cost, measured, measured again, and what is selected from it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from castune.cli.options import (
    DIAGNOSIS,
    MODEL,
    PLANNED_DIAGNOSIS,
    PLANNED_MODEL,
    SAFETY,
    SELECTION,
    UTILITY,
    Arm,
    Model,
    Overrides,
    Run,
)
from castune.cli.settings import Values
from castune.config import Recipe
from castune.console import say, show_diagnosis, show_drift, show_plan
from castune.errors import CastuneError, MapUnfinished


def plan(
    model: Annotated[
        str, typer.Argument(help="default, a hub id, a model directory, a config.json alone, or a recipe (.toml).")
    ],
    safety: Annotated[Values, SAFETY],
    utility: Annotated[Values, UTILITY],
    settings: Annotated[Values, PLANNED_DIAGNOSIS],
    of_model: Annotated[Values, PLANNED_MODEL],
    accelerator: Annotated[
        str | None, typer.Option(help="a100, h100, h200 or l40s: project from its data sheet, measure nothing.")
    ] = None,
    decoded_share: Annotated[
        float | None,
        typer.Option(help="Share of replies that change without a head (decisions only); a guess by their length."),
    ] = None,
    overrides: Overrides = None,
) -> None:
    """What a diagnosis will cost, before anything is spent: from the config alone, and half a minute of measuring.

    Of a recipe its own settings count, with those of --set. Data of a hub that cannot be reached are stood in for.
    """
    from castune.plan.planner import Planner
    from castune.plan.stand_ins import DataOrStandIns
    from castune.steps.inputs import load_calibration

    if model.endswith(".toml"):
        recipe = Recipe.load(Path(model), list(overrides or []))
    elif overrides:
        raise CastuneError("--set changes a recipe; with a model, the options say the same")
    else:
        recipe = Recipe.of(
            model=model, out="unused", safety=safety, utility=_by_domain(**utility), diagnose=settings, **of_model
        )
    if accelerator and recipe.dtype == "auto":
        recipe = recipe.model_copy(update={"dtype": "bfloat16"})
    read = DataOrStandIns()
    calibration = load_calibration(recipe, read)
    planner = Planner.of(recipe, accelerator=accelerator)
    planner = replace(planner, notes=[*planner.notes, *read.notes])
    found = planner.diagnosis(*calibration, recipe.diagnose, decoded_share=decoded_share)
    show_plan(planner, found, accelerator)


def diagnose(
    model: Model,
    out: Annotated[str, typer.Option(help="Run directory to write.")],
    safety: Annotated[Values, SAFETY],
    utility: Annotated[Values, UTILITY],
    settings: Annotated[Values, DIAGNOSIS],
    of_model: Annotated[Values, MODEL],
    shard: Annotated[
        str | None, typer.Option(metavar="I/N", help="Do share I of N; the jobs have --out in common.")
    ] = None,
) -> None:
    """Measure every head: the conflict map, before any training."""
    from castune.core.loading import load_model
    from castune.core.shards import Shard
    from castune.steps.diagnose import diagnose_step
    from castune.steps.directory import RunDirectory
    from castune.steps.inputs import load_calibration

    recipe = Recipe.of(
        model=model, out=out, safety=safety, utility=_by_domain(**utility), diagnose=settings, **of_model
    )
    share = Shard.of(shard)
    folder = RunDirectory(Path(out))
    folder.check(recipe)
    calibration = load_calibration(recipe)
    loaded = load_model(recipe)
    made_before = folder.map_file.is_file()
    try:
        cmap = diagnose_step(folder, recipe, loaded, calibration, shard=shard)
    except MapUnfinished as unfinished:
        say(str(unfinished))
        return
    if not share.writes:
        return
    if not made_before or not folder.recipe_file.is_file():  # it may have been killed between the two
        folder.save_recipe(recipe)
    show_diagnosis(cmap)
    say(f"conflict map: {folder.map_file}")


def _by_domain(source: list[str], **drawn: object) -> Values:
    """One source, or the sources of several domains by name: what stands before `=`, of a path its stem."""
    if len(source) == 1:
        return {"source": source[0], **drawn}
    domains: Values = {}
    for one in source:
        name = Path(one.partition("=")[0]).stem
        if name in domains:
            raise CastuneError(
                f"--utility {one}: there is a domain {name!r} already; rename the file, or name the domains in a "
                "recipe for castune run: [utility.NAME] with source and limit"
            )
        domains[name] = {"source": one, **drawn}
    return domains


def select(
    run_directory: Run,
    settings: Annotated[Values, SELECTION],
    random: Annotated[bool, typer.Option("--random", help="The same as --zone random.")] = False,
    beside: Annotated[
        bool,
        typer.Option("--beside", help="Keep the main selection; put this one beside it, for comparison."),
    ] = False,
) -> None:
    """Choose the heads to train."""
    from castune.selection import select as choose
    from castune.steps.directory import RunDirectory, arm_name

    folder = RunDirectory(run_directory)
    if random:
        settings["zone"] = "random"
    chosen = choose(folder.load_map(), **settings)
    arm = folder.side_arm(arm_name(chosen)) if beside else folder.main_arm(chosen)
    if not beside and folder.side_arm(arm.name).selection_file.is_file():
        raise CastuneError(
            f"{folder.path} has an arm {arm.name!r} beside the main one already; use --beside, or remove "
            f"{folder.side_arm(arm.name).folder}"
        )
    chosen.save(arm.folder)
    what = "heads" if chosen.only_heads else f"units ({chosen.counted})"
    say(
        f"{arm.name}: {len(chosen.units)} of {chosen.n_total} {what} in {len(chosen.layers)} layers: "
        f"{arm.selection_file}"
    )


def group(
    run_directory: Run,
    buckets: Annotated[int, typer.Option(help="Cut the heads into this many equal buckets.")] = 4,
) -> None:
    """Ablate whole buckets: does a bucket matter more together than its heads do one by one?

    With several utility domains the utility shifts are means over the domains.
    """
    from castune.core.loading import load_model
    from castune.core.numbers import number, with_error
    from castune.steps.diagnose import group_step
    from castune.steps.directory import RunDirectory
    from castune.steps.inputs import load_calibration

    folder = RunDirectory(run_directory)
    recipe = folder.load_recipe()
    cmap = folder.load_map()
    if not 1 <= buckets <= len(cmap):
        raise CastuneError(f"--buckets {buckets}: accepted are 1 to {len(cmap)}, the number of heads")
    calibration = load_calibration(recipe)
    for record in group_step(folder, recipe, load_model(recipe), calibration, buckets=buckets):
        parts = []
        for name in ("utility", "safety"):
            together = with_error(record[f"{name}_shift"], record[f"{name}_shift_se"])
            parts.append(f"{name} shift {together} together, {number(record[f'{name}_shift_sum'], '.3f')} in sum")
        say(f"bucket {record['bucket']} ({record['heads']} heads): {'; '.join(parts)}")
    of_domains = f" (utility: mean over {len(cmap.domains)} domains)" if cmap.domains else ""
    say(f"group ablation{of_domains}: {folder.path / 'group_ablation.json'}")


def drift(
    run_directory: Run,
    arm: Arm = None,
    shard: Annotated[
        str | None, typer.Option(metavar="I/N", help="Do share I of N; the jobs have RUN in common.")
    ] = None,
) -> None:
    """Measure the map again at every adapter a training kept: does it change beyond measurement noise?"""
    from castune.steps.directory import RunDirectory
    from castune.steps.drift import drift_step

    folder = RunDirectory(run_directory)
    try:
        result = drift_step(folder, arm, shard=shard)
    except MapUnfinished as unfinished:
        say(str(unfinished))
        return
    if result is not None:
        show_drift(result)
        say(f"drift: {folder.drift(folder.arm(arm))}")
