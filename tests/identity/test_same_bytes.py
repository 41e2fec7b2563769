"""What is made is what was made before the last change of structure, byte for byte."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from same_bytes import ROOT, compare

# The last commit that changed on purpose what commands write. Move it with such a change, and say so in the CHANGELOG.
BASELINE = "7add5de"


@pytest.mark.slow
@pytest.mark.processes
def test_a_run_a_drift_an_export_and_a_study_are_those_of_the_baseline(tmp_path: Path) -> None:
    known = subprocess.run(["git", "-C", str(ROOT), "cat-file", "-e", f"{BASELINE}^{{commit}}"], capture_output=True)
    if known.returncode != 0:
        pytest.skip(f"commit {BASELINE} is not here: a clone without its history")
    assert compare(BASELINE, tmp_path) == {}
