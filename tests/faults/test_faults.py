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


@pytest.mark.skipif(sys.platform != "linux", reason="forks with audit hooks")
@pytest.mark.parametrize("stage", ["select", pytest.param("mask", marks=pytest.mark.slow)])
def test_faults_at_every_file_operation_are_survived(stage: str, tmp_path: Path) -> None:
    record = tmp_path / "record.jsonl"
    options = ["--every-point", "--per-cell", "0", "--stages", stage, "--no-damages", "--record", record]
    done = run_command([sys.executable, HARNESS, tmp_path / "work", *options], timeout=1200)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    attempts = [json.loads(line) for line in record.read_text(encoding="utf-8").splitlines()]
    killed = {attempt["where"] for attempt in attempts if attempt["fault"].startswith("SIGKILL")}
    n = len(killed)
    assert n >= 2
    assert killed == {f"{k} of {n}" for k in range(1, n + 1)}
    assert len(attempts) == 4 * n
    assert all(attempt["struck"] for attempt in attempts if attempt["fault"].startswith("SIGKILL"))


@pytest.mark.slow
def test_damaged_artifacts_are_named_or_not_needed(tmp_path: Path) -> None:
    record = tmp_path / "record.jsonl"
    options = ["--stages", "none", "--damages", "--every", "7", "--record", record]
    done = run_command([sys.executable, HARNESS, tmp_path / "work", *options], timeout=1200)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    attempts = [json.loads(line) for line in record.read_text(encoding="utf-8").splitlines()]
    assert len(attempts) >= 8
    assert any("damaged" in attempt["error"] for attempt in attempts)
