"""Units: what is diagnosed, chosen and trained as one. Query heads as in the paper, and other parts of a layer.

A unit owns slices of weights (whose gradients make O(h), and which training may change) and a slice of one module's
input or output (which ablation replaces):

| kind | trained | ablated |
|---|---|---|
| q_heads | a query head's rows of the query projection | its slice of the output projection's input |
| o_heads | a head's columns of the output projection | the same slice |
| k_groups | a KV group's rows of the key projection | its slice of the keys |
| v_groups | a KV group's rows of the value projection | its slice of the values |
| mlp_groups | a share of the neurons: rows of gate and up, columns of down | their slice of down's input |
| mlp_blocks | all neurons of a layer | the whole of it |

Biases belong to no unit: nothing trains them, and ablation leaves that of the outgoing projection in place.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from castune.artifacts.unit import QUERY_HEAD, Unit
from castune.core.heads import HeadLayout
from castune.core.key_values import KeyValueLayer, key_value_layers
from castune.core.mlps import MlpLayer, mlp_layers
from castune.errors import UnsupportedArchitecture


@dataclass(frozen=True)
class Part:
    """Rows or columns of a projection's weight, as a linear layer has them: rows are outputs, columns are inputs."""

    path: str
    """Module path of the projection."""
    axis: int
    """0: rows, 1: columns."""
    at: slice
    size: int
    """How many rows or columns the projection has."""
    transposed: bool
    """Whether the weight is stored as (inputs, outputs)."""

    def of(self, weight: Tensor) -> Tensor:
        """The part of a weight-shaped tensor, a view."""
        rows = weight.t() if self.transposed else weight
        return rows[self.at] if self.axis == 0 else rows[:, self.at]


@dataclass(frozen=True)
class Site:
    """Where the units of a kind and layer are ablated: spans (start, stop) of the input or output of a module."""

    path: str
    is_output: bool
    spans: tuple[tuple[int, int], ...]
    width: int

    @cached_property
    def owner_W(self) -> Tensor:
        """The unit that each channel belongs to; -2 for none."""
        owner = torch.full((self.width,), -2)
        for number, (start, stop) in enumerate(self.spans):
            owner[start:stop] = number
        return owner


@dataclass(frozen=True)
class UnitLayout:
    """All units of some kinds of a model, and where they live. Holds no reference to the model."""

    heads: HeadLayout
    kinds: tuple[str, ...] = (QUERY_HEAD,)
    n_mlp_groups: int = 0
    """Groups that the neurons of a layer are cut into."""
    key_values: dict[int, KeyValueLayer] = field(default_factory=dict)
    mlps: dict[int, MlpLayer] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        model: nn.Module,
        heads: HeadLayout,
        kinds: Sequence[str] = (QUERY_HEAD,),
        *,
        n_mlp_groups: int = 0,
        layers: Sequence[int] | None = None,
        prove: bool = True,
    ) -> UnitLayout:
        """Locate units and prove where they are, as `HeadLayout.of` has done for heads.

        Args:
            model: the model.
            heads: its head layout.
            kinds: of `castune.names.KINDS`, in the singular.
            n_mlp_groups: groups that the neurons of a layer are cut into.
            layers: locate units in these layers only.
            prove: run the probes; not on models without weights.

        Raises:
            UnsupportedArchitecture: a unit of an asked kind could not be located; the message names the layer.
        """
        wanted = range(heads.n_layers) if layers is None else sorted(set(layers))
        with_heads = [layer for layer in wanted if heads.n_heads(layer)]
        of_groups = {"k_group", "v_group"} & set(kinds)
        of_mlps = {"mlp_block", "mlp_group"} & set(kinds)
        n_groups = n_mlp_groups if "mlp_group" in kinds else 1
        return cls(
            heads=heads,
            kinds=tuple(kinds),
            n_mlp_groups=n_mlp_groups,
            key_values=key_value_layers(model, heads, with_heads, prove=prove) if of_groups else {},
            mlps=mlp_layers(model, heads, list(wanted), n_groups, prove=prove) if of_mlps else {},
        )

    @classmethod
    def locatable(cls, model: nn.Module, heads: HeadLayout, *, n_mlp_groups: int = 0) -> tuple[UnitLayout, list[str]]:
        """All kinds of unit that can be located in a model, and for each of the others the reason why not.

        Args:
            model: the model.
            heads: its head layout.
            n_mlp_groups: groups that the neurons of a layer are cut into; 0: MLPs are whole.
        """
        found, reasons = cls(heads, ("q_head",)), []
        for kinds in (("k_group", "v_group"), ("o_head",), ("mlp_group" if n_mlp_groups else "mlp_block",)):
            try:
                one = cls.of(model, heads, kinds, n_mlp_groups=n_mlp_groups)
            except UnsupportedArchitecture as error:
                reasons.append(str(error))
                continue
            key_values, mlps = one.key_values or found.key_values, one.mlps or found.mlps
            found = cls(heads, (*found.kinds, *kinds), n_mlp_groups, key_values, mlps)
        return found, reasons

    def n_units(self, kind: str, layer: int) -> int:
        """Number of units of a kind in a layer."""
        if kind in ("q_head", "o_head"):
            return self.heads.n_heads(layer)
        if kind in ("k_group", "v_group"):
            return self.key_values[layer].n_groups if layer in self.key_values else 0
        return (self.n_mlp_groups if kind == "mlp_group" else 1) if layer in self.mlps else 0

    @cached_property
    def units(self) -> tuple[Unit, ...]:
        """All units, kind by kind, each sorted by layer and index."""
        return tuple(
            Unit(kind, layer, index)
            for kind in self.kinds
            for layer in range(self.heads.n_layers)
            for index in range(self.n_units(kind, layer))
        )

    def parts(self, one: Unit) -> tuple[Part, ...]:
        """The slices of weights that a unit owns."""
        kind, layer, index = one
        if kind in ("q_head", "o_head"):
            attention = self.heads.at(layer)
            if kind == "q_head":
                n_rows = attention.n_query_rows
                at = attention.query_rows(index)
                return (Part(attention.query_path, 0, at, n_rows, attention.transposed),)
            n_columns = attention.n_heads * attention.o_dim
            return (Part(attention.output_path, 1, attention.output_columns(index), n_columns, attention.transposed),)
        if kind in ("k_group", "v_group"):
            found = self.key_values[layer]
            path, at, n_rows = (
                (found.key_path, found.key_rows(index), found.n_key_rows)
                if kind == "k_group"
                else (found.value_path, found.value_rows(index), found.n_value_rows)
            )
            return (Part(path, 0, at, n_rows, found.attention.transposed),)
        mlp, neurons = self.mlps[layer], self._neurons(one)
        rows = [Part(path, 0, at, mlp.n_in_rows, mlp.transposed) for path, at in mlp.in_rows(neurons)]
        return (*rows, Part(mlp.out_path, 1, neurons, mlp.n_neurons, mlp.transposed))

    def site(self, kind: str, layer: int) -> Site:
        """Where the units of a kind and layer are ablated."""
        numbers = range(self.n_units(kind, layer))
        if kind in ("q_head", "o_head"):
            attention = self.heads.at(layer)
            columns = _spans([attention.output_columns(head) for head in numbers])
            return Site(attention.output_path, False, columns, attention.n_heads * attention.o_dim)
        if kind in ("k_group", "v_group"):
            found = self.key_values[layer]
            if kind == "k_group":
                return Site(found.key_path, True, _spans(map(found.key_rows, numbers)), found.n_key_rows)
            return Site(found.value_path, True, _spans(map(found.value_rows, numbers)), found.n_value_rows)
        mlp = self.mlps[layer]
        neurons = _spans(self._neurons(Unit(kind, layer, number)) for number in numbers)
        return Site(mlp.out_path, False, neurons, mlp.n_neurons)

    def weight(self, model: nn.Module, path: str) -> Any:
        """The weight at a module path of `parts`, a parameter."""
        return model.get_submodule(path).weight

    def _neurons(self, one: Unit) -> slice:
        mlp = self.mlps[one.layer]
        return mlp.groups(self.n_mlp_groups)[one.index] if one.kind == "mlp_group" else slice(0, mlp.n_neurons)


def _spans(slices: Iterable[slice]) -> tuple[tuple[int, int], ...]:
    return tuple((at.start, at.stop) for at in slices)
