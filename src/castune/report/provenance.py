"""What everything on the page was made from: versions, models, data and settings of every stage, and the recipe."""

from __future__ import annotations

from collections.abc import Mapping

from castune.artifacts import ConflictMap, EvalResult, HeadSelection, MaskedAdapter, ProjectedAdapter, TuneResult
from castune.report.markup import Markup, table, tag
from castune.report.sections import known, section
from castune.report.summary import in_order


def provenance(
    cmap: ConflictMap,
    selections: Mapping[str, HeadSelection],
    tunings: Mapping[str, TuneResult],
    made_of_others: Mapping[str, MaskedAdapter | ProjectedAdapter],
    evaluations: Mapping[str, EvalResult],
    recipe_text: str,
) -> Markup:
    """Model, then a fold for every artifact and the recipe."""
    identity = [(key, known(value)) for key, value in cmap.metadata.get("model", {}).items()]
    blocks = [_block("Diagnosis", {key: cmap.metadata.get(key) for key in ("settings", "data", "provenance")})]
    for arm, selection in selections.items():
        blocks.append(_block(f"Selection: {arm}", {**selection.to_json(), "heads": len(selection.heads)}))
    for arm, tuning in tunings.items():
        record = {"settings": tuning.settings, "data": tuning.data}
        blocks.append(_block(f"Training: {arm}", {**record, **_of_model(tuning)}))
    for arm, made in made_of_others.items():
        adapters = {source["name"]: source for source in made.sources}
        blocks.append(_block(f"Made of other adapters: {arm}", {"adapters": adapters, **_of_model(made)}))
    for arm, evaluation in in_order(evaluations).items():
        hashes = {suite.suite: suite.data_hash for suite in evaluation.suites}
        record = {"settings": evaluation.settings, "data hashes": hashes}
        blocks.append(_block(f"Evaluation: {arm}", {**record, **_of_model(evaluation)}))
    if recipe_text:
        blocks.append(tag("details", tag("summary", "Resolved recipe"), tag("pre", recipe_text, tabindex="0")))
    return section(
        "Provenance",
        "provenance",
        table([], identity or [("model", known(None))], label="Model", class_="facts"),
        tag("div", *blocks, class_="folds"),
    )


def _of_model(made: TuneResult | MaskedAdapter | ProjectedAdapter | EvalResult) -> dict[str, object]:
    return {"model": made.model, "provenance": made.provenance}


def _block(title: str, record: Mapping[str, object]) -> Markup:
    rows = [(key, tag("code", value)) for key, value in _flat(record)]
    return tag("details", tag("summary", title), table([], rows, label=title, class_="facts"))


def _flat(record: Mapping[str, object], prefix: str = "") -> list[tuple[str, str]]:
    """Nested records as `outer.inner` rows."""
    rows = []
    for key, value in record.items():
        if isinstance(value, Mapping) and value:
            rows += _flat(value, f"{prefix}{key}.")
        else:
            # Settings and hashes are shown as they are stored: no separators, no rounding.
            plain = isinstance(value, str | int | float) and value != ""
            rows.append((f"{prefix}{key}", str(value) if plain else known(value)))
    return rows
