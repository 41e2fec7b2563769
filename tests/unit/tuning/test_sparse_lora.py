"""Head-sparse LoRA against plain PEFT LoRA and against arithmetic by hand."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_training import IDS, SOME, SelectionOf
from torch import Tensor, nn

from castune.artifacts import HeadSelection
from castune.core.heads import HeadLayout
from castune.core.units import UnitLayout
from castune.errors import CastuneError
from castune.tuning.row_lora import budget, sparse_lora
from castune.tuning.targets import targets

FAMILIES = ("llama", "phi3", "gpt2", "gpt_neox", "mixtral")


def lora_parameters(model: nn.Module, part: str) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if f"lora_{part}" in name}


def fill_b(model: nn.Module, seed: int = 1) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in lora_parameters(model, "B").values():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    model.zero_grad()
    # Not the mean: no head's contribution may cancel out.
    model(input_ids=IDS).logits.square().mean().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", FAMILIES)
def test_only_query_projections_of_selected_layers_are_wrapped(
    tiny_model: Callable[..., Any], selection_of: SelectionOf, family: str
) -> None:
    model = tiny_model(family)
    layout = HeadLayout.of(model)
    before = {name: type(module) for name, module in model.named_modules()}
    peft_model = sparse_lora(model, selection_of(model, SOME), r=4)
    assert isinstance(peft_model, PeftModel)
    wrapped = {
        name.removeprefix("base_model.model."): module
        for name, module in peft_model.named_modules()
        if hasattr(module, "lora_A")
    }
    assert set(wrapped) == {layout.at(0).query_path, layout.at(2).query_path}
    after = {name: type(module) for name, module in peft_model.get_base_model().named_modules()}
    assert {name for name, kind in before.items() if after[name] is not kind} == set(wrapped)
    trainable = {name for name, p in peft_model.named_parameters() if p.requires_grad}
    assert trainable == {*lora_parameters(peft_model, "A"), *lora_parameters(peft_model, "B")}
    assert len(trainable) == 4


@pytest.mark.parametrize("family", FAMILIES)
def test_a_fresh_adapter_changes_nothing(
    tiny_model: Callable[..., Any], selection_of: SelectionOf, family: str
) -> None:
    model = tiny_model(family)
    with torch.no_grad():
        before = model(input_ids=IDS).logits
        after = sparse_lora(model, selection_of(model, SOME), r=4).eval()(input_ids=IDS).logits
    assert torch.equal(before, after)


def test_all_heads_chosen_equals_plain_lora(tiny_model: Callable[..., Any], selection_of: SelectionOf) -> None:
    model = tiny_model("llama")
    torch.manual_seed(5)
    sparse = sparse_lora(model, selection_of(model, HeadLayout.of(model).heads), r=4, alpha=12)
    other = tiny_model("llama")
    torch.manual_seed(5)
    plain = get_peft_model(other, LoraConfig(r=4, lora_alpha=12, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    for part in "AB":
        ours, theirs = lora_parameters(sparse, part), lora_parameters(plain, part)
        assert list(ours) == list(theirs)
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    fill_b(sparse)
    fill_b(plain)
    assert torch.equal(sparse(input_ids=IDS).logits, plain(input_ids=IDS).logits)
    ours, theirs = gradients(sparse), gradients(plain)
    assert ours.keys() == theirs.keys()
    assert len(ours) == 6
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert all(gradient.abs().max() > 0 for gradient in ours.values())


def head_rows(family: str, layer_heads: tuple[int, ...]) -> set[int]:
    """Rows of heads of width 8 in the projection, by hand: neox interleaves [q_h | k_h | v_h]."""
    stride = 24 if family == "gpt_neox" else 8
    return {stride * head + row for head in layer_heads for row in range(8)}


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_of_unselected_rows_are_exactly_zero_and_of_selected_ones_are_not(
    tiny_model: Callable[..., Any], selection_of: SelectionOf, family: str
) -> None:
    model = tiny_model(family)
    peft_model = sparse_lora(model, selection_of(model, SOME), r=4)
    # Whatever an optimiser might write into masked rows, neither output nor gradient may see it.
    fill_b(peft_model)
    found = gradients(peft_model)
    layers = sorted(lora_parameters(peft_model, "B"))
    assert len(layers) == 2
    for name, heads in zip(layers, ((1, 3), (0,)), strict=True):
        rows = head_rows(family, heads)
        nonzero = set(found[name].abs().sum(1).nonzero().flatten().tolist())
        assert nonzero == rows


def test_values_in_masked_rows_do_not_reach_the_output(
    tiny_model: Callable[..., Any], selection_of: SelectionOf
) -> None:
    model = tiny_model("llama")
    peft_model = sparse_lora(model, selection_of(model, SOME), r=4)
    fill_b(peft_model)
    with torch.no_grad():
        before = peft_model(input_ids=IDS).logits
        for name, parameter in lora_parameters(peft_model, "B").items():
            kept = head_rows("llama", (1, 3) if "layers.0." in name else (0,))
            parameter[[row for row in range(32) if row not in kept]] = 7.0
        assert torch.equal(peft_model(input_ids=IDS).logits, before)
        parameter[0] = 7.0
        assert not torch.equal(peft_model(input_ids=IDS).logits, before)


@pytest.mark.parametrize("family", FAMILIES)
def test_masks_of_heads_partition_the_query_rows(
    tiny_model: Callable[..., Any], selection_of: SelectionOf, family: str
) -> None:
    model = tiny_model(family)
    layout = HeadLayout.of(model)
    path = layout.at(1).query_path

    def mask_of(*heads: tuple[int, int]) -> torch.Tensor:
        return targets(UnitLayout(layout), selection_of(model, heads))[path].mask

    masks = [mask_of((1, head)) for head in range(4)]
    assert all(set(mask.nonzero().flatten().tolist()) == head_rows(family, (h,)) for h, mask in enumerate(masks))
    both = mask_of((1, 0), (1, 2), (0, 1))
    assert torch.equal(both, masks[0] | masks[2])


def test_budget_by_hand(tiny_model: Callable[..., Any], selection_of: SelectionOf) -> None:
    model = tiny_model("llama")
    selection = selection_of(model, SOME)
    peft_model = sparse_lora(model, selection, r=4)
    # Two layers: A is 4 x 32 and B is 32 x 4 each; three heads of eight rows are effective.
    assert budget(peft_model, UnitLayout(HeadLayout.of(model)), selection) == {
        "heads": 3, "query_rows": 24, "a_matrices": 2, "trainable_parameters": 2 * (128 + 128),
        "effective_parameters": 2 * 128 + 24 * 4,
    }  # fmt: skip


def test_frozen_a_trains_b_alone_and_makes_budgets_equal(
    tiny_model: Callable[..., Any], selection_of: SelectionOf
) -> None:
    ledgers = []
    for heads in (((0, 0), (0, 1)), ((0, 0), (2, 1))):
        model = tiny_model("llama")
        selection = selection_of(model, heads)
        peft_model = sparse_lora(model, selection, r=4, freeze_a=True)
        assert not any(p.requires_grad for p in lora_parameters(peft_model, "A").values())
        assert all(p.requires_grad for p in lora_parameters(peft_model, "B").values())
        fill_b(peft_model)
        assert all("lora_B" in name for name in gradients(peft_model))
        ledgers.append(budget(peft_model, UnitLayout(HeadLayout.of(model)), selection))
    assert [ledger["effective_parameters"] for ledger in ledgers] == [64, 64]
    assert [ledger["a_matrices"] for ledger in ledgers] == [0, 0]


def test_fused_projections_never_train_keys_and_values(
    tiny_model: Callable[..., Any], selection_of: SelectionOf
) -> None:
    model = tiny_model("phi3")
    peft_model = sparse_lora(model, selection_of(model, HeadLayout.of(model).heads), r=4)
    for gradient in (g for name, g in gradients(peft_model).items() if "lora_B" in name):
        assert gradient.shape[0] == 96
        assert gradient[:32].abs().sum(1).min() > 0
        assert not gradient[32:].any()


# -- refusals


def test_selection_of_another_model_names_both(tiny_model: Callable[..., Any], selection_of: SelectionOf) -> None:
    model, other = tiny_model("llama"), tiny_model("llama", seed=1)
    selection = selection_of(other, SOME)
    with pytest.raises(CastuneError, match=selection.model_fingerprint) as caught:
        sparse_lora(model, selection)
    assert selection_of(model, SOME).model_fingerprint in str(caught.value)


@pytest.mark.parametrize("head", [(0, 4), (3, 0), (0, -1), (-1, 0)])
def test_heads_that_do_not_exist_are_named(
    tiny_model: Callable[..., Any], selection_of: SelectionOf, head: tuple[int, int]
) -> None:
    model = tiny_model("llama")
    with pytest.raises(CastuneError, match="heads this model does not have"):
        sparse_lora(model, selection_of(model, [(1, 1), head]))
    assert not any("lora" in name for name, _ in model.named_modules())


def test_empty_selection_is_refused(tiny_model: Callable[..., Any], selection_of: SelectionOf) -> None:
    model = tiny_model("llama")
    with pytest.raises(CastuneError, match="no heads"):
        sparse_lora(model, selection_of(model, []))
    with pytest.raises(CastuneError, match="no heads"):
        sparse_lora(model, dataclasses.replace(selection_of(model, SOME), units=()))


def test_unloading_gives_the_base_back(
    tiny_model: Callable[..., Any],
    selection_of: SelectionOf,
    state_of: Callable[[Any], dict[str, Any]],
    same_bits: Callable[[Tensor, Tensor], bool],
) -> None:
    model = tiny_model("gpt2")
    before = state_of(model)
    peft_model = sparse_lora(model, selection_of(model, SOME))
    fill_b(peft_model)
    after = state_of(peft_model.unload())
    assert after["modules"] == before["modules"]
    assert all(same_bits(after["tensors"][name], before["tensors"][name]) for name in before["tensors"])


def test_a_model_that_wears_an_adapter_already_is_refused(
    tiny_model: Callable[..., Any], selection_of: SelectionOf
) -> None:
    model = tiny_model("llama")
    selection = selection_of(model, SOME)
    # B at random: it changes rows that no mask knows of.
    config = LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
    with pytest.raises(CastuneError, match=r"adapter.*(unload|merge)"):
        sparse_lora(get_peft_model(model, config), selection, r=4)
    # Its own base, which PEFT wrapped in place, wears it too.
    with pytest.raises(CastuneError, match=r"adapter.*(unload|merge)"):
        sparse_lora(model, selection, r=4)


def test_selections_that_share_a_layer_begin_alike_there(
    tiny_model: Callable[..., Any], selection_of: Callable[..., HeadSelection]
) -> None:
    def first_values(heads: Sequence[tuple[int, int]], seed: int | None) -> dict[str, Tensor]:
        model = tiny_model("llama")
        peft_model = sparse_lora(model, selection_of(model, heads), r=4, seed=seed)
        return {name: p.detach() for name, p in peft_model.named_parameters() if "lora_A" in name}

    one, other = first_values([(0, 1), (2, 0)], 7), first_values([(1, 0), (2, 3)], 7)
    [shared] = one.keys() & other.keys()
    assert torch.equal(one[shared], other[shared])
    layers = list(one.values())
    assert not torch.equal(layers[0], layers[1])
    assert not torch.equal(one[shared], first_values([(2, 0)], 8)[shared])
    # PEFT's own distribution: uniform within 1 / sqrt(inputs).
    bound = 1 / layers[0].shape[1] ** 0.5
    assert 0.9 * bound < layers[0].abs().max() <= bound
