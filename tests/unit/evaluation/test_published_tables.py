"""The paper's Tables 7 and 8, recomputed from their own averages.

Of all rows in Tables 1, 2 and 7 one printed average contradicts its own row: Mistral FULL-PCG in Table 2, general
average 38.59, where its four columns average 38.79.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from castune.stats.correlations import correlation
from castune.stats.estimates import utility_cost_ratio

# Utility, safety and MMLU of the base models (Table 1).
BASE = {"Llama": (66.10, 67.22, 59.38), "Qwen": (76.89, 57.33, 68.63), "Mistral": (35.47, 50.11, 46.98)}
# Table 8: Pearson and Spearman with UCR, Pearson and Spearman with MMLU-CR.
TABLE_8 = {
    ("Llama", "gradient"): (0.96, 0.80, -0.13, -0.40),
    ("Llama", "sensitivity"): (0.99, 1.00, 0.96, 1.00),
    ("Llama", "conflict"): (0.95, 1.00, 0.99, 1.00),
    ("Qwen", "gradient"): (0.62, 0.40, 0.52, 0.40),
    ("Qwen", "sensitivity"): (0.46, 0.60, -0.10, -0.40),
    ("Qwen", "conflict"): (0.73, 0.80, 1.00, 1.00),
    ("Mistral", "gradient"): (0.77, 0.80, 0.67, 0.80),
    ("Mistral", "sensitivity"): (0.73, 0.80, 0.85, 0.80),
    ("Mistral", "conflict"): (0.95, 1.00, 0.94, 1.00),
}
# What the printed columns of Table 7 do not give: two Pearson coefficients of Mistral's O are 0.04 lower, and S with
# MMLU-CR comes out as printed only without the clipping at zero of Eq. 8, which makes two of its four costs equal.
NOT_REPRODUCED = {("Mistral", "gradient"): {0, 2}, ("Mistral", "sensitivity"): {2, 3}}

_FILE = json.loads((Path(__file__).parents[2] / "data" / "published_table7.json").read_text())
ROWS: list[dict[str, Any]] = [dict(zip(_FILE["columns"], row, strict=True)) for row in _FILE["rows"]]


def costs(row: dict[str, Any]) -> tuple[float, float]:
    """UCR and MMLU-CR of a bucket."""
    utility, safety, mmlu = BASE[row["model"]]
    found = [
        utility_cost_ratio(utility_before=b, utility_after=a, safety_before=safety, safety_after=row["safety"])
        for b, a in ((utility, row["utility"]), (mmlu, row["mmlu"]))
    ]
    assert found[0] is not None
    assert found[1] is not None
    return found[0], found[1]


def test_averages_and_cost_ratios_of_table_7() -> None:
    assert len(ROWS) == 36
    for row in ROWS:
        assert abs(np.mean([row[key] for key in ("mmlu", "csqa", "gsm8k", "math")]) - row["utility"]) < 0.011
        assert abs(np.mean([row[key] for key in ("adv_harm", "wildguard", "dan")]) - row["safety"]) < 0.011
        # Printed with two decimals.
        assert costs(row) == pytest.approx((row["ucr"], row["mmlu_cr"]), abs=0.01)


@pytest.mark.parametrize(("model", "score"), TABLE_8)
def test_correlations_of_table_8(model: str, score: str) -> None:
    rows = [row for row in ROWS if (row["model"], row["score"]) == (model, score)]
    scores = [row["mean_score"] for row in rows]
    found: list[float | None] = []
    for of_rows in zip(*map(costs, rows), strict=True):
        one = correlation(scores, of_rows)
        found += [one.pearson, one.spearman]
    expected = TABLE_8[model, score]
    differing = {i for i, (a, b) in enumerate(zip(found, expected, strict=True)) if a is None or abs(a - b) > 0.03}
    assert differing == NOT_REPRODUCED.get((model, score), set())


def test_without_clipping_mistrals_sensitivity_is_as_printed() -> None:
    rows = [row for row in ROWS if (row["model"], row["score"]) == ("Mistral", "sensitivity")]
    _, safety, mmlu = BASE["Mistral"]
    unclipped = [(mmlu - row["mmlu"]) / (row["safety"] - safety) for row in rows]
    found = correlation([row["mean_score"] for row in rows], unclipped)
    assert found.pearson == pytest.approx(0.85, abs=0.005)
    assert found.spearman == pytest.approx(0.80)
