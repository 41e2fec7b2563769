"""What a LoRA adapter of whatever trainer adds to its base, and what of its file does nothing or is no projection's.

Read from `adapter_model.safetensors` and `adapter_config.json` alone, as PEFT reads them: ranks and alphas by pattern,
rank-stabilised scaling, DoRA, modules that were trained as a whole.

Shape letters: R LoRA rank, D inputs of a projection.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from castune.artifacts.tune_result import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from castune.core.checksum import unchanged
from castune.core.modes import evaluation_mode
from castune.core.quantisation import dense_weight
from castune.core.updates import Dense, LowRank, Update
from castune.errors import CertificateError
from castune.tuning.adapter_files import (
    PREFIX,
    adapter_tensors,
    addressed_modules,
    any_lora_config,
    check_base,
    misnamed,
)

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

# What PEFT calls the tensors of a module, behind the path of the module.
_TENSOR = re.compile(
    r"(?P<path>.+?)\.(?P<part>lora_[AB]\.weight|lora_B\.bias|lora_magnitude_vector|lora_embedding_[AB]"
    r"|base_layer\.weight|base_layer\.bias|token_adapter\.trainable_tokens_delta|weight|bias)(?:\.weight)?"
)
_A, _B, _MAGNITUDE = "lora_A.weight", "lora_B.weight", "lora_magnitude_vector"
_EMBEDDING_A, _EMBEDDING_B = "lora_embedding_A", "lora_embedding_B"


@dataclass(frozen=True)
class OtherChange:
    """Something that an adapter changes and that is no weight of a projection with a gradient of its own.

    Attributes:
        path: of the module.
        what: what of it, in words.
        norm: Frobenius norm of the change; None where the file does not tell.
    """

    path: str
    what: str
    norm: float | None


@dataclass(frozen=True)
class AdapterUpdate:
    """What an adapter adds to its base.

    Attributes:
        updates: of the weights of projections, shaped as these are stored, by module path.
        others: everything else that it changes.
        not_loaded: tensors that PEFT would leave out without a word, and why.
        ends: input embeddings and output head, as far as they are trained, by module path.
        config: settings, as `any_lora_config` returns them.
    """

    config: Mapping[str, Any]
    updates: dict[str, Update] = field(default_factory=dict)
    others: list[OtherChange] = field(default_factory=list)
    not_loaded: dict[str, str] = field(default_factory=dict)
    ends: list[str] = field(default_factory=list)

    @property
    def is_of_projections(self) -> bool:
        """Whether it changes nothing but projections, by LoRA or DoRA."""
        return not self.others and not self.config.get("modules_to_save")

    @property
    def kind(self) -> str:
        """What its settings make it, in words: `LoRA r = 16, alpha = 32`."""
        config = self.config
        name = "DoRA" if config.get("use_dora") else "LoRA"
        ranks = sorted({update.rank for update in self.updates.values() if isinstance(update, LowRank)})
        rank = f"{ranks[0]} to {ranks[-1]}" if len(ranks) > 1 else f"{(ranks or [config['r']])[0]}"
        alpha = f"{config['lora_alpha']:g}" + (" and by pattern" if config.get("alpha_pattern") else "")
        return f"{name} r = {rank}, alpha = {alpha}" + (", rank-stabilised" if config.get("use_rslora") else "")


def read_update(base: PreTrainedModel, adapter: Path) -> AdapterUpdate:
    """What an adapter adds to a base.

    Args:
        base: the base model, without an adapter.
        adapter: directory of a PEFT LoRA adapter of any kind; only safetensors are read.

    Raises:
        CertificateError: no LoRA adapter, one whose tensors do not tell what it adds, with tensors that PEFT could not
            load at all, or with values that are not finite; the message names the setting or the tensor.
        CastuneError: another base model.
    """
    config = any_lora_config(adapter)
    check_base(adapter, config, base)
    weights = adapter / ADAPTER_WEIGHTS
    found, by_path = AdapterUpdate(config), defaultdict[str, dict[str, Tensor]](dict)
    for key, tensor in adapter_tensors(weights).items():
        if not torch.isfinite(tensor).all():
            raise CertificateError(f"{weights}: {key} has values that are not finite")
        why, match = misnamed(key), _TENSOR.fullmatch(key.removeprefix(PREFIX))
        if why is not None or match is None:
            found.not_loaded[key] = why or "is no tensor of a LoRA adapter"
        else:
            by_path[match["path"]][match["part"]] = tensor
    reader = _Reader.of(base, adapter, found, list(by_path))
    if by_path and not any(path.removesuffix(".base_layer") in reader.modules for path in by_path):
        raise CertificateError(
            f"{weights}: adapts {PREFIX}{next(iter(by_path))}, which this model does not have: made for another model"
        )
    for path, parts in by_path.items():
        reader.read(path, parts)
    return found


@contextlib.contextmanager
def adapted(base: PreTrainedModel, adapter: Path) -> Iterator[PeftModel]:
    """The base with the adapter as PEFT loads it, in evaluation mode; afterwards as it was.

    Not for adapters with whole modules of their own, which PEFT would leave in the base.
    """
    from peft import PeftModel

    with unchanged(base, "measuring an adapter"):
        peft_model = PeftModel.from_pretrained(base, adapter)
        try:
            with evaluation_mode(peft_model):
                yield peft_model
        finally:
            peft_model.unload()


@dataclass(frozen=True)
class _Reader:
    """Sorts the tensors of an adapter into `found`, module by module."""

    adapter: Path
    modules: dict[str, Any]
    addressed: set[str]
    ends: dict[str, str]
    tied: bool
    found: AdapterUpdate

    @classmethod
    def of(cls, base: PreTrainedModel, adapter: Path, found: AdapterUpdate, paths: list[str]) -> _Reader:
        modules, config = dict(base.named_modules()), found.config
        named = paths if config["target_modules"] == "all-linear" else addressed_modules(config, paths)
        embeddings, head = base.get_input_embeddings(), base.get_output_embeddings()
        words = {id(embeddings): "input embeddings", id(head): "output head"}
        ends = {path: words[id(module)] for path, module in modules.items() if id(module) in words}
        tied = head is not None and head.weight is embeddings.weight
        return cls(adapter, modules, set(named), ends, tied, found)

    def read(self, path: str, parts: dict[str, Tensor]) -> None:
        """What the tensors of one module change."""
        if path in self.ends:
            self.found.ends.append(path)
        if _A in parts or _B in parts:
            self._read_pair(path, {part: parts.pop(part) for part in (_A, _B, _MAGNITUDE) if part in parts})
        elif _EMBEDDING_A in parts and _EMBEDDING_B in parts:
            a, b = parts.pop(_EMBEDDING_A), parts.pop(_EMBEDDING_B)
            update = LowRank(b, a, self._scaling(path, len(a)))
            self._add_other(path, "input embeddings", update.norm)
        for part, tensor in parts.items():
            self._read_other(path, part, tensor)

    def _read_pair(self, path: str, parts: dict[str, Tensor]) -> None:
        names = [f"{PREFIX}{path}.{part}" for part in parts]
        weights, module = self.adapter / ADAPTER_WEIGHTS, self.modules.get(path)
        if not {_A, _B} <= parts.keys():
            raise CertificateError(f"{weights}: {names[0]} has no other half: A and B of a module go together")
        inner = self.modules.get(path.removesuffix(".base_layer"))
        if not isinstance(getattr(module, "weight", None), Tensor):
            if inner is None:
                self.found.not_loaded.update(dict.fromkeys(names, "belongs to a module that this model does not have"))
            else:
                self._add_other(path, "parameters of experts", None)
            return
        if path not in self.addressed:
            why = "is of a module that the settings (target_modules and the like) do not address"
            self.found.not_loaded.update(dict.fromkeys(names, why))
            return
        update = self._update(path, module, parts)
        if self._has_own_gradient(path):
            self.found.updates[path] = update
        else:
            self._add_other(path, f"{self.ends[path]}, tied to the input embeddings", update.norm)

    def _update(self, path: str, module: Any, parts: Mapping[str, Tensor]) -> Update:
        a, b = parts[_A], parts[_B]
        rows = as_rows(module, dense_weight(module)).cpu()
        rank = self._by_pattern("rank_pattern", path, self.found.config["r"])
        if a.shape != (rank, rows.shape[1]) or b.shape != (rows.shape[0], rank):
            raise CertificateError(
                f"{self.adapter / ADAPTER_WEIGHTS}: {path} has A {tuple(a.shape)} and B {tuple(b.shape)}, expected "
                f"{(rank, rows.shape[1])} and {(rows.shape[0], rank)} for this model and r = {rank}"
            )
        scaling = self._scaling(path, rank)
        if _MAGNITUDE in parts:
            changed = rows.double() + scaling * (b.double() @ a.double())
            # DoRA: the magnitude of every row is learned, and its direction is that of the row with LoRA's update.
            changed *= (parts[_MAGNITUDE].double() / changed.norm(dim=1))[:, None]
            return Dense(as_rows(module, (changed - rows.double()).float()))
        if self.found.config.get("use_dora"):
            raise CertificateError(f"{self.adapter / ADAPTER_WEIGHTS}: {path} has no magnitudes, and use_dora is set")
        return LowRank(a.T, b.T, scaling) if _is_transposed(module) else LowRank(b, a, scaling)

    def _read_other(self, path: str, part: str, tensor: Tensor) -> None:
        config, kind, what = self.found.config, part.rpartition(".")[2], self.ends.get(path)
        if part == "token_adapter.trainable_tokens_delta":
            self._add_other(path, f"{len(tensor)} rows of the {what or 'embeddings'}", None)
            return
        if part == "lora_B.bias":
            rank = self._by_pattern("rank_pattern", path, config["r"])
            self._add_other(path, "bias", self._scaling(path, rank) * float(tensor.double().norm()))
            return
        before, is_saved = getattr(self.modules.get(path), kind, None), self._is_saved(path)
        if not isinstance(before, Tensor) or before.shape != tensor.shape:
            self.found.not_loaded[f"{PREFIX}{path}.{part}"] = "is of a module that this model does not have so"
        elif part == "base_layer.weight":
            self._add_difference(path, "its own copy of the base weight", before, tensor)
        elif kind == "bias" and (is_saved or config.get("bias", "none") != "none"):
            self._add_difference(path, "bias", before, tensor)
        elif not is_saved:
            self.found.not_loaded[f"{PREFIX}{path}.{part}"] = "is of a module that modules_to_save does not name"
        elif before.ndim == 2 and what != "input embeddings" and self._has_own_gradient(path):
            self.found.updates[path] = Dense(_as_loaded(tensor, before).float() - before.detach().cpu().float())
        else:
            self._add_difference(path, what or type(self.modules[path]).__name__, before, tensor)

    def _is_saved(self, path: str) -> bool:
        """Whether PEFT takes the module as a whole, by its own way of matching."""
        return any(path.endswith(target) for target in self.found.config.get("modules_to_save") or ())

    def _has_own_gradient(self, path: str) -> bool:
        """Whether the gradient of a module's weight is that of its use in this module alone."""
        return path not in self.ends or not self.tied

    def _add_difference(self, path: str, what: str, before: Tensor, now: Tensor) -> None:
        norm = float((_as_loaded(now, before).double() - before.detach().cpu().double()).norm())
        if norm:
            self._add_other(path, what, norm)

    def _add_other(self, path: str, what: str, norm: float | None) -> None:
        self.found.others.append(OtherChange(path, what, norm))

    def _scaling(self, path: str, rank: int) -> float:
        alpha = float(self._by_pattern("alpha_pattern", path, self.found.config["lora_alpha"]))
        return alpha / (math.sqrt(rank) if self.found.config.get("use_rslora") else rank)

    def _by_pattern(self, key: str, path: str, usual: Any) -> Any:
        from peft.utils.other import get_pattern_key

        pattern = self.found.config.get(key) or {}
        try:
            return pattern.get(get_pattern_key(list(pattern), path), usual)
        except (re.error, AttributeError, TypeError) as error:
            raise CertificateError(f"{self.adapter / ADAPTER_CONFIG}: damaged: {key}: {error}") from None


def _as_loaded(tensor: Tensor, before: Tensor) -> Tensor:
    """A tensor that takes the place of one of the base, in its dtype: to have been rounded is no change."""
    return tensor.to(before.dtype)


def _is_transposed(module: nn.Module) -> bool:
    return type(module).__name__ == "Conv1D"


def as_rows(module: nn.Module, matrix: Tensor) -> Tensor:
    """A stored weight as `[rows, D]`, or the other way round."""
    return matrix.T if _is_transposed(module) else matrix
