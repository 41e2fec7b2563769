"""The conflict map: what it will cost, measured, measured again, and what is selected from it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from castune.cli.help import MEASURES, RUNS, WRITES
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
from castune.console import say, show_diagnosis, show_drift, show_plan, show_power
from castune.core.numbers import counted
from castune.errors import CastuneError, MapUnfinished


def plan(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="default, a hub id, a model directory, a config.json on its own, or a recipe (.toml).",
        ),
    ],
    safety: Annotated[Values, SAFETY],
    utility: Annotated[Values, UTILITY],
    settings: Annotated[Values, PLANNED_DIAGNOSIS],
    of_model: Annotated[Values, PLANNED_MODEL],
    decoded_share: Annotated[
        float | None,
        typer.Option(
            metavar="X",
            rich_help_panel=MEASURES,
            help="Share of replies that change when a head is ablated (decisions only). Estimated from their length "
            "by default.",
        ),
    ] = None,
    accelerator: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            rich_help_panel=RUNS,
            help="Estimate from the data sheet of an a100, h100, h200 or l40s instead of measuring this machine.",
        ),
    ] = None,
    overrides: Overrides = None,
) -> None:
    """Estimate the time and memory of a diagnosis in advance.

    Needs only the model's config, and half a minute to measure this machine; no weights are downloaded. A recipe is
    planned with its own settings and those of --set, and with the smallest differences that its suites can show. Data
    on a hub that cannot be reached are replaced by stand-ins.

    Examples:
        castune plan default --accelerator h100
        castune plan recipe.toml --set diagnose.measure=margin
    """
    from castune.evaluation.suites import load_suites
    from castune.plan.planner import Planner
    from castune.plan.power import visible_differences
    from castune.plan.stand_ins import DataOrStandIns
    from castune.steps.inputs import load_calibration
    from castune.study.primary import expected_words

    if model.endswith(".toml"):
        recipe = Recipe.load(Path(model), list(overrides or []))
    elif overrides:
        raise CastuneError("--set changes a recipe; for a model, use the options instead")
    else:
        recipe = Recipe.of(
            model=model, out="unused", safety=safety, utility=_by_domain(**utility), diagnose=settings, **of_model
        )
    if accelerator and recipe.dtype == "auto":
        recipe = recipe.model_copy(update={"dtype": "bfloat16"})
    read = DataOrStandIns()
    calibration = load_calibration(recipe, read)
    evaluated = recipe.evaluate
    # A model alone is planned for its map; what is evaluated, and on how many examples, a recipe says.
    names = evaluated.suites if model.endswith(".toml") else ()
    suites = load_suites(names, limit=evaluated.limit, seed=evaluated.seed, read=read)
    planner = Planner.of(recipe, accelerator=accelerator)
    planner = replace(planner, notes=[*planner.notes, *read.notes])
    found = planner.diagnosis(*calibration, recipe.diagnose, decoded_share=decoded_share)
    show_plan(planner, found, accelerator)
    show_power(visible_differences(suites))
    if recipe.study.primary is not None:
        for words in expected_words(recipe.study):
            say(words)


def diagnose(
    *,
    model: Model,
    safety: Annotated[Values, SAFETY],
    utility: Annotated[Values, UTILITY],
    settings: Annotated[Values, DIAGNOSIS],
    of_model: Annotated[Values, MODEL],
    shard: Annotated[
        str | None,
        typer.Option(metavar="I/N", rich_help_panel=RUNS, help="Do only shard I of N. All shards use the same --out."),
    ] = None,
    out: Annotated[str, typer.Option(metavar="DIR", rich_help_panel=WRITES, help="Run directory to write.")],
) -> None:
    """Measure the conflict score of every head, before any training.

    Writes the conflict map. The same command continues an interrupted diagnosis.

    Examples:
        castune diagnose default --out runs/first
        castune diagnose default --measure margin --layers 0,15,29 --out runs/margin
    """
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
                f"--utility {one}: there is already a domain {name!r}; rename the file, or name the domains in a "
                "recipe for castune run: [utility.NAME] with source and limit"
            )
        domains[name] = {"source": one, **drawn}
    return domains


def select(
    run_directory: Run,
    settings: Annotated[Values, SELECTION],
    random: Annotated[bool, typer.Option("--random", help="Short for --zone random.")] = False,
    beside: Annotated[
        bool, typer.Option("--beside", help="Keep the main selection and add this one as a comparison arm.")
    ] = False,
) -> None:
    """Choose the heads to train from a run's conflict map.

    Examples:
        castune select runs/first --zone safe --fraction 0.25
        castune select runs/first --random --seed 21 --beside
    """
    from castune.selection import select as choose
    from castune.steps.directory import RunDirectory, arm_name

    folder = RunDirectory(run_directory)
    if random:
        settings["zone"] = "random"
    chosen = choose(folder.load_map(), **settings)
    arm = folder.side_arm(arm_name(chosen)) if beside else folder.main_arm(chosen)
    if not beside and folder.side_arm(arm.name).selection_file.is_file():
        raise CastuneError(
            f"{folder.path} already has an arm {arm.name!r} beside the main one; use --beside, or remove "
            f"{folder.side_arm(arm.name).folder}"
        )
    chosen.save(arm.folder)
    what = "heads" if chosen.only_heads else f"units ({chosen.counted})"
    say(
        f"{arm.name}: {len(chosen.units)} of {chosen.n_total} {what} in {counted(len(chosen.layers), 'layer')}: "
        f"{arm.selection_file}"
    )


def group(
    run_directory: Run,
    buckets: Annotated[int, typer.Option(metavar="N", help="Number of equal buckets to split the heads into.")] = 4,
) -> None:
    """Ablate whole buckets of heads at once.

    Compares the joint shift of each bucket with the sum of its heads' own shifts. With several utility domains, utility
    shifts are means over the domains.

    Examples:
        castune group runs/quickstart --buckets 4
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
        raise CastuneError(f"--buckets {buckets}: accepted: 1 to {len(cmap)}, the number of heads")
    calibration = load_calibration(recipe)
    for record in group_step(folder, recipe, load_model(recipe), calibration, buckets=buckets):
        parts = []
        for name in ("utility", "safety"):
            together = with_error(record[f"{name}_shift"], record[f"{name}_shift_se"])
            parts.append(f"{name} shift {together} jointly, {number(record[f'{name}_shift_sum'], '.3f')} summed")
        say(f"bucket {record['bucket']} ({record['heads']} heads): {'; '.join(parts)}")
    of_domains = f" (utility: mean over {len(cmap.domains)} domains)" if cmap.domains else ""
    say(f"group ablation{of_domains}: {folder.path / 'group_ablation.json'}")


def drift(
    run_directory: Run,
    arm: Arm = None,
    shard: Annotated[
        str | None, typer.Option(metavar="I/N", help="Do only shard I of N. All shards use the same RUN.")
    ] = None,
) -> None:
    """Measure how far the conflict map drifts during training.

    Measures the map again for every snapshot of castune tune --snapshot-steps, and compares it with the map before
    training, beyond measurement noise.

    Examples:
        castune drift runs/first
        castune drift runs/first --arm risky
    """
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
