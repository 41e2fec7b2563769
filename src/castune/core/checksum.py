"""Exact checksums of a model's weights: that a stage which only reads them has left every bit as it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from castune.errors import WeightsChanged

# Elements summed at a time: 8 bytes each while they are.
_CHUNK = 2**22
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@torch.no_grad()
def checksums(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Two sums modulo 2^64 over the bits of every parameter that is on a device: plain, and weighted by place.

    One changed element changes the first, whatever its value: no tolerance, no sampling. Two elements that changed
    places change the second. What accelerate keeps away from all devices (`meta`) is left out.
    """
    return {
        name: _sums(parameter.detach())
        for name, parameter in model.named_parameters(remove_duplicate=True)
        if parameter.device.type != "meta"
    }


@contextmanager
def unchanged(model: nn.Module, doing: str) -> Iterator[None]:
    """Refuse results of a block that was to leave the weights of `model` alone and did not.

    Args:
        model: the model. Parameters that are wrapped meanwhile must have their names again when the block ends; of a
            model that was sharded meanwhile nothing can be told.
        doing: what the block does, for the message.

    Raises:
        WeightsChanged: a parameter has other bits than before, is gone, or is new.
    """
    before, was_sharded = checksums(model), _is_sharded(model)
    yield
    if _is_sharded(model) and not was_sharded:
        return
    after = checksums(model)
    different = [name for name in {**before, **after} if before.get(name) != after.get(name)]
    if different:
        others = f" and {len(different) - 1} more" if len(different) > 1 else ""
        raise WeightsChanged(
            f"the weights of the model changed while castune was {doing}: {different[0]}{others}. Something else works "
            "on this model, or a hook does; the measurements mix two states of it and were discarded. Load it again"
        )


def _is_sharded(model: nn.Module) -> bool:
    return any(hasattr(parameter, "to_local") for parameter in model.parameters())


def _sums(tensor: Tensor) -> tuple[int, int]:
    # Of a sharded parameter this process's own part.
    local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    flat = local.contiguous().flatten().view(_INTEGERS[local.element_size()])
    # Integers of torch wrap around, which is the modulus.
    plain = weighted = torch.zeros((), dtype=torch.int64, device=flat.device)
    for start in range(0, flat.numel(), _CHUNK):
        part = flat[start : start + _CHUNK].to(torch.int64)
        places = torch.arange(start + 1, start + 1 + part.numel(), device=part.device)
        plain = plain + part.sum()
        weighted = weighted + (part * places).sum()
    return int(plain) % 2**64, int(weighted) % 2**64
