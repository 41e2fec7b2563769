"""The certificate: an adapter, merged, changes the rows and columns of the selected units and nothing else."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from castune.artifacts import Certificate, HeadSelection
from castune.artifacts.tune_result import ADAPTER_CONFIG, ADAPTER_WEIGHTS, adapter_hash
from castune.core.heads import HeadLayout
from castune.core.quantisation import dense_weight
from castune.core.units import UnitLayout
from castune.errors import CertificateError
from castune.tuning.adapter_files import (
    PREFIX,
    addressed_modules,
    lora_pairs,
    plain_lora_config,
    scaling_of,
)
from castune.tuning.targets import Target, targets, units_for


def certify(base: nn.Module, adapter: str | Path, selection: HeadSelection) -> Certificate:
    """Compare the merged model with its base, bit by bit.

    Args:
        base: the base model, without an adapter. Of a quantised one the dequantised weights are compared.
        adapter: directory of a PEFT LoRA adapter (`adapter_config.json`, `adapter_model.safetensors`).
        selection: the heads, and units of other kinds, that may have changed.

    Returns:
        The certificate.

    Raises:
        CertificateError: the adapter is no plain LoRA adapter, addresses another tensor, or changes an unselected
            row or column; the message names it.
    """
    layout = units_for(base, HeadLayout.of(base), selection)
    return certificate_of(
        {path: dense_weight(base.get_submodule(path)) for path in targets(layout, selection)},
        layout,
        Path(adapter),
        selection,
        n_tensors=sum(1 for _ in base.named_parameters()),
        modules=[name for name, _ in base.named_modules()],
    )


def certificate_of(
    projections: Mapping[str, Tensor],
    layout: UnitLayout,
    adapter: Path,
    selection: HeadSelection,
    *,
    n_tensors: int,
    modules: Collection[str],
) -> Certificate:
    """The certificate of an adapter from the weights of the base it could change: see `certify`.

    Args:
        projections: weights of the projections that hold a part of a selected unit, by module path.
        layout: where the selected units are.
        adapter: directory of a PEFT LoRA adapter.
        selection: the heads that may have changed, all of this base.
        n_tensors: number of the base's tensors.
        modules: paths of all modules of the base.
    """
    config, wanted = plain_lora_config(adapter), targets(layout, selection)
    _check_addressed(adapter, config, selection, wanted.keys(), modules)
    weights = adapter / ADAPTER_WEIGHTS
    missing, counts, largest = dict(wanted), Counter[str](), 0.0
    for path, a, b in lora_pairs(weights):
        if path not in missing:
            raise CertificateError(f"{weights}: the adapter changes {PREFIX}{path}, which holds no selected head")
        merging = _Merging.of(missing.pop(path), projections[path], a, b, config, f"{weights}: {path}")
        merging.check()
        counts += merging.counts
        largest = max(largest, merging.largest_change)
    if missing:
        raise CertificateError(
            f"{weights}: the adapter lacks the selected layers {sorted({t.layer for t in missing.values()})}"
        )
    return Certificate(
        model_fingerprint=selection.model_fingerprint,
        units=selection.units,
        adapter_hash=adapter_hash(adapter),
        checked_rows=counts["checked_rows"],
        checked_tensors=n_tensors,
        changed_rows=counts["changed_rows"],
        selected_rows=counts["selected_rows"],
        largest_change=largest,
        mlp_groups=selection.mlp_groups,
        checked_columns=counts["checked_columns"],
        changed_columns=counts["changed_columns"],
        selected_columns=counts["selected_columns"],
    )


def _check_addressed(
    adapter: Path,
    config: Mapping[str, Any],
    selection: HeadSelection,
    wanted: Collection[str],
    modules: Collection[str],
) -> None:
    """Refuse an adapter whose settings address other modules of the base than `wanted`, as PEFT would match them.

    Modules that the file has no weights for would be initialised when it is loaded, B at random if so configured.
    """
    path, names, layers = adapter / ADAPTER_CONFIG, config["target_modules"], config.get("layers_to_transform")
    for key in ("layers_pattern", "exclude_modules"):
        if config.get(key):
            raise CertificateError(f"{path}: {key} is {config[key]!r}, accepted here: none")
    if not isinstance(names, list):
        raise CertificateError(f"{path}: target_modules is {names!r}, accepted: a list of module paths, or names")
    if layers is not None and (not isinstance(layers, list) or sorted(layers) != list(selection.layers)):
        raise CertificateError(f"{path}: layers_to_transform is {layers!r}, accepted here: {list(selection.layers)}")
    different = sorted(addressed_modules(config, modules) ^ set(wanted))
    if different:
        is_wanted = different[0] in wanted
        raise CertificateError(
            f"{path}: target_modules = {names!r} with layers_to_transform = {layers!r} "
            + (
                f"does not address {different[0]}, which holds a selected unit"
                if is_wanted
                else f"addresses {different[0]}, which holds no selected unit"
            )
        )


@dataclass(frozen=True)
class _Merging:
    """One projection before and after an adapter is merged into it, `[rows, columns]` both.

    Attributes:
        target: what of it is selected.
        before: its weight.
        after: its weight with the update.
        name: of the projection, for messages.
    """

    target: Target
    before: Tensor
    after: Tensor
    name: str

    @classmethod
    def of(cls, target: Target, weight: Tensor, a: Tensor, b: Tensor, config: Mapping[str, Any], name: str) -> _Merging:
        before, rank = target.rows_of(weight.cpu()), config["r"]
        if a.shape != (rank, before.shape[1]) or b.shape != (before.shape[0], rank):
            raise CertificateError(
                f"{name} has A {tuple(a.shape)} and B {tuple(b.shape)}, expected "
                f"{(rank, before.shape[1])} and {(before.shape[0], rank)} for r = {rank}"
            )
        return cls(target, before, merged_rows(before, a, b, scaling_of(config)), name)

    @cached_property
    def changed(self) -> Tensor:
        """Which rows or columns change."""
        # Adding the zero delta of an unselected row turns -0.0 into +0.0: the same number.
        differs = (self.after != self.before) & (bits(self.after) != bits(self.before.contiguous()))
        return differs.any(1 - self.target.axis)

    def check(self) -> None:
        """Refuse a change outside the selection, and values that are not finite."""
        what, outside = self.target.what, (self.changed & ~self.target.mask).nonzero().flatten().tolist()
        if outside:
            matrix = "B" if self.target.axis == 0 else "A"
            raise CertificateError(
                f"{self.name} changes {len(outside)} unselected {what}, the first is {outside[0]}: its "
                f"{matrix} did not start at zero there, or was trained without the mask; castune mask keeps the "
                "selected rows alone"
            )
        if not torch.isfinite(self.after).all():
            raise CertificateError(f"{self.name} has values that are not finite after merging")

    @property
    def counts(self) -> Counter[str]:
        """How many rows or columns were checked, and selected ones are there and changed."""
        mask, what = self.target.mask, self.target.what
        return Counter(
            {
                f"checked_{what}": int((~mask).sum()),
                f"selected_{what}": int(mask.sum()),
                f"changed_{what}": int((self.changed & mask).sum()),
            }
        )

    @property
    def largest_change(self) -> float:
        """Largest absolute change of a weight."""
        return (self.after.float() - self.before.float()).abs().max().item()


def merged_rows(rows: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """`rows + scaling * (b @ a)`, with the arithmetic of PEFT's `merge_and_unload`.

    PEFT reads 16-bit adapters as float32; only the sum is rounded to the dtype of the base.

    Args:
        rows: weight of the projection, `[rows, D]`.
        a: LoRA's A, `[R, D]`.
        b: LoRA's B, `[rows, R]`.
        scaling: of the adapter (`adapter_files.scaling_of`).
    """
    if a.dtype in (torch.float16, torch.bfloat16):
        a, b = a.float(), b.float()
    return (rows + (b @ a) * scaling).to(rows.dtype).contiguous()


def bits(tensor: Tensor) -> Tensor:
    """The tensor's bits as integers of the same shape, so that comparison sees the payload of NaN."""
    return tensor.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])
