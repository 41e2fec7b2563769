"""The report of a run in which one thing is odd: it names that, and shows all others."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from castune.errors import ArtifactError
from castune.steps.directory import RunDirectory
from castune.steps.report import report_step

WEIGHTS = "adapter_model.safetensors"


def test_an_arm_whose_adapter_is_another_is_left_out_by_name(
    finished_run: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    run = finished_run()
    shutil.copyfile(run / "adapter" / WEIGHTS, run / "arms" / "risky" / "adapter" / WEIGHTS)
    with caplog.at_level(logging.WARNING, "castune"):
        page = report_step(RunDirectory(run)).read_text(encoding="utf-8")
    assert "the report leaves out arm risky" in caplog.text
    assert "castune tune" in caplog.text
    assert "--arm risky --overwrite" in caplog.text
    assert "safe" in page
    # The main arm is what the run is about.
    (run / "adapter" / WEIGHTS).write_bytes(b"another")
    with pytest.raises(ArtifactError, match="is not the one its certificate was made for"):
        report_step(RunDirectory(run))


def test_a_directory_that_is_no_strength_is_no_strength(finished_run: Callable[..., Path]) -> None:
    run = finished_run()
    folder = RunDirectory(run)
    shutil.copytree(run / "evaluation" / "safe", run / "evaluation" / "safe" / "strengths" / "0.5-old")
    assert folder.load_strengths() == {}
    report_step(folder)
