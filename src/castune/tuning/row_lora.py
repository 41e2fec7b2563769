"""Head-sparse LoRA: a plain PEFT adapter that acts on chosen rows and columns only.

Units that own rows of a projection (query heads, KV groups, neurons of gate and up) are held apart by LoRA's B: it
multiplies its weight by a row mask in forward. Rows outside the selection start at zero, get zero gradients and stay
exactly zero under every optimiser and weight decay, also under FSDP2, where gradient hooks are lost silently. Units
that own columns (heads of the output projection, neurons of down) are held apart by A in the same way, column by
column. The saved adapter is an ordinary LoRA adapter.

Shape letters: R LoRA rank, D model width.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from castune.artifacts import HeadSelection
from castune.core.heads import HeadLayout
from castune.core.units import UnitLayout
from castune.errors import CastuneError
from castune.names import plural
from castune.tuning.adapter_files import ADAPTER_NAME, PREFIX
from castune.tuning.targets import Target, targets, units_for

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class MaskedLinear(nn.Linear):
    """A LoRA B, `[rows, R]`, or A, `[R, columns]`, that is zero outside the chosen units in forward and gradient."""

    unit_mask: Tensor
    """`[rows, 1]` or `[1, columns]`."""

    def applied(self, weight: Tensor) -> Tensor:
        """What a weight of this shape acts as."""
        return weight * self.unit_mask.to(weight.dtype)

    def forward(self, input: Tensor) -> Tensor:
        """Apply the masked weight."""
        return functional.linear(input, self.applied(self.weight), self.bias)


def sparse_lora(
    model: PreTrainedModel,
    selection: HeadSelection,
    *,
    r: int = 32,
    alpha: float = 32,
    freeze_a: bool = False,
    seed: int | None = None,
) -> Any:
    """Put LoRA on what the selected heads and other units own: a plain `PeftModel`, for any training loop.

    Without `seed` set torch's seed before calling: A is initialised at random here.

    Args:
        model: the base model the selection was made for, or it quantised. PEFT wraps its layers in place.
        selection: the heads, and units of other kinds, to train.
        r: LoRA rank.
        alpha: LoRA alpha; updates are scaled by alpha / r.
        freeze_a: train B alone. A (r x hidden) is shared by all heads of a layer, so only then do selections
            with equal head counts have exactly equal budgets. (Units that own columns share B instead.)
        seed: A of a layer begins with values that this and the layer alone determine, as PEFT draws them, so that
            selections which share a layer begin alike there.

    Raises:
        CastuneError: the selection belongs to another model, or is empty; or the model wears an adapter already.
        UnsupportedArchitecture: selected units of another kind than query heads could not be located.
    """
    from peft import get_peft_model

    _refuse_adapted(model)
    layout = HeadLayout.of(model)
    wanted = targets(units_for(model, layout, selection), selection)
    peft_model = get_peft_model(model, lora_config(model, layout, selection, wanted, r=r, alpha=alpha))
    wrapped = {path for path, _ in lora_layers(peft_model)}
    if wrapped != wanted.keys():
        peft_model.unload()
        raise CastuneError(f"PEFT wrapped {sorted(wrapped ^ wanted.keys())} beside the selected layers of this model")
    for path, target in wanted.items():
        module = peft_model.base_model.model.get_submodule(path)
        if seed is not None:
            draw_a(module.lora_A[ADAPTER_NAME].weight, f"{seed}/{path}")
        _mask(module, target)
        if freeze_a:
            module.lora_A[ADAPTER_NAME].weight.requires_grad_(False)
    return peft_model


def lora_config(
    model: nn.Module,
    layout: HeadLayout,
    selection: HeadSelection,
    wanted: Mapping[str, Target],
    *,
    r: int,
    alpha: float,
) -> Any:
    """The `LoraConfig` of plain LoRA on the projections that hold a part of a selected unit, and on no others."""
    from peft import LoraConfig

    names = {path.rpartition(".")[2] for path in wanted}
    # Names and layers could not tell apart projections that are chosen in different layers.
    by_path = not selection.only_heads or _names_others(model, layout, names)
    return LoraConfig(
        r=r,
        lora_alpha=alpha,
        lora_dropout=0.0,
        bias="none",
        target_modules=sorted(wanted if by_path else names),
        layers_to_transform=None if by_path else list(selection.layers),
        fan_in_fan_out=any(target.transposed for target in wanted.values()),
        task_type="CAUSAL_LM",
    )


def _names_others(model: nn.Module, layout: HeadLayout, names: Collection[str]) -> bool:
    """Whether other modules are called as the query projections are: those of a vision tower, say."""
    paths = {layout.at(layer).query_path for layer in layout.layers_with_heads}
    return any(path.rpartition(".")[2] in names and path not in paths for path, _ in model.named_modules())


def _refuse_adapted(model: nn.Module) -> None:
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer):
            raise CastuneError(
                f"{name} carries an adapter already, whose values no mask would hold at zero; merge it "
                "(merge_and_unload), remove it (unload), or load the base model again"
            )


def lora_layers(peft_model: nn.Module) -> list[tuple[str, Any]]:
    """(path in the base model, module) of every module that carries a LoRA adapter."""
    return [
        (name.removeprefix(PREFIX), module) for name, module in peft_model.named_modules() if hasattr(module, "lora_B")
    ]


def budget(peft_model: nn.Module, layout: UnitLayout, selection: HeadSelection) -> dict[str, int]:
    """What is trained: heads, their query rows, A matrices, and parameters.

    `trainable_parameters` is what the optimiser sees; `effective_parameters` leaves out the masked rows of B and
    columns of A, whose value is always zero. With units of other kinds also how many of each (`k_groups`, ...), and the
    `rows` and `columns` of all of them.
    """
    wanted = targets(layout, selection)
    n_trained_a = n_effective = 0
    for path, module in lora_layers(peft_model):
        target = wanted[path]
        a, b = module.lora_A[ADAPTER_NAME].weight, module.lora_B[ADAPTER_NAME].weight
        rank, n_chosen = a.shape[0], int(target.mask.sum())
        n_effective += rank * n_chosen if target.axis == 0 else b.numel()
        if a.requires_grad:
            n_trained_a += 1
            n_effective += a.numel() if target.axis == 0 else rank * n_chosen
    found = {
        "heads": len(selection.heads),
        "query_rows": sum(at.stop - at.start for at in (layout.heads.query_rows(*head) for head in selection.heads)),
        "a_matrices": n_trained_a,
        "trainable_parameters": sum(p.numel() for p in peft_model.parameters() if p.requires_grad),
        "effective_parameters": n_effective,
    }
    if not selection.only_heads:
        found |= Counter(plural(one.kind) for one in selection.units if not one.is_head)
        for axis, name in enumerate(("rows", "columns")):
            found[name] = sum(int(target.mask.sum()) for target in wanted.values() if target.axis == axis)
    return found


@torch.no_grad()
def draw_a(weight: Tensor, key: str) -> None:
    """Fill an A with PEFT's own distribution, from a generator that the key alone determines."""
    number = int.from_bytes(hashlib.sha256(key.encode()).digest()[:6])
    drawn = torch.empty(weight.shape)
    nn.init.kaiming_uniform_(drawn, a=math.sqrt(5), generator=torch.Generator().manual_seed(number))
    weight.copy_(drawn)


def _mask(module: Any, target: Target) -> None:
    """Let B or A of an adapted projection act on the chosen rows or columns only."""
    matrix = (module.lora_B if target.axis == 0 else module.lora_A)[ADAPTER_NAME]
    mask = target.mask[:, None] if target.axis == 0 else target.mask[None]
    matrix.__class__ = MaskedLinear
    matrix.register_buffer("unit_mask", mask.to(matrix.weight.device), persistent=False)
    with torch.no_grad():
        matrix.weight *= matrix.unit_mask.to(matrix.weight.dtype)
