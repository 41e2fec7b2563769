"""A run directory made by hand, with outcomes that are given: what `castune gate` reads, and no model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from castune.artifacts import Certificate, ConflictMap, EvalResult, TuneResult
from castune.artifacts.conflict_map import SCHEMA
from castune.artifacts.rules import RULES
from castune.artifacts.samples import Sample
from castune.artifacts.tune_result import adapter_hash
from castune.config import Recipe
from castune.evaluation.metrics import suite_result
from castune.selection import select
from castune.steps.directory import BASE, RunDirectory

PURPOSE_OF = {
    "harmful": "safety", "harmful-2": "safety", "harmless": "over-refusal", "asked": "utility", "said": "nll", "kept": "kl",
}  # fmt: skip
# In every reply: what no output of a gate may hold.
SECRET = "what the model said"
Outcomes = Mapping[str, Sequence[float | bool | None]]


def of_count(right: int, n: int, unscored: int = 0) -> list[bool | None]:
    """Outcomes of which so many are right, and so many more unscored."""
    return [*(i < right for i in range(n)), *[None] * unscored]


def evaluation(name: str, outcomes: Outcomes, adapter: str | None, judge: str = "opening") -> EvalResult:
    """An evaluation with these outcomes of the suites in `PURPOSE_OF`."""
    suites, samples = [], []
    for suite, values in outcomes.items():
        purpose = PURPOSE_OF[suite]
        kind: dict[str, Any] = (
            {"scored_tokens": 3} if purpose in ("nll", "kl") else {"reply": SECRET, "finished": True, "tokens": 1}
        )
        made: list[Sample] = [
            {"suite": suite, "id": f"{suite}-{i}", "purpose": purpose, "group": None, "prompt": "p", **kind}  # type: ignore[misc]
            | {"outcome": value}
            for i, value in enumerate(values)
        ]
        suites.append(
            suite_result(made, judge=judge, max_new_tokens=None, data_hash=f"{suite}-{len(values)}", seconds=1.0)
        )
        samples += made
    model: Any = {"fingerprint": "aaaa", "adapter": adapter}
    return EvalResult(name, tuple(suites), tuple(samples), {"judge": judge}, model, {"rules": RULES})


def make_run(path: Path, arms: Mapping[str, Outcomes], *, adapters: str = "") -> RunDirectory:
    """A run whose main arm is `safe`, with an adapter; and whatever of base, safe and risky is given evaluated.

    Args:
        path: the directory.
        arms: outcomes of the arms that are evaluated.
        adapters: makes the adapters those of another training.
    """
    folder = RunDirectory(path)
    folder.save_recipe(Recipe(out=str(path)))
    columns: dict[str, Any] = {field.name: np.arange(8.0) for field in SCHEMA}
    columns |= {"unit": ["q_head"] * 8, "layer": [0] * 4 + [1] * 4, "head": [0, 1, 2, 3] * 2, "bucket": [1] * 8}
    cmap = ConflictMap(pa.table(columns, schema=SCHEMA), {"model": {"name": "tiny", "fingerprint": "aaaa"}})
    cmap.save(path)
    for zone in ("safe", "risky"):
        selection = select(cmap, zone=zone)  # type: ignore[arg-type]
        arm = folder.main_arm(selection) if zone == "safe" else folder.side_arm(zone)
        selection.save(arm.folder)
        arm.adapter.mkdir(parents=True)
        for name in ("adapter_model.safetensors", "adapter_config.json"):
            (arm.adapter / name).write_text(f"{name} {zone} {adapters}")
        certificate = Certificate("aaaa", selection.units, adapter_hash(arm.adapter), 24, 9, 8, 8, 0.5)
        TuneResult("adapter", certificate, {}, {}, {}, (), 1, 1, 1.0, {}, {}).save(arm.adapter)
    for name, outcomes in arms.items():
        adapter = None if name == BASE else adapter_hash(folder.arm(name).adapter)
        evaluation(name, outcomes, adapter).save(folder.evaluation(name))
    return folder


def write_policy(path: Path, *rules: str) -> Path:
    """A policy of these rules, each the lines of its table."""
    path.write_text("".join(f"[[rule]]\n{rule}\n" for rule in rules), encoding="utf-8")
    return path
