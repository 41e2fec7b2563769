"""The report of a run: one page, and the same charts as files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from castune.artifacts import ConflictMap, EvalResult, HeadSelection, MaskedAdapter, ProjectedAdapter, TuneResult
from castune.artifacts.attack_result import AttackResult
from castune.artifacts.drift_result import DriftResult
from castune.artifacts.files import write_text
from castune.artifacts.lm_eval_result import LmEvalResult
from castune.report.agreement import JudgePair
from castune.report.attacks import attack_section, headline
from castune.report.diagnosis import conflict_map
from castune.report.document import document, write_charts
from castune.report.drift import drift_section
from castune.report.equal_safety import charts as safety_charts
from castune.report.figures import charts
from castune.report.markup import tag
from castune.report.provenance import provenance
from castune.report.samples import samples
from castune.report.sections import known, opening, results
from castune.report.summary import CostRatios, Differences
from castune.report.training import training
from castune.stats.safety_costs import SafetyCosts


def write_report(
    path: str | Path,
    *,
    cmap: ConflictMap,
    selections: Mapping[str, HeadSelection],
    tunings: Mapping[str, TuneResult],
    evaluations: Mapping[str, EvalResult],
    differences: Differences,
    cost_ratios: Mapping[str, CostRatios],
    masked: Mapping[str, MaskedAdapter] | None = None,
    projected: Mapping[str, ProjectedAdapter] | None = None,
    lm_eval: Mapping[str, LmEvalResult] | None = None,
    drifts: Mapping[str, DriftResult] | None = None,
    safety_costs: SafetyCosts | None = None,
    attacks: AttackResult | None = None,
    judge_pairs: Sequence[JudgePair] = (),
    recipe_text: str = "",
    notes: Sequence[str] = (),
) -> Path:
    """Write the report of a run, atomically.

    Args:
        path: the HTML file.
        cmap: the conflict map.
        selections: by arm; the base has none.
        tunings: by arm; the base has none.
        evaluations: by arm; `base` is the model before training.
        differences: arm -> suite -> mean of arm minus base paired by example, with the p-value of a paired test.
        cost_ratios: cost ratio (`purposes.RATIOS`) -> arm; a value of None is undefined where its numbers are measured.
        masked: by arm, the adapters made of others without training.
        projected: by arm, the adapters projected by Safe LoRA.
        lm_eval: by arm, what lm-eval measured by its own protocol.
        drifts: by arm, how the map changed while it was trained.
        safety_costs: what arms cost at equal safety, where they were evaluated at several strengths.
        attacks: what attacks leave of the arms' refusals; whether few heads break more easily stands beside the gain.
        judge_pairs: what two judges say of the same replies.
        recipe_text: the resolved recipe.
        notes: sentences below the verdict, for example on what was not done.

    Returns:
        The file.
    """
    drawn = {**safety_charts(safety_costs), **charts(cmap, selections, tunings, evaluations, drifts)}
    # On the page the explorer stands for this chart.
    del drawn["conflict_map"]
    body = tag(
        "main",
        opening(
            cmap,
            evaluations,
            differences,
            cost_ratios.get("ucr", {}),
            notes,
            safety_costs,
            "" if attacks is None else headline(attacks),
        ),
        tag("noscript", tag("p", "Charts need JavaScript; the same charts are in the directory figures.")),
        results(evaluations, differences, cost_ratios, drawn, lm_eval or {}, safety_costs, judge_pairs),
        attack_section(attacks),
        conflict_map(cmap, selections, drawn),
        training(tunings, masked or {}, projected or {}, selections, drawn),
        drift_section(drifts or {}, drawn),
        samples(evaluations),
        provenance(cmap, selections, tunings, {**(masked or {}), **(projected or {})}, evaluations, recipe_text),
    )
    path = Path(path)
    write_text(
        path, document(f"castune: {known(cmap.metadata.get('model', {}).get('name'))}", body, drawn), private=True
    )
    return path


def write_figures(
    directory: str | Path,
    *,
    cmap: ConflictMap,
    selections: Mapping[str, HeadSelection],
    tunings: Mapping[str, TuneResult],
    evaluations: Mapping[str, EvalResult],
    drifts: Mapping[str, DriftResult] | None = None,
    safety_costs: SafetyCosts | None = None,
) -> list[Path]:
    """Write every chart of the report as SVG and PNG, atomically; needs no browser.

    Returns:
        The files: `conflict_map.svg`, `conflict_map.png`, `trade_off.svg`, ...
    """
    drawn = {**safety_charts(safety_costs), **charts(cmap, selections, tunings, evaluations, drifts)}
    return write_charts(directory, drawn)
