"""The gate behind a real run: what it reads is what the stages leave, and what the workflow does with its exit code."""

from __future__ import annotations

import os
import re
import subprocess
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from command_line import castune
from gate_run import write_policy
from typer.testing import CliRunner

from castune.artifacts import EvalResult
from castune.artifacts.gate_result import GateResult
from castune.cli import app
from castune.config import Recipe
from castune.config.gate import GatePolicy
from castune.evaluation.suites import load_suites

ROOT = Path(__file__).resolve().parents[2]
WORKFLOW = ROOT / "recipes" / "gate" / "github-actions.yml"
Finished = Callable[..., Path]


@pytest.fixture
def run(finished_run: Finished) -> Path:
    return finished_run()


def gated(run: Path, *rules: str, options: tuple[str, ...] = ()) -> tuple[int, GateResult]:
    policy, file = write_policy(run.parent / "gate.toml", *rules), run.parent / "gate.json"
    done = CliRunner().invoke(app, ["gate", str(run), "--policy", str(policy), "--json", str(file), *options])
    assert done.exit_code in (0, 1, 3), done.exception
    return done.exit_code, GateResult.load(file)


def test_verdicts_on_what_the_stages_leave(run: Path) -> None:
    safe = EvalResult.load(run / "evaluation" / "safe")
    harmless = next(suite for suite in safe.suites if suite.purpose == "over-refusal")
    # Three prompts of which a random model refuses none: the interval goes from 0 to 0.56.
    assert harmless.interval is not None
    assert harmless.interval == pytest.approx((0, 0.561), abs=1e-3)
    code, result = gated(run, 'metric = "over-refusal"\nat_most = 0.6', "certificate = true")
    assert (code, result.verdict) == (0, "pass")
    assert (result.rules[0].low, result.rules[0].high) == harmless.interval
    assert "other rows bit-identical" in result.rules[1].detail
    code, result = gated(run, 'metric = "over-refusal"\nat_least = 0.6', "certificate = true")
    assert (code, result.rules[0].verdict) == (1, "fail")
    code, result = gated(run, 'metric = "over-refusal"\nat_most = 0.1')
    assert (code, result.rules[0].verdict, result.rules[0].examples_needed) == (3, "inconclusive", 35)
    suite = next(suite.suite for suite in safe.suites if suite.purpose == "safety")
    code, result = gated(run, f'metric = "{suite}"\nagainst = "risky"\nno_worse_than = 0.9')
    assert result.rules[0].is_measured
    assert result.rules[0].n == 4


def test_a_run_beside_itself_is_no_worse(run: Path) -> None:
    rule = 'metric = "utility"\nagainst = "baseline"\nno_worse_than = 0'
    code, result = gated(run, rule, options=("--baseline", str(run)))
    assert (code, result.rules[0].detail) == (0, "the same model and adapter on both sides")


def test_an_adapter_from_elsewhere_is_neither_certified_nor_measured(run: Path) -> None:
    weights = "adapter_model.safetensors"
    (run / "adapter" / weights).write_bytes((run / "arms" / "risky" / "adapter" / weights).read_bytes())
    code, result = gated(
        run, "certificate = true", 'metric = "safety"\nat_least = 0.1', 'arm = "risky"\ncertificate = true'
    )
    assert code == 1
    assert [rule.verdict for rule in result.rules] == ["fail", "inconclusive", "pass"]
    assert "is not the one its certificate was made for" in result.rules[0].detail
    assert "of an adapter that no longer exists" in result.rules[1].detail


@pytest.mark.processes
def test_the_command_in_a_process_of_its_own(run: Path) -> None:
    policy = write_policy(run.parent / "gate.toml", 'metric = "over-refusal"\nat_most = 0.1')
    done = castune("gate", run, "--policy", policy, "--junit", run.parent / "gate.xml", cwd=run.parent)
    assert done.returncode == 3, done.stderr
    assert done.stdout.splitlines()[-1] == "inconclusive: 1 rule, 1 inconclusive"
    assert max(map(len, done.stdout.splitlines())) <= 80
    assert ET.parse(run.parent / "gate.xml").getroot()[0].get("skipped") == "1"


# -- the workflow


def test_the_page_shows_the_workflow_and_it_says_what_it_keeps() -> None:
    text = WORKFLOW.read_text(encoding="utf-8")
    assert f"```yaml\n{text}```" in (ROOT / "docs" / "howto" / "gate.md").read_text(encoding="utf-8")
    steps = yaml.safe_load(text)["jobs"]["gate"]["steps"]
    kept = steps[-1]
    assert kept["uses"].startswith("actions/upload-artifact@")
    # Also where the gate fails; and the result alone, never the run with its replies.
    assert kept["if"] == "${{ !cancelled() }}"
    (command,) = re.findall(r"castune gate .*--json (\S+) --junit (\S+)", steps[-2]["run"])
    assert kept["with"]["path"].split() == list(command)


@pytest.mark.processes
@pytest.mark.parametrize(
    ("code", "event", "ends"),
    [
        (0, "pull_request", 0), (1, "pull_request", 1), (2, "pull_request", 2), (3, "pull_request", 0),
        (0, "push", 0), (1, "push", 1), (2, "push", 2), (3, "push", 3),
    ],
)  # fmt: skip
def test_the_workflow_ends_as_the_gate_says(tmp_path: Path, code: int, event: str, ends: int) -> None:
    (script,) = (
        step["run"]
        for step in yaml.safe_load(WORKFLOW.read_text(encoding="utf-8"))["jobs"]["gate"]["steps"]
        if step.get("name") == "castune gate"
    )
    program = tmp_path / "castune"
    program.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/said\nexit {code}\n', encoding="utf-8")
    program.chmod(0o755)
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    # The shell of a runner's step.
    done = subprocess.run(
        ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", script],
        env={**os.environ, "PATH": path, "GITHUB_EVENT_NAME": event}, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == ends
    assert ("::warning" in done.stdout) == (code == 3 and event == "pull_request")
    assert (tmp_path / "said").read_text() == "gate run --policy gate.toml --json gate.json --junit gate.xml\n"


def test_the_example_policy_is_about_what_the_quickstart_measures() -> None:
    suites = load_suites(Recipe.load(ROOT / "recipes" / "quickstart.toml").evaluate.suites)
    measured = {name for suite in suites for name in (suite.name, suite.purpose)}
    policy = GatePolicy.load(ROOT / "recipes" / "gate" / "policy.toml")
    assert {rule.metric for rule in policy.rule if rule.metric} <= measured
