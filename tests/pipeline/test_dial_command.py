"""`castune dial`: what is measured of an adapter at several strengths, what not again, and the adapter that is written."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import command, refused
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from castune.artifacts import EvalResult, HeadSelection, ScaledAdapter, TuneResult
from castune.config import Recipe
from castune.errors import NothingScored
from castune.evaluation.run import evaluate
from castune.evaluation.suites import load_suites
from castune.stats.dial import StrengthCurves
from castune.steps.dial import chosen_strength, curves_of, dial, dial_step
from castune.steps.directory import RunDirectory
from castune.steps.equal_safety import costs_at_equal_safety
from castune.steps.export import export
from castune.steps.report import report_step

Finished = Callable[..., Path]


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
    """A run that was measured at full strength alone, with an arm beside the main one."""
    return RunDirectory(finished_run(evaluate__suites=suites, tune__learning_rate=0.2))


def written(folder: RunDirectory) -> dict[str, int]:
    """When every evaluation was written."""
    return {
        str(file.parent.relative_to(folder.path / "evaluation")): file.stat().st_mtime_ns
        for file in folder.path.glob("evaluation/**/metrics.json")
    }


def told(*arguments: object) -> str:
    """What a command says, however its lines are broken."""
    return " ".join(command(*arguments).split())


def rows(folder: RunDirectory, arm: str = "safe") -> list[dict[str, str]]:
    with folder.dial(arm).open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


# -- the curve


def test_only_what_is_missing_is_measured(folder: RunDirectory) -> None:
    before, recipe = written(folder), folder.recipe_file.read_bytes()
    said = command("dial", folder.path, "--strengths", "0.5,1.5")
    after = written(folder)
    assert after.keys() - before.keys() == {"safe/strengths/0.5", "safe/strengths/1.5"}
    assert before.items() <= after.items()
    assert folder.recipe_file.read_bytes() == recipe, "the strengths are this command's, not the recipe's"
    assert "NLL of right" in said

    again = command("dial", folder.path, "--strengths", "0.5")
    assert written(folder) == after
    assert "1.5 " in again, "what was measured before belongs to the curve"
    command("dial", folder.path, "--strengths", "0.75", "--arm", "risky")
    assert written(folder).keys() - after.keys() == {"risky/strengths/0.75"}


def test_nothing_is_loaded_where_nothing_is_missing(folder: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    command("dial", folder.path, "--strengths", "0.5")
    monkeypatch.setattr("castune.steps.evaluate.load_model", None)
    command("dial", folder.path, "--strengths", "0.5,1", "--target", "kl=0.1")


def test_the_curve_is_that_of_the_evaluations(folder: RunDirectory) -> None:
    curves = dial(folder.path, strengths=(0.5, 1.5))
    assert curves.strengths_J.tolist() == [0, 0.5, 1, 1.5]
    assert list(curves.measures) == ["over-refusal", "nll", "kl", "safety-margin"]
    base, full = (EvalResult.load(folder.evaluation(name)) for name in ("base", "safe"))
    half = folder.load_strengths()["safe"][0.5]
    for purpose, measure in curves.measures.items():
        values = [result.mean(purpose) for result in (base, half, full)]
        assert measure.mean_J[:3] == pytest.approx(values)
    table = {(row["strength"], row["measure"]): row for row in rows(folder)}
    assert len(table) == 4 * 4
    cell = table["0.5", "nll"]
    assert float(cell["mean"]) == pytest.approx(half.mean("nll"))
    assert float(cell["change"]) == pytest.approx(float(cell["mean"]) - float(table["0", "nll"]["mean"]))
    assert float(cell["change_low"]) <= float(cell["change"]) <= float(cell["change_high"])
    assert (cell["unit"], cell["n"], cell["unscored"]) == ("nats", "4", "0")
    assert table["0", "kl"]["change_low"] == "", "the base model does not differ from itself"


def test_what_was_measured_otherwise_is_measured_again(folder: RunDirectory, own_data: dict[str, Path]) -> None:
    command("dial", folder.path, "--strengths", "0.5,0.75")
    command("evaluate", folder.path, "--suites", f"safety-margin:{own_data['held-out']},nll:{own_data['utility']}")
    before = written(folder)
    curves = dial(folder.path, strengths=(0.5,))
    assert list(curves.measures) == ["nll", "safety-margin"]
    assert curves.strengths_J.tolist() == [0, 0.5, 1], "0.75 is of other suites"
    after = written(folder)
    assert {name for name in after if after[name] != before[name]} == {"safe/strengths/0.5"}
    # Nor does the report stumble over it.
    found = costs_at_equal_safety(folder)
    assert found is not None
    assert [point.strength for point in found.points["nll"]["safe"]] == [0, 0.5, 1]


def test_the_report_compares_the_arms_that_have_a_curve_and_names_the_others(folder: RunDirectory) -> None:
    command("dial", folder.path, "--strengths", "0.5,0.75")
    page = report_step(folder).read_text(encoding="utf-8")
    assert "Not compared: risky (not measured at other strengths; castune dial" in page
    assert 'data-chart="equal_safety_nll"' in page
    command("dial", folder.path, "--strengths", "0.35", "--arm", "risky")
    found = costs_at_equal_safety(folder)
    assert found is not None
    assert list(found.gains) == ["safe", "risky"]


def test_replies_at_all_strengths_are_judged_by_the_judge_of_the_run(folder: RunDirectory) -> None:
    command("dial", folder.path, "--strengths", "0.5")
    half = folder.load_strengths()["safe"][0.5]
    assert half.settings["judge"] == folder.load_recipe().evaluate.judge
    assert half.suites[3].judge == half.settings["judge"]


# -- a target, and an adapter at it


def test_an_adapter_at_the_strength_of_a_target(folder: RunDirectory, tmp_path: Path) -> None:
    curves = dial(folder.path, strengths=(0.5, 1.5))
    limit = float(curves.measures["kl"].mean_J[2]) / 2
    said = told("dial", folder.path, "--strengths", "0.5,1.5", "--target", f"kl={limit}", "--export", tmp_path / "out")
    made = ScaledAdapter.load(tmp_path / "out")
    reached = curves.reach("kl", limit)
    assert reached.strength is not None
    assert reached.strength - 0.001 <= made.strength <= reached.strength, "a limit is kept"
    assert made.target == {"purpose": "kl", "value": limit}
    assert f"up to strength {made.strength:g}" in said
    assert "chosen on the same 3 examples" in said
    assert f"adapter at strength {made.strength:g}" in said
    tuned = TuneResult.load(folder.path / "adapter")
    assert made.source["hash"] == tuned.certificate.adapter_hash
    assert made.source["name"] == "safe of run"
    assert made.certificate.units == HeadSelection.load(folder.path).units

    # Measured at that strength, it is what the written adapter does.
    command("dial", folder.path, "--strengths", f"{made.strength:g}")
    measured = EvalResult.load(folder.at_strength("safe", made.strength))
    assert float(measured.mean("kl") or 0) == pytest.approx(limit, rel=0.2)
    recipe = folder.load_recipe()
    model = AutoModelForCausalLM.from_pretrained(recipe.model, dtype=torch.float32)
    by_hand = evaluate(
        PeftModel.from_pretrained(model, tmp_path / "out"),
        AutoTokenizer.from_pretrained(recipe.model),
        suites=load_suites(recipe.evaluate.suites[:2]),
        config=recipe.evaluate,
    )
    for suite in by_hand.suites:
        found = [sample["outcome"] for sample in measured.samples_of(suite.suite)]
        assert found == pytest.approx([sample["outcome"] for sample in by_hand.samples_of(suite.suite)], abs=1e-5)


def test_a_strength_that_is_given_is_written_without_an_evaluation(folder: RunDirectory, tmp_path: Path) -> None:
    before = written(folder)
    said = told("dial", folder.path, "--strength", "0.6", "--export", tmp_path / "out")
    assert written(folder) == before
    assert not folder.dial("safe").exists()
    assert "strength 0.6 has not been measured" in said
    made = ScaledAdapter.load(tmp_path / "out")
    assert (made.strength, made.target) == (0.6, None)
    # It can be published, merged, and put beside the arms.
    export(tmp_path / "out", tmp_path / "published")
    card = (tmp_path / "published" / "README.md").read_text(encoding="utf-8")
    assert "| Strength | 0.6 |" in card
    assert "safe of run" in card
    assert "| Zone | safe |" in card
    assert export(tmp_path / "out", tmp_path / "merged", merged=True).merging is not None
    command("mask", tmp_path / "out", "--run", folder.path, "--as", "weaker")
    assert folder.has_arm("weaker")


def test_a_strength_is_shown_if_it_was_measured_and_else_the_command_says_so(folder: RunDirectory) -> None:
    before = written(folder)
    assert "At strength 1 " in told("dial", folder.path, "--strength", "1")
    assert written(folder) == before
    between = told("dial", folder.path, "--strengths", "0.5", "--strength", "0.6")
    assert "At strength 0.6 " in between
    assert "note: strength 0.6 has not been measured; --strengths 0.6 measures it" in between
    assert "note" not in told("dial", folder.path, "--strengths", "0.5", "--strength", "0.5")
    beyond = told("dial", folder.path, "--strengths", "0.5", "--strength", "1.9")
    assert "At strength" not in beyond
    assert "note: strength 1.9 has not been measured" in beyond


def test_a_masked_arm_is_dialled_like_a_trained_one(folder: RunDirectory, tmp_path: Path) -> None:
    command("mask", folder.path / "adapter", "--run", folder.path, "--as", "copy")
    command("dial", folder.path, "--arm", "copy", "--strengths", "0.5", "--strength", "0.5", "--export", tmp_path / "c")
    half, other = (dial(folder.path, arm=arm, strengths=(0.5,)) for arm in ("copy", "safe"))
    assert half.at(0.5)["nll"].mean == other.at(0.5)["nll"].mean
    assert ScaledAdapter.load(tmp_path / "c").strength == 0.5


def test_what_is_never_reached_is_said_and_nothing_is_written(folder: RunDirectory, tmp_path: Path) -> None:
    dialled = ("dial", folder.path, "--strengths", "0.5")
    said = told(*dialled, "--target", "safety-margin=500")
    assert "no measured strength reaches 500.000" in said
    assert "no strength was found" in refused(*dialled, "--target", "safety-margin=500", "--export", tmp_path / "out")
    kept = told(*dialled, "--target", "kl=500")
    assert "at every measured strength, so any of them keeps this limit" in kept
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("measure", "target", "expected"),
    [("safety", 0.5, 0.5), ("safety", 0.6, 0.584), ("over-refusal", 0.5, 0.5), ("over-refusal", 0.6, 0.583)],
)
def test_a_goal_is_rounded_up_and_a_limit_down(measure: str, target: float, expected: float) -> None:
    import numpy as np

    rises = np.tile(np.array([0.2, 0.5, 0.8])[:, None], 3)
    curves = StrengthCurves.of((0, 0.5, 0.75), {measure: [rises]}, draws=2)
    found = chosen_strength(curves.reach(measure, target))
    assert found == pytest.approx(expected, abs=0.02)
    level = curves.at(found)[measure].mean.value  # type: ignore[arg-type]
    assert level >= target - 1e-9 if measure == "safety" else level <= target + 1e-9
    assert chosen_strength(curves.reach(measure, 0.9)) is None
    assert chosen_strength(curves.reach(measure, 0.2)) is None, "the base model's own"


# -- bad input


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--target", "refusal=0.9"], "this run measures over-refusal, nll, kl, safety-margin; try over-refusal=0.9"),
        (["--target", "refused=0.9"], "this run measures"),
        (["--target", "over-refusal=9"], "expected a share from 0 to 1, as in over-refusal=0.9"),
        (["--target", "over-refusal"], "expected a share from 0 to 1"),
        (["--target", "kl=nan"], "expected a number in nats per token"),
        (["--target", "kl=0.1", "--strength", "0.5"], "choose one of --target"),
        (["--export", "somewhere"], "needs a strength"),
        (["--strengths", "0,1"], "strength 0: accepted are numbers above 0, at most 2"),
        (["--strengths", "0.5,2.5"], "strength 2.5"),
        (["--strengths", "half"], "--strengths half: expected numbers separated by commas"),
        (["--strength", "-1", "--export", "somewhere"], "strength -1"),
        (["--arm", "nobody"], "no selection named nobody"),
    ],
    ids=str,
)
def test_bad_options_are_told_before_anything_is_measured(
    folder: RunDirectory, monkeypatch: pytest.MonkeyPatch, options: list[str], said: str
) -> None:
    monkeypatch.setattr("castune.steps.dial.evaluate_step", None)
    before = written(folder)
    assert said in refused("dial", folder.path, *options)
    assert written(folder) == before
    assert not (folder.path / "dial").exists()


def test_a_place_that_is_taken_is_told_before_anything_is_measured(folder: RunDirectory, tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "notes.txt").write_text("mine")
    error = refused("dial", folder.path, "--target", "kl=0.1", "--export", tmp_path / "taken", "--overwrite")
    assert "exists already; give another directory with --export" in error
    assert "safe/strengths/0.5" not in written(folder)


def test_runs_that_have_no_adapter_or_were_measured_elsewhere(folder: RunDirectory, tmp_path: Path) -> None:
    assert "not a run directory" in refused("dial", tmp_path / "nothing")
    recipe = folder.load_recipe()
    other = recipe.evaluate.model_copy(update={"backend": "vllm"})
    folder.save_recipe(Recipe(**{**dict(recipe), "evaluate": other}))
    assert f"castune evaluate {folder.path} --backend hf" in refused("dial", folder.path)
    folder.save_recipe(recipe)
    weights = folder.path / "adapter" / "adapter_model.safetensors"
    weights.write_bytes((folder.path / "arms/risky/adapter/adapter_model.safetensors").read_bytes())
    assert "is not the one its certificate was made for" in refused("dial", folder.path)
    HeadSelection.load(folder.path).save(folder.path / "arms" / "untrained")
    assert "no adapter yet; run: castune tune" in refused("dial", folder.path, "--arm", "untrained")


def test_where_nothing_was_scored_there_is_no_curve(folder: RunDirectory) -> None:
    result = EvalResult.load(folder.evaluation("safe"))
    suites = load_suites(folder.load_recipe().evaluate.suites)
    bare: list[Any] = [{**sample, "outcome": None} for sample in result.samples]
    unscored = EvalResult(**{**vars(result), "samples": tuple(bare)})
    with pytest.raises(NothingScored, match="not one example of any suite"):
        curves_of({0.0: unscored, 1.0: unscored}, suites)


def test_a_measure_of_which_nothing_was_scored_has_no_curve(
    folder: RunDirectory, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = EvalResult.outcomes_of
    monkeypatch.setattr(
        EvalResult,
        "outcomes_of",
        lambda self, suite: [None if "nll" in suite else outcome for outcome in whole(self, suite)],
    )
    curves = dial(folder.path, strengths=(0.5,))
    assert list(curves.measures) == ["over-refusal", "kl", "safety-margin"]
    assert "nll: no example of a suite was scored at every strength" in caplog.text
    with pytest.raises(NothingScored, match="nll: not one example was scored"):
        command("dial", folder.path, "--strengths", "0.5", "--target", "nll=0.1")


def test_the_report_leaves_out_what_was_measured_by_other_settings(folder: RunDirectory) -> None:
    command("dial", folder.path, "--strengths", "0.5,0.75")
    place = folder.at_strength("safe", 0.75)
    other = EvalResult.load(place)
    EvalResult(**{**vars(other), "settings": {**other.settings, "margin_tokens": 3}}).save(place)
    found = costs_at_equal_safety(folder)
    assert found is not None
    assert [point.strength for point in found.points["nll"]["safe"]] == [0, 0.5, 1]


def test_a_dial_that_was_stopped_goes_on(folder: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    from castune.steps import evaluate as step

    whole, calls = step.evaluate_on, []

    def stopped(*arguments: Any, **settings: Any) -> Any:
        calls.append(settings["name"])
        if len(calls) == 2:
            raise KeyboardInterrupt
        return whole(*arguments, **settings)

    recipe = folder.load_recipe()
    suites, arm = load_suites(recipe.evaluate.suites), folder.arm(None)
    monkeypatch.setattr(step, "evaluate_on", stopped)
    with pytest.raises(KeyboardInterrupt):
        dial_step(folder, recipe, arm, suites, (0.5, 0.75))
    assert not folder.dial("safe").exists()
    monkeypatch.setattr(step, "evaluate_on", lambda *a, **s: calls.append(s["name"]) or whole(*a, **s))
    dial_step(folder, recipe, arm, suites, (0.5, 0.75))
    assert calls == ["safe x 0.5", "safe x 0.75", "safe x 0.75"]
    record = json.loads((folder.path / "provenance.json").read_text())
    assert [step["stage"] for step in record["steps"]][-2:] == ["evaluate safe x 0.5", "evaluate safe x 0.75"]
