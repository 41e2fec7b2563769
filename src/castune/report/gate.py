"""The result of a gate for people and for CI: a table of 80 columns, and JUnit XML. No text of a model is in either."""

from __future__ import annotations

import textwrap
import xml.etree.ElementTree as ET

from castune.artifacts.gate_result import GateResult, RuleResult
from castune.core.numbers import counted, number, span

_WIDTH = 80
# Columns, and the spaces between them: verdict, rule, value, interval, n.
_VERDICT, _RULE, _VALUE, _INTERVAL, _N = 12, 31, 7, 16, 6
_GAP = "  "
_NOTE = "Each interval is a 95 % interval; none is adjusted for the number of rules."


def gate_lines(result: GateResult) -> list[str]:
    """A table with a row a rule, what there is to say below it, and the verdict of all."""
    lines = [_row("verdict", "rule", "value", "95 % interval", "n")]
    indent = " " * (_VERDICT + len(_GAP))
    for rule in result.rules:
        first, *rest = textwrap.wrap(_plain(f"{rule.arm}: {rule.words}"), _RULE, break_on_hyphens=False)
        lines.append(_row(rule.verdict, first, _value(rule), _interval(rule), f"{rule.n:,}" if rule.n else "–"))
        lines += [indent + line for line in rest]
        lines += textwrap.wrap(
            _plain(_remarks(rule)), _WIDTH, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False
        )
    return [*lines, "", _NOTE, f"{result.verdict}: {_tally(result)}"]


def junit_xml(result: GateResult) -> str:
    """A test suite with a test case a rule, as common CI systems read it.

    A rule that fails is a failure. One that is inconclusive is skipped where the threshold is within the interval, and
    an error where something could not be measured.
    """
    kinds = [_junit_kind(rule) for rule in result.rules]
    counts = {
        "tests": str(len(kinds)),
        "failures": str(kinds.count("failure")),
        "errors": str(kinds.count("error")),
        "skipped": str(kinds.count("skipped")),
        "time": "0",
    }
    root = ET.Element("testsuites", {"name": "castune gate", **counts})
    suite = ET.SubElement(root, "testsuite", {"name": _plain(f"castune gate {result.run}"), **counts})
    for rule, kind in zip(result.rules, kinds, strict=True):
        case = ET.SubElement(
            suite,
            "testcase",
            {"classname": _plain(f"castune.gate.{rule.arm}"), "name": _plain(rule.words), "time": "0"},
        )
        story = _plain("; ".join(part for part in (_figures(rule), rule.detail, _judges(rule)) if part))
        if kind is None:
            ET.SubElement(case, "system-out").text = story
        else:
            ET.SubElement(case, kind, {"message": story, "type": rule.verdict}).text = story
    ET.indent(root)
    return f'<?xml version="1.0" encoding="utf-8"?>\n{ET.tostring(root, encoding="unicode")}\n'


def _junit_kind(rule: RuleResult) -> str | None:
    if rule.verdict == "pass":
        return None
    if rule.verdict == "fail":
        return "failure"
    return "skipped" if rule.is_measured else "error"


def _row(verdict: str, rule: str, value: str, interval: str, n: str) -> str:
    cells = (f"{verdict:{_VERDICT}}", f"{rule:{_RULE}}", f"{value:>{_VALUE}}", f"{interval:>{_INTERVAL}}", f"{n:>{_N}}")
    return _GAP.join(cells).rstrip()


def _value(rule: RuleResult) -> str:
    return "–" if rule.value is None else number(rule.value, _pattern(rule))


def _interval(rule: RuleResult) -> str:
    return "–" if rule.low is None or rule.high is None else span(rule.low, rule.high, _pattern(rule))


def _pattern(rule: RuleResult) -> str:
    """Three decimals, or as many as the columns have room for; changes have a sign."""
    largest = max(abs(number) for number in (rule.value, rule.low, rule.high) if number is not None)
    digits = 3 if largest < 9.99 else 2 if largest < 99.9 else 1
    return f"{'+' if 'against' in rule.rule else ''}.{digits}f"


def _figures(rule: RuleResult) -> str:
    """Value, interval and number of examples in words; empty where there is no value."""
    if rule.value is None:
        return ""
    unit = " nats per token" if rule.unit == "nats" else ""
    interval = "" if rule.low is None else f" (95 % {_interval(rule)})"
    unscored = f", {rule.unscored:,} unscored" if rule.unscored else ""
    return f"{_value(rule)}{unit}{interval}, n = {rule.n:,}{unscored}"


def _remarks(rule: RuleResult) -> str:
    """What the columns do not say."""
    # Where they leave no interval, the detail tells of them.
    is_counted = rule.unscored > 0 and rule.low is not None
    unscored = f"{rule.unscored:,} more unscored, which could be either" if is_counted else ""
    return "; ".join(part for part in (unscored, rule.detail) if part)


def _judges(rule: RuleResult) -> str:
    return f"judge: {', '.join(rule.judges)}" if rule.judges else ""


def _tally(result: GateResult) -> str:
    verdicts = [rule.verdict for rule in result.rules]
    parts = [f"{verdicts.count(verdict)} {verdict}" for verdict in ("pass", "fail", "inconclusive")]
    return f"{counted(len(verdicts), 'rule')}, {', '.join(part for part in parts if not part.startswith('0 '))}"


def _plain(text: str) -> str:
    """Text in one line, without characters that XML cannot hold or a terminal would obey."""
    return "".join(
        character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in " ".join(text.split())
    )
