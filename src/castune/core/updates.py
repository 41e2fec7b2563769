"""What an adapter adds to one unit: how large its share of the update is, and what it does to losses to first order.

The update D of a projection is what the adapter adds to its weight. A loss whose gradient on that weight is G changes
along D, to first order, by the inner product of G and D. A unit owns rows or columns of some projections, and its
effect is the part of the sum that lies in these: effects of units that tile a projection add up to that of the whole.

Updates have the shape of the weight as it is stored, as gradients have. Pure: tensors in, numbers out.

Shape letters: H unit, C gradient chunk, R LoRA rank, M rows and N columns of a stored weight.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from castune.artifacts import Unit
from castune.core.units import Part, UnitLayout

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class LowRank:
    """An update of `scaling * left_MR @ right_RN`: plain LoRA, with left = B and right = A of a linear layer."""

    left_MR: Tensor
    right_RN: Tensor
    scaling: float

    @property
    def shape(self) -> tuple[int, int]:
        """(M, N)."""
        return self.left_MR.shape[0], self.right_RN.shape[1]

    @property
    def rank(self) -> int:
        """The most directions that it can have."""
        return self.right_RN.shape[0]

    def sliced(self, rows: slice, columns: slice) -> LowRank:
        """Some rows and columns of it."""
        return LowRank(self.left_MR[rows], self.right_RN[:, columns], self.scaling)

    def inner(self, other_MN: Tensor) -> float:
        """Inner product with a matrix, without the product of left and right."""
        products_MR = (other_MN.double() @ self.right_RN.double().T) * self.left_MR.double()
        return self.scaling * float(products_MR.sum())

    @property
    def norm(self) -> float:
        """Frobenius norm."""
        left_RR, right_RR = (one.double() @ one.double().T for one in (self.left_MR.T, self.right_RN))
        return abs(self.scaling) * float((left_RR * right_RR).sum().clamp_min(0).sqrt())

    def singular_values(self) -> Tensor:
        """Singular values, float64; at most R."""
        # right = (Q S).T with Q orthonormal: left @ S.T has the singular values of the product, in R columns.
        triangle = torch.linalg.qr(self.right_RN.double().T).R
        values: Tensor = torch.linalg.svdvals(self.left_MR.double() @ triangle.T)
        return abs(self.scaling) * values


@dataclass(frozen=True)
class Dense:
    """An update of any rank: DoRA, or a module that was trained as a whole."""

    matrix_MN: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """(M, N)."""
        return self.matrix_MN.shape[0], self.matrix_MN.shape[1]

    @property
    def rank(self) -> int:
        """The most directions that it can have."""
        return min(self.shape)

    def sliced(self, rows: slice, columns: slice) -> Dense:
        """Some rows and columns of it."""
        return Dense(self.matrix_MN[rows, columns])

    def inner(self, other_MN: Tensor) -> float:
        """Inner product with a matrix."""
        return float((other_MN.double() * self.matrix_MN.double()).sum())

    @property
    def norm(self) -> float:
        """Frobenius norm."""
        return float(self.matrix_MN.double().norm())

    def singular_values(self) -> Tensor:
        """Singular values, float64."""
        # Of the smaller Gram matrix: those of a whole MLP would take minutes otherwise. Small ones lose digits by it.
        matrix = self.matrix_MN.double()
        gram = matrix @ matrix.T if matrix.shape[0] <= matrix.shape[1] else matrix.T @ matrix
        squares: Tensor = torch.linalg.eigvalsh(gram)
        return squares.clamp_min(0).sqrt()


Update = LowRank | Dense
"""What an adapter adds to a weight."""

_EVERY = slice(None)


def spans_of(part: Part) -> tuple[slice, slice]:
    """Rows and columns of a stored weight that a unit's part of it takes up."""
    return (part.at, _EVERY) if (part.axis == 0) != part.transposed else (_EVERY, part.at)


class Size(NamedTuple):
    """How large an update is, and how many directions it has.

    Attributes:
        norm: Frobenius norm.
        effective_rank: exp of the entropy of the singular values' shares (Roy and Vetterli 2007); None of a zero
            update.
        top_share: share of the squared norm that the largest singular value has; None of a zero update.
        rank: the most directions it could have.
    """

    norm: float
    effective_rank: float | None
    top_share: float | None
    rank: int


def size_of(updates: Sequence[Update]) -> Size:
    """Size of one update, or of several together: as a block-diagonal matrix of them, so that directions add up."""
    values = torch.cat([update.singular_values() for update in updates])
    rank = sum(min(update.rank, *update.shape) for update in updates)
    total = float(values.sum())
    if total == 0:
        return Size(0.0, None, None, rank)
    share = values / total
    squares = values.square()
    entropy = -float(torch.special.xlogy(share, share).sum())
    return Size(float(squares.sum().sqrt()), float(np.exp(entropy)), float(squares.max() / squares.sum()), rank)


def unit_size(layout: UnitLayout, one: Unit, updates: Mapping[str, Update]) -> Size:
    """Size of a unit's share of some updates, by module path; zero where none of its projections is updated."""
    found = [updates[part.path].sliced(*spans_of(part)) for part in layout.parts(one) if part.path in updates]
    return size_of(found) if found else Size(0.0, None, None, 0)


@dataclass(frozen=True)
class Effects:
    """First-order changes of a loss along an update, by chunk of the examples; the sum over chunks is the change.

    Attributes:
        units_HC: of every unit.
        modules_C: of every updated projection as a whole, by module path.
    """

    units_HC: Floats
    modules_C: dict[str, Floats]

    def __add__(self, other: Effects) -> Effects:
        """Of two sets of projections together."""
        return Effects(self.units_HC + other.units_HC, {**self.modules_C, **other.modules_C})

    @property
    def total_C(self) -> Floats:
        """Of all updated projections together."""
        return np.asarray(np.sum(list(self.modules_C.values()), axis=0))


def first_order_effects(
    layout: UnitLayout, units: Sequence[Unit], chunks: Sequence[Mapping[str, Tensor]], updates: Mapping[str, Update]
) -> Effects:
    """What the updates do to a loss, unit by unit: inner products of gradients and updates.

    Args:
        layout: where the units are.
        units: the units.
        chunks: partial gradients of the loss whose sum is its gradient, by module path, shaped like the weights
            (`diagnosis.gradients.partial_gradients`). Of projections that are not among them nothing counts.
        updates: by module path, shaped like the weights.
    """
    paths = [path for path in updates if path in chunks[0]]
    modules_C = {path: np.array([updates[path].inner(chunk[path]) for chunk in chunks]) for path in paths}
    units_HC = np.zeros((len(units), len(chunks)))
    for row, one in enumerate(units):
        for part in layout.parts(one):
            if part.path in modules_C:
                spans = spans_of(part)
                update = updates[part.path].sliced(*spans)
                units_HC[row] += [update.inner(chunk[part.path][spans]) for chunk in chunks]
    return Effects(units_HC, modules_C)


def with_error(effect_C: Floats) -> tuple[float, float | None]:
    """A sum over chunks and its standard error; None for fewer than two chunks.

    Chunks are equal parts of independent examples, so each is an estimate of the whole when it is multiplied by their
    number.
    """
    n = effect_C.shape[-1]
    error = None if n < 2 else float(np.sqrt(n * np.var(effect_C, ddof=1)))
    return float(effect_C.sum()), error
