"""What the models said, side by side.

The page holds every sample that it shows, so that it reads without JavaScript too; `samples.js` only hides.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import zip_longest

from castune.artifacts import EvalResult
from castune.artifacts.samples import Sample, is_choice, is_letter, is_number, is_problem, is_reply
from castune.core.numbers import number
from castune.report.markup import Markup, join, short, tag
from castune.report.sections import section
from castune.report.summary import BASE, NOT_MEASURED, in_order

# A page is for reading; the run directory has all samples in full. A suite has as many rows as its share of the
# section's characters allows, in these bounds.
_FEWEST_ROWS, _MOST_ROWS = 6, 24
_CHARACTERS_IN_ALL = 600_000

_OUTCOMES = {
    "utility": {True: "right", False: "wrong"},
    "safety": {True: "refused", False: "answered"},
    "over-refusal": {True: "refused", False: "answered"},
}


def samples(evaluations: Mapping[str, EvalResult]) -> Markup:
    """Replies of every suite: a row an example, a column an arm. Harmful ones stay behind a click."""
    evaluations = in_order(evaluations)
    every = (sample for evaluation in evaluations.values() for sample in evaluation.samples)
    # Of likelihoods there is nothing to read.
    suites = dict.fromkeys(sample["suite"] for sample in every if not is_number(sample))
    if not suites:
        return section("Sample replies", "samples", tag("p", "No samples were stored."))
    rule = (
        f"At most {_MOST_ROWS} examples of a suite, fewer where replies are long. Those whose outcome differs between "
        "arms are taken and shown first, lost and gained ones of every arm in turn. They illustrate the rates above "
        "and are not a random sample. Against base, lost is right that became wrong, or refused that became "
        "answered; gained is the opposite. Numbers beside choices are the model's scores; its choice is bold."
    )
    share = _CHARACTERS_IN_ALL // len(suites)
    content = [_suite(suite, evaluations, share) for suite in suites]
    return section(
        "Sample replies",
        "samples",
        tag("p", rule, class_="small"),
        tag("div", _controls(list(suites), list(evaluations)), *content, class_="sample-replies"),
    )


def _controls(suites: Sequence[str], arms: Sequence[str]) -> Markup:
    """What to show: hidden until the script that obeys them runs."""
    shown = [tag("option", text, value=value) for value, text in (("", "all"), *((suite, suite) for suite in suites))]
    fields = [tag("label", "Suite ", tag("select", *shown, data_part="suite"))]
    if BASE in arms:
        kinds = {"": "all", "lost gained": "changed", "lost": "lost", "gained": "gained"}
        options = [tag("option", text, value=value) for value, text in kinds.items()]
        fields.append(tag("label", "Outcome against base ", tag("select", *options, data_part="fate")))
    boxes = [
        tag("label", tag("input", type="checkbox", checked=True, value=str(i), data_part="arm"), f" {arm}")
        for i, arm in enumerate(arms)
        if arm != BASE
    ]
    fields.append(tag("fieldset", tag("legend", "Arms"), *boxes))
    fields.append(tag("p", role="status", data_part="count", class_="small"))
    return tag("div", *fields, class_="sample-controls", data_part="controls", hidden=True)


def _suite(suite: str, evaluations: Mapping[str, EvalResult], share: int) -> Markup:
    by_arm = {
        arm: {str(sample["id"]): sample for sample in evaluation.samples_of(suite)}
        for arm, evaluation in evaluations.items()
    }
    first: dict[str, Sample] = {}
    for found in by_arm.values():
        first = {**found, **first}
    taken: dict[str, Markup] = {}
    length = 0
    for identifier in _by_interest(first, by_arm)[:_MOST_ROWS]:
        row = _row(first[identifier], {arm: found.get(identifier) for arm, found in by_arm.items()})
        length += len(row)
        if len(taken) >= _FEWEST_ROWS and length > share:
            break
        taken[identifier] = row
    rows = [taken[identifier] for identifier in _differing_first(first, by_arm) if identifier in taken]
    head = tag("tr", *(tag("th", name, scope="col") for name in ("Prompt", *by_arm)))
    content = tag(
        "div",
        tag("table", tag("thead", head), tag("tbody", *rows), class_="samples"),
        class_="scroll",
        role="region",
        aria_label=f"Samples of {suite}",
        tabindex="0",
    )
    count = f"{len(rows):,} of {len(first):,} examples"
    if next(iter(first.values()))["purpose"] == "safety":
        warning = f"{suite}: {count}. Harmful prompts and replies: click to show."
        return tag("details", tag("summary", warning, class_="warning"), content, data_suite=suite)
    return tag("details", tag("summary", f"{suite}: {count}"), content, open=True, data_suite=suite)


def _row(example: Sample, by_arm: Mapping[str, Sample | None]) -> Markup:
    cells = []
    for arm, sample in by_arm.items():
        fate = "" if arm == BASE else _fate(by_arm.get(BASE), sample)
        cells.append(tag("td", _answer(sample, fate), data_fate=fate))
    return tag("tr", tag("th", _question(example), scope="row"), *cells)


def _fate(before: Sample | None, after: Sample | None) -> str:
    """`lost` or `gained`, as paired differences count them; nothing without a change between two outcomes."""
    was, now = (None if sample is None else sample["outcome"] for sample in (before, after))
    if was is None or now is None:
        return ""
    change = int(now) - int(was)
    return "gained" if change > 0 else "lost" if change < 0 else ""


def _by_interest(identifiers: Iterable[str], by_arm: Mapping[str, Mapping[str, Sample]]) -> list[str]:
    """All examples, those first that show a change: of every arm one that it lost and one that it gained, in turn."""
    ordered = _differing_first(identifiers, by_arm)
    base = by_arm.get(BASE, {})
    changed = [
        [identifier for identifier in ordered if _fate(base.get(identifier), found.get(identifier)) == fate]
        for arm, found in by_arm.items()
        if arm != BASE
        for fate in ("lost", "gained")
    ]
    in_turn = [identifier for turn in zip_longest(*changed) for identifier in turn if identifier is not None]
    return list(dict.fromkeys([*in_turn, *ordered]))


def _differing_first(identifiers: Iterable[str], by_arm: Mapping[str, Mapping[str, Sample]]) -> list[str]:
    def differs(identifier: str) -> bool:
        return len({found[identifier]["outcome"] for found in by_arm.values() if identifier in found}) > 1

    return sorted(identifiers, key=lambda identifier: not differs(identifier))


def _question(sample: Sample) -> Markup:
    parts = [tag("div", short(sample["prompt"]), class_="said", dir="auto")]
    if is_choice(sample) or is_letter(sample):
        choices = [
            tag("li", choice, tag("small", " right answer") if i == sample["answer"] else "")
            for i, choice in enumerate(sample["choices"])
        ]
        parts.append(tag("ol", *choices, class_="choices"))
    if is_problem(sample):
        parts.append(tag("small", f"right answer: {sample['target']}"))
    label = " · ".join(filter(None, (str(sample["id"]), sample["group"])))
    return join([*parts, tag("small", label)])


def _answer(sample: Sample | None, fate: str) -> Markup:
    if sample is None:
        return tag("span", NOT_MEASURED, class_="quiet")
    outcome = sample["outcome"]
    word = "unscored" if outcome is None else _OUTCOMES.get(sample["purpose"], {}).get(bool(outcome), str(outcome))
    parts = [tag("span", word, class_=f"outcome {word}")]
    if fate:
        parts.append(tag("small", fate))
    if (is_letter(sample) or is_problem(sample)) and (failure := sample.get("failure")):
        parts.append(tag("small", failure))
    if is_choice(sample):
        scores = sample["choice_scores"]
        best = max((score for score in scores if score is not None), default=None)
        lines = [
            tag(
                "li",
                NOT_MEASURED if score is None else number(score, ".3f"),
                class_=score == best and "chosen",
            )
            for score in scores
        ]
        parts.append(tag("ol", *lines, class_="choices"))
    if is_reply(sample):
        reply, nothing = sample["reply"], "no reply" if sample.get("missing") else "empty reply"
        parts.append(tag("div", short(reply), class_="said", dir="auto") if reply else tag("small", nothing))
    return join(parts)
