"""Data that were drawn once are drawn again from their record."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from castune.config import DataConfig
from castune.steps.inputs import load_data, recorded_data
from castune.tuning.rows import TrainingRows

KINDS = {"a": 30, "b": 20, "c": 10}


@pytest.mark.parametrize(
    "drawn",
    [
        {},
        {"limit": 7},
        {"limit": 60},
        {"balance": "kind"},
        {"balance": "kind", "limit": 10},
        {"shares": {"a": 0.5, "b": 0.25, "c": 0.25}},
        {"shares": {"a": 2.0, "c": 1.0}, "limit": 7},
        {"shares": {"b": 1.0, "c": 1.0}, "limit": 50},
        {"balance": "level", "shares": {"0": 1.0, "1": 3.0}, "limit": 11},
    ],
    ids=str,
)
@pytest.mark.parametrize("seed", [0, 21])
def test_a_training_record_draws_the_same_again(tmp_path: Path, drawn: dict[str, Any], seed: int) -> None:
    path = tmp_path / "own.jsonl"
    rows = [
        {"prompt": f"{kind} {n}", "completion": "x", "kind": kind, "level": n % 2}
        for kind, count in KINDS.items()
        for n in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    config = DataConfig(source=str(path), **drawn)
    found = load_data(config, seed)
    left_out, data = [found[1].id], [found[0], *found[2:]]
    record = TrainingRows([], [], [], []).data_record(
        data, config.source, balance=config.balance, shares=config.shares, left_out=left_out
    )
    assert {key: record.get(key) for key in ("balance", "shares")} == {
        key: drawn.get(key) for key in ("balance", "shares")
    }
    assert recorded_data(json.loads(json.dumps(record)), seed) == data
