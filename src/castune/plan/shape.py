"""What of a model decides about work and memory, from its shapes alone.

Shape letters: L layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from castune.core.flops import ForwardFlops
from castune.core.heads import HeadLayout
from castune.core.units import UnitLayout
from castune.plan.work import Work

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class ModelShape:
    """What of a model decides about work and memory.

    Attributes:
        model_type: of the config.
        n_layers: decoder layers.
        n_units: query heads of all layers, or units of the kinds that are diagnosed.
        n_parameters: of the whole model.
        n_packed: of these, weights of the decoder's linear layers, which a quantised base packs.
        dtype: of the weights.
        hidden: width of the residual stream.
        vocabulary: outputs of the head.
        key_bytes: of one token's keys and values in all layers.
        flops: of a forward, by part.
        adapted_L: inputs and outputs of all projections of a layer that LoRA can adapt; 0 for a layer without units.
        outputs_L: outputs of all projections of a layer but those of experts, and of the widest alone.
    """

    model_type: str
    n_layers: int
    n_units: int
    n_parameters: int
    n_packed: int
    dtype: torch.dtype
    hidden: int
    vocabulary: int
    key_bytes: float
    flops: ForwardFlops
    adapted_L: tuple[tuple[int, int], ...]
    outputs_L: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, model: PreTrainedModel, units: UnitLayout) -> ModelShape:
        """The shape of a model without weights (`skeleton`), and of its units."""
        layout, dtype = units.heads, model.dtype
        layers = layout.decoder_layers(model)
        return cls(
            model_type=model.config.model_type,
            n_layers=layout.n_layers,
            n_units=len(units.units),
            n_parameters=sum(parameter.numel() for parameter in model.parameters()),
            n_packed=sum(
                module.weight.numel() for module in layers.modules() if isinstance(module, nn.Linear | Conv1D)
            ),
            dtype=dtype,
            hidden=model.get_input_embeddings().weight.shape[1],
            vocabulary=model.get_output_embeddings().weight.shape[0],
            key_bytes=dtype.itemsize * _key_numbers(model, layout),
            flops=ForwardFlops.of(model, layout),
            adapted_L=_adapted(model, units),
            outputs_L=tuple(map(_outputs, layers)),
        )

    @property
    def item_bytes(self) -> int:
        """Bytes of one weight."""
        return self.dtype.itemsize

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights."""
        return self.n_parameters * self.item_bytes

    @property
    def lowest(self) -> int:
        """The lowest layer with units, down to which gradients go: a quarter of the heads lies in almost all layers."""
        return next(layer for layer, (inputs, _) in enumerate(self.adapted_L) if inputs)

    @cached_property
    def adapter_width(self) -> int:
        """Inputs and outputs of all projections that can be adapted: the parameters of LoRA a rank."""
        return sum(map(sum, self.adapted_L))

    def step_flops(self, work: Work) -> float:
        """FLOPs of the decoding steps of some work."""
        a_token = sum(self.flops.token_L) + self.flops.scored
        return work.step_tokens * a_token + work.context * sum(self.flops.pair_L)

    def pass_flops(self, work: Work) -> float:
        """FLOPs of the passes of some work."""
        return work.layer_flops + work.n_scored * self.flops.scored

    def all_flops(self, work: Work) -> float:
        """All FLOPs of some work."""
        return self.pass_flops(work) + self.step_flops(work)


def _adapted(model: PreTrainedModel, units: UnitLayout) -> tuple[tuple[int, int], ...]:
    found = [(0, 0)] * units.heads.n_layers
    of_path = {part.path: (one.layer, part.transposed) for one in units.units for part in units.parts(one)}
    for path, (layer, transposed) in of_path.items():
        outputs, inputs = units.weight(model, path).shape
        if transposed:
            outputs, inputs = inputs, outputs
        found[layer] = (found[layer][0] + inputs, found[layer][1] + outputs)
    return tuple(found)


def _key_numbers(model: PreTrainedModel, layout: HeadLayout) -> float:
    """Keys and values of one token; by a forward without data, or as of full heads where that does not work (gpt2)."""
    n_tokens, dtype = 2, model.dtype
    ids = torch.zeros(1, n_tokens, dtype=torch.long, device="meta")
    try:
        with torch.no_grad():
            # Kernels of experts know no other dtype without data.
            layers = model.to(torch.bfloat16)(input_ids=ids, use_cache=True).past_key_values.layers
    except RuntimeError:  # NotImplementedError is one
        widths = (a.n_heads * (a.q_dim + a.o_dim) for a in layout.attention if a is not None)
        return float(sum(widths))
    finally:
        model.to(dtype)
    held = (getattr(layer, name, None) for layer in layers for name in ("keys", "values"))
    return float(sum(tensor.numel() for tensor in held if tensor is not None)) / n_tokens


def _outputs(layer: nn.Module) -> tuple[int, int]:
    transposed = {id(module.weight) for module in layer.modules() if isinstance(module, Conv1D)}
    matrices = [parameter for parameter in layer.parameters() if parameter.dim() == 2]
    outputs = [matrix.shape[1 if id(matrix) in transposed else 0] for matrix in matrices]
    return sum(outputs), max(outputs)
