"""Cost ratios of a run by plain arithmetic, and where they are shown."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from castune.artifacts import EvalResult
from castune.artifacts.samples import Sample
from castune.console import show_evaluations
from castune.evaluation.metrics import suite_result
from castune.report.summary import verdict
from castune.steps.changes import all_cost_ratios, cost_ratios, differences, incomparable

N = 80


def evaluated(name: str, *, refused: int, nll: list[float] | None = None, right: int = 40) -> EvalResult:
    """An evaluation of N prompts and questions, of which the first so many were refused and right."""
    of_suites: dict[str, list[Any]] = {
        "harmful": [
            {"purpose": "safety", "reply": "x", "finished": True, "tokens": 1, "outcome": i < refused} for i in range(N)
        ],
        "mmlu": [
            {"purpose": "utility", "choices": ["a"], "choice_scores": [0.0], "answer": 0, "margin": 0.0}
            | {"outcome": i < right}
            for i in range(N)
        ],
    }
    if nll is not None:
        of_suites["said"] = [{"purpose": "nll", "scored_tokens": 3, "outcome": value} for value in nll]
    suites, samples = [], []
    for suite, rows in of_suites.items():
        made: list[Sample] = [
            {"suite": suite, "id": f"{i}", "group": None, "prompt": "p", **row} for i, row in enumerate(rows)
        ]
        suites.append(suite_result(made, judge="opening", max_new_tokens=None, data_hash=suite, seconds=1.0))
        samples += made
    return EvalResult(name, tuple(suites), tuple(samples), {"judge": "opening"}, {}, {})


def nll(seed: int, more: float = 0.0) -> list[float]:
    rng = np.random.default_rng(seed)
    return (rng.gamma(2, 1, N) + more).tolist()


def test_the_ratio_in_nats_is_nats_added_for_a_refusal_rate_that_rises_by_one() -> None:
    before, after = nll(0), [value + 0.01 * i for i, value in enumerate(nll(0))]
    found = {"base": evaluated("base", refused=8, nll=before), "safe": evaluated("safe", refused=48, nll=after)}
    ratio = cost_ratios(found, "ucr_nll")["safe"]
    added = np.array(after) - np.array(before)
    assert ratio.value == pytest.approx(added.mean() / 0.5)
    # Loss and gain both vary over examples: the interval by the delta method, of the ratio's logarithm.
    errors = added.std() / added.mean() / np.sqrt(N), np.sqrt(0.5 * 0.5 / N) / 0.5
    half = 1.96 * np.hypot(*errors)
    assert (ratio.low, ratio.high) == pytest.approx((0.79 * np.exp(-half), 0.79 * np.exp(half)), rel=0.04)
    # What became likelier cost nothing.
    assert cost_ratios({**found, "safe": evaluated("safe", refused=48, nll=nll(0, -0.1))}, "ucr_nll")["safe"].value == 0
    assert cost_ratios({**found, "safe": evaluated("safe", refused=8, nll=after)}, "ucr_nll")["safe"].value is None


def test_ratios_are_those_that_were_measured(capsys: pytest.CaptureFixture[str]) -> None:
    arms = {"base": 8, "safe": 48}
    plain = {name: evaluated(name, refused=refused) for name, refused in arms.items()}
    assert all_cost_ratios(plain).keys() == {"ucr", "mmlu_cr"}
    show_evaluations(plain, all_cost_ratios(plain))
    assert "nats │" not in capsys.readouterr().out
    continuous = {name: evaluated(name, refused=n, nll=nll(0, 0.2 * (n > 8))) for name, n in arms.items()}
    ratios = all_cost_ratios(continuous)
    assert ratios.keys() == {"ucr", "mmlu_cr", "ucr_nll"}
    show_evaluations(continuous, ratios)
    (line,) = (line for line in capsys.readouterr().out.splitlines() if "UCR, nats" in line)
    assert "0.40" in line


def with_suites(result: EvalResult, **changes: Any) -> EvalResult:
    return replace(result, suites=tuple(replace(suite, **changes) for suite in result.suites))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda safe: safe, None),
        (lambda safe: replace(safe, suites=()), "it was not measured there"),
        (lambda safe: with_suites(safe, judge="prefix"), "its judge is opening here and prefix there"),
        (lambda safe: with_suites(safe, max_new_tokens=9), "replies have up to None tokens here and 9 there"),
        (lambda safe: replace(safe, settings={"backend": "vllm"}), "its backend is hf here and vllm there"),
        (
            lambda safe: replace(safe, samples=tuple({**sample, "id": f"x{sample['id']}"} for sample in safe.samples)),
            "no example is the same",
        ),
        (
            lambda safe: replace(
                safe, samples=tuple({**sample, "scored_tokens": 1, "reference": [1]} for sample in safe.samples)
            ),
            "it was measured on other replies of the base model there",
        ),
    ],
)
def test_what_was_measured_otherwise_is_not_compared(change: Any, said: str | None) -> None:
    safe = evaluated("safe", refused=48)
    base = change(replace(safe, name="base"))
    assert incomparable(base, safe, "harmful") == said
    assert ("harmful" in differences({"base": base, "safe": safe})["safe"]) == (said is None)


def test_an_arm_that_lacks_a_suite_has_no_ratio_and_no_mean_change() -> None:
    base, safe = (evaluated(name, refused=refused, nll=nll(0)) for name, refused in (("base", 8), ("safe", 48)))
    more = evaluated("base", refused=40)
    other = replace(more.suites[0], suite="harmful-2")
    samples = tuple({**sample, "suite": "harmful-2"} for sample in more.samples_of("harmful"))
    both = replace(base, suites=(*base.suites, other), samples=(*base.samples, *samples))  # type: ignore[arg-type]
    found = {"base": both, "safe": safe}
    assert cost_ratios(found) == {}
    said = verdict(found, differences(found), {})
    assert "change not measured (without harmful-2)" in said.changes["safe"]
    assert "60.0\u202f%" in said.rates
    assert "safe (without harmful-2)" in said.rates
    assert "utility accuracy: no difference" in said.changes["safe"]


def test_the_test_of_a_suite_decides_whether_its_change_is_seen() -> None:
    for before, after, seen in ((20, 25, False), (0, 3, False), (20, 26, True)):
        found = {"base": evaluated("base", refused=before), "safe": evaluated("safe", refused=after)}
        words = verdict(found, differences(found), {}).changes["safe"].split(";")[0]
        assert ("no difference seen" not in words) == seen, words
