"""A quantised base: the same gradients as the dequantised weights give, an adapter that belongs to the full model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from tiny_training import SOME, SelectionOf
from torch import nn
from transformers import AutoModelForCausalLM

import castune as ct
from castune.artifacts.fingerprints import same_model
from castune.config import TuneConfig
from castune.core.heads import HeadLayout
from castune.core.loading import load
from castune.core.provenance import fingerprint
from castune.core.quantisation import dense_weight, is_quantised
from castune.data.example import Example
from castune.errors import CastuneError
from castune.tuning.train import tune
from castune.tuning.verify import certify

pytest.importorskip("bitsandbytes")
pytestmark = pytest.mark.filterwarnings(
    # bitsandbytes' own: other kernels than on a GPU.
    "ignore::UserWarning",
    "ignore::DeprecationWarning",
    "ignore::FutureWarning",
)

CONFIG = TuneConfig(rank=4, learning_rate=0.02, max_steps=3, batch_size=2, accumulation=1)


@pytest.fixture
def path(tiny_model: Callable[..., Any], tiny_tokenizer: Any, tmp_path: Path) -> Path:
    tiny_model("llama").save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def packable(tiny_model: Callable[..., Any], tiny_tokenizer: Any, tmp_path: Path) -> Path:
    """A model of widths that bitsandbytes packs for inference on a CPU."""
    sizes = {"hidden_size": 64, "intermediate_size": 64, "head_dim": 16}
    tiny_model("llama", **sizes).save_pretrained(tmp_path / "packable")
    tiny_tokenizer.save_pretrained(tmp_path / "packable")
    return tmp_path / "packable"


def loaded(path: Path, quantization: str = "none") -> tuple[Any, Any]:
    return load(path, dtype="float32", device="cpu", quantization=quantization)


def dequantised(quantised: Any, path: Path) -> Any:
    """The full model with the weights that the quantised one computes with."""
    model, _ = loaded(path)
    packed = dict(quantised.named_modules())
    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear) and type(packed[name]) is not nn.Linear:
                module.weight.copy_(dense_weight(packed[name]))
    return model


def test_it_trains_like_its_dequantised_weights(
    path: Path, selection_of: SelectionOf, aligned: list[Example], tmp_path: Path
) -> None:
    quantised, tokenizer = loaded(path, "nf4")
    assert is_quantised(quantised)
    full, _ = loaded(path)
    selection = selection_of(full, SOME)
    reference = dequantised(quantised, path)
    of_reference = selection_of(reference, SOME)
    base = full.state_dict()

    result = tune(quantised, tokenizer, selection, data=aligned, out=tmp_path / "a", config=CONFIG)
    tune(reference, tokenizer, of_reference, data=aligned, out=tmp_path / "b", config=CONFIG)
    found, expected = (load_file(tmp_path / name / "adapter_model.safetensors") for name in "ab")
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-3, atol=1e-5)
        if "lora_B" in name:
            # Adam's step has the size of the learning rate: gradients that stop on their way would show.
            assert tensor.abs().max() > 0.02

    # The adapter belongs to the full model, by its certificate and in use.
    assert result.certificate.model_fingerprint == fingerprint(full)
    assert result.certificate.changed_rows == result.certificate.selected_rows == 3 * 8
    assert result.model["quantised"]
    assert result.model["parameters"] == sum(p.numel() for p in full.parameters())
    assert certify(full, tmp_path / "a", selection).changed_rows == 3 * 8
    merged = PeftModel.from_pretrained(full, tmp_path / "a").merge_and_unload().state_dict()
    changed = {
        name
        for name in base
        if not torch.equal(merged[name], AutoModelForCausalLM.from_pretrained(path).state_dict()[name])
    }
    assert changed == {f"model.layers.{layer}.self_attn.q_proj.weight" for layer in (0, 2)}


def test_columns_train_on_a_quantised_base(
    path: Path, selection_of: SelectionOf, aligned: list[Example], tmp_path: Path
) -> None:
    quantised, tokenizer = loaded(path, "nf4")
    full, _ = loaded(path)
    units = (("o_head", 0, 2), ("k_group", 1, 1), ("mlp_group", 2, 1))
    selection = selection_of(full, SOME, units, mlp_groups=4)
    result = tune(quantised, tokenizer, selection, data=aligned, out=tmp_path / "a", config=CONFIG)
    for found in (result.certificate, certify(full, tmp_path / "a", selection)):
        assert (found.changed_rows, found.selected_rows) == (24 + 8 + 24, 24 + 8 + 24)
        assert (found.changed_columns, found.selected_columns) == (8 + 12, 8 + 12)


def test_fingerprints_tell_a_quantised_model_by_what_it_keeps(path: Path, tiny_model: Callable[..., Any]) -> None:
    full, quantised, other = loaded(path)[0], loaded(path, "nf4")[0], tiny_model("llama", seed=1)
    assert same_model(fingerprint(full), fingerprint(quantised))
    assert same_model(fingerprint(quantised), fingerprint(full))
    assert fingerprint(full) != fingerprint(quantised)
    assert not same_model(fingerprint(other), fingerprint(quantised))
    # Full models are told apart by all their weights.
    changed, _ = loaded(path)
    with torch.no_grad():
        changed.model.layers[1].mlp.up_proj.weight *= 1.5
    assert not same_model(fingerprint(changed), fingerprint(full))


def test_another_models_selection_is_refused(
    path: Path, tiny_model: Callable[..., Any], selection_of: SelectionOf
) -> None:
    selection = selection_of(tiny_model("llama", seed=1), SOME)
    with pytest.raises(CastuneError, match="was made for model"):
        ct.sparse_lora(loaded(path, "nf4")[0], selection)


def test_looking_for_heads_does_not_end_its_gradients(packable: Path, selection_of: SelectionOf) -> None:
    """On some CPUs the first forward pass in evaluation mode packs weights in a way that has no backward pass."""
    quantised, _ = load(packable, dtype="bfloat16", device="cpu", quantization="nf4")
    selection = selection_of(loaded(packable)[0], SOME)
    HeadLayout.of(quantised)
    peft_model = ct.sparse_lora(quantised, selection, r=4)
    peft_model(input_ids=torch.arange(5, 25)[None]).logits.float().square().mean().backward()
    gradients = {n: p.grad.abs().max() for n, p in peft_model.named_parameters() if "lora_B" in n}
    assert len(gradients) == 2
    assert all(gradient > 0 for gradient in gradients.values())


def test_a_model_packed_for_inference_is_refused(packable: Path) -> None:
    quantised, _ = load(packable, dtype="bfloat16", device="cpu", quantization="nf4")
    with torch.no_grad():
        quantised(input_ids=torch.arange(5, 25)[None])
    packed = quantised.model.layers[0].self_attn.q_proj.weight.quant_state
    if not getattr(packed, "packing_format_for_cpu", False):
        pytest.skip("this CPU has no other format for inference")
    with pytest.raises(CastuneError, match=r"load it again .* before its first forward"):
        HeadLayout.of(quantised)


def test_a_diagnosis_needs_the_full_model(path: Path, questions: Sequence[Example], harmful: Sequence[Example]) -> None:
    model, tokenizer = loaded(path, "nf4")
    with pytest.raises(CastuneError, match="diagnose the full model"):
        ct.diagnose(model, tokenizer, safety=harmful, utility=questions)


def test_what_cannot_be_quantised_is_refused(path: Path) -> None:
    with pytest.raises(CastuneError, match=r"'nf5'.*none, nf4"):
        loaded(path, "nf5")
