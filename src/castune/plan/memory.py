"""Peak memory: of a diagnosis from what a slice of the model takes, of a training from shapes alone."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from castune.config import TuneConfig
from castune.core.memory import return_freed_memory
from castune.plan.shape import ModelShape
from castune.plan.work import Size

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_FLOAT32 = 4
# Of a trained number of the adapter, all in float32: the weight, its gradient, and AdamW's two moments.
_TRAINED_BYTES = 4 * _FLOAT32
# Of the residual stream a layer keeps in float32 the inputs of its two norms; PEFT adds those of every adapter.
_NORM_COPIES = 2
# Gradients as wide as the MLP that are there at once: of gate, up, and their product.
_GRADIENT_COPIES = 3
# NF4 with double quantisation, as bitsandbytes has it: 4 bits a weight, a byte every 64 weights, a float32 every 256
# of those.
_PACKED_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)


@dataclass(frozen=True)
class Memory:
    """Bytes beyond the weights that work took on a slice of the model.

    Attributes:
        n_bytes: on the slice.
        n_layers: depth of the slice.
        a_layer: what each further layer adds.
    """

    n_bytes: int
    n_layers: int
    a_layer: float

    def at(self, n_layers: int) -> float:
        """Bytes at another depth."""
        return self.n_bytes + (n_layers - self.n_layers) * self.a_layer


def training_memory(shape: ModelShape, config: TuneConfig, largest: Size) -> int:
    """An estimate of the bytes at the peak of a training on one device.

    Counted are the weights of the base, the adapter with its gradients and AdamW's moments (with gradient surgery also
    the utility gradient), the activations that layers keep for the backward pass, and the larger of two things that are
    not there at once: the logits with their gradients, and the gradients inside a layer. Activations are those of the
    largest micro-batch with a fused attention kernel. With gradient checkpointing layers keep their inputs, and the one
    that is run again its inside. Adapters are taken to lie in all layers, as a quarter of the heads does. Not counted
    are the framework itself, activations inside experts and linear attention, second moments and directions of a null
    space, and what an allocator wastes.

    Args:
        shape: of the model.
        config: settings of the training.
        largest: the largest micro-batch.
    """
    kept, layer, gradients = _activation_bytes(shape)
    inside = 0.0
    if config.gradient_checkpointing:
        kept, inside = shape.item_bytes * shape.hidden * (shape.n_layers - shape.lowest), layer
    # In the model's dtype and in float32, which may be the same, and the gradients of both.
    logit_bytes = 2 * (_FLOAT32 + (shape.item_bytes if shape.item_bytes < _FLOAT32 else 0))
    at_the_loss = largest.n_scored * shape.vocabulary * logit_bytes
    in_a_layer = largest.n_tokens * (inside + gradients)
    always = _base_bytes(shape, config) + _adapter_bytes(shape, config) + largest.n_tokens * kept
    return round(always + max(at_the_loss, in_a_layer))


def _base_bytes(shape: ModelShape, config: TuneConfig) -> float:
    """Weights of the base; a quantised one packs linear layers, not embeddings, norms and output head."""
    if config.quantization == "none":
        return shape.weight_bytes
    return (shape.n_parameters - shape.n_packed) * shape.item_bytes + shape.n_packed * _PACKED_BYTES


def _adapter_bytes(shape: ModelShape, config: TuneConfig) -> int:
    inputs = config.rank * sum(inputs for inputs, _ in shape.adapted_L)
    outputs = config.rank * sum(outputs for _, outputs in shape.adapted_L)
    trained = outputs if config.freeze_a else inputs + outputs
    a_number = _TRAINED_BYTES + (_FLOAT32 if config.surgery != "none" else 0)
    return trained * a_number + (inputs + outputs - trained) * _FLOAT32


def _activation_bytes(shape: ModelShape) -> tuple[float, float, float]:
    """Of a token what all layers keep down to the lowest that has gradients, what one keeps, and gradients in it."""
    by_layer = [
        # The widest once more, after its activation function.
        shape.item_bytes * (outputs + widest) + _FLOAT32 * (_NORM_COPIES * shape.hidden + inputs)
        for (outputs, widest), (inputs, _) in zip(shape.outputs_L, shape.adapted_L, strict=True)
    ][shape.lowest :]
    gradients = shape.item_bytes * _GRADIENT_COPIES * max(widest for _, widest in shape.outputs_L)
    return sum(by_layer), max(by_layer), gradients


class Peak:
    """What a `peak_memory` block took beyond what was in use before; None where the system does not tell."""

    extra: int | None = None


@contextmanager
def peak_memory(device: torch.device) -> Iterator[Peak]:
    """Measure the peak inside the `with` block, of the accelerator or else of this process; read `extra` behind it."""
    peak = Peak()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield peak
        peak.extra = torch.cuda.max_memory_allocated(device) - before
        return
    return_freed_memory()
    known = _reset_peak()
    resident = resident_memory()
    yield peak
    highest = _status("VmHWM")
    if known and resident is not None and highest is not None:
        peak.extra = max(0, highest - resident)


def resident_memory() -> int | None:
    """Bytes of this process in memory; None where the system does not tell (it is Linux that does)."""
    return _status("VmRSS")


def _reset_peak() -> bool:
    try:
        _RESET.write_text("5")
    except OSError:
        return False
    return True


def _status(field: str) -> int | None:
    try:
        lines = _STATUS.read_text().splitlines()
    except OSError:
        return None
    found = next((line for line in lines if line.startswith(f"{field}:")), None)
    return None if found is None else int(found.split()[1]) * 1024
