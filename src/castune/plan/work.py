"""Work before it is done, and what it costs: passes through the model and decoding steps, in FLOPs and in seconds."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from operator import add
from typing import NamedTuple

from castune.core.flops import ForwardFlops
from castune.core.losses import SCORED_MULTIPLE
from castune.data.rows import Row


class Size(NamedTuple):
    """Rows, tokens of each, and scored positions of all of them, padding included."""

    n_rows: int
    length: int
    n_scored: int

    @property
    def n_tokens(self) -> int:
        """Tokens that the model is given."""
        return self.n_rows * self.length

    @classmethod
    def of(cls, rows: Sequence[Row]) -> Size:
        """The size of rows that are run together."""
        return cls.of_lengths((len(row.ids), len(row.tokens)) for row in rows)

    @classmethod
    def of_lengths(cls, lengths: Iterable[tuple[int, int]]) -> Size:
        """The same from each row's tokens and scored positions."""
        n_tokens, n_scored = zip(*lengths, strict=True)
        padded = -(-max(n_scored) // SCORED_MULTIPLE) * SCORED_MULTIPLE
        return cls(len(n_tokens), max(n_tokens), len(n_scored) * padded)


@dataclass(frozen=True)
class Work:
    """What has to be computed. Works add up.

    Attributes:
        forwards: passes through all decoder layers or a part of them, decoding steps aside. A pass that goes backwards
            too, or that is run again for its activations, is one.
        tokens: tokens of these passes, padding included.
        layer_flops: FLOPs of these passes in decoder layers, backwards and again.
        n_scored: how often the output head is used at a position, backwards too.
        weight_reads: how often these passes read the whole of the decoder's weights.
        steps: decoding steps, each of a batch of replies.
        step_tokens: tokens decoded.
        context: earlier tokens that decoded ones attend to, summed over these; a diagnosis' are short and not counted.
    """

    forwards: int = 0
    tokens: int = 0
    layer_flops: float = 0.0
    n_scored: int = 0
    weight_reads: float = 0.0
    steps: int = 0
    step_tokens: int = 0
    context: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(*map(add, vars(self).values(), vars(other).values()))

    def __mul__(self, times: int) -> Work:
        return Work(*(times * one for one in vars(self).values()))


@dataclass(frozen=True)
class Cost:
    """Work, and the seconds it takes somewhere. Costs add up."""

    work: Work = Work()
    seconds: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.work + other.work, self.seconds + other.seconds)

    def __mul__(self, times: int) -> Cost:
        return Cost(self.work * times, self.seconds * times)


def forward(flops: ForwardFlops, size: Size, *, forwards: int = 1, first_layer: int = 0) -> Work:
    """Rows through the layers from `first_layer` on and the output head, in so many forwards."""
    return Work(
        forwards=forwards,
        tokens=size.n_tokens,
        layer_flops=_layer_flops(flops, size, first_layer),
        n_scored=size.n_scored,
        weight_reads=forwards * _share(flops, first_layer),
    )


def again(flops: ForwardFlops, size: Size, *, first_layer: int = 0) -> Work:
    """A forward that repeats one that is counted: its arithmetic, not its tokens."""
    return Work(
        layer_flops=_layer_flops(flops, size, first_layer),
        n_scored=size.n_scored,
        weight_reads=_share(flops, first_layer),
    )


def backward(flops: ForwardFlops, size: Size, *, first_layer: int = 0, n_weights: int = 0) -> Work:
    """The way back of a forward: gradients of activations down to a layer, and of some weights.

    Those of activations are a forward's products with weights once more, and its attention twice. The lowest layer is
    counted whole, though gradients of its inputs are not needed.

    Args:
        flops: of the model.
        size: of the forward.
        first_layer: the lowest layer that has gradients.
        n_weights: weights of matrices whose gradients are computed.
    """
    attention = sum(flops.pair_L[first_layer:]) * size.n_tokens * size.length
    return Work(
        layer_flops=_layer_flops(flops, size, first_layer) + attention + 2 * n_weights * size.n_tokens,
        n_scored=size.n_scored,
        weight_reads=_share(flops, first_layer),
    )


def _layer_flops(flops: ForwardFlops, size: Size, first_layer: int) -> float:
    return flops.forward(n_rows=size.n_rows, length=size.length, n_scored=0, first_layer=first_layer)


def _share(flops: ForwardFlops, first_layer: int) -> float:
    """Share of the decoder's weights that lies from a layer on."""
    return sum(flops.token_L[first_layer:]) / sum(flops.token_L)
