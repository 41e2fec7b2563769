"""Head-sparse LoRA: a plain PEFT adapter whose B matrix acts on chosen query rows only.

`lora_B` multiplies its weight by a row mask in forward. Rows outside the selection start at zero, get zero gradients
and stay exactly zero under every optimiser and weight decay, also under FSDP2, where gradient hooks are lost
silently. The saved adapter is an ordinary LoRA adapter.

Shape letters: R LoRA rank, D model width.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from castune.artifacts import HeadSelection
from castune.artifacts.fingerprints import same_model
from castune.core.heads import HeadLayout
from castune.core.provenance import fingerprint
from castune.errors import CastuneError

ADAPTER_NAME = "default"


class HeadMaskedLinear(nn.Linear):
    """A LoRA B matrix, `[rows, R]`, whose rows outside the chosen heads are zero in forward and gradient."""

    head_mask: Tensor

    def forward(self, input: Tensor) -> Tensor:
        """Apply the masked weight."""
        mask = self.head_mask.to(self.weight.dtype)[:, None]
        return functional.linear(input, self.weight * mask, self.bias)


def sparse_lora(model: Any, selection: HeadSelection, *, r: int = 32, alpha: float = 32, freeze_a: bool = False) -> Any:
    """Put LoRA on the query rows of the selected heads: a plain `PeftModel`, for any training loop.

    Set the seed before calling: A is initialised at random here.

    Args:
        model: the base model the selection was made for, or it quantised. PEFT wraps its layers in place.
        selection: the heads to train.
        r: LoRA rank.
        alpha: LoRA alpha; updates are scaled by alpha / r.
        freeze_a: train B alone. A (r x hidden) is shared by all heads of a layer, so only then do selections
            with equal head counts have exactly equal budgets.

    Raises:
        CastuneError: the selection belongs to another model, or is empty; or the model wears an adapter already.
    """
    from peft import get_peft_model

    _refuse_adapted(model)
    layout = HeadLayout.of(model)
    check_selection(model, layout, selection)
    peft_model = get_peft_model(model, query_lora_config(layout, selection, r=r, alpha=alpha))
    wrapped = {name.removeprefix("base_model.model.") for name, _ in lora_layers(peft_model)}
    wanted = {layout.at(layer).query_path for layer in selection.layers}
    if wrapped != wanted:
        peft_model.unload()
        raise CastuneError(f"PEFT wrapped {sorted(wrapped ^ wanted)} beside the selected layers of this model")
    for layer in selection.layers:
        module = peft_model.base_model.model.get_submodule(layout.at(layer).query_path)
        _mask_rows(module.lora_B[ADAPTER_NAME], row_mask(layout, selection, layer))
        if freeze_a:
            module.lora_A[ADAPTER_NAME].weight.requires_grad_(False)
    return peft_model


def query_lora_config(layout: HeadLayout, selection: HeadSelection, *, r: int, alpha: float) -> Any:
    """The `LoraConfig` of plain LoRA on the query projections of the layers that hold a selected head."""
    from peft import LoraConfig

    return LoraConfig(
        r=r,
        lora_alpha=alpha,
        lora_dropout=0.0,
        bias="none",
        target_modules=sorted({layout.at(layer).query_name for layer in selection.layers}),
        layers_to_transform=list(selection.layers),
        fan_in_fan_out=any(layout.at(layer).transposed for layer in selection.layers),
        task_type="CAUSAL_LM",
    )


def check_selection(model: nn.Module, layout: HeadLayout, selection: HeadSelection) -> None:
    """Refuse a selection that is empty, was made for another model, or names heads that do not exist."""
    if not selection.heads:
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


def _refuse_adapted(model: nn.Module) -> None:
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer):
            raise CastuneError(
                f"{name} carries an adapter already, whose values no mask would hold at zero; merge it "
                "(merge_and_unload), remove it (unload), or load the base model again"
            )


def row_mask(layout: HeadLayout, selection: HeadSelection, layer: int) -> Tensor:
    """True for the query rows of the selected heads of a layer, over the projection's output dimension."""
    heads = selection.heads_of(layer)
    n_rows = max(layout.query_rows(layer, head).stop for head in range(layout.n_heads(layer)))
    mask = torch.zeros(n_rows, dtype=torch.bool)
    for head in heads:
        mask[layout.query_rows(layer, head)] = True
    return mask


def projection_mask(layout: HeadLayout, selection: HeadSelection, layer: int, n_rows: int) -> Tensor:
    """`row_mask` over all rows of the projection: a fused one has keys and values after or between its queries."""
    mask = torch.zeros(n_rows, dtype=torch.bool)
    selected = row_mask(layout, selection, layer)
    mask[: len(selected)] = selected
    return mask


def lora_layers(peft_model: nn.Module) -> list[tuple[str, Any]]:
    """(path, module) of every module that carries a LoRA adapter."""
    return [(name, module) for name, module in peft_model.named_modules() if hasattr(module, "lora_B")]


def save_adapter(peft_model: Any, weights: dict[str, Tensor], folder: Path) -> None:
    """Write an adapter's parameters (`adapter_weights`) as a standard PEFT adapter."""
    peft_model.save_pretrained(folder, selected_adapters=[ADAPTER_NAME], state_dict=weights)


def adapter_weights(peft_model: nn.Module) -> dict[str, Tensor]:
    """The adapter's parameters by name, gathered where FSDP has sharded them: all processes have to call this."""
    found = {}
    for name, parameter in peft_model.named_parameters():
        if "lora_" in name:
            full_tensor = getattr(parameter, "full_tensor", None)
            found[name] = (parameter if full_tensor is None else full_tensor()).detach()
    return found


def budget(peft_model: nn.Module, layout: HeadLayout, selection: HeadSelection) -> dict[str, int]:
    """What is trained: heads, their query rows, A matrices, and parameters.

    `trainable_parameters` is what the optimiser sees; `effective_parameters` leaves out the masked rows of B, whose
    value is always zero.
    """
    layers = [module for _, module in lora_layers(peft_model)]
    a_weights = [module.lora_A[ADAPTER_NAME].weight for module in layers]
    rows = sum(int(row_mask(layout, selection, layer).sum()) for layer in selection.layers)
    rank = a_weights[0].shape[0]
    trainable_a = [weight for weight in a_weights if weight.requires_grad]
    return {
        "heads": len(selection.heads),
        "query_rows": rows,
        "a_matrices": len(trainable_a),
        "trainable_parameters": sum(p.numel() for p in peft_model.parameters() if p.requires_grad),
        "effective_parameters": sum(weight.numel() for weight in trainable_a) + rows * rank,
    }


def _mask_rows(b: Any, mask: Tensor) -> None:
    # A fused projection has more rows than its queries: keys and values are never trained.
    full = torch.zeros(b.weight.shape[0], dtype=torch.bool)
    full[: len(mask)] = mask
    b.__class__ = HeadMaskedLinear
    b.register_buffer("head_mask", full.to(b.weight.device), persistent=False)
    with torch.no_grad():
        b.weight *= b.head_mask.to(b.weight.dtype)[:, None]
