"""A study in words that follow from its intervals and from nothing else. Pure.

Every sentence names what was counted: arms, seeds, examples, comparisons, and how many costs are undefined. An effect
is claimed only where the interval excludes none at all; "no difference seen" never means that there is none.
"""

from __future__ import annotations

from collections.abc import Mapping

from castune.core.numbers import counted, number, p_value, span
from castune.purposes import Purpose
from castune.stats.comparisons import Comparison
from castune.stats.distributions import LEVEL, Interval
from castune.stats.nulls import NullPosition
from castune.stats.validity import Validity


def verdict(
    found: Validity,
    *,
    score: str = "C",
    cost: str = "cost",
    why_undefined: Mapping[str, int] | None = None,
    p_adjusted: float | None = None,
    n_comparisons: int = 1,
) -> str:
    """What a correlation of score and cost says.

    Two intervals decide: that of training the same arms again, and that of other arms. If only the first excludes 0, or
    too many orders of the arms do as well by chance, the relation is one of these arms; if the first is unknown (one
    seed, no errors) nothing is claimed.

    Args:
        found: see `castune.stats.validity.predictive_validity`.
        score: name of the score.
        cost: name of the cost.
        why_undefined: why costs are undefined, and of how many trials; for safety did not rise when absent.
        p_adjusted: the permutation p-value of r after `holm`, where several scores or costs were tried.
        n_comparisons: how many were tried together.
    """
    r, over = found.of_means.pearson, f"{counted(found.n_arms, 'arm')} over {counted(found.n_seeds, 'seed')}"
    n_defined = found.n_trials - found.n_undefined
    if n_defined != found.n_arms * found.n_seeds:
        over += f", {counted(n_defined, 'training')}"
    reasons = {"safety did not rise": found.n_undefined} if why_undefined is None else why_undefined
    left_out = _left_out(reasons, found.n_trials, cost)
    if r is None:
        why = left_out or "score or cost does not vary"
        return f"Not measurable: {why}. Left: {over}."
    tail = f" {left_out[0].upper()}{left_out[1:]}; those trials are left out." if left_out else ""
    shown = f"r = {number(r)}"
    if found.retrained is None:
        few = "fewer than 3 arms" if found.n_arms < 3 else "one training run per arm and no errors of the costs"
        return f"No relation can be claimed from {few}: {shown}, {over}.{tail}"
    again, others = _interval(found.retrained), found.other_arms
    if not found.counts_examples:
        again += ", on the same examples"
    p = found.of_means.pearson_p if p_adjusted is None else p_adjusted
    tried = "permuting arms" if n_comparisons == 1 else f"permuting arms, of {n_comparisons} comparisons (Holm)"
    over += f"; {'no p' if p is None else f'p {p_value(p)}'} by {tried}"
    way = "higher" if r > 0 else "lower"
    if found.retrained.holds(0):
        return f"No relation seen at this n: {shown} ({again}), {over}.{tail}"
    if others is None or others.holds(0) or p is None or p >= LEVEL:
        of_others = f" ({_interval(others)})" if others else ""
        return (
            f"In these arms higher {score} goes with {way} {cost}: {shown} ({again}), {over}; they are too few "
            f"to say so of others{of_others}.{tail}"
        )
    return (
        f"Higher {score} goes with {way} {cost}: {shown} ({again} for these arms trained again, {_interval(others)} "
        f"for others like them), {over}.{tail}"
    )


def comparison_verdict(found: Comparison, *, first: str, second: str, about: Purpose) -> str:
    """What the comparison of two arms says.

    Args:
        found: see `castune.stats.comparisons.compare`; its sign is first minus second.
        first: name of the first arm.
        second: name of the second.
        about: what the outcomes are.
    """
    metric, shown = about.phrase, about.shown
    unscored = f", {found.n_unscored} left out as unscored" if found.n_unscored else ""
    if found.n_seeds_unscored:
        unscored += f", {counted(found.n_seeds_unscored, 'seed')} left out with nothing scored"
    over = f"{counted(found.n_seeds, 'seed')}, {counted(found.n_examples, 'example')}{unscored}"
    if found.value is None:
        return f"Not measurable: not every suite has an example with a score under both {first} and {second} ({over})."
    pattern = f"+.{shown.digits}f"
    change = f"{number(shown.scale * found.value, pattern)} {shown.change}"
    if found.interval is None:
        if found.n_seeds > 1 and found.value == 0 and found.over_seeds is None:
            return f"No outcome differs between {first} and {second} in {metric}: {over}."
        return f"No difference can be claimed from so little: {metric}, {first} minus {second}, {change} ({over})."
    told = f"{change} ({_interval(found.interval, shown.scale, pattern)})"
    many = ""
    if found.n_comparisons > 1 and found.p_adjusted is not None:
        many = f", p {p_value(found.p_adjusted)} after Holm over {found.n_comparisons} comparisons"
    wider = f"; {found.wider} leave more doubt than {'examples' if found.wider == 'seeds' else 'seeds'}"
    if not found.is_seen:
        return f"No difference seen at this n: {metric}, {first} minus {second}, {told}{many}; {over}{wider}."
    side = "higher" if found.value > 0 else "lower"
    return f"{metric[0].upper()}{metric[1:]} is {side} under {first} than under {second}: {told}{many}; {over}{wider}."


def unseen_verdict(found: Mapping[str, Comparison], *, second: str, about: Purpose) -> str:
    """What several comparisons with one arm say of which none is seen, in one sentence.

    Args:
        found: by the name of the first arm; each has an interval.
        second: name of the arm that they are compared with.
        about: what the outcomes are.
    """
    scale, pattern = about.shown.scale, f"+.{about.shown.digits}f"
    intervals = [one.interval for one in found.values() if one.interval is not None]
    low, high = min(one.low for one in intervals), max(one.high for one in intervals)
    values = sorted(one.value for one in found.values() if one.value is not None)
    first = next(iter(found.values()))
    many = f", {first.n_comparisons} comparisons (Holm)" if first.n_comparisons > 1 else ""
    counts = sorted({one.n_examples for one in found.values()})
    examples = f"{counts[0]:,} examples" if len(counts) == 1 else f"{counts[0]:,} to {counts[-1]:,} examples"
    ends = scale * values[0], scale * values[-1]
    changes = span(*ends, pattern) if len(values) > 1 else number(ends[0], pattern)
    n_seeds = max(one.n_seeds for one in found.values())
    left_out = "".join(
        f", {counted(one.n_seeds_unscored, 'seed')} of {arm} left out with nothing scored"
        for arm, one in found.items()
        if one.n_seeds_unscored
    )
    return (
        f"No difference seen at this n: {about.phrase}, {', '.join(found)} against {second}: {changes} "
        f"{about.shown.change}, 95 % intervals from {span(scale * low, scale * high, pattern)}; "
        f"{counted(n_seeds, 'seed')}, {examples}{left_out}{many}."
    )


def null_verdict(
    found: NullPosition,
    *,
    zone: str,
    cost: str = "cost",
    p_adjusted: float | None = None,
    p_unusual_adjusted: float | None = None,
    n_comparisons: int = 1,
) -> str:
    """What the place of a zone among random selections says.

    Over several seeds a difference from random heads is one thing, and that few random selections have it another: the
    zone has the same heads with every seed, and any heads cost what they cost again. Each is claimed by its own p.

    Args:
        found: see `castune.stats.nulls.null_position`.
        zone: name of the zone.
        cost: name of the cost.
        p_adjusted: its `p` after `holm`, where several zones or costs were tried.
        p_unusual_adjusted: its `p_unusual` after `holm`.
        n_comparisons: how many were tried together.
    """
    left_out = _null_left_out(found, zone, cost)
    if found.p is None or found.p_least is None or found.p_unusual is None:
        which = "no random selection" if found.n_seeds_left_out == 0 else f"the {zone} zone"
        verb = "with a" if found.n_seeds_left_out == 0 else "has no"
        return f"Not measurable: {which} {verb} defined {cost}.{left_out}"
    p, p_unusual = found.p, found.p_unusual
    holm = ""
    if n_comparisons > 1 and p_adjusted is not None and p_unusual_adjusted is not None:
        p, p_unusual = p_adjusted, p_unusual_adjusted
        holm = f" after Holm over {n_comparisons} comparisons"
    told = f"{_null_counts(found)}, p {p_value(p)}{holm}{_null_gainless(found)}"
    if p >= LEVEL:
        floor = min(1.0, n_comparisons * found.p_least)
        few = f" {found.n} cannot show more than p {p_value(floor)}." if floor >= LEVEL else ""
        return f"The {zone} zone cannot be told from random heads at this n: {told}.{few}{left_out}"
    side = "more" if found.lower > found.higher else "less"
    if found.n_seeds == 1:
        return f"The {zone} zone costs {side} than random heads: {told}.{left_out}"
    if p_unusual < LEVEL:
        rare = f"Few random selections would: p {p_value(p_unusual)}{holm}."
        return f"The {zone} zone costs {side} than random heads: {told}. {rare}{left_out}"
    floor = min(1.0, n_comparisons * 2 / (found.n + 1))
    few = f"; {found.n} cannot show more than p {p_value(floor)}" if floor >= LEVEL else ""
    rare = f"That few random selections would is not shown: p {p_value(p_unusual)}{holm}{few}."
    return f"The {zone} zone costs {side} than random heads typically do: {told}. {rare}{left_out}"


def _null_counts(found: NullPosition) -> str:
    """How many random selections cost less and more, and how sure that is."""
    counts = f"{found.lower} of {counted(found.n, 'random selection')} cost less, {found.higher} more"
    if found.interval is not None:
        return f"{counts} (share that costs less: {_interval(found.interval, 100, '.0f')} %)"
    return f"{counts}, each beside the zone trained with its seed ({counted(found.n_seeds, 'seed')})"


def _null_gainless(found: NullPosition) -> str:
    """Which trainings gained no safety, so that their cost has no bound."""
    told = f"; {found.n_gainless} of them gained no safety at all and cost the most" if found.n_gainless else ""
    if found.n_seeds_gainless:
        told += f"; the zone gained none in {found.n_seeds_gainless} of {counted(found.n_seeds, 'seed')}"
    return told


def _null_left_out(found: NullPosition, zone: str, cost: str) -> str:
    """What nothing is known of."""
    told = f" Of {found.n_undefined} more the {cost} is undefined." if found.n_undefined else ""
    if found.n and found.n_seeds_left_out:
        seeds = counted(found.n_seeds + found.n_seeds_left_out, "seed")
        told += f" In {found.n_seeds_left_out} of {seeds} the {cost} of the {zone} zone is undefined."
    return told


def _left_out(reasons: Mapping[str, int], n_trials: int, cost: str) -> str:
    (first, n), *others = [(why, n) for why, n in reasons.items() if n] or [("", 0)]
    if not n:
        return "" if n_trials else "there are no trials"
    more = "".join(f" and in {n_others} {why}" for why, n_others in others)
    return f"in {n} of {counted(n_trials, 'trial')} {first}{more}, so the {cost} is undefined"


def _interval(interval: Interval, scale: float = 1, pattern: str = ".2f") -> str:
    return f"95 % {span(scale * interval.low, scale * interval.high, pattern)}"
