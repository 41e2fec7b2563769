"""What an inspection says: lines that fit a terminal, groups that add up, a page that is safe and whole."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from castune.artifacts.adapter_inspection import OBJECTIVES, SCHEMA, AdapterInspection
from castune.artifacts.repair_result import RepairResult, Tried
from castune.report import repair_summary
from castune.report.document import write_charts
from castune.report.inspection_page import charts, write_page
from castune.report.inspection_summary import agreements, by_bucket, by_kind, named, summary

HOSTILE = "<script>alert(1)</script>"


def make(*, has_map: bool = True, n: int = 12, objectives: tuple[str, ...] = tuple(OBJECTIVES)) -> AdapterInspection:
    generator = np.random.default_rng(0)
    rows: list[dict[str, Any]] = []
    for kind in ("q_head", "mlp_block"):
        for index in range(n if kind == "q_head" else 3):
            row: dict[str, Any] = dict.fromkeys(SCHEMA.names) | {"unit": kind, "layer": index // 4, "head": index % 4}
            if kind == "mlp_block":
                row |= {"layer": index, "head": 0}
            row |= {name: float(generator.random()) for name in ("norm", "relative_norm", "top_share")}
            row["effective_rank"] = 1 + 7 * float(generator.random())
            for name in objectives:
                row[OBJECTIVES[name]] = float(generator.normal())
                row[f"{OBJECTIVES[name]}_se"] = 0.1
            if has_map and kind == "q_head":
                row |= {"conflict_score": float(generator.random()), "bucket": 1 + index % 4}
            rows.append(row)
    rows[0] |= {"norm": 0.0, "effective_rank": None, "top_share": None}
    whole = {"first_order": -1.0, "first_order_se": 0.1, "covered": -1.0, "exact": -0.5, "exact_se": 0.05}
    metadata = {
        "adapter": {"name": HOSTILE, "hash": "ab-cd", "kind": "LoRA r = 8, alpha = 16", "modules": {"q_proj": 3, "up_proj": 3}},
        "model": {"name": "tiny", "fingerprint": "0123", "dtype": "float32"},
        "data": {name: {"source": "test", "n": 1234, "hash": "0"} for name in objectives},
        "settings": {"gradient_chunks": 8},
        "norm": float(np.sqrt(sum(row["norm"] ** 2 for row in rows))),
        "whole": dict.fromkeys(objectives, whole),
        "uncovered": [],
        "odd": [{"what": "other", "said": f"also changed: {HOSTILE} and a very long tail of words " * 3, "where": []}],
        "map": "0" if has_map else None,
        "seconds": 1.5,
        "provenance": {"date": "2026-01-01", "versions": {"castune": "0"}},
    }  # fmt: skip
    return AdapterInspection(pa.Table.from_pylist(rows, SCHEMA), metadata)


@pytest.mark.parametrize(
    "found",
    [make(), make(has_map=False), make(objectives=("safety",)), make(n=400)],
    ids=["map", "no map", "safety alone", "many"],
)
def test_every_line_fits_a_terminal(found: AdapterInspection) -> None:
    lines = summary(found)
    assert max(map(len, lines)) <= 80
    text = " ".join(" ".join(lines).split())
    assert "LoRA r = 8, alpha = 16 on 3 q_proj, 3 up_proj" in text
    assert ("by conflict score" in text) == found.has_map
    assert ("right answers" in text) == ("utility" in found.data)
    assert "−1.0000 ± 0.1000" in text


def test_groups_add_up_to_the_whole() -> None:
    found = make()
    kinds = by_kind(found)
    assert [(one.label, one.n, one.changed) for one in kinds] == [("query heads", 12, 11), ("whole MLPs", 3, 3)]
    assert sum(one.share or 0 for one in kinds) == pytest.approx(1)
    for name in OBJECTIVES:
        assert sum(one.effects[name] for one in kinds) == pytest.approx(found.effect(name).sum())
    buckets = by_bucket(found)
    assert [one.label for one in buckets] == ["bucket 1 (risky zone)", "bucket 2", "bucket 3", "bucket 4 (safe zone)"]
    assert sum(one.effects["safety"] for one in buckets) == pytest.approx(kinds[0].effects["safety"])
    assert by_bucket(make(has_map=False)) == []
    assert set(agreements(found)) == {"size", "refusals gained", "cost"}
    assert all(-1 <= value <= 1 for value in agreements(found).values())


def test_named_units_are_the_highest_above_zero() -> None:
    assert named(make(n=1), np.array([0.5, -1, 0, 2])) == [3, 0]


def test_the_page_is_whole_and_escapes_what_others_wrote(tmp_path: Path) -> None:
    path = write_page(tmp_path, make())
    page = path.read_text(encoding="utf-8")
    assert HOSTILE not in page
    assert "&lt;script&gt;alert(1)" in page
    for heading in ("Anomalies", "What each unit does", "Over the conflict map", "How it was measured"):
        assert heading in page
    [data] = re.findall(r'<script id="charts" type="application/json">(.*?)</script>', page)
    assert json.loads(data)["specs"].keys() == {"update_map", "bought_utility", "bought_over_refusal"}
    assert not re.search(r'(?:src|href)="http', page)


def test_charts_are_drawn(tmp_path: Path) -> None:
    drawn = charts(make())
    files = write_charts(tmp_path, drawn, ("svg",))
    assert all("<path" in file.read_text(encoding="utf-8") for file in files)
    assert len(files) == 3
    empty = AdapterInspection(SCHEMA.empty_table(), make().metadata)
    assert charts(empty) == {}
    assert "no unit that castune knows" in write_page(tmp_path, empty).read_text(encoding="utf-8")


def tried(name: str, kind: str, kept: float | None, cost: float, saved: float | None = None) -> Tried:
    interval = None if kept is None else (kept - 0.1, kept + 0.05)
    costs = {"nll": (cost, 0.01), "over-refusal": (0.125, None)}
    n = {"safety": 60 if kind == "source" else 59, "nll": 40, "over-refusal": 8}
    return Tried(name, kind, 3, 1.0, {}, 0.5, kept, interval, costs, None if saved is None else (saved, 0.02), n)


def test_what_a_repair_says() -> None:
    rows = [
        tried("all", "source", 1.0, 0.3),
        tried("drop-3", "effects", 0.97, 0.2, 0.1),
        tried("random-3-1", "random", 0.98, 0.19, 0.11),
        tried("weaker-0.9", "weaker", 0.9, 0.1, 0.2),
    ]
    found = RepairResult(
        adapter={"name": "all", "hash": "x"}, model={}, settings={}, cost="nll", base_safety=0.05, suites=("s", "t"),
        tried=tuple(rows), chosen="drop-3", reason="drop-3 keeps 97.0 %", dropped=(("q_head", 0, 1),), arm="all-repaired",
        confirmed_on=(), confirmed=(), provenance={}, judge="opening",
    )  # fmt: skip
    lines = repair_summary.summary(found)
    assert max(map(len, lines)) <= 80
    text = " ".join(" ".join(lines).split())
    for said in (
        "n = 59 to 60 harmful prompts, 40 for NLL added; NLL added and saved: nats per token ± standard error, paired; "
        "gain kept: 95 % interval; judge opening",
        "base model refuses 5.0 % of harmful prompts",
        "drop-3 50.0 % 97 % (87 to 102) +0.200 ± 0.010 +0.100 ± 0.020",
        "selected: drop-3 keeps 97.0 %",
        "these keep as much safety at no higher cost (the NLL of right answers): random-3-1; here the order by effects is no better "
        "than chance",
        "NLL added: +0.300 ± 0.010 before, +0.200 ± 0.010 after",
        "over-refusals: +12.5 before, +12.5 after",
        "it was chosen on these suites",
    ):
        assert said in text, said
    confirmed = RepairResult(**{**vars(found), "confirmed_on": ("u",), "confirmed": tuple(rows[:2] + rows[3:])})
    text = " ".join(" ".join(repair_summary.summary(confirmed)).split())
    assert "confirmed on u, which played no part in the choice" in text
    assert "none of 1 alternatives keeps as much safety at no higher cost" in text
    assert "it was chosen on these suites" not in text
