"""The merged model: the base with the selected query rows changed, every other bit as it was.

PEFT's own merge adds a zero update to unselected rows, which turns -0.0 into +0.0. Here these rows are not touched, and
what was written is read back and compared with the base bit by bit.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from castune.artifacts import Certificate, HeadSelection
from castune.core.heads import HeadLayout
from castune.core.quantisation import is_quantised
from castune.errors import CastuneError, CertificateError
from castune.tune.row_lora import projection_mask
from castune.tune.verify import bits, certify, lora_pairs, merged_rows, plain_lora_config

_WEIGHT = ".weight"


@dataclass(frozen=True)
class MergedModel:
    """What was compared after a merged model was written.

    Attributes:
        certificate: the proof for the adapter, in the dtype of the merged model.
        dtype: dtype of the merged projections.
        identical_tensors: tensors without a selected row, all bit-identical to the base.
        identical_rows: unselected rows of the adapted projections, all bit-identical to the base.
        changed_rows: selected rows that differ from the base.
    """

    certificate: Certificate
    dtype: str
    identical_tensors: int
    identical_rows: int
    changed_rows: int


@torch.no_grad()
def write_merged(
    base: Any, tokenizer: Any, adapter: str | Path, selection: HeadSelection, out: str | Path
) -> MergedModel:
    """Write base and adapter as one model that transformers loads, with tokenizer and generation config.

    Args:
        base: the base model, in the dtype the merged one is wanted in; it is left as it was.
        tokenizer: saved beside the model.
        adapter: directory of an adapter of the selected heads.
        selection: the heads it may change.
        out: an existing directory, empty; use `new_directory` to make the whole atomic.

    Returns:
        What was compared.

    Raises:
        CertificateError: the adapter changes more than the selected rows, or the model read back from `out` differs
            from the base in anything else.
        CastuneError: the weights of the base are quantised.
    """
    adapter, out = Path(adapter), Path(out)
    if is_quantised(base):
        raise CastuneError("the base model is quantised: merging would round its weights again; give the full model")
    certificate = certify(base, adapter, selection)
    layout = HeadLayout.of(base)
    with merged_into(base, adapter, selection):
        base.save_pretrained(out)
        wanted = {f"{layout.at(layer).query_path}{_WEIGHT}": layer for layer in selection.layers}
        merged = {name: base.state_dict()[name].detach().cpu().clone() for name in wanted}
    tokenizer.save_pretrained(out)
    counts = _compare(_read_back(base, out), base, layout, selection, wanted, merged)
    return MergedModel(
        certificate=certificate, dtype=str(next(iter(merged.values())).dtype).removeprefix("torch."), **counts
    )


@contextlib.contextmanager
def merged_into(base: nn.Module, adapter: Path, selection: HeadSelection) -> Iterator[None]:
    """The model with the selected rows updated, in place; afterwards as it was, in every bit.

    The adapter must be one of these heads (`certify`).
    """
    layout = HeadLayout.of(base)
    config = plain_lora_config(adapter)
    scaling = config["lora_alpha"] / config["r"]
    layer_of = {layout.at(layer).query_path: layer for layer in selection.layers}
    before: list[tuple[Tensor, Tensor, Tensor]] = []
    try:
        for path, a, b in lora_pairs(adapter / "adapter_model.safetensors"):
            layer = layer_of[path]
            weight = layout.query_projection(base, layer).weight.detach()
            rows = weight.t() if layout.at(layer).transposed else weight
            mask = projection_mask(layout, selection, layer, len(rows)).to(rows.device)
            before.append((rows, mask, rows[mask].clone()))
            # The whole product, of which the selected rows are taken: a product of fewer rows may round differently.
            rows[mask] = merged_rows(rows.cpu(), a, b, scaling).to(rows.device)[mask]
        yield
    finally:
        for rows, mask, values in before:
            rows[mask] = values


def _read_back(base: Any, out: Path) -> Any:
    """The model as transformers reads it, in the dtype of the base."""
    return type(base).from_pretrained(out, dtype=base.dtype, device_map="cpu")


def _compare(
    written: nn.Module,
    base: nn.Module,
    layout: HeadLayout,
    selection: HeadSelection,
    wanted: dict[str, int],
    merged: dict[str, Tensor],
) -> dict[str, int]:
    found, expected = written.state_dict(), base.state_dict()
    if found.keys() != expected.keys():
        raise CertificateError(f"the written model lacks or adds {sorted(found.keys() ^ expected.keys())[:3]}")
    identical_tensors = identical_rows = changed_rows = 0
    for name, tensor in expected.items():
        if name not in wanted:
            if not _same_bits(found[name], tensor):
                raise CertificateError(f"the written model differs from the base in {name}")
            identical_tensors += 1
            continue
        if not _same_bits(found[name], merged[name]):
            raise CertificateError(f"the written model differs from the merged one in {name}")
        layer = wanted[name]
        rows, old = (one.t() if layout.at(layer).transposed else one for one in (found[name], tensor.cpu()))
        mask = projection_mask(layout, selection, layer, len(rows))
        changed = (bits(rows.contiguous()) != bits(old.contiguous())).any(1)
        if (changed & ~mask).any():
            raise CertificateError(f"the written model differs from the base in unselected rows of {name}")
        identical_rows += int((~mask).sum())
        changed_rows += int(changed.sum())
    return {"identical_tensors": identical_tensors, "identical_rows": identical_rows, "changed_rows": changed_rows}


def _same_bits(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    one, other = (t.detach().cpu().flatten().contiguous().view(torch.uint8) for t in (one, other))
    return torch.equal(one, other)
