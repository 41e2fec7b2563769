"""The strengths at which arms are equally safe: those whose refusals are the target, or full strength with a reason."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from test_safety_costs import evaluated

from castune.artifacts import EvalResult
from castune.config import EvaluateConfig
from castune.steps.equal_safety import costs_at_equal_safety, strengths_at_equal_safety

N = 100
SETTINGS = EvaluateConfig().model_dump(mode="json")


def at(rate: float, strength: float = 1.0) -> EvalResult:
    """An evaluation in which the first of 100 prompts are refused."""
    found = evaluated("arm", [float(i < round(N * rate)) for i in range(N)], [1.0], [1.0])
    model: Any = {} if strength == 1 else {"strength": strength}
    return EvalResult(**{**vars(found), "settings": SETTINGS, "model": model})


def folder(base: float | None, arms: dict[str, dict[float, float]]) -> Any:
    """What is read of a run: refusals of its arms by strength."""
    evaluations = {} if base is None else {"base": at(base)}
    evaluations |= {name: at(points[1.0]) for name, points in arms.items()}
    strengths = {name: {s: at(rate, s) for s, rate in points.items() if s != 1} for name, points in arms.items()}
    return SimpleNamespace(load_evaluations=lambda: evaluations, load_strengths=lambda: strengths)


def test_arms_meet_at_the_target() -> None:
    arms = {"safe": {0.5: 0.4, 1.0: 0.6}, "all": {0.25: 0.5, 0.5: 0.8, 1.0: 1.0}}
    found = strengths_at_equal_safety(folder(0.2, arms), ["all", "safe"])
    # The base and 80 % of what the least safe arm gains.
    assert found.target == pytest.approx(0.2 + 0.8 * 0.4)
    assert found.why_full == ""
    assert 0.5 < found.strengths["safe"] < 1
    assert 0.25 < found.strengths["all"] < 0.5
    for strength in found.strengths.values():
        assert strength == round(strength, 3)


def test_a_strength_that_was_measured_is_taken_as_it_is() -> None:
    arms = {"safe": {0.5: 0.6, 1.0: 0.7}, "all": {0.25: 0.6, 1.0: 0.9}}
    assert strengths_at_equal_safety(folder(0.2, arms), ["safe", "all"]).strengths == {"safe": 0.5, "all": 0.25}


@pytest.mark.parametrize(
    ("base", "arms", "names", "why"),
    [
        (0.2, {"safe": {0.5: 0.4, 1.0: 0.6}}, ["safe"], "there is one arm"),
        (None, {"safe": {1.0: 0.6}, "all": {1.0: 0.6}}, ["safe", "all"], "the base model was not evaluated"),
        (0.2, {"safe": {0.5: 0.4, 1.0: 0.6}, "all": {1.0: 0.9}}, ["safe", "all"], "all: not measured at other"),
        (
            0.7,
            {"safe": {0.5: 0.4, 1.0: 0.6}, "all": {0.5: 0.8, 1.0: 0.9}},
            ["safe", "all"],
            "safe: not seen to be safer",
        ),
    ],
)
def test_where_there_is_no_such_strength_it_is_full_and_why(
    base: float | None, arms: dict[str, dict[float, float]], names: list[str], why: str
) -> None:
    found = strengths_at_equal_safety(folder(base, arms), names)
    assert found.target is None
    assert why in found.why_full
    assert found.strengths == dict.fromkeys(names, 1.0)


@pytest.mark.parametrize(
    ("points", "why"),
    [
        ({0.5: 0.2, 1.0: 0.21}, "kept: not seen to be safer"),
        ({0.5: 0.2, 1.0: 0.2}, "kept: not seen to be safer"),
        ({1.0: 0.9}, "kept: not measured at other strengths"),
    ],
)
def test_an_arm_that_cannot_be_compared_moves_no_other(points: dict[float, float], why: str) -> None:
    arms = {"safe": {0.5: 0.4, 1.0: 0.7}, "all": {0.25: 0.5, 0.5: 0.8, 1.0: 1.0}}
    alone = strengths_at_equal_safety(folder(0.2, arms), ["all", "safe"])
    found = strengths_at_equal_safety(folder(0.2, {**arms, "kept": points}), ["all", "safe", "kept"])
    assert found.target == alone.target
    assert found.strengths == {**alone.strengths, "kept": 1.0}
    assert why in found.why_full


def test_an_arm_that_was_measured_otherwise_is_named() -> None:
    """Its evaluation at full strength too has to be beside the base model's."""
    arms = {"safe": {0.5: 0.4, 1.0: 0.7}, "all": {0.25: 0.5, 0.5: 0.8, 1.0: 1.0}}
    run = folder(0.2, arms)
    full = run.load_evaluations()
    full["safe"] = EvalResult(**{**vars(full["safe"]), "settings": {**SETTINGS, "max_new_tokens": 7}})
    found = costs_at_equal_safety(run)
    assert found is not None
    assert found.arms == ["all"]
    assert list(found.left_out) == ["safe"]
    assert "not measured by the suites, judge and settings of the base model" in found.left_out["safe"]
