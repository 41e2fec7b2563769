"""What became of prompts and problems: the counts behind the rates."""

from __future__ import annotations

from collections.abc import Mapping

from castune.artifacts import EvalResult, SuiteResult
from castune.artifacts.lm_eval_result import LmEvalResult, LmEvalScore, headline_scores
from castune.core.numbers import with_error
from castune.report.markup import Markup, table, tag
from castune.report.summary import NOT_MEASURED, percent

_PROMPTS = {"safety": "harmful", "over-refusal": "harmless"}
# Keys of a suite's further numbers, in the order of the columns.
_FATES = {"n_refused": "Refused", "n_complied": "Complied", "n_degenerate": "Degenerate", "n_unscored": "Unscored"}
_LOSSES = {
    "share_direct_answer": "Answer without reasoning",
    "share_refusal": "Refusal",
    "share_truncated": "Cut off by the limit",
    "share_no_answer_found": "No answer found",
    "share_degenerate": "Degenerate",
    "share_wrong_reasoning": "Wrong reasoning",
    "share_wrong_answer": "Wrong letter",
}


def fates(evaluations: Mapping[str, EvalResult]) -> Markup | str:
    """Refused or complied, on harmful and on harmless prompts: a row an arm and suite. Each prompt is counted once."""
    rows = [
        [arm, suite.suite, _PROMPTS[suite.purpose], *(_count(suite, key) for key in _FATES)]
        for suite, arm in _by_suite(evaluations)
        if suite.purpose in _PROMPTS and set(_FATES) <= suite.extra.keys()
    ]
    if not rows:
        return ""
    rule = (
        "Every prompt is in one column. Degenerate: no refusal, and nothing said (empty, or one phrase over and over). "
        "Unscored: the judge could not tell, or there was no reply."
    )
    return tag(
        "div",
        tag("h3", "Refused or complied, harmful or harmless"),
        table(
            ["Arm", "Suite", "Prompts", *_FATES.values()], rows, label="What became of the prompts", class_="numbers"
        ),
        tag("p", rule, class_="small"),
    )


def losses(evaluations: Mapping[str, EvalResult]) -> Markup | str:
    """Why answers in words were wrong: a row an arm and suite, shares of its examples that have a reply."""
    found = [(suite, arm) for suite, arm in _by_suite(evaluations) if "share_refusal" in suite.extra]
    if not found:
        return ""
    # Letters are lost for other reasons than worked answers.
    keys = [key for key in _LOSSES if any(key in suite.extra for suite, _ in found)]
    rows = []
    for suite, arm in found:
        lost = sum(suite.extra.get(key) or 0 for key in keys)
        shares = [percent(suite.extra[key] or 0) if key in suite.extra else "–" for key in keys]
        rows.append([arm, suite.suite, percent(max(0.0, 1 - lost)), *shares])
    rule = (
        "Shares of the problems and questions of a suite that have a reply; a row adds up to 100 %. All but the right "
        "ones count as wrong. An answer without reasoning is what the paper calls reasoning collapse, a refusal of a "
        "problem its over-refusal (Appendix C). Examples side by side, those lost by one arm only first, are among the "
        "sample replies."
    )
    columns = ["Arm", "Suite", "Right", *(_LOSSES[key] for key in keys)]
    return tag(
        "div",
        tag("h3", "Why answers were wrong"),
        table(columns, rows, label="Why answers were wrong", class_="numbers"),
        tag("p", rule, class_="small"),
    )


def by_lm_eval(results: Mapping[str, LmEvalResult]) -> Markup | str:
    """What lm-evaluation-harness measured on the same models, by its own protocol; nothing where it was not asked."""
    if not results:
        return ""
    rows = []
    for (task, metric), scores in headline_scores(results).items():
        shots = _of_arms({arm: _shots(score) for arm, score in scores.items()})
        n = _of_arms({arm: f"{score.n:,}" for arm, score in scores.items()})
        rows.append([task, metric, shots, n, *(_score(scores.get(arm)) for arm in results)])
    versions = {str(result.provenance.get("versions", {}).get("lm_eval")) for result in results.values()}
    template = _of_arms(
        {arm: "with" if one.settings.get("apply_chat_template") else "without" for arm, one in results.items()}
    )
    rule = (
        f"The same models on tasks of lm-evaluation-harness {', '.join(sorted(versions))}, by its own protocol, "
        f"{template} the chat template: prompts, few-shot examples and scoring differ from the suites above, so the "
        "numbers do too. Value ± standard error as it reports them."
    )
    return tag(
        "div",
        tag("h3", "By lm-eval's protocol"),
        table(["Task", "Metric", "Shots", "n", *results], rows, label="Results of lm-eval", class_="numbers"),
        tag("p", rule, class_="small"),
    )


def _of_arms(values: Mapping[str, str]) -> str:
    """What all arms have, or each its own."""
    distinct = set(values.values())
    return distinct.pop() if len(distinct) == 1 else ", ".join(f"{value} in {arm}" for arm, value in values.items())


def _shots(score: LmEvalScore) -> str:
    return NOT_MEASURED if score.num_fewshot is None else str(score.num_fewshot)


def _score(score: LmEvalScore | None) -> str:
    if score is None or score.value is None:
        return NOT_MEASURED
    return with_error(score.value, score.standard_error, ".4f").replace(" ", "\u00a0")


def _by_suite(evaluations: Mapping[str, EvalResult]) -> list[tuple[SuiteResult, str]]:
    """Suites in the order of the first arm that has them, all arms of a suite together."""
    found = [(suite, arm) for arm, evaluation in evaluations.items() for suite in evaluation.suites]
    order = list(dict.fromkeys(suite.suite for suite, _ in found))
    return sorted(found, key=lambda item: order.index(item[0].suite))


def _count(suite: SuiteResult, key: str) -> str:
    count = int(suite.extra[key] or 0)
    return f"{count:,} ({percent(count / max(1, suite.n + suite.unscored))})"
