"""Updates of earlier phases: frozen while a later one trains, and stacked into one plain adapter afterwards.

LoRA's A is shared by the heads of a layer, so that freezing rows of B would freeze nothing: what is kept is the product
`B_i A_i` of every phase that ended. In forward they are added to the projection itself, `W x + s sum_i B_i A_i x`, and
LoRA of the current phase comes on top. In one adapter they are one product of a higher rank:
`[B_1 ... B_k] [A_1; ...; A_k]`, with r and alpha k times as large and their quotient, s, the same.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

from castune.artifacts.tune_result import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from castune.tuning.adapter_files import PREFIX, lora_pairs, plain_lora_config


def stack(adapters: Sequence[Path], out: Path, *, layers_of: Sequence[Path] = ()) -> None:
    """Write one plain adapter that adds up several of one training.

    All layers have the same rank: a layer that an adapter does not have is padded with zeros.

    Args:
        adapters: directories of plain adapters with the same r and alpha.
        out: an existing directory.
        layers_of: further adapters whose layers it is to have, without their updates.
    """
    pairs = [_pairs(adapter) for adapter in adapters]
    configs = [plain_lora_config(adapter) for adapter in (*adapters, *layers_of)]
    like = {path: pair for found in (*map(_pairs, layers_of), *pairs) for path, pair in found.items()}
    tensors = {}
    for path, (some_a, some_b) in like.items():
        nothing = torch.zeros_like(some_a), torch.zeros_like(some_b)
        parts = [found.get(path, nothing) for found in pairs]
        tensors[f"{PREFIX}{path}.lora_A.weight"] = torch.cat([a for a, _ in parts]).contiguous()
        tensors[f"{PREFIX}{path}.lora_B.weight"] = torch.cat([b for _, b in parts], dim=1).contiguous()
    shutil.copytree(adapters[-1], out, dirs_exist_ok=True)  # PEFT's own card of an adapter too
    save_file(tensors, out / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    record = json.loads((adapters[-1] / ADAPTER_CONFIG).read_text(encoding="utf-8")) | {
        "r": sum(config["r"] for config in configs[: len(adapters)]),
        "lora_alpha": sum(config["lora_alpha"] for config in configs[: len(adapters)]),
        "target_modules": sorted({name for config in configs for name in config["target_modules"]}),
        "layers_to_transform": sorted({layer for config in configs for layer in config["layers_to_transform"]}),
        "fan_in_fan_out": any(config["fan_in_fan_out"] for config in configs),
    }
    (out / ADAPTER_CONFIG).write_text(json.dumps(record, indent=2, sort_keys=True), encoding="utf-8")


def _pairs(adapter: Path) -> dict[str, tuple[Tensor, Tensor]]:
    return {path: (a, b) for path, a, b in lora_pairs(adapter / ADAPTER_WEIGHTS)}


class FrozenUpdate:
    """A projection with updates of earlier phases on top of its weight.

    They are buffers: no optimiser sees them, so that no weight decay and no momentum moves them. Not persistent ones: a
    checkpoint of the adapter does not hold them.
    """

    frozen_a: Tensor
    """`[R, columns]`."""
    frozen_b: Tensor
    """`[rows, R]`."""
    frozen_scaling: float

    def forward(self, input: Tensor) -> Tensor:
        """Apply the projection, and the updates."""
        output: Tensor = super().forward(input)  # type: ignore[misc]  # of the projection it is mixed into
        rank_space = functional.linear(input.to(self.frozen_a.dtype), self.frozen_a)
        return (output + functional.linear(rank_space, self.frozen_b) * self.frozen_scaling).to(output.dtype)


@contextmanager
def frozen_updates(model: nn.Module, adapter: Path | None) -> Iterator[None]:
    """Put the updates of an adapter under whatever is trained on the model; afterwards they are gone.

    Args:
        model: the model, also while it wears LoRA.
        adapter: a plain adapter; None: nothing was frozen yet.
    """
    if adapter is None:
        yield
        return
    config = plain_lora_config(adapter)
    changed: list[tuple[Any, type]] = []
    try:
        for path, (a, b) in _pairs(adapter).items():
            wrapped: Any = model.get_submodule(path)
            module = wrapped.get_base_layer() if hasattr(wrapped, "get_base_layer") else wrapped
            kind = type(module)
            changed.append((module, kind))
            module.register_buffer("frozen_a", a.to(module.weight.device), persistent=False)
            module.register_buffer("frozen_b", b.to(module.weight.device), persistent=False)
            module.frozen_scaling = config["lora_alpha"] / config["r"]
            module.__class__ = type(f"Frozen{kind.__name__}", (FrozenUpdate, kind), {})
        yield
    finally:
        for module, kind in changed:
            module.__class__ = kind
            for name in ("frozen_a", "frozen_b", "frozen_scaling"):
                delattr(module, name)
