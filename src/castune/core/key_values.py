"""Where the keys and values of a model's KV groups are computed: rows of a projection, named, checked and proven.

Grouped attention shares the keys and values of a KV group among its query heads. Their rows are found by names and
shapes as those of the queries are, and then proven by a probe of the attention module alone:

- a group whose values are set to zero gives exactly nothing to its own heads, and leaves the others as they were;
- noise on a group's keys moves its own heads, at later tokens too, and no others; set to zero they do not silence a
  head: where nothing is preferred, the head averages.

Shape letters: S sequence position, H query head, G KV group, K head width.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from castune.core.attention import SUPPORTED, AttentionLayer, features
from castune.core.heads import HeadLayout
from castune.core.modes import evaluation_mode
from castune.core.probes import BUT_THE_LAST, QUIET, Call, probed_input, recorded_calls, with_noise
from castune.errors import UnsupportedArchitecture

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_KEY, _VALUE = ("k_proj", "wk"), ("v_proj", "wv")


@dataclass(frozen=True)
class KeyValueLayer:
    """The key and value rows of one attention layer, in projections of their own or in a fused one."""

    attention: AttentionLayer
    key_name: str
    value_name: str
    n_groups: int
    k_dim: int
    v_dim: int
    n_key_rows: int
    """Rows of the whole key projection; of a fused one queries and values included."""
    n_value_rows: int

    @property
    def key_path(self) -> str:
        """Module path of the projection that holds the keys."""
        return f"{self.attention.path}.{self.key_name}"

    @property
    def value_path(self) -> str:
        """Module path of the projection that holds the values."""
        return f"{self.attention.path}.{self.value_name}"

    def key_rows(self, group: int) -> slice:
        """Rows of a group's keys."""
        return self._rows(group, self.k_dim, after_queries=0)

    def value_rows(self, group: int) -> slice:
        """Rows of a group's values."""
        return self._rows(group, self.v_dim, after_queries=1)

    def _rows(self, group: int, width: int, *, after_queries: int) -> slice:
        layout, heads_a_group = self.attention.layout, self.attention.n_heads // self.n_groups
        if layout == "separate":
            start = group * width
        elif layout == "block":  # [q | k | v]
            start = (self.attention.n_heads + after_queries * self.n_groups + group) * width
        else:  # [the group's queries | k | v] a group
            start = (group * (heads_a_group + 2) + heads_a_group + after_queries) * width
        return slice(start, start + width)


def locate_key_values(model: nn.Module, attention: AttentionLayer) -> KeyValueLayer:
    """The key and value rows of a layer, by names and shapes alone.

    Raises:
        UnsupportedArchitecture: keys and values have no rows of their own, or shapes do not fit.
    """
    module = model.get_submodule(attention.path)
    if attention.layout != "separate":
        name, width = attention.query_name, attention.q_dim
        n_rows = features(module.get_submodule(name))[1]
        return KeyValueLayer(attention, name, name, attention.n_kv_groups, width, width, n_rows, n_rows)
    parts = dict(module.named_children())
    key = next((name for name in _KEY if name in parts), None)
    value = next((name for name in _VALUE if name in parts), None)
    if key is None or value is None:
        raise _refusal(attention, f"no projection of keys and of values among {', '.join(parts)}")
    k_out, v_out = features(parts[key])[1], features(parts[value])[1]
    n_groups = v_out // attention.o_dim
    if not n_groups or v_out % attention.o_dim or k_out % n_groups or attention.n_heads % n_groups:
        raise _refusal(
            attention, f"{k_out} rows of {key} and {v_out} of {value} are no KV groups of {attention.n_heads} heads"
        )
    return KeyValueLayer(attention, key, value, n_groups, k_out // n_groups, attention.o_dim, k_out, v_out)


@torch.no_grad()
def probe_key_values(model: nn.Module, layers: list[KeyValueLayer]) -> None:
    """Prove the rows of each layer on its first two groups and the last.

    Raises:
        UnsupportedArchitecture: some rows do not do what keys or values do; the message names the layer.
    """
    global_norms = []
    with evaluation_mode(model):
        calls = recorded_calls(model, [layer.attention.path for layer in layers])
        for layer in layers:
            if layer.attention.path not in calls:
                raise _refusal(layer.attention, "the attention does not run in a forward")
            module = model.get_submodule(layer.attention.path)
            global_norms += [layer.attention.path] if _has_global_norm(module, layer) else []
            _probe(module, layer, calls[layer.attention.path])
    if global_norms:
        warnings.warn(
            f"{global_norms[0]} normalises keys across all KV groups: what is done to one group's keys changes the "
            "scale of the others.",
            stacklevel=5,  # the caller of UnitLayout.of; torch.no_grad is a frame of its own
        )


def _probe(module: nn.Module, layer: KeyValueLayer, call: Call) -> None:
    attention, output = layer.attention, module.get_submodule(layer.attention.output_name)
    noise = partial(with_noise, generator=torch.Generator().manual_seed(0), tokens=BUT_THE_LAST)

    def zero(output: Tensor, rows: slice) -> Tensor:
        silent = output.clone()
        silent[..., rows] = 0
        return silent

    def heads(name: str | None = None, rows: slice = slice(0), change: Callable[..., Tensor] = zero) -> Tensor:
        """The input of the output projection by head, `[S, H, K]`, with a change of some rows of a projection."""
        changed = None if name is None else (module.get_submodule(name), partial(change, rows=rows))
        found = probed_input(output, module, call, changed)
        return found.reshape(-1, attention.n_heads, attention.o_dim)

    before_SHK = heads()
    for group in sorted({0, 1, layer.n_groups - 1} & set(range(layer.n_groups))):
        own_H = torch.arange(attention.n_heads, device=before_SHK.device) // (attention.n_heads // layer.n_groups)
        own_H = own_H == group
        keys, values = layer.key_rows(group), layer.value_rows(group)
        moved_SH = (heads(layer.key_name, keys, noise) - before_SHK).abs().amax(-1)
        silenced_SHK = heads(layer.value_name, values)
        moved, limit = moved_SH[:, own_H].max(), QUIET * moved_SH[:, own_H].max()
        apart = (silenced_SHK - before_SHK)[:, ~own_H].abs()
        effect = None
        if moved == 0 or moved_SH[-1, own_H].max() == 0:
            effect = "noise on the key rows of group {} did not move what later tokens read"
        elif not own_H.all() and moved_SH[:, ~own_H].max() > limit and not _has_global_norm(module, layer):
            effect = "noise on the key rows of group {} also moved heads of other groups"
        elif not heads(layer.key_name, keys)[:, own_H].any():
            effect = "zero key rows silenced the heads of group {}: they hold values"
        elif silenced_SHK[:, own_H].any():
            effect = "the heads of group {} were not silent with its value rows at zero"
        elif apart.numel() and apart.max() > QUIET * before_SHK.abs().max():
            effect = "zero value rows of group {} also moved heads of other groups"
        if effect:
            raise _refusal(attention, effect.format(group))


def _has_global_norm(module: nn.Module, layer: KeyValueLayer) -> bool:
    """Whether a norm of the keys spans all groups (olmo2) instead of each group's width."""
    weight = getattr(getattr(module, "k_norm", None), "weight", None)
    return layer.n_groups > 1 and weight is not None and weight.shape == (layer.n_groups * layer.k_dim,)


def _refusal(attention: AttentionLayer, reason: str) -> UnsupportedArchitecture:
    return UnsupportedArchitecture(
        f"k_groups and v_groups: layer {attention.layer} ({attention.path}): {reason}; castune supports them where "
        f"keys and values of a group have rows of their own, in the families {SUPPORTED}, deepseek_v3 aside"
    )


def key_value_layers(
    model: PreTrainedModel, heads: HeadLayout, layers: list[int], *, prove: bool
) -> dict[int, KeyValueLayer]:
    """The key and value rows of `layers` by layer, proven unless the model has no weights."""
    found = {layer: locate_key_values(model, heads.at(layer)) for layer in layers}
    if prove:
        probe_key_values(model, list(found.values()))
    return found
