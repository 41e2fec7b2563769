"""The section on attacks on a phone: the page does not scroll sideways, its table does within its own box."""

from __future__ import annotations

from pathlib import Path

import pytest
from browser import CHROMIUM, Browser
from fake_attacks import make_attacks
from fake_run import Run, make_map

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")
DRAWN = "document.querySelectorAll('[data-chart]:not([data-drawn])').length === 0"


def test_only_the_table_scrolls_sideways(browser: Browser, tmp_path: Path) -> None:
    run = Run(make_map((4,) * 3), attacks=make_attacks(-0.2))
    run.write(tmp_path / "report.html")
    browser.open(tmp_path / "report.html", DRAWN, width=390)
    assert browser.run("document.documentElement.scrollWidth") <= 390
    box = "document.querySelector('[aria-label=\"Attacks by arm\"]')"
    assert browser.run(f"{box}.scrollWidth > {box}.clientWidth"), "the table is wider than a phone"
    assert browser.run(f"{box}.clientWidth") <= 390
