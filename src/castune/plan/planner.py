"""What work on a model costs, before anything is spent: of a diagnosis, of trainings and of evaluations.

Work is counted (`diagnosis.py`, `training.py`, `evaluation.py`), seconds come from an accelerator's data sheet or from
a slice of the model that is timed here (`speed.py`, `calibrate.py`), memory from the same slice or from shapes
(`memory.py`). No weights are loaded. Loading models, writing results and judging replies are not counted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

from castune.config import DiagnoseConfig, EvaluateConfig, Measure, Recipe, TuneConfig
from castune.core.devices import device_of, require_device, torch_dtype_of
from castune.core.gguf import find_default_gguf
from castune.core.heads import HeadLayout
from castune.core.loading import load_config
from castune.core.units import UnitLayout
from castune.data.chat import ChatFormat
from castune.data.example import Example
from castune.diagnosis.ablator import distinct
from castune.diagnosis.domains import Utility, checked_sets
from castune.errors import CastuneError
from castune.evaluation.suites import Suite
from castune.plan.accelerators import Accelerator, accelerator_named
from castune.plan.calibrate import Slice
from castune.plan.diagnosis import DiagnosisWork, GradientPass
from castune.plan.evaluation import suite_work
from castune.plan.memory import Memory, training_memory
from castune.plan.shape import ModelShape
from castune.plan.skeleton import skeleton
from castune.plan.speed import Clock, OnAccelerator
from castune.plan.training import training_sample, training_work
from castune.plan.work import Cost, Size
from castune.tuning.preferences import preference_pairs

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class DiagnosisCost:
    """Cost of a diagnosis by every measure.

    Attributes:
        costs: of `gradients`, `utility` and the two ways to measure safety, `margins` and `decisions`; of `attribution`
            of both, with what is `checked` exactly; where there are problems also of `solutions`, which is `utility` by
            decisions on these. Sets of `reply_domains` are apart: `reply_margins` and `reply_decisions`.
        solves: whether utility is measured by decisions on problems: `solutions` in the place of `utility`.
        peak_memory: by measure, bytes at the peak on the device of the model, weights included; empty: not measured.
        gradient_bytes: of partial gradients at once, kept in the memory of the CPU.
        slice_layers: depth of the slice that stood for the model.
        resumable: whether layers below the ablated one are skipped.
    """

    costs: Mapping[str, Cost]
    solves: bool
    peak_memory: Mapping[Measure, int]
    gradient_bytes: int
    slice_layers: int
    resumable: bool

    def parts(self, measure: Measure) -> dict[str, Cost]:
        """The costs of a diagnosis by one measure, by part."""
        utility = "solutions" if self.solves else "utility"
        names = {
            "attribution": ("gradients", "attribution", "checked", *(["solutions"] if self.solves else [])),
            "margin": ("gradients", utility, "reply_margins", "margins"),
            "decision": ("gradients", utility, "reply_decisions", "decisions"),
        }[measure]
        return {name: self.costs[name] for name in names if name in self.costs}

    def total(self, measure: Measure) -> Cost:
        """The cost of the whole diagnosis by one measure."""
        return sum(self.parts(measure).values(), Cost())


@dataclass(frozen=True)
class TrainingCost:
    """Cost of a training: of so many optimiser steps, with an estimate of its memory (`training_memory`, bytes)."""

    cost: Cost
    steps: int
    peak_memory: int


@dataclass(frozen=True)
class Planner:
    """Tells what work on one model costs.

    Attributes:
        model: without weights.
        units: those that can be diagnosed and trained.
        tokenizer: to count tokens with.
        device: where a slice of the model runs.
        accelerator: whose data sheet tells seconds; None: the slice is timed.
        notes: what the user should know.
    """

    model: PreTrainedModel
    units: UnitLayout
    tokenizer: PreTrainedTokenizerBase
    device: torch.device
    accelerator: Accelerator | None = None
    notes: Sequence[str] = ()

    @classmethod
    def of(cls, recipe: Recipe, *, accelerator: str | None = None) -> Planner:
        """The planner of a recipe's model; `model` may be a directory that holds a config.json alone.

        Args:
            recipe: names the model, its dtype, its units and the device.
            accelerator: take seconds from this one's data sheet (`ACCELERATORS`) instead of timing a slice here.

        Raises:
            CastuneError: an unknown accelerator, no config, or no tokenizer at all.
            UnsupportedArchitecture: no causal language model, or its heads could not be located.
        """
        found = None if accelerator is None else accelerator_named(accelerator)
        config, tokenizer, notes = _config_and_tokenizer(recipe)
        dtype = torch_dtype_of(recipe.dtype, recipe.device)
        # With an accelerator the recipe's device is one of the machine that is planned for, not of this one.
        here = recipe.device if found is None else "auto"
        require_device(here)
        return cls.of_config(
            config,
            tokenizer,
            settings=recipe.diagnose,
            dtype=dtype,
            device=device_of(here),
            accelerator=found,
            notes=notes,
        )

    @classmethod
    def of_config(
        cls,
        config: PretrainedConfig,
        tokenizer: PreTrainedTokenizerBase,
        *,
        settings: DiagnoseConfig,
        dtype: torch.dtype,
        device: torch.device,
        accelerator: Accelerator | None = None,
        notes: Sequence[str] = (),
    ) -> Planner:
        """The planner of a config's model, with the units of `settings`."""
        model = skeleton(config, dtype)
        layout = HeadLayout.unproven(model)
        units = UnitLayout.of(model, layout, settings.kinds, n_mlp_groups=settings.mlp_groups, prove=False)
        return cls(model, units, tokenizer, device, accelerator, notes)

    @cached_property
    def shape(self) -> ModelShape:
        """The shape of the model."""
        return ModelShape.of(self.model, self.units)

    def diagnosis(
        self,
        safety: Sequence[Example],
        utility: Utility,
        settings: DiagnoseConfig,
        *,
        decoded_share: float | None = None,
    ) -> DiagnosisCost:
        """The cost of a diagnosis.

        Args:
            safety: D_safe.
            utility: D_util, by domain if there are several.
            settings: of the diagnosis; `batch_tokens` is a number.
            decoded_share: share of replies that change when a head is ablated; the longer they are the more when
                absent.

        Raises:
            CastuneError: a share outside [0, 1], `batch_tokens = "auto"`.
        """
        if decoded_share is not None and not 0 <= decoded_share <= 1:
            raise CastuneError(f"decoded share {decoded_share}: accepted: 0 to 1")
        if settings.batch_tokens == "auto":
            raise CastuneError('batch_tokens is "auto"; a plan needs a number, for example 2048')
        layers, sets = settings.layers, checked_sets(utility, settings)
        units = [one for one in self.units.units if layers is None or one.layer in layers]
        work = DiagnosisWork(
            config=settings,
            chat=ChatFormat(self.tokenizer, max_length=settings.max_length),
            safety=safety,
            utility=sets,
            heads=distinct(self.units, units)[0],
            passes=GradientPass.all_of(self.model, self.units, units, settings),
            flops=self.shape.flops,
            ablator=self._slice.ablator,
            decoded_share=decoded_share,
        )
        sweeps, gradients = self._clock.speed(work.sweep_sample), self._clock.speed(work.gradient_sample)
        speeds = {"gradients": gradients, "attribution": gradients}
        return DiagnosisCost(
            costs={name: Cost(one, speeds.get(name, sweeps).seconds(one)) for name, one in work.parts().items()},
            solves=settings.problems == "decision" and any(one.is_of_problems for one in sets),
            peak_memory=self._diagnosis_memory(work, sweeps.memory, gradients.memory),
            gradient_bytes=work.gradient_bytes,
            slice_layers=self._slice.ablator.layout.n_layers,
            resumable=self._slice.ablator.resumable,
        )

    def training(self, align: Sequence[Example], utility: Sequence[Example], config: TuneConfig) -> TrainingCost:
        """The cost of a training.

        Args:
            align: D_align.
            utility: D_util, for gradient surgery, data replay and null spaces.
            config: settings.

        Raises:
            CastuneError: nothing to train on, or no utility examples where they are needed.
        """
        chat = ChatFormat(self.tokenizer, max_length=config.max_length)
        rows = [chat.loss_row(example) for example in align]
        utility_rows = [chat.loss_row(example) for example in utility] if config.needs_utility else []
        pairs = preference_pairs(chat, align) if config.method == "dpo" else []
        found = training_work(self.shape, rows, config, utility_rows=utility_rows, pairs=pairs)
        seconds = self._clock.speed(training_sample(rows, config)).seconds(found.work)
        memory = training_memory(self.shape, config, found.largest)
        return TrainingCost(Cost(found.work, seconds), found.steps, memory)

    def most_training_memory(self, config: TuneConfig) -> int:
        """Bytes at the peak of a training whose examples are as long as the settings let them be."""
        n_rows = config.batch_size * (2 if config.method == "dpo" else 1)
        return training_memory(self.shape, config, Size(n_rows, config.max_length, n_rows * config.max_length))

    def suite(self, suite: Suite, config: EvaluateConfig) -> Cost:
        """The cost of one suite on one model."""
        chat = ChatFormat(self.tokenizer, max_length=config.max_length)
        found = suite_work(self.shape, chat, suite, config)
        return Cost(found.work, self._clock.speed(found.sample).seconds(found.work))

    @cached_property
    def _slice(self) -> Slice:
        return Slice.of(self.model, self.units, ChatFormat(self.tokenizer), self.device)

    @cached_property
    def _clock(self) -> Clock:
        return self._slice if self.accelerator is None else OnAccelerator(self.accelerator, self.shape)

    def _diagnosis_memory(
        self, work: DiagnosisWork, sweeps: Memory | None, gradients: Memory | None
    ) -> dict[Measure, int]:
        """Weights, what this process needs by itself, and what the hungriest kind of work adds; by measure."""
        if sweeps is None or gradients is None:
            return {}
        n_layers, own = self.shape.n_layers, self._slice.own_memory
        # The partial gradients lie in the memory of the CPU.
        back = gradients.at(n_layers) + (work.gradient_bytes if own else 0)
        # What an attribution keeps for its way back is what gradients keep.
        by_measure: dict[Measure, float] = {"attribution": 0.0, "margin": sweeps.at(n_layers)}
        by_measure["decision"] = by_measure["margin"] + work.kept_tokens * self.shape.key_bytes
        base = own + self.shape.weight_bytes
        return {measure: round(base + max(there, back)) for measure, there in by_measure.items()}


def _config_and_tokenizer(recipe: Recipe) -> tuple[Any, Any, list[str]]:
    """The config of a recipe's model, a tokenizer to count tokens with, and what the user should know about it."""
    config, tokenizer = load_config(
        recipe.model,
        revision=recipe.revision,
        trust_remote_code=recipe.trust_remote_code,
        template_date=recipe.template_date,
    )
    if tokenizer is not None:
        return config, tokenizer, []
    if find_default_gguf() is None:
        raise CastuneError(f"{recipe.model} has no tokenizer, which a plan needs to count tokens")
    note = "no tokenizer there: tokens are counted with the default model's, which makes more of them"
    return config, load_config("default")[1], [note]
