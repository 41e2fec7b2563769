"""The site is built with every warning an error, and is read in a browser without a network."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import pytest
from browser import Browser
from processes import run_command

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("site") / "site"
    done = run_command(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", out],
        cwd=ROOT, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return out


def test_every_page_is_there_and_asks_for_nothing_elsewhere(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    assert len(pages) > 20
    for page in pages:
        text = page.read_text(encoding="utf-8")
        loaded = re.findall(r'<(?:script|link|img|iframe)\b[^>]*?\b(?:src|href)="(https?://[^"]+)"', text)
        assert not [url for url in loaded if "canonical" not in url], (page.name, loaded)


def test_the_reference_knows_every_public_name_command_and_setting(site: Path) -> None:
    import typer.main

    import castune
    from castune.cli import app
    from castune.config import DiagnoseConfig, EvaluateConfig, Recipe, SelectConfig, StudyConfig, TuneConfig

    python = (site / "reference" / "python.html").read_text(encoding="utf-8")
    recipes = (site / "reference" / "recipes.html").read_text(encoding="utf-8")
    commands = (site / "reference" / "cli.html").read_text(encoding="utf-8")
    apart = {"__version__", "HeadId", "Recipe", "DiagnoseConfig", "TuneConfig", "EvaluateConfig"}
    for public in set(castune.__all__) - apart:
        assert re.search(rf'id="castune\.[\w.]*\b{public}"', python), public
    for config in (Recipe, DiagnoseConfig, SelectConfig, TuneConfig, EvaluateConfig, StudyConfig):
        for field in config.model_fields:
            assert re.search(rf'id="castune\.config\.{config.__name__}\.{field}"', recipes), (config.__name__, field)
    for name, command in typer.main.get_command(app).commands.items():  # type: ignore[attr-defined]
        assert f"castune {name}" in commands
        for parameter in command.params:
            shown = [parameter.metavar] if parameter.param_type_name == "argument" else parameter.opts
            assert parameter.name == "help" or any(f"<code>{one}</code>" in commands for one in shown), parameter.name


def test_pages_are_read_in_a_browser(site: Path, browser: Browser) -> None:
    for page, heading in (("index.html", "castune"), ("method.html", "Method"), ("reference/python.html", "Python")):
        browser.open(site / page, "!!document.querySelector('h1')")
        assert heading in browser.run("document.querySelector('h1').textContent")
        # The table of contents, and a menu of the other pages.
        assert browser.run("document.querySelectorAll('nav a').length") > 20
        assert not [url for url in browser.requests if not url.startswith(("file:", "data:", "blob:"))]
