"""The diagnosis of the default model against the brute-force reference, on one and on two of its layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from brute_force import BruteForce, decision_shift, margin_shift, percentile_ranks, sensitivity

import castune
from castune.core.refusals import decides_by
from castune.data.example import Example

pytestmark = pytest.mark.real

MAX_NEW_TOKENS = 12
# Within 12 tokens the untrained default model refuses hardly anything. It refuses these two, with some heads only;
# the others are the first of the set, which it does not refuse.
BORDERLINE = ("safety-018", "safety-071")


@pytest.fixture(scope="module")
def utility() -> list[Example]:
    return castune.examples("starter-utility")[:3]


@pytest.fixture(scope="module")
def safety() -> list[Example]:
    every = castune.examples("starter-safety")
    return [*(e for e in every if e.id in BORDERLINE), every[0]]


@pytest.fixture(scope="module")
def layers(request: pytest.FixtureRequest) -> tuple[int, ...]:
    found: tuple[int, ...] = request.param
    return found


@pytest.fixture(scope="module")
def reference(default_model: tuple[Any, Any], layers: tuple[int, ...]) -> BruteForce:
    return BruteForce(*default_model, max_new_tokens=MAX_NEW_TOKENS, layers=layers)


@pytest.fixture(scope="module")
def conflict(reference: BruteForce, safety: list[Example], utility: list[Example]) -> np.ndarray:
    return reference.optimization_conflict(safety, utility)


@pytest.fixture(scope="module")
def utility_outcomes(reference: BruteForce, utility: list[Example]) -> tuple[np.ndarray, np.ndarray]:
    return reference.utility(utility)


def stored_outcomes(run: Path, objective: str, n_examples: int) -> tuple[np.ndarray, np.ndarray]:
    table = pq.read_table(run / "ablation.parquet").to_pandas()
    table = table[table["objective"] == objective]
    ablated = table["ablated"].to_numpy(dtype=float).reshape(-1, n_examples)
    return table["baseline"].to_numpy(dtype=float).reshape(-1, n_examples)[0], ablated


@pytest.mark.parametrize(
    ("layers", "measure"),
    [
        ((20,), "margin"),
        pytest.param((3, 20), "decision", marks=pytest.mark.slow),
        pytest.param((3, 20), "margin", marks=pytest.mark.slow),
    ],
    indirect=["layers"],
    ids=str,
)
def test_default_model_equals_brute_force(
    layers: tuple[int, ...],
    measure: str,
    default_model: tuple[Any, Any],
    reference: BruteForce,
    safety: list[Example],
    utility: list[Example],
    conflict: np.ndarray,
    utility_outcomes: tuple[np.ndarray, np.ndarray],
    tmp_path: Path,
    all_threads: None,
) -> None:
    config = castune.DiagnoseConfig(measure=measure, max_new_tokens=MAX_NEW_TOKENS, layers=layers, batch_tokens=512)
    cmap = castune.diagnose(*default_model, safety=safety, utility=utility, config=config, out=tmp_path)
    assert cmap.heads == reference.heads
    assert len(cmap) == 9 * len(layers)

    decisions, margins = utility_outcomes
    if measure == "decision":
        of_utility, of_safety = decisions, reference.refusals(safety, decides_by("prefix"))
        assert 0 < of_safety[0].sum() < len(safety), "refusals must not all be equal"
        assert len({tuple(row) for row in of_safety}) > 1, "refusals must vary with the head"
        utility_shift, safety_shift, atol = decision_shift(of_utility), decision_shift(of_safety), 1e-12
    else:
        of_utility, of_safety = margins, reference.refusal_margins(safety)
        utility_shift, safety_shift, atol = margin_shift(of_utility), margin_shift(of_safety), 1e-4
    for objective, expected in (("utility", of_utility), ("safety", of_safety)):
        baseline, ablated = stored_outcomes(tmp_path, objective, 3)
        np.testing.assert_allclose(baseline, expected[0], rtol=0, atol=atol)
        np.testing.assert_allclose(ablated, expected[1:], rtol=0, atol=atol)

    assert conflict.std() > 0.01
    np.testing.assert_allclose(cmap.column("optimization_conflict"), conflict, rtol=0, atol=1e-5)
    np.testing.assert_allclose(cmap.column("utility_rank"), percentile_ranks(utility_shift), rtol=0, atol=1e-6)
    np.testing.assert_allclose(cmap.column("safety_rank"), percentile_ranks(safety_shift), rtol=0, atol=1e-6)
    expected_sensitivity = sensitivity(utility_shift, safety_shift)
    np.testing.assert_allclose(cmap.column("functional_sensitivity"), expected_sensitivity, rtol=0, atol=1e-6)
    # float32 gradients of 30 layers agree to 3e-6 (either to float64 likewise), so C is compared at the O it came from.
    score = cmap.column("optimization_conflict") * expected_sensitivity
    np.testing.assert_allclose(cmap.column("conflict_score"), score, rtol=0, atol=1e-6)
    np.testing.assert_allclose(cmap.column("conflict_score"), conflict * expected_sensitivity, rtol=0, atol=1e-5)
