"""Adapters of a model in training, merged into its weights for a while: what is measured is a plain model.

`merge.py` merges what lies in a file, and castune's own adapters alone. Here the adapters are PEFT's, of whatever kind
PEFT can merge, and the training goes on with them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from castune.core.quantisation import is_quantised
from castune.errors import CastuneError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@contextmanager
def plain_model(model: nn.Module) -> Iterator[PreTrainedModel]:
    """The transformers model with its active adapters merged and its own forward; afterwards all is as it was.

    PEFT's layers are out of the tree meanwhile. The weights that are merged into are copies, so that the originals come
    back in every bit, which subtracting an update would not give; they take the room of the adapted projections.
    Forwards that accelerate (autocast) or TRL put on the model are set aside: it computes in the dtype of its weights.

    Args:
        model: a transformers model, or a PEFT model of one.

    Raises:
        CastuneError: adapters that live beside the weights (prompt tuning), or packed weights (4 or 8 bits).
    """
    from peft import PeftModel

    with ExitStack() as stack:
        bare: Any = model
        if isinstance(model, PeftModel):
            if model.active_peft_config.is_prompt_learning:
                raise CastuneError(
                    f"adapters of type {model.active_peft_config.peft_type.value} change no weights, and a map is made "
                    "of gradients on weights; accepted are adapters that PEFT can merge, such as LoRA"
                )
            bare = model.get_base_model()
            if is_quantised(bare):
                raise CastuneError(
                    "the base model is quantised, and its packed weights have no gradients; train adapters of the full "
                    "model to have its map on the way"
                )
            stack.enter_context(_merged(bare))
        stack.enter_context(_own_forward(bare))
        yield bare


@contextmanager
def _merged(base: nn.Module) -> Iterator[None]:
    """Merge the adapters of all PEFT layers, and put plain layers in their places."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers: list[Any] = [module for module in base.modules() if isinstance(module, BaseTunerLayer)]
    # Layers of layers (adapters of experts' parameters) go with the outer one.
    places = [
        (parent, name, child)
        for parent in list(base.modules())
        if not isinstance(parent, BaseTunerLayer)
        for name, child in parent.named_children()
        if isinstance(child, BaseTunerLayer)
    ]
    parameters = {id(one): one for layer in layers for one in layer.get_base_layer().parameters()}.values()
    originals = [(parameter, parameter.data) for parameter in parameters]
    merged_before = [(layer, list(layer.merged_adapters)) for layer in layers]
    try:
        with torch.no_grad():
            for parameter, data in originals:
                parameter.data = data.clone()
            for layer in layers:
                layer.merge()
        for parent, name, child in places:
            setattr(parent, name, child.get_base_layer())
        yield
    finally:
        for parent, name, child in places:
            setattr(parent, name, child)
        for parameter, data in originals:
            parameter.data = data
        for layer, before in merged_before:
            layer.merged_adapters[:] = before


@contextmanager
def _own_forward(model: nn.Module) -> Iterator[None]:
    """Take the forward off the model that stands before that of its class."""
    patched = vars(model).pop("forward", None)
    try:
        yield
    finally:
        if patched is not None:
            vars(model)["forward"] = patched
