"""The certificate: every way to smuggle in a change is refused, and named."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_training import SOME, SelectionOf, edit_config
from torch import Tensor

from castune.artifacts import HeadSelection
from castune.core.heads import HeadLayout
from castune.errors import CastuneError, CertificateError
from castune.tuning.mask import mask_adapter
from castune.tuning.row_lora import sparse_lora
from castune.tuning.verify import certify

KEY = "base_model.model.model.layers.{0}.self_attn.q_proj.lora_{1}.weight"


@pytest.fixture
def model(tiny_model: Callable[..., Any]) -> Any:
    return tiny_model("llama")


@pytest.fixture
def selection(model: Any, selection_of: SelectionOf) -> HeadSelection:
    return selection_of(model, SOME)


@pytest.fixture
def adapter(tiny_model: Callable[..., Any], selection: HeadSelection, tmp_path: Path) -> Path:
    """A head-sparse adapter with values in all selected rows."""
    peft_model = sparse_lora(tiny_model("llama"), selection, r=4, alpha=8)
    with torch.no_grad():
        for name, parameter in peft_model.named_parameters():
            if "lora_B" in name:
                rows = [r + 8 * h for h in ((1, 3) if "layers.0" in name else (0,)) for r in range(8)]
                parameter[rows] = torch.randn(len(rows), 4)
    peft_model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def edit_tensors(adapter: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata={"format": "pt"})


def test_an_honest_adapter_is_certified(model: Any, adapter: Path, selection: HeadSelection) -> None:
    certificate = certify(model, adapter, selection)
    assert (certificate.selected_rows, certificate.changed_rows, certificate.checked_rows) == (24, 24, 40)
    assert certificate.largest_change > 0
    assert certificate.model_fingerprint == selection.model_fingerprint


def test_an_untrained_adapter_changes_no_row(
    tiny_model: Callable[..., Any], selection: HeadSelection, tmp_path: Path
) -> None:
    sparse_lora(tiny_model("llama"), selection, r=4).save_pretrained(tmp_path / "fresh")
    certificate = certify(tiny_model("llama"), tmp_path / "fresh", selection)
    assert (certificate.changed_rows, certificate.largest_change) == (0, 0.0)


def test_certifying_leaves_the_model_alone(
    model: Any, adapter: Path, selection: HeadSelection, same_bits: Callable[[Tensor, Tensor], bool]
) -> None:
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    certify(model, adapter, selection)
    assert all(same_bits(tensor, before[name]) for name, tensor in model.state_dict().items())


# -- kinds of adapter that change more than their tensors say


@pytest.mark.parametrize(
    "changes",
    [
        {"use_dora": True},
        {"bias": "lora_only"},
        {"bias": "all"},
        {"modules_to_save": ["lm_head"]},
        {"init_lora_weights": "pissa"},
        {"init_lora_weights": "olora"},
        {"init_lora_weights": "pissa_niter_4"},
        {"init_lora_weights": "loftq"},
        {"init_lora_weights": "corda"},
        {"rank_pattern": {"q_proj": 2}},
        {"alpha_pattern": {"q_proj": 99}},
        {"trainable_token_indices": [1, 2]},
        {"target_parameters": ["mlp.experts.gate_up_proj"]},
        {"lora_bias": True},
        {"peft_type": "IA3"},
        {"peft_type": None},
        {"layer_replication": [[0, 3], [1, 3]]},
        {"target_modules": ["q_proj", "k_proj"], "init_lora_weights": False},
        # Loaded, this puts random updates on the layers the weights file leaves out.
        {"layers_to_transform": None, "init_lora_weights": False},
    ],
    ids=str,
)
def test_anything_but_plain_lora_is_refused(
    model: Any, adapter: Path, selection: HeadSelection, changes: dict[str, Any]
) -> None:
    certify(model, adapter, selection)
    edit_config(adapter, **changes)
    with pytest.raises(CertificateError, match=next(iter(changes))) as caught:
        certify(model, adapter, selection)
    assert "adapter_config.json" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_real_dora_adapter_is_refused(
    tiny_model: Callable[..., Any], selection: HeadSelection, tmp_path: Path
) -> None:
    config = LoraConfig(
        r=4, use_dora=True, target_modules=["q_proj"], layers_to_transform=[0, 2], task_type="CAUSAL_LM"
    )
    get_peft_model(tiny_model("llama"), config).save_pretrained(tmp_path / "dora")
    with pytest.raises(CertificateError, match="DoRA"):
        certify(tiny_model("llama"), tmp_path / "dora", selection)
    # Nor do its extra tensors pass if its config lies.
    edit_config(tmp_path / "dora", use_dora=False)
    with pytest.raises(CertificateError, match="magnitude"):
        certify(tiny_model("llama"), tmp_path / "dora", selection)


def test_a_plain_lora_adapter_that_trains_all_rows_is_refused(
    tiny_model: Callable[..., Any], selection: HeadSelection, tmp_path: Path
) -> None:
    config = LoraConfig(
        r=4, target_modules=["q_proj"], layers_to_transform=[0, 2], task_type="CAUSAL_LM", init_lora_weights=False
    )
    get_peft_model(tiny_model("llama"), config).save_pretrained(tmp_path / "plain")
    with pytest.raises(
        CertificateError, match=r"layers\.0\.self_attn\.q_proj changes 16 unselected rows, the first is 0"
    ):
        certify(tiny_model("llama"), tmp_path / "plain", selection)


# -- tensors


@pytest.mark.parametrize(("layer", "row"), [(0, 0), (0, 7), (0, 16), (0, 23), (2, 8), (2, 31)])
def test_one_tampered_entry_outside_the_selection_is_found(
    model: Any, adapter: Path, selection: HeadSelection, layer: int, row: int
) -> None:
    def tamper(tensors: dict[str, Tensor]) -> None:
        tensors[KEY.format(layer, "B")][row, 2] = 1e-3

    edit_tensors(adapter, tamper)
    with pytest.raises(CertificateError, match=rf"layers\.{layer}\..* changes 1 unselected rows, the first is {row}"):
        certify(model, adapter, selection)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_outside_the_selection_is_found(model: Any, adapter: Path, selection: HeadSelection, value: float) -> None:
    edit_tensors(adapter, lambda tensors: tensors[KEY.format(2, "B")][9].fill_(value))
    with pytest.raises(CertificateError, match="unselected rows"):
        certify(model, adapter, selection)


def test_nan_inside_the_selection_is_found_too(model: Any, adapter: Path, selection: HeadSelection) -> None:
    # The adapter would make the model useless, and `largest_change` would be no number.
    edit_tensors(adapter, lambda tensors: tensors[KEY.format(2, "B")][0].fill_(float("nan")))
    with pytest.raises(CastuneError, match="(?i)finite|nan"):
        certify(model, adapter, selection)


def test_an_adapter_on_another_layer_is_refused(model: Any, adapter: Path, selection: HeadSelection) -> None:
    def move(tensors: dict[str, Tensor]) -> None:
        for part in "AB":
            tensors[KEY.format(1, part)] = tensors[KEY.format(0, part)].clone()

    edit_tensors(adapter, move)
    with pytest.raises(CertificateError, match=r"layers\.1\.self_attn\.q_proj, which holds no selected head"):
        certify(model, adapter, selection)


def test_an_adapter_on_another_projection_is_refused(model: Any, adapter: Path, selection: HeadSelection) -> None:
    def move(tensors: dict[str, Tensor]) -> None:
        for part in "AB":
            tensors[KEY.format(0, part).replace("q_proj", "o_proj")] = tensors[KEY.format(0, part)].clone()

    edit_tensors(adapter, move)
    with pytest.raises(CertificateError, match="o_proj"):
        certify(model, adapter, selection)


def test_a_missing_layer_is_named(model: Any, adapter: Path, selection: HeadSelection) -> None:
    def drop(tensors: dict[str, Tensor]) -> None:
        for part in "AB":
            del tensors[KEY.format(2, part)]

    edit_tensors(adapter, drop)
    with pytest.raises(CertificateError, match=r"lacks the selected layers \[2\]"):
        certify(model, adapter, selection)


@pytest.mark.parametrize(
    "name",
    [
        "base_model.model.lm_head.weight",
        "base_model.model.model.layers.0.self_attn.q_proj.bias",
        "base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector",
        "base_model.model.model.embed_tokens.lora_embedding_A",
    ],
)
def test_an_extra_tensor_is_named(model: Any, adapter: Path, selection: HeadSelection, name: str) -> None:
    edit_tensors(adapter, lambda tensors: tensors.update({name: torch.ones(3)}))
    with pytest.raises(CertificateError, match=name.replace(".", r"\.")):
        certify(model, adapter, selection)


def test_half_a_pair_is_named(model: Any, adapter: Path, selection: HeadSelection) -> None:
    edit_tensors(adapter, lambda tensors: tensors.pop(KEY.format(0, "A")))
    with pytest.raises(CertificateError, match="lora_A"):
        certify(model, adapter, selection)


@pytest.mark.parametrize(("part", "shape"), [("B", (64, 4)), ("A", (4, 16)), ("B", (32, 3)), ("B", (32,))])
def test_tensors_of_another_shape_are_named(
    model: Any, adapter: Path, selection: HeadSelection, part: str, shape: tuple[int, ...]
) -> None:
    edit_tensors(adapter, lambda tensors: tensors.update({KEY.format(0, part): torch.zeros(shape)}))
    with pytest.raises(CertificateError, match=r"layers\.0"):
        certify(model, adapter, selection)


# -- files and models


def test_missing_and_damaged_files_are_named(
    model: Any, adapter: Path, selection: HeadSelection, tmp_path: Path
) -> None:
    with pytest.raises(CertificateError, match=r"adapter_config\.json: no such file"):
        certify(model, tmp_path, selection)
    weights = adapter / "adapter_model.safetensors"
    whole = weights.read_bytes()
    for content in (b"", b"junk", whole[:-8]):
        weights.write_bytes(content)
        with pytest.raises(CertificateError, match=r"adapter_model\.safetensors"):
            certify(model, adapter, selection)
    weights.unlink()
    with pytest.raises(CertificateError, match=r"adapter_model\.safetensors"):
        certify(model, adapter, selection)
    weights.write_bytes(whole)
    for content in ("{", "[]", '{"peft_type": "LORA"}', '{"peft_type": "LORA", "r": 0, "lora_alpha": 8}', "\udcff"):
        (adapter / "adapter_config.json").write_bytes(content.encode("utf-8", "surrogateescape"))
        with pytest.raises(CertificateError, match=r"adapter_config\.json"):
            certify(model, adapter, selection)


def test_a_rank_that_is_not_the_tensors_is_refused(model: Any, adapter: Path, selection: HeadSelection) -> None:
    # alpha / r would scale the certificate's update and the loaded one differently.
    edit_config(adapter, r=2)
    with pytest.raises(CertificateError, match="r"):
        certify(model, adapter, selection)


def test_another_model_is_refused(tiny_model: Callable[..., Any], adapter: Path, selection: HeadSelection) -> None:
    with pytest.raises(CastuneError, match=selection.model_fingerprint):
        certify(tiny_model("llama", seed=1), adapter, selection)


def test_another_selection_is_refused(model: Any, adapter: Path, selection_of: SelectionOf) -> None:
    with pytest.raises(CertificateError, match="unselected rows"):
        certify(model, adapter, selection_of(model, ((0, 1), (0, 2), (2, 0))))
    with pytest.raises(CertificateError, match="layers_to_transform"):
        certify(model, adapter, selection_of(model, ((0, 1), (0, 3))))
    with pytest.raises(CertificateError, match="layers_to_transform"):
        certify(model, adapter, selection_of(model, (*SOME, (1, 0))))


@pytest.mark.parametrize("stored", [True, False])
def test_transposed_storage_is_taken_from_the_model_not_from_the_file(
    tiny_model: Callable[..., Any], selection_of: SelectionOf, tmp_path: Path, stored: bool
) -> None:
    # PEFT corrects fan_in_fan_out to what the layer needs when it loads an adapter.
    model = tiny_model("gpt2")
    chosen = selection_of(model, SOME)
    sparse_lora(tiny_model("gpt2"), chosen, r=4).save_pretrained(tmp_path / "a")
    edit_config(tmp_path / "a", fan_in_fan_out=stored)
    assert certify(model, tmp_path / "a", chosen).selected_rows == 24
    assert HeadLayout.of(model).at(0).transposed


# -- tensors that PEFT would not load


@pytest.mark.parametrize(
    ("rename", "named"),
    [
        (lambda key: key.removeprefix("base_model.model."), "does not begin with 'base_model.model.'"),
        (lambda key: f"_orig_mod.{key}", "_orig_mod"),
        (lambda key: key.replace("base_model.model.", "base_model.model._orig_mod.", 1), "_orig_mod"),
    ],
    ids=["bare", "compiled", "compiled inside"],
)
def test_keys_that_peft_does_not_know_are_refused(
    model: Any, adapter: Path, selection: HeadSelection, tmp_path: Path, rename: Callable[[str], str], named: str
) -> None:
    tensors = load_file(adapter / "adapter_model.safetensors")
    edit_tensors(adapter, lambda found: (found.clear(), found.update({rename(k): t for k, t in tensors.items()})))
    for refused in (
        lambda: certify(model, adapter, selection),
        lambda: mask_adapter(model, adapter, selection, tmp_path / "out"),
    ):
        with pytest.raises(CertificateError, match=f"{named}.*PEFT would not load it"):
            refused()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "changes",
    [
        {"layers_to_transform": [0]},
        {"exclude_modules": ["layers.2.self_attn.q_proj"]},
        {"target_modules": ["model.layers.0.self_attn.q_proj"], "layers_to_transform": None},
        {"target_modules": r".*layers\.0\.self_attn\.q_proj", "layers_to_transform": None},
        {"layers_pattern": "blocks"},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_layers_that_an_adapters_own_settings_leave_out_are_refused(
    model: Any, adapter: Path, selection: HeadSelection, tmp_path: Path, changes: dict[str, Any]
) -> None:
    edit_config(adapter, **changes)
    with pytest.raises(CertificateError):
        certify(model, adapter, selection)
    with pytest.raises(CertificateError, match=rf"{next(iter(changes))}.*PEFT would not load.*layers\.[02]\."):
        mask_adapter(model, adapter, selection, tmp_path / "out")


def test_what_the_check_of_settings_passes_is_what_peft_loads(
    tiny_model: Callable[..., Any], adapter: Path, selection: HeadSelection
) -> None:
    """The truth is what PEFT computes with: with its settings changed, layer 2 stays as it was."""
    edit_config(adapter, layers_to_transform=[0])
    loaded = PeftModel.from_pretrained(tiny_model("llama"), adapter)
    wrapped = {name for name, module in loaded.named_modules() if hasattr(module, "lora_B")}
    assert wrapped == {"base_model.model.model.layers.0.self_attn.q_proj"}


def test_a_model_with_other_modules_of_the_same_name_is_trained_by_paths(
    tiny_model: Callable[..., Any], selection_of: SelectionOf, tmp_path: Path
) -> None:
    """As a language model inside a vision-language one, whose tower has a q_proj in layers of the same numbers."""

    def model_with_tower() -> Any:
        model = tiny_model("llama")
        model.vision_tower = torch.nn.ModuleDict({"layers": torch.nn.ModuleList([tower_layer(), tower_layer()])})
        return model

    def tower_layer() -> Any:
        return torch.nn.ModuleDict({"self_attn": torch.nn.ModuleDict({"q_proj": torch.nn.Linear(4, 4)})})

    torch.manual_seed(0)
    model = model_with_tower()
    selection = selection_of(model, SOME)
    peft_model = sparse_lora(model, selection, r=4)
    assert {name for name, module in peft_model.named_modules() if hasattr(module, "lora_B")} == {
        f"base_model.model.model.layers.{layer}.self_attn.q_proj" for layer in (0, 2)
    }
    peft_model.save_pretrained(tmp_path / "adapter")
    peft_model.unload()
    assert certify(model, tmp_path / "adapter", selection).checked_rows == 40
