"""Ablating and resuming, compared with changed weights and ordinary forwards."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from castune.core.ablation import ablate, can_resume, record_residuals, resume_from, site_means
from castune.core.heads import HeadLayout
from castune.core.units import UnitLayout

IDS = torch.arange(40, 100).reshape(3, 20)  # longer than the sliding windows of 16


@torch.no_grad()
def logits(model: Any, ids: Tensor = IDS) -> Tensor:
    return model(input_ids=ids, use_cache=False).logits


def hooks_left(model: nn.Module) -> int:
    return sum(
        len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) + ("forward" in m.__dict__)
        for m in model.modules()
    )


@pytest.fixture
def layout(any_tiny_model: Any) -> HeadLayout:
    return HeadLayout.of(any_tiny_model)


def test_ablating_no_head_is_bit_identical(any_tiny_model: Any, layout: HeadLayout) -> None:
    expected = logits(any_tiny_model)
    for layer in layout.layers_with_heads:
        with ablate(any_tiny_model, layout, layer, torch.full((3,), -1)):
            assert torch.equal(logits(any_tiny_model), expected)
    assert torch.equal(logits(any_tiny_model), expected)


def test_ablation_equals_zeroed_output_weights(any_tiny_model: Any, layout: HeadLayout) -> None:
    whole = logits(any_tiny_model)
    for layer, head in layout.heads:
        crippled = copy.deepcopy(any_tiny_model)
        weight = layout.output_projection(crippled, layer).weight
        with torch.no_grad():
            (weight.t() if crippled.config.model_type == "gpt2" else weight)[:, layout.output_columns(layer, head)] = 0
        expected = logits(crippled)
        with ablate(any_tiny_model, layout, layer, head):
            found = logits(any_tiny_model)
        assert (expected - whole).abs().max() > 1e-3, "the head must matter"
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_one_head_a_row_equals_one_by_one(any_tiny_model: Any, layout: HeadLayout) -> None:
    for layer in layout.layers_with_heads:
        heads = torch.tensor([3, -1, 1])
        with ablate(any_tiny_model, layout, layer, heads):
            together = logits(any_tiny_model)
        assert torch.allclose(together[1], logits(any_tiny_model)[1], atol=1e-5)
        for row in (0, 2):
            with ablate(any_tiny_model, layout, layer, int(heads[row])):
                alone = logits(any_tiny_model, IDS[row : row + 1])[0]
            torch.testing.assert_close(together[row], alone, rtol=0, atol=1e-5)
        assert (together[0] - logits(any_tiny_model)[0]).abs().max() > 1e-3


def test_resuming_equals_a_full_forward_bit_for_bit(any_tiny_model: Any, layout: HeadLayout) -> None:
    assert can_resume(any_tiny_model, layout)
    residuals: dict[int, Tensor] = {}
    with record_residuals(any_tiny_model, layout, residuals):
        whole = logits(any_tiny_model)
    assert sorted(residuals) == [0, 1, 2]
    unlike = IDS.flip(0)  # the resumed result must come from the residual, not from the ids
    for layer in range(3):  # a layer without heads too
        with resume_from(any_tiny_model, layout, layer, residuals[layer]):
            assert torch.equal(logits(any_tiny_model, unlike), whole)
    for layer, head in layout.heads:
        with ablate(any_tiny_model, layout, layer, head):
            expected = logits(any_tiny_model)
        with (
            resume_from(any_tiny_model, layout, layer, residuals[layer]),
            ablate(any_tiny_model, layout, layer, head),
        ):
            assert torch.equal(logits(any_tiny_model, unlike), expected)
        assert not torch.equal(expected, whole)


def test_skipped_layers_do_not_run(any_tiny_model: Any, layout: HeadLayout) -> None:
    residuals: dict[int, Tensor] = {}
    with record_residuals(any_tiny_model, layout, residuals):
        logits(any_tiny_model)
    calls: list[int] = []
    handles = [
        layout.output_projection(any_tiny_model, i).register_forward_hook(lambda *_, i=i: calls.append(i))
        for i in layout.layers_with_heads
    ]
    with resume_from(any_tiny_model, layout, 2, residuals[2]):
        logits(any_tiny_model)
    for handle in handles:
        handle.remove()
    assert calls == [2]


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_is_left_behind(any_tiny_model: Any, layout: HeadLayout, fails: bool) -> None:
    expected = logits(any_tiny_model)
    residuals: dict[int, Tensor] = {}

    @contextmanager
    def expecting_error() -> Iterator[None]:
        with pytest.raises(ZeroDivisionError):
            yield

    def forwards() -> Iterator[Tensor]:
        logits(any_tiny_model)
        yield torch.ones(3, 20, dtype=torch.bool)
        if fails:
            raise ZeroDivisionError

    with expecting_error() if fails else open_nothing(), record_residuals(any_tiny_model, layout, residuals):
        logits(any_tiny_model)
        if fails:
            raise ZeroDivisionError
    with (
        expecting_error() if fails else open_nothing(),
        resume_from(any_tiny_model, layout, 2, residuals[2]),
        ablate(any_tiny_model, layout, 2, 1),
    ):
        assert hooks_left(any_tiny_model) > 0
        logits(any_tiny_model)
        if fails:
            raise ZeroDivisionError
    with expecting_error() if fails else open_nothing():
        site_means(any_tiny_model, [UnitLayout(layout).site("q_head", 2)], forwards)
    assert hooks_left(any_tiny_model) == 0
    assert torch.equal(logits(any_tiny_model), expected)


@contextmanager
def open_nothing() -> Iterator[None]:
    yield


def test_a_forward_put_on_a_layer_by_someone_else_comes_back(tiny_model: Callable[..., Any]) -> None:
    """accelerate's offloading sets `forward` on the instance."""
    model = tiny_model("llama")
    layout = HeadLayout.of(model)
    layer = model.model.layers[0]
    own = layer.forward
    layer.forward = lambda *args, **kwargs: own(*args, **kwargs)
    wrapped = layer.forward
    residuals: dict[int, Tensor] = {}
    with record_residuals(model, layout, residuals):
        logits(model)
    with resume_from(model, layout, 1, residuals[1]):
        assert layer.forward is not wrapped
    assert layer.forward is wrapped


@pytest.mark.parametrize("kind", ["llama", "gpt2", "phi3"])
def test_replacement_reaches_the_output_projection(tiny_model: Callable[..., Any], kind: str) -> None:
    model = tiny_model(kind)
    layout = HeadLayout.of(model)
    projection, seen = layout.output_projection(model, 1), []
    replacement = torch.arange(32.0).reshape(4, 8)
    recorder = projection.register_forward_hook(lambda _m, args, _out: seen.append(args[0]))
    logits(model)
    with ablate(model, layout, 1, 2, replacement):
        logits(model)
    with ablate(model, layout, 1, torch.tensor([0, -1, 3]), replacement):
        logits(model)
    recorder.remove()
    whole, one, rows = (z.unflatten(-1, (4, 8)) for z in seen)
    expected = whole.clone()
    expected[:, :, 2] = replacement[2]
    assert torch.equal(one, expected)
    expected = whole.clone()
    expected[0, :, 0], expected[2, :, 3] = replacement[0], replacement[3]
    assert torch.equal(rows, expected)


def test_mean_outputs_equal_hand_computation(any_tiny_model: Any, layout: HeadLayout) -> None:
    """Padding is left out; batches of different size weigh by their tokens."""
    batches = [(IDS, [20, 7, 13]), (IDS[:1, :9], [9])]
    seen: dict[int, list[Tensor]] = {layer: [] for layer in layout.layers_with_heads}

    def forwards() -> Iterator[Tensor]:
        for ids, lengths in batches:
            logits(any_tiny_model, ids)
            yield torch.arange(ids.shape[1]) < torch.tensor(lengths)[:, None]

    sites = {layer: UnitLayout(layout).site("q_head", layer) for layer in seen}
    means = site_means(any_tiny_model, sites.values(), forwards)
    handles = [
        layout.output_projection(any_tiny_model, i).register_forward_pre_hook(
            lambda _m, args, i=i: seen[i].append(args[0])
        )
        for i in seen
    ]
    for ids, lengths in batches:
        for row, length in zip(ids, lengths, strict=True):
            logits(any_tiny_model, row[None, :length])
    for handle in handles:
        handle.remove()
    assert means.keys() == set(sites.values())
    for layer, site in sites.items():
        expected = torch.cat([z[0] for z in seen[layer]]).double().mean(0)
        assert means[site].shape == expected.shape
        torch.testing.assert_close(means[site].double(), expected, rtol=0, atol=1e-5)


def _sharing_model(model: Any, missing: Callable[[dict[str, Tensor]], Tensor]) -> Any:
    """The last layer uses something the first one left behind, as in models that share keys and values."""
    shared: dict[str, Tensor] = {}
    first, last = model.model.layers[0], model.model.layers[2]
    first_forward, last_forward = first.forward, last.forward

    def leave(hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        shared["state"] = hidden.mean()
        return first_forward(hidden, *args, **kwargs)

    def use(hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return last_forward(hidden + missing(shared), *args, **kwargs)

    first.forward, last.forward = leave, use
    return model


@pytest.mark.parametrize(
    "missing",
    [lambda shared: shared.pop("state"), lambda shared: shared.pop("state", torch.tensor(0.5))],
    ids=["raises", "differs"],
)
def test_models_that_share_state_between_layers_do_not_resume(
    tiny_model: Callable[..., Any], missing: Any, caplog: pytest.LogCaptureFixture
) -> None:
    model = _sharing_model(tiny_model("llama"), missing)
    layout = HeadLayout.of(model)
    hooks = hooks_left(model)
    assert not can_resume(model, layout)
    assert "full forward" in caplog.text
    assert hooks_left(model) == hooks


def test_layers_that_return_tuples_resume_at_any_depth(tiny_model: Callable[..., Any]) -> None:
    """Falcon takes `[0]` of what a layer returns: a skipped layer that returned a tensor would cost a dimension."""
    model = tiny_model("falcon", num_hidden_layers=5)
    layout = HeadLayout.of(model)
    assert layout.layers_return_tuples
    assert can_resume(model, layout)
    assert hooks_left(model) == 0
