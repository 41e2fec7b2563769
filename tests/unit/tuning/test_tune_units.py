"""Training units beside query heads: what is chosen moves, row by row and column by column, and nothing else."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_training import CONFIG, IDS, logits
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from castune.artifacts import Certificate, HeadSelection, TuneResult
from castune.artifacts.unit import joined
from castune.core.heads import HeadLayout
from castune.core.provenance import fingerprint
from castune.data.example import Example
from castune.errors import CastuneError, CertificateError, UnsupportedArchitecture
from castune.names import kind_words
from castune.tuning.mask import mask_adapter
from castune.tuning.merge import write_merged
from castune.tuning.row_lora import budget, sparse_lora
from castune.tuning.surgery import parameter_groups
from castune.tuning.targets import units_for
from castune.tuning.train import tune
from castune.tuning.verify import certify

HEADS = ((0, 1),)
UNITS = (
    ("o_head", 0, 2), ("o_head", 1, 0), ("k_group", 1, 1), ("v_group", 2, 0), ("mlp_group", 0, 1), ("mlp_group", 2, 3),
    ("mlp_block", 1, 0),
)  # fmt: skip
FAMILIES = ("llama", "phi3", "gpt2", "opt")


def mixed(model: Any, units: Iterable[tuple[str, int, int]] = UNITS, heads: Any = HEADS) -> HeadSelection:
    units = tuple(units)
    n_groups = 4 if any(kind == "mlp_group" for kind, _, _ in units) else None
    return HeadSelection.custom(
        heads, n_total=99, model_fingerprint=fingerprint(model), units=units, mlp_groups=n_groups
    )


def chosen_lines(family: str) -> dict[str, tuple[int, set[int]]]:
    """Of each tensor that may change: 0 for rows or 1 for columns, and which; by hand, for heads of width 8."""
    n = 32 if family == "gpt2" else 12  # neurons of a group

    def lines(*spans: tuple[int, int]) -> set[int]:
        return {line for start, stop in spans for line in range(start, stop)}

    first, last, every = (n, 2 * n), (3 * n, 4 * n), (0, 4 * n)
    if family == "llama":
        layer, attention, gated = "model.layers.{}.", "self_attn.", ("mlp.gate_proj", "mlp.up_proj")
        found = {"0.q_proj": (0, lines((8, 16))), "1.k_proj": (0, lines((8, 16))), "2.v_proj": (0, lines((0, 8)))}
        out, down = "o_proj", "mlp.down_proj"
    elif family == "opt":
        layer, attention, gated = "model.decoder.layers.{}.", "self_attn.", ("fc1",)
        found = {"0.q_proj": (0, lines((8, 16))), "1.k_proj": (0, lines((8, 16))), "2.v_proj": (0, lines((0, 8)))}
        out, down = "out_proj", "fc2"
    else:
        fused = "qkv_proj" if family == "phi3" else "c_attn"
        found = {
            f"0.{fused}": (0, lines((8, 16))),
            f"1.{fused}": (0, lines((40, 48))),
            f"2.{fused}": (0, lines((64, 72))),
        }
        layer, attention = ("model.layers.{}.", "self_attn.") if family == "phi3" else ("transformer.h.{}.", "attn.")
        gated = ("mlp.gate_up_proj",) if family == "phi3" else ("mlp.c_fc",)
        out, down = ("o_proj", "mlp.down_proj") if family == "phi3" else ("c_proj", "mlp.c_proj")
    found = {f"{layer.format(key[0])}{attention}{key[2:]}": value for key, value in found.items()}
    found[f"{layer.format(0)}{attention}{out}"] = 1, lines((16, 24))
    found[f"{layer.format(1)}{attention}{out}"] = 1, lines((0, 8))
    for number, span in ((0, first), (1, every), (2, last)):
        upper = ((48 + span[0], 48 + span[1]),) if family == "phi3" else ()
        found |= {f"{layer.format(number)}{name}": (0, lines(span, *upper)) for name in gated}
        found[f"{layer.format(number)}{down}"] = 1, lines(span)
    return {f"{name}.weight": value for name, value in found.items()}


def as_lines(tensor: Tensor, family: str, axis: int) -> Tensor:
    rows = tensor.t() if family == "gpt2" else tensor
    return rows if axis == 0 else rows.t()


@pytest.mark.parametrize("family", FAMILIES)
def test_only_chosen_rows_and_columns_move(
    tiny_model: Callable[..., Any],
    tiny_tokenizer: Any,
    aligned: list[Example],
    same_bits: Callable[[Tensor, Tensor], bool],
    tmp_path: Path,
    family: str,
) -> None:
    model = tiny_model(family)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    selection = mixed(model)
    result = tune(model, tiny_tokenizer, selection, data=aligned, out=tmp_path / "adapter", config=CONFIG)
    after = model.state_dict()
    assert all(same_bits(after[name], before[name]) for name in before)
    assert not any("lora" in name for name, _ in model.named_modules())

    # Plain PEFT loads the adapter into a fresh model; merged, exactly the chosen rows and columns differ.
    merged = PeftModel.from_pretrained(tiny_model(family), tmp_path / "adapter").merge_and_unload().state_dict()
    wanted, counts = chosen_lines(family), [[0, 0], [0, 0]]
    assert wanted.keys() <= merged.keys()
    for name, tensor in merged.items():
        if name not in wanted:
            assert same_bits(tensor, before[name]), name
            continue
        axis, lines = wanted[name]
        new, old = as_lines(tensor, family, axis), as_lines(before[name], family, axis)
        assert {line for line in range(len(new)) if not same_bits(new[line], old[line])} == lines, name
        counts[axis][0] += len(lines)
        counts[axis][1] += len(new) - len(lines)

    found = result.certificate
    assert found == Certificate.load(tmp_path / "adapter")
    assert TuneResult.load(tmp_path / "adapter") == result
    assert [found.selected_rows, found.checked_rows] == counts[0]
    assert [found.selected_columns, found.checked_columns] == counts[1]
    assert (found.changed_rows, found.changed_columns) == (found.selected_rows, found.selected_columns)
    assert (found.units, found.mlp_groups) == (joined(HEADS, sorted(UNITS)), 4)
    assert certify(model, tmp_path / "adapter", selection) == found


def test_one_training_has_one_hash(
    tiny_model: Callable[..., Any], tiny_tokenizer: Any, aligned: list[Example], tmp_path: Path
) -> None:
    """PEFT keeps module names in a set, whose order is another in every process."""
    model, out = tiny_model("llama"), tmp_path / "adapter"
    config = CONFIG.model_copy(update={"snapshot_steps": 2})
    tune(model, tiny_tokenizer, mixed(model), data=aligned, out=out, config=config)
    for folder in (out, out / "snapshots" / "2"):
        names = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))["target_modules"]
        assert len(names) == len(chosen_lines("llama"))
        assert names == sorted(names)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_merged_model_differs_in_the_selection_alone(
    tiny_model: Callable[..., Any],
    tiny_tokenizer: Any,
    aligned: list[Example],
    same_bits: Callable[[Tensor, Tensor], bool],
    tmp_path: Path,
    family: str,
) -> None:
    model = tiny_model(family)
    wanted = chosen_lines(family)
    with torch.no_grad():  # PEFT's own merge would turn these into +0.0
        for name, (axis, lines) in wanted.items():
            rest = [line for line in range(len(as_lines(model.state_dict()[name], family, axis))) if line not in lines]
            as_lines(model.state_dict()[name], family, axis)[rest[:1]] = -0.0
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    selection = mixed(model)
    tune(model, tiny_tokenizer, selection, data=aligned, out=tmp_path / "adapter", config=CONFIG)
    (tmp_path / "merged").mkdir()
    done = write_merged(model, tiny_tokenizer, tmp_path / "adapter", selection, tmp_path / "merged")
    assert all(same_bits(tensor, before[name]) for name, tensor in model.state_dict().items())
    written = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").state_dict()
    for name, tensor in written.items():
        if name not in wanted:
            assert same_bits(tensor, before[name]), name
            continue
        axis, lines = wanted[name]
        new, old = as_lines(tensor, family, axis), as_lines(before[name], family, axis)
        assert {line for line in range(len(new)) if not same_bits(new[line], old[line])} == lines, name
    certificate = done.certificate
    assert (done.changed_rows, done.changed_columns) == (certificate.changed_rows, certificate.changed_columns)
    assert (done.identical_rows, done.identical_columns) == (certificate.checked_rows, certificate.checked_columns)
    adapted = PeftModel.from_pretrained(model, tmp_path / "adapter")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(merged), logits(adapted), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    ("units", "modules"),
    [
        ([("k_group", layer, i) for layer in range(3) for i in range(2)], ["k_proj"]),
        ([("v_group", layer, i) for layer in range(3) for i in range(2)], ["v_proj"]),
        ([("o_head", layer, i) for layer in range(3) for i in range(4)], ["o_proj"]),
        ([("mlp_block", layer, 0) for layer in range(3)], ["gate_proj", "up_proj", "down_proj"]),
        ([("mlp_group", layer, i) for layer in range(3) for i in range(4)], ["gate_proj", "up_proj", "down_proj"]),
    ],
    ids=["k_groups", "v_groups", "o_heads", "mlp_blocks", "mlp_groups"],
)
def test_all_units_of_a_kind_equal_plain_lora(tiny_model: Callable[..., Any], units: Any, modules: list[str]) -> None:
    model = tiny_model("llama")
    torch.manual_seed(5)
    sparse = sparse_lora(model, mixed(model, units, ()), r=4, alpha=12)
    other = tiny_model("llama")
    torch.manual_seed(5)
    plain = get_peft_model(other, LoraConfig(r=4, lora_alpha=12, target_modules=modules, task_type="CAUSAL_LM"))
    gradients = []
    for adapted in (sparse, plain):
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for name, parameter in adapted.named_parameters():
                if "lora_B" in name:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
        adapted(input_ids=IDS).logits.square().mean().backward()
        gradients.append({name: p.grad for name, p in adapted.named_parameters() if p.grad is not None})
    assert torch.equal(logits(sparse), logits(plain))
    ours, theirs = gradients
    assert ours.keys() == theirs.keys()
    assert len(ours) == 6 * len(modules)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def fill(peft_model: nn.Module) -> None:
    """Values everywhere, as a careless optimiser might write them."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in peft_model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_masked_has_no_gradient_and_no_effect(tiny_model: Callable[..., Any], family: str) -> None:
    model = tiny_model(family)
    selection = mixed(model)
    peft_model = sparse_lora(model, selection, r=4)
    fill(peft_model)
    peft_model(input_ids=IDS).logits.square().mean().backward()
    wanted = {name.removesuffix(".weight"): value for name, value in chosen_lines(family).items()}
    before, seen = logits(peft_model), set()
    for name, parameter in peft_model.named_parameters():
        if "lora_" not in name:
            assert not parameter.requires_grad
            continue
        path, part = name.removeprefix("base_model.model.").split(".lora_")
        axis, lines = wanted[path]
        seen.add(path)
        if (part[0] == "B") != (axis == 0):
            assert parameter.grad.abs().min() > 0, "the other matrix is whole"
            continue
        by_line = parameter if axis == 0 else parameter.t()
        gradient = parameter.grad if axis == 0 else parameter.grad.t()
        moved = set(gradient.abs().sum(1).nonzero().flatten().tolist())
        assert moved <= lines
        assert len(moved) > len(lines) / 2, "some neurons may be saturated"
        with torch.no_grad():
            by_line[[line for line in range(len(by_line)) if line not in lines]] = 7.0
    assert seen == wanted.keys()
    assert torch.equal(logits(peft_model), before)


def test_a_fresh_adapter_is_zero_outside_the_selection_and_changes_nothing(tiny_model: Callable[..., Any]) -> None:
    model = tiny_model("llama")
    before = logits(model)
    peft_model = sparse_lora(model, mixed(model), r=4)
    assert torch.equal(logits(peft_model), before)
    a = peft_model.base_model.model.model.layers[0].self_attn.o_proj.lora_A["default"].weight
    assert set(a.abs().sum(0).nonzero().flatten().tolist()) == set(range(16, 24))


def test_budget_by_hand(tiny_model: Callable[..., Any]) -> None:
    model = tiny_model("llama")
    selection = mixed(model)
    layout = units_for(model, HeadLayout.of(model), selection)
    ledgers = [
        budget(sparse_lora(tiny_model("llama"), selection, r=4, freeze_a=freeze_a), layout, selection)
        for freeze_a in (False, True)
    ]
    # Query, key and value of one layer each; output of two; gate, up and down of all. Keys and values have 16 rows.
    b = {"q": 8, "k": 8, "v": 8, "o": 2 * 32, "gate and up": 2 * (12 + 48 + 12), "down": 3 * 32}
    a = {"q": 32, "k": 32, "v": 32, "o": 2 * 8, "gate and up": 6 * 32, "down": 12 + 48 + 12}
    assert ledgers[0] == {
        "heads": 1, "query_rows": 8, "a_matrices": 14, "effective_parameters": 4 * (sum(a.values()) + sum(b.values())),
        "trainable_parameters": 4 * (3 * 32 + 2 * 32 + 6 * 32 + 3 * 48 + 32 + 2 * 16 + 2 * 32 + 6 * 48 + 3 * 32),
        "k_groups": 1, "v_groups": 1, "o_heads": 2, "mlp_groups": 2, "mlp_blocks": 1,
        "rows": 24 + 2 * (12 + 48 + 12), "columns": 16 + 72,
    }  # fmt: skip
    assert ledgers[1]["effective_parameters"] == 4 * sum(b.values())
    assert ledgers[1]["a_matrices"] == 0


# -- the certificate


@pytest.fixture
def adapter(tiny_model: Callable[..., Any], tmp_path: Path) -> Path:
    """Values in all selected rows and columns."""
    model = tiny_model("llama")
    peft_model = sparse_lora(model, mixed(model), r=4, alpha=8)
    fill(peft_model)
    with torch.no_grad():
        for module in peft_model.modules():
            if hasattr(module, "unit_mask"):
                module.weight *= module.unit_mask
    peft_model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_an_honest_adapter_is_certified(tiny_model: Callable[..., Any], adapter: Path) -> None:
    model = tiny_model("llama")
    found = certify(model, adapter, mixed(model))
    assert found.changed_rows == found.selected_rows == 24 + 144
    assert found.changed_columns == found.selected_columns == 16 + 72


@pytest.mark.parametrize(
    ("path", "part", "line"),
    [
        ("layers.0.self_attn.q_proj", "B", 7),
        ("layers.1.self_attn.k_proj", "B", 0),
        ("layers.2.self_attn.v_proj", "B", 8),
        ("layers.0.self_attn.o_proj", "A", 24),
        ("layers.0.mlp.up_proj", "B", 11),
        ("layers.2.mlp.down_proj", "A", 35),
    ],
)
@pytest.mark.parametrize("value", [1e-3, float("nan")])
def test_one_tampered_entry_is_found(
    tiny_model: Callable[..., Any], adapter: Path, path: str, part: str, line: int, value: float
) -> None:
    model, file = tiny_model("llama"), adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    tensor = tensors[f"base_model.model.model.{path}.lora_{part}.weight"]
    (tensor if part == "B" else tensor.t())[line, 2] = value
    save_file({name: one.contiguous() for name, one in tensors.items()}, file, metadata={"format": "pt"})
    what = "rows" if part == "B" else "columns"
    with pytest.raises(CertificateError, match=rf"{path} changes 1 unselected {what}, the first is {line}"):
        certify(model, adapter, mixed(model))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda c: {**c, "target_modules": [*c["target_modules"], "lm_head"]},
            "addresses lm_head, which holds no selected",
        ),
        (lambda c: {**c, "target_modules": ["q_proj"]}, r"q_proj, which holds no selected unit|does not address"),
        (lambda c: {**c, "target_modules": c["target_modules"][1:]}, "does not address"),
        (lambda c: {**c, "target_modules": "all-linear"}, "accepted: a list of module paths"),
        (lambda c: {**c, "layers_to_transform": [0, 1]}, "layers_to_transform"),
        (lambda c: {**c, "use_dora": True}, "use_dora"),
    ],
    ids=["one more", "other ones", "one less", "a pattern", "layers", "dora"],
)
def test_settings_that_address_anything_else_are_refused(
    tiny_model: Callable[..., Any], adapter: Path, change: Callable[[dict[str, Any]], dict[str, Any]], message: str
) -> None:
    model, file = tiny_model("llama"), adapter / "adapter_config.json"
    file.write_text(json.dumps(change(json.loads(file.read_text()))))
    with pytest.raises(CertificateError, match=message):
        certify(model, adapter, mixed(model))


def test_another_selection_is_refused(tiny_model: Callable[..., Any], adapter: Path) -> None:
    model = tiny_model("llama")
    for units in (UNITS[1:], [*UNITS[:-1], ("mlp_group", 1, 0)]):
        with pytest.raises(CertificateError, match="unselected columns|unselected rows|holds no selected unit"):
            certify(model, adapter, mixed(model, units))
    finer = replace(mixed(model), mlp_groups=8)
    with pytest.raises(CertificateError, match="unselected"):
        certify(model, adapter, finer)


# -- surgery, masks, and what is refused


@pytest.mark.parametrize("family", ["llama", "phi3", "opt"])
def test_groups_of_surgery_hold_every_trained_entry_once(tiny_model: Callable[..., Any], family: str) -> None:
    model = tiny_model(family)
    selection = mixed(model, [one for one in UNITS if one[0] != "mlp_block"])
    layout = units_for(model, HeadLayout.of(model), selection)
    peft_model = sparse_lora(model, selection, r=4)
    fill(peft_model)
    peft_model(input_ids=IDS).logits.square().mean().backward()
    for granularity in ("global", "tensor", "head"):
        groups = parameter_groups(peft_model, layout, selection, granularity)  # type: ignore[arg-type]
        for name, parameter in peft_model.named_parameters():
            if not parameter.requires_grad:
                continue
            seen = torch.zeros(parameter.shape, dtype=torch.int)
            for group in groups:
                for member, index in group:
                    if member is parameter:
                        seen[index] += 1
            assert seen.max() == 1, (granularity, name)
            assert (seen[parameter.grad != 0] == 1).all(), (granularity, name)
        own = [group for group in groups if len(group) == (3 if family == "llama" else 2)]
        if granularity == "head" and family != "phi3":
            assert len(own) == 2, "a group of neurons has its rows and columns in one group"


def test_training_with_surgery_by_unit_keeps_the_certificate(
    tiny_model: Callable[..., Any], tiny_tokenizer: Any, aligned: list[Example], tmp_path: Path
) -> None:
    model = tiny_model("llama")
    config = CONFIG.changed(surgery="pcgrad-symmetric", surgery_granularity="head", max_steps=2)
    units = [one for one in UNITS if one[0] != "mlp_block"]
    result = tune(
        model,
        tiny_tokenizer,
        mixed(model, units),
        data=aligned,
        utility=aligned[::-1],
        out=tmp_path / "a",
        config=config,
    )
    assert result.certificate.changed_columns == 16 + 24
    mlps_alone = mixed(model, [one for one in UNITS if one[0].startswith("mlp_")], heads=())
    for selection in (mixed(model), mlps_alone):
        with pytest.raises(CastuneError, match="share no neurons"):
            tune(model, tiny_tokenizer, selection, data=aligned, utility=aligned, out=tmp_path / "b", config=config)
        assert not (tmp_path / "b").exists()


# Of the families in FAMILIES, linear modules of every kind that castune knows.
LINEAR = {
    "llama": "all-linear",
    "phi3": "all-linear",
    "gpt2": ["c_attn", "c_proj", "c_fc"],
    "opt": ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"],
}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_mask_keeps_the_lines_of_units_and_nothing_else(
    tiny_model: Callable[..., Any], tmp_path: Path, family: str
) -> None:
    settings = {"r": 4, "lora_alpha": 6, "init_lora_weights": False, "fan_in_fan_out": family == "gpt2"}
    torch.manual_seed(3)
    config = LoraConfig(target_modules=LINEAR[family], task_type="CAUSAL_LM", **settings)
    get_peft_model(tiny_model(family), config).save_pretrained(tmp_path / "source")
    model, selection = tiny_model(family), mixed(tiny_model(family))
    result = mask_adapter(model, tmp_path / "source", selection, tmp_path / "out")
    assert result.certificate == certify(model, tmp_path / "out", selection)
    assert result.certificate.changed_rows == result.certificate.selected_rows > 0
    assert result.certificate.changed_columns == result.certificate.selected_columns > 0
    assert not result.unadapted_layers

    base = tiny_model(family).state_dict()
    whole, kept = (
        PeftModel.from_pretrained(tiny_model(family), tmp_path / name).merge_and_unload().state_dict()
        for name in ("source", "out")
    )
    chosen = chosen_lines(family)
    for name, before in base.items():
        if name not in chosen:
            assert torch.equal(kept[name], before), name
            continue
        axis, lines = chosen[name]
        was, is_kept, is_whole = (as_lines(tensor, family, axis) for tensor in (before, kept[name], whole[name]))
        for line in range(len(was)):
            torch.testing.assert_close(is_kept[line], (is_whole if line in lines else was)[line])


@pytest.mark.parametrize("unit", [("k_group", 0, 2), ("mlp_group", 0, 4), ("o_head", 3, 0), ("mlp_block", 0, 1)])
def test_units_that_do_not_exist_are_named(tiny_model: Callable[..., Any], unit: tuple[str, int, int]) -> None:
    model, (kind, layer, index) = tiny_model("llama"), unit
    with pytest.raises(
        CastuneError, match=f"units this model does not have: .*{kind_words(kind, 1)} {index} of layer {layer}"
    ):
        sparse_lora(model, mixed(model, [("mlp_group", 0, 0), unit]))
    assert not any("lora" in name for name, _ in model.named_modules())


def test_experts_are_refused(tiny_model: Callable[..., Any]) -> None:
    model = tiny_model("qwen3_moe")
    with pytest.raises(UnsupportedArchitecture, match="mixture of experts"):
        sparse_lora(model, mixed(model, [("mlp_group", 1, 0)]))
    sparse_lora(model, mixed(model, [("v_group", 1, 0)]))
