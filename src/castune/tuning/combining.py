"""Several LoRA adapters as one, by PEFT's own `add_weighted_adapter`."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from castune.errors import CastuneError
from castune.tuning.row_lora import lora_layers

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel
    from transformers import PreTrainedModel

COMBINATIONS = ("linear", "ties")
# Share of the values that TIES keeps where none is asked for.
DENSITY = 0.5

# A and B of an adapted layer: `[R, D]` and `[rows, R]`.
Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Combining:
    """How several adapters become one; for one adapter nothing is set."""

    how: str | None
    weights: tuple[float, ...] | None
    density: float | None

    @classmethod
    def of(cls, n_adapters: int, how: str | None, weights: Sequence[float] | None, density: float | None) -> Combining:
        """The settings, checked, with what is usual where nothing was said."""
        checked = _checked_weights(n_adapters, how, weights)
        if how == "ties" and density is None:
            density = DENSITY
        _check_density(how, density)
        return cls(how, checked, density)

    def combined(
        self,
        base: PreTrainedModel,
        configs: Sequence[LoraConfig],
        pairs: Sequence[Mapping[str, Pair]],
        paths: Collection[str],
    ) -> dict[str, Pair]:
        """A and B of every module, combined with whole rows; a module that an adapter does not have counts as zero.

        Args:
            base: the base model; it is left as it was.
            configs: a `LoraConfig` for each adapter.
            pairs: A and B of each adapter by module path.
            paths: of all modules.
        """
        assert self.weights is not None
        names = [f"adapter_{number}" for number in range(len(configs))]
        with _adapted(base, names, configs) as peft_model:
            modules = dict(lora_layers(peft_model))
            if modules.keys() != set(paths):
                raise CastuneError(f"PEFT wrapped {sorted(modules.keys() ^ set(paths))} beside the selected layers")
            for path, module in modules.items():
                for name, found in zip(names, pairs, strict=True):
                    _fill(module, name, found.get(path))
            peft_model.add_weighted_adapter(
                names, list(self.weights), "combined", combination_type=self.how, density=self.density
            )
            return {path: _pair_of(modules[path], "combined") for path in paths}


@torch.no_grad()
def _fill(module: Any, name: str, pair: Pair | None) -> None:
    """Give an adapter of a wrapped projection these matrices; None: zeros."""
    for matrix, values in zip((module.lora_A[name], module.lora_B[name]), pair or (None, None), strict=True):
        matrix.weight.zero_() if values is None else matrix.weight.copy_(values)


def _pair_of(module: Any, name: str) -> Pair:
    a, b = (matrix[name].weight.detach().cpu().clone() for matrix in (module.lora_A, module.lora_B))
    return a, b


@contextlib.contextmanager
def _adapted(base: PreTrainedModel, names: Sequence[str], configs: Sequence[LoraConfig]) -> Iterator[PeftModel]:
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


def _checked_weights(n: int, combination: str | None, weights: Sequence[float] | None) -> tuple[float, ...] | None:
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
            f"weights are {', '.join(f'{w:g}' for w in chosen)}: accepted: a number for each of {n} adapters"
        )
    return tuple(chosen)


def _check_density(combination: str | None, density: float | None) -> None:
    if density is None:
        return
    if combination != "ties":
        raise CastuneError("density is a setting of --combination ties")
    if not 0 < density <= 1:
        raise CastuneError(f"density is {density:g}, accepted: above 0, at most 1")
