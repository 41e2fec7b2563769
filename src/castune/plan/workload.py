"""The work of a training and of an evaluation, from shapes and lengths alone: nothing is run.

Batches are made by the trainer's sampler and the evaluation's own code, so micro-batches, padding and forwards are
those that will be run. Unknown beforehand is how long replies get: `REPLY_TOKENS`.

Shape letters: L layer, R LoRA rank.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import count, islice
from random import Random
from typing import Any

import torch

from castune.config import EvaluateConfig, TuneConfig
from castune.core.flops import ForwardFlops
from castune.core.generation import ROUND
from castune.core.heads import HeadLayout
from castune.core.losses import SCORED_MULTIPLE, batches_by_length
from castune.core.scoring import question_rows
from castune.core.skeleton import skeleton
from castune.data.chat import ChatFormat
from castune.data.rows import Row
from castune.errors import CastuneError
from castune.evaluation.backend import DECODED, choice_batches, reply_batches
from castune.evaluation.suites import Suite
from castune.plan.diagnosis import Stage
from castune.tuning.preferences import Pair
from castune.tuning.surgery import utility_batches
from castune.tuning.train import replayed_rows
from castune.tuning.trainer import ByLength

# Assumed mean lengths of replies, within their limit: worked answers of a model of 7 to 8 billion parameters about
# twice as long as the data's own solutions; letters with a sentence around them; refusals and answers to prompts.
REPLY_TOKENS = {"gsm8k": 200, "math": 500}
_WORKED_TOKENS, _LETTER_TOKENS, _PROMPT_TOKENS = 200, 16, 150
# AdamW on float32 adapters: the weight, its gradient and two moments.
_ADAPTER_BYTES = 4 * 4
# Logits of a scored position: in the model's dtype, in float32, and the gradients of both.
_LOGIT_COPIES = 2
# Of the residual stream a layer keeps in float32: the inputs of two norms and of the adapter.
_FLOAT32_COPIES = 3


@dataclass(frozen=True)
class ModelShape:
    """What of a model decides about work and memory.

    Attributes:
        model_type: of the config.
        n_layers: decoder layers.
        n_heads: query heads of all layers.
        n_parameters: of the whole model.
        item_bytes: of one weight.
        hidden: width of the residual stream.
        vocabulary: outputs of the head.
        key_bytes: of one token's keys and values in all layers.
        flops: of a forward, by part.
        adapted_L: inputs and outputs of the query projection that LoRA adapts; None for a layer without heads.
        kept_L: numbers of a token that a layer keeps for its backward pass beside those in float32.
    """

    model_type: str
    n_layers: int
    n_heads: int
    n_parameters: int
    item_bytes: int
    hidden: int
    vocabulary: int
    key_bytes: float
    flops: ForwardFlops
    adapted_L: tuple[tuple[int, int] | None, ...]
    kept_L: tuple[float, ...]

    @classmethod
    def of(cls, config: Any, dtype: torch.dtype) -> ModelShape:
        """The shape of a config's model; no weights are made.

        Raises:
            UnsupportedArchitecture: no causal language model, or its heads could not be located.
        """
        model = skeleton(config, dtype)
        layout = HeadLayout.unproven(model)
        flops = ForwardFlops.of(model, layout)
        adapted: list[tuple[int, int] | None] = [None] * layout.n_layers
        for layer in layout.layers_with_heads:
            shape = layout.query_projection(model, layer).weight.shape
            adapted[layer] = (shape[0], shape[1]) if layout.at(layer).transposed else (shape[1], shape[0])
        hidden = model.get_input_embeddings().weight.shape[1]
        return cls(
            model_type=config.model_type,
            n_layers=layout.n_layers,
            n_heads=len(layout.heads),
            n_parameters=sum(parameter.numel() for parameter in model.parameters()),
            item_bytes=dtype.itemsize,
            hidden=hidden,
            vocabulary=model.get_output_embeddings().weight.shape[0],
            key_bytes=dtype.itemsize * _key_numbers(model, layout),
            flops=flops,
            adapted_L=tuple(adapted),
            kept_L=tuple(_kept(layer) for layer in layout.decoder_layers(model)),
        )

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights."""
        return self.n_parameters * self.item_bytes

    @property
    def lowest(self) -> int:
        """The lowest layer with heads, down to which gradients go: a quarter of the heads lies in almost all layers."""
        return next(layer for layer, adapted in enumerate(self.adapted_L) if adapted)

    @cached_property
    def adapter_width(self) -> int:
        """Inputs and outputs of all query projections: the parameters of LoRA a rank."""
        return sum(sum(adapted) for adapted in self.adapted_L if adapted)


def _key_numbers(model: Any, layout: HeadLayout) -> float:
    """Keys and values of one token; by a forward without data, or as of full heads where that does not work (gpt2)."""
    n_tokens = 2
    ids = torch.zeros(1, n_tokens, dtype=torch.long, device="meta")
    try:
        with torch.no_grad():
            # Kernels of experts know no other dtype without data.
            layers = model.to(torch.bfloat16)(input_ids=ids, use_cache=True).past_key_values.layers
    except RuntimeError:  # NotImplementedError is one
        widths = (a.n_heads * (a.q_dim + a.o_dim) for a in layout.attention if a is not None)
        return float(sum(widths))
    held = (getattr(layer, name, None) for layer in layers for name in ("keys", "values"))
    return float(sum(tensor.numel() for tensor in held if tensor is not None)) / n_tokens


def _kept(layer: Any) -> float:
    """Outputs of all projections, and of the widest once more, after its activation function."""
    outputs = [parameter.shape[-2] for parameter in layer.parameters() if parameter.dim() == 2]
    return float(sum(outputs) + max(outputs))


# -- training


@dataclass(frozen=True)
class Training:
    """Work of a training.

    Attributes:
        stage: forwards and backwards; `forwards` counts micro-batches, each of them with its backward pass.
        steps: optimiser steps.
        largest: rows, tokens of a row and scored positions of the largest micro-batch.
    """

    stage: Stage
    steps: int
    largest: tuple[int, int, int]

    def peak_memory(self, shape: ModelShape, config: TuneConfig) -> int:
        """An estimate of the bytes at the peak: weights, adapter with Adam's moments, activations and logits.

        Activations are those of the largest micro-batch with a fused attention kernel; with gradient checkpointing
        the inputs of all layers and the inside of one. What the framework needs for itself is not in it.
        """
        n_rows, length, n_scored = self.largest
        by_layer = [shape.item_bytes * kept + 4 * _FLOAT32_COPIES * shape.hidden for kept in shape.kept_L]
        above = by_layer[shape.lowest :]
        if config.gradient_checkpointing:
            a_token = max(above) + shape.item_bytes * shape.hidden * len(above)
        else:
            a_token = sum(above)
        logits = n_scored * shape.vocabulary * _LOGIT_COPIES * (shape.item_bytes + 4)
        weights = shape.weight_bytes if config.quantization == "none" else shape.weight_bytes / shape.item_bytes / 2
        adapter = _ADAPTER_BYTES * config.rank * shape.adapter_width
        return round(weights + adapter + n_rows * length * a_token + logits)


def training_work(
    shape: ModelShape,
    rows: Sequence[Row],
    config: TuneConfig,
    *,
    utility_rows: Sequence[Row] = (),
    pairs: Sequence[Pair] = (),
) -> Training:
    """The work of one training.

    Args:
        shape: of the model.
        rows: of the alignment examples.
        config: settings.
        utility_rows: of the utility examples, for gradient surgery and data replay.
        pairs: the alignment examples of DPO, in the place of `rows`.

    Raises:
        CastuneError: nothing to train on, or no utility rows where they are needed.
    """
    if not (pairs if config.method == "dpo" else rows):
        raise CastuneError("a training needs examples")
    if config.needs_utility and not utility_rows:
        raise CastuneError("gradient surgery and data replay need utility examples")
    if config.method == "dpo":
        sizes = [_pair_size(pair) for pair in pairs]
    else:
        replayed = replayed_rows(utility_rows, len(rows), config.replay, config.seed)
        sizes = [(len(row.ids), len(row.tokens)) for row in [*rows, *replayed]]
    steps = list(_steps([length for length, _ in sizes], config))
    stage, largest = Stage(), (0, 0, 0)
    for step in steps:
        for batch in step:
            size = _batch_size([sizes[i] for i in batch], dpo=config.method == "dpo")
            stage += _trained(shape, size, config, dpo=config.method == "dpo")
            largest = max(largest, size, key=lambda found: (found[0] * found[1], found[2]))
    if config.surgery != "none":
        size_of = [(len(row.ids), len(row.tokens)) for row in utility_rows]
        n_utility = config.surgery_batch_size or config.batch_size * config.accumulation
        for chosen in islice(utility_batches(len(utility_rows), n_utility, config.seed), len(steps)):
            for start in range(0, len(chosen), config.batch_size):
                batch = chosen[start : start + config.batch_size]
                stage += _trained(shape, _batch_size([size_of[i] for i in batch]), config)
    return Training(stage, len(steps), largest)


def _steps(lengths: Sequence[int], config: TuneConfig) -> Iterator[list[list[int]]]:
    """Micro-batches of every optimiser step, as the Trainer counts epochs and its sampler orders examples."""
    n_batches = -(-len(lengths) // config.batch_size)
    a_epoch = -(-n_batches // config.accumulation)
    left = config.max_steps or math.ceil(config.epochs * a_epoch)
    sampler = ByLength(config.batch_size * config.accumulation, list(lengths), config.seed)
    for epoch in count():
        if config.group_by_length:
            sampler.set_epoch(epoch)
            order = list(sampler)
        else:
            order = Random(config.seed + epoch).sample(range(len(lengths)), len(lengths))
        batches = [order[i : i + config.batch_size] for i in range(0, len(order), config.batch_size)]
        for start in range(0, n_batches, config.accumulation):
            if not left:
                return
            yield batches[start : start + config.accumulation]
            left -= 1


def _pair_size(pair: Pair) -> tuple[int, int]:
    length = len(pair["prompt_ids"]) + max(len(pair["chosen_ids"]), len(pair["rejected_ids"]))
    return length, length


def _batch_size(sizes: Sequence[tuple[int, int]], *, dpo: bool = False) -> tuple[int, int, int]:
    """Rows, tokens of a row, and scored positions, padding included; TRL's DPO scores every position."""
    n_rows = 2 * len(sizes) if dpo else len(sizes)
    length = max(length for length, _ in sizes)
    most = length if dpo else -(-max(n for _, n in sizes) // SCORED_MULTIPLE) * SCORED_MULTIPLE
    return n_rows, length, n_rows * most


def _trained(shape: ModelShape, size: tuple[int, int, int], config: TuneConfig, *, dpo: bool = False) -> Stage:
    """A forward and backward of a micro-batch.

    Backward computes gradients of activations, once a forward's products with weights and twice its attention, down to
    the lowest adapted layer, which is counted whole though its inputs need none. Weights are frozen; LoRA's products
    are three times those of its forward.
    """
    n_rows, length, n_scored = size
    tokens, first = n_rows * length, shape.lowest
    forward = shape.flops.forward(n_rows=n_rows, length=length, n_scored=0)
    again = shape.flops.forward(n_rows=n_rows, length=length, n_scored=0, first_layer=first)
    backward = again + sum(shape.flops.pair_L[first:]) * tokens * length
    adapter = 3 * 2 * config.rank * shape.adapter_width * tokens
    passes = 2
    if config.gradient_checkpointing:
        backward, passes = backward + again, passes + 1
    if dpo:  # the reference model: a forward more
        backward, passes = backward + forward, passes + 1
    return Stage(
        forwards=1,
        tokens=tokens,
        layer_flops=forward + backward + adapter,
        n_scored=n_scored * (3 if dpo else 2),
        weight_reads=passes,
    )


# -- evaluation


@dataclass(frozen=True)
class SuiteWork:
    """Work of one suite.

    Attributes:
        stage: its work.
        rows: of a batch in the middle, to be timed; empty for a suite whose replies are generated.
        prompt: a prompt of middle length; empty for a suite whose choices are scored.
        n_replies: replies that are decoded together.
        reply: tokens of a reply in the mean.
    """

    stage: Stage
    rows: Sequence[Row] = ()
    prompt: Sequence[int] = ()
    n_replies: int = 0
    reply: int = 0


def reply_tokens(suite: Suite, config: EvaluateConfig) -> int:
    """Assumed tokens of a reply in the mean."""
    first = suite.examples[0]
    usual = _LETTER_TOKENS if first.is_question else _WORKED_TOKENS if first.is_problem else _PROMPT_TOKENS
    return min(suite.reply_tokens(config), REPLY_TOKENS.get(suite.name, usual))


def suite_work(
    shape: ModelShape, chat: ChatFormat, suite: Suite, config: EvaluateConfig, *, reply: int | None = None
) -> SuiteWork:
    """The work of one suite on one model, by transformers in one process.

    Args:
        shape: of the model.
        chat: the model's tokenizer and template, with the evaluation's `max_length`.
        suite: the suite.
        config: settings.
        reply: tokens of a reply in the mean; assumed when absent (`reply_tokens`).
    """
    if reply is not None and reply < 1:
        raise CastuneError(f"replies of {reply} tokens: accepted is at least 1")
    if suite.is_scored(config):
        return _scored_work(shape, chat, suite, config)
    limit = suite.reply_tokens(config)
    mean = min(limit, reply or reply_tokens(suite, config))
    # A reply leaves its batch at the end of a round.
    decoded = min(limit, mean + ROUND // 2)
    prompts = [chat.prompt_ids(example)[0] for example in suite.examples]
    stage, batches = Stage(), []
    for together in reply_batches(prompts, limit, config.batch_tokens):
        lengths = [len(prompts[i]) + limit for i in together]
        batches += [[together[i] for i in part] for part in batches_by_length(lengths, DECODED * config.batch_tokens)]
    for batch in batches:
        length = max(len(prompts[i]) for i in batch)
        prefill = _forward(shape, len(batch), length, len(batch))
        # The longest reply of a batch is taken to reach the limit, unless all are as long as the mean.
        n_decoded = len(batch) * decoded
        stage += replace(prefill, steps=limit, step_tokens=n_decoded, context=n_decoded * (length + (decoded + 1) / 2))
    middle = sorted(prompts, key=len)[len(prompts) // 2]
    return SuiteWork(stage, prompt=middle, n_replies=max(map(len, batches)), reply=mean)


def _scored_work(shape: ModelShape, chat: ChatFormat, suite: Suite, config: EvaluateConfig) -> SuiteWork:
    # Taken to share prompts, as all architectures but a few do.
    rows_of = [question_rows(chat, example, share_prompt=True) for example in suite.examples]
    stage, batches = Stage(), []
    for together in choice_batches(rows_of, config.batch_tokens):
        rows = [row for i in together for row in rows_of[i]]
        lengths = [len(row.ids) for row in rows]
        batches += [[rows[i] for i in part] for part in batches_by_length(lengths, config.batch_tokens)]
    for batch in batches:
        _, length, n_scored = _batch_size([(len(row.ids), len(row.tokens)) for row in batch])
        stage += _forward(shape, len(batch), length, n_scored)
    return SuiteWork(stage, rows=batches[len(batches) // 2])


def _forward(shape: ModelShape, n_rows: int, length: int, n_scored: int) -> Stage:
    return Stage(
        forwards=1,
        tokens=n_rows * length,
        layer_flops=shape.flops.forward(n_rows=n_rows, length=length, n_scored=0),
        n_scored=n_scored,
        weight_reads=1,
    )
