"""A part of the fault suite: every kind of fault, on the stages that write most; `make faults` does all of it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from processes import run_command

HARNESS = Path(__file__).with_name("harness.py")


@pytest.mark.skipif(sys.platform != "linux", reason="limits and capabilities of Linux")
@pytest.mark.parametrize("stages", ["tune", pytest.param("diagnose,evaluate", marks=pytest.mark.slow)])
def test_faults_of_every_kind_are_survived(stages: str, tmp_path: Path) -> None:
    record = tmp_path / "record.jsonl"
    options = ["--per-cell", "1", "--stages", stages, "--no-damages", "--record", record]
    done = run_command([sys.executable, HARNESS, tmp_path / "work", *options], timeout=1200)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    attempts = [json.loads(line) for line in record.read_text(encoding="utf-8").splitlines()]
    n_stages = len(stages.split(","))
    assert len(attempts) == 10 * n_stages
    # Faults that always come too late would be survived too.
    assert sum(attempt["struck"] for attempt in attempts) >= 4 * n_stages


@pytest.mark.slow
def test_damaged_artifacts_are_named_or_not_needed(tmp_path: Path) -> None:
    record = tmp_path / "record.jsonl"
    options = ["--stages", "none", "--damages", "--every", "7", "--record", record]
    done = run_command([sys.executable, HARNESS, tmp_path / "work", *options], timeout=1200)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    attempts = [json.loads(line) for line in record.read_text(encoding="utf-8").splitlines()]
    assert len(attempts) >= 8
    assert any("damaged" in attempt["error"] for attempt in attempts)
