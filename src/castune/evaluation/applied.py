"""That a model computes with the adapter it is evaluated with; PEFT only warns where weights find no place."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from castune.artifacts.tune_result import ADAPTER_WEIGHTS
from castune.errors import AdapterNotApplied

if TYPE_CHECKING:
    from peft import PeftModel


def require_applied(peft_model: PeftModel, adapter: Path) -> None:
    """Refuse a PEFT model that does not hold every weight of the adapter, or does not compute with it.

    Args:
        peft_model: what `PeftModel.from_pretrained` returned.
        adapter: the adapter's directory.

    Raises:
        AdapterNotApplied: the message names the first weight without a place, or the layer that is switched off.
    """
    import torch
    from peft import get_peft_model_state_dict
    from peft.tuners.tuners_utils import BaseTunerLayer
    from safetensors import safe_open

    # castune adapts no embeddings; asked whether to look for them, PEFT asks the hub.
    held = get_peft_model_state_dict(peft_model, save_embedding_layers=False)
    with safe_open(adapter / ADAPTER_WEIGHTS, framework="pt") as file:
        names = set(file.keys())
        homeless = sorted(names - held.keys())
        if homeless or not names:
            what = f"no place for {homeless[0]} ({len(homeless)} of {len(names)})" if names else "it holds no weights"
            raise AdapterNotApplied(
                f"{adapter}: this adapter would not take effect: {what}. It was made for another model, or by a PEFT "
                "that names layers otherwise"
            )
        for name in sorted(names):
            wanted, found = file.get_tensor(name), held[name]
            if not torch.equal(wanted.to(found.dtype), found.detach().to(wanted.device)):
                raise AdapterNotApplied(f"{adapter}: {name} was not loaded as it is in the file; update peft")
    missing = sorted(held.keys() - names)
    if missing:
        raise AdapterNotApplied(f"{adapter}: its configuration asks for {missing[0]}, which its weights do not hold")
    for name, module in peft_model.named_modules():
        if not isinstance(module, BaseTunerLayer):
            continue
        if module.disable_adapters or module.merged or not module.active_adapters:
            state = "merged already" if module.merged else "switched off"
            raise AdapterNotApplied(f"{adapter}: the adapter of {name} is {state}: it would not be what is measured")
