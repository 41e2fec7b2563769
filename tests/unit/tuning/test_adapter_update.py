"""Adapters of any trainer are read as PEFT loads them: what is read is the difference that merging makes."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_training import edit_config
from torch import Tensor

from castune.core.updates import Dense, LowRank, Update
from castune.errors import CastuneError, CertificateError
from castune.tuning.adapter_update import AdapterUpdate, read_update

TinyModel = Callable[..., Any]
Source = Callable[..., Path]
WEIGHTS = "adapter_model.safetensors"
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@pytest.fixture
def source(tiny_model: TinyModel, tmp_path: Path) -> Source:
    """An adapter with values everywhere, as other trainers leave it."""

    def make(
        family: str = "llama", *, name: str = "source", model: dict[str, Any] | None = None, **changes: Any
    ) -> Path:
        settings = {"r": 4, "lora_alpha": 10, "init_lora_weights": False, "task_type": "CAUSAL_LM"}
        config = LoraConfig(fan_in_fan_out=family == "gpt2", **{**settings, **changes})
        torch.manual_seed(7)
        peft_model = get_peft_model(tiny_model(family, **(model or {})), config)
        with torch.no_grad():
            for key, parameter in peft_model.named_parameters():
                # DoRA begins at the base's own magnitudes, saved modules at the base's weights.
                if "magnitude" in key or "modules_to_save" in key:
                    parameter += 0.1 * torch.randn_like(parameter)
        peft_model.save_pretrained(tmp_path / name)
        return tmp_path / name

    return make


def dense(update: Update) -> Tensor:
    return update.matrix_MN if isinstance(update, Dense) else update.scaling * update.left_MR @ update.right_RN


def merged_changes(model: Any, adapter: Path) -> dict[str, Tensor]:
    """What merging by PEFT adds to every weight that it changes, by module path."""
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    merged = PeftModel.from_pretrained(model, adapter).merge_and_unload().state_dict()
    return {
        name.removesuffix(".weight"): tensor - before[name]
        for name, tensor in merged.items()
        if not torch.equal(tensor, before[name])
    }


TRL_LIKE = {"r": 8, "lora_alpha": 16, "target_modules": "all-linear"}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "TRL, all linear modules": ("llama", TRL_LIKE),
    "fused projections": ("phi3", TRL_LIKE),
    "transposed and fused": ("gpt2", {"target_modules": ["c_attn", "c_proj", "c_fc"]}),
    "rank and alpha by pattern": (
        "llama",
        {
            "target_modules": ["q_proj", "v_proj", "down_proj"],
            "rank_pattern": {"q_proj": 2, r"layers\.[12]\.mlp\.down_proj": 6},
            "alpha_pattern": {"model.layers.0.self_attn.q_proj": 3, "v_proj": 5},
        },
    ),
    "rank-stabilised": ("llama", {"target_modules": ["q_proj"], "use_rslora": True, "rank_pattern": {"q_proj": 9}}),
    "a regular expression": ("llama", {"target_modules": r".*layers\.[01]\.self_attn\.(q|k)_proj"}),
    "some layers": ("llama", {"target_modules": ["o_proj"], "layers_to_transform": [0, 2]}),
    "DoRA": ("llama", {"target_modules": ["q_proj", "o_proj"], "use_dora": True}),
    "DoRA, transposed": ("gpt2", {"target_modules": ["c_attn", "c_proj"], "use_dora": True}),
    "a whole module beside it": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "up_proj"]}),
    "an output head": ("llama", {"target_modules": ["q_proj", "lm_head"]}),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_read_is_what_peft_merges(tiny_model: TinyModel, source: Source, kind: str) -> None:
    family, settings = KINDS[kind]
    adapter = source(family, **settings)
    found = read_update(tiny_model(family), adapter)
    changes = merged_changes(tiny_model(family), adapter)
    assert found.updates.keys() == changes.keys()
    for path, change in changes.items():
        assert found.updates[path].shape == tuple(change.shape)
        torch.testing.assert_close(dense(found.updates[path]), change, rtol=1e-4, atol=1e-5)
    assert not found.others
    assert not found.not_loaded
    is_low_rank = [isinstance(update, LowRank) for update in found.updates.values()]
    assert all(is_low_rank) or "DoRA" in kind or "whole" in kind
    assert found.ends == (["lm_head"] if "lm_head" in str(settings) else [])


def test_its_kind_in_words(tiny_model: TinyModel, source: Source) -> None:
    def kind(**settings: Any) -> str:
        return read_update(tiny_model("llama"), source(**settings)).kind

    assert kind(target_modules=["q_proj"]) == "LoRA r = 4, alpha = 10"
    _, patterns = KINDS["rank and alpha by pattern"]
    assert kind(**patterns) == "LoRA r = 2 to 6, alpha = 10 and by pattern"
    assert kind(target_modules=["q_proj"], use_dora=True) == "DoRA r = 4, alpha = 10"
    assert kind(target_modules=["q_proj"], use_rslora=True) == "LoRA r = 4, alpha = 10, rank-stabilised"


# -- what is no projection's weight


@pytest.mark.parametrize(
    ("family", "settings", "others"),
    [
        ("llama", {"target_modules": ["embed_tokens", "q_proj"]}, {"model.embed_tokens": "input embeddings"}),
        (
            "llama",
            {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "input_layernorm"]},
            {"model.embed_tokens": "input embeddings"}
            | {f"model.layers.{i}.input_layernorm": "LlamaRMSNorm" for i in range(3)},
        ),
        (
            "llama",
            {"target_modules": ["q_proj"], "trainable_token_indices": [1, 2]},
            {"model.embed_tokens": "2 rows of the input embeddings"},
        ),
        (
            "qwen2",
            {"target_modules": ["q_proj"], "lora_bias": True, "layers_to_transform": [1]},
            {"model.layers.1.self_attn.q_proj": "bias"},
        ),
        (
            "qwen3_moe",
            {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.gate_up_proj"]},
            {f"model.layers.{i}.mlp.experts": "parameters of experts" for i in range(3)},
        ),
    ],
    ids=["embeddings", "saved modules", "tokens", "biases", "experts"],
)
def test_what_else_is_trained_is_told(
    tiny_model: TinyModel, source: Source, family: str, settings: dict[str, Any], others: dict[str, str]
) -> None:
    found = read_update(tiny_model(family), source(family, **settings))
    assert {other.path: other.what for other in found.others} == others
    assert all(path.endswith("q_proj") for path in found.updates)
    assert not found.not_loaded
    assert found.ends == (["model.embed_tokens"] if "embed" in str(others) else [])


def test_what_is_only_rounded_to_the_dtype_of_the_base_is_no_change(tiny_model: TinyModel, source: Source) -> None:
    base = tiny_model("llama").bfloat16()
    # PEFT saves a copy of the base weight beside LoRA of an output head, here in float32.
    beside = source(target_modules=["q_proj", "lm_head"])
    assert any("base_layer" in name for name in load_file(beside / WEIGHTS))
    found = read_update(base, beside)
    assert found.is_of_projections
    assert not found.others
    saved = source(name="saved", target_modules=["q_proj"], modules_to_save=["lm_head"])
    before = base.lm_head.weight.detach().float().clone()
    update = dense(read_update(base, saved).updates["lm_head"])
    merged = PeftModel.from_pretrained(base, saved).merge_and_unload().lm_head.weight.detach()
    assert torch.equal(update, merged.float() - before)


def test_a_head_that_is_tied_has_no_gradient_of_its_own(tiny_model: TinyModel, source: Source) -> None:
    tied = {"tie_word_embeddings": True}
    adapter = source(model=tied, target_modules=["q_proj", "lm_head"])
    found = read_update(tiny_model("llama", **tied), adapter)
    assert [other.what for other in found.others] == ["output head, tied to the input embeddings"]
    assert found.ends == ["lm_head"]
    update = LowRank(
        *(load_file(adapter / WEIGHTS)[f"base_model.model.lm_head.lora_{part}.weight"] for part in "BA"), 2.5
    )
    assert found.others[0].norm == pytest.approx(float(dense(update).norm()), rel=1e-5)


def test_a_copy_of_the_base_counts_where_it_differs(tiny_model: TinyModel, source: Source) -> None:
    adapter = source(target_modules=["q_proj", "lm_head"])
    name = "base_model.model.lm_head.base_layer.weight"
    tensors = load_file(adapter / WEIGHTS)
    assert name in tensors
    assert not read_update(tiny_model("llama"), adapter).others
    tensors[name][0, 0] += 3
    save_file(tensors, adapter / WEIGHTS)
    [other] = read_update(tiny_model("llama"), adapter).others
    assert (other.what, other.norm) == ("its own copy of the base weight", pytest.approx(3, rel=1e-5))


# -- tensors that PEFT leaves out


def renamed(adapter: Path, change: Callable[[str], str]) -> None:
    tensors = load_file(adapter / WEIGHTS)
    save_file({change(name): tensor for name, tensor in tensors.items()}, adapter / WEIGHTS)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda name: name.removeprefix("base_model.model."), "does not begin with"),
        (lambda name: name.replace("base_model.model.", "base_model.model._orig_mod.", 1), "torch.compile"),
        (lambda name: name.replace("layers.2.", "layers.7."), "does not have"),
        (lambda name: name.replace("lora_A.weight", "lora_C").replace("lora_B.weight", "lora_D"), "no tensor of"),
    ],
    ids=["bare", "compiled", "another layer", "another name"],
)
def test_names_that_peft_does_not_load_are_told(
    tiny_model: TinyModel, source: Source, change: Callable[[str], str], said: str
) -> None:
    adapter = source(target_modules=["q_proj"])
    renamed(adapter, lambda name: change(name) if ".2." in name else name)
    found = read_update(tiny_model("llama"), adapter)
    assert len(found.not_loaded) == 2, "A and B of layer 2"
    assert all(said in why for why in found.not_loaded.values())
    assert sorted(found.updates) == [f"model.layers.{i}.self_attn.q_proj" for i in (0, 1)]


@pytest.mark.parametrize(
    "changes",
    [{"layers_to_transform": [0, 1]}, {"target_modules": r".*layers\.[01]\.self_attn\.q_proj"}, {"exclude_modules": [r"layers.2.self_attn.q_proj"]}],
    ids=lambda changes: next(iter(changes)),
)  # fmt: skip
def test_settings_that_leave_modules_out_are_told_as_peft_reads_them(
    tiny_model: TinyModel, source: Source, changes: dict[str, Any]
) -> None:
    adapter = source(target_modules=["q_proj"])
    edit_config(adapter, **changes)
    found = read_update(tiny_model("llama"), adapter)
    assert len(found.not_loaded) == 2
    assert all("do not address" in why for why in found.not_loaded.values())
    assert found.updates.keys() == merged_changes(tiny_model("llama"), adapter).keys()


# -- refusals


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"peft_type": "IA3"}, "peft_type is IA3"),
        ({"layer_replication": [[0, 2]]}, "repeats layers"),
        ({"alora_invocation_tokens": [1]}, "some tokens only"),
        ({"use_qalora": True}, "pools the inputs"),
        ({"init_lora_weights": "pissa"}, "changes the base weights"),
        ({"r": 3}, "expected .3, 32. and .32, 3. for this model and r = 3"),
        ({"use_dora": True}, "no magnitudes"),
        ({"rank_pattern": {"(": 3}}, "damaged: rank_pattern"),
        ({"target_modules": None}, "damaged: .*target_modules is None"),
        ({"target_modules": 3}, "damaged: .*target_modules is 3"),
        ({"target_modules": ["q_proj", 3]}, "damaged: .*target_modules is"),
        ({"target_modules": "(["}, "damaged: .*unterminated"),
        ({"exclude_modules": "(["}, "damaged: .*unterminated"),
        ({"exclude_modules": 3}, "damaged: .*exclude_modules is 3"),
        ({"layers_pattern": ["(["], "layers_to_transform": 1}, "damaged: .*unterminated"),
        ({"layers_pattern": ["layers"]}, "damaged: .*layers_to_transform is not"),
        ({"target_modules": "q_proj", "layers_to_transform": [1]}, "damaged: .*is a regular expression"),
        ({"layers_to_transform": "all"}, "damaged: .*layers_to_transform is 'all'"),
        ({"modules_to_save": "lm_head"}, "damaged: .*modules_to_save is 'lm_head'"),
    ],
    ids=str,
)
def test_what_cannot_be_read_is_refused_with_the_reason(
    tiny_model: TinyModel, source: Source, changes: dict[str, Any], said: str
) -> None:
    adapter = source(target_modules=["q_proj"])
    edit_config(adapter, **changes)
    with pytest.raises(CertificateError, match=said) as caught:
        read_update(tiny_model("llama"), adapter)
    assert "\n" not in str(caught.value)


def test_an_adapter_of_parameters_alone_names_no_modules(tiny_model: TinyModel, source: Source) -> None:
    adapter = source("mixtral", target_modules=None, target_parameters=["mlp.experts.gate_up_proj"])
    edit_config(adapter, target_modules=None)
    found = read_update(tiny_model("mixtral"), adapter)
    assert (found.updates, {other.what for other in found.others}) == ({}, {"parameters of experts"})


def test_pickled_weights_are_never_read(tiny_model: TinyModel, source: Source) -> None:
    adapter = source(target_modules=["q_proj"])
    (adapter / WEIGHTS).rename(adapter / "adapter_model.bin")
    with pytest.raises(CertificateError, match=f"{re.escape(WEIGHTS)}: .* adapter_model.bin .* save it again"):
        read_update(tiny_model("llama"), adapter)


def test_other_models_and_damaged_tensors(tiny_model: TinyModel, source: Source) -> None:
    adapter = source(target_modules=["q_proj"])
    with pytest.raises(CastuneError, match="made for another model"):
        read_update(tiny_model("gpt2"), adapter)
    with pytest.raises(CastuneError, match="expected .4, 16."):
        read_update(tiny_model("llama", hidden_size=16), adapter)
    tensors = load_file(adapter / WEIGHTS)
    first, *_ = sorted(tensors)
    save_file({name: tensor for name, tensor in tensors.items() if name != first}, adapter / WEIGHTS)
    with pytest.raises(CertificateError, match="no other half"):
        read_update(tiny_model("llama"), adapter)
    tensors[first][0, 0] = float("nan")
    save_file(tensors, adapter / WEIGHTS)
    with pytest.raises(CertificateError, match=f"{re.escape(first)} has values that are not finite"):
        read_update(tiny_model("llama"), adapter)


def test_an_update_of_nothing(tiny_model: TinyModel, source: Source) -> None:
    found: AdapterUpdate = read_update(tiny_model("llama"), source(target_modules=["q_proj"], init_lora_weights=True))
    assert all(float(update.singular_values().sum()) == 0 for update in found.updates.values())
