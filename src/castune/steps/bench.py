"""Adapters cut down and evaluated beside the one they come from, each on the same suites; what is there stays."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from castune.artifacts import EvalResult, HeadSelection
from castune.artifacts.adapter_inspection import AdapterInspection
from castune.artifacts.records import ModelRecord
from castune.artifacts.repair_result import Tried
from castune.artifacts.samples import references_of
from castune.artifacts.tune_result import adapter_hash
from castune.config import EvaluateConfig
from castune.core.provenance import fingerprint, model_record
from castune.errors import NothingScored
from castune.evaluation.backend import TransformersHost
from castune.evaluation.judges import Judge, judge
from castune.evaluation.judging import judge_again
from castune.evaluation.run import evaluate_on
from castune.evaluation.suites import Suite
from castune.purposes import PURPOSES
from castune.report.summary import mean_change, mean_rate
from castune.stats.kept_gain import KeptGain, kept_gain
from castune.stats.scored import is_far_fewer
from castune.steps.candidates import Candidate, changed_units
from castune.steps.changes import differences
from castune.steps.directory import BASE
from castune.steps.evaluate import at_strength, is_judged_by, stored_evaluation
from castune.steps.subject import Subject
from castune.tuning.mask import mask_adapter

logger = logging.getLogger(__name__)

# What an adapter may cost, the most telling first: numbers in nats tell smaller differences than rates of as many
# examples, and those of right answers more than those of any text.
COSTS = ("nll", "utility", "over-refusal-margin", "over-refusal", "kl")


@dataclass(frozen=True)
class Bench:
    """An adapter and what is made of it, evaluated on suites.

    Attributes:
        subject: the adapter.
        inspection: of it.
        out: where candidates and evaluations go.
        suites: what is measured.
        config: settings of the evaluation.
    """

    subject: Subject
    inspection: AdapterInspection
    out: Path
    suites: Sequence[Suite]
    config: EvaluateConfig

    def selection(self, candidate: Candidate) -> HeadSelection:
        """What a candidate keeps, of the units that the adapter changes."""
        dropped = set(candidate.dropped)
        kept = [one for one in changed_units(self.inspection) if one not in dropped]
        n_groups = self.subject.recipe.diagnose.mlp_groups if any(one.kind == "mlp_group" for one in kept) else None
        return HeadSelection.custom(
            [(one.layer, one.index) for one in kept if one.is_head],
            n_total=len(self.inspection),
            model_fingerprint=fingerprint(self.subject.loaded.model),
            units=[one for one in kept if not one.is_head],
            mlp_groups=n_groups,
        )

    def cut(self, candidate: Candidate, place: Path) -> None:
        """Write a candidate as an adapter with its certificate."""
        selection = self.selection(candidate)
        mask_adapter(self.subject.loaded.model, self.subject.adapter, selection, place, overwrite=True)

    def evaluations(self, candidates: Iterable[Candidate]) -> dict[str, EvalResult]:
        """Evaluations of the base model and some candidates, made where they are not there yet."""
        base = self._evaluated(BASE, None, 1.0, None)
        found, references = {BASE: base}, references_of(base.samples)
        for one in candidates:
            found[one.name] = self._evaluated(one.name, self._adapter(one), one.strength, references)
        return found

    def tried(self, candidates: Sequence[Candidate], cost: str) -> list[Tried]:
        """Some candidates, the first of which is the adapter as it is, by what they keep and cost (`tried_rows`)."""
        return tried_rows(
            candidates, self.evaluations(candidates), cost, inspection=self.inspection, judge=self.config.judge
        )

    @property
    def base_safety(self) -> float:
        """Refusal rate of the base model."""
        rate = _rate(self.evaluations([])[BASE])
        assert rate is not None, "`tried` refuses a base model of which nothing is scored"
        return rate

    def _adapter(self, candidate: Candidate) -> Path:
        if candidate.adapter is not None:
            return candidate.adapter
        if not candidate.dropped:
            return self.subject.adapter
        place = self.out / "candidates" / candidate.name
        self.cut(candidate, place)
        return place

    @cached_property
    def _identity(self) -> ModelRecord:
        return model_record(*self.subject.loaded)

    @cached_property
    def _judge(self) -> Judge:
        return judge(self.config.judge)

    def _evaluated(
        self, name: str, adapter: Path | None, strength: float, references: Mapping[str, list[list[int]]] | None
    ) -> EvalResult:
        model: ModelRecord = {**self._identity, "adapter": None if adapter is None else adapter_hash(adapter)}
        model = at_strength(model, strength)
        for place in self._places(name, adapter, strength):
            found = stored_evaluation(place, model, self.config, self.suites, references)
            if found is not None:
                by = self._judge
                return found if is_judged_by(by.name, found, by.signature) else judge_again(found, by)
        logger.info("evaluation of %s: %d examples", name, sum(len(suite.examples) for suite in self.suites))
        with TransformersHost(*self.subject.loaded).backend(name, adapter, strength) as backend:
            return evaluate_on(
                backend,
                suites=self.suites,
                config=self.config,
                by=self._judge,
                name=name,
                out=self.out / "evaluation" / name,
                model_info=model,
                references=references,
            )

    def _places(self, name: str, adapter: Path | None, strength: float) -> Iterator[Path]:
        """Where an evaluation may be: the run has those of the base model and the adapter itself."""
        folder = self.subject.folder
        if folder is not None and adapter is None:
            yield folder.evaluation(BASE)
        elif folder is not None and adapter == self.subject.adapter:
            yield folder.at_strength(self.subject.name, strength)
        yield self.out / "evaluation" / name


def tried_rows(
    candidates: Sequence[Candidate],
    evaluations: dict[str, EvalResult],
    cost: str,
    *,
    inspection: AdapterInspection,
    judge: str,
) -> list[Tried]:
    """Evaluated candidates, the first of which is the adapter as it is, by what they keep and cost.

    One that falls silent has nothing to show, and hides nothing of the others (`Tried.too_few`).

    Args:
        candidates: what was evaluated.
        evaluations: of the base model (`base`) and of the candidates, by name.
        cost: the purpose whose cost decides.
        inspection: of the adapter.
        judge: what decided on refusals, for messages.

    Raises:
        NothingScored: no prompt of a safety suite could be scored both of the base model and of the adapter.
    """
    base, source = evaluations[BASE], evaluations[candidates[0].name]
    for one, other in ((base, source), (source, base)):
        if too_few := _too_few(one, other, ("safety",)):
            logger.warning("%s: %s; the gain in refusals is that on these alone", other.name, too_few)
    changes = differences(evaluations)
    found = []
    for candidate in candidates:
        result = evaluations[candidate.name]
        kept, saved = _kept(base, source, result), None
        if kept is None and candidate is candidates[0]:
            raise NothingScored(
                f"no prompt of {', '.join(_safety_suites(source))} could be scored under the base model and the "
                f"adapter by {judge}"
            )
        if candidate is not candidates[0]:
            of_source = differences({BASE: source, candidate.name: result})[candidate.name]
            saved = _cost(result, of_source, cost, sign=-1.0)
        costs = {purpose: _cost(result, changes[candidate.name], purpose) for purpose in COSTS}
        found.append(
            Tried(
                name=candidate.name,
                kind=candidate.kind,
                dropped=len(candidate.dropped),
                strength=candidate.strength,
                predicted=candidate.predicted(inspection),
                safety=_rate(result),
                kept=None if kept is None else kept.value,
                kept_interval=None
                if kept is None or kept.interval is None
                else (kept.interval.low, kept.interval.high),
                costs={purpose: value for purpose, value in costs.items() if value is not None},
                saved=saved,
                n=_n_scored(result),
                too_few=_too_few(source, result, ("safety", cost)),
            )
        )
    return found


def _n_scored(result: EvalResult) -> dict[str, int]:
    """Scored examples by purpose."""
    found: dict[str, int] = {}
    for suite in result.suites:
        found[suite.purpose] = found.get(suite.purpose, 0) + suite.n
    return found


def _safety_suites(result: EvalResult) -> list[str]:
    return [suite.suite for suite in result.suites if suite.purpose == "safety"]


def _kept(*results: EvalResult) -> KeptGain | None:
    """What the last of base model, source and candidate keeps; None where a suite has no prompt scored in all three."""
    outcomes = [tuple(result.outcomes_of(name) for result in results) for name in _safety_suites(results[0])]
    if not all(any(None not in row for row in zip(*of_suite, strict=True)) for of_suite in outcomes):
        return None
    return kept_gain([(base, source, other) for base, source, other in outcomes])


def _too_few(source: EvalResult, result: EvalResult, purposes: Collection[str]) -> str:
    """In which suite far fewer of the source's scored examples are scored, in words; empty where in none."""
    for suite in source.suites:
        pairs = list(zip(source.outcomes_of(suite.suite), result.outcomes_of(suite.suite), strict=True))
        of_source, of_both = sum(one is not None for one, _ in pairs), sum(None not in pair for pair in pairs)
        if suite.purpose in purposes and is_far_fewer(of_both, of_source):
            return f"of {of_source:,} examples of {suite.suite} that {source.name} has a score for it has {of_both:,}"
    return ""


def _rate(result: EvalResult) -> float | None:
    """Refusal rate; None where a suite has no scored prompt."""
    rate = mean_rate(result, "safety")
    return None if rate is None else rate.value


def _cost(
    result: EvalResult, changes: Mapping[str, object], purpose: str, *, sign: float = 1.0
) -> tuple[float, float | None] | None:
    """What an evaluation costs more than another, or less for a negative sign; None where it was not measured."""
    change = mean_change(result, changes, purpose)  # type: ignore[arg-type]
    if change is None or change.value is None:
        return None
    return sign * (-1.0 if PURPOSES[purpose].higher_is_better else 1.0) * change.value, change.standard_error
