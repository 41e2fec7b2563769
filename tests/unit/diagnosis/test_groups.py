"""Groups of heads: a group of one is the diagnosis of that head; a larger one equals zeroed o_proj columns."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import castune
from castune.artifacts.unit import joined
from castune.config import DiagnoseConfig
from castune.core.heads import HeadLayout
from castune.data.example import Example
from castune.diagnosis.groups import ablate_groups
from castune.evaluation.suites import Suite

MARGIN = DiagnoseConfig(measure="margin", max_new_tokens=4)
DECISION = DiagnoseConfig(measure="decision", max_new_tokens=4)
COLUMNS = ("utility_shift", "utility_shift_se", "safety_shift", "safety_shift_se")


@pytest.mark.parametrize(
    "config", [MARGIN, DECISION, MARGIN.model_copy(update={"ablation": "mean"})], ids=["margin", "decision", "mean"]
)
def test_groups_of_one_head_are_the_map(
    tiny_model: Callable[..., Any],
    tiny_tokenizer: Any,
    questions: list[Example],
    harmful: list[Example],
    config: DiagnoseConfig,
) -> None:
    model = tiny_model("qwen2")
    arguments: dict[str, Any] = {"safety": harmful, "utility": questions, "config": config}
    cmap = castune.diagnose(model, tiny_tokenizer, **arguments)
    found = ablate_groups(model, tiny_tokenizer, groups=[[one] for one in cmap.units], **arguments)
    for name in COLUMNS:
        np.testing.assert_allclose(getattr(found, name), cmap.column(name), atol=1e-5)


@pytest.mark.parametrize(
    "config", [MARGIN, DECISION, MARGIN.model_copy(update={"ablation": "mean"})], ids=["margin", "decision", "mean"]
)
def test_utility_shifts_are_means_over_domains(
    tiny_model: Callable[..., Any],
    tiny_tokenizer: Any,
    questions: list[Example],
    harmful: list[Example],
    config: DiagnoseConfig,
) -> None:
    model = tiny_model("qwen2")
    arguments: dict[str, Any] = {"safety": harmful, "config": config}
    utility = {"b": questions[:4], "a": questions[3:]}
    cmap = castune.diagnose(model, tiny_tokenizer, utility=utility, **arguments)
    groups = [[one] for one in cmap.units]
    found = ablate_groups(model, tiny_tokenizer, groups=groups, utility=utility, **arguments)
    for name in COLUMNS:
        np.testing.assert_allclose(getattr(found, name), cmap.column(name), atol=1e-5)


def test_a_group_equals_zeroed_columns(
    tiny_model: Callable[..., Any], tiny_tokenizer: Any, questions: list[Example], harmful: list[Example]
) -> None:
    model = tiny_model("llama")
    group = joined([(0, 1), (0, 3), (2, 0)])
    layout, cut = HeadLayout.of(model), copy.deepcopy(model)
    with torch.no_grad():
        for _, layer, head in group:
            layout.output_projection(cut, layer).weight[:, layout.output_columns(layer, head)] = 0
    arguments: dict[str, Any] = {"safety": harmful, "utility": questions}
    found = ablate_groups(model, tiny_tokenizer, groups=[group, [], group[:1]], config=MARGIN, **arguments)
    assert found.utility_shift[1] == found.safety_shift[1] == 0
    assert len({round(value, 6) for value in found.utility_shift}) == 3
    suite = Suite("questions", "utility", tuple(questions))
    one, other = (castune.evaluate(m, tiny_tokenizer, suites=[suite]) for m in (model, cut))
    change = [abs(b["margin"] - a["margin"]) for a, b in zip(one.samples, other.samples, strict=True)]
    np.testing.assert_allclose(found.utility_shift[0], np.mean(change), atol=1e-5)
