"""The faults that are planted by hand (`tests/faults/planted.py`) still find their lines and their tests."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


def planted() -> ModuleType:
    spec = importlib.util.spec_from_file_location("planted", ROOT / "tests" / "faults" / "planted.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["planted"] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("fault", planted().FAULTS, ids=lambda fault: fault.what)
def test_a_planted_fault_has_one_line_and_its_tests(fault: Any) -> None:
    text = (ROOT / "src" / "castune" / fault.file).read_text(encoding="utf-8")
    assert text.count(fault.line) == 1
    for name in fault.tests.split():
        assert (ROOT / "tests" / name.partition("::")[0]).exists()
