"""The whole diagnosis against the brute-force reference, on every head of tiny models of all families."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from brute_force import BruteForce, decision_shift, margin_shift, percentile_ranks, sensitivity

import castune
from castune.core.ablation import can_resume
from castune.core.generation import generate_replies
from castune.core.heads import HeadLayout
from castune.core.journal import Journal
from castune.core.refusals import decides_by
from castune.core.shards import Shard
from castune.core.units import UnitLayout
from castune.data.chat import ChatFormat
from castune.data.example import Example
from castune.diagnosis.ablator import Ablator
from castune.diagnosis.decode import ReplyMeasure
from castune.diagnosis.sweep import sweep

FAMILIES = ("llama", "qwen2", "gpt2")
# Of random weights by which some head changes a decision.
SEEDS = {"gpt_neox": 7, "falcon_multi_query": 7}
MAX_NEW_TOKENS, MARGIN_TOKENS = 8, 5
# One letter question (about 270 byte tokens), or a handful of the short rows, in a batch.
BATCH_TOKENS = 320


@pytest.fixture(params=FAMILIES)
def model(request: pytest.FixtureRequest, tiny_model: Callable[..., Any]) -> Any:
    return tiny_model(request.param, seed=3)


def outcomes_in(path: Path, objective: str) -> dict[tuple[int, int, str], tuple[float, float]]:
    """{(layer, head, example): (baseline, ablated)} as the run directory has it."""
    rows = [row for row in pq.read_table(path).to_pylist() if row["objective"] == objective]
    nan = float("nan")
    return {
        (row["layer"], row["head"], row["example"]): tuple(nan if row[k] is None else row[k] for k in ("baseline", "ablated"))
        for row in rows
    }  # fmt: skip


def assert_outcomes(
    path: Path, objective: str, reference: BruteForce, expected: np.ndarray, examples: Sequence[Example], atol: float
) -> None:
    stored = outcomes_in(path, objective)
    assert len(stored) == len(reference.heads) * len(examples)
    for row, (layer, head) in enumerate(reference.heads, start=1):
        for n, example in enumerate(examples):
            np.testing.assert_allclose(
                stored[layer, head, example.id], (expected[0, n], expected[row, n]), rtol=0, atol=atol
            )


@pytest.mark.parametrize("measure", ["decision", "margin"])
def test_diagnosis_equals_brute_force(
    any_family: str,
    measure: str,
    tiny_model: Callable[..., Any],
    tiny_tokenizer: Any,
    questions: list[Example],
    harmful: list[Example],
    tmp_path: Path,
) -> None:
    model = tiny_model(any_family, seed=SEEDS.get(any_family, 3))
    config = castune.DiagnoseConfig(
        measure=measure, max_new_tokens=MAX_NEW_TOKENS, margin_tokens=MARGIN_TOKENS, batch_tokens=BATCH_TOKENS
    )
    cmap = castune.diagnose(model, tiny_tokenizer, safety=harmful, utility=questions, config=config, out=tmp_path)
    reference = BruteForce(model, tiny_tokenizer, max_new_tokens=MAX_NEW_TOKENS, margin_tokens=MARGIN_TOKENS)
    assert sum(len(reference.prompt(e)) for e in questions) > 2 * BATCH_TOKENS, "one batch would hold everything"
    assert cmap.metadata["resumed"], "these families resume from recorded residuals"
    assert cmap.heads == reference.heads

    decisions, margins = reference.utility(questions)
    if measure == "decision":
        utility, safety = decisions, reference.refusals(harmful, decides_by("prefix"))
        utility_shift, safety_shift = decision_shift(utility), decision_shift(safety)
        assert 0 < decisions[0].mean() < 1
        assert len(set(utility_shift)) > 1, "the heads must differ, or nothing is compared"
        atol = 0.0
    else:
        utility, safety = margins, reference.refusal_margins(harmful)
        utility_shift, safety_shift = margin_shift(utility), margin_shift(safety)
        gaps = np.diff(np.sort([utility_shift, safety_shift], axis=1), axis=1)
        assert gaps.min() > 1e-5, "ranks would hang on rounding"
        atol = 1e-4
    assert_outcomes(tmp_path / "ablation.parquet", "utility", reference, utility, questions, atol)
    assert_outcomes(tmp_path / "ablation.parquet", "safety", reference, safety, harmful, atol)

    conflict = reference.optimization_conflict(harmful, questions)
    assert conflict.std() > 0.01
    np.testing.assert_allclose(cmap.column("optimization_conflict"), conflict, rtol=0, atol=1e-5)
    np.testing.assert_allclose(cmap.column("utility_shift"), utility_shift, rtol=0, atol=max(atol, 1e-12))
    np.testing.assert_allclose(cmap.column("safety_shift"), safety_shift, rtol=0, atol=max(atol, 1e-12))
    np.testing.assert_allclose(cmap.column("utility_rank"), percentile_ranks(utility_shift), rtol=0, atol=1e-6)
    np.testing.assert_allclose(cmap.column("safety_rank"), percentile_ranks(safety_shift), rtol=0, atol=1e-6)
    expected_sensitivity = sensitivity(utility_shift, safety_shift)
    np.testing.assert_allclose(cmap.column("functional_sensitivity"), expected_sensitivity, rtol=0, atol=1e-6)
    np.testing.assert_allclose(cmap.column("conflict_score"), conflict * expected_sensitivity, rtol=0, atol=2e-6)
    baseline = cmap.metadata["baseline"]
    assert baseline["utility_accuracy"]["value"] == pytest.approx(decisions[0].mean(), abs=1e-12)


def test_mean_ablation_equals_brute_force(
    model: Any, tiny_tokenizer: Any, questions: list[Example], harmful: list[Example], tmp_path: Path
) -> None:
    config = castune.DiagnoseConfig(
        measure="margin", ablation="mean", max_new_tokens=MAX_NEW_TOKENS, batch_tokens=BATCH_TOKENS
    )
    castune.diagnose(model, tiny_tokenizer, safety=harmful, utility=questions, config=config, out=tmp_path)
    reference = BruteForce(model, tiny_tokenizer, max_new_tokens=MAX_NEW_TOKENS)
    _, zero_margins = reference.utility(questions)
    reference.use_mean_ablation([*harmful, *questions])
    _, margins = reference.utility(questions)
    assert np.abs(margins[1:] - zero_margins[1:]).max() > 0.01, "mean and zero ablation must differ here"
    assert_outcomes(tmp_path / "ablation.parquet", "utility", reference, margins, questions, 1e-4)
    assert_outcomes(
        tmp_path / "ablation.parquet", "safety", reference, reference.refusal_margins(harmful), harmful, 1e-4
    )


def test_full_forwards_and_resumed_forwards_agree(
    tiny_model: Callable[..., Any],
    tiny_tokenizer: Any,
    questions: list[Example],
    harmful: list[Example],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The fallback of models that cannot resume gives the same map."""
    model = tiny_model("llama", seed=3)
    config = castune.DiagnoseConfig(measure="margin", max_new_tokens=MAX_NEW_TOKENS, batch_tokens=BATCH_TOKENS)
    arguments = {"safety": harmful, "utility": questions, "config": config}
    resumed = castune.diagnose(model, tiny_tokenizer, **arguments)
    import sys

    monkeypatch.setattr(sys.modules["castune.diagnosis.task"], "can_resume", lambda *_: False)
    full = castune.diagnose(model, tiny_tokenizer, **arguments)
    assert resumed.metadata["resumed"]
    assert not full.metadata["resumed"]
    assert resumed.table.equals(full.table)


@pytest.mark.parametrize("batch_tokens", [150, 2000], ids=["a unit a layer", "a unit of all layers"])
def test_refusal_outcomes_equal_brute_force(
    model: Any, tiny_tokenizer: Any, harmful: list[Example], batch_tokens: int
) -> None:
    """A random model never says "I cannot": a judge of its own kind of reply makes outcomes that vary with the head."""

    def chance_judge(prompts: Sequence[str], replies: Sequence[str]) -> list[bool | None]:
        assert len(prompts) == len(replies)
        return [None if not r else sum(r.encode()) % 2 == 0 for r in replies]

    layout, chat = HeadLayout.of(model), ChatFormat(tiny_tokenizer)
    units = UnitLayout(layout)
    ablator = Ablator(model, units, units.units, can_resume(model, layout))
    prompts = [chat.prompt_ids(example)[0] for example in harmful]
    options: dict[str, Any] = {
        "end_tokens": chat.end_tokens(model), "max_new_tokens": MAX_NEW_TOKENS, "batch_tokens": batch_tokens,
    }  # fmt: skip
    replies = generate_replies(model, tiny_tokenizer, prompts, **options)
    texts = [example.prompt for example in harmful]
    measure = ReplyMeasure(
        ablator, tiny_tokenizer, prompts, texts, replies, judge=chance_judge, is_settled=lambda _: False, **options
    )
    found = sweep("safety", ablator, measure, journal=Journal.of(None, 0), shard=Shard())
    assert found is not None
    assert 0 < found.n_decoded <= found.ablated_HN.size
    reference = BruteForce(model, tiny_tokenizer, max_new_tokens=MAX_NEW_TOKENS)
    expected = reference.refusals(harmful, chance_judge)
    assert len({tuple(row) for row in expected}) > 3, "outcomes must vary over heads"
    assert 0 < np.nanmean(expected[0]) < 1
    np.testing.assert_array_equal(found.baseline_N, expected[0])
    np.testing.assert_array_equal(found.ablated_HN, expected[1:])
