"""The numbers of the report as HTML: verdict and results; and what all sections are made with."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from castune.artifacts import ConflictMap, EvalResult, SuiteResult
from castune.artifacts.lm_eval_result import LmEvalResult
from castune.artifacts.records import DataRecord
from castune.core.numbers import p_value
from castune.names import kind_words
from castune.purposes import COSTS, PURPOSES, RATIOS, UnitOfMeasure
from castune.report.agreement import JudgePair, two_judges
from castune.report.equal_safety import chart_names, costs_of, costs_table, sentences
from castune.report.markup import Markup, join, table, tag
from castune.report.outcomes import by_lm_eval, fates, losses
from castune.report.power import visible_differences
from castune.report.summary import (
    BASE,
    NOT_MEASURED,
    CostRatios,
    Differences,
    cost_ratio,
    in_order,
    in_unit,
    level,
    number,
    percent,
    verdict,
    with_error,
)
from castune.stats.estimates import Estimate, PairedDifference
from castune.stats.safety_costs import SafetyCosts

NOT_RECORDED = "not recorded"


def figure(name: str, caption: object) -> Markup:
    """The place of a chart; `page.js` draws it."""
    return tag("figure", tag("div", class_="chart", data_chart=name), tag("figcaption", caption))


def section(title: str, identifier: str, *content: object) -> Markup:
    """A section of the page with its heading."""
    return tag("section", tag("h2", title, id=identifier), *content)


def known(value: object) -> str:
    """A value of a metadata record in words."""
    if value is None or value == {}:
        return NOT_RECORDED
    if isinstance(value, list | tuple):
        return ", ".join(known(item) for item in value) or "none"
    return number(value) if isinstance(value, int | float) and not isinstance(value, bool) else str(value)


def recorded_rate(record: Mapping[str, Any] | None) -> str:
    """A rate of a map's metadata, `value ± standard error`."""
    if not record:
        return NOT_RECORDED
    return with_error(Estimate(record["value"], record["standard_error"], record["n"]), percent)


def cut_words(record: DataRecord) -> str:
    """How many examples of a data record were cut to the length limit, in words; nothing where none was."""
    what = {"prompts": record.get("cut"), "replies": record.get("replies_cut")}
    counts = [f"{n:,} {name}" for name, n in what.items() if n]
    return " and ".join(counts) + " cut" if counts else ""


def opening(
    cmap: ConflictMap,
    evaluations: Mapping[str, EvalResult],
    differences: Differences,
    cost_ratios: CostRatios,
    notes: Sequence[str],
    safety_costs: SafetyCosts | None,
    under_attack: str = "",
) -> Markup:
    """Title, what this is about, and what the numbers say: what safety costs first, where that was measured.

    What attacks leave of it (`under_attack`) stands beside the gain.
    """
    model = cmap.metadata.get("model", {})
    kinds = {kind: len(cmap.rows_of(kind)) for kind in cmap.kinds}
    units = ", ".join(f"{n:,} {kind_words(kind, n)}" for kind, n in kinds.items())
    size = f"{known(model.get('parameters'))} parameters, {units}"
    said = verdict(evaluations, differences, cost_ratios)
    changes = [tag("li", tag("strong", arm), " – ", change) for arm, change in said.changes.items()]
    first: list[Markup] = []
    if safety_costs is not None:
        chart = chart_names(safety_costs)[0]
        caption = (
            "Cost over safety, the adapter from off to full strength, with 95 % bands. Down and to the right is better."
        )
        said_first = [*sentences(safety_costs), *([under_attack] if under_attack else [])]
        happened = tag("div", *(tag("p", one, class_="verdict") for one in said_first))
        first = [tag("div", happened, figure(chart, caption), class_="opening")]
    return tag(
        "header",
        tag("p", "castune report", class_="kicker"),
        tag("h1", known(model.get("name"))),
        tag("p", f"{known(model.get('type'))}, {size}", class_="quiet"),
        *first,
        tag("p", said.rates, class_="verdict" if not first else "small"),
        tag("p", under_attack, class_="verdict") if under_attack and not first else "",
        tag("ul", *changes, class_="changes") if changes else "",
        tag("p", said.rule, class_="small") if said.rule else "",
        tag("ul", *(tag("li", note) for note in notes), class_="notes") if notes else "",
    )


def results(
    evaluations: Mapping[str, EvalResult],
    differences: Differences,
    cost_ratios: Mapping[str, CostRatios],
    drawn: Collection[str],
    lm_eval: Mapping[str, LmEvalResult],
    safety_costs: SafetyCosts | None,
    judge_pairs: Sequence[JudgePair],
) -> Markup:
    """Before and after: a row an arm, a column a suite; then the trade-off charts, and the counts behind the rates."""
    if not evaluations:
        nothing = tag("p", "Not measured: no model has been evaluated in this run.")
        return section("Before and after", "results", nothing, by_lm_eval(lm_eval))
    evaluations = in_order(evaluations)
    suites, ratios = _suites(evaluations), [ratio for ratio in RATIOS if ratio == "ucr" or cost_ratios.get(ratio)]
    rows = []
    for arm in evaluations:
        row: list[object] = [arm]
        row += [_suite_cell(arm, suite, evaluations, differences.get(arm, {}).get(suite)) for suite in suites]
        rows.append([*row, *("–" if arm == BASE else cost_ratio(arm, cost_ratios.get(ratio, {})) for ratio in ratios)])
    head = ["Arm", *(_suite_head(suite, evaluations) for suite in suites), *(COSTS[ratio].label for ratio in ratios)]
    charts = []
    if "trade_off" in drawn:
        about = "Safety against utility. Up and to the right is better."
        charts.append(figure("trade_off", about + _not_plotted(evaluations, "utility")))
    if "trade_off_over_refusal" in drawn:
        about = "Safety against over-refusal. Down and to the right is better."
        charts.append(figure("trade_off_over_refusal", about + _not_plotted(evaluations, "over-refusal")))
    explanation = (
        "Rates are value ± one standard error over scored examples, with Wilson's 95 % interval; means are in nats "
        "per token, with Student's. Unscored examples, which the judge could not decide, are left out of rates. "
        "Changes are in percentage points or nats against base, paired by example; p is McNemar's exact test "
        "of rates, Student's of means. The utility cost ratio (UCR) is utility lost over safety gained (Eq. 7), with "
        "its 95 % bootstrap interval; MMLU-CR takes MMLU alone for the utility (Eq. 8), UCR in nats the NLL of right "
        "answers that was added, for a refusal rate that rises from 0 to 1."
    )
    at_equal_safety: list[Markup] = []
    if safety_costs is not None:
        # The first one opens the page.
        _, *others = zip(chart_names(safety_costs), costs_of(safety_costs), strict=True)
        captions = [figure(name, f"The same for {PURPOSES[cost].label}.") for name, cost in others]
        at_equal_safety = [costs_table(safety_costs), tag("div", *captions, class_="figures")]
    bars = "Bars are one standard error; several suites of one purpose are averaged without weights."
    return section(
        "Before and after",
        "results",
        *at_equal_safety,
        table(head, rows, label="Results by arm and suite", class_="results"),
        tag("p", explanation, class_="small"),
        tag("div", *charts, class_="figures"),
        tag("p", bars, class_="small") if charts else "",
        fates(evaluations),
        two_judges(judge_pairs),
        losses(evaluations),
        by_lm_eval(lm_eval),
        visible_differences(evaluations, differences),
        _further_numbers(evaluations),
    )


def _suites(evaluations: Mapping[str, EvalResult]) -> list[str]:
    return list(dict.fromkeys(suite.suite for evaluation in evaluations.values() for suite in evaluation.suites))


def _find(evaluation: EvalResult, suite: str) -> SuiteResult | None:
    return next((result for result in evaluation.suites if result.suite == suite), None)


def _conditions(evaluation: EvalResult, result: SuiteResult) -> str:
    length = "" if result.max_new_tokens is None else f", max_new_tokens {result.max_new_tokens}"
    backend = evaluation.settings.get("backend", "hf")
    return f"judge {result.judge}{length}" + ("" if backend == "hf" else f", backend {backend}")


def _all_conditions(suite: str, evaluations: Mapping[str, EvalResult]) -> set[str]:
    return {
        _conditions(evaluation, found) for evaluation in evaluations.values() if (found := _find(evaluation, suite))
    }


def _suite_head(suite: str, evaluations: Mapping[str, EvalResult]) -> Markup:
    purpose = next(found.purpose for evaluation in evaluations.values() if (found := _find(evaluation, suite)))
    conditions = _all_conditions(suite, evaluations)
    # What holds for the whole column stands in its head; where arms differ, each cell has its own.
    shared = conditions.pop() if len(conditions) == 1 else "judged differently, see cells"
    return join([suite, tag("small", PURPOSES[purpose].meaning), tag("small", shared)])


def _suite_cell(
    arm: str, suite: str, evaluations: Mapping[str, EvalResult], change: PairedDifference | None
) -> Markup | str:
    result = _find(evaluations[arm], suite)
    if result is None:
        return tag("span", NOT_MEASURED, class_="quiet")
    unit = PURPOSES[result.purpose].unit
    lines = [tag("span", in_unit(result, unit), class_="value")]
    if arm != BASE:
        lines.append(_change(change, unit))
    ends = "" if result.interval is None else "{} to {}, ".format(*(level(end, unit) for end in result.interval))
    lines.append(tag("small", f"{ends}n = {result.n:,}, {result.unscored:,} unscored"))
    if len(_all_conditions(suite, evaluations)) > 1:
        lines.append(tag("small", _conditions(evaluations[arm], result)))
    base = _find(evaluations[BASE], suite) if BASE in evaluations else None
    if base is not None and base.data_hash != result.data_hash:
        lines.append(tag("small", "not the same examples as base", class_="warning"))
    return join(lines)


def _change(change: PairedDifference | None, unit: UnitOfMeasure) -> Markup:
    if change is None or change.value is None:
        return tag("span", f"change {NOT_MEASURED}", class_="change quiet")
    seen = change.is_seen
    rose, fell = ("gained", "lost") if unit == "share" else ("rose", "fell")
    counts = f", {change.gained:,} {rose}, {change.lost:,} {fell}"
    test = "" if change.p is None else f"{counts}, p {p_value(change.p)}"
    paired = tag("small", f"{change.n:,} pairs{test}" + ("" if seen is not False else ", no difference seen"))
    return tag("span", f"{in_unit(change, unit, change=True)} ", paired, class_="change" if seen else "change quiet")


def _not_plotted(evaluations: Mapping[str, EvalResult], cost: str) -> str:
    hidden = [arm for arm, one in evaluations.items() if None in (one.mean("safety"), one.mean(cost))]
    return f" Not plotted, as a number is missing: {', '.join(hidden)}." if hidden else ""


def _further_numbers(evaluations: Mapping[str, EvalResult]) -> Markup | str:
    rows = [
        [arm, suite.suite, key, number(value)]
        for arm, evaluation in evaluations.items()
        for suite in evaluation.suites
        for key, value in suite.extra.items()
    ]
    if not rows:
        return ""
    content = table(["Arm", "Suite", "Number", "Value"], rows, label="Further numbers", class_="numbers")
    return tag("details", tag("summary", "Further numbers of the evaluation"), content)
