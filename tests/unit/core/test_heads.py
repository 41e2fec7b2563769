"""The head layout, checked with weights and gradients and not with its own probe."""

from __future__ import annotations

import copy
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM
from transformers.models.llama import modeling_llama

from castune import CastuneError, HeadId, HeadLayout, UnsupportedArchitecture

IDS = torch.arange(40, 64).reshape(2, 12)


def expected_query_rows(model: Any, weight: Tensor) -> Tensor:
    """`[H, d, D]` of a weight-shaped tensor, cut by what each family's attention code does with the projection."""
    kind, config = model.config.model_type, model.config
    n_heads = config.num_attention_heads
    if kind == "gpt2":  # Conv1D (in, out), out = q | k | v
        return weight[:, : config.n_embd].reshape(config.n_embd, n_heads, -1).permute(1, 2, 0)
    if kind in ("gpt_neox", "bloom"):  # (head, q | k | v, width)
        return weight.reshape(n_heads, 3, -1, weight.shape[1])[:, 0]
    if kind == "falcon":  # (KV group, its queries | k | v, width)
        groups = config.num_kv_heads if config.new_decoder_architecture else 1
        return weight.reshape(groups, n_heads // groups + 2, -1, weight.shape[1])[:, :-2].flatten(0, 1)
    width = getattr(config, "head_dim", None) or config.hidden_size // n_heads
    if kind == "qwen3_next":  # (head, q | output gate, width)
        width = 2 * width
    if kind == "deepseek_v3":  # (head, without position | rotary)
        width = config.qk_nope_head_dim + config.qk_rope_head_dim
    return weight[: n_heads * width].reshape(n_heads, width, -1)


def hooks_left(model: nn.Module) -> int:
    return sum(
        len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) + ("forward" in m.__dict__)
        for m in model.modules()
    )


def test_every_family_has_its_heads(any_tiny_model: Any) -> None:
    layout = HeadLayout.of(any_tiny_model)
    with_heads = (1, 2) if any_tiny_model.config.model_type == "qwen3_next" else (0, 1, 2)
    assert layout.heads == tuple(HeadId(layer, head) for layer in with_heads for head in range(4))
    assert layout.n_layers == 3
    assert layout.layers_with_heads == with_heads
    for layer in with_heads:
        in_features = (
            layout.output_projection(any_tiny_model, layer).weight.numel() // any_tiny_model.config.hidden_size
        )
        claimed = [c for h in range(4) for c in range(*layout.output_columns(layer, h).indices(10**6))]
        assert claimed == list(range(in_features)), "the heads tile the output projection's input"


def test_query_rows_of_all_heads_are_the_full_gradient(any_tiny_model: Any) -> None:
    layout = HeadLayout.of(any_tiny_model)
    any_tiny_model(IDS, labels=IDS).loss.backward()
    for layer in layout.layers_with_heads:
        gradient = layout.query_projection(any_tiny_model, layer).weight.grad
        expected = expected_query_rows(any_tiny_model, gradient)
        assert expected.abs().amax((1, 2)).min() > 0, "a head without gradient would prove nothing"
        rows = gradient.t() if any_tiny_model.config.model_type == "gpt2" else gradient
        for head in range(4):
            assert torch.equal(rows[layout.query_rows(layer, head)], expected[head])


def _attention_outputs(model: Any, layout: HeadLayout, layer: int) -> Tensor:
    captured: list[Tensor] = []
    handle = layout.output_projection(model, layer).register_forward_pre_hook(lambda _m, args: captured.append(args[0]))
    with torch.no_grad():
        model(IDS)
    handle.remove()
    return captured[0]


def test_noise_on_a_heads_weights_moves_its_slice_only(any_tiny_model: Any) -> None:
    layout = HeadLayout.of(any_tiny_model)
    for layer, head in layout.heads:
        before = _attention_outputs(any_tiny_model, layout, layer)
        noisy = copy.deepcopy(any_tiny_model)
        weight = layout.query_projection(noisy, layer).weight
        rows = layout.query_rows(layer, head)
        with torch.no_grad():
            view = (weight.t() if layout.at(layer).transposed else weight)[rows]
            view += 3 * torch.randn(view.shape, generator=torch.Generator().manual_seed(layer + head))
        change = (_attention_outputs(noisy, layout, layer) - before).abs()
        columns = layout.output_columns(layer, head)
        assert change[..., columns].max() > 1e-4, (layer, head)
        change[..., columns] = 0
        assert change.max() == 0, (layer, head)


def test_claimed_rows_are_queries(any_tiny_model: Any) -> None:
    """A query decides what its own token reads; a key or a value would change what later tokens read."""
    layout = HeadLayout.of(any_tiny_model)
    for layer, head in layout.heads:
        before = _attention_outputs(any_tiny_model, layout, layer)
        projection, rows = layout.query_projection(any_tiny_model, layer), layout.query_rows(layer, head)
        noise = 3 * torch.randn(rows.stop - rows.start, generator=torch.Generator().manual_seed(layer + head))

        def nudge(_module: nn.Module, _args: Any, output: Tensor, rows: slice = rows, noise: Tensor = noise) -> Tensor:
            nudged = output.clone()
            nudged[:, 6, rows] += noise
            return nudged

        handle = projection.register_forward_hook(nudge)
        change = (_attention_outputs(any_tiny_model, layout, layer) - before).abs()
        handle.remove()
        columns = layout.output_columns(layer, head)
        assert change[:, 6, columns].amax(-1).min() > 1e-4, (layer, head)
        change[:, 6, columns] = 0
        assert change.max() == 0, (layer, head)


def test_a_norm_over_all_heads_is_told(tiny_model: Callable[..., Any]) -> None:
    with pytest.warns(UserWarning, match="normalises queries across all heads") as caught:
        layout = HeadLayout.of(tiny_model("olmo2"))
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert len(layout.heads) == 12


def test_a_norm_that_scales_every_head_on_its_own_is_not(tiny_model: Callable[..., Any]) -> None:
    """Its weight has as many elements as one over all heads; warnings are errors here."""
    assert len(HeadLayout.of(tiny_model("cohere", use_qk_norm=True)).heads) == 12


def test_linear_attention_with_familiar_names_has_no_heads(tiny_model: Callable[..., Any]) -> None:
    """Olmo hybrid's linear layers own a q_proj and an o_proj; the first layer with heads has the norm over all."""
    model = tiny_model(
        "olmo_hybrid",
        layer_types=["linear_attention", "full_attention", "full_attention"],
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
    )
    with pytest.warns(UserWarning, match=r"layers\.1\.self_attn normalises queries across all heads"):
        assert HeadLayout.of(model).layers_with_heads == (1, 2)


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_permuted_query_heads_are_refused(
    tiny_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, layer: int
) -> None:
    """A llama whose attention hands each query to its neighbour: names and shapes fit, the rows do not."""
    model = tiny_model("llama", num_key_value_heads=4)
    rotary = modeling_llama.apply_rotary_pos_emb

    def rolled(q: Tensor, k: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        q, k = rotary(q, k, *args, **kwargs)
        return q.roll(1, dims=1), k

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr(modeling_llama, "apply_rotary_pos_emb", rolled)
            return type(self).forward(self, *args, **kwargs)

    attention = model.model.layers[layer].self_attn
    attention.forward = types.MethodType(forward, attention)
    with pytest.raises(
        UnsupportedArchitecture, match=rf"layer {layer} \(model\.layers\.{layer}\.self_attn\).*castune supports llama"
    ):
        HeadLayout.of(model)


@pytest.mark.parametrize("order", [(1, 0, 2), (2, 1, 0)], ids=["key-first", "value-first"])
def test_keys_and_values_taken_for_queries_are_refused(tiny_model: Callable[..., Any], order: tuple[int, ...]) -> None:
    """A bloom whose projection holds `[k_h | q_h | v_h]` or `[v_h | k_h | q_h]` a head: no other head moves."""
    model = tiny_model("bloom")
    attention = model.transformer.h[1].self_attention
    split = attention._reshape

    def reordered(fused: Tensor) -> tuple[Tensor, ...]:
        parts = split(fused)
        return tuple(parts[i] for i in order)

    attention._reshape = reordered
    with pytest.raises(UnsupportedArchitecture, match=r"layer 1 .*the rows hold keys or values"):
        HeadLayout.of(model)


@pytest.mark.parametrize("layer", [0, 2])
def test_heads_mixed_before_the_output_projection_are_refused(tiny_model: Callable[..., Any], layer: int) -> None:
    """Talking heads: each head's output leaks a little into all others."""
    model = tiny_model("llama")
    model.model.layers[layer].self_attn.o_proj.register_forward_pre_hook(
        lambda _m, args: (args[0] + 0.01 * args[0].unflatten(-1, (4, 8)).sum(-2).repeat(1, 1, 4),)
    )
    with pytest.raises(UnsupportedArchitecture, match=f"layer {layer} .*head 0 also moved other heads"):
        HeadLayout.of(model)


def test_a_head_without_effect_is_refused(tiny_model: Callable[..., Any]) -> None:
    """Attention that ignores its queries."""
    model = tiny_model("gpt2")
    model.transformer.h[1].attn.c_proj.register_forward_pre_hook(lambda _m, args: (torch.zeros_like(args[0]),))
    with pytest.raises(UnsupportedArchitecture, match="layer 1 .*did not move its output"):
        HeadLayout.of(model)


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Linear(4, 4),
        lambda: nn.TransformerEncoderLayer(8, 2, batch_first=True),
        lambda: AutoModelForCausalLM.from_config(
            AutoConfig.for_model("mamba", vocab_size=258, hidden_size=16, state_size=4, num_hidden_layers=2)
        ),
    ],
    ids=["linear", "torch-encoder", "mamba"],
)
def test_models_without_known_attention_are_refused(make: Callable[[], nn.Module]) -> None:
    with pytest.raises(UnsupportedArchitecture, match="castune supports llama, mistral") as error:
        HeadLayout.of(make())
    assert isinstance(error.value, CastuneError)
    assert "\n" not in str(error.value)


def test_encoder_decoders_are_refused() -> None:
    config = AutoConfig.for_model("t5", vocab_size=258, d_model=16, d_kv=4, d_ff=16, num_layers=2, num_heads=4)
    with pytest.raises(UnsupportedArchitecture, match="t5 is an encoder-decoder"):
        HeadLayout.of(AutoModelForSeq2SeqLM.from_config(config))


@pytest.mark.parametrize("training", [True, False])
def test_locating_heads_leaves_the_model_as_it_was(any_tiny_model: Any, training: bool) -> None:
    before = {name: value.clone() for name, value in any_tiny_model.state_dict().items()}
    any_tiny_model.train(training)
    HeadLayout.of(any_tiny_model)
    assert all(module.training == training for module in any_tiny_model.modules())
    assert hooks_left(any_tiny_model) == 0
    assert all(torch.equal(value, before[name]) for name, value in any_tiny_model.state_dict().items())


def test_a_refused_model_is_left_as_it_was(tiny_model: Callable[..., Any]) -> None:
    model = tiny_model("llama").train()
    handle = model.model.layers[1].self_attn.o_proj.register_forward_pre_hook(lambda _m, args: (args[0] * 0,))
    with pytest.raises(UnsupportedArchitecture):
        HeadLayout.of(model)
    handle.remove()
    assert hooks_left(model) == 0
    assert model.training


def test_a_layer_without_heads_is_an_index_error(tiny_model: Callable[..., Any]) -> None:
    layout = HeadLayout.of(tiny_model("llama"))
    hollow = HeadLayout("llama", layout.decoder_path, (None, *layout.attention[1:]))
    assert hollow.n_heads(0) == 0
    assert hollow.layers_with_heads == (1, 2)
    assert hollow.heads[0] == (1, 0)
    with pytest.raises(IndexError, match="layer 0 has no attention heads"):
        hollow.query_rows(0, 0)
