"""The fingerprint tells models apart and dtypes not."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch

import castune
from castune.core.heads import HeadLayout
from castune.core.provenance import fingerprint, model_record, provenance


def test_fingerprints_are_stable_and_blind_to_dtype(any_tiny_model: Any) -> None:
    model = any_tiny_model.to(torch.bfloat16)
    low = fingerprint(model)
    assert low == fingerprint(model)
    assert len(low) == 16
    int(low, 16)
    assert fingerprint(model.float()) == low
    assert model_record(model)["fingerprint"] == low


def test_a_float32_model_has_the_fingerprint_of_its_bfloat16_copy(tiny_model: Callable[..., Any]) -> None:
    """Rounding is done by the fingerprint as by the conversion."""
    assert fingerprint(tiny_model("llama")) == fingerprint(tiny_model("llama").to(torch.bfloat16))


def test_fingerprints_differ_by_seed_family_and_head(any_tiny_model: Any, tiny_model: Callable[..., Any]) -> None:
    """One head's query rows changed: values are sampled, and a head has enough of them to be hit."""
    before = fingerprint(any_tiny_model)
    layout = HeadLayout.of(any_tiny_model)
    assert fingerprint(tiny_model(any_tiny_model.config.model_type, seed=1)) != before
    seen = {before}
    for layer, head in layout.heads:
        weight = layout.query_projection(any_tiny_model, layer).weight
        rows = (weight.t() if layout.at(layer).transposed else weight)[layout.query_rows(layer, head)]
        with torch.no_grad():
            rows.mul_(1.5)
        seen.add(fingerprint(any_tiny_model))
    assert len(seen) == 1 + len(layout.heads)


def test_a_head_of_a_wide_layer_is_hit() -> None:
    """4096 x 4096 with heads of 128 rows: the stride of the samples is a multiple of the width."""
    projection = torch.nn.Linear(4096, 4096, bias=False)
    before = fingerprint(projection)
    for head in (0, 13, 31):
        with torch.no_grad():
            projection.weight[head * 128 : (head + 1) * 128] += 0.5
        assert fingerprint(projection) != before
        before = fingerprint(projection)


def test_names_and_shapes_count() -> None:
    a, b = torch.nn.Linear(4, 6, bias=False), torch.nn.Linear(6, 4, bias=False)
    with torch.no_grad():
        a.weight.zero_()
        b.weight.zero_()
    assert fingerprint(a) != fingerprint(b)
    assert fingerprint(torch.nn.Sequential(a)) != fingerprint(a)


def test_the_fingerprint_does_not_touch_the_model(tiny_model: Callable[..., Any]) -> None:
    model = tiny_model("llama")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    fingerprint(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.requires_grad for p in model.parameters())


def test_records_are_plain_json(tiny_model: Callable[..., Any]) -> None:
    record = model_record(tiny_model("gpt2"), name="mine")
    assert record["name"] == "mine"
    assert record["type"] == "gpt2"
    assert record["dtype"] == "float32"
    assert record["parameters"] == sum(p.numel() for p in tiny_model("gpt2").parameters())
    assert json.loads(json.dumps(record)) == record
    made = provenance(seed=5)
    assert json.loads(json.dumps(made)) == made
    assert made["seed"] == 5
    assert made["versions"]["torch"] == torch.__version__


def test_the_recorded_version_is_the_running_one() -> None:
    assert provenance()["versions"]["castune"] == castune.__version__


@pytest.mark.parametrize("problem", [OSError, "subprocess"])
def test_a_machine_without_git_still_has_a_provenance(problem: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import subprocess

    def fail(*_: Any, **__: Any) -> None:
        raise OSError if problem is OSError else subprocess.CalledProcessError(128, "git")

    monkeypatch.setattr(subprocess, "run", fail)
    assert provenance()["code"] is None
