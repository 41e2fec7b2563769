"""What a repair says of its candidates where one falls silent: planted refusals and costs, no model."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from gate_run import evaluation, of_count

from castune.artifacts import EvalResult
from castune.artifacts.adapter_inspection import SCHEMA, AdapterInspection
from castune.artifacts.repair_result import Tried
from castune.config import RepairConfig
from castune.errors import NothingScored
from castune.steps.bench import tried_rows
from castune.steps.candidates import Candidate
from castune.steps.repair import choose

Outcomes = Sequence[float | bool | None]
NOTHING = AdapterInspection(SCHEMA.empty_table(), {"data": {}, "norm": 0.0})


def result(name: str, refused: Outcomes, nll: float | Outcomes, **others: Outcomes) -> EvalResult:
    said = [nll + 0.01 * i for i in range(50)] if isinstance(nll, float) else nll
    named = {other.replace("_", "-"): values for other, values in others.items()}
    return evaluation(name, {"harmful": refused, "said": said, **named}, None)


def tried(*last: EvalResult, base: Outcomes | None = None, source: Outcomes | None = None) -> list[Tried]:
    """The rows of an adapter that refuses 80 of 100, of one that refuses 76 of them for less, and of others."""
    results = [
        result("base", of_count(0, 100) if base is None else base, 1.0),
        result("mine", of_count(80, 100) if source is None else source, 1.3),
        result("drop-2", of_count(76, 100), 1.1),
        *last,
    ]
    candidates = [Candidate(one.name, "source" if one.name == "mine" else "effects") for one in results[1:]]
    return tried_rows(candidates, {one.name: one for one in results}, "nll", inspection=NOTHING, judge="opening")


@pytest.mark.parametrize("heard", [0, 8, 79])
def test_a_candidate_that_falls_silent_is_never_chosen(heard: int) -> None:
    """Every reply that it gives is a refusal, and it costs least."""
    plain = tried()
    rows = tried(result("drop-4", [*[True] * heard, *[None] * (100 - heard)], 1.05))
    assert rows[:2] == plain, "the others are what they were"
    assert (rows[2].kept, rows[2].safety) == ((None, None) if heard == 0 else (1, 1))
    assert rows[2].too_few == f"of 100 examples of harmful that mine has a score for it has {heard}"
    assert rows[2].n["safety"] == heard
    assert rows[2].saved is not None
    assert rows[1].saved is not None
    assert rows[2].saved[0] > rows[1].saved[0]
    chosen = choose(rows[1:], RepairConfig(), "nll")
    assert chosen == choose(plain[1:], RepairConfig(), "nll")
    assert chosen[0] == "drop-2"


def test_a_candidate_of_which_four_fifths_are_scored_can_be_chosen() -> None:
    rows = tried(result("drop-4", of_count(80, 80, unscored=20), 1.05))
    assert (rows[2].kept, rows[2].too_few) == (1, "")
    assert choose(rows[1:], RepairConfig(), "nll")[0] == "drop-4"


def test_what_few_cost_examples_say_is_not_believed() -> None:
    cheap: list[float | None] = [1.0 + 0.01 * i if i < 20 else None for i in range(50)]
    rows = tried(result("drop-4", of_count(80, 100), cheap))
    assert rows[2].too_few == "of 50 examples of said that mine has a score for it has 20"
    assert choose(rows[1:], RepairConfig(), "nll")[0] == "drop-2"


def test_a_silent_suite_is_told_apart_from_those_that_were_heard() -> None:
    results = [
        result(name, of_count(n, 100), nll, harmful_2=small)
        for name, n, nll, small in (
            ("base", 0, 1.0, of_count(0, 10)),
            ("mine", 80, 1.3, of_count(8, 10)),
            ("drop-2", 80, 1.1, [None] * 10),
        )
    ]
    candidates = [Candidate("mine", "source"), Candidate("drop-2", "effects")]
    _, row = tried_rows(candidates, {one.name: one for one in results}, "nll", inspection=NOTHING, judge="opening")
    assert (row.kept, row.safety) == (None, None)
    assert row.too_few == "of 10 examples of harmful-2 that mine has a score for it has 0"


def test_an_adapter_or_a_base_of_which_nothing_is_scored_is_refused() -> None:
    for silent in ({"base": [None] * 100}, {"source": [None] * 100}):
        with pytest.raises(NothingScored, match="no prompt of harmful could be scored under the base model and the"):
            tried(**silent)


@pytest.mark.parametrize(("silent", "name", "other"), [("base", "base", "mine"), ("source", "mine", "base")])
def test_a_silent_base_or_adapter_is_told(silent: str, name: str, other: str, caplog: pytest.LogCaptureFixture) -> None:
    few = [*of_count(0 if silent == "base" else 8, 8), *[None] * 92]
    rows = tried(**{silent: few})
    said = f"{name}: of 100 examples of harmful that {other} has a score for it has 8; the gain in refusals is that on"
    assert said in caplog.text
    assert not any(row.too_few for row in rows)
    caplog.clear()
    tried()
    assert caplog.text == ""
