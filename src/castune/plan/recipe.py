"""What a recipe's diagnosis, trainings and evaluations cost, from the model's config and the data: nothing is run.

Work is counted (`work.py`). Seconds come from an accelerator's data sheet, or from a slice of the model that is timed
on this machine (`plan/calibrate.py`). They leave out loading models, writing results and judging replies.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, final

import torch

from castune.config import DiagnoseConfig, Recipe
from castune.core.batching import ExampleBatch
from castune.core.heads import HeadLayout
from castune.core.loading import device_of, torch_dtype_of
from castune.core.skeleton import skeleton
from castune.data.chat import ChatFormat
from castune.data.rows import Row
from castune.errors import CastuneError
from castune.evaluation.suites import Suite, load_suites
from castune.names import ArmName
from castune.plan.accelerators import ACCELERATORS, Accelerator
from castune.plan.calibrate import GRADIENT_PASSES, decoding_steps, gradient_speed, sweep_speed
from castune.plan.diagnosis import Plan, Stage, plan_diagnosis, slice_ablator
from castune.plan.inputs import config_and_tokenizer
from castune.plan.makespan import Unit, makespan
from castune.plan.stand_ins import DataOrStandIns
from castune.plan.workload import ModelShape, SuiteWork, Training, suite_work, training_work
from castune.steps.inputs import load_calibration, load_data
from castune.tuning.preferences import preference_pairs

# What the paper's diagnosis takes a head on an H800 (Appendix F.5, 100 examples): utility, and safety.
PAPER_HEAD_SECONDS = 7 + 60
# Keys and values of a decoding step are read for attention, and copied (read and written) to append the new ones.
_CACHE_PASSES = 3
# Tokens of keys and values of the batch with which decoding is timed here.
_TIMED_CONTEXT = 8192


def paper_hours(n_heads: int) -> float:
    """GPU-hours of a diagnosis of so many heads as the paper does it: 19.1 for Llama-3.1-8B's 1,024."""
    return n_heads * PAPER_HEAD_SECONDS / 3600


class Clock(ABC):
    """How long work takes somewhere."""

    @abstractmethod
    def training(self, work: Training, rows: Sequence[Row]) -> float:
        """Seconds of a training.

        Args:
            work: its work.
            rows: a micro-batch of middle length.
        """

    @abstractmethod
    def suite(self, work: SuiteWork) -> float:
        """Seconds of a suite."""


@final
class OnAccelerator(Clock):
    """By a roofline over an accelerator's data sheet."""

    def __init__(self, accelerator: Accelerator, shape: ModelShape) -> None:
        self.accelerator, self.shape = accelerator, shape

    def training(self, work: Training, rows: Sequence[Row] = ()) -> float:
        """Seconds of forwards and backwards; the optimiser's own are nothing beside them."""
        return self._passes(work.stage)

    def suite(self, work: SuiteWork) -> float:
        """Seconds of forwards and of decoding steps."""
        stage, shape = work.stage, self.shape
        n_bytes = stage.steps * shape.weight_bytes + _CACHE_PASSES * stage.context * shape.key_bytes
        steps = self.accelerator.decoding_seconds(stage.steps, shape.n_layers, decoding_flops(shape, stage), n_bytes)
        return self._passes(stage) + steps

    def _passes(self, stage: Stage) -> float:
        flops = stage.layer_flops + stage.n_scored * self.shape.flops.scored
        return self.accelerator.seconds(flops, stage.weight_reads * self.shape.weight_bytes)


@final
class Here(Clock):
    """By timing a slice of the model, with random weights, on this machine.

    Args:
        config: the model's config.
        shape: the model's shape.
        chat: its tokenizer and template.
        dtype: of the weights.
        device: where it runs.
        batch_tokens: rows x tokens of a forward.
    """

    def __init__(
        self,
        config: Any,
        shape: ModelShape,
        chat: ChatFormat,
        *,
        dtype: torch.dtype,
        device: torch.device,
        batch_tokens: int,
    ) -> None:
        self.shape, self.chat, self.batch_tokens = shape, chat, batch_tokens
        model = skeleton(config, dtype)
        self.ablator = slice_ablator(config, model, HeadLayout.unproven(model), DiagnoseConfig(), dtype, device)

    def training(self, work: Training, rows: Sequence[Row]) -> float:
        """Seconds of forwards and backwards, as of the diagnosis' gradients of those rows."""
        # A micro-batch is one forward, however long.
        room = len(rows) * max(len(row.ids) for row in rows)
        speed, *_ = gradient_speed(self.ablator, rows, room)
        return speed.seconds(work.stage.layer_flops, work.stage.n_scored / GRADIENT_PASSES)

    def suite(self, work: SuiteWork) -> float:
        """Seconds of forwards, and of decoding steps at a reply's middle."""
        stage = work.stage
        rows = work.rows or [Row.of_replies(work.prompt, [work.prompt[-1:]])]
        parts = [[(n, len(row.tokens))] for n, row in enumerate(rows)]
        speed, _ = sweep_speed(
            self.ablator, [ExampleBatch(list(range(len(rows))), list(rows), parts)], self.batch_tokens
        )
        forwards = speed.seconds(stage.layer_flops, stage.n_scored)
        if not stage.steps:
            return forwards
        context = (list(work.prompt) * (1 + work.reply // len(work.prompt)))[: len(work.prompt) + work.reply // 2]
        n_replies = max(2, min(work.n_replies, _TIMED_CONTEXT // len(context)))
        steps = decoding_steps(self.ablator, self.chat, context, n_replies, self.shape.n_layers, continues=False)
        return forwards + steps.seconds(stage.steps, stage.step_tokens)


def decoding_flops(shape: ModelShape, stage: Stage) -> float:
    """FLOPs of a stage's decoding steps."""
    a_token = sum(shape.flops.token_L) + shape.flops.scored
    return stage.step_tokens * a_token + stage.context * sum(shape.flops.pair_L)


def stage_flops(shape: ModelShape, stage: Stage) -> float:
    """All FLOPs of a stage of a training or an evaluation."""
    return stage.layer_flops + stage.n_scored * shape.flops.scored + decoding_flops(shape, stage)


@dataclass(frozen=True)
class ArmCost:
    """Cost of one training. `peak_memory` (bytes) is an estimate."""

    training: Training
    seconds: float
    peak_memory: int


@dataclass(frozen=True)
class RecipeCost:
    """Cost of a recipe.

    Attributes:
        shape: of the model.
        diagnosis: the plan of its diagnosis.
        measure: `decision` or `margin`, as the recipe has it.
        arms: cost of each arm's training, by name; the main one is `main`.
        suites: work and seconds of each suite on one model, by name.
        notes: what the user should know.
    """

    shape: ModelShape
    diagnosis: Plan
    measure: str
    arms: Mapping[str, ArmCost]
    suites: Mapping[str, Stage]
    notes: Sequence[str]

    @property
    def diagnosis_seconds(self) -> float:
        """Seconds of the diagnosis."""
        return self.diagnosis.seconds(self.measure) or 0.0

    @property
    def evaluation_seconds(self) -> float:
        """Seconds of all suites on one model."""
        return sum(stage.seconds or 0.0 for stage in self.suites.values())

    @property
    def evaluation(self) -> Stage:
        """Work of all suites on one model."""
        return replace(sum(self.suites.values(), Stage()), seconds=self.evaluation_seconds)

    def units(self, prefix: str = "") -> list[Unit]:
        """The recipe's work in pieces for `makespan`: diagnosis, a training an arm, an evaluation an arm and the base.

        Args:
            prefix: before all names, where units of several recipes come together.
        """
        units = [
            Unit(f"{prefix}diagnose", self.diagnosis_seconds, is_divisible=True),
            Unit(f"{prefix}evaluate base", self.evaluation_seconds),
        ]
        for name, arm in self.arms.items():
            units.append(Unit(f"{prefix}tune {name}", arm.seconds, (f"{prefix}diagnose",)))
            units.append(Unit(f"{prefix}evaluate {name}", self.evaluation_seconds, (f"{prefix}tune {name}",)))
        return units

    def hours(self, n_devices: int = 1) -> float:
        """Hours of the whole recipe on so many devices."""
        return makespan(self.units(), n_devices) / 3600


def recipe_cost(
    recipe: Recipe, *, accelerator: str | None = None, reply: Mapping[str, int] | None = None
) -> RecipeCost:
    """What a recipe costs, from configs alone: no weights are loaded. Data that are not here are stood in for.

    Args:
        recipe: the recipe; `model` may be a directory that holds a config.json alone.
        accelerator: take seconds from this one's data sheet (`ACCELERATORS`) instead of timing a slice here.
        reply: mean tokens of replies by suite, where they are known.

    Raises:
        CastuneError: an unknown accelerator, no config, data that are neither here nor known, or settings that a plan
            refuses.
    """
    if accelerator is not None and accelerator not in ACCELERATORS:
        raise CastuneError(f"accelerator {accelerator!r}: accepted are {', '.join(ACCELERATORS)}")
    read = DataOrStandIns()
    diagnosis, notes = plan_diagnosis(recipe, accelerator=accelerator, read=read)
    config, tokenizer, _ = config_and_tokenizer(recipe)
    dtype, device = torch_dtype_of(recipe.dtype, recipe.device), device_of(recipe.device)
    shape = ModelShape.of(config, dtype)
    chat = ChatFormat(tokenizer, max_length=recipe.evaluate.max_length)
    clock: Clock
    if accelerator is not None:
        clock = OnAccelerator(ACCELERATORS[accelerator], shape)
    else:
        clock = Here(config, shape, chat, dtype=dtype, device=device, batch_tokens=recipe.evaluate.batch_tokens)
    arms = _arms(recipe, shape, tokenizer, clock, read)
    settings = recipe.evaluate
    suites = load_suites(settings.suites, limit=settings.limit, seed=settings.seed, read=read)
    return RecipeCost(
        shape=shape,
        diagnosis=diagnosis,
        measure=recipe.diagnose.measure,
        arms=arms,
        suites={
            suite.name: _suite(recipe, shape, chat, suite, clock, (reply or {}).get(suite.name)) for suite in suites
        },
        notes=[*notes, *read.notes],
    )


def _arms(recipe: Recipe, shape: ModelShape, tokenizer: Any, clock: Clock, read: DataOrStandIns) -> dict[str, ArmCost]:
    chat = ChatFormat(tokenizer, max_length=recipe.tune.max_length)
    align = load_data(recipe.align, recipe.seed, read)
    utility = load_calibration(recipe, read).all_utility
    rows = [chat.loss_row(example) for example in align]
    utility_rows = [chat.loss_row(example) for example in utility]
    middle = sorted(rows, key=lambda row: len(row.ids))[len(rows) // 2 :][: recipe.tune.batch_size]
    costs: dict[str, ArmCost] = {}
    known: dict[str, ArmCost] = {}  # arms that differ in their heads alone cost the same
    for text, name in (("main", ArmName()), *((text, ArmName.parse(text)) for text in recipe.select.compare)):
        config = recipe.tune.changed(**dict(name.changes))
        key = config.model_dump_json()
        if key not in known:
            pairs = preference_pairs(chat, align) if config.method == "dpo" else []
            work = training_work(shape, rows, config, utility_rows=utility_rows, pairs=pairs)
            known[key] = ArmCost(work, clock.training(work, middle), work.peak_memory(shape, config))
        costs[text] = known[key]
    return costs


def _suite(recipe: Recipe, shape: ModelShape, chat: ChatFormat, suite: Suite, clock: Clock, reply: int | None) -> Stage:
    work = suite_work(shape, chat, suite, recipe.evaluate, reply=reply)
    return replace(work.stage, seconds=clock.suite(work))
