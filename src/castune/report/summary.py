"""From evaluations to the few numbers and sentences of the report. Pure.

`Differences` are paired differences against the base, computed by whoever has both evaluations at hand:
arm -> suite -> mean of tuned minus base, with its standard error and the number of pairs.

On the page a value stays with its unit and its error: their spaces do not break.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from castune.artifacts import EvalResult, SuiteResult
from castune.core import numbers
from castune.purposes import PURPOSES, UnitOfMeasure
from castune.stats.estimates import CostRatio, Estimate, PairedDifference

BASE = "base"
NOT_MEASURED = "not measured"
NO_DIFFERENCE = "no difference seen at this n"

Differences = Mapping[str, Mapping[str, PairedDifference]]
CostRatios = Mapping[str, CostRatio]
# A rate or its change, with a standard error.
Rated = SuiteResult | Estimate | PairedDifference


@dataclass(frozen=True)
class Verdict:
    """The rates of all arms, the changes of each arm, and how to read them."""

    rates: str
    changes: Mapping[str, str]
    rule: str


def in_order(evaluations: Mapping[str, EvalResult]) -> dict[str, EvalResult]:
    """The evaluations, base first."""
    return dict(sorted(evaluations.items(), key=lambda item: item[0] != BASE))


def mean_rate(evaluation: EvalResult, purpose: str) -> Estimate | None:
    """Unweighted mean over the suites of a purpose, as the paper averages; None when there is no such suite.

    Suites hold different examples, so their errors are independent: se = sqrt(sum se_i^2) / k.
    """
    suites = [suite for suite in evaluation.suites if suite.purpose == purpose]
    if not suites:
        return None
    return Estimate(
        evaluation.mean(purpose),
        _error_of_mean(suite.standard_error for suite in suites),
        sum(suite.n for suite in suites),
        sum(suite.unscored for suite in suites),
    )


def mean_change(evaluation: EvalResult, changes: Mapping[str, Rated], purpose: str) -> Estimate | None:
    """Mean paired change over the suites of a purpose; None when a suite has no paired difference."""
    suites = [suite.suite for suite in evaluation.suites if suite.purpose == purpose]
    if not suites or any(suite not in changes for suite in suites):
        return None
    found = [changes[suite] for suite in suites]
    values = [change.value for change in found if change.value is not None]
    mean = sum(values) / len(values) if len(values) == len(found) else None
    return Estimate(
        mean,
        _error_of_mean(change.standard_error for change in found),
        sum(change.n for change in found),
        sum(change.unscored for change in found),
    )


def verdict(
    evaluations: Mapping[str, EvalResult],
    differences: Differences,
    cost_ratios: CostRatios,
) -> Verdict:
    """What the numbers say in words; no judgement that is not in the numbers."""
    evaluations = in_order(evaluations)
    if not evaluations:
        nothing = "Nothing has been evaluated: this report says where conflicts lie, not what training does."
        return Verdict(nothing, {}, "")
    rates = []
    for purpose, about in PURPOSES.items():
        found = {arm: mean_rate(evaluation, purpose) for arm, evaluation in evaluations.items()}
        if any(rate is not None for rate in found.values()):
            of_all = {suite.suite for one in evaluations.values() for suite in one.suites if suite.purpose == purpose}
            counts = sorted({rate.n for rate in found.values() if rate is not None})
            n = " to ".join(f"{count:,}" for count in sorted({counts[0], counts[-1]}))
            listed = ", ".join(
                f"{_level(rate, about.unit)} {arm}{_without(evaluations[arm], of_all)}" for arm, rate in found.items()
            )
            unit = ", nats per token" if about.is_continuous else ""
            rates.append(f"{about.label} (n = {n}{unit}): {listed}.")
    tuned = [arm for arm in evaluations if arm != BASE]
    if BASE not in evaluations:
        return Verdict(" ".join(rates), {}, "The base model was not evaluated, so no change is known.")
    changes = {
        arm: f"{_changes(evaluations[arm], differences.get(arm, {}), evaluations[BASE])} "
        f"Utility cost ratio: {cost_ratio(arm, cost_ratios)}."
        for arm in tuned
    }
    rule = (
        "Changes are against base, in percentage points or nats per token, paired by example; ± is one standard error. "
        f"A change is called “{NO_DIFFERENCE}” where its test (of rates McNemar's exact one) gives p of 0.05 or more, "
        "and a mean over several suites where it is smaller than twice its standard error. The utility cost ratio, "
        "with its 95 % bootstrap interval, is undefined where safety did not rise; the interval has no upper bound "
        "where more than 2.5 % of the resamples show no gain in safety."
    )
    return Verdict(" ".join(rates), changes, rule if tuned else "")


def cost_ratio(arm: str, ratios: CostRatios) -> str:
    """The utility cost ratio (Eq. 7) in words: undefined where safety did not rise, not measured without an entry."""
    ratio = ratios.get(arm)
    if ratio is None:
        return NOT_MEASURED
    return numbers.number(ratio.value) + (interval(ratio) if ratio.value is not None else "")


def interval(ratio: CostRatio) -> str:
    """The 95 % interval of a ratio, with a space ahead; nothing where there is none."""
    if ratio.low is None:
        return ""
    if ratio.high is not None:
        return f" ({numbers.span(ratio.low, ratio.high)})"
    gainless = _narrow(numbers.percent(ratio.undefined_share or 0, 0))
    return f" ({numbers.number(ratio.low)} to no bound: no gain in {gainless} of resamples)"


def percent(value: float | None) -> str:
    """A rate in percent, one decimal."""
    return NOT_MEASURED if value is None else _narrow(numbers.percent(value))


def points(value: float | None) -> str:
    """A change of a rate in percentage points, always with its sign."""
    return NOT_MEASURED if value is None else numbers.number(100 * value, "+.1f")


def level(value: float | None, unit: UnitOfMeasure) -> str:
    """A rate in percent, or a mean in nats."""
    if unit == "share" or value is None:
        return percent(value)
    return numbers.number(value, ".3f")


def in_unit(rate: Rated, unit: UnitOfMeasure, *, change: bool = False) -> str:
    """`value ± standard error` of a rate in percent, its change in points, or of either in nats."""
    if unit == "share":
        return with_error(rate, points if change else percent)
    if rate.value is None:
        return NOT_MEASURED
    error = NOT_MEASURED if rate.standard_error is None else numbers.number(rate.standard_error, ".3f")
    return f"{numbers.number(rate.value, '+.3f' if change else '.3f')}\u00a0±\u00a0{error}"


def with_error(rate: Rated, show: Callable[[float | None], str]) -> str:
    """`value ± standard error`; says so where either was not measured."""
    if rate.value is None:
        return NOT_MEASURED
    error = NOT_MEASURED if rate.standard_error is None else numbers.number(100 * rate.standard_error, ".1f")
    return f"{show(rate.value)}\u00a0±\u00a0{error}"


def number(value: float | None) -> str:
    """A plain number for a table: thousands separated, four significant digits for fractions."""
    if value is None or not math.isfinite(value):
        return NOT_MEASURED
    whole = isinstance(value, int) or abs(value) >= 1e4
    return numbers.number(value, ",.0f" if whole else ".4g")


def _narrow(text: str) -> str:
    return text.replace(" ", "\u202f")


def _error_of_mean(errors: Iterable[float | None]) -> float | None:
    known = list(errors)
    if any(error is None for error in known):
        return None
    return math.sqrt(sum(error**2 for error in known if error is not None)) / len(known)


def _level(rate: Estimate | None, unit: UnitOfMeasure) -> str:
    return NOT_MEASURED if rate is None else in_unit(rate, unit)


def _without(evaluation: EvalResult, suites: set[str]) -> str:
    """Which of some suites were not measured: a mean over the others is of other examples than the other arms' is."""
    missing = sorted(suites - {suite.suite for suite in evaluation.suites})
    is_some = missing and len(missing) < len(suites)
    return f" (without {', '.join(missing)})" if is_some else ""


def _changes(evaluation: EvalResult, changes: Mapping[str, PairedDifference], base: EvalResult) -> str:
    parts = []
    for purpose, about in PURPOSES.items():
        here, there = ([s.suite for s in one.suites if s.purpose == purpose] for one in (evaluation, base))
        if not here:
            continue
        change = None if set(here) != set(there) else mean_change(evaluation, changes, purpose)
        if change is None or change.value is None:
            missing = _without(evaluation, set(there)) or _without(base, set(here))
            words = f"change {NOT_MEASURED}{missing}"
        else:
            words = in_unit(change, about.unit, change=True)
            is_seen = changes[here[0]].is_seen if len(here) == 1 else change.is_seen
            if is_seen is None:
                words = f"{words}, too few pairs to judge"
            elif not is_seen:
                words = f"{NO_DIFFERENCE} ({words})"
        # A name like KL or NLL keeps its capitals.
        label = about.label if about.label[1].isupper() else f"{about.label[0].lower()}{about.label[1:]}"
        parts.append(f"{label}: {words}")
    return "; ".join(parts) + "."
