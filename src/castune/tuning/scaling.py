"""A LoRA adapter at another strength: no training.

Its update is B A times alpha / r, so an adapter whose B is multiplied by a number has the update times that number, and
stays a plain adapter: A, alpha and r are what they were, and rows of B that are zero stay zero. PEFT's `scale_layer`,
by which strengths are evaluated, multiplies alpha / r instead: the same up to rounding, and to the bit for powers of 2.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from castune.artifacts import HeadSelection, ScaledAdapter
from castune.artifacts.files import check_vacant, new_directory
from castune.artifacts.scaled_adapter import SCALE_FILE
from castune.artifacts.tune_result import ADAPTER_WEIGHTS, adapter_hash
from castune.core.gguf import display_name
from castune.core.provenance import model_record, provenance
from castune.errors import CastuneError, CertificateError
from castune.tuning.adapter_files import lora_pairs, plain_lora_config
from castune.tuning.mask import check_base
from castune.tuning.touched_units import Pair, TouchedUnits, write_pairs
from castune.tuning.verify import certify

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def scale_adapter(
    base: PreTrainedModel,
    adapter: str | Path,
    selection: HeadSelection | None,
    out: str | Path,
    *,
    strength: float,
    name: str | None = None,
    target: dict[str, Any] | None = None,
    overwrite: bool = False,
) -> ScaledAdapter:
    """Write an adapter whose update is that of another one times a number.

    Args:
        base: the base model of the adapter; it is left as it was.
        adapter: directory of a plain PEFT LoRA adapter, rank-stabilised or not.
        selection: the heads, and units of other kinds, that the adapter changes; None for all units that own a part of
            its modules, as of an adapter that castune did not train.
        out: the adapter directory to write. It is complete or absent, never half-written.
        strength: what the update is multiplied by, above 0; 1 is the adapter as it is.
        name: what the record calls the adapter; the name of its directory when absent.
        target: what the strength was chosen for (`purpose`, `value`), for the record.
        overwrite: replace an adapter that this function wrote.

    Raises:
        CastuneError: a strength that is none, another base model, or something is at `out`.
        CertificateError: no plain LoRA adapter, so that its update is not B A times a number (DoRA, biases, ...), or
            one that changes more than the selection; the message names the setting or the tensor.
    """
    adapter, out = Path(adapter), Path(out)
    if not (math.isfinite(strength) and strength > 0):
        raise CastuneError(f"strength is {strength:g}, accepted: a number above 0; at 0 it is the base model")
    again = overwrite and (out / SCALE_FILE).is_file()
    if not again:
        check_vacant(out)
    config = plain_lora_config(adapter)
    check_base(adapter, config, base)
    pairs = _scaled(adapter / ADAPTER_WEIGHTS, strength)
    if selection is None:
        touched = TouchedUnits.by(base, adapter, list(pairs))
        selection, pairs = touched.selection, touched.filled(pairs)
    with new_directory(out, replace=again) as aside:
        write_pairs(adapter, aside, pairs, [name for name, _ in base.named_modules()])
        selection.save(aside)
        result = ScaledAdapter(
            certificate=certify(base, aside, selection),
            zone=selection.zone,
            n_total=selection.n_total,
            source={
                "name": name or display_name(str(adapter.absolute())),
                "hash": adapter_hash(adapter),
                "r": config["r"],
                "alpha": config["lora_alpha"],
            },
            strength=float(strength),
            target=target,
            model=model_record(base),
            provenance=provenance(),
        )
        result.save(aside)
    return result


def _scaled(weights: Path, strength: float) -> dict[str, Pair]:
    """A of every module of the adapter file as it is, and B times the strength."""
    pairs = {}
    for path, a, b in lora_pairs(weights):
        if not (torch.isfinite(a).all() and torch.isfinite(b).all()):
            raise CertificateError(f"{weights}: {path} has values that are not finite")
        if b.dtype in (torch.float16, torch.bfloat16):
            # PEFT computes with float32 whatever the file has, and in 16 bits the product would be rounded.
            a, b = a.float(), b.float()
        pairs[path] = a, b * strength
    return pairs
