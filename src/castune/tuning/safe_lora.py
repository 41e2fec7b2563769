"""Safe LoRA: updates of an adapter that leave the space of a model's alignment, projected onto it. No training.

Hsu et al., "Safe LoRA: the Silver Lining of Reducing Safety Risks when Fine-tuning Large Language Models", NeurIPS
2024, arXiv 2405.16833. The update B A of a module is replaced by C B A where the cosine of the two is below a
threshold, or where it is among the N lowest; C comes from the difference between the aligned model and the one it was
before (`castune.core.alignment`). The result is plain LoRA: A, alpha and r are what they were, and B is C B.

Rows that were zero are so no longer: C mixes the rows of a module.

Shape letters: R LoRA rank, M outputs and N inputs of a module.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from castune.artifacts import ProjectedAdapter
from castune.artifacts.files import check_vacant, new_directory
from castune.artifacts.projected_adapter import PROJECTION_FILE, ProjectedUpdate
from castune.artifacts.tune_result import ADAPTER_WEIGHTS, adapter_hash
from castune.core.alignment import AlignmentProjector, similarity
from castune.core.gguf import display_name
from castune.core.provenance import model_record, provenance
from castune.errors import CastuneError, CertificateError
from castune.tuning.adapter_files import (
    check_base,
    check_loaded,
    lora_pairs,
    plain_lora_config,
    scaling_of,
)
from castune.tuning.alignment_pair import AlignmentPair, weight_rows
from castune.tuning.touched_units import Pair, TouchedUnits, write_pairs
from castune.tuning.verify import certify

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

# Below this cosine an update is projected where nothing else is said.
THRESHOLD = 0.35


def project_adapter(
    adapter: str | Path,
    aligned: PreTrainedModel | str | Path,
    unaligned: PreTrainedModel | str | Path,
    out: str | Path,
    *,
    threshold: float | None = None,
    layers: int | None = None,
    exact: bool = False,
    base: PreTrainedModel | None = None,
    overwrite: bool = False,
) -> ProjectedAdapter:
    """Project updates of an adapter that leave the alignment space onto it (Safe LoRA, arXiv 2405.16833).

    Args:
        adapter: directory of a plain PEFT LoRA adapter, rank-stabilised or not.
        aligned: the aligned model, loaded, or a name that `load` takes.
        unaligned: the same model before its alignment. Both are left as they were; only the weights that the adapter
            changes have to be there in both, in the same shape, and different.
        out: the adapter directory to write. It is complete or absent, never half-written.
        threshold: project updates whose cosine with their projection is below it, in [0, 1]; 0.35 when absent.
        layers: instead, project as many updates as this, those of the lowest cosine. A layer is one module that the
            adapter changes, as in the paper, not a whole decoder layer.
        exact: project by V (V^T V)^-1 V^T instead of the paper's fast V V^T / ||V||_F.
        base: the base model of the adapter; the aligned one when absent.
        overwrite: replace an adapter that this function wrote.

    Returns:
        What was done to each module, and the certificate. The selection beside it is of all units of these modules.

    Raises:
        CastuneError: settings that do not fit each other, another base model, models that differ in names or shapes or
            not at all, or something is at `out`.
        CertificateError: no plain LoRA adapter, or one that changes what belongs to no unit; the message names the
            setting or the tensor.
    """
    adapter, out = Path(adapter), Path(out)
    rule = _Rule.of(threshold, layers, exact=exact)
    again = overwrite and (out / PROJECTION_FILE).is_file()
    if not again:
        check_vacant(out)
    config = plain_lora_config(adapter)
    models = AlignmentPair.of(aligned, unaligned)
    base = models.aligned if base is None else base
    check_base(adapter, config, base)
    pairs = _read(adapter, config, base)
    rule.check(len(pairs))
    models.check(list(pairs))
    touched = TouchedUnits.by(base, adapter, list(pairs))
    updates, lefts = rule.projected(pairs, config, models)
    projected = {path: (a, lefts[path]) for path, (a, _) in pairs.items()}
    with new_directory(out, replace=again) as aside:
        write_pairs(adapter, aside, touched.filled(projected), [name for name, _ in base.named_modules()])
        touched.selection.save(aside)
        result = ProjectedAdapter(
            certificate=certify(base, aside, touched.selection),
            n_total=touched.selection.n_total,
            source={
                "name": display_name(str(adapter.absolute())),
                "hash": adapter_hash(adapter),
                "r": config["r"],
                "alpha": config["lora_alpha"],
            },
            aligned=model_record(models.aligned),
            unaligned=model_record(models.unaligned),
            threshold=rule.threshold,
            layers=rule.layers,
            exact=exact,
            updates=tuple(updates),
            model=model_record(base),
            provenance=provenance(),
        )
        result.save(aside)
    return result


@dataclass(frozen=True)
class _Rule:
    """Which updates are projected, and how: exactly one of `threshold` and `layers` is set."""

    threshold: float | None
    layers: int | None
    exact: bool

    @classmethod
    def of(cls, threshold: float | None, layers: int | None, *, exact: bool) -> _Rule:
        if threshold is not None and layers is not None:
            raise CastuneError("threshold and layers both say which updates are projected; give one of them")
        if layers is not None and layers < 1:
            raise CastuneError(f"layers is {layers}, accepted: at least 1")
        if threshold is not None and not (math.isfinite(threshold) and 0 <= threshold <= 1):
            raise CastuneError(f"threshold is {threshold:g}, accepted: a cosine from 0 to 1")
        return cls(THRESHOLD if threshold is None and layers is None else threshold, layers, exact)

    def check(self, n_modules: int) -> None:
        """Refuse more layers than the adapter changes."""
        if self.layers is not None and self.layers > n_modules:
            raise CastuneError(f"layers is {self.layers}, but the adapter changes {n_modules} modules")

    def projected(
        self, pairs: Mapping[str, Pair], config: Mapping[str, Any], models: AlignmentPair
    ) -> tuple[list[ProjectedUpdate], dict[str, Tensor]]:
        """What is done to each update, and B of every module afterwards. One V is in memory at a time."""
        scaling = abs(scaling_of(config))
        found, lefts = [], {}
        for path, (a, b) in pairs.items():
            alignment_MN = models.difference(path)
            projector = (AlignmentProjector.exact if self.exact else AlignmentProjector.fast)(alignment_MN)
            lefts[path] = projector.apply(b.to(alignment_MN.device)).cpu()
            cosine, norm, projected_norm = similarity(b, lefts[path], a)
            rank = projector.factor_MK.shape[1] if self.exact else None
            found.append(ProjectedUpdate(path, cosine, scaling * norm, scaling * projected_norm, False, rank))
        n_whole = sum(one.rank == len(lefts[one.module]) for one in found)
        if n_whole:
            logger.warning(
                "alignment moved %d of %d modules in every direction: the exact projector leaves these as they are",
                n_whole,
                len(found),
            )
        chosen = self._chosen(found)
        updates = [replace(one, is_projected=one.module in chosen) for one in found]
        return updates, {path: lefts[path] if path in chosen else b for path, (_, b) in pairs.items()}

    def _chosen(self, updates: list[ProjectedUpdate]) -> set[str]:
        """Modules whose updates are projected; of an update of zero there is nothing to project."""
        cosines = {one.module: one.cosine for one in updates if one.cosine is not None}
        if self.threshold is not None:
            return {path for path, cosine in cosines.items() if cosine < self.threshold}
        return set(sorted(cosines, key=lambda path: cosines[path])[: self.layers])


def _read(adapter: Path, config: Mapping[str, Any], base: nn.Module) -> dict[str, Pair]:
    """A and B of every module in float32, checked against the base."""
    weights, rank, modules = adapter / ADAPTER_WEIGHTS, config["r"], dict(base.named_modules())
    pairs = {path: (a.float(), b.float()) for path, a, b in lora_pairs(weights)}
    if not pairs:
        raise CertificateError(f"{weights}: holds no tensors, so there is nothing to project")
    check_loaded(adapter, config, list(pairs), modules)
    for path, (a, b) in pairs.items():
        n_rows, width = weight_rows(base, path, "the base model").shape
        if a.shape != (rank, width) or b.shape != (n_rows, rank):
            raise CertificateError(
                f"{weights}: {path} has A {tuple(a.shape)} and B {tuple(b.shape)}, expected {(rank, width)} and "
                f"{(n_rows, rank)} for this model and r = {rank}"
            )
        if not (torch.isfinite(a).all() and torch.isfinite(b).all()):
            raise CertificateError(f"{weights}: {path} has values that are not finite")
    return pairs
