"""Figures and the report, from what a run directory holds."""

from __future__ import annotations

import logging
from pathlib import Path

from castune.artifacts import MaskedAdapter, TuneResult
from castune.errors import ArtifactError
from castune.report.page import write_figures, write_report
from castune.steps.changes import all_cost_ratios, differences
from castune.steps.directory import RunDirectory
from castune.steps.equal_safety import costs_at_equal_safety
from castune.steps.second_opinions import second_opinions

logger = logging.getLogger(__name__)


def report_step(folder: RunDirectory) -> Path:
    """Write figures and `report.html` from what the run directory holds."""
    cmap = folder.load_map()
    selections, tunings, masked, projected = {}, {}, {}, {}
    for arm in folder.arms():
        try:
            selection = folder.load_selection(arm, cmap)
            made = folder.load_adapter(arm, selection)
        except ArtifactError as error:
            if arm.folder == folder.path:
                raise
            logger.warning("the report leaves out arm %s: %s", arm.name, error)
            continue
        selections[arm.name] = selection
        if isinstance(made, TuneResult):
            tunings[arm.name] = made
        elif isinstance(made, MaskedAdapter):
            masked[arm.name] = made
        elif made is not None:
            projected[arm.name] = made
    evaluations = folder.load_evaluations()
    drifts = folder.load_drifts(cmap)
    at_equal_safety = costs_at_equal_safety(folder)
    write_figures(
        folder.path / "figures",
        cmap=cmap,
        selections=selections,
        tunings=tunings,
        evaluations=evaluations,
        drifts=drifts,
        safety_costs=at_equal_safety,
    )
    return write_report(
        folder.report_file,
        cmap=cmap,
        selections=selections,
        tunings=tunings,
        masked=masked,
        projected=projected,
        evaluations=evaluations,
        lm_eval=folder.load_lm_eval(),
        cost_ratios=all_cost_ratios(evaluations),
        differences=differences(evaluations),
        drifts=drifts,
        safety_costs=at_equal_safety,
        attacks=folder.load_attacks(),
        judge_pairs=second_opinions(evaluations),
        recipe_text=folder.recipe_file.read_text(encoding="utf-8") if folder.recipe_file.is_file() else "",
    )
