"""`castune repair`: an adapter cut down to the units that are worth their cost, by evaluation of a few candidates.

Units are ordered by first-order numbers (`castune inspect`); what is taken is decided by what candidates do on suites.
Whatever is chosen by a number looks too good by it: the final one needs prompts that decided on nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace

from castune.artifacts.files import check_vacant
from castune.artifacts.masked_adapter import MASK_FILE
from castune.artifacts.repair_result import REPAIR_FILE, RepairResult, Tried
from castune.artifacts.tune_result import adapter_hash
from castune.config import EvaluateConfig, RepairConfig
from castune.core.numbers import percent
from castune.core.provenance import model_record, provenance
from castune.errors import ArtifactError, CastuneError, NothingScored
from castune.evaluation.suites import Suite, load_suites
from castune.purposes import PURPOSES
from castune.steps.bench import COSTS, Bench
from castune.steps.candidates import Candidate, by_effects, compared_with, source_of
from castune.steps.evaluate import require_evaluation
from castune.steps.held_out import check_held_out
from castune.steps.inspect import inspect_step
from castune.steps.inspection_data import InspectionData
from castune.steps.projection import project_step
from castune.steps.readiness import require_ready, suite_tokens
from castune.steps.repair_place import RepairPlace
from castune.steps.subject import Subject
from castune.tuning.adapter_files import plain_lora_config

logger = logging.getLogger(__name__)


def repair_step(
    subject: Subject,
    data: InspectionData,
    config: RepairConfig,
    place: RepairPlace,
    *,
    suites: Sequence[str] = (),
    confirm: Sequence[str] = (),
) -> RepairResult:
    """Cut an adapter down to what keeps its safety at least cost; what was tried is in `place.out`.

    Args:
        subject: a plain LoRA adapter, its base model and its run.
        data: what units are ordered by.
        config: settings.
        place: where results go.
        suites: what candidates are chosen by; the run's suites when empty, or the default ones.
        confirm: what is measured afterwards; the run's suites that are not among `suites` when empty.

    Returns:
        What was tried, and what was taken: nothing where no candidate keeps enough safety at less cost.

    Raises:
        CastuneError: no plain LoRA adapter, suites that measure no refusals or no cost, an adapter that gains no
            refusals on them, or something else is at `place.adapter`.
    """
    plain_lora_config(subject.adapter)
    _check_place(place)
    measured = _Measured.of(subject, config, suites, confirm)
    projected = _projected(subject, config, place)
    inspection = inspect_step(subject, data, place.out / "inspection" if subject.folder is None else None)
    if inspection.metadata["uncovered"]:
        logger.warning("every candidate drops what no unit owns: %s", ", ".join(inspection.metadata["uncovered"]))
    bench = Bench(subject, inspection, place.out, measured.deciding, measured.config)
    source, cost = source_of(subject.name), measured.cost
    # Before any candidate is measured: without a gain there is nothing to choose by.
    [itself] = bench.tried([source], cost)
    if itself.kept is None:
        assert itself.safety is not None, "`tried` refuses an adapter of which nothing is scored"
        raise CastuneError(
            f"{subject.adapter}: on {', '.join(_names(measured.deciding))} it gains no refusals over the base model "
            f"({percent(bench.base_safety)} without it, {percent(itself.safety)} with it): there is no safety to keep"
        )
    candidates = {one.name: one for one in by_effects(inspection, config)}
    rows = bench.tried([source, *candidates.values()], cost)
    chosen, reason = choose(rows[1:], config, cost)
    # Where nothing is taken, others are compared with the candidate that keeps most.
    shown = candidates.get(chosen or _keeps_most(rows[1:]))
    peers = [*([] if shown is None else compared_with(shown, inspection, config)), *projected]
    rows += bench.tried([source, *peers], cost)[1:]
    confirmed: list[Tried] = []
    if chosen is not None:
        _take(bench, candidates[chosen], place, is_of_run=not suites)
        if measured.others:
            again = replace(
                bench, out=place.out / "confirmation", suites=measured.others, config=measured.config_of_others
            )
            try:
                confirmed = again.tried([source, candidates[chosen], *peers], cost)
            except NothingScored as error:  # what was chosen stands, and was dear
                logger.warning("nothing is confirmed: %s", error)
    found = RepairResult(
        adapter={"name": subject.name, "hash": adapter_hash(subject.adapter)},
        model=model_record(*subject.loaded),
        settings=config.model_dump(mode="json"),
        cost=cost,
        base_safety=bench.base_safety,
        suites=_names(measured.deciding),
        tried=tuple(rows),
        chosen=chosen,
        reason=reason,
        dropped=() if chosen is None else candidates[chosen].dropped,
        arm=None if chosen is None or place.arm is None else place.arm.name,
        confirmed_on=_names(measured.others) if confirmed else (),
        confirmed=tuple(confirmed),
        provenance=provenance(config.seed),
        judge=bench.config.judge,
    )
    found.save(place.out)
    return found


def _check_place(place: RepairPlace) -> None:
    """Refuse a place with anything but what a repair of that name left there.

    Raises:
        ArtifactError: something else is there, such as an arm that `castune mask` made.
    """
    if not (place.adapter / MASK_FILE).is_file():
        check_vacant(place.adapter)
        return
    made = {adapter_hash(file.parent) for file in place.out.glob(f"candidates/*/{MASK_FILE}")}
    has_taken = (place.out / REPAIR_FILE).is_file() and RepairResult.load(place.out).chosen is not None
    # It is one of the candidates, or of earlier ones whose repair has ended.
    if not has_taken and adapter_hash(place.adapter) not in made:
        other = "name with --as" if place.arm is not None else "directory with --out"
        raise ArtifactError(f"{place.adapter}: an adapter that no repair made is there already; choose another {other}")


@dataclass(frozen=True)
class _Measured:
    """What is measured, checked before anything is.

    Attributes:
        config: settings of the evaluation.
        deciding: suites that candidates are chosen by.
        others: suites that decide on nothing.
        cost: the purpose whose cost decides.
    """

    config: EvaluateConfig
    deciding: list[Suite]
    others: list[Suite]
    cost: str

    @classmethod
    def of(cls, subject: Subject, config: RepairConfig, suites: Sequence[str], confirm: Sequence[str]) -> _Measured:
        own = subject.recipe.evaluate
        if own.backend != "hf":
            raise CastuneError(
                f"the run is evaluated by backend {own.backend}, and candidates would be by transformers: evaluate it "
                "with --backend hf first, or repair the adapter without the run: castune repair ADAPTER --out DIR"
            )
        deciding = load_suites(suites or own.suites, limit=own.limit, seed=own.seed)
        others: list[Suite] = []
        if confirm or (suites and subject.folder is not None):
            found = load_suites(confirm or own.suites, limit=own.limit, seed=own.seed)
            others = [one for one in found if one.name not in _names(deciding)]
        if (confirm or others) and not any(one.purpose == "safety" for one in others):
            said = "no suite beside those that decide measures refusals of harmful prompts: nothing can be confirmed"
            if confirm:
                raise CastuneError(f"--confirm {','.join(confirm)}: {said}")
            logger.warning("%s", said)
            others = []
        settings = own.model_copy(update={"suites": tuple(suites)}) if suites else own
        measured = cls(settings, deciding, others, _cost(deciding, config))
        every = [*deciding, *others]
        require_evaluation(settings, every)
        if subject.folder is not None:
            check_held_out(subject.recipe, every, folder=subject.folder)
        require_ready(subject.loaded, suite_tokens(subject.loaded.tokenizer, settings, every))
        return measured

    @property
    def config_of_others(self) -> EvaluateConfig:
        """The same settings for suites that decide on nothing."""
        return self.config.model_copy(update={"suites": _names(self.others)})


def choose(rows: Sequence[Tried], config: RepairConfig, cost: str) -> tuple[str | None, str]:
    """The candidate that keeps enough of the gain in refusals at least cost, and why, in a sentence.

    None where none keeps enough, or none of those that do costs less than the adapter as it is. One of which far fewer
    examples are scored than of the adapter is never chosen: what it seems to keep or to save is that of a few.
    """
    if not rows:
        return None, "to first order no unit costs anything: nothing is worth dropping"
    if all(row.too_few for row in rows):
        return None, f"too few examples of any candidate are scored: {rows[0].name}: {rows[0].too_few}"
    rows = [row for row in rows if not row.too_few]
    wanted, phrase = percent(config.keep_safety, 0), PURPOSES[cost].phrase
    kept = [row for row in rows if row.kept is not None and row.kept >= config.keep_safety]
    if not kept:
        best = max(rows, key=lambda row: row.kept or 0.0)
        return None, f"no candidate keeps {wanted} of the gain in refusals; {best.name} keeps most, {_kept(best)}"
    cheaper = [row for row in kept if row.saved is not None and row.saved[0] > 0]
    if not cheaper:
        return None, f"no candidate that keeps {wanted} of the gain in refusals costs less by {phrase}"
    best = max(cheaper, key=lambda row: row.saved[0] if row.saved is not None else 0.0)
    assert best.saved is not None
    value, error = best.saved
    seen = error is not None and value >= 2 * error
    doubt = "" if seen else "; on so few examples the difference in cost may be chance"
    return best.name, f"{best.name} keeps {_kept(best)} of the gain in refusals at the lowest cost by {phrase}{doubt}"


def _projected(subject: Subject, config: RepairConfig, place: RepairPlace) -> list[Candidate]:
    """The adapter projected by Safe LoRA, made before anything is measured; none without a model to compare with."""
    if config.unaligned is None:
        return []
    folder = place.out / "candidates" / "safe-lora"
    made = project_step(subject, folder, unaligned=config.unaligned, overwrite=True)
    if not made.projected:
        logger.warning(
            "Safe LoRA projects none of %d updates (%s): it is the adapter as it is", len(made.updates), made.rule
        )
    return [Candidate("safe-lora", "safe-lora", adapter=folder)]


def _kept(row: Tried) -> str:
    return "an unknown share" if row.kept is None else percent(row.kept)


def _keeps_most(rows: Sequence[Tried]) -> str:
    comparable = [row for row in rows if not row.too_few]
    return max(comparable, key=lambda row: row.kept or 0.0).name if comparable else ""


def _take(bench: Bench, candidate: Candidate, place: RepairPlace, *, is_of_run: bool) -> None:
    """Write the repaired adapter, and in a run the arm that it becomes, evaluated where that was done on its suites."""
    bench.cut(candidate, place.adapter)
    if place.arm is None:
        return
    folder = bench.subject.folder
    assert folder is not None
    bench.selection(candidate).save(place.arm.folder)
    folder.record_step(f"repair {place.arm.name}", provenance())
    if is_of_run:
        result = bench.evaluations([candidate])[candidate.name]
        replace(result, name=place.arm.name).save(folder.evaluation(place.arm.name))


def _names(suites: Sequence[Suite]) -> tuple[str, ...]:
    return tuple(one.name for one in suites)


def _cost(suites: Sequence[Suite], config: RepairConfig) -> str:
    """The purpose whose cost decides."""
    purposes = [one.purpose for one in suites]
    if "safety" not in purposes:
        raise CastuneError(
            f"suites {', '.join(_names(suites))} measure no refusals of harmful prompts, by which safety "
            "is kept; add one, for example starter-safety-eval or safety:PATH"
        )
    measured = [purpose for purpose in COSTS if purpose in purposes]
    if config.cost is not None and config.cost not in measured:
        raise CastuneError(f"no suite measures the cost {config.cost}; measured are: {', '.join(measured) or 'none'}")
    if not measured:
        raise CastuneError(
            f"suites {', '.join(_names(suites))} measure no cost; add one of {', '.join(COSTS)}, for "
            "example starter-utility-eval or nll:PATH"
        )
    return config.cost or measured[0]
