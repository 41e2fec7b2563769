"""Plans: the work they predict is the work a diagnosis does; times and memory follow from it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from typing import Any

import pytest
import torch

from castune.config import DiagnoseConfig
from castune.core.heads import HeadLayout
from castune.core.journal import Journal
from castune.core.shards import Shard
from castune.core.units import UnitLayout
from castune.data.chat import ChatFormat
from castune.data.example import Example
from castune.diagnosis.ablator import Ablator
from castune.diagnosis.objectives import Objectives
from castune.diagnosis.sweep import Measure, sweep
from castune.errors import CastuneError, UnsupportedArchitecture
from castune.names import KINDS
from castune.plan import calibrate
from castune.plan.diagnosis import ACCELERATORS, Plan, Stage, plan

SETTINGS = DiagnoseConfig(max_new_tokens=8, batch_tokens=300, gradient_chunks=2)
FAMILIES = ["llama", "gpt2", "qwen3_next", "bloom", "mixtral"]


@pytest.fixture
def planned(tiny_tokenizer: Any, harmful: list[Example], questions: list[Example]) -> Callable[..., Plan]:
    def make(config: Any, **changes: Any) -> Plan:
        options: dict[str, Any] = {"settings": SETTINGS, "accelerator": "h100", **changes}
        return plan(
            config,
            tiny_tokenizer,
            **{"safety": harmful, "utility": questions, **options},
            dtype=torch.float32,
            device=torch.device("cpu"),
        )

    return make


@contextmanager
def counting(model: Any, layout: HeadLayout) -> Iterator[dict[str, float]]:
    """Forwards of the model, their tokens, and the scored positions."""
    found = {"forwards": 0, "tokens": 0, "n_scored": 0}

    def count(_module: Any, _args: Any, kwargs: dict[str, Any]) -> None:
        found["forwards"] += 1
        found["tokens"] += kwargs["input_ids"].numel()
        found["n_scored"] += kwargs["logits_to_keep"].numel()

    handle = model.register_forward_pre_hook(count, with_kwargs=True)
    try:
        yield found
    finally:
        handle.remove()


def work_of(model: Any, layout: HeadLayout, measure: Measure) -> dict[str, float]:
    ablator = measure.ablator  # type: ignore[attr-defined]
    with counting(model, layout) as found:
        sweep("counted", ablator, measure, journal=Journal(None, "test"), shard=Shard())
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_the_planned_work_is_what_a_diagnosis_does(
    family: str,
    planned: Callable[..., Plan],
    tiny_model: Callable[..., Any],
    tiny_tokenizer: Any,
    questions: list[Example],
) -> None:
    model = tiny_model(family)
    layout = HeadLayout.of(model)
    found = planned(model.config)
    units = UnitLayout(layout)
    ablator = Ablator(model, units, units.units, found.resumable)
    objectives = Objectives(ablator, tiny_tokenizer, ChatFormat(tiny_tokenizer), SETTINGS)
    stage = found.stages["utility"]
    expected = work_of(model, layout, objectives.utility_measure(questions))
    # Scored positions of a forward are padded to a multiple of 8.
    assert {name: getattr(stage, name) for name in expected} == expected


def test_the_planned_work_of_other_units_is_what_a_diagnosis_does(
    planned: Callable[..., Plan], tiny_model: Callable[..., Any], tiny_tokenizer: Any, questions: list[Example]
) -> None:
    """A head's columns of the output projection are ablated as the head is: nothing is run for them."""
    model, kinds = tiny_model("llama"), ("q_heads", "o_heads", "mlp_groups")
    layout = HeadLayout.of(model)
    settings = SETTINGS.model_copy(update={"units": kinds, "mlp_groups": 5, "gradient_memory": 1e-3})
    found = planned(model.config, settings=settings)
    units = UnitLayout.of(model, layout, [KINDS[kind] for kind in kinds], n_mlp_groups=5)
    swept = [one for one in units.units if one.kind != "o_head"]
    ablator = Ablator(model, units, swept, found.resumable)
    objectives = Objectives(ablator, tiny_tokenizer, ChatFormat(tiny_tokenizer), settings)
    expected = work_of(model, layout, objectives.utility_measure(questions))
    assert {name: getattr(found.stages["utility"], name) for name in expected} == expected
    assert (found.n_heads, found.what) == (12 + 12 + 15, "units")
    heads = planned(model.config)
    assert (heads.n_heads, heads.what) == (12, "heads")
    # What does not fit into the memory for gradients runs all examples again.
    assert found.gradient_sums <= 1e6
    assert found.stages["gradients"].forwards > 1
    assert found.stages["gradients"].forwards % heads.stages["gradients"].forwards == 0


def test_more_of_anything_costs_more(
    planned: Callable[..., Plan],
    tiny_model: Callable[..., Any],
    harmful: list[Example],
    questions: list[Example],
) -> None:
    config = tiny_model("llama").config
    base = planned(config)
    doubled = planned(config, safety=[*harmful, *(replace(e, id=f"{e.id}-2") for e in harmful)])
    more_tokens = planned(config, settings=SETTINGS.model_copy(update={"max_new_tokens": 16}))
    all_change, none_change = planned(config, decoded_share=1.0), planned(config, decoded_share=0.0)
    assert doubled.stages["decisions"].tokens > 1.6 * base.stages["decisions"].tokens
    assert doubled.stages["utility"] == base.stages["utility"]
    for name in ("margins", "decisions"):
        assert more_tokens.stage_flops(name) > base.stage_flops(name)
    assert none_change.stage_flops("decisions") < base.stage_flops("decisions") < all_change.stage_flops("decisions")
    assert none_change.stages["margins"] == base.stages["margins"]
    for measure in ("margin", "decision"):
        assert base.seconds(measure) == pytest.approx(sum(s.seconds or 0 for s in base.parts(measure).values()))


def test_stages_add_up() -> None:
    counts = [field.name for field in fields(Stage) if field.name != "seconds"]
    one, two = (Stage(**{name: (i + 1) * k for i, name in enumerate(counts)}) for k in (1, 2))
    assert one + two == Stage(**{name: 3 * (i + 1) for i, name in enumerate(counts)})


def test_faster_accelerators_are_faster_and_nothing_was_measured(
    planned: Callable[..., Plan], tiny_model: Callable[..., Any]
) -> None:
    config = tiny_model("llama").config
    seconds = {name: planned(config, accelerator=name).seconds("decision") for name in ACCELERATORS}
    assert seconds["h200"] <= seconds["h100"] < seconds["a100"]
    assert planned(config).peak_memory == {}


def test_a_calibrated_plan_has_times_and_memory(
    planned: Callable[..., Plan], tiny_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibrate, "_SECONDS_A_TIMING", 0.02)
    found = planned(tiny_model("llama").config, accelerator=None)
    assert all(stage.seconds is not None and stage.seconds > 0 for stage in found.stages.values())
    assert found.weight_bytes < found.peak_memory["margin"] <= found.peak_memory["decision"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"accelerator": "abacus"}, "accepted are a100"),
        ({"decoded_share": 1.5}, "accepted is 0 to 1"),
        ({"settings": SETTINGS.model_copy(update={"batch_tokens": "auto"})}, "needs a number"),
    ],
)
def test_bad_settings_are_refused(
    changes: dict[str, Any], said: str, planned: Callable[..., Plan], tiny_model: Callable[..., Any]
) -> None:
    with pytest.raises(CastuneError, match=said):
        planned(tiny_model("llama").config, **changes)


def test_a_model_without_attention_heads_is_refused(
    planned: Callable[..., Plan], tiny_model: Callable[..., Any]
) -> None:
    from transformers import AutoConfig

    config = AutoConfig.for_model("mamba", hidden_size=32, num_hidden_layers=2, vocab_size=300)
    with pytest.raises(UnsupportedArchitecture, match="no attention heads"):
        planned(config)
