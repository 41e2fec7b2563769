"""Second opinions on the replies of a run."""

from __future__ import annotations

import dataclasses

import pytest

from castune.artifacts import EvalResult
from castune.artifacts.samples import ReplySample
from castune.evaluation.judges import judge
from castune.evaluation.judging import judge_again
from castune.evaluation.metrics import suite_result
from castune.evaluation.verdict import Judge, Verdict
from castune.steps import second_opinions as module
from castune.steps.evaluate import is_judged_by
from castune.steps.second_opinions import second_opinions

REPLIES = ["I can't help with that.", "Sure, here it is.", "A sea is blue. " * 5 + "I can't help with that.", ""]


def evaluated(by: str, replies: list[str] = REPLIES) -> EvalResult:
    samples: list[ReplySample] = [
        {"suite": "harm", "id": str(n), "purpose": "safety", "group": None, "prompt": "p", "reply": reply}
        | {"finished": True, "tokens": 1, "outcome": None}  # type: ignore[typeddict-item]
        for n, reply in enumerate(replies)
    ]
    suite = suite_result(samples, judge="", max_new_tokens=None, data_hash="", seconds=1.0)
    return judge_again(EvalResult("base", (suite,), tuple(samples), {"judge": ""}, {}, {}), by)


@pytest.fixture(autouse=True)
def _not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "find_encoder", lambda: None)


def test_rules_are_compared_with_the_other_rules() -> None:
    [pair] = second_opinions({"base": evaluated("opening")})
    assert (pair.arm, pair.one, pair.other) == ("base", "opening", "prefix")
    assert [both for _, *both in pair.verdicts] == [[True, True], [False, False], [True, False], [None, None]]
    [pair] = second_opinions({"base": evaluated("prefix")})
    assert (pair.one, pair.other) == ("prefix", "opening")


def test_the_members_of_a_panel_are_compared() -> None:
    [pair] = second_opinions({"base": evaluated("prefix+opening")})
    assert (pair.one, pair.other) == ("prefix", "opening")
    assert [both for _, *both in pair.verdicts] == [[True, True], [False, False], [False, True], [None, None]]


def test_some_replies_of_every_arm_are_read_where_the_encoder_is(monkeypatch: pytest.MonkeyPatch) -> None:
    class Reads(Judge):
        name = signature = "reading"

        def verdicts(self, prompts: list[str], replies: list[str]) -> list[Verdict]:  # type: ignore[override]
            return [Verdict(None)] * len(replies)

    monkeypatch.setattr(module, "find_encoder", lambda: "there")
    monkeypatch.setattr(module, "judge", lambda name: Reads() if name == "reading" else judge(name))
    long = [f"reply {n}" for n in range(450)]
    found = second_opinions({"base": evaluated("opening", long), "safe": evaluated("opening", long)})
    assert [(p.arm, p.other, len(p.verdicts)) for p in found] == [
        ("base", "prefix", 450),
        ("base", "reading", 150),
        ("safe", "prefix", 450),
        ("safe", "reading", 150),
    ]


def test_a_new_head_judges_again() -> None:
    result = evaluated("opening")
    assert is_judged_by("opening", result)
    assert not is_judged_by("prefix", result)
    [suite] = result.suites
    for stated, is_so in (("reading-1", True), ("reading-0", False)):
        old = dataclasses.replace(
            result, suites=(dataclasses.replace(suite, judge=stated),), settings={"judge": "reading"}
        )
        assert is_judged_by("reading", old) is is_so
