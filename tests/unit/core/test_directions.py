"""A direction taken out of the residual stream, compared with orthogonalised weights; and how it is found."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_models import make_tiny_model
from torch import Tensor, nn

from castune.core.ablation import project_out, record_residuals
from castune.core.directions import last_states, middle_layers, refusal_direction
from castune.core.heads import HeadLayout
from castune.core.mlps import mlp_layers
from castune.core.units import UnitLayout
from castune.errors import CastuneError

IDS = torch.arange(40, 100).reshape(3, 20)


@torch.no_grad()
def logits(model: Any, ids: Tensor = IDS) -> Tensor:
    return model(input_ids=ids, use_cache=False).logits


def drawn(width: int, seed: int = 0) -> Tensor:
    return torch.randn(width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def hooks_left(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


@torch.no_grad()
def orthogonalised(model: Any, layout: HeadLayout, direction_D: Tensor) -> Any:
    """A copy of the model of which no matrix that writes to the residual stream can write the direction."""
    found = copy.deepcopy(model)
    r_D = direction_D / direction_D.norm()
    head = found.get_output_embeddings()
    head.weight = nn.Parameter(head.weight.clone())  # what reads the stream stays
    mlps = mlp_layers(found, layout, list(range(layout.n_layers)), 1, prove=False)
    paths = [layout.at(layer).output_path for layer in range(layout.n_layers)] + [mlp.out_path for mlp in mlps.values()]
    for path in paths:
        module = found.get_submodule(path)
        rows = module.weight if type(module).__name__ == "Conv1D" else module.weight.t()  # views [inputs, D]
        rows -= torch.outer(rows @ r_D, r_D)
        if module.bias is not None:
            module.bias -= (module.bias @ r_D) * r_D
    for module in found.modules():
        if isinstance(module, nn.Embedding) and module.weight.shape[1] == len(r_D):
            module.weight.copy_(module.weight - torch.outer(module.weight @ r_D, r_D))
    return found


# Separate norms, learnt positions with biases, parallel attention and MLP, scaled residuals. Norms that write (gemma2), or
# come behind the embeddings (bloom), have no such twin.
@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "phi3", "falcon", "opt", "granite", "cohere2"])
def test_it_is_the_model_with_orthogonalised_weights(family: str) -> None:
    model = make_tiny_model(family).double()
    layout = HeadLayout.of(model)
    direction_D = drawn(32)
    whole, expected = logits(model), logits(orthogonalised(model, layout, direction_D))
    assert (expected - whole).abs().max() > 1e-3, "the direction must matter"
    with project_out(model, layout, direction_D):
        found = logits(model)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    assert torch.equal(logits(model), whole)


def test_nothing_of_the_direction_is_left_in_the_stream(any_tiny_model: Any) -> None:
    layout = HeadLayout.of(any_tiny_model)
    direction_D = drawn(32)
    r_D = (direction_D / direction_D.norm()).float()
    residuals: dict[int, Tensor] = {}
    ends: list[Tensor] = []
    whole = logits(any_tiny_model)
    with project_out(any_tiny_model, layout, direction_D), record_residuals(any_tiny_model, layout, residuals):
        last = layout.decoder_layers(any_tiny_model)[-1]
        handle = last.register_forward_hook(
            lambda _module, _args, out: ends.append(out[0] if isinstance(out, tuple) else out)
        )
        changed = logits(any_tiny_model)
        handle.remove()
    for stream in (*residuals.values(), *ends):
        assert (stream @ r_D).abs().max() < 1e-4 * stream.norm(dim=-1).max()
    assert len(residuals) == layout.n_layers
    assert (changed - whole).abs().max() > 1e-3
    assert torch.equal(logits(any_tiny_model), whole)
    assert hooks_left(any_tiny_model) == 0


def test_hooks_are_gone_after_an_exception() -> None:
    model = make_tiny_model("llama")
    layout = HeadLayout.of(model)
    whole = logits(model)
    with pytest.raises(KeyError), project_out(model, layout, drawn(32)):
        raise KeyError
    assert hooks_left(model) == 0
    assert torch.equal(logits(model), whole)


def test_the_length_of_a_direction_does_not_matter_and_twice_is_once() -> None:
    model = make_tiny_model("llama").double()
    layout = HeadLayout.of(model)
    with project_out(model, layout, drawn(32)):
        once = logits(model)
    with project_out(model, layout, -7 * drawn(32)):
        torch.testing.assert_close(logits(model), once, rtol=0, atol=1e-12)
        with project_out(model, layout, drawn(32)):
            torch.testing.assert_close(logits(model), once, rtol=0, atol=1e-12)


def test_it_works_below_an_adapter_and_with_keys_and_values_that_are_kept() -> None:
    model = make_tiny_model("llama").double()
    layout = HeadLayout.of(model)
    torch.manual_seed(0)
    peft_model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)).double()
    inner = peft_model.get_base_model()
    merged = copy.deepcopy(peft_model).merge_and_unload()
    expected = logits(orthogonalised(merged, layout, drawn(32)))
    with project_out(inner, layout, drawn(32)), torch.no_grad():
        torch.testing.assert_close(logits(peft_model), expected, rtol=0, atol=1e-6)
        begun = peft_model(input_ids=IDS[:, :-1], use_cache=True)
        step = peft_model(input_ids=IDS[:, -1:], past_key_values=begun.past_key_values, use_cache=True)
    torch.testing.assert_close(step.logits[:, -1], expected[:, -1], rtol=0, atol=1e-6)


# -- finding it


def test_last_states_do_not_depend_on_the_batch() -> None:
    model = make_tiny_model("llama")
    layout = HeadLayout.of(model)
    prompts = [[3, 4, 5], [6, 7, 8, 9, 10, 11], [12], [13, 14, 15]]
    together = last_states(model, layout, prompts)
    alone = torch.cat([last_states(model, layout, [prompt]) for prompt in prompts], dim=1)
    assert together.shape == (layout.n_layers, 4, 32)
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)
    torch.testing.assert_close(last_states(model, layout, prompts, batch_tokens=1), alone, rtol=0, atol=1e-5)


def test_a_planted_direction_is_found_at_the_layer_where_it_separates_most() -> None:
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(2, 12, 200, 16, dtype=torch.float64, generator=generator)
    planted = torch.zeros(16, dtype=torch.float64)
    planted[3] = 1
    for layer in range(12):
        states[0, layer] += {7: 3.0, 11: 50.0}.get(layer, 1.0) * planted  # the last layer is none of the middle
    # Larger states are no better separated.
    states[:, 5] *= 100
    found = refusal_direction(states[0], states[1])
    assert found.layer == 7
    assert float(found.unit_D @ planted) > 0.95, "from harmless to harmful"
    assert float(found.unit_D.norm()) == pytest.approx(1)
    assert found.separation == pytest.approx(3 / 4, rel=0.1)  # 3 over the distance of a prompt from its mean, sqrt(16)


def test_states_that_do_not_differ_have_no_direction() -> None:
    same = torch.ones(3, 4, 5, dtype=torch.float64)
    with pytest.raises(CastuneError, match="no refusal direction"):
        refusal_direction(same, same)
    with pytest.raises(CastuneError, match="not finite"):
        refusal_direction(same * float("nan"), same)


@pytest.mark.parametrize(("n_layers", "first", "last"), [(1, 0, 0), (2, 1, 1), (3, 1, 2), (30, 8, 22), (32, 8, 24)])
def test_the_middle_of_a_model(n_layers: int, first: int, last: int) -> None:
    layers = middle_layers(n_layers)
    assert (layers[0], layers[-1]) == (first, last)
    assert last < n_layers


def test_the_units_of_a_layer_can_still_be_ablated() -> None:
    """Both kinds of hook at once; neither undoes the other's."""
    from castune.core.ablation import ablate_at

    model = make_tiny_model("llama").double()
    layout = HeadLayout.of(model)
    hand = orthogonalised(model, layout, drawn(32))
    site = UnitLayout(layout).site("q_head", 1)
    with ablate_at(hand, site, 2):
        expected = logits(hand)
    with project_out(model, layout, drawn(32)), ablate_at(model, site, 2):
        torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-6)
