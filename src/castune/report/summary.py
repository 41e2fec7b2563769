"""From evaluations to the few numbers and sentences of the report. Pure.

`Differences` are paired differences against the base, computed by whoever has both evaluations at hand:
arm -> suite -> (mean of tuned minus base, its standard error, matched examples).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from castune.artifacts import EvalResult

BASE = "base"
NOT_MEASURED = "not measured"
NO_DIFFERENCE = "no difference seen at this n"

# What is counted in a suite of each purpose, in the order the report speaks of them.
PURPOSES = {
    "safety": "Refusals on harmful prompts",
    "utility": "Utility accuracy",
    "over-refusal": "Refusals on harmless prompts",
}

Difference = tuple[float | None, float | None, int]
Differences = Mapping[str, Mapping[str, Difference]]


@dataclass(frozen=True)
class Rate:
    """A rate or a change of a rate; `value` is None where nothing could be scored."""

    value: float | None
    standard_error: float | None
    n: int
    unscored: int = 0


def in_order(evaluations: Mapping[str, EvalResult]) -> dict[str, EvalResult]:
    """The evaluations, base first."""
    return dict(sorted(evaluations.items(), key=lambda item: item[0] != BASE))


def mean_rate(evaluation: EvalResult, purpose: str) -> Rate | None:
    """Unweighted mean over the suites of a purpose, as the paper averages; None when there is no such suite.

    Suites hold different examples, so their errors are independent: se = sqrt(sum se_i^2) / k.
    """
    suites = [suite for suite in evaluation.suites if suite.purpose == purpose]
    if not suites:
        return None
    return Rate(
        evaluation.mean(purpose),
        _error_of_mean(suite.standard_error for suite in suites),
        sum(suite.n for suite in suites),
        sum(suite.unscored for suite in suites),
    )


def mean_change(evaluation: EvalResult, changes: Mapping[str, Difference], purpose: str) -> Rate | None:
    """Mean paired change over the suites of a purpose; None when a suite has no paired difference."""
    suites = [suite.suite for suite in evaluation.suites if suite.purpose == purpose]
    if not suites or any(suite not in changes for suite in suites):
        return None
    pairs = [changes[suite] for suite in suites]
    values = [value for value, _, _ in pairs if value is not None]
    mean = sum(values) / len(values) if len(values) == len(pairs) else None
    return Rate(mean, _error_of_mean(error for _, error, _ in pairs), sum(n for _, _, n in pairs))


def is_seen(change: Rate) -> bool | None:
    """Whether a change is at least twice its standard error; None when that cannot be said."""
    if change.value is None or change.standard_error is None:
        return None
    return change.value != 0 and abs(change.value) >= 2 * change.standard_error


def verdict(
    evaluations: Mapping[str, EvalResult],
    differences: Differences,
    cost_ratios: Mapping[str, float | None],
) -> list[str]:
    """What the numbers say, a sentence an element; no judgement that is not in the numbers."""
    evaluations = in_order(evaluations)
    if not evaluations:
        return [
            "Nothing has been evaluated yet, so this report says where conflicts lie, not what training does."
        ]
    sentences = []
    for purpose, label in PURPOSES.items():
        rates = {arm: mean_rate(evaluation, purpose) for arm, evaluation in evaluations.items()}
        if any(rate is not None for rate in rates.values()):
            sentences.append(
                f"{label}: " + ", ".join(f"{_rate(rate)} {arm}" for arm, rate in rates.items()) + "."
            )
    tuned = [arm for arm in evaluations if arm != BASE]
    if BASE in evaluations:
        sentences += [_against_base(arm, evaluations[arm], differences.get(arm, {})) for arm in tuned]
    sentences += [_cost(arm, cost_ratios[arm]) for arm in tuned if arm in cost_ratios]
    if tuned:
        sentences.append(
            f"Changes are paired by example; one smaller than twice its standard error is called “{NO_DIFFERENCE}”."
        )
    return sentences


def percent(value: float | None) -> str:
    """A rate in percent, one decimal."""
    return NOT_MEASURED if value is None else f"{_signed(100 * value, '.1f')}\u202f%"


def points(value: float | None) -> str:
    """A change of a rate in percentage points, always with its sign."""
    return NOT_MEASURED if value is None else _signed(100 * value, "+.1f")


def with_error(rate: Rate, show: Callable[[float | None], str]) -> str:
    """`value ± standard error`; says so where either was not measured."""
    if rate.value is None:
        return NOT_MEASURED
    error = "not measured" if rate.standard_error is None else f"{100 * rate.standard_error:.1f}"
    return f"{show(rate.value)} ± {error}"


def number(value: object) -> str:
    """A plain number for a table: thousands separated, four significant digits for fractions."""
    if value is None:
        return NOT_MEASURED
    if isinstance(value, float) and not isinstance(value, bool):
        if not math.isfinite(value):
            return NOT_MEASURED
        return _signed(value, ".4g") if abs(value) < 1e4 else _signed(value, ",.0f")
    return (
        f"{value:,}".replace("-", "−")
        if isinstance(value, int) and not isinstance(value, bool)
        else str(value)
    )


def _signed(value: float, pattern: str) -> str:
    # Rounding may leave "-0.0"; a zero has no sign here.
    text = format(value, pattern)
    if float(text.replace(",", "")) == 0:
        text = text.replace("-", "").replace("+", "")
    return text.replace("-", "−")


def _error_of_mean(errors: Iterable[float | None]) -> float | None:
    known = list(errors)
    if any(error is None for error in known):
        return None
    return math.sqrt(sum(error**2 for error in known if error is not None)) / len(known)


def _rate(rate: Rate | None) -> str:
    return NOT_MEASURED if rate is None else with_error(rate, percent)


def _against_base(arm: str, evaluation: EvalResult, changes: Mapping[str, Difference]) -> str:
    parts = []
    for purpose, label in PURPOSES.items():
        if not any(suite.purpose == purpose for suite in evaluation.suites):
            continue
        change = mean_change(evaluation, changes, purpose)
        name = label[0].lower() + label[1:]
        if change is None or change.value is None:
            parts.append(f"{name}: change {NOT_MEASURED}")
        elif is_seen(change) is None:
            parts.append(f"{name} {points(change.value)} points, standard error {NOT_MEASURED}")
        elif is_seen(change):
            direction = "up" if change.value > 0 else "down"
            error = f"{100 * (change.standard_error or 0):.1f}"
            parts.append(f"{name} {direction} {abs(100 * change.value):.1f} ± {error} points")
        else:
            parts.append(f"{name} {NO_DIFFERENCE} ({with_error(change, points)} points)")
    return f"{arm} against base: " + "; ".join(parts) + "." if parts else f"{arm}: {NOT_MEASURED}."


def _cost(arm: str, ratio: float | None) -> str:
    if ratio is None:
        return f"Utility cost ratio of {arm}: undefined, as safety did not rise."
    return f"Utility cost ratio of {arm}: {ratio:.2f} points of utility lost for each point of safety gained."
