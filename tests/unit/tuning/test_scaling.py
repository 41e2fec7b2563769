"""Adapters at another strength: plain PEFT computes with them what the evaluation of the strength did."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_training import CONFIG, SOME, SelectionOf, Tuned, edit_config, logits
from torch import Tensor

from castune.artifacts import HeadSelection, ScaledAdapter
from castune.artifacts.tune_result import adapter_hash
from castune.errors import CastuneError
from castune.evaluation.backend import TransformersHost
from castune.tuning.mask import every_head, mask_adapter
from castune.tuning.merge import write_merged
from castune.tuning.scaling import scale_adapter
from castune.tuning.verify import certify

TinyModel = Callable[..., Any]
Source = Callable[..., Path]
# Family and its query projection; gpt2 stores its weights transposed, phi3 fused.
FAMILIES = [("llama", "q_proj"), ("gpt2", "c_attn"), ("phi3", "qkv_proj")]


@pytest.fixture
def plain(tiny_model: TinyModel, tmp_path: Path) -> Source:
    """An adapter of all query projections with values everywhere."""

    def make(family: str = "llama", query: str = "q_proj", *, name: str = "plain", **changes: Any) -> Path:
        settings = {"r": 4, "lora_alpha": 10, "init_lora_weights": False, "task_type": "CAUSAL_LM"}
        config = LoraConfig(target_modules=[query], fan_in_fan_out=family == "gpt2", **{**settings, **changes})
        torch.manual_seed(7)
        get_peft_model(tiny_model(family), config).save_pretrained(tmp_path / name)
        return tmp_path / name

    return make


@pytest.fixture
def sparse(tiny_model: TinyModel, selection_of: SelectionOf, plain: Source, tmp_path: Path) -> Source:
    """The rows of the heads `SOME` of such an adapter, as castune writes them."""

    def make(family: str = "llama", query: str = "q_proj") -> Path:
        model = tiny_model(family)
        mask_adapter(model, plain(family, query), selection_of(model, SOME), tmp_path / "sparse")
        return tmp_path / "sparse"

    return make


def evaluated_at(model: Any, adapter: Path, strength: float) -> Tensor:
    """Logits of the model that an evaluation at a strength measures."""
    with TransformersHost(model, None).backend("arm", adapter, strength) as backend:  # type: ignore[arg-type]
        return logits(backend.model)


def read_back(model: Any, adapter: Path) -> Tensor:
    """Logits of the model that any user of PEFT loads."""
    return logits(PeftModel.from_pretrained(model, adapter))


# -- what it computes


@pytest.mark.parametrize(("family", "query"), FAMILIES)
@pytest.mark.parametrize("strength", [0.3, 0.625, 1.7])
def test_it_is_what_the_strength_evaluation_measured(
    tiny_model: TinyModel, selection_of: SelectionOf, sparse: Source, tmp_path: Path, family: str, query: str,
    strength: float,
) -> None:  # fmt: skip
    adapter, model = sparse(family, query), tiny_model(family)
    scale_adapter(model, adapter, selection_of(model, SOME), tmp_path / "out", strength=strength)
    measured = evaluated_at(tiny_model(family), adapter, strength)
    assert (measured - logits(tiny_model(family))).abs().max() > 1e-2
    # Another order of two multiplications: a rounding error in logits of order 5.
    torch.testing.assert_close(read_back(tiny_model(family), tmp_path / "out"), measured, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("strength", [0.25, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_powers_of_two_are_the_same_to_the_bit(
    tiny_model: TinyModel,
    selection_of: SelectionOf,
    sparse: Source,
    tmp_path: Path,
    strength: float,
    dtype: torch.dtype,
) -> None:
    adapter, model = sparse(), tiny_model("llama").to(dtype)
    scale_adapter(model, adapter, selection_of(model, SOME), tmp_path / "out", strength=strength)
    measured = evaluated_at(tiny_model("llama").to(dtype), adapter, strength)
    assert torch.equal(read_back(tiny_model("llama").to(dtype), tmp_path / "out"), measured)


def test_in_bfloat16_few_logits_differ_and_by_one_rounding(
    tiny_model: TinyModel, selection_of: SelectionOf, sparse: Source, tmp_path: Path
) -> None:
    """PEFT adds the update in float32 and rounds the sum once, so that a rounding error before seldom shows."""
    adapter = sparse()
    for strength in (0.3, 0.625, 1.25, 1.7):
        model = tiny_model("llama").bfloat16()
        place = tmp_path / f"{strength}"
        scale_adapter(model, adapter, selection_of(model, SOME), place, strength=strength)
        measured = evaluated_at(tiny_model("llama").bfloat16(), adapter, strength).float()
        found = read_back(tiny_model("llama").bfloat16(), place).float()
        assert (found == measured).float().mean() > 0.5
        assert (found - measured).abs().max() <= 2 * 2**-8 * measured.abs().max()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_file_in_16_bits_is_not_rounded_again(
    tiny_model: TinyModel, plain: Source, tmp_path: Path, dtype: torch.dtype
) -> None:
    adapter, model = plain(), tiny_model("llama")
    weights = adapter / "adapter_model.safetensors"
    save_file({k: v.to(dtype) for k, v in load_file(weights).items()}, weights, metadata={"format": "pt"})
    scale_adapter(model, adapter, every_head(model), tmp_path / "out", strength=0.3)
    torch.testing.assert_close(
        read_back(tiny_model("llama"), tmp_path / "out"),
        evaluated_at(tiny_model("llama"), adapter, 0.3),
        rtol=1e-6,
        atol=1e-5,
    )


def test_only_b_is_scaled_and_nothing_outside_the_selection(
    tiny_model: TinyModel, selection_of: SelectionOf, sparse: Source, tmp_path: Path
) -> None:
    adapter, model = sparse(), tiny_model("llama")
    selection = selection_of(model, SOME)
    result = scale_adapter(
        model,
        adapter,
        selection,
        tmp_path / "out",
        strength=0.5,
        name="safe",
        target={"purpose": "safety", "value": 0.9},
    )
    old, new = (load_file(where / "adapter_model.safetensors") for where in (adapter, tmp_path / "out"))
    assert old.keys() == new.keys()
    for name, tensor in old.items():
        assert torch.equal(new[name], tensor * 0.5 if "lora_B" in name else tensor)
    config = "adapter_config.json"
    assert (tmp_path / "out" / config).read_bytes() == (adapter / config).read_bytes()
    assert result.certificate == certify(model, tmp_path / "out", selection)
    assert (result.certificate.changed_rows, result.certificate.selected_rows) == (24, 24)
    assert result.source == {"name": "safe", "hash": adapter_hash(adapter), "r": 4, "alpha": 10.0}
    assert (result.strength, result.target) == (0.5, {"purpose": "safety", "value": 0.9})
    assert ScaledAdapter.load(tmp_path / "out") == result
    assert HeadSelection.load(tmp_path / "out") == selection


def test_strengths_multiply(tiny_model: TinyModel, selection_of: SelectionOf, sparse: Source, tmp_path: Path) -> None:
    adapter, model = sparse(), tiny_model("llama")
    selection = selection_of(model, SOME)
    scale_adapter(model, adapter, selection, tmp_path / "half", strength=0.5)
    scale_adapter(model, tmp_path / "half", selection, tmp_path / "whole", strength=2)
    weights = "adapter_model.safetensors"
    assert (tmp_path / "whole" / weights).read_bytes() == (adapter / weights).read_bytes()


def test_units_that_own_columns_are_scaled_by_b_too(
    tiny_model: TinyModel, selection_of: SelectionOf, tuned: Tuned, tmp_path: Path
) -> None:
    """Of an output projection a head owns columns, which are A's: the product scales with B all the same."""
    selection = selection_of(tiny_model("llama"), SOME, [("o_head", 1, 0)])
    tuned(tiny_model("llama"), tmp_path / "trained", CONFIG, selection=selection)
    adapter, model = tmp_path / "trained", tiny_model("llama")
    result = scale_adapter(model, adapter, selection, tmp_path / "out", strength=1.5)
    assert (result.certificate.changed_columns, result.certificate.selected_columns) == (8, 8)
    measured = evaluated_at(tiny_model("llama"), adapter, 1.5)
    torch.testing.assert_close(read_back(tiny_model("llama"), tmp_path / "out"), measured, rtol=1e-6, atol=1e-5)


# -- rank-stabilised LoRA


def test_rank_stabilised_lora_has_a_strength_and_a_certificate(
    tiny_model: TinyModel, tiny_tokenizer: Any, plain: Source, tmp_path: Path
) -> None:
    adapter, model = plain(use_rslora=True), tiny_model("llama")
    selection = every_head(model)
    scale_adapter(model, adapter, selection, tmp_path / "out", strength=0.5)
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["use_rslora"]
    measured = evaluated_at(tiny_model("llama"), adapter, 0.5)
    assert torch.equal(read_back(tiny_model("llama"), tmp_path / "out"), measured)
    # The certificate and the merged model scale by alpha / sqrt(r), as PEFT does.
    (tmp_path / "merged").mkdir()
    write_merged(model, tiny_tokenizer, tmp_path / "out", selection, tmp_path / "merged")
    merged = type(model).from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(merged), measured, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("family", "modules"),
    [(family, "all-linear") for family, _ in FAMILIES] + [("llama", ["up_proj"]), ("gpt2", ["c_fc"])],
    ids=str,
)
def test_without_a_selection_it_is_of_all_units_of_the_modules(
    tiny_model: TinyModel, tmp_path: Path, family: str, modules: str | list[str]
) -> None:
    """An adapter that castune did not train: nothing says what it may change but its tensors."""
    torch.manual_seed(0)
    config = LoraConfig(
        r=2, target_modules=modules, init_lora_weights=False, fan_in_fan_out=family == "gpt2", task_type="CAUSAL_LM"
    )
    get_peft_model(tiny_model(family), config).save_pretrained(tmp_path / "adapter")
    result = scale_adapter(tiny_model(family), tmp_path / "adapter", None, tmp_path / "out", strength=0.3)
    measured = evaluated_at(tiny_model(family), tmp_path / "adapter", 0.3)
    torch.testing.assert_close(read_back(tiny_model(family), tmp_path / "out"), measured, rtol=1e-6, atol=1e-5)
    kinds = {unit.kind for unit in HeadSelection.load(tmp_path / "out").units}
    assert "mlp_block" in kinds
    assert ("q_head" in kinds) == (modules == "all-linear")
    assert result.certificate.changed_rows > 0


# -- refusals


@pytest.fixture
def refused(tiny_model: TinyModel, selection_of: SelectionOf, tmp_path: Path) -> Callable[..., str]:
    """`scale_adapter` with these arguments: one line of error, and nothing written."""

    def check(adapter: Path, *, strength: float = 0.5, model: Any = None, **settings: Any) -> str:
        model = model or tiny_model("llama")
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(CastuneError) as caught:
            scale_adapter(model, adapter, every_head(model), tmp_path / "made" / "out", strength=strength, **settings)
        assert sorted(tmp_path.rglob("*")) == before, "nothing half-written"
        assert "\n" not in str(caught.value)
        return str(caught.value)

    return check


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"use_dora": True}, "DoRA rescales every row"),
        ({"bias": "all"}, "bias is 'all'"),
        ({"lora_bias": True}, "trains biases"),
        ({"modules_to_save": ["lm_head"]}, "replaces whole modules"),
        ({"alpha_pattern": {"q_proj": 9}}, "alphas must be equal"),
        ({"init_lora_weights": "pissa"}, "changes the base weights"),
        ({"peft_type": "IA3"}, "accepted: LORA"),
    ],
    ids=str,
)
def test_what_scaling_b_would_not_scale_is_refused(
    refused: Callable[..., str], plain: Source, changes: dict[str, Any], reason: str
) -> None:
    adapter = plain()
    edit_config(adapter, **changes)
    said = refused(adapter)
    assert reason in said
    assert "adapter_config.json" in said


def test_several_adapters_in_one_directory_are_told_apart(
    refused: Callable[..., str], tiny_model: TinyModel, tmp_path: Path
) -> None:
    config = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    peft_model = get_peft_model(tiny_model("llama"), config, adapter_name="one")
    peft_model.add_adapter("two", config)
    peft_model.save_pretrained(tmp_path / "both")
    assert "it holds several adapters (one, two): give the directory of one" in refused(tmp_path / "both")


@pytest.mark.parametrize("strength", [0.0, -0.5, math.nan, math.inf])
def test_a_strength_is_a_number_above_0(refused: Callable[..., str], plain: Source, strength: float) -> None:
    assert "accepted: a number above 0" in refused(plain(), strength=strength)


def test_another_model_a_missing_file_and_broken_values_are_refused(
    refused: Callable[..., str], sparse: Source, plain: Source, tiny_model: TinyModel, tmp_path: Path
) -> None:
    assert "was made for model" in refused(sparse(), model=tiny_model("llama", seed=1))
    assert "no such file" in refused(tmp_path / "nowhere")
    adapter = tmp_path / "plain"
    weights = adapter / "adapter_model.safetensors"
    tensors = load_file(weights)
    next(iter(tensors.values()))[0, 0] = float("nan")
    save_file(tensors, weights, metadata={"format": "pt"})
    assert "not finite" in refused(adapter)


def test_what_is_there_is_kept(tiny_model: TinyModel, plain: Source, tmp_path: Path) -> None:
    adapter, model, out = plain(), tiny_model("llama"), tmp_path / "out"
    selection = every_head(model)
    scale_adapter(model, adapter, selection, out, strength=0.5)
    with pytest.raises(CastuneError, match="exists already"):
        scale_adapter(model, adapter, selection, out, strength=0.75)
    assert ScaledAdapter.load(out).strength == 0.5
    scale_adapter(model, adapter, selection, out, strength=0.75, overwrite=True)
    assert ScaledAdapter.load(out).strength == 0.75
    with pytest.raises(CastuneError, match="exists already"):
        scale_adapter(model, adapter, selection, adapter, strength=0.75, overwrite=True)
