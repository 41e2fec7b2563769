"""The merged model: the base with the selected rows and columns changed, every other bit as it was.

PEFT's own merge adds a zero update to unselected ones, which turns -0.0 into +0.0. Here these are not touched, and
what was written is read back and compared with the base bit by bit.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from castune.artifacts import Certificate, HeadSelection
from castune.artifacts.tune_result import ADAPTER_WEIGHTS
from castune.core.heads import HeadLayout
from castune.core.quantisation import is_quantised
from castune.errors import CastuneError, CertificateError
from castune.tuning.adapter_files import lora_pairs, plain_lora_config, scaling_of
from castune.tuning.targets import Target, targets, units_for
from castune.tuning.verify import bits, certify, merged_rows

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_WEIGHT = ".weight"


@dataclass(frozen=True)
class MergedModel:
    """What was compared after a merged model was written.

    Attributes:
        certificate: the proof for the adapter, in the dtype of the merged model.
        dtype: dtype of the merged projections.
        identical_tensors: tensors without a selected row or column, all bit-identical to the base.
        identical_rows: unselected rows of the adapted projections, all bit-identical to the base.
        changed_rows: selected rows that differ from the base.
        identical_columns: as `identical_rows`, of projections of which units own columns.
        changed_columns: as `changed_rows`.
    """

    certificate: Certificate
    dtype: str
    identical_tensors: int
    identical_rows: int
    changed_rows: int
    identical_columns: int = 0
    changed_columns: int = 0


@torch.no_grad()
def write_merged(
    base: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    adapter: str | Path,
    selection: HeadSelection,
    out: str | Path,
) -> MergedModel:
    """Write base and adapter as one model that transformers loads, with tokenizer and generation config.

    Args:
        base: the base model, in the dtype the merged one is wanted in; it is left as it was.
        tokenizer: saved beside the model.
        adapter: directory of an adapter of the selected units.
        selection: the heads, and units of other kinds, it may change.
        out: an existing directory, empty; use `new_directory` to make the whole atomic.

    Returns:
        What was compared.

    Raises:
        CertificateError: the adapter changes more than the selection, or the model read back from `out` differs
            from the base in anything else.
        CastuneError: the weights of the base are quantised.
    """
    adapter, out = Path(adapter), Path(out)
    if is_quantised(base):
        raise CastuneError("the base model is quantised: merging would round its weights again; give the full model")
    certificate = certify(base, adapter, selection)
    selected = targets(units_for(base, HeadLayout.of(base), selection), selection)
    with merged_into(base, adapter, selection):
        base.save_pretrained(out)
        wanted = {f"{path}{_WEIGHT}": target for path, target in selected.items()}
        merged = {name: base.state_dict()[name].detach().cpu().clone() for name in wanted}
    tokenizer.save_pretrained(out)
    counts = _compare(_read_back(base, out), base, wanted, merged)
    return MergedModel(
        certificate=certificate, dtype=str(next(iter(merged.values())).dtype).removeprefix("torch."), **counts
    )


@contextlib.contextmanager
def merged_into(base: nn.Module, adapter: Path, selection: HeadSelection) -> Iterator[None]:
    """The model with the selected rows and columns updated, in place; afterwards as it was, in every bit.

    The adapter must be one of these units (`certify`).
    """
    selected = targets(units_for(base, HeadLayout.of(base), selection), selection)
    config = plain_lora_config(adapter)
    scaling = scaling_of(config)
    before: list[tuple[Tensor, Tensor, Tensor]] = []
    try:
        for path, a, b in lora_pairs(adapter / ADAPTER_WEIGHTS):
            target = selected[path]
            # Detached: whoever diagnoses the merged model needs gradients, and writing into its weights must not.
            weight: Tensor = base.get_submodule(path).weight.detach()  # type: ignore[operator]
            lines, mask = target.lines_of(weight), target.mask.to(weight.device)
            before.append((lines, mask, lines[mask].clone()))
            # The whole product, of which the selected rows are taken: a product of fewer rows may round differently.
            merged = merged_rows(target.rows_of(weight).cpu(), a, b, scaling).to(weight.device)
            lines[mask] = (merged if target.axis == 0 else merged.t())[mask]
        yield
    finally:
        for lines, mask, values in before:
            lines[mask] = values


def _read_back(base: PreTrainedModel, out: Path) -> PreTrainedModel:
    """The model as transformers reads it, in the dtype of the base."""
    return type(base).from_pretrained(out, dtype=base.dtype, device_map="cpu")


def _compare(
    written: nn.Module,
    base: nn.Module,
    wanted: Mapping[str, Target],
    merged: dict[str, Tensor],
) -> dict[str, int]:
    found, expected = written.state_dict(), base.state_dict()
    if found.keys() != expected.keys():
        raise CertificateError(f"the written model lacks or adds {sorted(found.keys() ^ expected.keys())[:3]}")
    counts = Counter[str]()
    for name, tensor in expected.items():
        if name not in wanted:
            if not _same_bits(found[name], tensor):
                raise CertificateError(f"the written model differs from the base in {name}")
            counts["identical_tensors"] += 1
            continue
        if not _same_bits(found[name], merged[name]):
            raise CertificateError(f"the written model differs from the merged one in {name}")
        target = wanted[name]
        lines, old = (target.lines_of(one) for one in (found[name], tensor.cpu()))
        changed = (bits(lines.contiguous()) != bits(old.contiguous())).any(1)
        if (changed & ~target.mask).any():
            raise CertificateError(f"the written model differs from the base in unselected {target.what} of {name}")
        counts[f"identical_{target.what}"] += int((~target.mask).sum())
        counts[f"changed_{target.what}"] += int(changed.sum())
    names = [field.name for field in fields(MergedModel) if field.name not in ("certificate", "dtype")]
    return {name: counts[name] for name in names}


def _same_bits(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    one, other = (t.detach().cpu().flatten().contiguous().view(torch.uint8) for t in (one, other))
    return torch.equal(one, other)
