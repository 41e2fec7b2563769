"""Models whose linear layers are packed integers (bitsandbytes): loading, telling them, keeping them trainable."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import Tensor, nn

from castune.errors import CastuneError


def require_bitsandbytes() -> None:
    """Refuse a quantised model where the library for it is not installed."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise CastuneError("a quantised base needs bitsandbytes: python -m pip install 'castune[qlora]'")


def bitsandbytes_config(quantization: str, dtype: torch.dtype) -> Any:
    """The `quantization_config` for transformers.

    Args:
        quantization: `nf4`: 4 bits and double quantisation, as in QLoRA.
        dtype: what is computed in.
    """
    require_bitsandbytes()
    from transformers import BitsAndBytesConfig

    if quantization != "nf4":
        raise CastuneError(f"unknown quantization {quantization!r}; accepted: none, nf4")
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def why_not_in_4_bits(device: torch.device) -> str | None:
    """Why linear layers cannot be computed in 4 bits on a device; None where they can."""
    if importlib.util.find_spec("bitsandbytes") is None:
        return "bitsandbytes is not installed (python -m pip install 'castune[qlora]')"
    try:
        import bitsandbytes

        layer = bitsandbytes.nn.Linear4bit(64, 64, bias=False, compute_dtype=torch.float32, quant_type="nf4")
        with torch.no_grad():
            found = layer.to(device)(torch.ones(1, 64, device=device))
    except Exception as error:  # whatever its kernels and their loader do
        return f"bitsandbytes does not work on {device} ({type(error).__name__})"
    return None if bool(torch.isfinite(found).all()) else f"bitsandbytes does not work on {device}"


def is_quantised(model: nn.Module) -> bool:
    """Whether weights are stored as packed integers."""
    return any(not parameter.is_floating_point() for parameter in model.parameters())


def keep_trainable(model: nn.Module) -> None:
    """Keep 4-bit layers on a CPU from being packed for inference, which is done at their first forward pass.

    Weights packed so have no backward pass: gradients would silently stop at the layer.

    Raises:
        CastuneError: they are packed already.
    """
    module: Any
    for module in model.modules():
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if getattr(state, "packing_format_for_cpu", False):
            raise CastuneError(
                "bitsandbytes has packed the weights of this model for inference on the CPU, where gradients would "
                "stop; load it again and give it to castune before its first forward pass"
            )
        if getattr(module, "support_avx512bf16_for_cpu", False):
            module.support_avx512bf16_for_cpu = False


def dense_weight(module: nn.Module) -> Tensor:
    """The weight of a linear layer, dequantised where it is packed."""
    from peft.utils.integrations import dequantize_module_weight

    weight: Tensor = dequantize_module_weight(module)
    return weight.detach()
