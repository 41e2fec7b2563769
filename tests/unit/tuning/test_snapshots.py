"""Adapters kept on the way: plain and certified ones, those of a shorter training, and no trace of them elsewhere."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel
from safetensors.torch import load_file
from tiny_training import SOME, THREE_EPOCHS, SelectionOf, Tuned, weights

from castune.artifacts import Certificate
from castune.artifacts.tune_result import adapter_hash, snapshots_of
from castune.data.example import Example
from castune.errors import CertificateError
from castune.tuning.snapshots import snapshot_steps
from castune.tuning.train import tune
from castune.tuning.verify import certify

CONFIG = THREE_EPOCHS.changed(scheduler="constant", snapshot_steps=2)


@settings(deadline=None)  # a busy machine is no failure
@given(st.integers(1, 40), st.integers(1, 120))
def test_every_multiple_before_the_last_step_is_kept(every: int, n_steps: int) -> None:
    found = snapshot_steps(CONFIG.changed(snapshot_steps=every), n_steps)
    assert list(found) == [step for step in range(1, n_steps) if step % every == 0]
    assert not snapshot_steps(CONFIG.changed(snapshot_steps=None), n_steps)


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3"])
def test_a_snapshot_is_the_adapter_of_a_shorter_training(
    tiny_model: Callable[..., Any], tuned: Tuned, selection_of: SelectionOf, tmp_path: Path, family: str
) -> None:
    def train(name: str, **changes: Any) -> Path:
        model = tiny_model(family)
        selection = selection_of(model, SOME)
        tuned(model, tmp_path / name, CONFIG.changed(**changes), selection=selection)
        return tmp_path / name

    kept = snapshots_of(train("kept"))
    assert list(kept) == [2, 4]
    # gpt2 has dropout: writing a snapshot draws no random number.
    plain = train("plain", snapshot_steps=None)
    assert weights(tmp_path / "kept") == weights(plain)
    assert not (plain / "snapshots").exists()
    for step, folder in kept.items():
        assert weights(folder) == weights(train(f"short{step}", max_steps=step, epochs=3))
        model = tiny_model(family)
        selection = selection_of(model, SOME)
        certificate = Certificate.load(folder)
        assert certificate == certify(model, folder, selection)
        assert certificate.adapter_hash == adapter_hash(folder)
        assert certificate.changed_rows == certificate.selected_rows
    assert len({weights(folder) for folder in (*kept.values(), tmp_path / "kept")}) == 3


def test_snapshots_are_plain_adapters_as_readable_as_the_last_one(
    tiny_model: Callable[..., Any], tuned: Tuned, tmp_path: Path
) -> None:
    model, out = tiny_model("llama"), tmp_path / "adapter"
    before = os.umask(0o022)
    try:
        tuned(model, out, CONFIG)
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in out.rglob("*") if path.is_file()} == {0o644}
    ids = torch.arange(5, 30)[None]
    with torch.no_grad():
        logits = [model(input_ids=ids).logits]
        for folder in (*snapshots_of(out).values(), out):
            logits.append(PeftModel.from_pretrained(tiny_model("llama"), folder)(input_ids=ids).logits)
    assert all(not torch.allclose(one, other) for one, other in zip(logits, logits[1:], strict=False))
    # Training again replaces the whole directory: no snapshot of the earlier training stays.
    changed = CONFIG.changed(snapshot_steps=5)
    tuned(model, out, changed)
    assert list(snapshots_of(out)) == [5]


def test_a_snapshot_of_other_rows_is_not_certified(
    tiny_model: Callable[..., Any], tuned: Tuned, selection_of: SelectionOf, tmp_path: Path
) -> None:
    model, out = tiny_model("llama"), tmp_path / "adapter"
    tuned(model, out, CONFIG)
    with pytest.raises(CertificateError):
        certify(model, snapshots_of(out)[2], selection_of(model, SOME[1:]))
    assert all(
        torch.isfinite(tensor).all() for tensor in load_file(out / "snapshots/4/adapter_model.safetensors").values()
    )


def test_only_folders_of_steps_are_snapshots(tmp_path: Path) -> None:
    assert snapshots_of(tmp_path) == {}
    for name in ("10", "9", "100", ".9.tmp", "last"):
        (tmp_path / "snapshots" / name).mkdir(parents=True)
    assert list(snapshots_of(tmp_path)) == [9, 10, 100]
    shutil.rmtree(tmp_path / "snapshots")


def test_preferences_keep_snapshots_too(
    tiny_model: Callable[..., Any], tiny_tokenizer: Any, selection_of: SelectionOf, tmp_path: Path
) -> None:
    pytest.importorskip("trl")
    words = ["tea", "rain", "the sea", "bread"]
    pairs = [Example(id=w, prompt=f"Tell me of {w}.", reply=f"I like {w}.", rejected="No.") for w in words]
    model = tiny_model("llama")
    selection = selection_of(model, SOME)
    config = CONFIG.changed(method="dpo", accumulation=1, max_steps=5)
    tune(model, tiny_tokenizer, selection, data=pairs, out=tmp_path / "adapter", config=config)
    kept = snapshots_of(tmp_path / "adapter")
    assert list(kept) == [2, 4]
    for folder in kept.values():
        assert certify(model, folder, selection) == Certificate.load(folder)
    assert weights(kept[2]) != weights(kept[4])
