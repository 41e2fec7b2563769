"""First-order effects of ablation, against finite differences along the path of the exact ablation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from castune.core.ablation import ablate_at
from castune.core.attribution import attributed, taped
from castune.core.heads import HeadLayout
from castune.core.units import Site, UnitLayout
from castune.errors import UnsupportedArchitecture
from castune.names import KINDS

IDS = torch.arange(40, 100).reshape(3, 20)  # longer than the sliding windows of 16


class InFloat64(TorchFunctionMode):
    """Families compute norms, rotary embeddings and attention in float32 whatever the model's dtype is; here not."""

    def __torch_function__(
        self, func: Any, _types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        def wide(value: Any) -> Any:
            return torch.float64 if value is torch.float32 else value

        func = torch.Tensor.double if func is torch.Tensor.float else func
        return func(*map(wide, args), **{name: wide(value) for name, value in (kwargs or {}).items()})


def outcomes(model: Any) -> Tensor:
    """A smooth outcome of every row, in the model's own dtype."""
    with InFloat64() if next(model.parameters()).dtype == torch.float64 else nullcontext():
        logits_BSV = model(input_ids=IDS, use_cache=False).logits
    return logits_BSV.log_softmax(-1)[:, -3:, 7].mean(1) - logits_BSV.log_softmax(-1)[:, -1, 11]


def layout_of(model: Any, kind: str) -> UnitLayout:
    try:
        return UnitLayout.of(model, HeadLayout.of(model), [kind], n_mlp_groups=3)
    except UnsupportedArchitecture:
        pytest.skip(f"this family has no {kind}")


@contextmanager
def towards(model: Any, site: Site, unit: int, step: float, filling_W: Tensor | None) -> Iterator[None]:
    """The model a step of the way from what a unit contributes to what ablation puts in its place."""
    owner = site.owner_W == unit

    def moved(z: Tensor) -> Tensor:
        filling = torch.zeros_like(z) if filling_W is None else filling_W.to(z).expand_as(z)
        return torch.where(owner, z + step * (filling - z), z)

    module = model.get_submodule(site.path)
    if site.is_output:
        handle = module.register_forward_hook(lambda _module, _args, output: moved(output))
    else:
        handle = module.register_forward_pre_hook(lambda _module, args: (moved(args[0]), *args[1:]))
    try:
        yield
    finally:
        handle.remove()


@pytest.mark.parametrize("kind", ["q_head", "k_group", "v_group", "mlp_group", "mlp_block"])
def test_an_effect_is_the_derivative_of_the_exact_ablation_at_its_start(any_tiny_model: Any, kind: str) -> None:
    model = any_tiny_model.double().requires_grad_(False)
    model.set_experts_implementation("eager")  # the others have no float64
    layout = layout_of(model, kind)
    sites = {one.place: layout.site(*one.place) for one in layout.units}
    filling = {site: torch.linspace(-0.1, 0.1, site.width) for site in sites.values()} if kind == "q_head" else None
    with taped(model, sites.values()) as tape:
        effects = attributed(tape, outcomes(model), filling)
    step = 1e-4
    for one in layout.units:
        site = sites[one.place]
        ends = []
        for signed in (step, -step):
            with torch.no_grad(), towards(model, site, one.index, signed, filling[site] if filling else None):
                ends.append(outcomes(model))
        expected_B = (ends[0] - ends[1]) / (2 * step)
        assert expected_B.abs().max() > 0
        torch.testing.assert_close(effects[site][:, one.index], expected_B, rtol=1e-6, atol=1e-6)
    # And the path ends in the exact ablation.
    with torch.no_grad(), towards(model, site, one.index, 1.0, filling[site] if filling else None):
        there = outcomes(model)
    with torch.no_grad(), ablate_at(model, site, one.index, filling[site] if filling else None):
        torch.testing.assert_close(there, outcomes(model), rtol=1e-12, atol=1e-12)


def test_taping_changes_no_forward_and_leaves_nothing(any_tiny_model: Any) -> None:
    layout = UnitLayout(HeadLayout.of(any_tiny_model))
    before = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in any_tiny_model.modules())
    with torch.no_grad():
        expected = outcomes(any_tiny_model)
    any_tiny_model.requires_grad_(False)
    with taped(any_tiny_model, {layout.site(*one.place) for one in layout.units}):
        found = outcomes(any_tiny_model)
    assert torch.equal(found.detach(), expected)
    assert found.requires_grad
    assert sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in any_tiny_model.modules()) == before


def test_effects_are_exact_where_the_model_is_linear_in_its_heads(tiny_model: Callable[..., Any]) -> None:
    model = tiny_model("llama", num_hidden_layers=1).double().requires_grad_(False)
    model.model.norm = torch.nn.Identity()
    model.model.layers[0].mlp.down_proj.weight.zero_()
    layout = UnitLayout(HeadLayout.of(model))
    site = layout.site("q_head", 0)

    def margin() -> Tensor:
        logits_BSV = model(input_ids=IDS, use_cache=False).logits
        return logits_BSV[:, -1, 7] - logits_BSV[:, -1, 11]

    with taped(model, [site]) as tape:
        whole = margin()
        effects_BU = attributed(tape, whole)[site]
    for one in layout.units:
        with torch.no_grad(), ablate_at(model, site, one.index):
            torch.testing.assert_close(whole.detach() + effects_BU[:, one.index], margin(), rtol=1e-10, atol=1e-12)
    assert effects_BU.abs().min() > 0


def test_rows_do_not_mix(tiny_model: Callable[..., Any]) -> None:
    model = tiny_model("llama").double().requires_grad_(False)
    layout = UnitLayout(HeadLayout.of(model))
    sites = [layout.site("q_head", layer) for layer in range(layout.heads.n_layers)]
    with taped(model, sites) as tape:
        together = attributed(tape, outcomes(model))
    with taped(model, sites) as tape:
        first = outcomes(model) * torch.tensor([0.0, 1.0, 0.0])
        alone = attributed(tape, first)
    for site in sites:
        torch.testing.assert_close(alone[site][1], together[site][1], rtol=1e-10, atol=1e-14)
        assert not alone[site][[0, 2]].any()


def test_kinds_are_those_of_the_names() -> None:
    assert set(KINDS.values()) == {"q_head", "o_head", "k_group", "v_group", "mlp_group", "mlp_block"}
