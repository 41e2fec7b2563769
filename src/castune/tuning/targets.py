"""What a selection may change: rows or columns of projections, by module path."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from castune.artifacts import HeadSelection, Unit
from castune.artifacts.fingerprints import same_model
from castune.core.heads import HeadLayout
from castune.core.provenance import fingerprint
from castune.core.units import UnitLayout
from castune.errors import CastuneError
from castune.names import kind_words


@dataclass(frozen=True)
class Target:
    """A projection that holds a part of a selected unit.

    Attributes:
        layer: of the projection.
        axis: 0 where units own rows of it (LoRA's B is masked), 1 where they own columns (LoRA's A is masked).
        mask: True for the selected rows or columns.
        transposed: whether the weight is stored as (inputs, outputs).
    """

    layer: int
    axis: int
    mask: Tensor
    transposed: bool

    def rows_of(self, weight: Tensor) -> Tensor:
        """The weight as `[rows, columns]`, a view."""
        return weight.t() if self.transposed else weight

    def lines_of(self, weight: Tensor) -> Tensor:
        """The weight with what is masked along the first axis, a view."""
        rows = self.rows_of(weight)
        return rows if self.axis == 0 else rows.t()

    @property
    def what(self) -> str:
        """What its mask is over, in words."""
        return "rows" if self.axis == 0 else "columns"


def selected_units(selection: HeadSelection) -> list[Unit]:
    """The units of a selection, layer by layer."""
    return sorted(selection.units, key=lambda one: one.layer)


def units_for(model: nn.Module, layout: HeadLayout, selection: HeadSelection) -> UnitLayout:
    """Where the units of a selection are, checked: see `check_selection`; those of other layers are not located."""
    check_selection(model, layout, selection)
    layers = [layer for layer in selection.layers if 0 <= layer < layout.n_layers]
    found = UnitLayout.of(model, layout, selection.kinds, n_mlp_groups=selection.mlp_groups or 0, layers=layers)
    unknown = sorted(set(selection.units) - set(found.units))
    if unknown:
        named = (f"{kind_words(kind, 1)} {index} of layer {layer}" for kind, layer, index in unknown[:5])
        raise CastuneError(f"the selection names units this model does not have: {', '.join(named)}")
    return found


def check_selection(model: nn.Module, layout: HeadLayout, selection: HeadSelection) -> None:
    """Refuse a selection that is empty, was made for another model, or names heads that do not exist."""
    if not selection.units:
        raise CastuneError("the selection has no heads; nothing would be trained")
    found = fingerprint(model)
    if not same_model(selection.model_fingerprint, found):
        raise CastuneError(
            f"the selection was made for model {selection.model_fingerprint}, this model is {found}; "
            "diagnose this model and select again"
        )
    unknown = sorted(set(selection.heads) - set(layout.heads))
    if unknown:
        raise CastuneError(f"the selection names heads this model does not have: {unknown[:5]}")


def targets(layout: UnitLayout, selection: HeadSelection) -> dict[str, Target]:
    """The projections that a selection may change, by module path, and what of each."""
    found: dict[str, Target] = {}
    for one in selected_units(selection):
        for part in layout.parts(one):
            if part.path not in found:
                nothing = torch.zeros(part.size, dtype=torch.bool)
                found[part.path] = Target(one.layer, part.axis, nothing, part.transposed)
            # Units of several kinds may share a fused projection; rows and columns are never selected of one.
            assert found[part.path].axis == part.axis
            found[part.path].mask[part.at] = True
    return found
