"""A model before and after its alignment, and what the alignment did to its weights (Safe LoRA, arXiv 2405.16833).

Shape letters: M outputs and N inputs of a module.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from castune.core.loading import load, stored_dtype
from castune.core.quantisation import dense_weight
from castune.errors import CastuneError
from castune.tuning.adapter_update import as_rows

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class AlignmentPair:
    """The same model, aligned and before."""

    aligned: PreTrainedModel
    unaligned: PreTrainedModel

    @classmethod
    def of(cls, aligned: PreTrainedModel | str | Path, unaligned: PreTrainedModel | str | Path) -> AlignmentPair:
        """The two models, loaded on the CPU where they are named; both names are looked up before any weights load."""
        given = {"unaligned": unaligned, "aligned": aligned}
        dtypes = {what: stored_dtype(one) for what, one in given.items() if isinstance(one, str | Path)}
        before, after = (
            load(one, dtype=dtypes[what], device="cpu").model if isinstance(one, str | Path) else one
            for what, one in given.items()
        )
        if before.dtype != after.dtype:
            logger.warning(
                "the aligned model is in %s and the unaligned one in %s: their difference is in part one of rounding",
                *(str(one.dtype).removeprefix("torch.") for one in (after, before)),
            )
        return cls(after, before)

    def check(self, paths: Collection[str]) -> None:
        """Refuse models that differ in the shape of one of these modules, or not at all in its weight."""
        for path in paths:
            after, before = self._weights(path)
            if after.shape != before.shape:
                raise CastuneError(
                    f"{path} is {tuple(after.shape)} in the aligned model and {tuple(before.shape)} in the unaligned "
                    "one; give the same model before its alignment"
                )
            if torch.equal(after.float(), before.float().to(after.device)):
                raise CastuneError(
                    f"{path} is the same in the aligned and the unaligned model: there is no direction to project "
                    "onto; give the model as it was before its alignment"
                )

    def difference(self, path: str) -> Tensor:
        """What alignment added to the weight of a module (V): `[M, N]`, float32."""
        after, before = (weight.float() for weight in self._weights(path))
        alignment_MN = after - before.to(after.device)
        if not torch.isfinite(alignment_MN).all():
            raise CastuneError(f"{path}: the difference of the two models has values that are not finite")
        return alignment_MN

    def _weights(self, path: str) -> Iterator[Tensor]:
        yield weight_rows(self.aligned, path, "the aligned model")
        yield weight_rows(self.unaligned, path, "the unaligned model")


def weight_rows(model: nn.Module, path: str, what: str) -> Tensor:
    """The weight of a module as `[M, N]`, whatever way it is stored.

    Raises:
        CastuneError: the model, which the message calls `what`, has no such linear layer.
    """
    try:
        module = model.get_submodule(path)
    except AttributeError:
        raise CastuneError(
            f"{what} has no module {path}, which the adapter changes; give a model of the same architecture and size"
        ) from None
    if getattr(module, "weight", None) is None or module.weight.ndim != 2:
        raise CastuneError(f"{what}: {path} is no linear layer, and only updates of those are projected")
    return as_rows(module, dense_weight(module))
