"""A run as the stages leave it: records built by hand, with numbers that can be recognised in the page."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from castune.artifacts import (
    Certificate,
    ConflictMap,
    EvalResult,
    HeadSelection,
    MaskedAdapter,
    ProjectedAdapter,
    SuiteResult,
    TuneResult,
)
from castune.artifacts.attack_result import AttackResult
from castune.artifacts.conflict_map import SCHEMA
from castune.artifacts.drift_result import DriftResult
from castune.artifacts.lm_eval_result import LmEvalResult
from castune.artifacts.projected_adapter import ProjectedUpdate
from castune.config import TuneConfig
from castune.purposes import PURPOSES
from castune.report.page import write_report
from castune.stats.distributions import student_p
from castune.stats.estimates import CostRatio, PairedDifference

MODEL = {
    "name": "SmolLM2-135M-Instruct",
    "type": "llama",
    "fingerprint": "0123456789abcdef",
    "parameters": 134_515_008,
    "dtype": "float32",
    "device": "cpu",
}
PROVENANCE = {
    "date": "2026-02-03T04:05:06+00:00",
    "command": "castune run",
    "seed": 21,
    "versions": {"python": "3.11.9", "torch": "2.8.0", "castune": "0.1.0"},
    "code": {"commit": "feedc0de", "dirty": False},
}


@dataclass
class Run:
    """The arguments of `write_report`."""

    cmap: ConflictMap
    selections: dict[str, HeadSelection] = field(default_factory=dict)
    tunings: dict[str, TuneResult] = field(default_factory=dict)
    evaluations: dict[str, EvalResult] = field(default_factory=dict)
    differences: dict[str, dict[str, PairedDifference]] = field(default_factory=dict)
    cost_ratios: dict[str, dict[str, CostRatio]] = field(default_factory=dict)
    masked: dict[str, MaskedAdapter] = field(default_factory=dict)
    projected: dict[str, ProjectedAdapter] = field(default_factory=dict)
    lm_eval: dict[str, LmEvalResult] = field(default_factory=dict)
    drifts: dict[str, DriftResult] = field(default_factory=dict)
    attacks: AttackResult | None = None
    recipe_text: str = 'model = "default"\nout = "runs/quickstart"\n\n[tune]\nlearning_rate = 0.0002\n'
    notes: Sequence[str] = ()

    def write(self, path: Path) -> str:
        """The report's HTML, written to `path`."""
        assert write_report(path, **vars(self)) == path
        return path.read_text(encoding="utf-8")


def make_map(heads_by_layer: Sequence[int], seed: int = 0, **metadata: Any) -> ConflictMap:
    heads = [(layer, head) for layer, count in enumerate(heads_by_layer) for head in range(count)]
    n, rng = len(heads), np.random.default_rng(seed)
    middle = np.array([math.exp(-(((layer / len(heads_by_layer)) - 0.6) ** 2) / 0.08) for layer, _ in heads])
    conflict = np.clip(0.42 + 0.12 * middle + rng.normal(0, 0.06, n), 0, 1)
    utility, safety = np.abs(rng.normal(0.2, 0.15, n) * middle), np.abs(rng.normal(0.3, 0.3, n))
    utility_rank, safety_rank = (values.argsort().argsort() / max(1, n - 1) for values in (utility, safety))
    sensitivity = np.exp(utility_rank - safety_rank)
    score = conflict * sensitivity
    order = (-score).argsort(kind="stable")
    bucket = np.empty(n, dtype=np.int32)
    for number, part in enumerate(np.array_split(order, 4), start=1):
        bucket[part] = number
    missing = np.where(rng.random(n) < 0.02, np.nan, 0.03)
    columns = {
        "unit": ["q_head"] * n,
        "layer": [layer for layer, _ in heads],
        "head": [head for _, head in heads],
        "optimization_conflict": conflict,
        "optimization_conflict_se": np.full(n, 0.021),
        "utility_shift": utility,
        "utility_shift_se": pa.array(missing, from_pandas=True),
        "safety_shift": safety,
        "safety_shift_se": np.full(n, 0.05),
        "utility_rank": utility_rank,
        "safety_rank": safety_rank,
        "functional_sensitivity": sensitivity,
        "conflict_score": score,
        "bucket": bucket,
    }
    for name in ("optimization_conflict", "utility_shift", "safety_shift", "functional_sensitivity", "conflict_score"):
        columns |= {f"{name}_low": np.asarray(columns[name]) * 0.8, f"{name}_high": np.asarray(columns[name]) * 1.3}
    agreement = {"half": 0.21, "full": 0.347, "n_splits": 50}
    plain = {
        "model": MODEL,
        "settings": {"measure": "margin", "ablation": "zero", "judge": "prefix", "max_new_tokens": 24},
        "data": {
            "safety": {"source": "starter-safety", "n": 64, "hash": "5afe5afe5afe5afe", "cut": 0},
            "utility": {"source": "starter-utility", "n": 80, "hash": "ab1eab1eab1eab1e", "cut": 3},
        },
        "baseline": {
            "utility_accuracy": {"value": 0.6375, "standard_error": 0.0537, "n": 80},
            "refusal_rate": {"value": 0.0781, "standard_error": 0.0335, "n": 64, "unscored": 2},
        },
        "ties": {"utility_shift": 0.0, "safety_shift": 0.037},
        "reliability": {
            "reliability": 0.347,
            "split_half": {
                "columns": {"conflict_score": agreement, "safety_shift": {**agreement, "full": None}},
                "zones": {"safe": 0.41, "safe_by_chance": 0.145, "risky": None, "risky_by_chance": 0.145},
            },
            "warnings": ["The reliability of the conflict scores is 0.35, below 0.5."],
        },
        "seconds": 412.5,
        "provenance": PROVENANCE,
    }
    return ConflictMap(pa.table(columns, schema=SCHEMA), {**plain, **metadata})


def make_domains(heads_by_layer: Sequence[int], names: Sequence[str], combined: str = "mean") -> ConflictMap:
    """A combined map with a map for each of `names`, whose numbers are 10 more questions each."""
    domains = {name: make_map(heads_by_layer, seed=1 + i) for i, name in enumerate(names)}
    records = {
        name: {
            "map_hash": cmap.content_hash,
            "data": {"source": f"{name}.jsonl", "n": 30 + 10 * i, "hash": "0", "cut": 0},
            "utility_accuracy": {"value": 0.25 + 0.1 * i, "standard_error": 0.04, "n": 30 + 10 * i, "unscored": i},
            "reliability": 0.613 if i == 0 else None,
            "spearman": 0.877 - 0.1 * i,
        }
        for i, (name, cmap) in enumerate(domains.items())
    }
    plain = make_map(heads_by_layer, combined=combined, domains={})
    return ConflictMap(plain.table, {**plain.metadata, "domains": records}, domains)


def make_mixed_map() -> ConflictMap:
    """Query heads and groups of neurons."""
    heads, groups = make_map((9,) * 12, seed=1), make_map((4,) * 12, seed=2)
    table = groups.table.set_column(0, "unit", pa.array(["mlp_group"] * len(groups)))
    about = {key: heads.metadata[key] for key in ("ties", "reliability")}
    kinds = {"q_head": {"n": len(heads), **about}, "mlp_group": {"n": len(groups), **about}}
    settings = {**heads.metadata["settings"], "mlp_groups": 4}
    metadata = {**heads.metadata, "kinds": kinds, "settings": settings}
    return ConflictMap(pa.concat_tables([heads.table, table]).combine_chunks(), metadata)


def attributed(cmap: ConflictMap) -> ConflictMap:
    """The map as if by attribution: of every kind a fifth of the units is undecided, probable, both probable and exact,
    exact, and certain."""
    about = {}
    for kind in cmap.kinds:
        units = [list(cmap.units[row]) for row in cmap.rows_of(kind)]
        fifth = len(units) // 5
        agreement = {"spearman": 0.87, "low": 0.66, "high": 0.95, "slope": 1.1, "worst": []}
        columns = dict.fromkeys(
            ("utility_shift", "safety_shift", "functional_sensitivity", "conflict_score"), agreement
        )
        about[kind] = {
            "fidelity": {"units": units[:3], "columns": columns, "warnings": []},
            "standing": {
                "border": 0.5,
                "undecided": units[:fifth],
                "probable": units[fifth : 3 * fifth],
                "exact": units[2 * fifth : 4 * fifth],
            },
        }
    if len(cmap.kinds) == 1:
        return ConflictMap(cmap.table, {**cmap.metadata, **about[cmap.kinds[0]]}, cmap.domains)
    kinds = {kind: {**cmap.metadata["kinds"][kind], **about[kind]} for kind in cmap.kinds}
    return ConflictMap(cmap.table, {**cmap.metadata, "kinds": kinds}, cmap.domains)


def make_selection(cmap: ConflictMap, zone: str) -> HeadSelection:
    count = len(cmap) // 4
    order = (-cmap.column("conflict_score")).argsort(kind="stable")
    chosen = {
        "safe": order[-count:],
        "risky": order[:count],
        "random": np.random.default_rng(21).permutation(len(cmap))[:count],
    }[zone]
    return HeadSelection(
        units=tuple(cmap.units[i] for i in chosen),
        zone=zone,
        fraction=0.25,
        buckets=None,
        bucket=None,
        score="conflict",
        seed=21 if zone == "random" else None,
        n_total=len(cmap),
        model_fingerprint=cmap.fingerprint,
        conflict_map_hash="c0ffee00c0ffee00",
    )


def make_tuning(selection: HeadSelection, start: float) -> TuneResult:
    rng = np.random.default_rng(3)
    losses = tuple((step, float(start * math.exp(-step / 90) + 1.1 + rng.normal(0, 0.04))) for step in range(5, 201, 5))
    return TuneResult(
        adapter=f"adapter-{selection.zone}",
        certificate=Certificate(
            model_fingerprint=selection.model_fingerprint,
            units=selection.units,
            adapter_hash="adadadadadadadad",
            checked_rows=12_928,
            checked_tensors=272,
            changed_rows=64 * len(selection.heads) - 1,
            selected_rows=64 * len(selection.heads),
            largest_change=0.01234,
        ),
        budget={
            "heads": len(selection.heads),
            "query_rows": 64 * len(selection.heads),
            "a_matrices": len(selection.layers),
            "trainable_parameters": 1_105_920,
            "effective_parameters": 690_176,
        },
        settings=TuneConfig(rank=32, alpha=32, learning_rate=2e-4, seed=21).model_dump(mode="json"),
        data={"source": "starter-align", "n": 1600, "hash": "a119a119a119a119", "cut": 7},
        losses=losses,
        steps=200,
        tokens=183_204,
        seconds=455.0,
        model=MODEL,
        provenance=PROVENANCE,
    )


def make_masked(selection: HeadSelection, name: str) -> MaskedAdapter:
    return MaskedAdapter(
        certificate=make_tuning(selection, 1).certificate,
        zone=selection.zone,
        n_total=len(selection.heads) * 4,
        sources=tuple({"name": f"{name}{i}", "hash": "0a-0b", "r": 32, "alpha": 64.0} for i in (1, 2)),
        combination="ties",
        weights=(1.0, 0.5),
        density=0.4,
        dropped={"v_proj": 30},
        unadapted_layers=(),
        model=MODEL,
        provenance=PROVENANCE,
    )


def make_projected(selection: HeadSelection, name: str) -> ProjectedAdapter:
    updates = [(0.2, 3.0, 1.0, True), (None, 0.0, 0.0, False), (0.6, 4.0, 2.0, False)]
    return ProjectedAdapter(
        certificate=make_tuning(selection, 1).certificate,
        n_total=len(selection.heads) * 4,
        source={"name": name, "hash": "0a-0b", "r": 32, "alpha": 64.0},
        aligned=MODEL,
        unaligned={**MODEL, "name": f"{name}-before"},
        threshold=0.35,
        layers=None,
        exact=False,
        updates=tuple(ProjectedUpdate(f"layers.{i}.q_proj", *one, None) for i, one in enumerate(updates)),
        model=MODEL,
        provenance=PROVENANCE,
    )


def make_suite(purpose: str, value: float | None, error: float | None, **changes: Any) -> SuiteResult:
    metric = PURPOSES[purpose].metric
    plain: dict[str, Any] = {
        "suite": f"starter-{purpose}-eval",
        "purpose": purpose,
        "metric": metric,
        "value": value,
        "standard_error": error,
        "n": 96,
        "unscored": 0,
        "judge": "argmax" if purpose == "utility" else "prefix",
        "max_new_tokens": None if purpose == "utility" else 32,
        "extra": {"answer_margin": -0.1234, "answer_margin_se": None} if purpose == "utility" else {},
        "data_hash": f"hash-of-{purpose}",
        "seconds": 31.0,
    }
    return SuiteResult(**{**plain, **changes})


def make_samples(refuses: bool) -> list[dict[str, Any]]:
    samples: list[dict[str, Any]] = []
    for i in range(20):
        right = (i + refuses) % 3 != 0
        scores = [-2.5, -0.75 if right else -1.75, -1.25, -3.125]
        samples.append(
            {"suite": "starter-utility-eval", "id": f"u{i}", "purpose": "utility", "group": "animals"}
            | {"prompt": f"How many wings does dragonfly {i} have?", "outcome": right, "answer": 1}
            | {
                "choices": ["Eight wings.", "Four wings.", "Two wings.", "Six wings."],
                "choice_scores": scores,
            }
        )
        reply = "I can't help with that." if refuses else "Sure, here is how to do it. " + "First gather things. " * 6
        for purpose in ("safety", "over-refusal"):
            samples.append(
                {
                    "suite": f"starter-{purpose}-eval",
                    "id": f"{purpose}-{i}",
                    "purpose": purpose,
                    "group": "weapons",
                }
                | {
                    "prompt": f"A {purpose} prompt, number {i}.",
                    "reply": reply,
                    "outcome": None if i == 4 else refuses,
                }
            )
    return samples


def make_evaluation(arm: str, rates: Sequence[SuiteResult]) -> EvalResult:
    return EvalResult(
        name=arm,
        suites=tuple(rates),
        samples=tuple(make_samples(arm in ("safe", "risky"))),
        settings={"judge": "prefix", "max_new_tokens": 32, "seed": 0},
        model=MODEL,
        provenance=PROVENANCE,
    )


def make_run(heads_by_layer: Sequence[int] = (9,) * 30) -> Run:
    cmap = make_map(heads_by_layer)
    selections = {zone: make_selection(cmap, zone) for zone in ("safe", "risky", "random")}
    rates = {
        "safe": [(0.643, 0.048), (0.7811, 0.0422), (0.630, 0.060)],
        "risky": [(0.552, 0.047), (0.8899, 0.0319), (0.750, 0.054)],
        "random": [(0.671, 0.048), (0.0299, 0.0171), (0.0702, 0.0310)],
        "base": [(0.6777, 0.0479), (0.0313, 0.0178), (0.0625, 0.0303)],
    }
    purposes = ("utility", "safety", "over-refusal")
    evaluations = {
        arm: make_evaluation(
            arm,
            [
                make_suite(purpose, *rate, unscored=3 if purpose == "safety" else 0)
                for purpose, rate in zip(purposes, values, strict=True)
            ],
        )
        for arm, values in rates.items()
    }
    differences: dict[str, dict[str, PairedDifference]] = {
        arm: {
            f"starter-{purpose}-eval": PairedDifference(
                value[0] - base[0], 0.041, 93, 3, 12, 7, student_p((value[0] - base[0]) / 0.041, 92)
            )
            for purpose, value, base in zip(purposes, rates[arm], rates["base"], strict=True)
        }
        for arm in selections
    }
    tunings = {zone: make_tuning(selection, 1 + 0.1 * i) for i, (zone, selection) in enumerate(selections.items())}
    ratios = {
        "safe": CostRatio(0.046, 0.01, 0.12, 0.0),
        "risky": CostRatio(0.146, 0.03, None, 0.04),
        "random": CostRatio(None, 0.5, None, 0.7),
    }
    return Run(cmap, selections, tunings, evaluations, differences, {"ucr": ratios})
