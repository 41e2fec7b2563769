"""From what was measured to conflict maps: one a utility domain, and of several the combined one.

Shape letters: D utility domain, H head (all heads of the model in one axis), N example.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from castune.artifacts import ConflictMap, Unit
from castune.artifacts.conflict_map import MAGNITUDE, SCHEMA
from castune.artifacts.records import DataRecord
from castune.config import DiagnoseConfig
from castune.diagnosis.checking import Checked
from castune.diagnosis.domains import UtilitySet, utility_hash
from castune.diagnosis.fidelity import compared
from castune.diagnosis.grams import Gram
from castune.diagnosis.measurements import Domain, Measurements
from castune.diagnosis.objectives import Measured
from castune.diagnosis.reliability import reliability, spearman
from castune.diagnosis.score import (
    Floats,
    combined,
    conflict_from_gram,
    conflict_magnitude,
    conflict_score,
    conflict_standard_error,
    functional_sensitivity,
    shift_of,
)
from castune.diagnosis.zones import safe_border
from castune.errors import CastuneError
from castune.names import kind_words
from castune.stats.ranking import bucket_numbers, percentile_rank, tie_share

# What is told of each kind of unit.
_BY_KIND = ("ties", "reliability", "fidelity", "standing")


@dataclass(frozen=True, kw_only=True)
class Results:
    """What a diagnosis measured, and on what; `grams`, `utility` and `data` by objective.

    `checked`: what was measured exactly beside an attribution; `exact`: units that were measured exactly in its place,
    since `attribution`.
    """

    heads: Sequence[Unit]
    sets: Sequence[UtilitySet]
    data: Mapping[str, DataRecord]
    grams: Mapping[str, Gram]
    utility: Mapping[str, Measured]
    safety: Measured
    checked: Checked | None = None
    exact: frozenset[Unit] = frozenset()
    attribution: Results | None = None

    def of_kind(self, kind: str) -> Results:
        """What was measured on the units of a kind."""
        numbers = [number for number, head in enumerate(self.heads) if head.kind == kind]
        grams = {objective: Gram(gram.products_HCC[numbers], gram.n_safety) for objective, gram in self.grams.items()}
        utility = {objective: measured.of(numbers) for objective, measured in self.utility.items()}
        heads = [self.heads[number] for number in numbers]
        attribution = None if self.attribution is None else self.attribution.of_kind(kind)
        safety = self.safety.of(numbers)
        return replace(self, heads=heads, grams=grams, utility=utility, safety=safety, attribution=attribution)

    def measurements(self, objectives: Sequence[str], config: DiagnoseConfig) -> Measurements:
        """Those of some domains, with the safety set they have in common."""
        measures = {one.objective: one.measure(config) for one in self.sets}
        return Measurements(
            domains=[
                Domain(self.grams[one].products_HCC, self.utility[one].outcomes, measures[one]) for one in objectives
            ],
            n_safety=self.grams[objectives[0]].n_safety,
            safety=self.safety.outcomes,
            measure=config.measure,
            sensitivity_rank=config.sensitivity_rank,
            combination=config.domains,
        )

    def fidelity(self, config: DiagnoseConfig) -> dict[str, Any] | None:
        """How far attribution and exact ablation agree on the units that were measured both ways (`compared`)."""
        if self.checked is None:
            return None
        estimated, exact, numbers = (self.attribution or self)._checked_both_ways(self.checked, config)
        n_examples = {name: len(picked) for name, picked in self.checked.examples.items()}
        found = compared(estimated, exact, self.heads, numbers, verified=config.verify == "zone")
        return {**found, "examples": n_examples}

    def unsettled(self, config: DiagnoseConfig) -> float:
        """How near the border of the safe zone a C by attribution leaves open on which side its unit is.

        Twice the root mean square of what attribution is off by, on the units that were measured both ways.
        """
        assert self.checked is not None
        estimated, exact, numbers = (self.attribution or self)._checked_both_ways(self.checked, config)
        one, other = (found.columns(found.whole)["conflict_score"][0, numbers] for found in (estimated, exact))
        return 2 * float(np.sqrt(np.mean((one - other) ** 2)))

    def standing(self, cmap: ConflictMap, config: DiagnoseConfig) -> dict[str, Any] | None:
        """Which units of a map by attribution may be on the other side of the safe zone's border.

        `undecided`: by the error of the estimate; `probable`: by the choice of examples alone, whose interval holds the
        border; all others are certain. `exact`: units that were measured exactly.
        """
        if self.checked is None:
            return None
        score_H, border = cmap.column("conflict_score"), safe_border(cmap.column("conflict_score"))
        is_near_H = np.abs(score_H - border) < self.unsettled(config)
        is_exact_H = np.array([head in self.exact for head in self.heads])
        undecided_H = is_near_H & ~is_exact_H
        straddles_H = (cmap.column("conflict_score_low") < border) & (border < cmap.column("conflict_score_high"))

        def units(chosen_H: NDArray[np.bool_]) -> list[list[str | int]]:
            return [list(head) for head, is_chosen in zip(self.heads, chosen_H, strict=True) if is_chosen]

        return {
            "border": border,
            "undecided": units(undecided_H),
            "probable": units(straddles_H & ~undecided_H),
            "exact": units(is_exact_H),
        }

    def _checked_both_ways(
        self, checked: Checked, config: DiagnoseConfig
    ) -> tuple[Measurements, Measurements, list[int]]:
        """Measurements on the checked examples, without and with what was measured exactly, and of which units."""
        mixed = {one: checked.mixed(one, self.heads, found.outcomes) for one, found in self.utility.items()}
        safety = checked.mixed("safety", self.heads, self.safety.outcomes)
        estimated, exact = (
            replace(
                self,
                utility={one: replace(found, outcomes=mixed[one][i]) for one, found in self.utility.items()},
                safety=replace(self.safety, outcomes=safety[i]),
            ).measurements(list(self.utility), config)
            for i in range(2)
        )
        return estimated, exact, [number for number, head in enumerate(self.heads) if checked.holds(head)]


def conflict_map(results: Results, config: DiagnoseConfig, metadata: Mapping[str, Any]) -> ConflictMap:
    """The map of the only domain, or the combined one of several with each domain's own in `domains`.

    Every kind of unit has a map of its own, with ranks, buckets, ties and reliability among its units; here they are
    put together.
    """
    kinds = list(dict.fromkeys(head.kind for head in results.heads))
    maps = {kind: _map_of_kind(results.of_kind(kind), config, metadata) for kind in kinds}
    return _together(maps) if len(maps) > 1 else maps.popitem()[1]


def _together(maps: Mapping[str, ConflictMap]) -> ConflictMap:
    """Maps of several kinds of unit as one; what is told of a whole map is told of each kind in `kinds`."""
    first, *_ = maps.values()
    domains = {name: _together({kind: cmap.domains[name] for kind, cmap in maps.items()}) for name in first.domains}
    kinds = {
        kind: {
            "n": len(cmap),
            **{key: cmap.metadata[key] for key in _BY_KIND if key in cmap.metadata},
        }
        for kind, cmap in maps.items()
    }
    warnings = [f"{kind_words(kind)}: {text}" for kind, cmap in maps.items() for text in cmap.warnings]
    about: dict[str, Any] = {
        "kinds": kinds,
        "reliability": {**first.metadata["reliability"], "warnings": warnings},
        MAGNITUDE: [value for cmap in maps.values() for value in cmap.metadata[MAGNITUDE]],
    }
    if domains:
        records = first.metadata["domains"]
        about["domains"] = {name: {**records[name], "map_hash": domains[name].content_hash} for name in domains}
    table = pa.concat_tables([cmap.table for cmap in maps.values()]).combine_chunks()
    common = {key: value for key, value in first.metadata.items() if key not in ("fidelity", "standing")}
    return ConflictMap(table, {**common, **about}, domains)


def _map_of_kind(results: Results, config: DiagnoseConfig, metadata: Mapping[str, Any]) -> ConflictMap:
    if (found := results.fidelity(config)) is not None:
        metadata = {**metadata, "fidelity": found}
    maps = {one.name: _domain_map(results, one.objective, config, metadata) for one in results.sets}
    cmap = _combined_map(results, maps, config, metadata) if len(maps) > 1 else maps.popitem()[1]
    standing = results.standing(cmap, config)
    return cmap if standing is None else replace(cmap, metadata={**cmap.metadata, "standing": standing})


def _domain_map(results: Results, objective: str, config: DiagnoseConfig, metadata: Mapping[str, Any]) -> ConflictMap:
    """The map that a diagnosis of this domain alone gives."""
    gram, utility, safety = results.grams[objective], results.utility[objective], results.safety
    found = next(one for one in results.sets if one.objective == objective)
    measure = found.measure(config)
    utility_shift, utility_se = shift_of(measure)(utility.outcomes.ablated_HN, utility.outcomes.baseline_N)
    safety_shift, safety_se = shift_of(config.measure)(safety.outcomes.ablated_HN, safety.outcomes.baseline_N)
    for name, values in ((objective, utility_shift), ("safety", safety_shift)):
        if not np.isfinite(values).all():
            raise CastuneError(
                f"the {name} shift of {int((~np.isfinite(values)).sum())} heads could not be measured: no example was "
                "scored with and without them (empty replies, or scores that are not finite); try --dtype float32"
            )
    conflict = conflict_from_gram(gram.products_HCC, gram.n_safety)
    sensitivity = functional_sensitivity(utility_shift, safety_shift, rank=config.sensitivity_rank)
    columns = {
        "unit": [head.kind for head in results.heads],
        "layer": [head.layer for head in results.heads],
        "head": [head.index for head in results.heads],
        "optimization_conflict": conflict,
        "optimization_conflict_se": conflict_standard_error([gram.products_HCC], gram.n_safety),
        "utility_shift": utility_shift,
        "utility_shift_se": utility_se,
        "safety_shift": safety_shift,
        "safety_shift_se": safety_se,
        "utility_rank": percentile_rank(utility_shift),
        "safety_rank": percentile_rank(safety_shift),
        "functional_sensitivity": sensitivity,
        "conflict_score": conflict_score(conflict, sensitivity),
    }
    about = {
        # No others could be named in a diagnosis of this domain alone.
        "settings": {**metadata["settings"], "reply_domains": [found.name] if found.is_of_replies else []},
        "data": {"safety": results.data["safety"], "utility": results.data[objective]},
        "baseline": {
            "utility_accuracy": _rate(utility.decisions_N),
            "refusal_rate": _rate(safety.decisions_N),
        },
        MAGNITUDE: conflict_magnitude(gram.products_HCC, gram.n_safety).tolist(),
    }
    return finished(columns, results.measurements([objective], config), {**metadata, **about})


def _combined_map(
    results: Results, maps: Mapping[str, ConflictMap], config: DiagnoseConfig, metadata: Mapping[str, Any]
) -> ConflictMap:
    """Every column combined over the maps of the domains; what is measured on D_safe is the same in all of them."""
    first, *_ = maps.values()

    def stacked(name: str) -> Floats:
        return np.stack([cmap.column(name) for cmap in maps.values()])

    def over_domains(name: str) -> Floats:
        return combined(stacked(name), stacked("conflict_score"), config.domains)

    columns: dict[str, Any] = {name: first.table[name] for name in SCHEMA.names}
    of_utility = ("optimization_conflict", "utility_shift", "utility_rank", "functional_sensitivity", "conflict_score")
    columns |= {name: over_domains(name) for name in of_utility}
    if config.domains == "mean":
        grams = [results.grams[one.objective] for one in results.sets]
        conflict_se = conflict_standard_error([gram.products_HCC for gram in grams], grams[0].n_safety)
        columns |= {
            "optimization_conflict_se": conflict_se,
            # Domains are independent samples.
            "utility_shift_se": np.sqrt((stacked("utility_shift_se") ** 2).sum(0)) / len(maps),
        }
    else:
        columns |= {name: over_domains(name) for name in ("optimization_conflict_se", "utility_shift_se")}
    about = {
        "data": {"safety": results.data["safety"], "utility": _all_data(results)},
        "baseline": {
            "utility_accuracy": _mean_rate([cmap.metadata["baseline"]["utility_accuracy"] for cmap in maps.values()]),
            "refusal_rate": first.metadata["baseline"]["refusal_rate"],
        },
        MAGNITUDE: over_domains(MAGNITUDE).tolist(),
        "combined": config.domains,
        "domains": {name: _about(cmap, columns["conflict_score"]) for name, cmap in maps.items()},
    }
    measurements = results.measurements([one.objective for one in results.sets], config)
    return finished(columns, measurements, {**metadata, **about}, maps)


def finished(
    columns: dict[str, Any],
    measurements: Measurements,
    metadata: dict[str, Any],
    domains: Mapping[str, ConflictMap] | None = None,
) -> ConflictMap:
    """The map, with what follows from its columns: buckets, intervals, ties and reliability."""
    intervals, summary = reliability(measurements, seed=metadata["provenance"]["seed"] or 0)
    ties = {name: tie_share(np.asarray(columns[name])) for name in ("utility_shift", "safety_shift")}
    columns = {**columns, **intervals, "bucket": bucket_numbers(columns["conflict_score"])}
    columns = {name: pa.array(np.asarray(columns[name]), from_pandas=True) for name in SCHEMA.names}
    table = pa.table(columns).cast(SCHEMA)
    return ConflictMap(table, {**metadata, "ties": ties, "reliability": summary.to_json()}, domains or {})


def _about(cmap: ConflictMap, score_H: Floats) -> dict[str, Any]:
    """What the combined map says of a domain; `spearman` is that of its C(h) with the combined C(h)."""
    return {
        "map_hash": cmap.content_hash,
        "data": cmap.data["utility"],
        "utility_accuracy": cmap.metadata["baseline"]["utility_accuracy"],
        "reliability": cmap.metadata["reliability"]["reliability"],
        "spearman": spearman(cmap.column("conflict_score"), score_H),
    }


def _all_data(results: Results) -> dict[str, Any]:
    """The utility sets as one."""
    records = [results.data[one.objective] for one in results.sets]
    sources = [record["source"] for record in records if record["source"] is not None]
    return {
        "source": ", ".join(sources) or None,
        "n": sum(record["n"] for record in records),
        "hash": utility_hash(results.sets),
        **{key: sum(record[key] for record in records) for key in ("cut", "replies_cut")},
    }


def _rate(decisions_N: Floats) -> dict[str, Any]:
    scored = decisions_N[np.isfinite(decisions_N)]
    n = len(scored)
    return {
        "value": float(scored.mean()) if n else None,
        "standard_error": float(scored.std(ddof=1) / np.sqrt(n)) if n > 1 else None,
        "n": n,
        "unscored": len(decisions_N) - n,
    }


def _mean_rate(rates: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The mean of the rates of independent sets, each counting the same; None where one of them is missing."""

    def known(key: str) -> Floats | None:
        values = [rate[key] for rate in rates]
        return None if None in values else np.array(values)

    values, errors = known("value"), known("standard_error")
    return {
        "value": None if values is None else float(values.mean()),
        "standard_error": None if errors is None else float(np.sqrt((errors**2).sum()) / len(errors)),
        "n": sum(rate["n"] for rate in rates),
        "unscored": sum(rate["unscored"] for rate in rates),
    }
