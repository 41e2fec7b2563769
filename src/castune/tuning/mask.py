"""Existing LoRA adapters, cut down to the query rows of chosen heads: no training.

The update of a LoRA adapter is B @ A, and row i of it is row i of B times A. Zeroing rows of B therefore removes
exactly the update of these rows and leaves the others as they were trained. Several adapters are combined first, by
PEFT's own `add_weighted_adapter`, and then cut down.

Shape letters: R LoRA rank, D model width.
"""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from castune.artifacts import Certificate, HeadSelection, MaskedAdapter
from castune.artifacts.files import check_vacant, new_directory
from castune.artifacts.fingerprints import same_model
from castune.artifacts.masked_adapter import MASK_FILE
from castune.artifacts.tune_result import ADAPTER_CONFIG, ADAPTER_WEIGHTS, CERTIFICATE_FILE, adapter_hash
from castune.core.heads import HeadLayout
from castune.core.loading import display_name
from castune.core.provenance import fingerprint, model_record, provenance
from castune.errors import CastuneError, CertificateError
from castune.tuning.row_lora import lora_layers, projection_mask, query_lora_config
from castune.tuning.targets import check_selection
from castune.tuning.verify import certify, check_loaded, lora_pairs, plain_lora_config

COMBINATIONS = ("linear", "ties")
# Share of the values that TIES keeps where none is asked for.
DENSITY = 0.5

_PREFIX = "base_model.model."

# A and B of an adapted layer: `[R, D]` and `[rows, R]`.
Pair = tuple[Tensor, Tensor]


def mask_adapter(
    base: Any,
    adapter: str | Path | Sequence[str | Path],
    selection: HeadSelection,
    out: str | Path,
    *,
    combination: str | None = None,
    weights: Sequence[float] | None = None,
    density: float | None = None,
    overwrite: bool = False,
) -> MaskedAdapter:
    """Keep the query rows of the selected heads of an adapter, or of several combined, and nothing else.

    Layers without a selected head and all other projections carry no adapter in the result.

    Args:
        base: the base model of the adapters; it is left as it was.
        adapter: directory of a plain PEFT LoRA adapter, or several.
        selection: the heads whose rows are kept.
        out: the adapter directory to write. It is complete or absent, never half-written.
        combination: how several adapters become one: `linear`, or `ties` (TIES-Merging, arXiv 2306.01708). PEFT
            combines the matrices A and B each, not their products.
        weights: a weight for each adapter; 1 each when absent.
        density: share of the values that `ties` keeps of each matrix, in (0, 1]; 0.5 when absent.
        overwrite: replace an adapter that this function wrote.

    Raises:
        CastuneError: settings that do not fit each other, another base model, or something is at `out`.
        CertificateError: an adapter is no plain LoRA adapter; the message names the setting or the tensor.
    """
    paths = [Path(adapter)] if isinstance(adapter, str | Path) else [Path(one) for one in adapter]
    out = Path(out)
    weights = _checked_weights(len(paths), combination, weights)
    if combination == "ties":
        density = DENSITY if density is None else density
    _check_density(combination, density)
    replace = overwrite and (out / MASK_FILE).is_file()
    if not replace:
        check_vacant(out)
    layout = HeadLayout.of(base)
    check_selection(base, layout, selection)
    if selection.units:
        raise CastuneError(
            f"the selection has units of kinds {', '.join(selection.kinds)}; castune mask cuts adapters down to "
            "query heads alone: select from a map of query heads"
        )
    sources = [_read(path, base, layout, selection) for path in paths]
    ranks = {str(source.path): source.rank for source in sources}
    if len(set(ranks.values())) > 1:
        raise CastuneError(f"adapters of equal rank can be combined, these have {_listed(ranks)}")
    adapted = {layer for source in sources for layer in source.pairs}
    if not adapted:
        raise CertificateError(f"{paths[0]}: adapts no query projection of a layer with a selected head")
    if combination is None:
        pairs, alpha = sources[0].pairs, sources[0].alpha
    else:
        assert weights is not None
        # PEFT puts the scaling of the parts into the matrices: alpha = r.
        pairs, alpha = _combined(base, layout, selection, sources, combination, weights, density), sources[0].rank
    config = query_lora_config(base, layout, selection, r=sources[0].rank, alpha=alpha)
    config.base_model_name_or_path = sources[0].base_name or getattr(base.config, "_name_or_path", "") or None
    config.inference_mode = True
    unadapted = sorted(set(selection.layers) - adapted)
    with new_directory(out, replace=replace) as aside:
        config.save_pretrained(aside)
        save_file(
            _masked(base, layout, selection, pairs, sources[0].rank),
            aside / ADAPTER_WEIGHTS,
            metadata={"format": "pt"},
        )
        selection.save(aside)
        result = MaskedAdapter(
            certificate=certify(base, aside, selection),
            zone=selection.zone,
            n_total=selection.n_total,
            sources=tuple(source.record for source in sources),
            combination=combination,
            weights=None if weights is None else tuple(weights),
            density=density,
            dropped=dict(sum((source.dropped for source in sources), Counter())),
            unadapted_layers=tuple(unadapted),
            model=model_record(base),
            provenance=provenance(),
        )
        result.save(aside)
    return result


def every_head(model: nn.Module) -> HeadSelection:
    """The selection of all query heads of a model, made without a conflict map."""
    heads = HeadLayout.of(model).heads
    chosen = HeadSelection.custom(heads, n_total=len(heads), model_fingerprint=fingerprint(model))
    return replace(chosen, zone="all", fraction=1.0)


@dataclass(frozen=True)
class _Source:
    """What is used of an adapter: its pairs on selected layers."""

    path: Path
    rank: int
    alpha: float
    base_name: str | None
    pairs: dict[int, Pair]
    dropped: Counter[str]

    @property
    def record(self) -> dict[str, Any]:
        name = display_name(str(self.path.absolute()))
        return {"name": name, "hash": adapter_hash(self.path), "r": self.rank, "alpha": self.alpha}


def _read(adapter: Path, base: Any, layout: HeadLayout, selection: HeadSelection) -> _Source:
    config = plain_lora_config(adapter)
    _check_base(adapter, config, base)
    layer_of = {layout.at(layer).query_path: layer for layer in layout.layers_with_heads}
    modules = dict(base.named_modules())
    weights = adapter / ADAPTER_WEIGHTS
    rank = config["r"]
    pairs: dict[int, Pair] = {}
    dropped: Counter[str] = Counter()
    found = list(lora_pairs(weights))
    check_loaded(adapter, config, [path for path, _, _ in found], modules)
    for path, a, b in found:
        layer = layer_of.get(path)
        if layer is None or layer not in selection.layers:
            dropped[path.rpartition(".")[2]] += 1
            continue
        n_rows, width = _shape(base, layout, layer)
        if a.shape != (rank, width) or b.shape != (n_rows, rank):
            raise CertificateError(
                f"{weights}: {path} has A {tuple(a.shape)} and B {tuple(b.shape)}, expected {(rank, width)} and "
                f"{(n_rows, rank)} for this model and r = {rank}"
            )
        if not (torch.isfinite(a).all() and torch.isfinite(b).all()):
            raise CertificateError(f"{weights}: {path} has values that are not finite")
        pairs[layer] = (a, b)
    return _Source(adapter, rank, config["lora_alpha"], config.get("base_model_name_or_path"), pairs, dropped)


def _check_base(adapter: Path, config: dict[str, Any], base: Any) -> None:
    """Refuse an adapter of another base model: by its certificate where it has one, else by the name it gives."""
    if (adapter / CERTIFICATE_FILE).is_file():
        certified, loaded = Certificate.load(adapter).model_fingerprint, fingerprint(base)
        if not same_model(certified, loaded):
            raise CastuneError(f"{adapter} was made for model {certified}, this model is {loaded}")
        return
    wanted, found = config.get("base_model_name_or_path"), getattr(base.config, "_name_or_path", "")
    # Directories may lie elsewhere and hub ids may be mirrored: only the model's own name counts.
    if wanted and found and _model_name(str(wanted)) != _model_name(str(found)):
        raise CastuneError(
            f"{adapter / ADAPTER_CONFIG}: base_model_name_or_path is {wanted!r}, the base model here is "
            f"{display_name(str(found))!r}; if they are one model under two names, change it in that file"
        )


def _model_name(path: str) -> str:
    # A snapshot in the hub's cache: models--OWNER--NAME/snapshots/COMMIT.
    cached = [part.rpartition("--")[2] for part in Path(path).parts if part.startswith("models--")]
    return (cached[0] if cached else display_name(path).rstrip("/").rpartition("/")[2]).lower()


def _shape(base: nn.Module, layout: HeadLayout, layer: int) -> tuple[int, int]:
    """(rows, D) of a layer's query projection, whatever way it is stored."""
    n_rows, width = layout.query_weight(base, layer).shape
    return (width, n_rows) if layout.at(layer).transposed else (n_rows, width)


def _masked(
    base: nn.Module, layout: HeadLayout, selection: HeadSelection, pairs: dict[int, Pair], rank: int
) -> dict[str, Tensor]:
    """The tensors of the adapter file: A as it is, B with zeros outside the selected rows."""
    tensors = {}
    some_a, some_b = next(iter(pairs.values()))
    for layer in selection.layers:
        n_rows, width = _shape(base, layout, layer)
        # A layer that nothing adapts has an update of zero; the certificate asks for every selected layer.
        a, b = pairs.get(layer, (some_a.new_zeros(rank, width), some_b.new_zeros(n_rows, rank)))
        mask = projection_mask(layout, selection, layer, n_rows)
        path = f"{_PREFIX}{layout.at(layer).query_path}"
        tensors[f"{path}.lora_A.weight"] = a.contiguous()
        tensors[f"{path}.lora_B.weight"] = torch.where(mask[:, None], b, torch.zeros_like(b)).contiguous()
    return tensors


def _combined(
    base: Any,
    layout: HeadLayout,
    selection: HeadSelection,
    sources: Sequence[_Source],
    combination: str,
    weights: Sequence[float],
    density: float | None,
) -> dict[int, Pair]:
    """A and B of every selected layer, combined by PEFT with whole rows; an absent layer of a source counts as zero."""
    names = [f"adapter_{number}" for number in range(len(sources))]
    configs = [query_lora_config(base, layout, selection, r=one.rank, alpha=one.alpha) for one in sources]
    with _adapted(base, names, configs) as peft_model:
        modules = {path.removeprefix(_PREFIX): module for path, module in lora_layers(peft_model)}
        wanted = {layout.at(layer).query_path: layer for layer in selection.layers}
        if modules.keys() != wanted.keys():
            raise CastuneError(f"PEFT wrapped {sorted(modules.keys() ^ wanted.keys())} beside the selected layers")
        with torch.no_grad():
            for path, layer in wanted.items():
                for name, source in zip(names, sources, strict=True):
                    for matrix, values in zip(
                        (modules[path].lora_A[name].weight, modules[path].lora_B[name].weight),
                        source.pairs.get(layer, (None, None)),
                        strict=True,
                    ):
                        matrix.zero_() if values is None else matrix.copy_(values)
        peft_model.add_weighted_adapter(names, list(weights), "combined", combination_type=combination, density=density)
        return {
            layer: (
                modules[path].lora_A["combined"].weight.detach().cpu().clone(),
                modules[path].lora_B["combined"].weight.detach().cpu().clone(),
            )
            for path, layer in wanted.items()
        }


@contextlib.contextmanager
def _adapted(base: Any, names: Sequence[str], configs: Sequence[Any]) -> Iterator[Any]:
    """The base model with adapters; afterwards as it was."""
    from peft import get_peft_model

    required_grad = {name: parameter.requires_grad for name, parameter in base.named_parameters()}
    modes = [(module, module.training) for module in base.modules()]
    # New adapters are initialised at random, and then overwritten.
    with torch.random.fork_rng(devices=[]):
        peft_model = get_peft_model(base, configs[0], adapter_name=names[0])
        try:
            for name, config in zip(names[1:], configs[1:], strict=True):
                peft_model.add_adapter(name, config)
            yield peft_model
        finally:
            peft_model.unload()
            for module, training in modes:
                module.training = training
            for name, parameter in base.named_parameters():
                parameter.requires_grad_(required_grad[name])


def _checked_weights(n: int, combination: str | None, weights: Sequence[float] | None) -> list[float] | None:
    accepted = ", ".join(COMBINATIONS)
    if combination is not None and combination not in COMBINATIONS:
        raise CastuneError(f"combination is {combination!r}, accepted: {accepted}")
    if n > 1 and combination is None:
        raise CastuneError(f"{n} adapters: say how they are combined, with --combination and one of {accepted}")
    if n < 2 and (combination is not None or weights is not None):
        raise CastuneError("a combination and its weights need at least two adapters")
    if combination is None:
        return None
    chosen = [1.0] * n if weights is None else [float(weight) for weight in weights]
    if len(chosen) != n or not all(map(math.isfinite, chosen)):
        raise CastuneError(
            f"weights are {', '.join(f'{w:g}' for w in chosen)}: accepted is a number for each of {n} adapters"
        )
    return chosen


def _check_density(combination: str | None, density: float | None) -> None:
    if density is None:
        return
    if combination != "ties":
        raise CastuneError("density is a setting of --combination ties")
    if not 0 < density <= 1:
        raise CastuneError(f"density is {density:g}, accepted: above 0, at most 1")


def _listed(ranks: dict[str, int]) -> str:
    return ", ".join(f"r = {rank} ({path})" for path, rank in ranks.items())
