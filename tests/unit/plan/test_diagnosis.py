"""Plans: the work they predict is the work a diagnosis does; times and memory follow from it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from castune.config import DiagnoseConfig
from castune.core.heads import HeadLayout
from castune.core.journal import Journal
from castune.core.shards import Shard
from castune.core.units import UnitLayout
from castune.data.chat import ChatFormat
from castune.data.example import Example
from castune.diagnosis.ablator import Ablator
from castune.diagnosis.domains import Utility
from castune.diagnosis.gradients import partial_gradients
from castune.diagnosis.objectives import Objectives
from castune.diagnosis.sweep import Measure, sweep
from castune.errors import CastuneError, UnsupportedArchitecture
from castune.names import KINDS
from castune.plan import calibrate
from castune.plan.accelerators import ACCELERATORS, accelerator_named
from castune.plan.planner import DiagnosisCost, Planner
from castune.plan.work import Size, Work
from castune.stats.ranking import equal_parts

SETTINGS = DiagnoseConfig(max_new_tokens=8, batch_tokens=300, gradient_chunks=2)
FAMILIES = ["llama", "gpt2", "qwen3_next", "bloom", "mixtral"]


@dataclass(frozen=True)
class Planned:
    """A planner and the cost of a diagnosis."""

    planner: Planner
    cost: DiagnosisCost

    def work(self, name: str) -> Work:
        return self.cost.costs[name].work

    def flops(self, name: str) -> float:
        return self.planner.shape.all_flops(self.work(name))


@pytest.fixture
def planned(tiny_tokenizer: Any, harmful: list[Example], questions: list[Example]) -> Callable[..., Planned]:
    def make(
        config: Any,
        *,
        settings: DiagnoseConfig = SETTINGS,
        accelerator: str | None = "h100",
        safety: list[Example] = harmful,
        utility: Utility = questions,
        decoded_share: float | None = None,
    ) -> Planned:
        planner = Planner.of_config(
            config,
            tiny_tokenizer,
            settings=settings,
            dtype=torch.float32,
            device=torch.device("cpu"),
            accelerator=None if accelerator is None else accelerator_named(accelerator),
        )
        return Planned(planner, planner.diagnosis(safety, utility, settings, decoded_share=decoded_share))

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
    planned: Callable[..., Planned],
    tiny_model: Callable[..., Any],
    tiny_tokenizer: Any,
    questions: list[Example],
) -> None:
    model = tiny_model(family)
    layout = HeadLayout.of(model)
    found = planned(model.config)
    resumable = found.cost.resumable
    units = UnitLayout(layout)
    ablator = Ablator(model, units, units.units, resumable)
    objectives = Objectives(ablator, tiny_tokenizer, ChatFormat(tiny_tokenizer), SETTINGS)
    work = found.work("utility")
    expected = work_of(model, layout, objectives.utility_measure(questions))
    # Scored positions of a forward are padded to a multiple of 8.
    assert {name: getattr(work, name) for name in expected} == expected


def test_the_planned_work_of_other_units_is_what_a_diagnosis_does(
    planned: Callable[..., Planned], tiny_model: Callable[..., Any], tiny_tokenizer: Any, questions: list[Example]
) -> None:
    """A head's columns of the output projection are ablated as the head is: nothing is run for them."""
    model, kinds = tiny_model("llama"), ("q_heads", "o_heads", "mlp_groups")
    layout = HeadLayout.of(model)
    settings = SETTINGS.model_copy(update={"units": kinds, "mlp_groups": 5, "gradient_memory": 1e-3})
    found = planned(model.config, settings=settings)
    units = UnitLayout.of(model, layout, [KINDS[kind] for kind in kinds], n_mlp_groups=5)
    swept = [one for one in units.units if one.kind != "o_head"]
    ablator = Ablator(model, units, swept, found.cost.resumable)
    objectives = Objectives(ablator, tiny_tokenizer, ChatFormat(tiny_tokenizer), settings)
    expected = work_of(model, layout, objectives.utility_measure(questions))
    assert {name: getattr(found.work("utility"), name) for name in expected} == expected
    assert found.planner.shape.n_units == 12 + 12 + 15
    heads = planned(model.config)
    assert heads.planner.shape.n_units == 12
    # What does not fit into the memory for gradients runs all examples again.
    assert found.cost.gradient_bytes <= 1e6
    assert found.work("gradients").forwards > 1
    assert found.work("gradients").forwards % heads.work("gradients").forwards == 0


def test_the_planned_work_of_reply_domains_is_what_a_diagnosis_does(
    planned: Callable[..., Planned],
    tiny_model: Callable[..., Any],
    tiny_tokenizer: Any,
    questions: list[Example],
    harmful: list[Example],
) -> None:
    """Beside that of the questions, which is what it was; by both measures with the model's own replies."""
    model = tiny_model("llama")
    harmless = [Example(id=f"b{i}", prompt=f"Kill process {i}.", reply=f"Use kill {'9' * i}.") for i in range(1, 6)]
    settings = SETTINGS.model_copy(update={"reply_domains": ("overrefusal",)})
    config, utility = model.config, {"overrefusal": harmless, "words": questions}
    found = planned(config, settings=settings, utility=utility, decoded_share=0.0)
    plain = planned(config, decoded_share=0.0)
    assert {"reply_margins", "reply_decisions"} == found.cost.costs.keys() - plain.cost.costs.keys()
    for name in ("utility", "margins", "decisions"):
        assert found.work(name) == plain.work(name)
    for name in ("gradients", "attribution", "checked"):
        assert found.flops(name) > plain.flops(name)

    units = UnitLayout(HeadLayout.of(model))
    ablator = Ablator(model, units, units.units, found.cost.resumable)
    objectives = Objectives(ablator, tiny_tokenizer, ChatFormat(tiny_tokenizer), settings)
    scored = work_of(model, HeadLayout.of(model), objectives.utility_measure(harmless))
    own = found.work("checked").step_tokens - plain.work("checked").step_tokens
    assert own == len(harmless) * SETTINGS.max_new_tokens
    margins, decisions = found.work("reply_margins"), found.work("reply_decisions")
    assert margins.step_tokens == decisions.step_tokens == own
    # One prompt of middle length a reply is read before it is written.
    n_batches = margins.steps // SETTINGS.max_new_tokens
    assert margins.forwards - n_batches == scored["forwards"]
    assert margins.n_scored - len(harmless) == scored["n_scored"]
    all_change = planned(config, settings=settings, utility=utility, decoded_share=1.0)
    assert all_change.work("reply_margins") == margins
    assert all_change.work("reply_decisions").step_tokens > own
    for measure in ("margin", "decision"):
        assert f"reply_{measure}s" in found.cost.parts(measure)
        assert found.cost.total(measure).seconds > plain.cost.total(measure).seconds

    only = planned(config, settings=settings, utility={"overrefusal": harmless}, decoded_share=0.0)
    assert only.work("reply_margins") == margins
    assert only.work("utility") == Work()


@pytest.mark.parametrize("family", ["llama", "qwen2", "granite"])
def test_flops_of_the_gradients_equal_those_of_torch(
    family: str,
    planned: Callable[..., Planned],
    tiny_model: Callable[..., Any],
    tiny_tokenizer: Any,
    harmful: list[Example],
    questions: list[Example],
) -> None:
    """But for the inputs of the lowest layer: their gradients are counted, and nobody needs them."""
    model = tiny_model(family)
    layout = HeadLayout.of(model)
    found = planned(model.config, settings=SETTINGS.model_copy(update={"batch_tokens": 100_000}))
    model.set_attn_implementation("eager")
    chat = ChatFormat(tiny_tokenizer, max_length=SETTINGS.max_length)
    paths = [layout.at(layer).query_path for layer in layout.layers_with_heads]
    spared = 0.0
    attention = layout.decoder_layers(model)[0].get_submodule(layout.at(0).path.rpartition(".")[2])
    weights = sum(p.numel() for p in attention.parameters() if p.dim() == 2)
    into = weights - layout.output_projection(model, 0).weight.numel()  # type: ignore[operator, union-attr]
    with FlopCounterMode(display=False) as counter:
        for examples in (harmful, questions):
            rows = [chat.loss_row(example) for example in examples]
            partial_gradients(model, paths, rows, n_chunks=SETTINGS.gradient_chunks, batch_tokens=100_000)
            for chunk in equal_parts(rows, SETTINGS.gradient_chunks):
                size = Size.of(chunk)
                spared += size.n_tokens * (2 * into + found.planner.shape.flops.pair_L[0] * size.length)
    assert found.flops("gradients") - spared == pytest.approx(counter.get_total_flops(), rel=0.005)


def test_only_the_layers_that_are_diagnosed_are_counted(
    planned: Callable[..., Planned], tiny_model: Callable[..., Any]
) -> None:
    config = tiny_model("llama").config
    whole, one = (planned(config, settings=SETTINGS.model_copy(update={"layers": layers})) for layers in (None, (2,)))
    assert one.flops("utility") < whole.flops("utility") / 3
    assert one.cost.gradient_bytes == whole.cost.gradient_bytes / 3
    # Forwards through all layers all the same, and back no further than to the one.
    assert one.work("gradients").forwards == whole.work("gradients").forwards
    assert one.flops("gradients") < whole.flops("gradients")


def test_more_of_anything_costs_more(
    planned: Callable[..., Planned],
    tiny_model: Callable[..., Any],
    harmful: list[Example],
    questions: list[Example],
) -> None:
    config = tiny_model("llama").config
    base = planned(config)
    doubled = planned(config, safety=[*harmful, *(replace(e, id=f"{e.id}-2") for e in harmful)])
    more_tokens = planned(config, settings=SETTINGS.model_copy(update={"max_new_tokens": 16}))
    all_change, none_change = planned(config, decoded_share=1.0), planned(config, decoded_share=0.0)
    assert doubled.work("decisions").tokens > 1.6 * base.work("decisions").tokens
    assert doubled.work("utility") == base.work("utility")
    for name in ("margins", "decisions"):
        assert more_tokens.flops(name) > base.flops(name)
    assert none_change.flops("decisions") < base.flops("decisions") < all_change.flops("decisions")
    assert none_change.work("margins") == base.work("margins")
    for measure in ("margin", "decision"):
        parts = base.cost.parts(measure).values()
        assert base.cost.total(measure).seconds == pytest.approx(sum(cost.seconds for cost in parts))


def test_faster_accelerators_are_faster_and_nothing_was_measured(
    planned: Callable[..., Planned], tiny_model: Callable[..., Any]
) -> None:
    config = tiny_model("llama").config
    seconds = {name: planned(config, accelerator=name).cost.total("decision").seconds for name in ACCELERATORS}
    assert seconds["h200"] <= seconds["h100"] < seconds["a100"]
    assert planned(config).cost.peak_memory == {}


def test_a_calibrated_plan_has_times_and_memory(
    planned: Callable[..., Planned], tiny_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibrate, "_SECONDS_A_TIMING", 0.02)
    found = planned(tiny_model("llama").config, accelerator=None)
    assert all(cost.seconds > 0 for cost in found.cost.costs.values())
    memory = found.cost.peak_memory
    assert found.planner.shape.weight_bytes < memory["margin"] <= memory["decision"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"accelerator": "abacus"}, "accepted: a100"),
        ({"decoded_share": 1.5}, "accepted: 0 to 1"),
        ({"settings": SETTINGS.model_copy(update={"batch_tokens": "auto"})}, "needs a number"),
    ],
)
def test_bad_settings_are_refused(
    changes: dict[str, Any], said: str, planned: Callable[..., Planned], tiny_model: Callable[..., Any]
) -> None:
    with pytest.raises(CastuneError, match=said):
        planned(tiny_model("llama").config, **changes)


def test_a_model_without_attention_heads_is_refused(
    planned: Callable[..., Planned], tiny_model: Callable[..., Any]
) -> None:
    from transformers import AutoConfig

    config = AutoConfig.for_model("mamba", hidden_size=32, num_hidden_layers=2, vocab_size=300)
    with pytest.raises(UnsupportedArchitecture, match="no attention heads"):
        planned(config)
