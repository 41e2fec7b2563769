"""The whole of castune in one file: data -> diagnose -> select -> tune -> evaluate -> report.

Read this first. Each step is a call, skipped when its artifact is already there; nothing is computed twice, and the
same command continues an interrupted run.
"""

from __future__ import annotations

from pathlib import Path

from castune.config import Recipe
from castune.core.loading import load_model
from castune.steps.arms import planned_arms, require_trainable, training_configs
from castune.steps.diagnose import diagnose_step
from castune.steps.directory import RunDirectory
from castune.steps.evaluate import evaluate_step, require_evaluation
from castune.steps.held_out import require_held_out, trained_on_by
from castune.steps.inputs import load_inputs
from castune.steps.readiness import require_ready, suite_tokens, training_tokens
from castune.steps.report import report_step
from castune.steps.select import select_step
from castune.steps.tune import tune_step


def run(recipe: Recipe) -> RunDirectory:
    """Diagnose, select, tune, evaluate and report as the recipe says; continue where an earlier call stopped.

    Raises:
        CastuneError: bad data, model, settings, or a directory that holds another run. Data and settings are
            checked before the model is loaded.
    """
    folder = RunDirectory(Path(recipe.out))

    # D_safe and D_util to measure heads on, D_align to train on, suites to evaluate on. What would stop a later step
    # is refused now: a map costs hours.
    inputs, planned = load_inputs(recipe), planned_arms(recipe)
    require_trainable(recipe, planned)
    require_evaluation(recipe.evaluate, inputs.suites)
    require_held_out(
        recipe.evaluate,
        inputs.suites,
        trained_on=trained_on_by(recipe, planned, inputs.training),
        calibration=inputs.calibration.by_name,
    )
    folder.check(recipe)
    loaded = load_model(recipe)
    require_ready(
        loaded,
        training_tokens(loaded.tokenizer, training_configs(recipe, planned), inputs.training.align),
        suite_tokens(loaded.tokenizer, recipe.evaluate, inputs.suites),
    )

    # O(h), H(h), S(h) and C(h) of every head (Sections 3.2 to 3.4).
    cmap = diagnose_step(folder, recipe, loaded, inputs.calibration)
    folder.save_recipe(recipe)

    # The heads of the main arm and of those it is compared with (Section 3.5), and a training of each that touches
    # nothing else.
    arms = select_step(folder, recipe.select, cmap)
    if recipe.tune.quantization != "none":
        del loaded  # there need not be room for both
        loaded = load_model(recipe, recipe.tune.quantization)
    for arm, name in arms:
        tune_step(folder, arm, loaded, inputs.training, recipe.tune.changed(**dict(name.changes)))
    if recipe.tune.quantization != "none":
        del loaded
        loaded = load_model(recipe)

    # What was gained and what was lost, base and arms on the same examples (Section 4).
    evaluate_step(folder, recipe, inputs.suites, loaded if recipe.evaluate.backend == "hf" else None)
    report_step(folder)
    return folder
