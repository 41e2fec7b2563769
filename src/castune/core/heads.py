"""Where the attention heads of a model live. With its siblings, `key_values.py` and `mlps.py`, the only file that knows
architectures.

A query head h of layer l owns rows of the query projection (what is trained) and a contiguous slice of the
*input* of the output projection (what is ablated): every supported family ends its attention with
`attn_output.reshape(..., H * K)` followed by the output projection. Both are found by names and shapes, and then
proven by a perturbation probe: noise on the claimed rows of a head must move that head's slice and no other, and no
token but those whose queries were changed (a key or a value would move later tokens).

Shape letters: B batch row, S sequence position, D model width, L layer, H query head, G KV group, K head width.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import nn

from castune.core.attention import SUPPORTED, AttentionLayer, features
from castune.core.probes import probe_heads
from castune.core.quantisation import keep_trainable
from castune.errors import UnsupportedArchitecture

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# Names of the query projection where it stands alone, of fused projections, and of the output projection.
_QUERY = ("q_proj", "q_b_proj", "wq")
_FUSED = ("qkv_proj", "query_key_value", "c_attn", "Wqkv", "W_pack")
_OUTPUT = ("o_proj", "dense", "c_proj", "out_proj", "wo")


class HeadId(NamedTuple):
    """One query head; sorts by layer, then head."""

    layer: int
    head: int


@dataclass(frozen=True)
class HeadLayout:
    """All query heads of a model and where they live. Holds no reference to the model."""

    model_type: str
    decoder_path: str
    attention: tuple[AttentionLayer | None, ...]  # None: a layer without softmax attention
    layers_return_tuples: bool = False  # falcon's decoder takes `[0]` of what a layer returns

    @classmethod
    def of(cls, model: nn.Module) -> HeadLayout:
        """Locate the heads of `model` and prove the result with the perturbation probe.

        Raises:
            UnsupportedArchitecture: no attention heads were found, shapes do not fit, or the probe failed;
                the message names the layer.
        """
        layout = cls.unproven(model)
        keep_trainable(model)  # the probe may be the first forward pass
        layers = [layout.at(layer) for layer in layout.layers_with_heads]
        return replace(layout, layers_return_tuples=probe_heads(model, layout.decoder_layers(model)[0], layers))

    @classmethod
    def unproven(cls, model: nn.Module) -> HeadLayout:
        """Locate the heads by names and shapes alone: for models without weights (meta device), to count, not to run.

        Raises:
            UnsupportedArchitecture: no attention heads were found, or shapes do not fit.
        """
        return _locate(model)

    @property
    def n_layers(self) -> int:
        """Number of decoder layers, those without heads included."""
        return len(self.attention)

    def n_heads(self, layer: int) -> int:
        """Number of query heads of a layer; 0 for a layer without softmax attention."""
        attention = self.attention[layer]
        return 0 if attention is None else attention.n_heads

    @property
    def heads(self) -> tuple[HeadId, ...]:
        """All query heads, sorted."""
        return tuple(HeadId(layer, head) for layer in range(self.n_layers) for head in range(self.n_heads(layer)))

    @property
    def layers_with_heads(self) -> tuple[int, ...]:
        """Layers that own at least one query head."""
        return tuple(layer for layer in range(self.n_layers) if self.n_heads(layer))

    def at(self, layer: int) -> AttentionLayer:
        """The attention of a layer that has heads."""
        attention = self.attention[layer]
        if attention is None:
            raise IndexError(f"layer {layer} has no attention heads")
        return attention

    def query_rows(self, layer: int, head: int) -> slice:
        """Rows of a head in the query projection's output dimension."""
        return self.at(layer).query_rows(head)

    def output_columns(self, layer: int, head: int) -> slice:
        """Columns of a head in the output projection's input dimension."""
        return self.at(layer).output_columns(head)

    def decoder_layers(self, model: nn.Module) -> nn.ModuleList:
        """The model's list of decoder layers."""
        layers = model.get_submodule(self.decoder_path)
        assert isinstance(layers, nn.ModuleList)
        return layers

    def query_projection(self, model: nn.Module, layer: int) -> Any:
        """The module that holds the query rows of a layer."""
        return model.get_submodule(self.at(layer).query_path)

    def output_projection(self, model: nn.Module, layer: int) -> nn.Module:
        """The output projection of a layer."""
        return model.get_submodule(self.at(layer).output_path)


def _locate(model: nn.Module) -> HeadLayout:
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "get_text_config"):
        raise UnsupportedArchitecture(
            f"{type(model).__name__} is not a transformers model with a config; castune supports {SUPPORTED}"
        )
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedArchitecture(f"{config.model_type} is an encoder-decoder; castune supports {SUPPORTED}")
    text_config = config.get_text_config(decoder=True)
    n_layers = getattr(text_config, "num_hidden_layers", None)
    candidates = [
        (path, module)
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        and len(module) == n_layers
        and "vision" not in path
        and any(_attention_child(layer) for layer in module)
    ]
    if not candidates:
        raise UnsupportedArchitecture(
            f"no attention heads found in {type(model).__name__} (model type {config.model_type}); "
            f"castune supports {SUPPORTED}"
        )
    decoder_path, layers = min(candidates, key=lambda item: item[0].count("."))
    attention = tuple(
        _attention_layer(index, layer, f"{decoder_path}.{index}", text_config) for index, layer in enumerate(layers)
    )
    return HeadLayout(config.model_type, decoder_path, attention)


def _attention_child(layer: nn.Module) -> tuple[str, nn.Module, str, str] | None:
    """The first child of a decoder layer that owns both a query and an output projection."""
    for name, child in layer.named_children():
        parts = dict(child.named_children())
        output = next((part for part in _OUTPUT if part in parts), None)
        query = next((part for part in (*_QUERY, *_FUSED) if part in parts), None)
        if output and query:
            return name, child, query, output
    return None


def _attention_layer(index: int, layer: nn.Module, layer_path: str, config: PretrainedConfig) -> AttentionLayer | None:
    found = _attention_child(layer)
    if found is None or _is_linear(config, index):
        return None
    name, attention, query_name, output_name = found
    query, output = attention.get_submodule(query_name), attention.get_submodule(output_name)
    n_heads = _first_int(attention, config, "num_heads", "num_attention_heads", "n_head")
    q_out, o_in = features(query)[1], features(output)[0]

    def refuse(reason: str) -> UnsupportedArchitecture:
        return UnsupportedArchitecture(f"layer {index} ({layer_path}.{name}): {reason}; castune supports {SUPPORTED}")

    if not n_heads:
        raise refuse("the number of attention heads is not stated in the module or the config")
    if o_in % n_heads:
        raise refuse(f"{n_heads} heads do not divide the {o_in} inputs of {output_name}")
    o_dim = o_in // n_heads
    n_kv = n_heads
    if query_name in _QUERY:
        if q_out % n_heads:
            raise refuse(f"{n_heads} heads do not divide the {q_out} rows of {query_name}")
        layout, q_dim = "separate", q_out // n_heads
    else:
        # Shapes decide how many KV groups there are: q_out = (H + 2 G) * K.
        n_kv = (q_out // o_dim - n_heads) // 2
        if n_kv < 1 or n_heads % n_kv or q_out != (n_heads + 2 * n_kv) * o_dim:
            raise refuse(f"{query_name} has {q_out} rows, which are no fused [q, k, v] of {n_heads} heads of {o_dim}")
        q_dim = o_dim
        interleaved = "interleaved" if n_kv == n_heads else "interleaved_gqa"
        layout = interleaved if query_name == "query_key_value" else "block"
    return AttentionLayer(
        layer=index,
        path=f"{layer_path}.{name}",
        query_name=query_name,
        output_name=output_name,
        n_heads=n_heads,
        n_kv_groups=n_kv,
        q_dim=q_dim,
        o_dim=o_dim,
        layout=layout,
        transposed=type(query).__name__ == "Conv1D",
    )


def _is_linear(config: PretrainedConfig, index: int) -> bool:
    """Whether the config declares linear attention here; some such layers (olmo_hybrid) have a q_proj and an o_proj."""
    layer_types = getattr(config, "layer_types", None) or ()
    return index < len(layer_types) and layer_types[index] == "linear_attention"


def _first_int(module: nn.Module, config: PretrainedConfig, *names: str) -> int | None:
    for owner in (module, config):
        for name in names:
            value = getattr(owner, name, None)
            if isinstance(value, int) and not isinstance(value, bool):
                return value
    return None
