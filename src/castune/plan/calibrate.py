"""How fast and in how much memory this machine runs the parts of a diagnosis, measured on a slice of the model.

A slice has a few of the decoder layers and random weights. The diagnosis' own code runs on it; time is then taken to
grow with FLOPs inside the layers and with scored positions at the output head.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch
from transformers import DynamicCache

from castune.artifacts import Unit
from castune.core.batching import ExampleBatch
from castune.core.continuation import Context, cache_of, context_of, read_keys_values
from castune.core.flops import ForwardFlops
from castune.core.generation import generate_replies
from castune.core.losses import RowBatch, scored_logits, token_log_probs
from castune.core.memory import Peak, peak_memory
from castune.core.skeleton import at_depth
from castune.data.chat import ChatFormat
from castune.data.rows import Row
from castune.diagnosis.ablator import Ablator, RecordedBatch
from castune.diagnosis.gradients import partial_gradients

T = TypeVar("T")

# Forward, and backward to the activations; gradients of weights are few.
GRADIENT_PASSES = 2
# Long enough that the clock and other processes matter little, short enough for a plan.
_SECONDS_A_TIMING = 1.0


@dataclass(frozen=True)
class Speed:
    """Seconds of one kind of work: `layer_flop` a FLOP in decoder layers, `scored` a scored position."""

    layer_flop: float
    scored: float

    def seconds(self, layer_flops: float, n_scored: float) -> float:
        """Seconds that so much work takes."""
        return self.layer_flop * layer_flops + self.scored * n_scored


@dataclass(frozen=True)
class Steps:
    """Seconds of decoding with the whole model: `step` for every step, `reply` for each reply in it."""

    step: float
    reply: float

    def seconds(self, n_steps: int, n_tokens: int) -> float:
        """Seconds of so many steps, in which so many tokens are decoded."""
        return self.step * n_steps + self.reply * n_tokens


@dataclass(frozen=True)
class Calibration:
    """What was measured. Memory is beyond the weights, in bytes; None where the system does not tell.

    Attributes:
        sweep: forwards under ablation.
        gradients: forwards and backwards.
        steps: decoding with the whole model.
        n_layers: depth of the slice.
        residual_bytes: of one token's residual, which is recorded at every layer.
        sweep_memory: of the largest batch, its recorded residuals included, at the depth of the slice.
        gradient_memory: of a batch, at the depth of the slice.
        gradient_memory_layer: what each further layer adds to that.
        key_bytes: of one token's keys and values in a layer; 0 where they are not kept.
    """

    sweep: Speed
    gradients: Speed
    steps: Steps
    n_layers: int
    residual_bytes: int
    sweep_memory: int | None
    gradient_memory: int | None
    gradient_memory_layer: float | None
    key_bytes: float


def calibrate(
    ablator: Ablator,
    chat: ChatFormat,
    *,
    batches: Sequence[ExampleBatch],
    loss_rows: Sequence[Row],
    prompt: Sequence[int],
    n_decoded: int,
    continues: bool,
    n_layers: int,
    batch_tokens: int,
) -> Calibration:
    """Time and memory of the diagnosis' parts on a slice of the model.

    Args:
        ablator: the slice, with at least one layer beyond the first that has heads.
        chat: the model's tokenizer and template.
        batches: of the sweeps; the first is the largest.
        loss_rows: rows of one gradient batch.
        prompt: a prompt of usual length.
        n_decoded: how many replies are decoded together.
        continues: whether they go on from recorded keys and values.
        n_layers: decoder layers of the whole model.
        batch_tokens: rows x tokens of a forward.
    """
    sweep, sweep_memory = sweep_speed(ablator, batches, batch_tokens)
    gradients, gradient_memory, gradient_memory_layer = gradient_speed(ablator, loss_rows, batch_tokens)
    return Calibration(
        sweep=sweep,
        gradients=gradients,
        steps=decoding_steps(ablator, chat, prompt, n_decoded, n_layers, continues=continues),
        n_layers=ablator.layout.n_layers,
        residual_bytes=_residual_bytes(ablator),
        sweep_memory=sweep_memory,
        gradient_memory=gradient_memory,
        gradient_memory_layer=gradient_memory_layer,
        key_bytes=_key_bytes(ablator, prompt) if continues else 0.0,
    )


def sweep_speed(ablator: Ablator, batches: Sequence[ExampleBatch], batch_tokens: int) -> tuple[Speed, int | None]:
    """Speed of forwards under ablation, and the memory of the first batch."""
    layer = ablator.layout.layers_with_heads[0]
    device = next(ablator.model.parameters()).device
    peak = Peak()
    work = []
    # The first batch takes the most memory; those in the middle are the usual ones.
    for number in sorted({0, len(batches) // 3, 2 * len(batches) // 3}):
        batch = batches[number]
        n_heads = min(ablator.layout.n_heads(layer), max(1, -(-2 * batch_tokens // batch.n_tokens)))
        recorded = RecordedBatch(ablator, RowBatch.of(batch.rows, device), batch_tokens)

        heads = [Unit.head(layer, head) for head in range(n_heads)]

        def ablated(recorded: RecordedBatch = recorded, heads: Sequence[Unit] = heads) -> None:
            recorded.ablated(heads, token_log_probs)

        # Memory that was freed lies scattered and is not all used again: the peak is higher after a few runs.
        with peak_memory(device) as found:
            recorded.baseline(token_log_probs)
            deep, shallow = _by_depth(ablator, partial(timed, ablated))
        peak = found if number == 0 else peak
        size = {"n_rows": len(batch.rows) * n_heads, "length": batch.length}
        work.append((deep, shallow, size, batch.n_scored * n_heads))
    return _speed(ablator, work), peak.extra


def gradient_speed(ablator: Ablator, rows: Sequence[Row], batch_tokens: int) -> tuple[Speed, int | None, float | None]:
    """Speed of a forward and backward of rows, its memory on the slice, and what a further layer adds."""
    device = next(ablator.model.parameters()).device

    def gradients() -> None:
        units = ablator.units
        parts = [part for one in units.units if one.layer < _depth(ablator) for part in units.parts(one)]
        paths = list(dict.fromkeys(part.path for part in parts))
        partial_gradients(ablator.model, paths, rows, n_chunks=1, batch_tokens=batch_tokens)

    def measured() -> tuple[float, int | None]:
        with peak_memory(device) as peak:
            seconds = timed(gradients)
        return seconds, peak.extra

    (deep, peak_deep), (shallow, peak_shallow) = _by_depth(ablator, measured)
    size = {"n_rows": len(rows), "length": max(len(row.ids) for row in rows)}
    speed = _speed(ablator, [(deep, shallow, size, sum(len(row.tokens) for row in rows))], passes=GRADIENT_PASSES)
    if peak_deep is None or peak_shallow is None:
        return speed, None, None
    return speed, peak_deep, max(0.0, (peak_deep - peak_shallow) / (ablator.layout.n_layers - _shallow(ablator)))


def decoding_steps(
    ablator: Ablator, chat: ChatFormat, prompt: Sequence[int], n_replies: int, n_layers: int, *, continues: bool
) -> Steps:
    """A long and a short generation, of many and of few replies: the differences are steps, and replies in them."""
    few, many = 2, 10

    def generation(size: int, n_tokens: int) -> float:
        context = _context(ablator, prompt) if continues else []
        return timed(
            lambda: generate_replies(
                ablator.model,
                chat.tokenizer,
                [prompt] * size,
                max_new_tokens=n_tokens,
                end_tokens=[chat.end_token],
                batch_tokens=size * (len(prompt) + many),
                recorded=(lambda found: cache_of(ablator.model, [context] * len(found))) if continues else None,
            )
        )

    def step(size: int) -> float:
        def measured() -> float:
            return max(0.0, generation(size, many) - generation(size, few)) / (many - few)

        deep, shallow = _by_depth(ablator, measured)
        layer = max(0.0, deep - shallow) / (ablator.layout.n_layers - _shallow(ablator))
        return shallow + layer * (n_layers - _shallow(ablator))

    fewer = -(-n_replies // 4)
    if fewer == n_replies:
        return Steps(step(n_replies), 0.0)
    large, small = step(n_replies), step(fewer)
    reply = max(0.0, large - small) / (n_replies - fewer)
    return Steps(max(0.0, large - n_replies * reply), reply)


@torch.no_grad()
def _context(ablator: Ablator, prompt: Sequence[int]) -> Context:
    """Keys and values of all but the last token of a prompt."""
    row, cache = Row(tuple(prompt[:-1]), (0,), (0,)), DynamicCache()
    scored_logits(ablator.model, RowBatch.of([row], next(ablator.model.parameters()).device), cache)
    return context_of(row, len(prompt) - 2, [(read_keys_values(cache, _depth(ablator)), 0)])


def _key_bytes(ablator: Ablator, prompt: Sequence[int]) -> float:
    context = _context(ablator, prompt)
    n_bytes = sum(tensor.numel() * tensor.element_size() for layer in context for tensor in layer)
    return n_bytes / len(context) / (len(prompt) - 1)


def timed(run: Callable[[], object]) -> float:
    """Mean seconds of a run: one to warm up, then runs until they have taken a second."""
    run()
    started, runs = time.perf_counter(), 0
    while True:
        run()
        runs += 1
        elapsed = time.perf_counter() - started
        if elapsed > _SECONDS_A_TIMING:
            return elapsed / runs


def _speed(ablator: Ablator, work: Sequence[tuple[float, float, dict[str, int], int]], *, passes: int = 1) -> Speed:
    """From pairs of seconds at full and at little depth, with rows, length and scored positions of the work."""
    flops = ForwardFlops.of(ablator.model, ablator.layout)
    begin = _shallow(ablator)
    deeper = sum(flops.forward(**size, n_scored=0, first_layer=begin) for _, _, size, _ in work) * passes
    layer_flop = max(0.0, sum(deep - shallow for deep, shallow, _, _ in work)) / deeper
    below = sum(flops.forward(**size, n_scored=0) for _, _, size, _ in work) * passes - deeper
    rest = sum(shallow for _, shallow, _, _ in work) - layer_flop * below
    return Speed(layer_flop, max(0.0, rest) / sum(n_scored for *_, n_scored in work))


def _by_depth(ablator: Ablator, measure: Callable[[], T]) -> tuple[T, T]:
    """What `measure` gives for the whole slice, and for its layers up to the first with heads."""
    deep = measure()
    with at_depth(ablator.model, ablator.layout, _shallow(ablator)):
        return deep, measure()


def _residual_bytes(ablator: Ablator) -> int:
    embedding = ablator.model.get_input_embeddings().weight
    return int(embedding.shape[1] * embedding.element_size())


def _shallow(ablator: Ablator) -> int:
    return ablator.layout.layers_with_heads[0] + 1


def _depth(ablator: Ablator) -> int:
    return len(ablator.layout.decoder_layers(ablator.model))
