"""What the command line says of an adapter over its strength: tables that fit, sentences that claim no more than was found."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from castune.purposes import PURPOSES
from castune.report.dial import caution, curve_tables, level_table, rule, target_sentences
from castune.stats.dial import StrengthCurves

STRENGTHS = (0, 0.25, 0.5, 0.75, 1, 1.25, 1.5)


def curves(n: int = 60) -> StrengthCurves:
    """Everything that castune measures, noisily, with changes as large as they come."""
    rng = np.random.default_rng(1)
    outcomes = {}
    for purpose, about in PURPOSES.items():
        if about.is_continuous:
            values = rng.normal(5, 3, n) + np.array(STRENGTHS)[:, None] * rng.normal(8, 6, n)
        else:
            values = (rng.random((7, n)) < np.linspace(0.05, 0.99, 7)[:, None]).astype(float)
        outcomes[purpose] = [values]
    outcomes["safety"][0][1, 0] = np.nan
    return StrengthCurves.of(STRENGTHS, outcomes, draws=200)


def falling(*values: float) -> StrengthCurves:
    return StrengthCurves.of(STRENGTHS, {"utility": [np.tile(np.array(values)[:, None], 3)]}, draws=5)


def said(measure: str, target: float, strength: float | None, *, goal: bool, found: StrengthCurves) -> str:
    return " ".join(target_sentences(found.reach(measure, target), strength, goal=goal)).replace("\u202f", " ")


def test_everything_fits_into_80_columns() -> None:
    found = curves()
    for text in (*curve_tables(found), rule(), level_table(0.625, found.at(0.625))):
        assert max(map(len, text.splitlines())) <= 80, text


def test_the_tables_hold_the_numbers() -> None:
    shares, nats = curve_tables(curves())
    assert shares.startswith("Rates in %\n")
    assert nats.startswith("Nats per token\n")
    lines = shares.splitlines()
    assert [line.split()[0] for line in lines if line[0] in "0123456789bEL"] == [
        "base", "0.25", "0.5", "0.75", "1", "1.25", "1.5", "Examples", "Left",
    ]  # fmt: skip
    measure = curves().measures["utility"]
    row = next(line for line in lines if line.startswith("1.5 "))
    assert f"{100 * measure.mean_J[-1]:.1f}" in row
    assert lines[-1].split() == ["Left", "out", "1", "0", "0"]
    # The base model has not changed, so there is no interval under it.
    assert " to " not in lines[lines.index(next(line for line in lines if line.startswith("base"))) + 1]


def test_a_strength_that_is_left_out_is_said_to_be() -> None:
    outcomes = np.tile(np.linspace(0.2, 0.8, 7)[:, None], 3)
    curves = {"safety": [outcomes], "utility": [1 - outcomes]}
    found = StrengthCurves.of(STRENGTHS, curves, left_out={"safety": [0.75, 1.5]}, draws=5)
    [table] = curve_tables(found)
    cells = {line.split()[0]: line.split()[1:] for line in table.splitlines() if line[:1] in "01"}
    assert cells["0.75"] == ["left", "out", "50.0"]
    assert cells["1.5"] == ["left", "out", "20.0"]
    assert cells["1.25"] == ["70.0", "30.0"]
    levels = found.at(1.5)
    level = level_table(1.5, levels, [name for name in found.measures if name not in levels])
    assert "Refusals on harmful prompts, %  not known" in level
    assert max(map(len, (*table.splitlines(), *level.splitlines()))) <= 80
    kept = said("safety", 0.1, None, goal=False, found=found)
    assert "at every measured strength but 0.75, 1.5, so any of them keeps this limit" in kept


def test_one_kind_of_measure_is_one_table() -> None:
    [table] = curve_tables(falling(*np.linspace(0.7, 0.1, 7)))
    assert "Utility" in table
    assert "Left out" not in table


def test_a_goal_and_a_limit_are_told_apart() -> None:
    found = falling(*np.linspace(0.7, 0.1, 7))
    assert (
        said("utility", 0.5, 0.5, goal=False, found=found)
        == "Utility accuracy: stays at or above 50.0 % up to strength 0.5."
    )
    between = said("utility", 0.55, 0.375, goal=False, found=found)
    assert "It lies between the measured 0.25 and 0.5" in between
    assert "--strengths 0.375 measures it" in between
    kept = said("utility", 0.05, None, goal=False, found=found)
    assert kept == "Utility accuracy: at or above 5.0 % at every measured strength, so any of them keeps this limit."


def test_what_is_never_reached_is_said_plainly() -> None:
    never = said("utility", 0.9, None, goal=True, found=falling(*np.linspace(0.2, 0.8, 7)))
    assert "no measured strength reaches 90.0 %; the closest is 80.0 %, at strength 1.5. 0 % of the resamples" in never
    assert "--strengths, up to 2" in never
    worse = said("utility", 0.9, None, goal=True, found=falling(*np.linspace(0.7, 0.1, 7)))
    assert "the closest is 70.0 %, the base model itself" in worse


def test_what_the_base_model_has_is_said() -> None:
    found = falling(*np.linspace(0.2, 0.8, 7))
    assert "the base model is at 20.0 % already" in said("utility", 0.2, None, goal=True, found=found)


def test_an_interval_without_an_end_says_how_many_draws_do_not_get_there() -> None:
    rng = np.random.default_rng(2)
    refused = (rng.random((7, 50)) < np.linspace(0.1, 0.85, 7)[:, None]).astype(float)
    found = StrengthCurves.of(STRENGTHS, {"safety": [refused]}, draws=400)
    top = float(refused.mean(1).max())
    words = said("safety", top, 1.5, goal=True, found=found)
    assert "to no bound: " in words
    assert "of the resamples never reach it" in words
    assert "95 % interval" in said("safety", 0.4, 0.5, goal=True, found=found)


@pytest.mark.parametrize("spread", [True, False])
def test_a_strength_chosen_on_these_examples_is_said_to_be(spread: bool) -> None:
    found: Any = curves() if spread else falling(*np.linspace(0.2, 0.8, 7))
    name = "safety" if spread else "utility"
    text = caution(found.reach(name, 0.5), found.at(0.5)[name], 59)
    assert "chosen on the same 59 examples" in text
    assert "no independent test" in text
    assert ("Other examples of the same kind would give" in text) is spread
