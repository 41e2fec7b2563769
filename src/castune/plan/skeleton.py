"""Models from a config alone: whole but without weights, to count; a few layers with random weights, to measure."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import nn

from castune.core.attention import SUPPORTED
from castune.core.heads import HeadLayout
from castune.errors import UnsupportedArchitecture

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

_BLOCK = 1 << 20


def skeleton(config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """The whole model on the meta device: names and shapes, no memory.

    Raises:
        UnsupportedArchitecture: transformers has no causal language model for this config.
    """
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=dtype).eval()
    except ValueError as error:
        reason = str(error).splitlines()[0][:200]
        raise UnsupportedArchitecture(
            f"{config.model_type} is no causal language model ({reason}); castune supports {SUPPORTED}"
        ) from error


def random_slice(
    config: PretrainedConfig, n_layers: int, *, dtype: torch.dtype, device: torch.device
) -> PreTrainedModel:
    """The model's first `n_layers` decoder layers, with embeddings and output head, and random weights.

    It computes nonsense at the model's own speed. Every matrix is filled with copies of one random block, which takes
    a fraction of the time that drawing billions of numbers does. Each begins elsewhere in the block: were embeddings,
    queries and keys equal row by row, every token would attend to itself alone, whatever its queries.
    """
    from transformers import AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    config = copy.deepcopy(config)
    _cut_layers(config, n_layers)
    with no_init_weights(), device:
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    generator = torch.Generator(device).manual_seed(0)
    block = 0.02 * torch.randn(_BLOCK, generator=generator, device=device, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() < 2:
                parameter.fill_(1.0)
                continue
            flat = parameter.view(-1)
            own = block.roll(int(torch.randint(_BLOCK, (1,), generator=generator, device=device)))
            for start in range(0, len(flat), _BLOCK):
                part = flat[start : start + _BLOCK]
                part.copy_(own[: len(part)])
    return model.eval()


@contextmanager
def at_depth(model: PreTrainedModel, layout: HeadLayout, n_layers: int) -> Iterator[None]:
    """The model with its first `n_layers` decoder layers only, inside the `with` block."""
    config = model.config.get_text_config(decoder=True)
    path, _, name = layout.decoder_path.rpartition(".")
    parent, layers, n_before = model.get_submodule(path), layout.decoder_layers(model), config.num_hidden_layers
    setattr(parent, name, nn.ModuleList(list(layers)[:n_layers]))
    config.num_hidden_layers = n_layers
    try:
        yield
    finally:
        setattr(parent, name, layers)
        config.num_hidden_layers = n_before


def _cut_layers(config: PretrainedConfig, n_layers: int) -> None:
    """Shorten a config to its first layers, with every list that has an entry a layer."""
    text = config.get_text_config(decoder=True)
    before = text.num_hidden_layers
    for name, value in list(vars(text).items()):
        if isinstance(value, list) and len(value) == before:
            setattr(text, name, value[:n_layers])
    text.num_hidden_layers = n_layers
