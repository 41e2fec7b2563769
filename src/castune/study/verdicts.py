"""A study in words that follow from its intervals and from nothing else. Pure.

Every sentence names what was counted: arms, seeds, examples, comparisons, and how many costs are undefined. An effect
is claimed only where the interval excludes none at all; "no difference seen" never means that there is none.
"""

from __future__ import annotations

from collections.abc import Mapping

from castune.stats.comparisons import Comparison
from castune.stats.distributions import Interval
from castune.stats.nulls import NullPosition
from castune.stats.validity import Validity


def verdict(
    found: Validity,
    *,
    score: str = "C",
    cost: str = "cost",
    why_undefined: str = "safety did not rise",
    p_adjusted: float | None = None,
    n_comparisons: int = 1,
    level: float = 0.05,
) -> str:
    """What a correlation of score and cost says.

    Two intervals decide: that of training the same arms again, and that of other arms. If only the first excludes 0, or
    too many orders of the arms do as well by chance, the relation is one of these arms; if the first is unknown (one
    seed, no errors) nothing is claimed.

    Args:
        found: see `castune.stats.validity.predictive_validity`.
        score: name of the score.
        cost: name of the cost.
        why_undefined: why a cost is undefined where it is.
        p_adjusted: the permutation p-value of r after `holm`, where several scores or costs were tried.
        n_comparisons: how many were tried together.
        level: of that p-value from which on nothing is said of other arms.
    """
    r, over = found.of_means.pearson, f"{_count(found.n_arms, 'arm')} over {_count(found.n_seeds, 'seed')}"
    n_defined = found.n_trials - found.n_undefined
    if n_defined != found.n_arms * found.n_seeds:
        over += f", {_count(n_defined, 'training')}"
    left_out = _left_out(found.n_undefined, found.n_trials, cost, why_undefined)
    if r is None:
        why = left_out or "score or cost does not vary"
        return f"Not measurable: {why}. Left: {over}."
    tail = f" {left_out[0].upper()}{left_out[1:]}; those trials are left out." if left_out else ""
    number = f"r = {_number(r)}"
    if found.retrained is None:
        few = "fewer than 3 arms" if found.n_arms < 3 else "one training an arm and no errors of the costs"
        return f"No relation can be claimed from {few}: {number}, {over}.{tail}"
    again, others = _interval(found.retrained), found.other_arms
    if not found.counts_examples:
        again += ", on the same examples"
    p = found.of_means.pearson_p if p_adjusted is None else p_adjusted
    tried = "permuting arms" if n_comparisons == 1 else f"permuting arms, of {n_comparisons} comparisons (Holm)"
    over += f"; {'no p' if p is None else _p(p)} by {tried}"
    way = "higher" if r > 0 else "lower"
    if found.retrained.holds(0):
        return f"No relation seen at this n: {number} ({again}), {over}.{tail}"
    if others is None or others.holds(0) or p is None or p >= level:
        of_others = f" ({_interval(others)})" if others else ""
        return (
            f"In these arms higher {score} goes with {way} {cost}: {number} ({again}), {over}; they are too few "
            f"to say so of others{of_others}.{tail}"
        )
    return (
        f"Higher {score} goes with {way} {cost}: {number} ({again} for these arms trained again, {_interval(others)} "
        f"for others like them), {over}.{tail}"
    )


def comparison_verdict(
    found: Comparison, *, first: str, second: str, metric: str, percent: bool = True, level: float = 0.05
) -> str:
    """What the comparison of two arms says.

    Args:
        found: see `castune.stats.comparisons.compare`; its sign is first minus second.
        first: name of the first arm.
        second: name of the second.
        metric: what the outcomes count.
        percent: outcomes are rates, shown in points.
        level: of the adjusted p-value above which no difference is claimed.
    """
    unscored = f", {found.n_unscored} left out as unscored" if found.n_unscored else ""
    over = f"{_count(found.n_seeds, 'seed')}, {_count(found.n_examples, 'example')}{unscored}"
    if found.value is None:
        return f"Not measurable: not every suite has an example with a score under both {first} and {second} ({over})."
    scale, unit = (100, " points") if percent else (1, "")
    number = f"{_number(scale * found.value, '+.1f' if percent else '+.3g')}{unit}"
    if found.interval is None:
        if found.n_seeds > 1 and found.value == 0 and found.over_seeds is None:
            return f"No outcome differs between {first} and {second} in {metric}: {over}."
        return f"No difference can be claimed from so little: {metric}, {first} minus {second}, {number} ({over})."
    shown = f"{number} ({_interval(found.interval, scale, '+.1f' if percent else '+.3g')})"
    many = ""
    if found.n_comparisons > 1 and found.p_adjusted is not None:
        many = f", {_p(found.p_adjusted)} after Holm over {found.n_comparisons} comparisons"
    wider = f"; {found.wider} leave more doubt than {'examples' if found.wider == 'seeds' else 'seeds'}"
    if not is_seen(found, level=level):
        return f"No difference seen at this n: {metric}, {first} minus {second}, {shown}{many}; {over}{wider}."
    side = "higher" if found.value > 0 else "lower"
    return f"{metric[0].upper()}{metric[1:]} is {side} under {first} than under {second}: {shown}{many}; {over}{wider}."


def is_seen(found: Comparison, *, level: float = 0.05) -> bool:
    """Whether a difference is claimed: its interval excludes 0, and its adjusted p-value is below the level."""
    adjusted = found.p if found.p_adjusted is None else found.p_adjusted
    return found.interval is not None and not found.interval.holds(0) and adjusted is not None and adjusted < level


def unseen_verdict(found: Mapping[str, Comparison], *, second: str, metric: str) -> str:
    """What several comparisons with one arm say of which none is seen, in one sentence.

    Args:
        found: by the name of the first arm; each has an interval.
        second: name of the arm that they are compared with.
        metric: what the outcomes count, as rates.
    """
    intervals = [one.interval for one in found.values() if one.interval is not None]
    low, high = min(one.low for one in intervals), max(one.high for one in intervals)
    values = sorted(one.value for one in found.values() if one.value is not None)
    first = next(iter(found.values()))
    many = f", {first.n_comparisons} comparisons (Holm)" if first.n_comparisons > 1 else ""
    counts = sorted({one.n_examples for one in found.values()})
    examples = f"{counts[0]:,} examples" if len(counts) == 1 else f"{counts[0]:,} to {counts[-1]:,} examples"
    shown = [_number(100 * value, "+.1f") for value in (values[0], values[-1], low, high)]
    between = shown[0] if len(values) == 1 else f"{shown[0]} to {shown[1]}"
    counted = f"{_count(max(one.n_seeds for one in found.values()), 'seed')}, {examples}{many}"
    return (
        f"No difference seen at this n: {metric}, {', '.join(found)} against {second}: {between} points, "
        f"95 % intervals from {shown[2]} to {shown[3]}; {counted}."
    )


def null_verdict(
    found: NullPosition,
    *,
    zone: str,
    cost: str = "cost",
    p_adjusted: float | None = None,
    n_comparisons: int = 1,
    level: float = 0.05,
) -> str:
    """What the place of a zone among random selections says.

    Args:
        found: see `castune.stats.nulls.null_position`.
        zone: name of the zone.
        cost: name of the cost.
        p_adjusted: the two-sided p-value after `holm`, where several zones or costs were tried.
        n_comparisons: how many were tried together.
        level: of that p-value above which nothing is claimed.
    """
    undefined = f" Of {found.n_undefined} more the {cost} is undefined." if found.n_undefined else ""
    if found.percentile is None or found.p is None or found.interval is None:
        which = "no random selection" if found.n == 0 else f"the {zone} zone"
        verb = "has" if found.n else "with"
        tail = " no defined" if found.n else " a defined"
        return f"Not measurable: {which} {verb}{tail} {cost}.{undefined}"
    counted = (
        f"{found.lower} of {_count(found.n, 'random selection')} cost less, {found.higher} more "
        f"(share that costs less: {_interval(found.interval, 100, '.0f')} %)"
    )
    p = found.p
    if n_comparisons > 1 and p_adjusted is not None:
        p = p_adjusted
        counted += f", {_p(p)} after Holm over {n_comparisons} comparisons"
    else:
        counted += f", {_p(p)}"
    if found.n_gainless:
        counted += f"; {found.n_gainless} of them gained no safety at all and cost the most"
    if p >= level:
        floor = min(1.0, n_comparisons * 2 / (found.n + 1))
        few = f" {found.n} cannot show more than {_p(floor)}." if floor >= level else ""
        return f"The {zone} zone is not told from random heads at this n: {counted}.{few}{undefined}"
    side = "more" if found.lower > found.higher else "less"
    return f"The {zone} zone costs {side} than random heads: {counted}.{undefined}"


def _left_out(n_undefined: int, n_trials: int, cost: str, why: str) -> str:
    if not n_undefined:
        return "" if n_trials else "there are no trials"
    return f"in {n_undefined} of {_count(n_trials, 'trial')} {why}, so the {cost} is undefined"


def _interval(interval: Interval, scale: float = 1, pattern: str = ".2f") -> str:
    return f"95 % {_number(scale * interval.low, pattern)} to {_number(scale * interval.high, pattern)}"


def _number(value: float, pattern: str = ".2f") -> str:
    text = format(value, pattern)
    # Rounding may leave "-0.0"; a zero has no sign here.
    return (text.lstrip("+-") if float(text) == 0 else text).replace("-", "−")


def _p(p: float) -> str:
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}"


def _count(n: int, noun: str) -> str:
    return f"{n:,} {noun}{'' if n == 1 else 's'}"
