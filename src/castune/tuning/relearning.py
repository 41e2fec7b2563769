"""Relearning: plain LoRA on a few rows, on top of an adapter, in memory alone. An attack on what the adapter taught.

Nothing is written: there is no Trainer here, which keeps checkpoints.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from castune.core.heads import HeadLayout
from castune.core.losses import RowBatch, reply_nll
from castune.core.progress import progress
from castune.data.rows import Row
from castune.errors import TrainingError
from castune.tuning.adapter_files import ADAPTER_NAME
from castune.tuning.row_lora import draw_a

if TYPE_CHECKING:
    from peft import PeftModel

RANK, ALPHA, BATCH_SIZE, MAX_GRAD_NORM = 8, 16, 4, 1.0
_NAME = "relearnt"
# Of the first and the last steps whose losses are averaged.
_SHOWN = 5


@dataclass(frozen=True)
class Relearnt:
    """What became of a training.

    Attributes:
        digest: of the trained weights (first 16 hex digits of SHA-256).
        first_loss: mean loss of the first steps.
        last_loss: of the last ones.
    """

    digest: str
    first_loss: float
    last_loss: float


@contextmanager
def relearnt(
    peft_model: PeftModel, rows: Sequence[Row], *, steps: int, learning_rate: float, seed: int
) -> Iterator[Relearnt]:
    """Train a fresh LoRA on all linear layers of the decoder, and wear it beside the adapter inside the `with` block.

    The sum of both is the model with the adapter merged in and trained on, but no weight of the base is touched: when
    the block ends the new LoRA is gone, and the model computes what it did before, to the bit.

    Args:
        peft_model: a model with one adapter, which is left as it is.
        rows: what is trained on; all once before any twice.
        steps: of AdamW, four rows each, at a constant rate.
        learning_rate: of these.
        seed: of the order of the rows, and of A.

    Raises:
        TrainingError: a loss is not finite.
    """
    from peft import LoraConfig

    base: Any = peft_model.get_base_model()
    frozen = [parameter for parameter in peft_model.parameters() if not parameter.requires_grad]
    trainable = [parameter for parameter in peft_model.parameters() if parameter.requires_grad]
    paths = _linear_paths(base)
    config = LoraConfig(
        r=RANK,
        lora_alpha=ALPHA,
        target_modules=paths,
        fan_in_fan_out=_is_transposed(base, paths),
        task_type="CAUSAL_LM",
    )
    try:
        peft_model.add_adapter(_NAME, config)
        peft_model.base_model.set_adapter([ADAPTER_NAME, _NAME])
        found = _trained(peft_model, rows, steps=steps, learning_rate=learning_rate, seed=seed)
        yield found
    finally:
        if _NAME in peft_model.peft_config:
            peft_model.delete_adapter(_NAME)
        peft_model.base_model.set_adapter(ADAPTER_NAME)
        for parameters, is_trained in ((frozen, False), (trainable, True)):
            for parameter in parameters:
                parameter.requires_grad_(is_trained)


def _linear_paths(base: nn.Module) -> list[str]:
    """Module paths of the linear layers of the decoder, those that carry an adapter among them."""
    prefix = f"{HeadLayout.unproven(base).decoder_path}."
    found: list[str] = []
    for path, module in base.named_modules():
        is_wrapped = hasattr(module, "lora_A")
        # What is inside of one that is wrapped is the layer itself, and A and B.
        inside = any(path.startswith(f"{one}.") for one in found)
        if path.startswith(prefix) and not inside and (is_wrapped or _is_linear(module)):
            found.append(path)
    return found


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def _is_transposed(base: nn.Module, paths: Sequence[str]) -> bool:
    layers = [base.get_submodule(path) for path in paths]
    return any(type(getattr(layer, "base_layer", layer)).__name__ == "Conv1D" for layer in layers)


def _trained(peft_model: PeftModel, rows: Sequence[Row], *, steps: int, learning_rate: float, seed: int) -> Relearnt:
    parameters = _own_parameters(peft_model)
    for name, parameter in peft_model.named_parameters():
        parameter.requires_grad_(name in parameters)
        if name in parameters and ".lora_A." in name:
            draw_a(parameter, f"{seed}/{name}")
    optimiser = torch.optim.AdamW(parameters.values(), lr=learning_rate, weight_decay=0.0)
    device = next(peft_model.parameters()).device
    losses = []
    with progress(f"relearning on {len(rows)} rows", steps) as advance, torch.enable_grad():
        for step, batch in enumerate(_batches(rows, steps, seed), start=1):
            loss = reply_nll(peft_model, RowBatch.of(batch, device), fused=True).mean()
            if not torch.isfinite(loss):
                raise TrainingError(
                    f"relearning: the loss is {loss.item()} at step {step}; try a learning rate below {learning_rate:g}"
                )
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters.values(), MAX_GRAD_NORM)
            optimiser.step()
            optimiser.zero_grad()
            losses.append(loss.item())
            advance.note = f"loss {losses[-1]:.3g}"
            advance()
    for parameter in parameters.values():
        parameter.requires_grad_(False)
    return Relearnt(_digest(parameters), _mean(losses[:_SHOWN]), _mean(losses[-_SHOWN:]))


def _own_parameters(peft_model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in peft_model.named_parameters() if f".{_NAME}." in name}


def _batches(rows: Sequence[Row], steps: int, seed: int) -> Iterator[list[Row]]:
    """Rows of every step: all in random order, then all again in another."""
    generator = random.Random(seed)
    queue: list[Row] = []
    for _ in range(steps):
        while len(queue) < BATCH_SIZE:
            queue += generator.sample(list(rows), len(rows))
        yield queue[:BATCH_SIZE]
        del queue[:BATCH_SIZE]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _digest(parameters: dict[str, nn.Parameter]) -> str:
    digest = hashlib.sha256()
    for name, parameter in sorted(parameters.items()):
        values: Tensor = parameter.detach().float().cpu()
        digest.update(name.encode() + values.numpy().tobytes())
    return digest.hexdigest()[:16]
