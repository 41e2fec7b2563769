"""What a diagnosis will cost, from the model's config and the data alone, before anything is spent.

The batches are made by the diagnosis' own code, so forwards and tokens are those it will run. Unknown beforehand are
the model's own replies: the data's safe replies stand in for them, and a share of them is taken to change under
ablation. Seconds come from a calibration on this machine (`calibrate.py`) or from an accelerator's data sheet.

Shape letters: L layer, H head.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

import torch

from castune.artifacts import Unit
from castune.config import DiagnoseConfig, Recipe
from castune.core.ablation import can_resume
from castune.core.batching import ExampleBatch
from castune.core.continuation import can_continue
from castune.core.flops import ForwardFlops
from castune.core.generation import ROUND, Reply
from castune.core.heads import HeadLayout
from castune.core.loading import device_of, torch_dtype_of
from castune.core.losses import batches_by_length
from castune.core.memory import resident_memory
from castune.core.skeleton import random_slice, skeleton
from castune.core.units import UnitLayout
from castune.data.chat import ChatFormat
from castune.data.example import Example
from castune.data.rows import Row
from castune.data.sources import examples
from castune.diagnosis.ablator import Ablator, distinct, part_size
from castune.diagnosis.decode import DECODED_TOKENS
from castune.diagnosis.domains import Utility, utility_sets
from castune.diagnosis.gradients import gradient_passes
from castune.diagnosis.objectives import Objectives
from castune.diagnosis.sweep import units_of
from castune.errors import CastuneError
from castune.plan.accelerators import ACCELERATORS, Accelerator
from castune.plan.calibrate import GRADIENT_PASSES, Calibration, calibrate
from castune.plan.inputs import config_and_tokenizer
from castune.stats.ranking import equal_parts
from castune.steps.inputs import load_calibration

# Of the replies that are still the whole model's, the share that changes at the next token once a head is gone. Of the
# default model's, which is small and unsure, 89 % had changed after 48 tokens, 43 % after the 15 or so that the prefix
# judge needs: 4.6 and 3.7 % a token. Larger models should change fewer, and their plans are then too high.
_CHANGED_A_TOKEN = 0.04
# Layers of the slice that stands for the model: where a layer is small, more are needed to be timed well.
_SLICE_WEIGHTS = 50e6
_MOST_SLICE_LAYERS = 6


@dataclass(frozen=True)
class Stage:
    """Work of one part of a diagnosis. Stages add up.

    Attributes:
        forwards: passes through all decoder layers or a part of them, decoding steps aside.
        tokens: tokens of these passes, padding included.
        layer_flops: FLOPs of these passes in decoder layers.
        n_scored: positions of these passes at which the output head is used.
        weight_reads: how often these passes read the whole of the decoder's weights.
        steps: decoding steps, each of a batch of replies.
        step_tokens: tokens decoded.
        context: earlier tokens that decoded ones attend to, summed over these; a diagnosis' are short and not counted.
        seconds: predicted; None without calibration or accelerator.
    """

    forwards: int = 0
    tokens: int = 0
    layer_flops: float = 0.0
    n_scored: int = 0
    weight_reads: float = 0.0
    steps: int = 0
    step_tokens: int = 0
    context: float = 0.0
    seconds: float | None = None

    def __add__(self, other: Stage) -> Stage:
        counts = [field.name for field in fields(self) if field.name != "seconds"]
        return Stage(**{name: getattr(self, name) + getattr(other, name) for name in counts})


@dataclass(frozen=True)
class Plan:
    """Cost of a diagnosis by either measure.

    Attributes:
        model_type: of the config.
        n_layers: decoder layers.
        n_heads: query heads of all layers, or units of the kinds that are diagnosed.
        n_parameters: of the whole model.
        weight_bytes: of the whole model, in its dtype.
        dtype: of the weights.
        flops: of a forward of the whole model, by part.
        stages: `gradients`, `utility` and the two ways to measure safety, `margins` and `decisions`; where there are
            problems also `solutions`, which is `utility` by decisions on these.
        peak_memory: by measure, bytes at the peak on the device of the model, weights included; empty: not measured.
        gradient_sums: bytes of partial gradients at once, kept in the memory of the CPU.
        slice_layers: depth of the slice that stood for the model.
        resumable: whether layers below the ablated one are skipped.
    """

    model_type: str
    n_layers: int
    n_heads: int
    n_parameters: int
    weight_bytes: int
    dtype: str
    flops: ForwardFlops
    stages: dict[str, Stage]
    peak_memory: dict[str, int]
    gradient_sums: int
    slice_layers: int
    resumable: bool
    what: str = "heads"
    """What `n_heads` counts."""
    solves: bool = False
    """Whether utility is measured by decisions on problems: `solutions` in the place of `utility`."""

    def parts(self, measure: str) -> dict[str, Stage]:
        """The stages of a diagnosis by `margin` or `decision`."""
        left_out = {"decisions" if measure == "margin" else "margins", "utility" if self.solves else "solutions"}
        return {name: stage for name, stage in self.stages.items() if name not in left_out}

    def seconds(self, measure: str) -> float | None:
        """Seconds of the whole diagnosis by `margin` or `decision`; None where not predicted."""
        seconds = [stage.seconds for stage in self.parts(measure).values()]
        return None if None in seconds else sum(filter(None, seconds))

    def stage_flops(self, name: str) -> float:
        """All FLOPs of a stage."""
        stage = self.stages[name]
        step = sum(self.flops.token_L) + self.flops.scored
        return stage.layer_flops + stage.n_scored * self.flops.scored + stage.step_tokens * step


def plan(
    config: Any,
    tokenizer: Any,
    *,
    safety: Sequence[Example],
    utility: Utility,
    settings: DiagnoseConfig,
    dtype: torch.dtype,
    device: torch.device,
    accelerator: str | None = None,
    decoded_share: float | None = None,
) -> Plan:
    """Predict work, seconds and memory of a diagnosis.

    Args:
        config: the model's config; no weights are loaded.
        tokenizer: the model's.
        safety: D_safe.
        utility: D_util, by domain if there are several.
        settings: of the diagnosis; `batch_tokens` is a number.
        dtype: of the weights.
        device: where the slice is measured.
        accelerator: take seconds from this one's data sheet (`ACCELERATORS`) instead of measuring here.
        decoded_share: share of replies that change when a head is ablated; the longer they are the more when absent.

    Raises:
        UnsupportedArchitecture: the heads of this architecture could not be located.
        CastuneError: an unknown accelerator, a share outside [0, 1], `batch_tokens = "auto"`.
    """
    if accelerator is not None and accelerator not in ACCELERATORS:
        raise CastuneError(f"accelerator {accelerator!r}: accepted are {', '.join(ACCELERATORS)}")
    if decoded_share is not None and not 0 <= decoded_share <= 1:
        raise CastuneError(f"decoded share {decoded_share}: accepted is 0 to 1")
    if settings.batch_tokens == "auto":
        raise CastuneError('batch_tokens is "auto"; a plan needs a number, for example 2048')
    model = skeleton(config, dtype)
    layout = HeadLayout.unproven(model)
    units = UnitLayout.of(model, layout, settings.kinds, n_mlp_groups=settings.mlp_groups, prove=False)
    chunks = 2 * settings.gradient_chunks
    limit = settings.gradient_memory * 1e9
    passes = gradient_passes(model, units, units.units, n_chunks=chunks, limit=limit)
    own_memory = resident_memory() or 0
    ablator = slice_ablator(config, model, layout, settings, dtype, device)
    work = _Work(
        config=settings,
        chat=ChatFormat(tokenizer, max_length=settings.max_length),
        safety=safety,
        utility=[one.examples for one in utility_sets(utility)],
        heads=distinct(units, units.units)[0],
        n_gradient_passes=len(passes),
        flops=ForwardFlops.of(model, layout),
        ablator=ablator,
        decoded_share=decoded_share,
        continues=can_continue(ablator.model, ablator.layout),
    )
    n_parameters = sum(parameter.numel() for parameter in model.parameters())
    found = Plan(
        model_type=config.model_type,
        n_layers=layout.n_layers,
        n_heads=len(units.units),
        n_parameters=n_parameters,
        weight_bytes=n_parameters * dtype.itemsize,
        dtype=str(dtype).removeprefix("torch."),
        flops=work.flops,
        stages=work.stages(),
        peak_memory={},
        gradient_sums=max(4 * chunks * sum(units.weight(model, path).numel() for path in one) for one in passes),
        slice_layers=work.ablator.layout.n_layers,
        resumable=work.ablator.resumable,
        what="heads" if settings.units == ("q_heads",) else "units",
        solves=settings.problems == "decision" and any(one.is_of_problems for one in utility_sets(utility)),
    )
    if accelerator is not None:
        return _on_accelerator(found, ACCELERATORS[accelerator])
    return _as_calibrated(found, work, own_memory if device.type == "cpu" else 0)


def plan_diagnosis(
    recipe: Recipe,
    *,
    accelerator: str | None = None,
    decoded_share: float | None = None,
    read: Callable[..., list[Example]] = examples,
) -> tuple[Plan, list[str]]:
    """What the recipe's diagnosis will cost, from the model's config and the data; no weights are loaded.

    Returns:
        The plan, and what the user should know about it.
    """
    safety, utility = load_calibration(recipe, read)
    config, tokenizer, notes = config_and_tokenizer(recipe)
    found = plan(
        config,
        tokenizer,
        safety=safety,
        utility=utility,
        settings=recipe.diagnose,
        dtype=torch_dtype_of(recipe.dtype, recipe.device),
        device=device_of(recipe.device),
        accelerator=accelerator,
        decoded_share=decoded_share,
    )
    return found, notes


@dataclass(frozen=True)
class _Work:
    """What has to be run: batches made on the slice, FLOPs of the whole model."""

    config: DiagnoseConfig
    chat: ChatFormat
    safety: Sequence[Example]
    utility: Sequence[Sequence[Example]]
    heads: Sequence[Unit]
    """Those that are ablated."""
    n_gradient_passes: int
    flops: ForwardFlops
    ablator: Ablator
    decoded_share: float | None
    continues: bool

    def stages(self) -> dict[str, Stage]:
        """Every stage's work."""
        n_tokens = self.config.max_new_tokens
        replies = self._decoding(len(self.safety), n_tokens, n_tokens, self.most_decoded)
        stages = {
            "gradients": self._gradients(),
            "utility": self._swept(self.utility_batches),
            "margins": self._swept(self._margin_batches) + replies,
            "decisions": self._swept(self._refusal_batches) + replies + self._decoded(self._refusal_batches),
        }
        if any(one[0].is_problem for one in self.utility):
            stages["solutions"] = self._solutions()
        return stages

    def _solutions(self) -> Stage:
        """Utility by decisions: questions are scored, worked answers to problems decoded to their end."""
        found, n_tokens = Stage(), self.config.solution_tokens
        for one in self.utility:
            if not one[0].is_problem:
                found += self._swept(self.objectives.utility_measure(one).batches)
                continue
            batches = self.objectives.solution_measure(one, self._stand_ins_of(one, n_tokens)).batches
            found += self._decoding(len(one), n_tokens, n_tokens, self.most_decoded)
            found += self._swept(batches) + self._decoded(batches)
        return found

    @cached_property
    def objectives(self) -> Objectives:
        """The diagnosis' own measures, on the slice."""
        return Objectives(self.ablator, self.chat.tokenizer, self.chat, self.config)

    @cached_property
    def utility_batches(self) -> Sequence[ExampleBatch]:
        """Batches of the utility sweeps of all domains."""
        return [batch for one in self.utility for batch in self.objectives.utility_measure(one).batches]

    @cached_property
    def loss_chunks(self) -> list[list[Row]]:
        """Rows of every gradient chunk of all sets."""
        sets = ([self.chat.loss_row(example) for example in examples] for examples in (self.safety, *self.utility))
        return [chunk for rows in sets for chunk in equal_parts(rows, min(self.config.gradient_chunks, len(rows)))]

    @cached_property
    def prompt(self) -> list[int]:
        """The harmful prompt of middle length."""
        prompts = sorted((self.chat.prompt_ids(example)[0] for example in self.safety), key=len)
        return prompts[len(prompts) // 2]

    @property
    def batch_tokens(self) -> int:
        """Rows x tokens of a forward."""
        assert self.config.batch_tokens != "auto"
        return self.config.batch_tokens

    @property
    def most_decoded(self) -> int:
        """Replies that fit into one batch of decoding."""
        return max(1, self.batch_tokens // (len(self.prompt) + self.config.max_new_tokens))

    @property
    def most_continued(self) -> int:
        """Replies that were verified and fit into one batch of decoding."""
        return self.most_decoded * self._decoded_batches

    @property
    def _decoded_batches(self) -> int:
        """How many times the tokens of a forward one batch of decoding takes."""
        return DECODED_TOKENS if self.continues else 1

    @cached_property
    def _stand_ins(self) -> list[Reply]:
        """The data's safe replies in place of the model's own, repeated to the length limit."""
        return self._stand_ins_of(self.safety, self.config.max_new_tokens)

    def _stand_ins_of(self, examples: Sequence[Example], n_tokens: int) -> list[Reply]:
        replies = []
        for example in examples:
            assert example.reply is not None
            _, [ids] = self.chat.continuations(example, [example.reply], end_of_turn=False)
            tokens = (ids * n_tokens)[:n_tokens]
            replies.append(Reply(str(self.chat.tokenizer.decode(tokens)), tuple(tokens), finished=False))
        return replies

    @cached_property
    def _margin_batches(self) -> Sequence[ExampleBatch]:
        return self.objectives.margin_measure(self.safety, self._stand_ins).batches

    @cached_property
    def _refusal_batches(self) -> Sequence[ExampleBatch]:
        return self.objectives.refusal_measure(self.safety, self._stand_ins).batches

    def _gradients(self) -> Stage:
        found = Stage()
        for chunk in self.loss_chunks * self.n_gradient_passes:
            for indices in batches_by_length([len(row.ids) for row in chunk], self.batch_tokens):
                rows = [chunk[i] for i in indices]
                size = (len(rows), max(len(row.ids) for row in rows), sum(len(row.tokens) for row in rows))
                forward = self._forward(*size, forwards=1)
                found += replace(
                    forward, layer_flops=forward.layer_flops * GRADIENT_PASSES, weight_reads=GRADIENT_PASSES
                )
        return found

    def _swept(self, batches: Sequence[ExampleBatch]) -> Stage:
        """Every batch once for the whole model, and once for each head."""
        found = Stage()
        for batch in batches:
            found += self._repeated(batch, 1, 0)
            for (_, layer), n_units in Counter(one.place for one in self.heads).items():
                first = layer if self.ablator.resumable else 0
                found += self._repeated(batch, n_units, first)
        return found

    def _decoded(self, batches: Sequence[ExampleBatch]) -> Stage:
        """Replies that change: decoded until the judge's answer is settled, and run again first where they must be."""
        found = Stage()
        for batch in batches:
            n_tokens = [n for parts in batch.parts for _, n in parts]
            share = self.decoded_share
            if share is None:
                share = 1 - math.exp(-_CHANGED_A_TOKEN * sum(n_tokens) / len(n_tokens))
            # A reply changes at half of its length in the mean, and leaves its batch half a round too late.
            mean = min(max(n_tokens), round(sum(n_tokens) / len(n_tokens) / 2 + ROUND / 2))
            for unit in units_of(self.heads, [batch], self.batch_tokens * self._decoded_batches):
                n_replies = round(share * len(batch.examples) * len(unit.heads))
                stage = self._decoding(n_replies, max(n_tokens), mean, self.most_continued)
                if self.continues:
                    stage = Stage(steps=stage.steps, step_tokens=stage.step_tokens)
                found += stage
        return found

    def _decoding(self, n_replies: int, n_steps: int, n_tokens: int, most: int) -> Stage:
        """So many replies of so many tokens in the mean; the longest of a batch takes `n_steps`."""
        if not n_replies:
            return Stage()
        n_batches = -(-n_replies // most)
        prefill = self._forward(n_replies, len(self.prompt), n_replies, forwards=n_batches)
        return replace(prefill, steps=n_batches * n_steps, step_tokens=n_replies * n_tokens)

    def _repeated(self, batch: ExampleBatch, times: int, first_layer: int) -> Stage:
        n_rows = times * len(batch.rows)
        forwards = -(-n_rows // part_size(n_rows, batch.length, self.batch_tokens))
        return self._forward(n_rows, batch.length, times * batch.n_scored, forwards=forwards, first_layer=first_layer)

    def _forward(self, n_rows: int, length: int, n_scored: int, *, forwards: int, first_layer: int = 0) -> Stage:
        return Stage(
            forwards=forwards,
            tokens=n_rows * length,
            layer_flops=self.flops.forward(n_rows=n_rows, length=length, n_scored=0, first_layer=first_layer),
            n_scored=n_scored,
            weight_reads=forwards * sum(self.flops.token_L[first_layer:]) / sum(self.flops.token_L),
        )


def slice_ablator(
    config: Any, model: Any, layout: HeadLayout, settings: DiagnoseConfig, dtype: torch.dtype, device: torch.device
) -> Ablator:
    """The slice that stands for the model: two layers beyond the first with heads, more where layers are small."""
    first = layout.layers_with_heads[0]
    weights = sum(parameter.numel() for parameter in layout.decoder_layers(model)[first].parameters())
    deeper = min(_MOST_SLICE_LAYERS, max(2, round(_SLICE_WEIGHTS / weights)))
    cut = random_slice(config, min(layout.n_layers, first + 1 + deeper), dtype=dtype, device=device)
    slice_layout = HeadLayout.of(cut)
    units = UnitLayout.of(cut, slice_layout, settings.kinds, n_mlp_groups=settings.mlp_groups)
    return Ablator(cut, units, units.units, can_resume(cut, slice_layout))


def _as_calibrated(found: Plan, work: _Work, own_memory: int) -> Plan:
    batches = sorted(work.utility_batches, key=lambda batch: -batch.n_tokens)
    measured = calibrate(
        work.ablator,
        work.chat,
        batches=batches,
        loss_rows=_first_batch(max(work.loss_chunks, key=_size), work.batch_tokens),
        prompt=work.prompt,
        n_decoded=work.most_continued,
        continues=work.continues,
        n_layers=found.n_layers,
        batch_tokens=work.batch_tokens,
    )

    def seconds(name: str, stage: Stage) -> float:
        speed = measured.gradients if name == "gradients" else measured.sweep
        steps = measured.steps.seconds(stage.steps, stage.step_tokens)
        return speed.seconds(stage.layer_flops, stage.n_scored) + steps

    stages = {name: replace(stage, seconds=seconds(name, stage)) for name, stage in found.stages.items()}
    return replace(found, stages=stages, peak_memory=_peak_memory(found, measured, work, batches[0], own_memory))


def _peak_memory(found: Plan, measured: Calibration, work: _Work, largest: ExampleBatch, own: int) -> dict[str, int]:
    """Weights, what this process needs by itself, and what the hungriest kind of work adds."""
    if measured.sweep_memory is None or measured.gradient_memory is None or measured.gradient_memory_layer is None:
        return {}
    further = found.n_layers - measured.n_layers
    residuals = largest.n_tokens * measured.residual_bytes if found.resumable else 0
    sweep = measured.sweep_memory + further * residuals
    gradients = measured.gradient_memory + further * measured.gradient_memory_layer
    # The partial gradients lie in the memory of the CPU.
    gradients += found.gradient_sums if own else 0
    # Keys and values of the whole model's batch, of a forward, of the replies that wait and of those that are decoded.
    kept = work.batch_tokens * (2 + 2 * DECODED_TOKENS) * found.n_layers * measured.key_bytes
    by_measure = {"margin": max(sweep, gradients), "decision": max(sweep + kept, gradients)}
    return {measure: round(own + found.weight_bytes + extra) for measure, extra in by_measure.items()}


def _on_accelerator(found: Plan, accelerator: Accelerator) -> Plan:
    """A roofline: each stage takes as long as its arithmetic or its reading of weights, whichever is longer."""

    def seconds(stage: Stage) -> float:
        passes = stage.layer_flops + stage.n_scored * found.flops.scored
        steps = stage.step_tokens * (sum(found.flops.token_L) + found.flops.scored)
        read = found.weight_bytes
        return accelerator.seconds(passes, stage.weight_reads * read) + accelerator.decoding_seconds(
            stage.steps, found.n_layers, steps, stage.steps * read
        )

    return replace(found, stages={n: replace(stage, seconds=seconds(stage)) for n, stage in found.stages.items()})


def _first_batch(chunk: Sequence[Row], batch_tokens: int) -> list[Row]:
    """The rows of a chunk's first batch, its largest."""
    return [chunk[i] for i in next(batches_by_length([len(row.ids) for row in chunk], batch_tokens))]


def _size(chunk: Sequence[Row]) -> int:
    return sum(len(row.ids) for row in chunk)
