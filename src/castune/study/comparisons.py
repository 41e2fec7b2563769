"""Two arms over seeds and examples: is one better, and would it be so on other seeds and other examples? Pure.

Shape letters: T seed of a training, N example.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from castune.study.distributions import Interval, student_p, student_quantile

Floats = NDArray[np.float64]
# Of every seed, the outcomes of the same examples in the same order: 1, 0, or None where unscored.
Outcomes = Mapping[int, Sequence[float | bool | None]]


@dataclass(frozen=True)
class Comparison:
    """Mean difference of two arms, first minus second, in the unit of the outcomes.

    Attributes:
        value: None without an example scored by both arms under every seed.
        interval: 95 %, for other seeds and other examples; None with one seed (nothing tells what another would do),
            one example, or no difference at all: what did not occur cannot show how often it would.
        over_seeds: 95 % for other seeds on these examples: t over the seeds' mean differences, with T - 1 degrees of
            freedom (2 of 3 seeds: 4.30 standard errors).
        over_examples: 95 % for other examples of these trained models: t over the examples' mean differences.
        wider: which of the two is wider, `seeds` or `examples`; None where one is missing.
        df: Satterthwaite's degrees of freedom of the variance over seeds and examples together.
        p: two-sided p-value that belongs to `interval`: below 0.05 where it excludes 0.
        p_adjusted: Holm's, over all comparisons made together; p where there is one.
        n_comparisons: how many were made together.
        per_seed: mean difference of every seed.
        n_seeds: seeds.
        n_examples: examples that both arms have a score for under every seed.
        n_unscored: examples left out.
    """

    value: float | None
    interval: Interval | None
    over_seeds: Interval | None
    over_examples: Interval | None
    wider: str | None
    df: float | None
    p: float | None
    p_adjusted: float | None
    n_comparisons: int
    per_seed: dict[int, float]
    n_seeds: int
    n_examples: int
    n_unscored: int


def compare(first: Outcomes, second: Outcomes) -> Comparison:
    """Difference of two arms, paired by seed and example.

    The difference of seed t and example n is mean + seed effect + example effect + rest, both effects random and
    crossed. With V_T and V_N the variances of the mean of seed means and of example means, and V_R that of the rest,
    the variance of the grand mean is V_T + V_N - V_R, for each of the first two counts the rest once (two-way analysis
    of variance). It is taken as at least V_N: V_T of three seeds may be small by chance. Degrees of freedom after
    Satterthwaite (1946), which promise a little too much where both matter and seeds are few: so the interval is never
    narrower than that over seeds or that over examples.

    Args:
        first: of every seed, outcomes of N examples under one arm.
        second: the same seeds and the same examples under the other.

    Raises:
        ValueError: seeds or numbers of examples differ, or an outcome is not finite.
    """
    difference_TN, seeds, n_unscored = _differences(first, second)
    n_seeds, n_examples = difference_TN.shape
    if n_seeds == 0 or n_examples == 0:
        return Comparison(None, None, None, None, None, None, None, None, 1, {}, n_seeds, n_examples, n_unscored)
    mean, seed_T, example_N = float(difference_TN.mean()), difference_TN.mean(1), difference_TN.mean(0)
    per_seed = {seed: float(value) for seed, value in zip(seeds, seed_T, strict=True)}
    if not difference_TN.any():
        return Comparison(mean, None, None, None, None, None, None, None, 1, per_seed, n_seeds, n_examples, n_unscored)
    variance_T, variance_N = _variance_of_mean(seed_T), _variance_of_mean(example_N)
    over_seeds = None if variance_T is None else _interval(mean, variance_T, n_seeds - 1)
    over_examples = None if variance_N is None else _interval(mean, variance_N, n_examples - 1)
    interval = wider = df = p = None
    if variance_T is not None and variance_N is not None and over_seeds and over_examples:
        rest_TN = difference_TN - seed_T[:, None] - example_N + mean
        variance_R = float((rest_TN**2).sum()) / ((n_seeds - 1) * (n_examples - 1) * n_seeds * n_examples)
        variance = max(variance_N, variance_T + variance_N - variance_R)
        df = _degrees(variance, variance_T, variance_N, n_seeds, n_examples)
        parts = ((variance, df), (variance_T, n_seeds - 1), (variance_N, n_examples - 1))
        interval = max((_interval(mean, *part) for part in parts), key=lambda found: found.high - found.low)
        p = max(student_p(mean / math.sqrt(part), degrees) if part > 0 else 0.0 for part, degrees in parts)
        wider = "seeds" if over_seeds.high - over_seeds.low >= over_examples.high - over_examples.low else "examples"
    return Comparison(
        mean, interval, over_seeds, over_examples, wider, df, p, p, 1, per_seed, n_seeds, n_examples, n_unscored
    )


def compare_with(one: Outcomes, others: Mapping[str, Outcomes]) -> dict[str, Comparison]:
    """Every other arm against one, other minus one, with p-values that Holm adjusted for their number."""
    found = {name: compare(outcomes, one) for name, outcomes in others.items()}
    adjusted = holm([comparison.p for comparison in found.values()])
    return {
        name: Comparison(**{**vars(comparison), "p_adjusted": p, "n_comparisons": len(found)})
        for (name, comparison), p in zip(found.items(), adjusted, strict=True)
    }


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Holm's adjusted p-values (1979); None, where nothing could be tested, stays None and still counts as one.

    Raises:
        ValueError: a p-value outside [0, 1].
    """
    known = [(p, place) for place, p in enumerate(p_values) if p is not None]
    if not all(0 <= p <= 1 for p, _ in known):
        raise ValueError(f"p-values are {list(p_values)}, accepted: 0 to 1, or None")
    adjusted: list[float | None] = [None] * len(p_values)
    largest = 0.0
    for rank, (p, place) in enumerate(sorted(known)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p))
        adjusted[place] = largest
    return adjusted


def _differences(first: Outcomes, second: Outcomes) -> tuple[Floats, list[int], int]:
    """Differences [T, N] of the examples that have a score throughout, the seeds, and how many were left out."""
    seeds = sorted(first)
    if seeds != sorted(second):
        raise ValueError(f"the arms have different seeds: {seeds} and {sorted(second)}")
    sizes = {len(outcomes[seed]) for outcomes in (first, second) for seed in seeds}
    if len(sizes) > 1:
        raise ValueError(f"numbers of examples differ: {sorted(sizes)}; both arms need the same under every seed")
    n = sizes.pop() if sizes else 0
    sides = []
    for outcomes in (first, second):
        rows = [[math.nan if value is None else float(value) for value in outcomes[seed]] for seed in seeds]
        given = [value for seed in seeds for value in outcomes[seed] if value is not None]
        if not np.isfinite(np.array(given, dtype=float)).all():
            raise ValueError("outcomes must be finite; one that could not be scored is None")
        sides.append(np.array(rows).reshape(len(seeds), n))
    difference_TN = sides[0] - sides[1]
    scored_N = np.isfinite(difference_TN).all(0) if seeds else np.zeros(n, dtype=bool)
    return difference_TN[:, scored_N], seeds, n - int(scored_N.sum())


def _variance_of_mean(values: Floats) -> float | None:
    return float(values.var(ddof=1)) / len(values) if len(values) > 1 else None


def _interval(mean: float, variance: float, df: float) -> Interval:
    half = student_quantile(df) * math.sqrt(variance)
    return Interval(mean - half, mean + half)


def _degrees(variance: float, variance_T: float, variance_N: float, n_seeds: int, n_examples: int) -> float:
    """Satterthwaite's degrees of freedom of the sum, between those of the seeds and those of the examples."""
    spread = variance_T**2 / (n_seeds - 1) + variance_N**2 / (n_examples - 1)
    fewest, most = sorted((n_seeds - 1, n_examples - 1))
    return float(min(max(variance**2 / spread, fewest), most)) if spread > 0 else float(fewest)
