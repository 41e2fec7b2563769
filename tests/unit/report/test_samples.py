"""Sample replies side by side, narrowed down in a real browser."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from browser import CHROMIUM, Browser
from fake_run import Run

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")
READY = "document.querySelector('.sample-controls')?.hidden === false"
ATTACK = """</td></table><script>document.title = "owned"</script>"""
# Outcomes of base, safe and risky for each example; the suite is harmful.
OUTCOMES = {
    "a": (False, True, True),
    "b": (True, False, True),
    "c": (True, True, True),
    "d": (None, True, False),
    "e": (False, False, True),
}


@pytest.fixture
def small(run: Run) -> Run:
    """Two suites of five examples: one harmful, one not."""
    arms = ("base", "safe", "risky")
    run.evaluations = {
        arm: dataclasses.replace(
            run.evaluations[arm],
            samples=tuple(
                {
                    "suite": suite,
                    "id": key,
                    "purpose": purpose,
                    "group": None,
                    "prompt": f"{suite} {key}",
                    "reply": f"{arm}: {ATTACK}",
                }
                | {"outcome": outcomes[at] if suite == "harm" else True}
                for suite, purpose in (("harm", "safety"), ("plain", "over-refusal"))
                for key, outcomes in OUTCOMES.items()
            ),
        )
        for at, arm in enumerate(arms)
    }
    return run


def narrow(browser: Browser, **values: Any) -> dict[str, list[str]]:
    """Give the controls values; the examples of each suite that are not hidden."""
    browser.run(
        f"""Object.entries({json.dumps(values)}).forEach(([part, value]) => {{
          const control = document.querySelector(`.sample-controls [data-part="${{part}}"]`);
          control.value = value;
          control.dispatchEvent(new Event("input", {{ bubbles: true }}));
        }})"""
    )
    found: dict[str, list[str]] = browser.run(
        """Object.fromEntries([...document.querySelectorAll("[data-suite]:not([hidden])")].map((suite) => [
             suite.dataset.suite,
             [...suite.querySelectorAll("tbody tr:not([hidden])")].map((row) => row.querySelector(".said").textContent),
           ]))"""
    )
    return {suite: [prompt.removeprefix(f"{suite} ") for prompt in prompts] for suite, prompts in found.items()}


def test_examples_are_narrowed_down_to_a_suite_an_outcome_and_arms(
    browser: Browser, tmp_path: Path, small: Run
) -> None:
    small.write(tmp_path / "report.html")
    browser.open(tmp_path / "report.html", READY)
    # Those that differ come first; a judgement that is missing differs, and is neither lost nor gained.
    assert narrow(browser) == {"harm": ["a", "b", "d", "e", "c"], "plain": list("abcde")}
    assert narrow(browser, fate="lost gained") == {"harm": ["a", "b", "e"], "plain": []}
    assert narrow(browser, fate="lost") == {"harm": ["b"], "plain": []}
    assert narrow(browser, fate="gained") == {"harm": ["a", "e"], "plain": []}
    assert browser.run("document.querySelector('[data-part=count]').textContent") == "2 of the 10 examples on this page"
    # Without risky there is nothing that it gained, and its column is gone.
    browser.run("document.querySelector('.sample-controls [data-part=arm][value=\"2\"]').click()")
    assert narrow(browser) == {"harm": ["a"], "plain": []}
    columns = "[...document.querySelectorAll('.samples thead')].map((head) => [...head.querySelectorAll('th:not([hidden])')].map((cell) => cell.textContent))"
    assert browser.run(columns) == [["Prompt", "base", "safe"]] * 2
    assert narrow(browser, fate="", suite="plain") == {"plain": list("abcde")}
    assert browser.console == []


def test_harmful_replies_stay_behind_their_click(browser: Browser, tmp_path: Path, small: Run) -> None:
    small.write(tmp_path / "report.html")
    browser.open(tmp_path / "report.html", READY)
    narrow(browser, suite="harm", fate="lost")
    assert not browser.run("document.querySelector('[data-suite=harm] .said').checkVisibility()")
    browser.point("[data-suite=harm] summary", click=True)
    browser.settle()
    assert browser.run("document.querySelector('[data-suite=harm] tr:not([hidden]) .said').checkVisibility()")


def test_replies_stay_text(browser: Browser, tmp_path: Path, small: Run) -> None:
    small.write(tmp_path / "report.html")
    browser.open(tmp_path / "report.html", READY)
    said = browser.run("[...document.querySelectorAll('[data-suite=plain] td .said')].map((one) => one.textContent)")
    assert said == [f"{arm}: {ATTACK}" for _ in range(5) for arm in ("base", "safe", "risky")]
    assert browser.run("document.title") != "owned"
    assert browser.console == []
