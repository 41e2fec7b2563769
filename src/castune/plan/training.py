"""The work of a training, from shapes and lengths alone: nothing is run.

Micro-batches are made by the trainer's own sampler, so steps, padding and forwards are those that will be run.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count, islice
from random import Random

from castune.config import TuneConfig
from castune.data.rows import Row
from castune.errors import CastuneError
from castune.plan.shape import ModelShape
from castune.plan.speed import Sample
from castune.plan.work import Size, Work, again, backward, forward
from castune.tuning.preferences import Pair
from castune.tuning.rows import replayed_rows
from castune.tuning.surgery import utility_batches
from castune.tuning.trainer import ByLength


@dataclass(frozen=True)
class TrainingWork:
    """Work of a training.

    Attributes:
        work: forwards and backwards; `forwards` counts micro-batches.
        steps: optimiser steps.
        largest: the largest micro-batch.
    """

    work: Work
    steps: int
    largest: Size


def training_work(
    shape: ModelShape,
    rows: Sequence[Row],
    config: TuneConfig,
    *,
    utility_rows: Sequence[Row] = (),
    pairs: Sequence[Pair] = (),
) -> TrainingWork:
    """The work of one training.

    Args:
        shape: of the model.
        rows: of the alignment examples.
        config: settings.
        utility_rows: of the utility examples, for gradient surgery, data replay and null spaces.
        pairs: the alignment examples of DPO, in the place of `rows`.

    Raises:
        CastuneError: nothing to train on, or no utility rows where they are needed.
    """
    if not (pairs if config.method == "dpo" else rows):
        raise CastuneError("a training needs examples")
    if config.needs_utility and not utility_rows:
        raise CastuneError("gradient surgery, data replay and null spaces need utility examples")
    if config.method == "dpo":
        lengths = [_pair_lengths(pair) for pair in pairs]
    else:
        replayed = replayed_rows(utility_rows, len(rows), config.replay, config.seed)
        lengths = [_lengths(row) for row in [*rows, *replayed]]
    steps = list(_steps([length for length, _ in lengths], config))
    sizes = [_size([lengths[i] for i in batch], config) for step in steps for batch in step]
    utility = list(_utility_sizes(utility_rows, config, len(steps)))
    work = sum((_trained(shape, size, config) for size in [*sizes, *utility]), Work())
    if config.method == "dpo":  # the reference model
        work += sum((again(shape.flops, size) for size in sizes), Work())
    if config.null_space is not None:
        work += sum((forward(shape.flops, size) for size in _null_space_sizes(utility_rows, config)), Work())
    return TrainingWork(work, len(steps), max([*sizes, *utility], key=lambda size: (size.n_tokens, size.n_scored)))


def training_sample(rows: Sequence[Row], config: TuneConfig) -> Sample:
    """What a training is timed on: a micro-batch of rows of middle length, one forward however long."""
    middle = sorted(rows, key=lambda row: len(row.ids))[len(rows) // 2 :][: config.batch_size]
    return Sample(batch_tokens=Size.of(middle).n_tokens, rows=middle)


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


def _utility_sizes(rows: Sequence[Row], config: TuneConfig, n_steps: int) -> Iterator[Size]:
    """The micro-batches of gradient surgery."""
    if config.surgery == "none":
        return
    n_utility = config.surgery_batch_size or config.batch_size * config.accumulation
    for chosen in islice(utility_batches(len(rows), n_utility, config.seed), n_steps):
        for start in range(0, len(chosen), config.batch_size):
            yield Size.of([rows[i] for i in chosen[start : start + config.batch_size]])


def _null_space_sizes(rows: Sequence[Row], config: TuneConfig) -> Iterator[Size]:
    """The forwards that find a null space; logits are those of one position a row."""
    lengths = sorted((len(row.ids) for row in rows), reverse=True)
    for start in range(0, len(lengths), config.batch_size):
        chosen = lengths[start : start + config.batch_size]
        yield Size.of_lengths([(length, 1) for length in chosen])


def _lengths(row: Row) -> tuple[int, int]:
    return len(row.ids), len(row.tokens)


def _pair_lengths(pair: Pair) -> tuple[int, int]:
    """Of the longer reply; TRL's DPO scores every position."""
    length = len(pair["prompt_ids"]) + max(len(pair["chosen_ids"]), len(pair["rejected_ids"]))
    return length, length


def _size(lengths: Sequence[tuple[int, int]], config: TuneConfig) -> Size:
    """Of a micro-batch; of preferences both replies are rows, padded to the longest and no further."""
    if config.method != "dpo":
        return Size.of_lengths(lengths)
    n_rows, length = 2 * len(lengths), max(length for length, _ in lengths)
    return Size(n_rows, length, n_rows * length)


def _trained(shape: ModelShape, size: Size, config: TuneConfig) -> Work:
    """A forward and backward of a micro-batch.

    Weights are frozen; LoRA's products are three times those of its forward. Gradient checkpointing runs the layers
    again.
    """
    flops, lowest = shape.flops, shape.lowest
    work = forward(flops, size) + backward(flops, size, first_layer=lowest)
    work += Work(layer_flops=3 * 2 * config.rank * shape.adapter_width * size.n_tokens)
    if config.gradient_checkpointing:
        work += again(flops, size._replace(n_scored=0), first_layer=lowest)
    return work
