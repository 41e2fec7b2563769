"""Costs of recipes from configs alone: they add up, and the paper's recipes can be told without a network."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from castune.config import EvaluateConfig, Recipe, TuneConfig
from castune.core.loading import load_config
from castune.data.chat import ChatFormat
from castune.data.example import Example
from castune.data.rows import Row
from castune.errors import CastuneError
from castune.evaluation.suites import Suite
from castune.plan import calibrate
from castune.plan.accelerators import ACCELERATORS, LAUNCH_SECONDS
from castune.plan.diagnosis import Stage
from castune.plan.makespan import longest_chain, makespan
from castune.plan.recipe import Here, OnAccelerator, RecipeCost, paper_hours, recipe_cost, stage_flops
from castune.plan.workload import ModelShape, SuiteWork, Training, suite_work, training_work

CONFIGS = Path(__file__).parents[3] / "recipes" / "configs"
ROWS = [Row.of_replies(range(60), [range(20)])] * 8


@pytest.fixture
def costed(tiny_model: Callable[..., Any], tiny_tokenizer: Any, tmp_path: Path) -> Callable[..., RecipeCost]:
    tiny_model("llama").config.save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")

    def make(accelerator: str | None = "h100", **changes: Any) -> RecipeCost:
        values: dict[str, Any] = {
            "model": str(tmp_path / "model"),
            "out": "unused",
            "dtype": "float32",
            "safety": {"source": "starter-safety", "limit": 3},
            "utility": {"source": "starter-utility", "limit": 3},
            "align": {"source": "starter-align", "limit": 12},
            "diagnose": {"measure": "margin", "max_new_tokens": 4, "gradient_chunks": 2},
            "select": {"compare": ["risky", "safe+pcgrad"], "seed": 1},
            "tune": {"max_steps": 4},
            "evaluate": {"suites": ["starter-utility-eval", "starter-safety-eval"], "limit": 4},
        }
        return recipe_cost(Recipe.of(**{**values, **changes}), accelerator=accelerator)

    return make


def test_a_recipe_costs_the_sum_of_its_parts(costed: Callable[..., RecipeCost]) -> None:
    found = costed()
    assert list(found.arms) == ["main", "risky", "safe+pcgrad"]
    assert found.arms["main"] == found.arms["risky"]
    assert found.arms["safe+pcgrad"].seconds > found.arms["main"].seconds > 0
    assert found.evaluation.tokens == sum(stage.tokens for stage in found.suites.values())
    assert found.evaluation.seconds == pytest.approx(sum(stage.seconds or 0 for stage in found.suites.values()))
    training = sum(arm.seconds for arm in found.arms.values())
    whole = found.diagnosis_seconds + training + 4 * found.evaluation_seconds
    assert found.hours(1) == pytest.approx(whole / 3600)
    units = found.units("a/") + found.units("b/")
    assert makespan(units, 1) == pytest.approx(2 * whole)
    assert longest_chain(units, 50) <= makespan(units, 50) <= longest_chain(units, 50) + 2 * whole / 50
    assert found.notes == []
    assert costed(tune={"max_steps": 8}).arms["main"].training.steps == 2 * found.arms["main"].training.steps


def test_a_recipe_is_timed_here(costed: Callable[..., RecipeCost], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibrate, "_SECONDS_A_TIMING", 0.02)
    found = costed(accelerator=None)
    assert found.diagnosis_seconds > 0
    assert found.arms["safe+pcgrad"].seconds > 0
    assert all(stage.seconds is not None and stage.seconds > 0 for stage in found.suites.values())


def test_the_papers_recipe_is_told_from_a_config_alone(
    tiny_model: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreachable(*_arguments: Any) -> Any:
        from castune.errors import SourceUnreachable

        raise SourceUnreachable("no network")

    monkeypatch.setattr("castune.data.sources._read_hub", unreachable)
    tiny_model("mistral", vocab_size=50_000, max_position_embeddings=4096).config.save_pretrained(tmp_path)
    recipe = Recipe.load(
        CONFIGS.parent / "mistral-7b.toml",
        [
            f"model={tmp_path}",
            'evaluate.suites=["csqa", "gsm8k#50", "wildguard"]',
            "safety.limit=20",
            "utility.limit=20",
            "align.limit=400",
        ],
    )
    found = recipe_cost(recipe, accelerator="h100")
    assert found.shape.n_heads == 12
    assert found.arms["main"].training.steps == 50  # 400 / (4 x 2)
    assert 0 < found.hours(8) < found.hours(1)
    assert any(note.startswith("wildjailbreak-train: not to be had here") for note in found.notes)
    assert found.suites.keys() == {"csqa", "gsm8k", "wildguard"}


def test_the_papers_diagnosis_takes_what_it_says() -> None:
    assert paper_hours(1024) == pytest.approx(19.1, abs=0.05)


def test_an_unknown_accelerator_is_refused(costed: Callable[..., RecipeCost]) -> None:
    with pytest.raises(CastuneError, match="accepted are a100"):
        costed(accelerator="abacus")


@pytest.fixture(scope="module")
def llama() -> ModelShape:
    return ModelShape.of(load_config(CONFIGS / "llama3.1-8b")[0], torch.bfloat16)


def test_big_forwards_wait_for_arithmetic_and_short_steps_for_the_host(llama: ModelShape) -> None:
    h100 = ACCELERATORS["h100"]
    clock = OnAccelerator(h100, llama)
    training = training_work(llama, ROWS, TuneConfig())
    flops = stage_flops(llama, training.stage)
    assert clock.training(training) == pytest.approx(flops / (0.4 * h100.flops))
    few = SuiteWork(Stage(steps=100, step_tokens=100, context=1e4))
    assert clock.suite(few) == pytest.approx(100 * 32 * LAUNCH_SECONDS)
    # Half a thousand replies of a thousand tokens: keys and values are what is read.
    many = SuiteWork(Stage(steps=100, step_tokens=50_000, context=5e7))
    assert clock.suite(many) > 5e7 * llama.key_bytes / h100.bandwidth > clock.suite(few)
    faster = OnAccelerator(ACCELERATORS["h200"], llama)
    assert faster.suite(many) < clock.suite(many)
    assert llama.key_bytes == 2 * 8 * 128 * 32 * 2


def test_times_add_up_over_suites_and_steps(llama: ModelShape, tiny_tokenizer: Any, harmful: list[Example]) -> None:
    clock = OnAccelerator(ACCELERATORS["h100"], llama)
    once, twice = (training_work(llama, ROWS, TuneConfig(max_steps=n)) for n in (3, 6))
    assert twice.steps == 2 * once.steps
    assert clock.training(twice) == pytest.approx(2 * clock.training(once))
    prompts = Suite("prompts", "safety", tuple(replace(example, reply=None) for example in harmful))
    work = suite_work(llama, ChatFormat(tiny_tokenizer), prompts, EvaluateConfig())
    assert clock.suite(replace(work, stage=work.stage + work.stage)) == pytest.approx(2 * clock.suite(work))


def test_here_needs_no_more_than_a_slice(
    tiny_model: Callable[..., Any], tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibrate, "_SECONDS_A_TIMING", 0.02)
    config = tiny_model("llama").config
    shape = ModelShape.of(config, torch.float32)
    clock = Here(
        config, shape, ChatFormat(tiny_tokenizer), dtype=torch.float32, device=torch.device("cpu"), batch_tokens=500
    )
    work = training_work(shape, ROWS, TuneConfig())
    assert clock.training(work, ROWS[:2]) > 0
    assert clock.training(Training(Stage(), 0, (0, 0, 0)), ROWS[:2]) == 0
