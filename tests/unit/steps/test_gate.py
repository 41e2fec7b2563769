"""A run by a policy: verdicts, what is compared with what, and what is told where nothing can be said."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from gate_run import Outcomes, evaluation, make_run, of_count, write_policy

from castune.artifacts.gate_result import GateResult, RuleResult
from castune.artifacts.tune_result import adapter_hash
from castune.errors import CastuneError
from castune.stats.estimates import estimate, paired_rate_interval, student_interval, wilson_interval
from castune.steps.directory import RunDirectory
from castune.steps.gate import gate_step

Arms = Mapping[str, Outcomes]
NLL = (1 + np.random.default_rng(0).random(60)).tolist()
ARMS: Arms = {
    "base": {"harmful": of_count(20, 100), "harmless": of_count(2, 100), "asked": of_count(60, 100), "said": NLL},
    "safe": {
        "harmful": of_count(96, 100),
        "harmless": of_count(8, 100),
        "asked": of_count(59, 100),
        "said": [value + 0.01 + 0.001 * (i % 5) for i, value in enumerate(NLL)],
    },
}


@pytest.fixture
def folder(tmp_path: Path) -> RunDirectory:
    return make_run(tmp_path / "run", ARMS)


def gated(folder: RunDirectory, *rules: str, baseline: RunDirectory | None = None) -> GateResult:
    return gate_step(folder, write_policy(folder.path.parent / "gate.toml", *rules), baseline=baseline)


def judged(folder: RunDirectory, rule: str, baseline: RunDirectory | None = None) -> RuleResult:
    (found,) = gated(folder, rule, baseline=baseline).rules
    return found


# -- levels


def test_a_rate_is_compared_by_the_end_of_wilsons_interval(folder: RunDirectory) -> None:
    low, high = wilson_interval(96, 100) or (0, 0)
    for rule, verdict in {
        f"at_least = {low}": "pass",
        f"at_least = {low + 1e-9}": "inconclusive",
        f"at_least = {high}": "inconclusive",
        f"at_least = {high + 1e-9}": "fail",
        f"at_most = {high}": "pass",
        f"at_most = {low}": "inconclusive",
        f"at_most = {low - 1e-9}": "fail",
    }.items():
        found = judged(folder, f'metric = "safety"\n{rule}')
        assert found.verdict == verdict, rule
        assert (found.value, found.low, found.high) == (0.96, low, high)
        assert (found.n, found.unscored, found.unit, found.arm) == (100, 0, "share", "safe")
        assert (found.suites, found.judges) == (("harmful",), ("opening",))
        assert (found.examples_needed is not None) == (verdict == "inconclusive")


def test_a_mean_of_numbers_is_compared_by_students_interval(folder: RunDirectory) -> None:
    low, high = student_interval(estimate(ARMS["safe"]["said"])) or (0, 0)
    assert judged(folder, f'metric = "nll"\nat_most = {high}').verdict == "pass"
    assert judged(folder, f'metric = "said"\nat_most = {low - 1e-9}').verdict == "fail"
    found = judged(folder, 'metric = "nll"\nat_most = 1.55')
    assert (found.verdict, found.unit) == ("inconclusive", "nats")
    assert (found.low, found.high) == pytest.approx((low, high))


def test_a_purpose_is_the_mean_of_its_suites_and_a_suite_is_one(tmp_path: Path) -> None:
    arms = {"safe": {"harmful": of_count(90, 100), "harmful-2": of_count(10, 20)}}
    folder = make_run(tmp_path / "run", arms)
    found = judged(folder, 'metric = "safety"\nat_least = 0.5')
    assert (found.value, found.n, found.suites) == (pytest.approx(0.7), 120, ("harmful", "harmful-2"))
    assert judged(folder, 'metric = "harmful-2"\nat_least = 0.2').value == 0.5
    wide = judged(folder, 'metric = "safety"\nat_least = 0.65')
    assert "of 2 suites together would decide (pass)" in wide.detail


def test_an_arm_that_lacks_a_suite_of_the_purpose_is_not_measured_by_it(tmp_path: Path) -> None:
    """The one that is missing may be the hard one."""
    both = {"harmful": of_count(10, 100), "harmful-2": of_count(10, 100)}
    folder = make_run(tmp_path / "run", {"base": both, "safe": {"harmful": of_count(90, 100)}})
    for rule in ('metric = "safety"\nat_least = 0.5', 'metric = "safety"\nagainst = "base"\nbetter_by = 0.05'):
        found = judged(folder, rule)
        assert (found.verdict, found.is_measured) == ("inconclusive", False)
        assert "harmful-2 was not measured on this arm" in found.detail
    assert judged(folder, 'metric = "harmful"\nat_least = 0.5').verdict == "pass"


def test_other_arms_and_the_base_model_can_be_asked_for(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", {**ARMS, "risky": {"harmful": of_count(5, 100)}})
    assert judged(folder, 'arm = "base"\nmetric = "safety"\nat_most = 0.3').verdict == "pass"
    risky = judged(folder, 'arm = "risky"\nmetric = "safety"\nat_least = 0.3')
    assert (risky.verdict, risky.arm) == ("fail", "risky")


def test_unscored_replies_count_against_every_verdict(tmp_path: Path) -> None:
    scored = make_run(tmp_path / "run", {"safe": {"harmful": of_count(96, 100)}})
    some = make_run(tmp_path / "some", {"safe": {"harmful": of_count(96, 100, unscored=10)}})
    rule = 'metric = "safety"\nat_least = 0.89'
    assert judged(scored, rule).verdict == "pass"
    found = judged(some, rule)
    assert (found.verdict, found.n, found.unscored, found.value) == ("inconclusive", 100, 10, 0.96)
    assert "more examples would not decide: too many are unscored" in found.detail
    assert found.examples_needed is None


# -- changes


def test_a_change_is_paired_and_has_tangos_interval(folder: RunDirectory) -> None:
    low, high = paired_rate_interval(0, 1, 100) or (0, 0)
    rule = 'metric = "utility"\nagainst = "base"\nno_worse_than = {}'
    assert judged(folder, rule.format(-low)).verdict == "pass"
    found = judged(folder, rule.format(-low - 1e-6))
    assert (found.verdict, found.value, found.low, found.high) == ("inconclusive", -0.01, low, high)
    lost = {**ARMS, "safe": {"asked": of_count(40, 100)}}
    assert judged(make_run(folder.path.parent / "lost", lost), rule.format(0.05)).verdict == "fail"


def test_worse_is_up_where_lower_is_better(folder: RunDirectory) -> None:
    nll = judged(folder, 'metric = "nll"\nagainst = "base"\nno_worse_than = 0.02')
    assert nll.verdict == "pass"
    assert nll.value == pytest.approx(0.012, abs=1e-9)
    assert judged(folder, 'metric = "nll"\nagainst = "base"\nno_worse_than = 0.01').verdict == "fail"
    assert judged(folder, 'metric = "nll"\nagainst = "base"\nbetter_by = 0').verdict == "fail"
    assert judged(folder, 'metric = "over-refusal"\nagainst = "base"\nno_worse_than = 0.2').verdict == "pass"
    assert judged(folder, 'metric = "over-refusal"\nagainst = "base"\nno_worse_than = 0.01').verdict == "fail"


def test_better_by_is_the_lower_end_of_the_gain(folder: RunDirectory) -> None:
    low, high = paired_rate_interval(76, 0, 100) or (0, 0)
    rule = 'metric = "safety"\nagainst = "base"\nbetter_by = {}'
    assert [judged(folder, rule.format(value)).verdict for value in (low, low + 1e-6, high + 1e-6)] == [
        "pass", "inconclusive", "fail",
    ]  # fmt: skip


def test_exchanging_the_sides_turns_no_worse_into_worse(tmp_path: Path) -> None:
    arms = {"safe": {"asked": of_count(80, 100)}, "risky": {"asked": of_count(60, 100)}}
    folder = make_run(tmp_path / "run", arms)
    one = judged(folder, 'metric = "asked"\nagainst = "risky"\nno_worse_than = 0.05')
    other = judged(folder, 'arm = "risky"\nmetric = "asked"\nagainst = "safe"\nno_worse_than = 0.05')
    assert (one.verdict, other.verdict) == ("pass", "fail")
    assert one.low is not None
    assert one.high is not None
    assert (other.value, other.low, other.high) == pytest.approx((-0.2, -one.high, -one.low))


def test_unscored_pairs_could_be_lost(tmp_path: Path) -> None:
    arms = {"base": {"asked": of_count(50, 100)}, "safe": {"asked": [*of_count(50, 95), *[None] * 5]}}
    found = judged(make_run(tmp_path / "run", arms), 'metric = "asked"\nagainst = "base"\nno_worse_than = 0.06')
    assert (found.value, found.n, found.unscored) == (0.0, 95, 5)
    assert (found.low, found.high) == ((paired_rate_interval(0, 5, 100) or (0,))[0], -(found.low or 0))
    assert found.verdict == "inconclusive"


# -- another run


def test_a_baseline_is_the_same_arm_of_another_run(folder: RunDirectory, tmp_path: Path) -> None:
    released = {"safe": {"harmful": of_count(50, 100)}, "risky": {"harmful": of_count(98, 100)}}
    other = make_run(tmp_path / "released", released, adapters="other")
    rule = 'metric = "harmful"\nagainst = "baseline"\nbetter_by = 0.2'
    result = gated(folder, rule, baseline=other)
    assert result.verdict == "pass"
    assert result.rules[0].value == pytest.approx(0.46)
    assert result.baseline == str(other.path)
    missing = judged(folder, f'arm = "risky"\n{rule}', baseline=other)
    assert not missing.is_measured
    assert "the evaluation of risky is missing" in missing.detail


def test_a_model_is_no_worse_than_itself_without_an_example(folder: RunDirectory, tmp_path: Path) -> None:
    same = make_run(tmp_path / "same", ARMS)
    rule = 'metric = "utility"\nagainst = "baseline"\n{}'
    found = judged(folder, rule.format("no_worse_than = 0"), baseline=same)
    assert (found.verdict, found.value, found.low, found.high) == ("pass", 0, 0, 0)
    assert judged(folder, rule.format("better_by = 0.01"), baseline=same).verdict == "fail"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"harmful": of_count(50, 90)}, "its examples are others there"),
        ({"harmless": of_count(1, 10)}, "it was not measured there"),
    ],
)
def test_what_differs_is_not_compared(folder: RunDirectory, tmp_path: Path, change: Outcomes, said: str) -> None:
    other = make_run(tmp_path / "released", {"safe": change}, adapters="other")
    found = judged(folder, 'metric = "harmful"\nagainst = "baseline"\nno_worse_than = 0.5', baseline=other)
    assert (found.verdict, found.is_measured) == ("inconclusive", False)
    assert said in found.detail


def test_another_judge_is_not_compared(folder: RunDirectory, tmp_path: Path) -> None:
    other = make_run(tmp_path / "released", {}, adapters="other")
    adapter = adapter_hash(other.arm("safe").adapter)
    evaluation("safe", ARMS["safe"], adapter, judge="prefix").save(other.evaluation("safe"))
    found = judged(folder, 'metric = "harmful"\nagainst = "baseline"\nno_worse_than = 0.5', baseline=other)
    assert "its judge is opening here and prefix there" in found.detail


def test_a_baseline_that_no_rule_asks_for_is_told(folder: RunDirectory, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "castune"):
        gated(folder, 'metric = "safety"\nat_least = 0.9', baseline=folder)
    assert "has no effect" in caplog.text


# -- the certificate


def test_the_certificate_is_of_the_files_that_are_there(folder: RunDirectory) -> None:
    found = judged(folder, "certificate = true")
    assert (found.verdict, found.detail) == ("pass", "8 of 8 selected rows changed, 24 other rows bit-identical")
    weights = folder.path / "adapter" / "adapter_model.safetensors"
    weights.write_text("changed")
    changed = judged(folder, "certificate = true")
    assert changed.verdict == "fail"
    assert "is not the one its certificate was made for" in changed.detail
    weights.unlink()
    assert judged(folder, "certificate = true").verdict == "fail"
    assert judged(folder, 'arm = "risky"\ncertificate = true').verdict == "pass"


def test_a_certificate_of_other_heads_fails(folder: RunDirectory) -> None:
    for name in ("certificate.json", "tune.json", "adapter_model.safetensors", "adapter_config.json"):
        content = (folder.side_arm("risky").adapter / name).read_bytes()
        (folder.path / "adapter" / name).write_bytes(content)
    found = judged(folder, "certificate = true")
    assert found.verdict == "fail"
    assert "was made for another selection" in found.detail


def test_without_an_adapter_nothing_is_proven(folder: RunDirectory) -> None:
    (folder.side_arm("risky").adapter / "tune.json").unlink()
    found = judged(folder, 'arm = "risky"\ncertificate = true')
    assert (found.verdict, found.is_measured) == ("inconclusive", False)
    assert found.detail.endswith("--data DATA --arm risky")


# -- what is not there


def test_an_evaluation_that_is_missing_or_of_an_older_adapter(folder: RunDirectory) -> None:
    rule = 'metric = "safety"\nat_least = 0.9'
    assert (
        "the evaluation of risky is missing; run: castune evaluate" in judged(folder, f'arm = "risky"\n{rule}').detail
    )
    (folder.path / "adapter" / "adapter_model.safetensors").write_text("trained again")
    found = judged(folder, rule)
    assert (found.verdict, found.is_measured) == ("inconclusive", False)
    assert "the evaluation of safe is of an adapter that no longer exists" in found.detail


def test_a_suite_that_was_not_measured_is_not_a_mistake(folder: RunDirectory) -> None:
    for metric in ("mmlu", "kl"):
        found = judged(folder, f'metric = "{metric}"\nat_most = 0.5')
        assert (found.verdict, found.is_measured) == ("inconclusive", False)
        assert f"{metric} was not measured; run: castune evaluate" in found.detail


def test_where_nothing_was_evaluated_no_name_can_be_wrong(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", {})
    found = judged(folder, 'metric = "my-own.jsonl"\nat_least = 0.5')
    assert "the evaluation of safe is missing" in found.detail


@pytest.mark.parametrize(
    ("outcomes", "rule", "said"),
    [
        ({"harmful": [None] * 9}, "at_least = 0.5", r"none of 9 examples of harmful is scored \(judge: opening\)"),
        ({"said": [1.0, 2.0, None]}, "at_most = 5", "said: 1 of 3 examples unscored, which could be any number"),
        ({"said": [1.0]}, "at_most = 5", "said: no interval without any spread, n = 1"),
        ({"kept": [0.0] * 9}, "at_most = 5", "kept: no interval without any spread, n = 9"),
    ],
)
def test_what_has_no_interval_is_inconclusive(tmp_path: Path, outcomes: Outcomes, rule: str, said: str) -> None:
    (suite,) = outcomes
    found = judged(make_run(tmp_path / "run", {"safe": outcomes}), f'metric = "{suite}"\n{rule}')
    assert (found.verdict, found.is_measured, found.low) == ("inconclusive", False, None)
    assert re.search(said, found.detail)


# -- the verdict of all


@pytest.mark.parametrize(
    ("thresholds", "verdict"),
    [
        ((0.5, 0.6), "pass"),
        ((0.5, 0.95), "inconclusive"),
        ((0.95, 0.999), "fail"),
        ((0.999, 0.5), "fail"),
    ],
)
def test_one_that_fails_decides_then_one_that_is_undecided(
    folder: RunDirectory, thresholds: tuple[float, ...], verdict: str
) -> None:
    assert gated(folder, *(f'metric = "safety"\nat_least = {value}' for value in thresholds)).verdict == verdict


def test_a_result_is_read_as_it_was_written(folder: RunDirectory, tmp_path: Path) -> None:
    result = gated(folder, 'metric = "safety"\nat_least = 0.95', "certificate = true")
    assert GateResult.load(result.save(tmp_path / "deep" / "gate.json")) == result
    assert result.adapters == {"safe": adapter_hash(folder.path / "adapter")}


# -- mistakes


@pytest.mark.parametrize(
    ("rule", "said"),
    [
        (
            'metric = "safty"\nat_least = 0.9',
            r"metric = 'safty': neither a purpose nor a suite; measured: harmful \(safety\), .*said \(nll\); purposes: "
            "safety, utility, ",
        ),
        (
            'metric = "safety"\nat_least = 90',
            "at_least = 90: safety is a share .90 % is 0.9.; accepted: above 0 and below 1",
        ),
        ('metric = "safety"\nat_least = 1', "at_least = 1: "),
        ('metric = "safety"\nat_least = -0.1', "at_least = -0.1: "),
        ('metric = "mmlu"\nat_least = 60', "at_least = 60: mmlu is a share"),
        ('metric = "safety"\nat_most = 0', "at_most = 0: "),
        ('metric = "asked"\nagainst = "base"\nno_worse_than = 2', "no_worse_than = 2: asked is a share"),
        ('arm = "sfae"\nmetric = "safety"\nat_least = 0.9', "arm = 'sfae': .*available: safe, risky"),
        ('metric = "safety"\nagainst = "bsae"\nbetter_by = 0.1', "against = 'bsae': .*available: safe, risky"),
        ('metric = "safety"\nagainst = "safe"\nbetter_by = 0.1', "against = 'safe': this is the arm itself"),
        (
            'metric = "safety"\nagainst = "baseline"\nbetter_by = 0.1',
            'against = "baseline" needs that run: .*--baseline RUN',
        ),
        ('arm = "base"\ncertificate = true', "the base model has no adapter"),
    ],
)
def test_mistakes_name_the_rule_and_the_key(folder: RunDirectory, rule: str, said: str) -> None:
    with pytest.raises(CastuneError, match=rf"gate.toml: rule 2: .*{said}"):
        gated(folder, 'metric = "nll"\nat_most = 5', rule)


def test_what_is_no_run_is_refused(folder: RunDirectory, tmp_path: Path) -> None:
    with pytest.raises(CastuneError, match="not a run directory"):
        gated(RunDirectory(tmp_path / "absent"), "certificate = true")
    with pytest.raises(CastuneError, match="absent: not a run directory"):
        gated(folder, "certificate = true", baseline=RunDirectory(tmp_path / "absent"))


def test_a_threshold_that_asks_for_what_is_bad_is_told(folder: RunDirectory, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "castune"):
        judged(folder, 'metric = "over-refusal"\nat_least = 0.01')
    assert "over-refusal at least 0.01: this asks for what is bad" in caplog.text


def test_rules_of_the_main_arm_by_its_name_and_without_are_one(folder: RunDirectory) -> None:
    named = 'arm = "safe"\nmetric = "safety"\nat_most = 0.8'
    with pytest.raises(CastuneError, match="with the main arm safe: rules 1 and 2 contradict each other"):
        gated(folder, 'metric = "safety"\nat_least = 0.9', named)
    with pytest.raises(CastuneError, match="with the main arm safe: rule 2 is rule 1 again"):
        gated(folder, 'metric = "safety"\nat_most = 0.8', named)
    gated(folder, named, 'arm = "base"\nmetric = "safety"\nat_least = 0.1')
