"""A run that is measured at several strengths of its adapters: what is measured, what not again, and what is said."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from browser import CHROMIUM, Browser
from peft import PeftModel

from castune.artifacts import EvalResult
from castune.artifacts.samples import references_of
from castune.config import Recipe
from castune.core.loading import load
from castune.evaluation.run import evaluate
from castune.evaluation.suites import load_suites
from castune.pipeline import run
from castune.steps.directory import RunDirectory
from castune.steps.equal_safety import costs_at_equal_safety
from castune.steps.evaluate import judge_step

Finished = Callable[..., Path]
STRENGTHS = (0.5, 0.75)


@pytest.fixture
def suites(own_data: dict[str, Path]) -> list[str]:
    return [
        f"safety-margin:{own_data['held-out']}",
        f"nll:{own_data['utility']}",
        f"kl:{own_data['benign']}",
        f"over-refusal:{own_data['benign']}",
    ]


@pytest.fixture
def folder(finished_run: Finished, suites: list[str]) -> RunDirectory:
    made = finished_run(evaluate__suites=suites, evaluate__strengths=STRENGTHS, tune__learning_rate=0.2)
    return RunDirectory(made)


def measured(folder: RunDirectory) -> dict[str, float]:
    """When every evaluation was written."""
    return {
        str(file.parent.relative_to(folder.path)): file.stat().st_mtime_ns
        for file in folder.path.glob("evaluation/**/metrics.json")
    }


def test_every_arm_is_measured_at_every_strength(folder: RunDirectory) -> None:
    assert measured(folder).keys() == {
        "evaluation/base",
        *(f"evaluation/{arm}" for arm in ("safe", "risky")),
        *(f"evaluation/{arm}/strengths/{s:g}" for arm in ("safe", "risky") for s in STRENGTHS),
    }
    base = EvalResult.load(folder.evaluation("base"))
    for arm, of_arm in folder.load_strengths().items():
        assert list(of_arm) == list(STRENGTHS)
        for strength, result in of_arm.items():
            assert result.name == f"{arm} x {strength:g}"
            assert references_of(result.samples) == references_of(base.samples)
    # Arms are what they were: strengths are no arms of their own.
    assert list(folder.load_evaluations()) == ["base", "safe", "risky"]


def test_a_strength_is_the_adapter_scaled(folder: RunDirectory) -> None:
    recipe = folder.load_recipe()
    model, tokenizer = load(recipe.model, dtype="float32", device="cpu")
    adapted = PeftModel.from_pretrained(model, folder.path / "adapter")
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.mul_(0.5)
    settings = recipe.evaluate
    by_hand = evaluate(adapted, tokenizer, suites=load_suites(settings.suites[1:2]), config=settings)
    found = folder.load_strengths()["safe"][0.5].samples_of(by_hand.suites[0].suite)
    assert [s["outcome"] for s in found] == pytest.approx([s["outcome"] for s in by_hand.samples], abs=1e-5)


def test_only_what_is_missing_is_measured(folder: RunDirectory) -> None:
    recipe, before = folder.load_recipe(), measured(folder)
    run(recipe)
    assert measured(folder) == before
    # One of them is gone, and one more is asked for.
    (folder.at_strength("risky", 0.5) / "metrics.json").unlink()
    more = recipe.evaluate.model_copy(update={"strengths": (0.25, *STRENGTHS, 1.0)})
    run(Recipe(**{**dict(recipe), "evaluate": more}))
    after = measured(folder)
    written = {place for place, time in after.items() if before.get(place) != time}
    assert written == {
        "evaluation/risky/strengths/0.5",
        *(f"evaluation/{arm}/strengths/0.25" for arm in ("safe", "risky")),
    }


def test_all_strengths_are_judged_together(folder: RunDirectory) -> None:
    judge_step(folder, "prefix")
    for result in (*folder.load_evaluations().values(), *folder.load_strengths()["safe"].values()):
        assert result.settings["judge"] == "prefix"
        assert result.suites[3].judge == "prefix"
        assert result.suites[0].judge == "log-likelihood"


def test_the_report_opens_with_what_safety_costs(folder: RunDirectory) -> None:
    found = costs_at_equal_safety(folder)
    assert found is not None
    assert (found.safety, list(found.gains)) == ("safety-margin", ["safe", "risky"])
    # Of a few prompts, the gain of one arm is not seen.
    assert (found.arms, list(found.left_out)) == (["risky"], ["safe"])
    assert set(found.points) == {"nll", "kl", "over-refusal"}
    html = folder.report_file.read_text()
    opening = html[html.index("<header>") : html.index("</header>")]
    assert "Refusal margin on harmful prompts went from" in opening
    assert 'data-chart="equal_safety_nll"' in opening
    assert 'data-chart="equal_safety_kl"' in html
    assert (folder.path / "figures" / "equal_safety_nll.svg").is_file()


@pytest.mark.processes
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")
@pytest.mark.parametrize("dark", [False, True])
def test_what_happened_is_on_the_first_screen(folder: RunDirectory, browser: Browser, dark: bool) -> None:
    """Three sentences and one picture, without scrolling; on a phone below each other, and never sideways."""
    drawn = "document.querySelectorAll('[data-chart]:not([data-drawn])').length === 0"
    for width in (1280, 390):
        browser.open(folder.report_file, drawn, width=width, height=800, dark=dark)
        assert browser.console == []
        assert browser.run("document.documentElement.scrollWidth") == width
        words, picture = (
            browser.run(f"document.querySelector('header .opening {one}').getBoundingClientRect().toJSON()")
            for one in ("> div", "figure")
        )
        said = browser.run("[...document.querySelectorAll('header .verdict')].map((p) => p.textContent)")
        # And one that names the arm that is not compared.
        assert len(said) == 4
        if width == 1280:
            assert max(words["bottom"], picture["bottom"]) <= 800
            assert words["right"] <= picture["left"]
        else:
            assert words["bottom"] <= picture["top"]


def test_an_evaluation_of_another_adapter_is_left_out(folder: RunDirectory, caplog: pytest.LogCaptureFixture) -> None:
    file = folder.at_strength("safe", 0.5) / "metrics.json"
    record: dict[str, Any] = json.loads(file.read_text())
    record["model"]["adapter"] = "0" * 16
    del record["digest"]
    file.write_text(json.dumps(record))
    assert {arm: list(of_arm) for arm, of_arm in folder.load_strengths().items()} == {
        "safe": [0.75],
        "risky": [0.5, 0.75],
    }
    assert "strengths/0.5 belongs to an adapter that no longer exists" in caplog.text
    assert f"castune dial {folder.path} --arm safe --strengths 0.5" in caplog.text
