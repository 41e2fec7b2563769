"""How fast, and in how much memory, this machine does the work of a model, measured on a slice of it.

A slice has a few of the decoder layers and random weights. The diagnosis' own code runs on it; time is then taken to
grow with FLOPs inside the layers and with scored positions at the output head.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar, final

import torch
from transformers import DynamicCache

from castune.artifacts import Unit
from castune.core.ablation import can_resume
from castune.core.batching import ExampleBatch
from castune.core.continuation import Context, cache_of, context_of, read_keys_values
from castune.core.flops import ForwardFlops
from castune.core.generation import generate_replies
from castune.core.heads import HeadLayout
from castune.core.losses import RowBatch, scored_logits, token_log_probs
from castune.core.units import UnitLayout
from castune.data.chat import ChatFormat
from castune.data.rows import Row
from castune.diagnosis.ablator import Ablator, RecordedBatch
from castune.diagnosis.gradients import partial_gradients
from castune.plan.memory import Memory, Peak, peak_memory, resident_memory
from castune.plan.skeleton import at_depth, random_slice
from castune.plan.speed import Clock, Measured, Sample
from castune.plan.work import Cost, Size, Work, backward, forward

if TYPE_CHECKING:
    from transformers import PreTrainedModel

T = TypeVar("T")

# Long enough that the clock and other processes matter little, short enough for a plan.
_SECONDS_A_TIMING = 1.0
# Layers of the slice that stands for the model: where a layer is small, more are needed to be timed well.
_SLICE_WEIGHTS = 50e6
_MOST_SLICE_LAYERS = 6
# Decoding steps of a long and a short generation; their difference is what steps take.
_MANY, _FEW = 10, 2


@final
class Slice(Clock):
    """The first layers of a model with random weights, on this machine.

    Args:
        ablator: the slice with its units, and at least one layer beyond the first that has heads.
        chat: the model's tokenizer and template.
        n_layers: decoder layers of the whole model.
        own_memory: bytes of this process before it held the slice; 0 where the slice lies on an accelerator.
    """

    def __init__(self, ablator: Ablator, chat: ChatFormat, n_layers: int, own_memory: int) -> None:
        self.ablator, self.chat, self.n_layers, self.own_memory = ablator, chat, n_layers, own_memory
        self._first = ablator.layout.layers_with_heads[0]
        self._device = next(ablator.model.parameters()).device

    @classmethod
    def of(cls, model: PreTrainedModel, units: UnitLayout, chat: ChatFormat, device: torch.device) -> Slice:
        """The slice that stands for a model: two layers beyond the first with heads, more where layers are small.

        Args:
            model: the whole model without weights (`skeleton`).
            units: its units.
            chat: its tokenizer and template.
            device: where the slice lies.
        """
        own_memory = resident_memory() or 0 if device.type == "cpu" else 0
        layout = units.heads
        first = layout.layers_with_heads[0]
        weights = sum(parameter.numel() for parameter in layout.decoder_layers(model)[first].parameters())
        deeper = min(_MOST_SLICE_LAYERS, max(2, round(_SLICE_WEIGHTS / weights)))
        depth = min(layout.n_layers, first + 1 + deeper)
        cut = random_slice(model.config, depth, dtype=model.dtype, device=device)
        heads = HeadLayout.of(cut)
        own = UnitLayout.of(cut, heads, units.kinds, n_mlp_groups=units.n_mlp_groups)
        ablator = Ablator(cut, own, own.units, can_resume(cut, heads))
        return cls(ablator, chat, layout.n_layers, own_memory)

    def speed(self, sample: Sample) -> Measured:
        """Times the sample, and measures its memory."""
        found = self._gradients(sample.rows) if sample.rows else self._sweeps(sample.batches, sample.batch_tokens)
        if not sample.prompt:
            return found
        step, reply = self._decoding(sample)
        return replace(found, step=step, reply=reply)

    def _sweeps(self, batches: Sequence[ExampleBatch], batch_tokens: int) -> Measured:
        """Forwards under ablation, and the memory of the first batch with its recorded residuals."""
        layer, peak, timings = self._first, Peak(), []
        # The first batch takes the most memory; those in the middle are the usual ones.
        for number in sorted({0, len(batches) // 3, 2 * len(batches) // 3}):
            batch = batches[number]
            n_heads = min(self.ablator.layout.n_heads(layer), max(1, -(-2 * batch_tokens // batch.n_tokens)))
            heads = [Unit.head(layer, head) for head in range(n_heads)]
            size = Size(len(batch.rows) * n_heads, batch.length, batch.n_scored * n_heads)
            recorded = RecordedBatch(self.ablator, RowBatch.of(batch.rows, self._device), batch_tokens)

            def ablated(recorded: RecordedBatch = recorded, heads: Sequence[Unit] = heads, size: Size = size) -> Cost:
                seconds = timed(lambda: recorded.ablated(heads, token_log_probs))
                return Cost(forward(self._flops, size, first_layer=self.ablator.first_layer(layer)), seconds)

            # Memory that was freed lies scattered and is not all used again: the peak is higher after a few runs.
            with peak_memory(self._device) as found:
                recorded.baseline(token_log_probs)
                timings.append(self._by_depth(ablated))
            peak = found if number == 0 else peak
        residuals = batches[0].n_tokens * self._residual_bytes if self.ablator.resumable else 0
        return _measured(timings, None if peak.extra is None else Memory(peak.extra, self._depth, residuals))

    def _gradients(self, rows: Sequence[Row]) -> Measured:
        """A forward and backward of rows, its memory, and what a further layer adds to that."""
        size, units = Size.of(rows), self.ablator.units

        def measured() -> tuple[Cost, int | None]:
            parts = [part for one in units.units if one.layer < self._depth for part in units.parts(one)]
            paths = list(dict.fromkeys(part.path for part in parts))
            n_weights = sum(units.weight(self.ablator.model, path).numel() for path in paths)
            with peak_memory(self._device) as peak:
                seconds = timed(
                    lambda: partial_gradients(self.ablator.model, paths, rows, n_chunks=1, batch_tokens=size.n_tokens)
                )
            passes = (
                forward(self._flops, size),
                backward(self._flops, size, first_layer=self._lowest, n_weights=n_weights),
            )
            return Cost(sum(passes, Work()), seconds), peak.extra

        (deep, deep_peak), (shallow, shallow_peak) = self._by_depth(measured)
        if deep_peak is None or shallow_peak is None:
            return _measured([(deep, shallow)], None)
        a_layer = max(0.0, (deep_peak - shallow_peak) / (self._depth - self._shallow))
        return _measured([(deep, shallow)], Memory(deep_peak, self._depth, a_layer))

    def _decoding(self, sample: Sample) -> tuple[float, float]:
        """Seconds of a step of the whole model, and of each reply in it: those of many replies less those of few."""

        def step(n_replies: int) -> float:
            def measured() -> float:
                seconds = self._generation(sample, n_replies, _MANY) - self._generation(sample, n_replies, _FEW)
                return max(0.0, seconds) / (_MANY - _FEW)

            deep, shallow = self._by_depth(measured)
            layer = max(0.0, deep - shallow) / (self._depth - self._shallow)
            return shallow + layer * (self.n_layers - self._shallow)

        fewer = -(-sample.n_replies // 4)
        if fewer == sample.n_replies:
            return step(sample.n_replies), 0.0
        large, small = step(sample.n_replies), step(fewer)
        reply = max(0.0, large - small) / (sample.n_replies - fewer)
        return max(0.0, large - sample.n_replies * reply), reply

    def _generation(self, sample: Sample, n_replies: int, n_tokens: int) -> float:
        """Seconds of so many replies of so many tokens."""
        context = self._context(sample.prompt) if sample.continues else []

        def generate() -> None:
            generate_replies(
                self.ablator.model,
                self.chat.tokenizer,
                [sample.prompt] * n_replies,
                max_new_tokens=n_tokens,
                end_tokens=[self.chat.end_token],
                batch_tokens=n_replies * (len(sample.prompt) + _MANY),
                recorded=(lambda found: cache_of(self.ablator.model, [context] * len(found)))
                if sample.continues
                else None,
            )

        return timed(generate)

    @torch.no_grad()
    def _context(self, prompt: Sequence[int]) -> Context:
        """Keys and values of all but the last token of a prompt."""
        row, cache = Row(tuple(prompt[:-1]), (0,), (0,)), DynamicCache()
        scored_logits(self.ablator.model, RowBatch.of([row], self._device), cache)
        return context_of(row, len(prompt) - 2, [(read_keys_values(cache, self._depth), 0)])

    def _by_depth(self, measure: Callable[[], T]) -> tuple[T, T]:
        """What `measure` gives for the whole slice, and for its layers up to the first with heads."""
        deep = measure()
        with at_depth(self.ablator.model, self.ablator.layout, self._shallow):
            return deep, measure()

    @property
    def _depth(self) -> int:
        """Layers that the slice has now."""
        return len(self.ablator.layout.decoder_layers(self.ablator.model))

    @property
    def _shallow(self) -> int:
        return self._first + 1

    @property
    def _flops(self) -> ForwardFlops:
        """Of the layers that the slice has now."""
        return ForwardFlops.of(self.ablator.model, self.ablator.layout)

    @property
    def _lowest(self) -> int:
        """The lowest layer whose weights have gradients."""
        return min((one.layer for one in self.ablator.heads), default=self._first)

    @property
    def _residual_bytes(self) -> int:
        """Bytes of a token in the residual stream, which is recorded at every layer."""
        embedding = self.ablator.model.get_input_embeddings().weight
        return int(embedding.shape[1] * embedding.element_size())


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


def _measured(timings: Sequence[tuple[Cost, Cost]], memory: Memory | None) -> Measured:
    """From pairs of costs at full and at little depth: what the layers between them take, and what is left over."""
    deep, shallow = (sum(costs, Cost()) for costs in zip(*timings, strict=True))
    between = deep.work.layer_flops - shallow.work.layer_flops
    layer_flop = max(0.0, deep.seconds - shallow.seconds) / between
    rest = shallow.seconds - layer_flop * shallow.work.layer_flops
    return Measured(layer_flop, max(0.0, rest) / shallow.work.n_scored, memory=memory)
