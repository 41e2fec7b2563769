"""The comparison that a study is made to decide: what it can see, what it found, and what that means in words. Pure.

An effect is seen where the 95 % interval of the ratio of the two costs lies above 1; the paper's size is refuted at
this scale where it lies below 1.5. Both can hold. Where neither does, nothing is decided, and the words say what would.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from castune.config import PrimaryContrast, StudyConfig
from castune.core.numbers import counted, number, percent, span
from castune.purposes import PAID, PURPOSES
from castune.stats.cost_ratio import CostRatioAtSafety, RatioVerdict, cost_ratio, ratio_verdict
from castune.stats.equal_safety import common_target
from castune.stats.power import Equivalence, equivalent, seeds_needed, smallest_difference
from castune.steps.equal_safety import AtStrengths, Evaluated, cost_curves

# Numbers of seeds that a design is shown for, beside its own.
_SEEDS = (2, 3, 4, 6, 8, 12, 16)


@dataclass(frozen=True)
class Design:
    """What so many seeds can see.

    Attributes:
        n_seeds: trainings of both arms.
        smallest: difference of the costs that is found with the power asked for, in the cost's unit.
        ratio: the same as a ratio of the costs; None where the second's is not known.
        by_seeds: smallest differences of other numbers of seeds.
    """

    n_seeds: int
    smallest: float
    ratio: float | None
    by_seeds: Mapping[int, float]


@dataclass(frozen=True)
class PrimaryFinding:
    """The primary contrast as it came out.

    Attributes:
        contrast: what was declared.
        safety: the purpose that is read as safety.
        found: ratio and difference of the costs.
        verdict: whether an effect is seen, and the paper's size refuted.
        equivalence: whether the costs are equivalent within the declared bound; None without one, or unknown.
        design: what the seeds that there are can see, by the spread that was measured; None where that is unknown.
        seeds_to_decide: seeds that would decide it with the power asked for, if the measured costs are the true ones;
            None where it is decided, no number of seeds would do, or an arm misses the safety in too many draws.
    """

    contrast: PrimaryContrast
    safety: str
    found: CostRatioAtSafety
    verdict: RatioVerdict
    equivalence: Equivalence | None
    design: Design | None
    seeds_to_decide: int | None

    @property
    def words(self) -> list[str]:
        """What came out, what it means, and what could have been seen."""
        return [_ratio_words(self), *_verdict_words(self), *_design_words(self)]


def primary_finding(
    contrast: PrimaryContrast, base: Evaluated, arms: Mapping[str, Sequence[AtStrengths]]
) -> PrimaryFinding | None:
    """The contrast of two arms.

    Args:
        contrast: what was declared.
        base: evaluation of the base model.
        arms: of both arms, and no others, the evaluations at every strength, one a seed, of the same seeds.

    Returns:
        None where the cost was not measured at several strengths of both arms, or an arm is nowhere safer than base.
    """
    first, second = contrast.arms
    measured = cost_curves(base, arms)
    if measured is None or contrast.cost not in measured[1]:
        return None
    safety, curves = measured[0], measured[1][contrast.cost]
    target = common_target(curves) if {first, second} <= curves.keys() else None
    if target is None:
        return None
    found = cost_ratio(curves, first, second, target)
    verdict = ratio_verdict(found, seen_above=contrast.seen_above, refuted_below=contrast.refuted_below)
    difference = found.difference.interval
    if contrast.seen_above >= 1 and (difference is None or difference.low <= 0):
        # With few seeds one of the two intervals may exclude that the costs are equal and the other not.
        verdict = replace(verdict, is_seen=False)
    known = found.seeds_sd is not None and found.items_se is not None
    return PrimaryFinding(
        contrast=contrast,
        safety=safety,
        found=found,
        verdict=verdict,
        equivalence=_equivalence(contrast, found) if known else None,
        design=_design_found(contrast, found) if known else None,
        seeds_to_decide=_seeds_to_decide(contrast, found) if known and verdict.is_undecided else None,
    )


def expected_design(study: StudyConfig) -> Design | None:
    """What a study's primary contrast can see by the spread that its recipe expects; None where it expects none."""
    contrast = study.primary
    if contrast is None or contrast.seeds_sd is None:
        return None
    n_seeds = len(_seeds(study))
    if n_seeds < 2:
        return None
    return _design(contrast, n_seeds, contrast.seeds_sd, contrast.items_se, contrast.second_cost)


def expected_words(study: StudyConfig) -> list[str]:
    """The same in words, for a plan."""
    contrast = study.primary
    if contrast is None:
        return ["no primary contrast: study.primary declares the comparison that the study is made to decide"]
    first, second = contrast.arms
    n_seeds = len(_seeds(study))
    what = f"primary contrast: {PAID[contrast.cost]}, {first} over {second} at equal safety, {counted(n_seeds, 'seed')}"
    design = expected_design(study)
    if n_seeds < 2:
        return [f"{what}: one seed decides nothing, for it does not show what another would do"]
    if design is None:
        return [f"{what}: give study.primary.seeds_sd, the spread over seeds that a pilot found, to see its power"]
    unit = PURPOSES[contrast.cost].shown
    others = ", ".join(
        f"{n} seeds {_amount(contrast, smallest)}" for n, smallest in design.by_seeds.items() if n != n_seeds
    )
    ratio = "" if design.ratio is None else f" (a ratio of {number(design.ratio)})"
    assert contrast.seeds_sd is not None
    return [
        what,
        f"it sees a difference of {_amount(contrast, design.smallest)} {unit.change}{ratio} with a power of "
        f"{percent(contrast.power, 0)}, if the difference spreads by {_amount(contrast, contrast.seeds_sd)} over seeds "
        f"and by {_amount(contrast, contrast.items_se)} over examples; {others}",
    ]


def _seeds(study: StudyConfig) -> set[int]:
    """Those that both arms of the primary contrast are trained with."""
    assert study.primary is not None
    one, other = (set(study.seeds_of(arm)) for arm in study.primary.arms)
    return one & other


def _design_found(contrast: PrimaryContrast, found: CostRatioAtSafety) -> Design | None:
    assert found.seeds_sd is not None
    assert found.items_se is not None
    if found.n_seeds < 2 or found.seeds_sd == found.items_se == 0:
        return None
    second = None if found.value is None else found.second_cost
    return _design(contrast, found.n_seeds, found.seeds_sd, found.items_se, second)


def _design(
    contrast: PrimaryContrast, n_seeds: int, seeds_sd: float, items_se: float, second_cost: float | None
) -> Design:
    by_seeds = {
        n: smallest_difference(seeds_sd=seeds_sd, n_seeds=n, items_se=items_se, power=contrast.power)
        for n in sorted({*_SEEDS, n_seeds})
    }
    smallest = by_seeds[n_seeds]
    return Design(n_seeds, smallest, None if second_cost is None else 1 + smallest / second_cost, by_seeds)


def _equivalence(contrast: PrimaryContrast, found: CostRatioAtSafety) -> Equivalence | None:
    value, bound = found.difference.value, contrast.equivalent_within
    if bound is None or value is None or found.n_seeds < 2:
        return None
    assert found.seeds_sd is not None
    assert found.items_se is not None
    of_seeds = found.seeds_sd / math.sqrt(found.n_seeds)
    se = math.hypot(of_seeds, found.items_se)
    # Satterthwaite's, those of many examples being without number.
    df = (found.n_seeds - 1) * (se / of_seeds) ** 4 if of_seeds else math.inf
    return equivalent(value, se, df, bound)


def _seeds_to_decide(contrast: PrimaryContrast, found: CostRatioAtSafety) -> int | None:
    """The fewer of the seeds that would see the measured difference, and that would refute the paper's size."""
    first, second = found.first_cost, found.second_cost
    if found.value is None or first is None or second is None or found.n_seeds < 2 or any(found.unbounded):
        return None
    assert found.seeds_sd is not None
    assert found.items_se is not None
    gaps = [first - contrast.seen_above * second, contrast.refuted_below * second - first]
    if max(found.seeds_sd, found.items_se) == 0:
        return None
    needed = [
        seeds_needed(gap, seeds_sd=found.seeds_sd, items_se=found.items_se, power=contrast.power)
        for gap in gaps
        if gap > 0
    ]
    return min((n for n in needed if n is not None), default=None)


def _ratio_words(finding: PrimaryFinding) -> str:
    contrast, found = finding.contrast, finding.found
    first, second = contrast.arms
    about = PURPOSES[finding.safety].shown
    at = f"{number(about.scale * found.target, f'.{about.digits}f')} {about.level}"
    items = " + ".join(f"{n:,}" for n in found.n_items)
    over = f"{counted(found.n_seeds, 'seed')}, {found.n_prompts:,} prompts, {items} items"
    head = f"Primary contrast of the recipe: at equal safety ({at})"
    if found.value is None:
        why = {
            "unreached": "an arm does not reach that safety in enough of the draws",
            "costless": f"{second} costs nothing that could be divided by",
            "undefined": "both arms may cost nothing",
        }.get(found.reason or "", "the costs do not vary")
        return f"{head}, {first} and {second} have no ratio of costs in {PAID[contrast.cost]}: {why}; {over}."
    ends = "no interval" if found.interval is None else f"95 % {_ends(found.interval)}"
    cost = PAID[contrast.cost]
    return f"{head}, {first} costs {number(found.value)} times what {second} does in {cost} ({ends}; {over})."


def _verdict_words(finding: PrimaryFinding) -> list[str]:
    contrast, found, verdict = finding.contrast, finding.found, finding.verdict
    first, second = contrast.arms
    words = []
    if verdict.is_seen:
        words.append(f"An effect is seen: the interval lies above {contrast.seen_above:g}.")
    if verdict.is_refuted:
        words.append(
            f"An effect of the paper's size is refuted at this scale: the interval lies below "
            f"{contrast.refuted_below:g}."
        )
    if verdict.is_undecided:
        more = "more prompts and items are needed before more seeds"
        if found.value is not None and any(found.unbounded):
            missing = [
                f"{arm} in {percent(share, 1)}"
                for arm, share, is_so in zip(contrast.arms, found.unreached_shares, found.unbounded, strict=True)
                if is_so
            ]
            more = (
                f"that safety is not reached by {' and '.join(missing)} of the draws of seeds and prompts, so a "
                "cost has no bound; more seeds and prompts, or a training that gains more, make such draws rarer"
            )
        elif finding.seeds_to_decide is not None:
            more = (
                f"about {counted(finding.seeds_to_decide, 'seed')} would decide it with a power of "
                f"{percent(contrast.power, 0)}, if the measured costs are the true ones"
            )
        elif found.value is None or found.n_seeds < 2:
            more = (
                "more seeds, or a training that costs something" if found.n_seeds > 1 else "a second seed comes first"
            )
        words.append(f"Undecided: neither an effect nor its absence is shown; {more}.")
    if finding.equivalence is not None:
        unit, bound = PURPOSES[contrast.cost].shown, contrast.equivalent_within
        assert bound is not None
        ends = _span(contrast, finding.equivalence.interval)
        are = "are" if finding.equivalence.is_equivalent else "are not shown to be"
        words.append(
            f"Arms {first} and {second} {are} equivalent within {_amount(contrast, bound)} {unit.change} (90 % {ends})."
        )
    return words


def _design_words(finding: PrimaryFinding) -> list[str]:
    contrast, found, design = finding.contrast, finding.found, finding.design
    difference, unit = found.difference, PURPOSES[contrast.cost].shown
    first, second = contrast.arms
    if difference.value is None or design is None:
        return []
    ends = "" if difference.interval is None else f" (95 % {_span(contrast, difference.interval)})"
    ratio = "" if design.ratio is None else f", a ratio of {number(design.ratio)}"
    assert found.seeds_sd is not None
    assert found.items_se is not None
    return [
        f"The difference, {first} minus {second}, is {_amount(contrast, difference.value, '+')} {unit.change}{ends}. "
        f"So many seeds and examples show a difference of {_amount(contrast, design.smallest)}{ratio}, with a power of "
        f"{percent(contrast.power, 0)} (spread over seeds {_amount(contrast, found.seeds_sd)}, over examples "
        f"{_amount(contrast, found.items_se)})."
    ]


def _amount(contrast: PrimaryContrast, value: float, sign: str = "") -> str:
    unit = PURPOSES[contrast.cost].shown
    return number(unit.scale * value, f"{sign}.{unit.digits}f")


def _span(contrast: PrimaryContrast, ends: tuple[float, float]) -> str:
    unit = PURPOSES[contrast.cost].shown
    if not all(map(math.isfinite, ends)):
        return _ends((unit.scale * ends[0], unit.scale * ends[1]))
    return span(unit.scale * ends[0], unit.scale * ends[1], f"+.{unit.digits}f")


def _ends(ends: tuple[float, float]) -> str:
    low, high = ("no bound" if math.isinf(end) else number(end) for end in ends)
    return f"{low} to {high}"
