"""From work to seconds: rooflines wait for what is slowest, and a slice of the model is all that is timed here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from shapes import shape_of

from castune.config import DiagnoseConfig, EvaluateConfig, TuneConfig
from castune.core.loading import load_config
from castune.data.chat import ChatFormat
from castune.data.example import Example
from castune.data.rows import Row
from castune.evaluation.suites import Suite
from castune.plan import calibrate
from castune.plan.accelerators import ACCELERATORS, LAUNCH_SECONDS
from castune.plan.evaluation import suite_work
from castune.plan.planner import Planner
from castune.plan.shape import ModelShape
from castune.plan.speed import OnAccelerator
from castune.plan.training import training_sample, training_work
from castune.plan.work import Work

CONFIGS = Path(__file__).parents[3] / "recipes" / "configs"
ROWS = [Row.of_replies(range(60), [range(20)])] * 8


@pytest.fixture(scope="module")
def llama() -> ModelShape:
    return shape_of(load_config(CONFIGS / "llama3.1-8b")[0], dtype=torch.bfloat16)


def test_big_forwards_wait_for_arithmetic_and_short_steps_for_the_host(llama: ModelShape) -> None:
    h100 = ACCELERATORS["h100"]
    clock = OnAccelerator(h100, llama)
    training = training_work(llama, ROWS, TuneConfig()).work
    assert clock.seconds(training) == pytest.approx(llama.all_flops(training) / (0.4 * h100.flops))
    few = Work(steps=100, step_tokens=100, context=1e4)
    assert clock.seconds(few) == pytest.approx(100 * 32 * LAUNCH_SECONDS)
    # Half a thousand replies of a thousand tokens: keys and values are what is read.
    many = Work(steps=100, step_tokens=50_000, context=5e7)
    assert clock.seconds(many) > 5e7 * llama.key_bytes / h100.bandwidth > clock.seconds(few)
    faster = OnAccelerator(ACCELERATORS["h200"], llama)
    assert faster.seconds(many) < clock.seconds(many)
    assert llama.key_bytes == 2 * 8 * 128 * 32 * 2


def test_times_add_up_over_suites_and_steps(llama: ModelShape, tiny_tokenizer: Any, harmful: list[Example]) -> None:
    clock = OnAccelerator(ACCELERATORS["h100"], llama)
    once, twice = (training_work(llama, ROWS, TuneConfig(max_steps=n)) for n in (3, 6))
    assert twice.steps == 2 * once.steps
    assert clock.seconds(twice.work) == pytest.approx(2 * clock.seconds(once.work))
    prompts = Suite("prompts", "safety", tuple(replace(example, reply=None) for example in harmful))
    work = suite_work(llama, ChatFormat(tiny_tokenizer), prompts, EvaluateConfig()).work
    assert clock.seconds(work + work) == pytest.approx(2 * clock.seconds(work))


def test_here_needs_no_more_than_a_slice(
    tiny_model: Callable[..., Any], tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibrate, "_SECONDS_A_TIMING", 0.02)
    planner = Planner.of_config(
        tiny_model("llama").config,
        tiny_tokenizer,
        settings=DiagnoseConfig(),
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    clock = calibrate.Slice.of(planner.model, planner.units, ChatFormat(tiny_tokenizer), planner.device)
    speed = clock.speed(training_sample(ROWS, TuneConfig(batch_size=2)))
    assert speed.seconds(training_work(planner.shape, ROWS, TuneConfig()).work) > 0
    assert speed.seconds(Work()) == 0
