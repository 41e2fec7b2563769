"""Projection onto the space that alignment moved a weight in, as Safe LoRA has it. Pure: tensors in, tensors out.

Hsu et al., "Safe LoRA: the Silver Lining of Reducing Safety Risks when Fine-tuning Large Language Models", NeurIPS
2024, arXiv 2405.16833: V = W_aligned - W_unaligned is what alignment added to a weight. The exact projector onto its
columns is V (V^T V)^-1 V^T; the paper's fast one is V V^T / ||V||_F. Both act from the left, so a low-rank update B A
stays one: C (B A) = (C B) A, and neither C nor the update is ever written out.

The fast one is no projection: it weighs directions by their singular values, and it scales with V, so that what it
leaves is as small as V is. A V with as many independent columns as rows leaves nothing to project away exactly: then
the exact projector is the identity.

Shape letters: M outputs and N inputs of a projection, K directions kept, R LoRA rank.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class AlignmentProjector:
    """C as a product of a matrix and its transpose.

    Attributes:
        factor_MK: V, or an orthonormal basis of its columns.
        scale: what the product is multiplied by.
    """

    factor_MK: Tensor
    scale: float

    @classmethod
    def fast(cls, alignment_MN: Tensor) -> AlignmentProjector:
        """C = V V^T / ||V||_F. V must not be zero."""
        return cls(alignment_MN, 1 / float(torch.linalg.matrix_norm(alignment_MN)))

    @classmethod
    def exact(cls, alignment_MN: Tensor) -> AlignmentProjector:
        """C = V (V^T V)^-1 V^T, with a pseudo-inverse where columns of V depend on each other.

        Singular values within rounding errors of zero count as zero, as in `torch.linalg.matrix_rank`.
        """
        left_MK, values_K, _ = torch.linalg.svd(alignment_MN, full_matrices=False)
        error = torch.finfo(alignment_MN.dtype).eps * max(alignment_MN.shape)
        return cls(left_MK[:, values_K > error * values_K[0]], 1.0)

    def apply(self, left_MR: Tensor) -> Tensor:
        """C B, `[M, R]`, of any matrix of M rows."""
        return self.factor_MK @ (self.factor_MK.T @ left_MR) * self.scale


def similarity(left_MR: Tensor, projected_MR: Tensor, right_RN: Tensor) -> tuple[float | None, float, float]:
    """How much of an update B A its projection C B A is, by Gram matrices of R rows alone.

    Args:
        left_MR: B.
        projected_MR: C B.
        right_RN: A.

    Returns:
        The cosine <B A, C B A>_F / (||B A||_F ||C B A||_F), and both norms. The cosine is None where the update is
        zero, and 0 where only its projection is.
    """
    before, after, right = (one.double() for one in (left_MR, projected_MR, right_RN))
    gram_RR = right @ right.T

    def inner(one_MR: Tensor, other_MR: Tensor) -> float:
        return float(((one_MR.T @ other_MR) * gram_RR).sum())

    norm, projected_norm = (max(inner(one, one), 0.0) ** 0.5 for one in (before, after))
    if not norm:
        return None, norm, projected_norm
    cosine = inner(before, after) / (norm * projected_norm) if projected_norm else 0.0
    return min(cosine, 1.0), norm, projected_norm
