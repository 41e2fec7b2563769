"""Policies of a gate: what is accepted, and what is refused with the rule and the key that are wrong."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from castune.config.gate import GatePolicy, GateRule
from castune.errors import CastuneError

EXAMPLE = Path(__file__).parents[2] / "recipes" / "gate" / "policy.toml"


def loaded(tmp_path: Path, text: str) -> GatePolicy:
    path = tmp_path / "gate.toml"
    path.write_text(text, encoding="utf-8")
    return GatePolicy.load(path)


def test_the_example_has_a_rule_of_every_kind() -> None:
    rules = GatePolicy.load(EXAMPLE).rule
    assert {rule.threshold[0] for rule in rules if rule.threshold} == {
        "at_least", "at_most", "no_worse_than", "better_by",
    }  # fmt: skip
    assert sum(rule.certificate is True for rule in rules) == 1


def test_rules_in_words() -> None:
    words = {
        "safety at least 0.9": GateRule(metric="safety", at_least=0.9),
        "over-refusal at most 0.1": GateRule(metric="over-refusal", at_most=0.1),
        "mmlu at most 0.02 worse than base": GateRule(metric="mmlu", against="base", no_worse_than=0.02),
        "nll at least 0 better than all": GateRule(metric="nll", against="all", better_by=0),
        "certificate: nothing outside the selection moved": GateRule(certificate=True, arm="risky"),
    }
    assert all(rule.words == said for said, rule in words.items())


ONE = 'metric = "safety"\nat_least = 0.9\n'


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "'rule' is missing|no rule in it"),
        ("rule = []", "no rule in it: a policy without rules would pass anything; write one as [[rule]]"),
        (f"[rule]\n{ONE}", "rule is no list of tables; write each rule as [[rule]]"),
        ("rule = 3", "rule is no list of tables"),
        ("rule = [3]", "rule is no list of tables"),
        (f"[[rules]]\n{ONE}", "unknown key 'rules'; accepted here: rule"),
        (f"level = 0.9\n[[rule]]\n{ONE}", "unknown key 'level'; accepted here: rule"),
        (f"[[rule]]\n{ONE}[[rule]]\nmetrc = 1\n", "rule 2: unknown key 'metrc'; accepted here: arm, metric, at_least"),
        (f"[[rule]]\n{ONE}self = 1\n", "rule 1: unknown key 'self'"),
        ("[[rule]]\n", "rule 1: a rule has one threshold, found none; accepted: one of at_least, at_most"),
        ('[[rule]]\nmetric = "safety"\n', "rule 1: a rule has one threshold, found none"),
        ("[[rule]]\nat_least = 0.9\n", "rule 1: 'metric' is missing: which metric is at_least a threshold for?"),
        (f"[[rule]]\n{ONE}at_most = 0.95\n", "rule 1: a rule has one threshold, found at_least, at_most"),
        (f'[[rule]]\n{ONE}against = "base"\n', "rule 1: at_least is a threshold of the metric itself"),
        ('[[rule]]\nmetric = "mmlu"\nno_worse_than = 0.1\n', "rule 1: 'against' is missing: no_worse_than compares"),
        (
            '[[rule]]\nmetric = "mmlu"\narm = "all"\nagainst = "all"\nbetter_by = 0.1\n',
            "rule 1: arm and against are both 'all'",
        ),
        ('[[rule]]\nmetric = "mmlu"\nagainst = "base"\nno_worse_than = -0.1\n', "rule 1: no_worse_than = -0.1: "),
        ('[[rule]]\nmetric = "mmlu"\nagainst = "base"\nbetter_by = -1\n', "rule 1: better_by = -1: "),
        ('[[rule]]\nmetric = "safety"\nat_least = nan\n', "rule 1: at_least = nan: "),
        ('[[rule]]\nmetric = "safety"\nat_most = -inf\n', "rule 1: at_most = -inf: "),
        ('[[rule]]\nmetric = "safety"\nat_least = "0.9"\n', "rule 1: at_least = '0.9': Input should be a valid number"),
        ('[[rule]]\nmetric = "safety"\nat_least = true\n', "rule 1: at_least = True: Input should be a valid number"),
        ('[[rule]]\nmetric = "safety"\nat_least = [0.9]\n', "rule 1: at_least = [0.9]: "),
        ("[[rule]]\nmetric = 3\nat_least = 0.9\n", "rule 1: metric = 3: Input should be a valid string"),
        ('[[rule]]\nmetric = ["mmlu"]\nat_least = 0.9\n', "rule 1: metric = ['mmlu']: "),
        (f"[[rule]]\n{ONE}arm = 1\n", "rule 1: arm = 1: "),
        ("[[rule]]\ncertificate = false\n", "rule 1: certificate = False: Input should be True"),
        ('[[rule]]\ncertificate = "true"\n', "rule 1: certificate = 'true': Input should be True"),
        (f"[[rule]]\ncertificate = true\n{ONE}", "rule 1: certificate = true stands alone or with arm; also found"),
        (f"[[rule]]\n{ONE}[[rule]]\n{ONE}", "rule 2 is rule 1 again; drop one"),
        (
            f'[[rule]]\n{ONE}[[rule]]\nmetric = "nll"\nat_most = 1\n[[rule]]\nmetric = "safety"\nat_most = 0.8\n',
            "rules 1 and 3 contradict each other: safety at least 0.9, and safety at most 0.8",
        ),
        ("[[rule]]\nmetric = ", "malformed TOML"),
    ],
)
def test_what_is_wrong_is_told_in_one_line(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(CastuneError) as caught:
        loaded(tmp_path, text)
    message = str(caught.value)
    assert message.startswith(f"{tmp_path / 'gate.toml'}: ")
    assert "\n" not in message
    assert "pydantic" not in message
    assert any(part in message for part in said.split("|")), message


def test_what_only_looks_contradictory_is_taken(tmp_path: Path) -> None:
    # A range, another arm, another metric.
    text = f"""[[rule]]
{ONE}[[rule]]
metric = "safety"
at_most = 0.95
[[rule]]
arm = "risky"
metric = "safety"
at_most = 0.1
[[rule]]
metric = "over-refusal"
at_most = 0.1
"""
    assert len(loaded(tmp_path, text).rule) == 4


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(CastuneError, match=re.escape(f"{tmp_path / 'absent.toml'}: no such policy")):
        GatePolicy.load(tmp_path / "absent.toml")
    with pytest.raises(CastuneError, match="cannot be read as a policy: Is a directory"):
        GatePolicy.load(tmp_path)
