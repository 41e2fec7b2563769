"""What a diagnosis measured, and the columns of the map for any weighting of its examples. Pure.

Shape letters: H head (all heads of the model in one axis), N example, C gradient chunk, R resample, D utility domain.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol, get_args

import numpy as np

from castune.config import Measure, SensitivityRank
from castune.diagnosis.score import Floats, combined, conflict_from_gram, conflict_score, functional_sensitivity

COLUMNS = ("optimization_conflict", "utility_shift", "safety_shift", "functional_sensitivity", "conflict_score")

Combination = Literal["mean", "worst"]


class PairedOutcomes(Protocol):
    """Outcomes of the examples of one set with the whole model and without each head; NaN is unscored."""

    @property
    def baseline_N(self) -> Floats: ...  # noqa: D102

    @property
    def ablated_HN(self) -> Floats: ...  # noqa: D102


class Domain(NamedTuple):
    """What was measured on one utility set.

    Attributes:
        gram_HCC: inner products of the partial gradients of each head, those of the safety loss first.
        utility: outcomes on the examples.
        measure: of these outcomes; None: that of the safety set.
    """

    gram_HCC: Floats
    utility: PairedOutcomes
    measure: Measure | None = None


class Weights(NamedTuple):
    """How often every example and every chunk counts, one row a resample; of utility, an array a domain."""

    utility_RN: Sequence[Floats]
    safety_RN: Floats
    utility_RC: Sequence[Floats]
    safety_RC: Floats

    @classmethod
    def of(cls, arrays: Sequence[Floats]) -> Weights:
        """From one array a set, in the order of `Measurements.sizes`."""
        n_domains = len(arrays) // 2 - 1
        return cls(arrays[:n_domains], arrays[n_domains], arrays[n_domains + 1 : -1], arrays[-1])


@dataclass(frozen=True, kw_only=True)
class Measurements:
    """What a diagnosis measured, before it is summed over examples.

    Args:
        domains: what was measured on each utility set, one of them or several.
        n_safety: how many of the partial gradients belong to the safety loss, the same ones in all domains.
        safety: outcomes on D_safe.
        measure: `decision` for 0/1 outcomes (NaN: unscored), `margin` for real ones; of the safety set, and of
            domains that name none.
        sensitivity_rank: see `functional_sensitivity`.
        combination: how several domains become one map, see `combined`.

    Raises:
        ValueError: shapes that do not fit, fewer than 2 examples or chunks of a set, unknown names, unscored margins.
    """

    domains: Sequence[Domain]
    n_safety: int
    safety: PairedOutcomes
    measure: Measure
    sensitivity_rank: SensitivityRank
    combination: Combination = "mean"

    def __post_init__(self) -> None:
        for name, kind in (("measure", Measure), ("sensitivity_rank", SensitivityRank), ("combination", Combination)):
            if getattr(self, name) not in get_args(kind):
                raise ValueError(f"{name} {getattr(self, name)!r}; accepted are {', '.join(get_args(kind))}")
        n_heads = len(self.domains[0].gram_HCC)
        for gram_HCC, *_ in self.domains:
            n_chunks = gram_HCC.shape[1]
            if gram_HCC.shape != (n_heads, n_chunks, n_chunks) or not 2 <= self.n_safety <= n_chunks - 2:
                raise ValueError(
                    f"gram_HCC of shape {gram_HCC.shape}, {self.n_safety} of {n_chunks} chunks are of the safety loss; "
                    f"needed are {n_heads} heads and at least 2 chunks of each set"
                )
        sets = [("utility", domain.utility, domain.measure) for domain in self.domains]
        for name, outcomes, measure in (*sets, ("safety", self.safety, None)):
            n_examples = len(outcomes.baseline_N)
            if n_examples < 2 or outcomes.ablated_HN.shape != (n_heads, n_examples):
                raise ValueError(
                    f"{name}: {n_examples} examples, ablated_HN of shape {outcomes.ablated_HN.shape}; needed are at "
                    f"least 2 examples and shape {(n_heads, n_examples)}"
                )
            is_margin = (measure or self.measure) != "decision"
            if is_margin and not np.isfinite(self._changes(outcomes, measure)).all():
                raise ValueError(f"{name}: margins that are not finite; no map is made of them")

    @property
    def sizes(self) -> list[int]:
        """Size of every set that is resampled: examples of utility, of safety, chunks of utility, of safety."""
        examples = [len(domain.utility.baseline_N) for domain in self.domains]
        chunks = [domain.gram_HCC.shape[1] - self.n_safety for domain in self.domains]
        return [*examples, len(self.safety.baseline_N), *chunks, self.n_safety]

    @property
    def whole(self) -> Weights:
        """Every example and every chunk once: the map itself, as the only resample."""
        return Weights.of([np.ones((1, size)) for size in self.sizes])

    def columns(self, weights: Weights, *, drawn: bool = False) -> dict[str, Floats]:
        """O, H_gen, H_safe, S and C of every head in every resample (Eqs. 2-6); of several domains, combined.

        The safety examples and chunks of a resample are those of all domains.

        Args:
            weights: of the resamples.
            drawn: the weights are counts of draws with replacement, and the columns are for intervals. O and C are
                then without what draws add to the length of a gradient (`weighted_conflict`). The shifts of decisions
                keep their sign, taken so that the domains of the whole map have one sign on a head: their absolute
                values would never be near zero, and without one sign domains would cancel.

        Returns:
            For each of `COLUMNS` an array [R, H]. NaN where none of a head's scored examples has a weight; S ranks
            the other heads among themselves.
        """
        safety_RH = _weighted_mean(self._changes(self.safety), weights.safety_RN)
        rows: list[dict[str, Floats]] = []
        for domain, sign_H, utility_RN, utility_RC in zip(
            self.domains, self._signs(), weights.utility_RN, weights.utility_RC, strict=True
        ):
            conflict_RH = weighted_conflict(domain.gram_HCC, self.n_safety, weights.safety_RC, utility_RC, drawn=drawn)
            utility_RH = _weighted_mean(self._changes(domain.utility, domain.measure), utility_RN)
            sensitivity_RH = _sensitivity(np.abs(utility_RH), np.abs(safety_RH), self.sensitivity_rank)
            shifts = (utility_RH * sign_H, safety_RH) if drawn else (np.abs(utility_RH), np.abs(safety_RH))
            score_RH = conflict_score(conflict_RH, sensitivity_RH)
            rows.append(dict(zip(COLUMNS, (conflict_RH, *shifts, sensitivity_RH, score_RH), strict=True)))
        score_DRH = np.stack([row["conflict_score"] for row in rows])
        found = {name: combined(np.stack([r[name] for r in rows]), score_DRH, self.combination) for name in COLUMNS}
        # All domains have it in common: a mean would add nothing but a rounding error.
        return {**found, "safety_shift": rows[0]["safety_shift"]}

    def _signs(self) -> list[Floats]:
        """Whether a head's mean change on each domain has the sign of that on the first one: 1 or -1, [H] each."""
        changes = [self._changes(domain.utility, domain.measure) for domain in self.domains]
        signs = [np.where(_weighted_mean(c_HN, np.ones((1, c_HN.shape[1])))[0] < 0, -1.0, 1.0) for c_HN in changes]
        return [sign_H * signs[0] for sign_H in signs]

    def _changes(self, outcomes: PairedOutcomes, measure: Measure | None = None) -> Floats:
        change_HN = np.asarray(outcomes.ablated_HN - outcomes.baseline_N, dtype=np.float64)
        return change_HN if (measure or self.measure) == "decision" else np.abs(change_HN)


def weighted_conflict(
    gram_HCC: Floats, n_safety: int, safety_RC: Floats, utility_RC: Floats, *, drawn: bool = False
) -> Floats:
    """O(h) with every chunk counted as often as its weight tells (Eq. 2).

    With g = sum of w_c g_c, the inner products of the two gradients are w_s' G_su w_u, w_s' G_ss w_s, w_u' G_uu w_u.

    Args:
        gram_HCC: see `conflict_from_gram`.
        n_safety: how many of the chunks belong to the safety loss.
        safety_RC: weights of the safety chunks, one row a resample.
        utility_RC: weights of the utility chunks.
        drawn: the weights are counts of C draws with replacement. Such draws add as much noise to a gradient as it
            has already, which makes it longer: the mean of w'Gw is 1'G1 + tr G - 1'G1 / C, and O would be drawn
            towards 0.5. The excess is taken off the squared lengths.

    Returns:
        O(h) in [0, 1], [R, H]; 0.5 where the excess is more than a length.
    """
    safety, utility = slice(None, n_safety), slice(n_safety, None)
    square_safety_RH = _weighted_products(gram_HCC[:, safety, safety], safety_RC, safety_RC, drawn)
    square_utility_RH = _weighted_products(gram_HCC[:, utility, utility], utility_RC, utility_RC, drawn)
    dot_RH = _weighted_products(gram_HCC[:, safety, utility], safety_RC, utility_RC)
    # Each set is one partial gradient now. A product of two negative squares must not pass for a length.
    gram_RH4 = np.stack([np.maximum(square_safety_RH, 0), dot_RH, dot_RH, np.maximum(square_utility_RH, 0)], axis=-1)
    return conflict_from_gram(gram_RH4.reshape(-1, 2, 2), 1).reshape(dot_RH.shape)


def _weighted_products(gram_HAB: Floats, left_RA: Floats, right_RB: Floats, drawn: bool = False) -> Floats:
    """Left' G right for every resample and head."""
    pairs_RAB = left_RA[:, :, None] * right_RB[:, None, :]
    if drawn:  # <1 - 11' / C, G> is the excess tr G - 1'G1 / C.
        pairs_RAB -= np.eye(pairs_RAB.shape[1]) - 1 / pairs_RAB.shape[1]
    return _sums(pairs_RAB.reshape(len(pairs_RAB), -1), gram_HAB.reshape(len(gram_HAB), -1))


def _weighted_mean(change_HN: Floats, weights_RN: Floats) -> Floats:
    """Weighted mean over the examples that are not NaN, [R, H]; NaN where none of them has a weight."""
    scored_HN = np.isfinite(change_HN)
    sum_RH = _sums(weights_RN, np.where(scored_HN, change_HN, 0))
    count_RH = _sums(weights_RN, scored_HN.astype(np.float64))
    return np.divide(sum_RH, count_RH, out=np.full_like(sum_RH, np.nan), where=count_RH > 0)


def _sums(weights_RX: Floats, values_HX: Floats) -> Floats:
    """Weighted sums of every head in every resample, [R, H]."""
    # Not a BLAS product, which rounds by a head's place in the array: equal heads would no longer tie.
    return np.asarray(np.einsum("rx,hx->rh", weights_RX, np.ascontiguousarray(values_HX, dtype=np.float64)))


def _sensitivity(utility_RH: Floats, safety_RH: Floats, rank: SensitivityRank) -> Floats:
    measured_RH = np.isfinite(utility_RH) & np.isfinite(safety_RH)
    if measured_RH.all():
        return functional_sensitivity(utility_RH, safety_RH, rank=rank)
    sensitivity_RH = np.full(utility_RH.shape, np.nan)
    # Heads that could not be measured leave the others fewer to be ranked among.
    for row, measured_H in enumerate(measured_RH):
        if measured_H.any():
            sensitivity_RH[row, measured_H] = functional_sensitivity(
                utility_RH[row, measured_H], safety_RH[row, measured_H], rank=rank
            )
    return sensitivity_RH
