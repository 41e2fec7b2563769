"""Units of every kind, checked with weights, gradients and zeroed weights, and not with their own probes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from castune import HeadLayout, UnsupportedArchitecture
from castune.artifacts import Unit
from castune.core.ablation import ablate_at, record_residuals, resume_from, site_means
from castune.core.units import UnitLayout
from castune.names import KINDS

IDS = torch.arange(40, 100).reshape(3, 20)  # longer than the sliding windows of 16
N_GROUPS = 5  # does not divide the 48 neurons
EXPERTS = ("mixtral", "qwen3_moe", "llama4_text", "gpt_oss", "qwen3_next", "deepseek_v3")
NOT_THERE = {
    **{(family, kind): "mixture of experts" for family in EXPERTS for kind in ("mlp_block", "mlp_group")},
    **{("deepseek_v3", kind): "no projection of keys and of values" for kind in ("k_group", "v_group")},
}


@torch.no_grad()
def logits(model: Any, ids: Tensor = IDS) -> Tensor:
    return model(input_ids=ids, use_cache=False).logits


def hooks_left(model: nn.Module) -> int:
    return sum(
        len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) + ("forward" in m.__dict__)
        for m in model.modules()
    )


def layout_of(model: Any, *kinds: str, **options: Any) -> UnitLayout:
    return UnitLayout.of(model, HeadLayout.of(model), kinds, n_mlp_groups=N_GROUPS, **options)


@pytest.fixture
def layouts(any_family: str, any_tiny_model: Any) -> dict[str, UnitLayout]:
    """Where the units of every kind are that the family has."""
    heads = HeadLayout.of(any_tiny_model)
    kinds = [kind for kind in KINDS.values() if (any_family, kind) not in NOT_THERE]
    return {kind: UnitLayout.of(any_tiny_model, heads, (kind,), n_mlp_groups=N_GROUPS) for kind in kinds}


@pytest.mark.parametrize(("family", "unknown"), list(NOT_THERE))
def test_families_without_a_kind_say_so(tiny_model: Callable[..., Any], family: str, unknown: str) -> None:
    model = tiny_model(family)
    heads = HeadLayout.of(model)
    layer = 1 if family in ("llama4_text", "deepseek_v3") and unknown.startswith("mlp") else 0
    with pytest.raises(
        UnsupportedArchitecture, match=f"layer {layer} .*{NOT_THERE[family, unknown]}.*support"
    ) as error:
        UnitLayout.of(model, heads, (unknown,), n_mlp_groups=N_GROUPS)
    assert "\n" not in str(error.value)
    assert hooks_left(model) == 0


def test_parts_tile_the_projections_and_are_what_each_family_computes(
    any_family: str, any_tiny_model: Any, layouts: dict[str, UnitLayout]
) -> None:
    """Every row or column belongs to one unit; fused projections are tiled by queries, keys and values together."""
    for kind, layout in layouts.items():
        claimed: dict[str, Tensor] = {}
        fused = layout.heads.at(layout.heads.layers_with_heads[0]).layout != "separate"
        together = kind in ("q_head", "k_group", "v_group") and fused
        every = UnitLayout.of(any_tiny_model, layout.heads, ("q_head", "k_group", "v_group")) if together else layout
        for one in every.units:
            for part in every.parts(one):
                weight = every.weight(any_tiny_model, part.path)
                part.of(claimed.setdefault(part.path, torch.zeros_like(weight)))[:] += 1
                assert part.size == (weight.t() if part.transposed else weight).shape[part.axis]
        assert all((count == 1).all() for count in claimed.values())
        n_layers = 2 if any_family == "qwen3_next" and not kind.startswith("mlp") else 3
        n_projections = len(claimed) // n_layers
        gated = any_family not in ("gpt2", "gpt_neox", "falcon", "falcon_multi_query", "opt", "bloom", "starcoder2")
        halves = any_family in ("phi3", "glm4")
        assert n_projections == ((3 if gated and not halves else 2) if kind.startswith("mlp") else 1)


def expected_keys_and_values(model: Any, weight: Tensor) -> tuple[Tensor, Tensor]:
    """`[G, K, D]` of keys and of values, cut out of a fused weight by what each family's attention code does."""
    config, kind = model.config, model.config.model_type
    n_heads, width = config.num_attention_heads, config.hidden_size // config.num_attention_heads
    if kind in ("gpt2", "phi3"):  # q | k | v, each (head, width)
        parts = (weight.t() if kind == "gpt2" else weight).reshape(3, n_heads, width, -1)
        return parts[1], parts[2]
    if kind in ("gpt_neox", "bloom"):  # (head, q | k | v, width)
        parts = weight.reshape(n_heads, 3, width, -1)
        return parts[:, 1], parts[:, 2]
    groups = config.num_kv_heads if config.new_decoder_architecture else 1
    parts = weight.reshape(groups, n_heads // groups + 2, width, -1)
    return parts[:, -2], parts[:, -1]


@pytest.mark.parametrize("family", ["gpt2", "phi3", "gpt_neox", "bloom", "falcon", "falcon_multi_query"])
def test_gradients_of_fused_keys_and_values(tiny_model: Callable[..., Any], family: str) -> None:
    model = tiny_model(family)
    layout = layout_of(model, "k_group", "v_group")
    model(IDS, labels=IDS).loss.backward()
    for layer in range(3):
        gradient = layout.weight(model, layout.key_values[layer].key_path).grad
        for name, expected in zip(("k_group", "v_group"), expected_keys_and_values(model, gradient), strict=True):
            assert expected.abs().amax((1, 2)).min() > 0, "a group without gradient would prove nothing"
            units = [one for one in layout.units if one.kind == name and one.layer == layer]
            found = [layout.parts(one)[0].of(gradient) for one in units]
            assert torch.equal(torch.stack(found), expected)


def silenced(model: Any, layout: UnitLayout, one: Any) -> Any:
    """A copy of the model without a unit: what leads into it is zero (an MLP's neurons), or what leads out of it."""
    crippled = copy.deepcopy(model)
    for part in layout.parts(one):
        if one.kind.startswith("mlp") and part.axis == 1:
            continue  # every activation maps 0 to 0
        module: Any = crippled.get_submodule(part.path)
        with torch.no_grad():
            part.of(module.weight)[:] = 0
            if part.axis == 0 and getattr(module, "bias", None) is not None:
                module.bias[part.at] = 0
    return crippled


def test_ablation_equals_zeroed_weights_and_resumes(any_tiny_model: Any, layouts: dict[str, UnitLayout]) -> None:
    for layout in layouts.values():
        whole = logits(any_tiny_model)
        residuals: dict[int, Tensor] = {}
        with record_residuals(any_tiny_model, layout.heads, residuals):
            logits(any_tiny_model)
        for one in layout.units:
            # A query head is ablated behind the attention, as its columns of the output projection are.
            as_columns = one._replace(kind="o_head") if one.kind == "q_head" else one
            expected = logits(silenced(any_tiny_model, layout, as_columns))
            with ablate_at(any_tiny_model, layout.site(*one.place), one.index):
                found = logits(any_tiny_model)
                with resume_from(any_tiny_model, layout.heads, one.layer, residuals[one.layer]):
                    assert torch.equal(logits(any_tiny_model, IDS.flip(0)), found)
            assert (expected - whole).abs().max() > 1e-4, "the unit must matter"
            torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)
        assert hooks_left(any_tiny_model) == 0
        assert torch.equal(logits(any_tiny_model), whole)


def test_one_unit_a_row_equals_one_by_one(any_family: str, any_tiny_model: Any, layouts: dict[str, UnitLayout]) -> None:
    for kind, layout in layouts.items():
        whole = logits(any_tiny_model)
        for layer in sorted({one.layer for one in layout.units}):
            site, last = layout.site(kind, layer), layout.n_units(kind, layer) - 1
            units = torch.tensor([last, -1, 0])
            with ablate_at(any_tiny_model, site, units):
                together = logits(any_tiny_model)
            torch.testing.assert_close(together[1], whole[1], rtol=0, atol=1e-5)
            for row in (0, 2):
                with ablate_at(any_tiny_model, site, int(units[row])):
                    alone = logits(any_tiny_model, IDS[row : row + 1])[0]
                torch.testing.assert_close(together[row], alone, rtol=0, atol=2e-5)
                assert (together[row] - whole[row]).abs().max() > 1e-4


@pytest.mark.parametrize("family", ["llama", "phi3", "opt", "falcon"])
def test_units_of_several_kinds_in_one_batch(tiny_model: Callable[..., Any], family: str) -> None:
    """A row each, of whatever kinds and layers; two kinds may share a fused projection."""
    model = tiny_model(family)
    layout = layout_of(model, *KINDS.values())
    units = [Unit("k_group", 0, 1), Unit("v_group", 0, 0), Unit("mlp_group", 2, 3)]
    with ExitStack() as stack:
        for row, one in enumerate(units):
            of_row = torch.tensor([one.index if other == row else -1 for other in range(3)])
            stack.enter_context(ablate_at(model, layout.site(*one.place), of_row))
        together = logits(model)
    for row, one in enumerate(units):
        with ablate_at(model, layout.site(*one.place), one.index):
            torch.testing.assert_close(together[row], logits(model)[row], rtol=0, atol=2e-5)


@pytest.mark.parametrize("family", ["llama", "opt", "phi3"])
def test_means_of_sites_equal_hand_computation(tiny_model: Callable[..., Any], family: str) -> None:
    model = tiny_model(family)
    layout = layout_of(model, "k_group", "mlp_group")
    sites = {name: layout.site(name, 1) for name in ("k_group", "mlp_group")}
    mask = torch.arange(20) < torch.tensor([20, 7, 13])[:, None]

    def forwards() -> Iterator[Tensor]:
        logits(model)
        yield mask

    means = site_means(model, sites.values(), forwards)
    for name, site in sites.items():
        seen: list[Tensor] = []

        def record(_module: Any, args: Any, output: Tensor, seen: list[Tensor] = seen, name: str = name) -> None:
            seen.append(args[0] if name == "mlp_group" else output)

        handle = model.get_submodule(site.path).register_forward_hook(record)
        logits(model)
        handle.remove()
        torch.testing.assert_close(means[site], seen[0].reshape(3, 20, -1)[mask].mean(0), rtol=0, atol=1e-6)


def test_all_groups_together_are_the_whole_mlp(tiny_model: Callable[..., Any]) -> None:
    layout = layout_of(tiny_model("llama"), "mlp_group", "mlp_block")
    spans = layout.site("mlp_group", 1).spans
    assert [stop - start for start, stop in spans] == [10, 10, 10, 9, 9]
    assert [spans[0][0], *(stop for _, stop in spans)] == [0, *(start for start, _ in spans[1:]), 48]
    assert layout.site("mlp_block", 1).spans == ((0, 48),)
    assert [one.kind for one in layout.units] == ["mlp_group"] * 15 + ["mlp_block"] * 3


def test_query_heads_need_no_location_of_anything_else(tiny_model: Callable[..., Any]) -> None:
    model = tiny_model("mixtral")
    heads = HeadLayout.of(model)
    assert UnitLayout(heads).units == tuple(Unit("q_head", *head) for head in heads.heads)
    assert layout_of(model, "q_head").units == UnitLayout(heads).units


@pytest.mark.parametrize(("family", "dense"), [("llama4_text", [0, 2]), ("deepseek_v3", [0])])
def test_dense_layers_of_a_model_with_experts_can_be_chosen(
    tiny_model: Callable[..., Any], family: str, dense: list[int]
) -> None:
    layout = layout_of(tiny_model(family), "mlp_group", layers=dense)
    assert {one.layer for one in layout.units} == set(dense)


# -- what the probes catch


def test_keys_and_values_in_each_others_place_are_refused(tiny_model: Callable[..., Any]) -> None:
    """A bloom whose projection holds `[q_h | v_h | k_h]` a head: names, shapes and queries fit."""
    model = tiny_model("bloom")
    attention = model.transformer.h[1].self_attention
    split = attention._reshape
    attention._reshape = lambda fused: tuple(split(fused)[i] for i in (0, 2, 1))
    with pytest.raises(UnsupportedArchitecture, match=r"layer 1 \(transformer\.h\.1\.self_attention\): .*hold values"):
        layout_of(model, "k_group")


class _Rolled(nn.Module):
    def forward(self, gate: Tensor) -> Tensor:
        return nn.functional.silu(gate).roll(1, -1)


class _Nothing(nn.Module):
    def forward(self, hidden: Tensor) -> Tensor:
        return torch.zeros_like(hidden)


def test_neurons_that_are_mixed_are_refused(tiny_model: Callable[..., Any]) -> None:
    """An activation that hands every neuron's gate to its neighbour: the rows of a group are not its columns'."""
    model = tiny_model("llama")
    model.model.layers[2].mlp.act_fn = _Rolled()
    with pytest.raises(UnsupportedArchitecture, match=r"layer 2 .*gate_proj.*also moved neurons of other groups"):
        layout_of(model, "mlp_group")
    assert hooks_left(model) == 0


def test_neurons_without_effect_are_refused(tiny_model: Callable[..., Any]) -> None:
    model = tiny_model("gpt2")
    model.transformer.h[1].mlp.act = _Nothing()
    with pytest.raises(UnsupportedArchitecture, match=r"layer 1 .*did not move its neurons"):
        layout_of(model, "mlp_group")


def test_more_groups_than_neurons_are_refused(tiny_model: Callable[..., Any]) -> None:
    model = tiny_model("llama")
    with pytest.raises(UnsupportedArchitecture, match="48 neurons cannot be cut into 49 groups"):
        UnitLayout.of(model, HeadLayout.of(model), ("mlp_group",), n_mlp_groups=49)


def test_a_norm_over_all_kv_groups_is_told(tiny_model: Callable[..., Any]) -> None:
    model = tiny_model("olmo2")
    with pytest.warns(UserWarning, match="normalises queries"):
        heads = HeadLayout.of(model)
    with pytest.warns(UserWarning, match="normalises keys across all KV groups") as caught:
        layout = UnitLayout.of(model, heads, ("k_group",))
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert len(layout.units) == 6


@pytest.mark.parametrize(
    ("family", "kinds", "reasons"),
    [
        ("llama", ("q_head", "k_group", "v_group", "o_head", "mlp_block"), []),
        ("qwen3_moe", ("q_head", "k_group", "v_group", "o_head"), ["mixture of experts"]),
        ("deepseek_v3", ("q_head", "o_head"), ["no projection of keys and of values", "mixture of experts"]),
    ],
)
def test_all_kinds_that_can_be_located(
    tiny_model: Callable[..., Any], family: str, kinds: tuple[str, ...], reasons: list[str]
) -> None:
    model = tiny_model(family)
    heads = HeadLayout.of(model)
    layout, found = UnitLayout.locatable(model, heads)
    assert layout.kinds == kinds
    assert all(reason in said for reason, said in zip(reasons, found, strict=True))
    for kind in kinds:
        one = UnitLayout.of(model, heads, (kind,))
        assert [unit for unit in layout.units if unit.kind == kind] == list(one.units)
        assert all(layout.parts(unit) == one.parts(unit) for unit in one.units)
    if not reasons:
        groups, _ = UnitLayout.locatable(model, heads, n_mlp_groups=4)
        assert sum(unit.kind == "mlp_group" for unit in groups.units) == 12
