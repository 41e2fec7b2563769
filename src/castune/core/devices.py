"""Where a model goes and in which precision it computes, by the names a user gives."""

from __future__ import annotations

import os
from typing import Any

import torch

from castune.errors import CastuneError

_DTYPES = {
    "float32": torch.float32,
    "fp32": torch.float32,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
    "float16": torch.float16,
    "fp16": torch.float16,
}


def placement(device: str | torch.device) -> Any:
    """Where a model goes: a device, or `auto` to spread it over all accelerators (accelerate's `device_map`)."""
    if str(device) != "auto":
        try:
            torch.device(device)
        except RuntimeError:
            raise CastuneError(f"device {str(device)!r}: accepted: auto, cpu, cuda, cuda:1, mps, ...") from None
        return str(device)
    if not torch.cuda.is_available():
        return "cpu"
    # Ranks of a torchrun job hold a model each; a single process may spread its model over all GPUs.
    return f"cuda:{os.environ['LOCAL_RANK']}" if "LOCAL_RANK" in os.environ else "auto"


def require_device(device: str | torch.device) -> None:
    """Refuse an accelerator that is not there, before PyTorch fails on it.

    Raises:
        CastuneError: the message says which there are.
    """
    place = placement(device)
    wanted = torch.device("cpu" if place == "auto" else place)
    there = {"cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
    if wanted.type in there and (wanted.index or 0) >= there[wanted.type]:
        found = [f"{kind}:{index}" for kind, n in there.items() for index in range(n)]
        raise CastuneError(
            f"device {place!r}: PyTorch finds no such accelerator on this machine; accepted here: "
            f"{', '.join(['auto', 'cpu', *found])}"
        )


def device_of(device: str | torch.device) -> torch.device:
    """The device a name means; of several accelerators that `auto` would use, the first."""
    place = placement(device)
    return torch.device("cuda" if place == "auto" else place)


def torch_dtype_of(dtype: str | torch.dtype, device: str | torch.device) -> torch.dtype:
    """The dtype that a name means on a device.

    Raises:
        CastuneError: no such dtype.
    """
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype == "auto":
        on_cpu = placement(device) == "cpu"
        native = torch.ops.mkldnn._is_mkldnn_bf16_supported() if on_cpu else True
        return torch.bfloat16 if native else torch.float32
    if dtype not in _DTYPES:
        raise CastuneError(f"unknown dtype {dtype!r}; accepted: auto, {', '.join(_DTYPES)}")
    return _DTYPES[dtype]
