"""From work to seconds: how fast it is done on an accelerator by its data sheet, or here as far as it was timed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

from castune.core.batching import ExampleBatch
from castune.data.rows import Row
from castune.plan.accelerators import Accelerator
from castune.plan.memory import Memory
from castune.plan.shape import ModelShape
from castune.plan.work import Work

# Keys and values of a decoding step are read for attention, and copied (read and written) to append the new ones.
_CACHE_PASSES = 3


@dataclass(frozen=True)
class Sample:
    """Pieces of some work, of usual size: what stands for it where it is timed.

    Attributes:
        batch_tokens: rows x tokens of a forward.
        batches: of forwards; the first one's memory is measured.
        rows: of one forward and backward, in the place of `batches`.
        prompt: what stands before the tokens that are decoded; empty where none are.
        n_replies: how many replies are decoded together.
        continues: whether they go on from recorded keys and values.
    """

    batch_tokens: int
    batches: Sequence[ExampleBatch] = ()
    rows: Sequence[Row] = ()
    prompt: Sequence[int] = ()
    n_replies: int = 0
    continues: bool = False


class Speed(ABC):
    """How long work of one kind takes somewhere.

    Attributes:
        memory: what a sample of it took beyond the weights; None where nobody has measured that.
    """

    memory: Memory | None = None

    @abstractmethod
    def seconds(self, work: Work) -> float:
        """Seconds of some work."""


class Clock(ABC):
    """Where work is done."""

    @abstractmethod
    def speed(self, sample: Sample) -> Speed:
        """How fast work is done there that is like a sample of it."""


@final
@dataclass(frozen=True)
class Measured(Speed):
    """Seconds as they were measured.

    Attributes:
        layer_flop: of a FLOP in decoder layers.
        scored: of the output head at a position.
        step: of a decoding step, whatever its replies.
        reply: of each reply in it.
        memory: of the sample, where the system tells.
    """

    layer_flop: float
    scored: float
    step: float = 0.0
    reply: float = 0.0
    memory: Memory | None = None

    def seconds(self, work: Work) -> float:
        """Passes grow with their FLOPs and scored positions, steps with the replies in them."""
        passes = self.layer_flop * work.layer_flops + self.scored * work.n_scored
        return passes + self.step * work.steps + self.reply * work.step_tokens


@final
@dataclass(frozen=True)
class OnAccelerator(Clock, Speed):
    """A roofline over a data sheet: one for all work on a model, and no measurement."""

    accelerator: Accelerator
    shape: ModelShape

    def speed(self, sample: Sample) -> Speed:
        """Its own."""
        return self

    def seconds(self, work: Work) -> float:
        """Passes, and decoding steps behind them; an optimiser's own are nothing beside these."""
        shape = self.shape
        passes = self.accelerator.seconds(shape.pass_flops(work), work.weight_reads * shape.weight_bytes)
        n_bytes = work.steps * shape.weight_bytes + _CACHE_PASSES * work.context * shape.key_bytes
        return passes + self.accelerator.decoding_seconds(work.steps, shape.n_layers, shape.step_flops(work), n_bytes)
