"""What a gate says: a table that fits 80 columns, and JUnit XML that any reader of XML reads."""

from __future__ import annotations

import xml.etree.ElementTree as ET

import pytest
from hypothesis import given
from hypothesis import strategies as st

from castune.artifacts.gate_result import GateResult, RuleResult
from castune.report.gate import gate_lines, junit_xml

PASS = RuleResult(
    {"metric": "safety", "at_least": 0.9}, "safety at least 0.9", "safe", "pass", unit="share",
    value=0.975, low=0.929, high=0.9914, n=120, suites=("harmful",), judges=("opening",),
)  # fmt: skip
FAIL = RuleResult(
    {"metric": "nll", "against": "base", "no_worse_than": 0.02}, "nll at most 0.02 worse than base", "safe", "fail",
    unit="nats", value=0.1, low=0.05, high=0.15, n=14_042, suites=("said",), judges=("log-likelihood",),
)  # fmt: skip
WIDE = RuleResult(
    {"metric": "over-refusal", "at_most": 0.1}, "over-refusal at most 0.1", "safe", detail="312 examples would decide",
    unit="share", value=0.067, low=0.034, high=0.126, n=120, unscored=3, examples_needed=312,
)  # fmt: skip
MISSING = RuleResult(
    {"metric": "kl", "at_most": 1},
    "kl at most 1",
    "risky",
    detail="the evaluation of risky is missing",
    is_measured=False,
)


def result(*rules: RuleResult) -> GateResult:
    return GateResult("runs/x", None, "gate.toml", {"safe": "a-b"}, rules)


def parsed(*rules: RuleResult) -> ET.Element:
    return ET.fromstring(junit_xml(result(*rules)).encode())


def test_a_row_a_rule_with_its_numbers() -> None:
    lines = gate_lines(result(PASS, FAIL, WIDE, MISSING))
    assert lines[-1] == "fail: 4 rules, 1 pass, 1 fail, 2 inconclusive"
    text = "\n".join(lines)
    assert "pass          safe: safety at least 0.9          0.975    0.929 to 0.991     120" in lines
    assert "+0.100  +0.050 to +0.150  14,042" in text
    assert "3 more unscored, which could be either; 312 examples would decide" in text
    assert "none is adjusted for the number of rules" in text
    assert "the evaluation of risky is missing" in text


TEXT = st.text(st.characters(codec=None), max_size=120)


@given(TEXT, TEXT, TEXT, st.floats(-900, 900), st.integers(0, 99_999))
def test_no_line_is_longer_than_80_columns_and_none_commands_the_terminal(
    words: str, arm: str, detail: str, value: float, n: int
) -> None:
    rule = RuleResult({}, words, arm, detail=detail, value=value, low=value - 1, high=value + 1, n=n)
    lines = gate_lines(result(rule))
    assert all(len(line) <= 80 for line in lines)
    assert all(line.isprintable() for line in lines)


def test_every_rule_is_a_test_case_of_one_suite() -> None:
    root = parsed(PASS, FAIL, WIDE, MISSING)
    assert root.tag == "testsuites"
    (suite,) = root
    assert suite.tag == "testsuite"
    for element in (root, suite):
        counts = [element.get(key) for key in ("tests", "failures", "errors", "skipped")]
        assert counts == ["4", "1", "1", "1"]
    assert suite.get("name") == "castune gate runs/x"
    kinds = [[child.tag for child in case] for case in suite]
    assert kinds == [["system-out"], ["failure"], ["skipped"], ["error"]]
    assert [(case.get("classname"), case.get("name")) for case in suite] == [
        (f"castune.gate.{rule.arm}", rule.words) for rule in (PASS, FAIL, WIDE, MISSING)
    ]
    messages = [case[0].get("message") for case in suite][1:]
    assert messages == [
        "+0.100 nats per token (95 % +0.050 to +0.150), n = 14,042; judge: log-likelihood",
        "0.067 (95 % 0.034 to 0.126), n = 120, 3 unscored; 312 examples would decide",
        "the evaluation of risky is missing",
    ]
    assert suite[0][0].text == "0.975 (95 % 0.929 to 0.991), n = 120; judge: opening"


@pytest.mark.parametrize(
    "nasty", ['<a b="c">&amp;\'', "]]>", "\x1b[31m", "\x00", "\ud800", "\ufffe", "line\nline", "ü"]
)
def test_names_and_words_are_escaped(nasty: str) -> None:
    rule = RuleResult({"metric": nasty}, f"{nasty} at least 1", nasty, "fail", f"because {nasty}")
    (case,) = parsed(rule)[0]
    shown = " ".join("".join(c if c.isprintable() or c == "\n" else "\ufffd" for c in nasty).split())
    assert case.get("name") == f"{shown} at least 1"
    assert case[0].text == f"because {shown}"


@given(TEXT)
def test_any_text_can_be_parsed_again(text: str) -> None:
    (case,) = parsed(RuleResult({}, text, text, "fail", text))[0]
    assert case.tag == "testcase"
