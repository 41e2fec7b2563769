"""Where the dense MLPs of a model live, and which rows and columns a neuron of theirs owns.

Neuron n of an MLP owns row n of every projection that leads into it (gate and up, fused or not, or the only one) and
column n of the projection that leads out. All are found by names and shapes, and proven by a probe: noise on the
claimed rows of a group of neurons must move that group's slice of the outgoing projection's input and nothing else of
it. Mixtures of experts are refused: which tokens an expert's neuron sees is up to a router.

Shape letters: D model width, N neuron.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import nn

from castune.core.attention import features
from castune.core.heads import HeadLayout
from castune.core.modes import evaluation_mode
from castune.core.probes import QUIET, Call, probed_input, recorded_calls, with_noise
from castune.errors import UnsupportedArchitecture
from castune.stats.ranking import equal_parts

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Names of the projections into the neurons, then of the one out of them.
_SHAPES: tuple[tuple[tuple[str, ...], str], ...] = (
    (("gate_proj", "up_proj"), "down_proj"),
    (("w1", "w3"), "w2"),
    (("gate_up_proj",), "down_proj"),
    (("c_fc",), "c_proj"),
    (("fc1",), "fc2"),
    (("dense_h_to_4h",), "dense_4h_to_h"),
    (("up_proj",), "down_proj"),
)
_EXPERTS = ("experts", "shared_expert", "shared_experts", "router")
_SUPPORTED = (
    "gated MLPs (gate, up and down, or gate and up fused, as in llama, qwen, gemma and phi3) and plain ones (as in "
    "gpt2, opt, gpt_neox, bloom, falcon and starcoder2)"
)


@dataclass(frozen=True)
class MlpLayer:
    """The dense MLP of one decoder layer."""

    layer: int
    path: str
    """Of the module that owns the projections: the MLP, or the decoder layer itself (opt)."""
    in_names: tuple[str, ...]
    out_name: str
    n_neurons: int
    fused: bool
    """Whether gate and up are halves of one projection."""
    transposed: bool

    def groups(self, n_groups: int) -> list[slice]:
        """The neurons in contiguous groups whose sizes differ by at most one."""
        parts = equal_parts(range(self.n_neurons), n_groups)
        return [slice(part[0], part[-1] + 1) for part in parts]

    def in_rows(self, neurons: slice) -> list[tuple[str, slice]]:
        """(module path, rows) of everything that leads into these neurons."""
        paths = [f"{self.path}.{name}" for name in self.in_names]
        if self.fused:
            upper = slice(self.n_neurons + neurons.start, self.n_neurons + neurons.stop)
            return [(paths[0], neurons), (paths[0], upper)]
        return [(path, neurons) for path in paths]

    @property
    def n_in_rows(self) -> int:
        """Rows of each projection into the neurons."""
        return self.n_neurons * (2 if self.fused else 1)

    @property
    def out_path(self) -> str:
        """Module path of the projection out of the neurons."""
        return f"{self.path}.{self.out_name}"


def mlp_layers(
    model: PreTrainedModel, heads: HeadLayout, layers: Sequence[int], n_groups: int, *, prove: bool
) -> dict[int, MlpLayer]:
    """The MLPs of `layers` by layer, proven unless the model has no weights.

    Raises:
        UnsupportedArchitecture: a layer has a mixture of experts or an MLP of another make; the message names it.
    """
    modules = heads.decoder_layers(model)
    found = {layer: _locate(modules[layer], layer, f"{heads.decoder_path}.{layer}", n_groups) for layer in layers}
    if prove:
        _probe(model, list(found.values()), n_groups)
    return found


def _locate(layer_module: nn.Module, layer: int, layer_path: str, n_groups: int) -> MlpLayer:
    expert = next((name for name, _ in layer_module.named_modules() if name.split(".")[-1] in _EXPERTS), None)
    if expert is not None:
        raise _refusal(layer, f"{layer_path}.{expert}", "this MLP is a mixture of experts")
    for name, owner in [("", layer_module), *layer_module.named_children()]:
        parts = dict(owner.named_children())
        for in_names, out_name in _SHAPES:
            if out_name in parts and all(part in parts for part in in_names):
                path = f"{layer_path}.{name}" if name else layer_path
                return _checked(layer, path, parts, in_names, out_name, n_groups)
    raise _refusal(layer, layer_path, "no MLP with projections of known names")


def _checked(
    layer: int, path: str, parts: dict[str, nn.Module], in_names: tuple[str, ...], out_name: str, n_groups: int
) -> MlpLayer:
    into, out = [features(parts[name]) for name in in_names], features(parts[out_name])
    n_neurons, fused = out[0], in_names == ("gate_up_proj",)
    expected = (out[1], n_neurons * (2 if fused else 1))
    if any(shape != expected for shape in into):
        raise _refusal(layer, path, f"{', '.join(in_names)} are {into} and {out_name} is {out}, which do not fit")
    if n_groups > n_neurons:
        raise _refusal(layer, path, f"{n_neurons} neurons cannot be cut into {n_groups} groups")
    transposed = type(parts[out_name]).__name__ == "Conv1D"
    return MlpLayer(layer, path, in_names, out_name, n_neurons, fused, transposed)


@torch.no_grad()
def _probe(model: nn.Module, layers: Sequence[MlpLayer], n_groups: int) -> None:
    """Prove the first two groups of each layer and the last, every projection into them on its own."""
    with evaluation_mode(model):
        calls = recorded_calls(model, [mlp.path for mlp in layers])
        for mlp in layers:
            if mlp.path not in calls:
                raise _refusal(mlp.layer, mlp.path, "this MLP does not run in a forward")
            _probe_layer(model, mlp, calls[mlp.path], n_groups)


def _probe_layer(model: nn.Module, mlp: MlpLayer, call: Call, n_groups: int) -> None:
    groups = mlp.groups(n_groups)
    module, out = model.get_submodule(mlp.path), model.get_submodule(mlp.out_path)
    before = probed_input(out, module, call)
    for number in sorted({0, 1, len(groups) - 1} & set(range(len(groups)))):
        neurons = groups[number]
        for path, rows in mlp.in_rows(neurons):
            after = probed_input(out, module, call, (model.get_submodule(path), partial(with_noise, rows=rows)))
            moved_N = (after - before).abs().flatten(0, -2).amax(0)
            own = moved_N[neurons].max()
            others = torch.cat([moved_N[: neurons.start], moved_N[neurons.stop :]])
            effect = None
            if own == 0:
                effect = "did not move its neurons"
            elif others.numel() and others.max() > QUIET * own:
                effect = "also moved neurons of other groups"
            if effect:
                raise _refusal(mlp.layer, path, f"noise on the rows of group {number} {effect}")


def _refusal(layer: int, path: str, reason: str) -> UnsupportedArchitecture:
    return UnsupportedArchitecture(
        f"mlp_blocks and mlp_groups: layer {layer} ({path}): {reason}; castune supports {_SUPPORTED}. Layers can be "
        "chosen (diagnose.layers), and heads be diagnosed alone (diagnose.units)"
    )
