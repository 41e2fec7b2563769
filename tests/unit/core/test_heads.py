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

# More families with the fused, interleaved layouts; not in the list of supported ones, and yet right.
FALCON = {"new_decoder_architecture": True, "num_kv_heads": 2, "alibi": False, "bias": False}
FALCON_MULTI_QUERY = {"new_decoder_architecture": False, "multi_query": True, "alibi": False}


def expected_query_rows(model: Any, weight: Tensor) -> Tensor:
    """`[H, d, D]` of a weight-shaped tensor, cut by what each family's attention code does with the projection."""
    kind, config = model.config.model_type, model.config
    n_heads = config.num_attention_heads
    if kind == "gpt2":  # Conv1D (in, out), out = q | k | v
        return weight[:, : config.n_embd].reshape(config.n_embd, n_heads, -1).permute(1, 2, 0)
    if kind == "gpt_neox":  # (head, q | k | v, width)
        return weight.reshape(n_heads, 3, -1, weight.shape[1])[:, 0]
    width = getattr(config, "head_dim", None) or config.hidden_size // n_heads
    return weight[: n_heads * width].reshape(n_heads, width, -1)


def hooks_left(model: nn.Module) -> int:
    return sum(
        len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) + ("forward" in m.__dict__)
        for m in model.modules()
    )


def test_every_family_has_its_heads(any_tiny_model: Any) -> None:
    layout = HeadLayout.of(any_tiny_model)
    assert layout.heads == tuple(HeadId(layer, head) for layer in range(3) for head in range(4))
    assert layout.n_layers == 3
    assert layout.layers_with_heads == (0, 1, 2)
    for layer in range(3):
        in_features = (
            layout.output_projection(any_tiny_model, layer).weight.numel() // any_tiny_model.config.hidden_size
        )
        claimed = [c for h in range(4) for c in range(*layout.output_columns(layer, h).indices(10**6))]
        assert claimed == list(range(in_features)), "the heads tile the output projection's input"


def test_head_blocks_put_together_equal_the_full_gradient(any_tiny_model: Any) -> None:
    layout = HeadLayout.of(any_tiny_model)
    any_tiny_model(IDS, labels=IDS).loss.backward()
    for layer in range(3):
        gradient = layout.query_projection(any_tiny_model, layer).weight.grad
        expected = expected_query_rows(any_tiny_model, gradient)
        assert expected.abs().amax((1, 2)).min() > 0, "a head without gradient would prove nothing"
        assert torch.equal(layout.by_head(layer, gradient), expected)
        # And the single slices say the same as the stacked blocks.
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


def _assert_weight_noise_moves_one_slice(model: Any) -> None:
    layout = HeadLayout.of(model)
    for layer, head in layout.heads:
        before = _attention_outputs(model, layout, layer)
        noisy = copy.deepcopy(model)
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


def test_noise_on_a_heads_weights_moves_its_slice_only(any_tiny_model: Any) -> None:
    _assert_weight_noise_moves_one_slice(any_tiny_model)


@pytest.mark.parametrize(("kind", "changes"), [("falcon", FALCON), ("falcon", FALCON_MULTI_QUERY), ("bloom", {})])
def test_other_fused_layouts(kind: str, changes: dict[str, Any]) -> None:
    sizes = {"vocab_size": 258, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
    torch.manual_seed(0)
    config = (
        AutoConfig.for_model(kind, **sizes, n_head=4, n_layer=3, initializer_range=0.2, **changes)
        if kind == "bloom"
        else AutoConfig.for_model(kind, **sizes, initializer_range=0.2, **changes)
    )
    model = AutoModelForCausalLM.from_config(config).float().eval()
    assert len(HeadLayout.of(model).heads) == 12
    _assert_weight_noise_moves_one_slice(model)


def test_a_norm_over_all_heads_is_told(tiny_model: Callable[..., Any]) -> None:
    with pytest.warns(UserWarning, match="normalises queries across all heads") as caught:
        layout = HeadLayout.of(tiny_model("olmo2"))
    assert len(caught) == 1
    assert len(layout.heads) == 12


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
