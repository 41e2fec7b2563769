"""Existing LoRA adapters, cut down to the rows and columns of chosen heads and other units: no training.

The update of a LoRA adapter is B @ A: row i of it is row i of B times A, and column j is B times column j of A. Zeroing
rows of B therefore removes exactly the update of these rows and leaves the others as they were trained; so do columns
of A where units own columns. Several adapters are combined first, by PEFT's own `add_weighted_adapter`, and then cut
down.

Shape letters: R LoRA rank, D model width.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from castune.artifacts import HeadSelection, MaskedAdapter
from castune.artifacts.files import check_vacant, new_directory
from castune.artifacts.masked_adapter import MASK_FILE
from castune.artifacts.tune_result import ADAPTER_CONFIG, ADAPTER_WEIGHTS, adapter_hash
from castune.core.gguf import display_name
from castune.core.heads import HeadLayout
from castune.core.provenance import fingerprint, model_record, provenance
from castune.core.quantisation import dense_weight
from castune.errors import CastuneError, CertificateError
from castune.tuning.adapter_files import (
    PREFIX,
    check_base,
    check_loaded,
    lora_pairs,
    plain_lora_config,
    save_config,
)
from castune.tuning.combining import Combining, Pair
from castune.tuning.row_lora import lora_config
from castune.tuning.targets import Target, targets, units_for
from castune.tuning.verify import certify

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def mask_adapter(
    base: PreTrainedModel,
    adapter: str | Path | Sequence[str | Path],
    selection: HeadSelection,
    out: str | Path,
    *,
    combination: str | None = None,
    weights: Sequence[float] | None = None,
    density: float | None = None,
    overwrite: bool = False,
) -> MaskedAdapter:
    """Keep what the selected heads and other units own of an adapter, or of several combined, and nothing else.

    Projections that hold no part of a selected unit carry no adapter in the result.

    Args:
        base: the base model of the adapters; it is left as it was.
        adapter: directory of a plain PEFT LoRA adapter, or several.
        selection: the heads, and units of other kinds, whose rows and columns are kept.
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
    paths, out = [Path(adapter)] if isinstance(adapter, str | Path) else [*map(Path, adapter)], Path(out)
    if not paths:
        raise CastuneError("no adapter to mask; give one, or several that are combined")
    combining = Combining.of(len(paths), combination, weights, density)
    again = overwrite and (out / MASK_FILE).is_file()
    if not again:
        check_vacant(out)
    masking = _Masking.of(base, selection)
    sources = masking.read(paths)
    with new_directory(out, replace=again) as aside:
        masking.write(sources, combining, aside)
        selection.save(aside)
        result = MaskedAdapter(
            certificate=certify(base, aside, selection),
            zone=selection.zone,
            n_total=selection.n_total,
            sources=tuple(source.record for source in sources),
            combination=combining.how,
            weights=combining.weights,
            density=combining.density,
            dropped=dict(sum((source.dropped for source in sources), Counter())),
            unadapted_layers=masking.unadapted(sources),
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
    """What is used of an adapter: its pairs on selected layers, by module path."""

    path: Path
    rank: int
    alpha: float
    base_name: str | None
    pairs: dict[str, Pair]
    dropped: Counter[str]

    @property
    def record(self) -> dict[str, Any]:
        name = display_name(str(self.path.absolute()))
        return {"name": name, "hash": adapter_hash(self.path), "r": self.rank, "alpha": self.alpha}


@dataclass(frozen=True)
class _Masking:
    """Adapters of a base model, of which what the selected units own is kept.

    Attributes:
        base: the base model.
        layout: its heads.
        selection: the selected units.
        wanted: the projections that hold a part of one, by module path.
    """

    base: PreTrainedModel
    layout: HeadLayout
    selection: HeadSelection
    wanted: dict[str, Target]

    @classmethod
    def of(cls, base: PreTrainedModel, selection: HeadSelection) -> _Masking:
        layout = HeadLayout.of(base)
        return cls(base, layout, selection, targets(units_for(base, layout, selection), selection))

    def read(self, adapters: Sequence[Path]) -> list[_Source]:
        """What is used of some adapters, which can be combined."""
        sources = [self._read(adapter) for adapter in adapters]
        ranks = {str(source.path): source.rank for source in sources}
        if len(set(ranks.values())) > 1:
            raise CastuneError(f"adapters of equal rank can be combined, these have {_listed(ranks)}")
        if not any(source.pairs for source in sources):
            what = "query projection of a layer with a selected head"
            what = what if self.selection.only_heads else "projection that holds a part of a selected unit"
            raise CertificateError(f"{adapters[0]}: adapts no {what}")
        return sources

    def unadapted(self, sources: Sequence[_Source]) -> tuple[int, ...]:
        """Layers with a part of a selected unit that no source adapts."""
        adapted = {path for source in sources for path in source.pairs}
        return tuple(sorted({target.layer for path, target in self.wanted.items() if path not in adapted}))

    def write(self, sources: Sequence[_Source], combining: Combining, folder: Path) -> None:
        """Write the adapter that the sources become."""
        first = sources[0]
        pairs, alpha = first.pairs, first.alpha
        if combining.how is not None:
            # PEFT puts the scaling of the parts into the matrices: alpha = r.
            configs = [self._config(one.rank, one.alpha) for one in sources]
            pairs = combining.combined(self.base, configs, [one.pairs for one in sources], self.wanted)
            alpha = first.rank
        config = self._config(first.rank, alpha)
        config.base_model_name_or_path = first.base_name or getattr(self.base.config, "_name_or_path", "") or None
        config.inference_mode = True
        save_config(config, folder)
        save_file(self._masked(pairs, first.rank), folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})

    def _read(self, adapter: Path) -> _Source:
        config = plain_lora_config(adapter)
        if config.get("use_rslora"):
            raise CertificateError(
                f"{adapter / ADAPTER_CONFIG}: use_rslora is set: rank-stabilised LoRA scales by another factor; "
                "accepted: plain LoRA"
            )
        check_base(adapter, config, self.base)
        weights, rank = adapter / ADAPTER_WEIGHTS, config["r"]
        pairs: dict[str, Pair] = {}
        dropped: Counter[str] = Counter()
        found = list(lora_pairs(weights))
        check_loaded(adapter, config, [path for path, _, _ in found], dict(self.base.named_modules()))
        for path, a, b in found:
            if path not in self.wanted:
                dropped[path.rpartition(".")[2]] += 1
                continue
            n_rows, width = self._shape(path)
            if a.shape != (rank, width) or b.shape != (n_rows, rank):
                raise CertificateError(
                    f"{weights}: {path} has A {tuple(a.shape)} and B {tuple(b.shape)}, expected {(rank, width)} and "
                    f"{(n_rows, rank)} for this model and r = {rank}"
                )
            if not (torch.isfinite(a).all() and torch.isfinite(b).all()):
                raise CertificateError(f"{weights}: {path} has values that are not finite")
            pairs[path] = (a, b)
        return _Source(adapter, rank, config["lora_alpha"], config.get("base_model_name_or_path"), pairs, dropped)

    def _shape(self, path: str) -> tuple[int, int]:
        """(rows, D) of a projection, whatever way it is stored."""
        n_rows, width = self.wanted[path].rows_of(dense_weight(self.base.get_submodule(path))).shape
        return n_rows, width

    def _config(self, rank: int, alpha: float) -> Any:
        return lora_config(self.base, self.layout, self.selection, self.wanted, r=rank, alpha=alpha)

    def _masked(self, pairs: dict[str, Pair], rank: int) -> dict[str, Tensor]:
        """The tensors of the adapter file, with zeros outside what is selected: rows of B, or columns of A."""
        tensors = {}
        some_a, some_b = next(iter(pairs.values()))
        for path, target in self.wanted.items():
            n_rows, width = self._shape(path)
            # A layer that nothing adapts has an update of zero; the certificate asks for every selected layer.
            a, b = pairs.get(path, (some_a.new_zeros(rank, width), some_b.new_zeros(n_rows, rank)))
            if target.axis == 0:
                b = torch.where(target.mask[:, None], b, torch.zeros_like(b))
            else:
                a = torch.where(target.mask, a, torch.zeros_like(a))
            tensors[f"{PREFIX}{path}.lora_A.weight"] = a.contiguous()
            tensors[f"{PREFIX}{path}.lora_B.weight"] = b.contiguous()
        return tensors


def _listed(ranks: dict[str, int]) -> str:
    return ", ".join(f"r = {rank} ({path})" for path, rank in ranks.items())
