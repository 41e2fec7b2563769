"""What the models said, side by side, and what everything was made from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from castune.artifacts import ConflictMap, EvalResult, HeadSelection, MaskedAdapter, TuneResult
from castune.report.markup import Markup, join, table, tag
from castune.report.sections import known, section
from castune.report.summary import NOT_MEASURED, in_order

# A page is for reading; the run directory has all samples in full.
_ROWS = 6
_CHARACTERS = 1500

_OUTCOMES = {
    "utility": {True: "right", False: "wrong"},
    "safety": {True: "refused", False: "answered"},
    "over-refusal": {True: "refused", False: "answered"},
}

Sample = Mapping[str, Any]


def samples(evaluations: Mapping[str, EvalResult]) -> Markup:
    """Replies of every suite: a row an example, a column an arm. Harmful ones stay behind a click."""
    evaluations = in_order(evaluations)
    suites = dict.fromkeys(sample["suite"] for evaluation in evaluations.values() for sample in evaluation.samples)
    if not suites:
        return section("Sample replies", "samples", tag("p", "No samples were stored."))
    rule = (
        f"At most {_ROWS} examples of a suite: first those whose outcome differs between arms, then the "
        "others, in the order of the data. They illustrate the rates above and are no fair draw from them. "
        "Numbers beside choices are the model's scores; the choice it makes is bold."
    )
    return section(
        "Sample replies",
        "samples",
        tag("p", rule, class_="small"),
        *(_suite(suite, evaluations) for suite in suites),
    )


def provenance(
    cmap: ConflictMap,
    selections: Mapping[str, HeadSelection],
    tunings: Mapping[str, TuneResult],
    masked: Mapping[str, MaskedAdapter],
    evaluations: Mapping[str, EvalResult],
    recipe_text: str,
) -> Markup:
    """Versions, models, data hashes and settings of every stage, and the recipe."""
    model = cmap.metadata.get("model", {})
    identity = [(key, known(value)) for key, value in model.items()] or [("model", known(None))]
    blocks = [
        _block("Diagnosis", {key: cmap.metadata.get(key) for key in ("settings", "data", "provenance")}),
        *(
            _block(f"Selection: {arm}", {**item.to_json(), "heads": len(item.heads)})
            for arm, item in selections.items()
        ),
        *(
            _block(
                f"Training: {arm}",
                {
                    "settings": item.settings,
                    "data": item.data,
                    "model": item.model,
                    "provenance": item.provenance,
                },
            )
            for arm, item in tunings.items()
        ),
        *(
            _block(
                f"Made of other adapters: {arm}",
                {
                    "adapters": {source["name"]: source for source in item.sources},
                    "model": item.model,
                    "provenance": item.provenance,
                },
            )
            for arm, item in masked.items()
        ),
        *(
            _block(
                f"Evaluation: {arm}",
                {
                    "settings": item.settings,
                    "data hashes": {suite.suite: suite.data_hash for suite in item.suites},
                    "model": item.model,
                    "provenance": item.provenance,
                },
            )
            for arm, item in in_order(evaluations).items()
        ),
    ]
    if recipe_text:
        blocks.append(tag("details", tag("summary", "Resolved recipe"), tag("pre", recipe_text, tabindex="0")))
    return section(
        "Provenance",
        "provenance",
        table([], identity, label="Model", class_="facts"),
        tag("div", *blocks, class_="folds"),
    )


def _suite(suite: str, evaluations: Mapping[str, EvalResult]) -> Markup:
    by_arm = {
        arm: {str(sample["id"]): sample for sample in evaluation.samples_of(suite)}
        for arm, evaluation in evaluations.items()
    }
    first: dict[str, Sample] = {}
    for found in by_arm.values():
        first = {**found, **first}
    chosen = sorted(first, key=lambda identifier: not _differs(identifier, by_arm))[:_ROWS]
    rows = [
        [_question(first[identifier]), *(_answer(found.get(identifier)) for found in by_arm.values())]
        for identifier in chosen
    ]
    purpose = next(iter(first.values()))["purpose"]
    content = table(["Prompt", *by_arm], rows, label=f"Samples of {suite}", class_="samples")
    count = f"{len(chosen):,} of {len(first):,} examples"
    if purpose == "safety":
        warning = f"{suite}: {count}. Harmful prompts and replies to them, behind this click."
        return tag("details", tag("summary", warning, class_="warning"), content)
    return tag("details", tag("summary", f"{suite}: {count}"), content, open=True)


def _differs(identifier: str, by_arm: Mapping[str, Mapping[str, Sample]]) -> bool:
    return len({found[identifier]["outcome"] for found in by_arm.values() if identifier in found}) > 1


def _question(sample: Sample) -> Markup:
    parts = [tag("div", _short(sample["prompt"]), class_="said", dir="auto")]
    if sample.get("choices"):
        choices = [
            tag("li", choice, tag("small", " right answer") if i == sample.get("answer") else "")
            for i, choice in enumerate(sample["choices"])
        ]
        parts.append(tag("ol", *choices, class_="choices"))
    if sample.get("target"):
        parts.append(tag("small", f"right answer: {sample['target']}"))
    label = " · ".join(str(sample[key]) for key in ("id", "group") if sample.get(key))
    return join([*parts, tag("small", label)])


def _answer(sample: Sample | None) -> Markup:
    if sample is None:
        return tag("span", NOT_MEASURED, class_="quiet")
    outcome = sample.get("outcome")
    word = "unscored" if outcome is None else _OUTCOMES.get(sample["purpose"], {}).get(outcome, str(outcome))
    parts = [tag("span", word, class_=f"outcome {word}")]
    if sample.get("failure"):
        parts.append(tag("small", sample["failure"]))
    if sample.get("choice_scores"):
        scores = sample["choice_scores"]
        best = max((score for score in scores if score is not None), default=None)
        lines = [
            tag(
                "li",
                NOT_MEASURED if score is None else f"{score:.3f}".replace("-", "−"),
                class_=score == best and "chosen",
            )
            for score in scores
        ]
        parts.append(tag("ol", *lines, class_="choices"))
    if "reply" in sample:
        reply, nothing = sample["reply"], "no reply" if sample.get("missing") else "empty reply"
        parts.append(tag("div", _short(reply), class_="said", dir="auto") if reply else tag("small", nothing))
    return join(parts)


def _short(said: str) -> str:
    if len(said) <= _CHARACTERS:
        return said
    return f"{said[:_CHARACTERS]} … (cut here, {len(said):,} characters in all)"


def _block(title: str, record: Mapping[str, Any]) -> Markup:
    rows = [(key, tag("code", value)) for key, value in _flat(record)]
    return tag("details", tag("summary", title), table([], rows, label=title, class_="facts"))


def _flat(record: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
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
