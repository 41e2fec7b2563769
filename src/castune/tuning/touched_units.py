"""The units that an adapter changes where nothing but its tensors says which, and adapters written of them.

A certificate is for whole units: an adapter of the up-projection alone is certified as one of the MLP.

Shape letters: R LoRA rank, M outputs and N inputs of a module.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor, nn

from castune.artifacts import HeadSelection
from castune.artifacts.tune_result import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from castune.core.heads import HeadLayout
from castune.core.provenance import fingerprint
from castune.core.quantisation import dense_weight
from castune.core.units import UnitLayout
from castune.errors import CertificateError
from castune.tuning.adapter_files import PREFIX, addressed_modules
from castune.tuning.targets import Target, targets

# A and B of a module: `[R, N]` and `[M, R]`.
Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class TouchedUnits:
    """All units that own a part of the modules of an adapter: what it may have changed, if no selection says otherwise.

    Attributes:
        selection: these units.
        wanted: the modules that hold a part of them, by path: some may be beside those of the adapter, since an MLP is
            one unit.
        base: the base model.
    """

    selection: HeadSelection
    wanted: Mapping[str, Target]
    base: nn.Module

    @classmethod
    def by(cls, base: nn.Module, adapter: Path, paths: Collection[str]) -> TouchedUnits:
        """The units that own the modules of an adapter.

        Raises:
            CertificateError: a module, or a part of one, belongs to no unit.
        """
        layout, reasons = UnitLayout.locatable(base, HeadLayout.of(base))
        units = [one for one in layout.units if any(part.path in paths for part in layout.parts(one))]
        kinds = {one.kind for one in units}
        selection = HeadSelection.custom(
            [(one.layer, one.index) for one in units if one.is_head],
            n_total=sum(one.kind in kinds for one in layout.units),
            model_fingerprint=fingerprint(base),
            units=[one for one in units if not one.is_head],
        )
        wanted = targets(layout, selection)
        free = [path for path in paths if path not in wanted or not wanted[path].mask.all()]
        if free:
            why = f" ({reasons[0]})" if reasons else ""
            raise CertificateError(
                f"{adapter / ADAPTER_WEIGHTS}: {PREFIX}{free[0]} has parts that belong to no unit{why}, so nothing "
                "could be certified; accepted: projections of attention and of dense MLPs; castune mask keeps those "
                "of the query heads"
            )
        return cls(selection, wanted, base)

    def filled(self, pairs: Mapping[str, Pair]) -> dict[str, Pair]:
        """A and B of every module of the units, with updates of zero where the adapter has none."""
        some_a, _ = next(iter(pairs.values()))
        found = dict(pairs)
        for path in self.wanted.keys() - pairs.keys():
            n_rows, width = self.wanted[path].rows_of(dense_weight(self.base.get_submodule(path))).shape
            rank = len(some_a)
            found[path] = some_a.new_zeros(rank, width), some_a.new_zeros(n_rows, rank)
        return found


def write_pairs(adapter: Path, folder: Path, pairs: Mapping[str, Pair], modules: Collection[str]) -> None:
    """Write the settings of an adapter with other tensors."""
    config = json.loads((adapter / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    names = config["target_modules"]
    is_plain = isinstance(names, list) and not (config.get("layers_pattern") or config.get("exclude_modules"))
    if not is_plain or addressed_modules(config, modules) != pairs.keys():
        # A pattern, or names that leave out a module which the certificate asks for.
        nothing = dict.fromkeys(("layers_to_transform", "layers_pattern", "exclude_modules"))
        config |= {**nothing, "target_modules": sorted(pairs)}
    (folder / ADAPTER_CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")
    tensors = {}
    for path, (a, b) in pairs.items():
        tensors[f"{PREFIX}{path}.lora_A.weight"] = a.contiguous()
        tensors[f"{PREFIX}{path}.lora_B.weight"] = b.contiguous()
    save_file(tensors, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
