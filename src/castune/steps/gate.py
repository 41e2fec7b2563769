"""A run by a policy: which rules the ends of its intervals keep, which they miss, and what is not known."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from castune.artifacts import EvalResult, ProjectedAdapter, SuiteResult
from castune.artifacts.fingerprints import same_model_identity
from castune.artifacts.gate_result import GateResult, RuleResult, Verdict
from castune.artifacts.tune_result import adapter_hash
from castune.config.gate import GatePolicy, GateRule
from castune.core.numbers import counted, number
from castune.data.sources import purpose_of
from castune.errors import ArtifactError, CastuneError
from castune.purposes import PURPOSES, Purpose
from castune.stats.distributions import Interval
from castune.stats.estimates import estimate, paired_difference
from castune.stats.thresholds import (
    Mean,
    Rate,
    RateChange,
    Threshold,
    examples_needed,
    mean_interval,
    mean_value,
)
from castune.steps.arm import Arm
from castune.steps.changes import incomparable, paired_outcomes
from castune.steps.directory import BASE, RunDirectory

logger = logging.getLogger(__name__)

BASELINE = "baseline"
_VERDICTS: dict[bool | None, Verdict] = {True: "pass", False: "fail", None: "inconclusive"}


class _NotMeasured(Exception):
    """What a rule asks for is not there; the message says what, and which command makes it."""


def gate_step(folder: RunDirectory, policy: Path, *, baseline: RunDirectory | None = None) -> GateResult:
    """Judge a run by a policy. Nothing is computed anew and no model is loaded.

    Args:
        folder: the run.
        policy: TOML file, see `GatePolicy`.
        baseline: another run, for rules against `baseline`.

    Raises:
        CastuneError: the policy is malformed, asks for an arm or a metric that there is not, or for a threshold beyond
            the metric's range; or an artifact is damaged. The message names the rule and the key.
    """
    wanted = GatePolicy.load(policy)
    rules, here = wanted.rule, _Run.of(folder)
    there = None if baseline is None else _Run.of(baseline)
    if there is not None and all(rule.against != BASELINE for rule in rules):
        logger.warning('--baseline %s has no effect: no rule says against = "baseline"', there.folder.path)
    found = []
    for place, rule in enumerate(rules, 1):
        try:
            found.append(_judged(rule, here, there))
        except CastuneError as error:
            raise CastuneError(f"{policy}: rule {place}: {error}") from None
    _check_named(wanted, policy, here)
    return GateResult(
        run=str(folder.path),
        baseline=None if baseline is None else str(baseline.path),
        policy=str(policy),
        adapters={rule.arm: here.adapter(rule.arm) for rule in found},
        rules=tuple(found),
    )


def _check_named(wanted: GatePolicy, policy: Path, here: _Run) -> None:
    """Refuse rules that contradict each other once the main arm has its name."""
    try:
        main = here.arm(None)
    except ArtifactError:
        return  # the rules that ask for it say so
    try:
        wanted.check_named(main)
    except CastuneError as error:
        raise CastuneError(f"{policy}: with the main arm {main}: {error}") from None


@dataclass(frozen=True)
class _Run:
    """A run directory and the evaluations of what is in it."""

    folder: RunDirectory
    evaluations: dict[str, EvalResult]

    @classmethod
    def of(cls, folder: RunDirectory) -> _Run:
        folder.load_recipe()  # refuses what is no run
        return cls(folder, folder.load_evaluations())

    def arm(self, name: str | None) -> str:
        """The name of an arm that there is; the main one for None."""
        return BASE if name == BASE else self.folder.arm(name).name

    def adapter(self, arm: str) -> str | None:
        """Hash of an arm's adapter; None without."""
        try:
            return None if arm == BASE else adapter_hash(self.folder.arm(arm).adapter)
        except FileNotFoundError:
            return None

    def evaluation(self, arm: str) -> EvalResult:
        """The evaluation of an arm's adapter as it is now."""
        if arm in self.evaluations:
            return self.evaluations[arm]
        state = "is of an adapter that no longer exists" if self.folder.is_evaluated(arm) else "is missing"
        raise _NotMeasured(f"the evaluation of {arm} {state}; run: castune evaluate {self.folder.path}")


def _judged(rule: GateRule, here: _Run, there: _Run | None) -> RuleResult:
    try:
        arm = here.arm(rule.arm)
    except ArtifactError as error:
        raise CastuneError(f"arm = {rule.arm!r}: {error}" if rule.arm else str(error)) from None
    blank = RuleResult(rule.model_dump(mode="json", exclude_none=True), rule.words, arm)
    try:
        if rule.certificate:
            return _by_certificate(blank, here)
        return _by_interval(blank, rule, here, there)
    except _NotMeasured as missing:
        return replace(blank, detail=str(missing), is_measured=False)


def _by_certificate(blank: RuleResult, here: _Run) -> RuleResult:
    """Whether the adapter's files are those of its certificate, and that is for the arm's selection and base model."""
    if blank.arm == BASE:
        raise CastuneError("certificate = true: the base model has no adapter; name another arm")
    folder, arm = here.folder, here.folder.arm(blank.arm)
    cmap = folder.load_map()
    try:
        made = folder.load_adapter(arm, folder.load_selection(arm, cmap))
    except ArtifactError as error:
        return replace(blank, verdict="fail", detail=str(error))
    if made is None:
        raise _NotMeasured(f"{arm.adapter}: no adapter that castune made; run: {_training(folder, arm)}")
    proof = made.certificate
    detail = f"{proof.changed}, {proof.checked_rows:,} other rows bit-identical"
    if isinstance(made, ProjectedAdapter):
        detail += "; projected by Safe LoRA: the selection is all units of the adapted layers, not those once trained"
    return replace(blank, verdict="pass", detail=detail)


def _training(folder: RunDirectory, arm: Arm) -> str:
    return f"castune tune {folder.path} --data DATA" + ("" if arm.folder == folder.path else f" --arm {arm.name}")


def _by_interval(blank: RuleResult, rule: GateRule, here: _Run, there: _Run | None) -> RuleResult:
    threshold = _threshold(rule, _purpose(rule, here, there))
    other = None if rule.against is None else _reference(rule, blank.arm, here, there)
    evaluation = here.evaluation(blank.arm)
    suites = _suites(evaluation, str(rule.metric))
    again = f"castune evaluate {here.folder.path} --suites ..., with all suites that are wanted"
    if not suites or threshold is None:
        raise _NotMeasured(f"{rule.metric} was not measured; run: {again}")
    reference = None if other is None else other[0].evaluation(other[1])
    beside = [*here.evaluations.values(), *([] if reference is None else [reference])]
    if missing := _missing_suites(suites, str(rule.metric), beside):
        raise _NotMeasured(f"{', '.join(missing)} was not measured on this arm; run: {again}")
    found = replace(blank, unit=PURPOSES[suites[0].purpose].unit, suites=tuple(suite.suite for suite in suites))
    if reference is not None and same_model_identity(evaluation.model, reference.model):
        nothing = Interval(0.0, 0.0)
        found = replace(found, value=0.0, low=0.0, high=0.0, detail="the same model and adapter on both sides")
        return replace(found, verdict=_VERDICTS[threshold.is_kept(nothing)])
    measured = [
        _level(suite, evaluation) if reference is None else _change(suite, evaluation, reference) for suite in suites
    ]
    found = replace(
        found,
        value=mean_value(measured),
        n=sum(part.n for part in measured),
        unscored=sum(part.unscored for part in measured),
        judges=tuple(dict.fromkeys(suite.judge for suite in suites)),
    )
    interval = mean_interval(measured)
    if found.value is None or interval is None:
        return replace(found, detail=_why_unbounded(suites, measured), is_measured=False)
    found = replace(found, low=interval.low, high=interval.high)
    kept = threshold.is_kept(interval)
    if kept is not None:
        return replace(found, verdict=_VERDICTS[kept])
    needed = examples_needed(measured, threshold)
    return replace(found, examples_needed=needed, detail=_why_undecided(found, needed, threshold))


def _purpose(rule: GateRule, here: _Run, there: _Run | None) -> Purpose | None:
    """What a rule's metric is; None of a name that only an evaluation could tell, where there is none.

    Raises:
        CastuneError: there are evaluations, and the name is neither a purpose nor a suite.
    """
    metric = str(rule.metric)
    runs = [run for run in (here, there) if run is not None]
    measured = {s.suite: s.purpose for run in runs for result in run.evaluations.values() for s in result.suites}
    purpose = metric if metric in PURPOSES else measured.get(metric) or purpose_of(metric)
    if purpose not in PURPOSES and measured:
        listed = ", ".join(f"{suite} ({of_suite})" for suite, of_suite in measured.items())
        raise CastuneError(
            f"metric = {metric!r}: neither a purpose nor a suite; measured: {listed}; purposes: {', '.join(PURPOSES)}"
        )
    return PURPOSES.get(purpose or "")


def _reference(rule: GateRule, arm: str, here: _Run, there: _Run | None) -> tuple[_Run, str]:
    """The run and the arm that a rule compares with."""
    run = there if rule.against == BASELINE else here
    if run is None:
        raise CastuneError('against = "baseline" needs that run: add --baseline RUN')
    try:
        other = run.arm(rule.arm if rule.against == BASELINE else rule.against)
    except ArtifactError as error:
        raise CastuneError(f"against = {rule.against!r}: {error}") from None
    if run is here and other == arm:
        raise CastuneError(f"against = {rule.against!r}: this is the arm itself; choose another")
    return run, other


def _suites(evaluation: EvalResult, metric: str) -> list[SuiteResult]:
    """Suites of a purpose, or the one of a name."""
    of_purpose = [suite for suite in evaluation.suites if suite.purpose == metric]
    return of_purpose or [suite for suite in evaluation.suites if suite.suite == metric]


def _missing_suites(suites: Sequence[SuiteResult], metric: str, evaluations: Sequence[EvalResult]) -> list[str]:
    """Suites of the metric that others were measured on: a mean without them may lack the hard one."""
    measured = {suite.suite for one in evaluations for suite in one.suites if metric in (suite.purpose, suite.suite)}
    return sorted(measured - {suite.suite for suite in suites})


def _threshold(rule: GateRule, about: Purpose | None) -> Threshold | None:
    """The threshold of a rule for the metric, or for its change; None where it is not known what the metric is.

    Raises:
        CastuneError: no interval of the metric can be on the right side of it.
    """
    if about is None or rule.threshold is None:
        return None
    key, value = rule.threshold
    is_level = rule.against is None
    if about.unit == "share" and not (0 < value < 1 if is_level else value < 1):
        accepted = "above 0 and below 1, where examples can decide" if is_level else "0 to below 1"
        raise CastuneError(f"{key} = {value:g}: {rule.metric} is a share (90 % is 0.9); accepted: {accepted}")
    if is_level:
        if (key == "at_least") != about.higher_is_better:
            logger.warning("%s: this asks for what is bad (%s)", rule.words, about.meaning)
        return Threshold(value, is_floor=key == "at_least")
    improvement = value if key == "better_by" else -value
    return Threshold(improvement if about.higher_is_better else -improvement, is_floor=about.higher_is_better)


def _level(suite: SuiteResult, evaluation: EvalResult) -> Rate | Mean:
    found = estimate(evaluation.outcomes_of(suite.suite))
    return Mean.of(found) if PURPOSES[suite.purpose].is_continuous else Rate.of(found)


def _change(suite: SuiteResult, evaluation: EvalResult, reference: EvalResult) -> RateChange | Mean:
    """Change of a suite against the reference, on the same examples."""
    why = incomparable(reference, evaluation, suite.suite)
    if why is None and reference.suite(suite.suite).data_hash != suite.data_hash:
        why = "its examples are others there"
    if why is not None:
        raise _NotMeasured(f"{suite.suite} cannot be compared with {reference.name}: {why}")
    found = paired_difference(*paired_outcomes(reference, evaluation, suite.suite))
    if PURPOSES[suite.purpose].is_continuous:
        return Mean.of(found)
    return RateChange(found.gained, found.lost, found.n, found.unscored)


def _why_unbounded(suites: Sequence[SuiteResult], measured: Sequence[Rate | RateChange | Mean]) -> str:
    """What keeps a mean over suites from having an interval: the first suite without one."""
    for suite, part in zip(suites, measured, strict=True):
        if not part.n:
            judged = "" if suite.max_new_tokens is None else "; judge stored replies with: castune judge RUN"
            return f"none of {counted(part.total, 'example')} of {suite.suite} is scored (judge: {suite.judge}){judged}"
        if part.interval() is None:
            if part.unscored:
                counts = f"{part.unscored:,} of {counted(part.total, 'example')}"
                return f"{suite.suite}: {counts} unscored, which could be any number"
            return f"{suite.suite}: no interval without any spread, n = {part.n:,}"
    raise AssertionError("every suite has an interval")


def _why_undecided(found: RuleResult, needed: int | None, threshold: Threshold) -> str:
    """How many examples would decide what straddles its threshold."""
    assert found.value is not None
    if needed is None:
        reason = "too many are unscored" if found.unscored else "the value is as good as the threshold itself"
        return f"the threshold is within the interval, and more examples would not decide: {reason}"
    outcome = "pass" if threshold.is_kept(Interval(found.value, found.value)) else "fail"
    together = f" of {len(found.suites)} suites together" if len(found.suites) > 1 else ""
    return (
        f"the threshold is within the interval; if {number(found.value, '.3f')} is the truth, {needed:,} examples"
        f"{together} would decide ({outcome})"
    )
