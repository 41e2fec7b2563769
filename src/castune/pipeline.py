"""The whole of castune in one file: data -> diagnose -> select -> tune -> evaluate -> report.

Read this first. Each step is one call of a stage's public function, skipped when its artifact is already there;
nothing is computed twice, and the same command continues an interrupted run.
"""

from __future__ import annotations

from pathlib import Path

from castune.config import Recipe
from castune.core.loading import load_model
from castune.evaluation.suites import load_suites
from castune.names import ArmName
from castune.steps.diagnose import diagnose_step
from castune.steps.directory import RunDirectory
from castune.steps.evaluate import evaluate_step, require_evaluation
from castune.steps.inputs import (
    load_align,
    load_calibration,
    load_trained_utility,
    named_calibration,
    require_held_out,
    trained_on_by,
    utility_source,
)
from castune.steps.readiness import require_ready, suite_tokens, training_tokens
from castune.steps.report import report_step
from castune.steps.select import select_step
from castune.steps.tune import require_trainable, tune_step


def run(recipe: Recipe) -> RunDirectory:
    """Diagnose, select, tune, evaluate and report as the recipe says; continue where an earlier call stopped.

    Raises:
        CastuneError: bad data, model, settings, or a directory that holds another run. Data and settings are
            checked before the model is loaded.
    """
    folder = RunDirectory(Path(recipe.out))
    safety, utility = load_calibration(recipe)
    suites = load_suites(recipe.evaluate.suites, limit=recipe.evaluate.limit, seed=recipe.evaluate.seed)
    align, left_out = load_align(recipe, suites)
    trained_utility = load_trained_utility(recipe, utility, suites)
    main = ArmName(None if recipe.select.buckets else recipe.select.zone)
    require_trainable(recipe, [main, *map(ArmName.parse, recipe.select.compare)])
    require_evaluation(recipe.evaluate, suites)
    trained_on = trained_on_by(recipe, recipe.select.compare, align, trained_utility)
    calibration = named_calibration(safety, utility)
    require_held_out(recipe.evaluate, suites, trained_on=trained_on, calibration=calibration)
    folder.check(recipe)
    model, tokenizer = load_model(recipe)
    configs = [recipe.tune, *(recipe.tune.changed(**dict(ArmName.parse(n).changes)) for n in recipe.select.compare)]
    require_ready(
        model,
        tokenizer,
        training_tokens(tokenizer, configs, align),
        suite_tokens(tokenizer, recipe.evaluate, suites),
    )

    cmap = diagnose_step(folder, recipe, model, tokenizer, safety, utility)
    folder.save_recipe(recipe)
    quantised = recipe.tune.quantization != "none"
    if quantised:
        del model  # there need not be room for both
        model, _ = load_model(recipe, recipe.tune.quantization)
    for arm, name in select_step(folder, recipe.select, cmap):
        tune_step(
            folder,
            arm,
            model,
            tokenizer,
            align,
            recipe.tune.changed(**dict(name.changes)),
            recipe.align,
            left_out=left_out,
            utility=trained_utility,
            utility_source=utility_source(recipe),
        )
    if quantised:
        del model
        model, _ = load_model(recipe)
    evaluate_step(folder, recipe, suites, (model, tokenizer) if recipe.evaluate.backend == "hf" else None)
    report_step(folder)
    return folder
