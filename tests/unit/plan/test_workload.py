"""Work of trainings and evaluations: what is counted is what is run, and it grows as it should."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from castune.artifacts import HeadSelection
from castune.config import EvaluateConfig, TuneConfig
from castune.core.heads import HeadLayout
from castune.core.losses import RowBatch, reply_nll
from castune.core.provenance import fingerprint
from castune.data.chat import ChatFormat
from castune.data.example import Example
from castune.data.rows import Row
from castune.errors import CastuneError
from castune.evaluation.run import evaluate
from castune.evaluation.suites import Suite
from castune.plan.workload import ModelShape, suite_work, training_work
from castune.tuning.row_lora import sparse_lora
from castune.tuning.train import tune

CONFIG = TuneConfig(rank=4, batch_size=2, accumulation=2, epochs=2)
ROWS = [Row.of_replies(range(10 + n), [range(3 + n % 4)]) for n in range(11)]
UTILITY = [Row.of_replies(range(20 + n), [range(2)]) for n in range(5)]


def all_heads(model: Any) -> HeadSelection:
    heads = HeadLayout.of(model).heads
    return HeadSelection.custom(heads, n_total=len(heads), model_fingerprint=fingerprint(model))


def shape_of(model: Any) -> ModelShape:
    return ModelShape.of(model.config, torch.float32)


@contextmanager
def counting(model: Any) -> Iterator[list[tuple[int, ...]]]:
    """Shapes of the input ids of every forward."""
    found: list[tuple[int, ...]] = []
    handle = model.register_forward_pre_hook(
        lambda _m, _a, kwargs: found.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    try:
        yield found
    finally:
        handle.remove()


@pytest.fixture
def aligned() -> list[Example]:
    words = ["tea", "a long walk", "rain", "the sea at night", "bread", "snow", "music"]
    return [
        Example(id=f"a{i}", prompt=f"Tell me about {w}.", reply=f"I like {w}{'!' * i}") for i, w in enumerate(words)
    ]


# -- training


@pytest.mark.parametrize("family", ["llama", "qwen2", "granite"])
def test_flops_of_a_training_equal_those_of_torch(tiny_model: Callable[..., Any], family: str) -> None:
    """But for the inputs of the lowest layer: their gradients are counted, and nobody needs them."""
    model = tiny_model(family)
    shape, layout = shape_of(model), HeadLayout.of(model)
    peft_model = sparse_lora(model, all_heads(model), r=4, alpha=4)
    model.set_attn_implementation("eager")
    batch = RowBatch.of(ROWS)
    with FlopCounterMode(display=False) as counter:
        reply_nll(peft_model, batch, fused=True).mean().backward()
    config = CONFIG.changed(batch_size=len(ROWS), accumulation=1, epochs=1)
    work = training_work(shape, ROWS, config)
    n_rows, length, n_scored = work.largest
    assert (n_rows, length) == batch.ids_BS.shape
    assert n_scored == batch.tokens_BT.numel()
    tokens = n_rows * length
    attention = layout.decoder_layers(model)[0].get_submodule(layout.at(0).path.rpartition(".")[2])
    weights = sum(p.numel() for n, p in attention.named_parameters() if p.dim() == 2 and "lora" not in n)
    into = weights - layout.output_projection(model, 0).weight.numel()
    spared = tokens * (2 * into + 2 * 4 * shape.hidden + shape.flops.pair_L[0] * length)
    flops = work.stage.layer_flops + work.stage.n_scored * shape.flops.scored
    assert flops - spared == pytest.approx(counter.get_total_flops(), rel=0.005)
    assert flops >= counter.get_total_flops()


@pytest.mark.parametrize("group_by_length", [True, False])
@pytest.mark.parametrize(
    "changes",
    [{}, {"surgery": "pcgrad"}, {"surgery": "pcgrad", "surgery_batch_size": 3}, {"replay": 0.4}, {"max_steps": 3}],
)
def test_the_counted_training_is_the_one_that_runs(
    changes: dict[str, Any],
    group_by_length: bool,
    aligned: list[Example],
    questions: list[Example],
    tiny_model: Callable[..., Any],
    tiny_tokenizer: Any,
    tmp_path: Path,
) -> None:
    model, config = tiny_model("llama"), CONFIG.changed(group_by_length=group_by_length, **changes)
    utility = questions if config.needs_utility else None
    with counting(model) as forwards:
        done = tune(
            model, tiny_tokenizer, all_heads(model), data=aligned, out=tmp_path / "a", config=config, utility=utility
        )
    chat = ChatFormat(tiny_tokenizer, max_length=config.max_length)
    rows, utility_rows = [chat.loss_row(e) for e in aligned], [chat.loss_row(e) for e in questions]
    work = training_work(shape_of(model), rows, config, utility_rows=utility_rows)
    assert work.steps == done.steps
    forwards = [size for size in forwards if size != (1, 8)]  # looks for the heads
    assert work.stage.forwards == len(forwards)
    tokens = sum(n_rows * length for n_rows, length in forwards)
    # Without grouping the order, and so the padding, is another random one.
    assert work.stage.tokens == (tokens if group_by_length else pytest.approx(tokens, rel=0.2))


def test_a_training_grows_with_what_it_does(tiny_model: Callable[..., Any]) -> None:
    shape = shape_of(tiny_model("llama"))

    def work(**changes: Any) -> Any:
        return training_work(shape, ROWS, CONFIG.changed(**changes), utility_rows=UTILITY)

    usual = work()
    assert work(epochs=4).steps == 2 * usual.steps == 4 * work(epochs=1).steps
    twice, once = work(max_steps=6, epochs=9), work(max_steps=3, epochs=9)
    assert (twice.steps, once.steps) == (6, 3)
    assert 1.5 < twice.stage.layer_flops / once.stage.layer_flops < 2.5
    for more in ({"surgery": "pcgrad"}, {"replay": 0.5}, {"gradient_checkpointing": True}, {"rank": 8}):
        assert work(**more).stage.layer_flops > usual.stage.layer_flops, more
    # A forward more of what was two.
    again = work(gradient_checkpointing=True).stage.layer_flops - usual.stage.layer_flops
    assert 0.4 < again / usual.stage.layer_flops < 0.55
    # Utility batches as large as the steps', but of other lengths.
    assert work(surgery="pcgrad").stage.tokens > 2 * usual.stage.tokens


def test_preferences_take_two_replies_and_a_reference(tiny_model: Callable[..., Any]) -> None:
    shape = shape_of(tiny_model("llama"))
    pairs = [{"prompt_ids": [1] * 10, "chosen_ids": [2] * n, "rejected_ids": [3] * 6} for n in (2, 4, 5, 6)] * 2
    work = training_work(shape, [], CONFIG.changed(method="dpo", epochs=1), pairs=pairs)
    assert (work.steps, work.stage.forwards) == (2, 4)
    assert work.stage.tokens == 4 * 4 * 16
    assert work.stage.n_scored == 3 * work.stage.tokens


def test_trainings_that_cannot_be_are_refused(tiny_model: Callable[..., Any]) -> None:
    shape = shape_of(tiny_model("llama"))
    with pytest.raises(CastuneError, match="needs examples"):
        training_work(shape, [], CONFIG)
    for changes in ({"surgery": "pcgrad"}, {"replay": 0.5}):
        with pytest.raises(CastuneError, match="need utility"):
            training_work(shape, ROWS, CONFIG.changed(**changes))


def test_memory_is_about_what_a_training_keeps(tiny_model: Callable[..., Any]) -> None:
    """Against the tensors that autograd saves, parameters aside."""
    model = tiny_model("llama", hidden_size=128, intermediate_size=344, num_attention_heads=8, head_dim=16)
    shape = ModelShape.of(model.config, torch.bfloat16)
    peft_model = sparse_lora(model.bfloat16(), all_heads(model), r=4, alpha=4)
    own = {p.untyped_storage().data_ptr() for p in peft_model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    rows = [Row.of_replies(range(120), [range(8)])] * 4
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        reply_nll(peft_model, RowBatch.of(rows), fused=True).mean()
    config = TuneConfig(rank=4)
    work = training_work(shape, rows, config)
    # Of the estimate, weights and adapter are exact.
    fixed = shape.weight_bytes + 16 * 4 * shape.adapter_width
    assert work.peak_memory(shape, config) - fixed == pytest.approx(sum(kept.values()), rel=0.35)
    less = config.changed(gradient_checkpointing=True)
    assert fixed < work.peak_memory(shape, less) < work.peak_memory(shape, config)
    assert work.peak_memory(shape, config.changed(quantization="nf4")) < work.peak_memory(shape, config)


# -- evaluation


def suites_of(questions: list[Example], harmful: list[Example]) -> list[Suite]:
    prompts = tuple(replace(example, reply=None) for example in harmful)
    letters = tuple(example for example in questions if example.scoring == "letter")
    return [Suite("questions", "utility", letters), Suite("prompts", "safety", prompts)]


def test_the_counted_evaluation_is_the_one_that_runs(
    questions: list[Example], harmful: list[Example], tiny_model: Callable[..., Any], tiny_tokenizer: Any
) -> None:
    model = tiny_model("llama")
    config = EvaluateConfig(batch_tokens=700, max_new_tokens=12, max_length=400)
    chat = ChatFormat(tiny_tokenizer, max_length=config.max_length)
    for suite in suites_of(questions, harmful):
        with counting(model) as forwards:
            result = evaluate(model, tiny_tokenizer, suites=[suite], config=config)
        stage = suite_work(shape_of(model), chat, suite, config, reply=12).stage
        # What looks for the heads and tries shared prompts is shorter than any prompt here.
        whole = [size for size in forwards if size[1] > 8]
        steps = [size for size in forwards if size[1] == 1]
        assert stage.forwards == len(whole)
        assert stage.tokens == sum(n_rows * length for n_rows, length in whole)
        if suite.name == "prompts":
            # A random model ends few replies by itself. The first token comes of the forward over the prompts.
            assert stage.steps - stage.forwards == len(steps)
            assert stage.step_tokens >= sum(sample["tokens"] for sample in result.samples)
        else:
            assert stage.steps == stage.step_tokens == 0


def test_evaluations_grow_with_what_they_do(
    questions: list[Example], harmful: list[Example], tiny_model: Callable[..., Any], tiny_tokenizer: Any
) -> None:
    shape, chat = shape_of(tiny_model("llama")), ChatFormat(tiny_tokenizer)
    config = EvaluateConfig(batch_tokens=300, max_new_tokens=64)
    scored, generated = suites_of(questions, harmful)
    usual = suite_work(shape, chat, generated, config).stage
    longer = suite_work(shape, chat, generated, EvaluateConfig(batch_tokens=300, max_new_tokens=128)).stage
    shorter = suite_work(shape, chat, generated, config, reply=10).stage
    more = replace(generated, examples=tuple(replace(e, id=f"{e.id}{k}") for e in generated.examples for k in "ab"))
    doubled = suite_work(shape, chat, more, config).stage
    assert longer.steps >= 2 * usual.steps
    assert shorter.steps == usual.steps
    assert shorter.step_tokens < usual.step_tokens < longer.step_tokens
    assert doubled.step_tokens == 2 * usual.step_tokens
    letters = suite_work(shape, chat, scored, EvaluateConfig(letters="generated")).stage
    assert letters.steps > 0 == suite_work(shape, chat, scored, config).stage.steps
    with pytest.raises(CastuneError, match="at least 1"):
        suite_work(shape, chat, generated, config, reply=0)


# -- shapes


def test_keys_and_values_are_those_of_a_cache(any_tiny_model: Any) -> None:
    ids = torch.zeros(1, 4, dtype=torch.long)
    with torch.no_grad():
        cache = any_tiny_model(input_ids=ids, use_cache=True).past_key_values
    held = [getattr(layer, name, None) for layer in cache.layers for name in ("keys", "values")]
    n_bytes = sum(tensor.numel() * 4 for tensor in held if tensor is not None) / 4
    assert shape_of(any_tiny_model).key_bytes == n_bytes
