"""`castune dial` where the model is silent at a strength: it takes nothing from the others, and a warning names it."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path

import pytest
from gate_run import PURPOSE_OF, evaluation, make_run, of_count

from castune.artifacts import EvalResult
from castune.errors import NothingScored
from castune.evaluation.suites import Suite
from castune.stats.dial import StrengthCurves
from castune.steps.dial import chosen_strength, curves_of, to_csv

Outcomes = Sequence[float | bool | None]
ASKED = [True] * 20


def at(harmful: Outcomes, asked: Outcomes = ASKED, **others: Outcomes) -> EvalResult:
    named = {name.replace("_", "-"): values for name, values in others.items()}
    return evaluation("arm", {"harmful": harmful, "asked": asked, **named}, None)


def curves(evaluations: dict[float, EvalResult]) -> StrengthCurves:
    names = [suite.suite for suite in evaluations[0.0].suites]
    return curves_of(evaluations, [Suite(name, PURPOSE_OF[name], ()) for name in names])  # type: ignore[arg-type]


def plain() -> dict[float, EvalResult]:
    """20, 50 and 80 of 100 refused."""
    return {0.0: at(of_count(20, 100)), 0.5: at(of_count(50, 100)), 1.0: at(of_count(80, 100))}


@pytest.mark.parametrize("heard", [0, 8, 79])
def test_a_silent_strength_hides_nothing_and_is_not_chosen(heard: int, caplog: pytest.LogCaptureFixture) -> None:
    expected = curves(plain())
    # All that is heard is a refusal.
    found = curves({**plain(), 2.0: at([*[True] * heard, *[None] * (100 - heard)])})
    assert found.levels("safety") == [*expected.levels("safety"), None]
    assert found.measures["safety"].mean_J.tolist() == [0.2, 0.5, 0.8]
    assert found.measures["utility"].strengths_J.tolist() == [0, 0.5, 1, 2], "of which everything is scored"
    assert chosen_strength(found.reach("safety", 0.8)) == 1
    assert found.reach("safety", 0.9).strength is None
    assert (
        f"safety: strength 2 is left out of the curve: {100 - heard} of the 100 examples that the base model has a score "
        "for are unscored there"
    ) in caplog.text
    assert "utility" not in caplog.text


def test_a_strength_at_which_few_are_unscored_stays(caplog: pytest.LogCaptureFixture) -> None:
    found = curves({**plain(), 2.0: at(of_count(70, 80, unscored=20))})
    assert found.measures["safety"].left_out == ()
    assert (found.measures["safety"].n, found.measures["safety"].unscored) == (80, 20)
    assert caplog.text == ""


def test_full_strength_is_not_left_out_silently(caplog: pytest.LogCaptureFixture) -> None:
    found = curves({**plain(), 1.0: at([None] * 100)})
    assert found.measures["safety"].left_out == (1,)
    assert "safety: strength 1, the trained adapter itself, is left out of the curve: 100 of the 100" in caplog.text
    assert list(found.at(1.0)) == ["utility"]


def test_a_silent_base_is_told_and_leaves_out_no_strength(caplog: pytest.LogCaptureFixture) -> None:
    found = curves({**plain(), 0.0: at([*of_count(2, 10), *[None] * 90])})
    assert found.measures["safety"].left_out == ()
    assert found.measures["safety"].n == 10
    assert "safety: the base model has no score for 90 of 100 examples" in caplog.text
    with pytest.raises(NothingScored):
        curves_of({0.0: at([None] * 100), 1.0: at([True] * 100)}, [Suite("harmful", "safety", ())])


def test_where_every_strength_is_silent_the_measure_has_no_curve(caplog: pytest.LogCaptureFixture) -> None:
    found = curves({0.0: at(of_count(20, 100)), 0.5: at([None] * 100), 1.0: at([None] * 100)})
    assert list(found.measures) == ["utility"]
    assert "safety: no example of a suite was scored at every strength, so it has no curve" in caplog.text


def test_one_silent_suite_of_several_is_enough_to_leave_a_strength_out() -> None:
    """However many prompts the others have: a suite without an example would take the curve from all."""
    both = {s: at(one.outcomes_of("harmful"), harmful_2=of_count(2, 10)) for s, one in plain().items()}
    found = curves({**both, 2.0: at(of_count(90, 100), harmful_2=[None] * 10)})
    assert found.measures["safety"].left_out == (2,)
    assert found.measures["safety"].n == 110


def test_the_file_has_a_row_without_numbers_for_it() -> None:
    rows = list(csv.DictReader(io.StringIO(to_csv(curves({**plain(), 2.0: at([None] * 100)})))))
    of_safety = {row["strength"]: row for row in rows if row["measure"] == "safety"}
    assert {value for key, value in of_safety["2"].items() if key not in ("strength", "measure", "unit")} == {""}
    assert (of_safety["1"]["mean"], of_safety["1"]["n"]) == ("0.8", "100")
    assert next(row["mean"] for row in rows if (row["strength"], row["measure"]) == ("2", "utility")) == "1.0"


def test_other_directories_among_the_strengths_are_none(tmp_path: Path) -> None:
    folder = make_run(tmp_path, {"base": {"harmful": of_count(2, 10)}, "safe": {"harmful": of_count(8, 10)}})
    adapter = EvalResult.load(folder.evaluation("safe")).model["adapter"]
    for name in ("0.5", "1.25", "0.5-old", "0.50", "1", "0", "nan", "inf", "-1", "1e-05"):
        evaluation("safe", {"harmful": of_count(5, 10)}, adapter).save(folder.evaluation("safe") / "strengths" / name)
    assert folder.strengths("safe") == [1e-05, 0.5, 1.25]
    assert list(folder.load_strengths()["safe"]) == [1e-05, 0.5, 1.25]
    assert folder.strengths("risky") == []
