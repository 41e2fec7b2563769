"""Adapters cut down to chosen heads: the selected rows are the source's, every other one the base's."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_models import query_rows_mask
from tiny_training import SOME, SelectionOf, edit_config
from torch import Tensor

from castune.artifacts import HeadSelection, MaskedAdapter
from castune.core.heads import HeadLayout
from castune.errors import CastuneError, CertificateError
from castune.tuning.mask import every_head, mask_adapter
from castune.tuning.merge import write_merged
from castune.tuning.verify import certify

TinyModel = Callable[..., Any]
Source = Callable[..., Path]
# Family, its query projection, another linear module.
FAMILIES = [("llama", "q_proj", "o_proj"), ("gpt2", "c_attn", "c_proj"), ("phi3", "qkv_proj", "o_proj")]
IDS = torch.arange(5, 25)[None]


@pytest.fixture
def source(tiny_model: TinyModel, tmp_path: Path) -> Source:
    """A plain PEFT adapter with values everywhere, as other people train them."""

    def make(family: str = "llama", *names: str, name: str = "source", seed: int = 7, **changes: Any) -> Path:
        settings = {"r": 4, "lora_alpha": 10, "init_lora_weights": False, "task_type": "CAUSAL_LM"}
        config = LoraConfig(
            target_modules=list(names or ["q_proj"]), fan_in_fan_out=family == "gpt2", **{**settings, **changes}
        )
        torch.manual_seed(seed)
        get_peft_model(tiny_model(family), config).save_pretrained(tmp_path / name)
        return tmp_path / name

    return make


def pair(adapter: Path, path: str) -> tuple[Tensor, Tensor]:
    tensors = load_file(adapter / "adapter_model.safetensors")
    return tuple(tensors[f"base_model.model.{path}.lora_{part}.weight"] for part in "AB")  # type: ignore[return-value]


@torch.no_grad()
def by_hand(model: Any, selection: HeadSelection, pairs: dict[int, tuple[Tensor, Tensor]], scaling: float) -> None:
    """Add the update to the selected rows of a model's weights, row by row."""
    layout = HeadLayout.of(model)
    for layer, head in selection.heads:
        a, b = pairs[layer]
        weight = layout.query_projection(model, layer).weight
        rows = weight.t() if layout.at(layer).transposed else weight
        for row in range(*layout.query_rows(layer, head).indices(len(rows))):
            rows[row] += scaling * (b[row] @ a)


@pytest.mark.parametrize(("family", "query", "other"), FAMILIES)
def test_selected_rows_are_the_adapters_and_all_else_is_the_bases(
    tiny_model: TinyModel,
    selection_of: SelectionOf,
    source: Source,
    tmp_path: Path,
    family: str,
    query: str,
    other: str,
) -> None:
    model, adapter = tiny_model(family), source(family, query, other)
    selection, layout = selection_of(model, SOME), HeadLayout.of(model)
    result = mask_adapter(model, adapter, selection, tmp_path / "out")

    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert len(tensors) == 4, "layers 0 and 2, A and B"
    for layer in (0, 2):
        (a, b), (old_a, old_b) = (pair(where, layout.at(layer).query_path) for where in (tmp_path / "out", adapter))
        chosen = query_rows_mask(layout, selection, layer, len(b))
        assert chosen.sum() == 8 * len(selection.heads_of(layer))
        assert torch.equal(a, old_a)
        assert torch.equal(b[chosen], old_b[chosen])
        assert not b[~chosen].any()
    n_other = sum(name.endswith(other) for name, _ in tiny_model(family).named_modules())
    assert result.dropped == {query: 1, other: n_other}
    assert result.certificate == certify(model, tmp_path / "out", selection)
    assert result.certificate.changed_rows == result.certificate.selected_rows == 24
    assert MaskedAdapter.load(tmp_path / "out") == result
    assert HeadSelection.load(tmp_path / "out") == selection

    # Plain PEFT reads it back: the same logits as the weights computed row by row.
    expected = tiny_model(family)
    by_hand(expected, selection, {layer: pair(adapter, layout.at(layer).query_path) for layer in (0, 2)}, 10 / 4)
    with torch.no_grad():
        before, wanted = model(input_ids=IDS).logits, expected(input_ids=IDS).logits
        found = PeftModel.from_pretrained(tiny_model(family), tmp_path / "out")(input_ids=IDS).logits
    assert (wanted - before).abs().max() > 1e-2
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("family", "query", "other"), FAMILIES)
@pytest.mark.parametrize(("combination", "density"), [("linear", None), ("ties", 0.3), ("ties", None)])
def test_a_combination_is_pefts_own_restricted_to_the_rows(
    tiny_model: TinyModel, selection_of: SelectionOf, source: Source, tmp_path: Path, family: str, query: str, other: str,
    combination: str, density: float | None,
) -> None:  # fmt: skip
    adapters = [source(family, query, other, name=f"a{i}", seed=i, lora_alpha=4 + 6 * i) for i in range(3)]
    model, weights = tiny_model(family), [1.0, 0.5, -0.25]
    selection, layout = selection_of(model, SOME), HeadLayout.of(model)
    settings = {"combination": combination, "weights": weights, "density": density}
    result = mask_adapter(model, adapters, selection, tmp_path / "out", **settings)
    assert result.density == (None if combination == "linear" else density or 0.5)
    assert [one["alpha"] for one in result.sources] == [4, 10, 16]

    peft_model = PeftModel.from_pretrained(tiny_model(family), adapters[0], adapter_name="0")
    for i in (1, 2):
        peft_model.load_adapter(adapters[i], str(i))
    peft_model.add_weighted_adapter(["0", "1", "2"], weights, "m", combination_type=combination, density=result.density)
    for layer in (0, 2):
        a, b = pair(tmp_path / "out", layout.at(layer).query_path)
        module = peft_model.base_model.model.get_submodule(layout.at(layer).query_path)
        chosen = query_rows_mask(layout, selection, layer, len(b))
        assert torch.equal(a, module.lora_A["m"].weight)
        assert torch.equal(b[chosen], module.lora_B["m"].weight[chosen])
        assert b[chosen].any()
        assert not b[~chosen].any()
        assert (
            json.loads((tmp_path / "out" / "adapter_config.json").read_text())["lora_alpha"] / 4 == module.scaling["m"]
        )


def test_every_head_is_plain_merging(tiny_model: TinyModel, source: Source, tmp_path: Path) -> None:
    model, adapter = tiny_model("llama"), source()
    result = mask_adapter(model, adapter, every_head(model), tmp_path / "out")
    assert (result.dropped, result.zone, result.certificate.checked_rows) == ({}, "all", 0)
    old, new = (load_file(where / "adapter_model.safetensors") for where in (adapter, tmp_path / "out"))
    assert old.keys() == new.keys()
    assert all(torch.equal(old[name], new[name]) for name in old)


@pytest.mark.parametrize("combination", [None, "ties"])
def test_the_base_is_left_as_it_was(
    tiny_model: TinyModel, selection_of: SelectionOf, source: Source, state_of: Callable[[Any], dict[str, Any]],
    same_bits: Callable[[Tensor, Tensor], bool], tmp_path: Path, combination: str | None,
) -> None:  # fmt: skip
    model = tiny_model("llama")
    model.model.layers[0].mlp.up_proj.weight.requires_grad_(False)
    before, selection = state_of(model), selection_of(model, SOME)
    adapters = [source(name="a"), source(name="b", seed=1)] if combination else [source()]
    generator = torch.get_rng_state()
    mask_adapter(model, adapters, selection, tmp_path / "out", combination=combination)
    assert torch.equal(generator, torch.get_rng_state())
    after = state_of(model)
    tensors, old = after.pop("tensors"), before.pop("tensors")
    assert after == before
    assert all(same_bits(tensor, old[name]) for name, tensor in tensors.items())


def test_layers_that_only_some_sources_adapt(
    tiny_model: TinyModel, selection_of: SelectionOf, source: Source, tmp_path: Path
) -> None:
    model = tiny_model("llama")
    one, two = source(name="one", layers_to_transform=[1]), source(name="two", layers_to_transform=[2], seed=1)
    result = mask_adapter(
        model, [one, two], selection_of(model, ((0, 0), (1, 1), (2, 2))), tmp_path / "out", combination="linear"
    )
    assert result.unadapted_layers == (0,)
    assert result.certificate.changed_rows == 16, "rows of layers 1 and 2"
    # PEFT alone would have taken the layers of the first adapter only.
    assert pair(tmp_path / "out", "model.layers.2.self_attn.q_proj")[1][16:24].any()


# -- refusals


@pytest.fixture
def refused(tiny_model: TinyModel, selection_of: SelectionOf, tmp_path: Path) -> Callable[..., str]:
    """`mask_adapter` with these arguments: one line of error, and nothing written."""

    def check(adapter: Any, kind: type[CastuneError] = CastuneError, *, model: Any = None, **settings: Any) -> str:
        model = model or tiny_model("llama")
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(kind) as caught:
            mask_adapter(model, adapter, selection_of(model, SOME), tmp_path / "made" / "out", **settings)
        assert sorted(tmp_path.rglob("*")) == before, "nothing half-written"
        assert "\n" not in str(caught.value)
        return str(caught.value)

    return check


def test_no_adapter_is_none_to_mask(refused: Callable[..., str]) -> None:
    assert refused([]).startswith("no adapter to mask")


@pytest.mark.parametrize(
    "changes",
    [
        {"use_dora": True}, {"use_rslora": True}, {"bias": "all"}, {"rank_pattern": {"q_proj": 2}}, {"peft_type": "IA3"},
        {"alpha_pattern": {"q_proj": 9}}, {"modules_to_save": ["lm_head"]}, {"init_lora_weights": "pissa"},
        {"lora_bias": True}, {"target_parameters": ["x"]}, {"alora_invocation_tokens": [1]},
    ],
    ids=str,
)  # fmt: skip
def test_anything_but_plain_lora_is_refused(
    refused: Callable[..., str], source: Source, changes: dict[str, Any]
) -> None:
    adapter = source()
    edit_config(adapter, **changes)
    assert next(iter(changes)) in refused(adapter, CertificateError)
    assert "adapter_config.json" in refused([source(name="good"), adapter], combination="ties")


def test_lora_of_embeddings_and_what_peft_writes_with_it_are_refused(
    refused: Callable[..., str], source: Source, recwarn: pytest.WarningsRecorder
) -> None:
    said = refused(source("llama", "q_proj", "embed_tokens"), CertificateError)
    assert "embed_tokens" in said
    assert "castune inspect reads such an adapter" in said


def test_another_base_model_is_refused(
    refused: Callable[..., str], tiny_model: TinyModel, selection_of: SelectionOf, source: Source, tmp_path: Path
) -> None:
    # By its certificate, by its name, by its shape, by its modules.
    model = tiny_model("llama")
    mask_adapter(model, source(), selection_of(model, SOME), tmp_path / "certified")
    assert "was made for model" in refused(tmp_path / "certified", model=tiny_model("llama", seed=1))
    model.config._name_or_path = "org/Tiny-Instruct"
    adapter = source(name="named")
    edit_config(adapter, base_model_name_or_path="org/Tiny")
    assert "'org/Tiny'" in refused(adapter, model=model)
    assert "expected" in refused(source(), model=tiny_model("llama", hidden_size=16))
    assert "does not have" in refused(source("gpt2", "c_attn", name="other"))


@pytest.mark.parametrize(
    "wanted", ["elsewhere/tiny-instruct", "/cache/models--org--Tiny-Instruct/snapshots/0a1b", "/data/Tiny-Instruct/"]
)
def test_one_model_in_another_place_is_accepted(
    tiny_model: TinyModel, selection_of: SelectionOf, source: Source, tmp_path: Path, wanted: str
) -> None:
    model, adapter = tiny_model("llama"), source()
    model.config._name_or_path = "org/Tiny-Instruct"
    edit_config(adapter, base_model_name_or_path=wanted)
    assert mask_adapter(model, adapter, selection_of(model, SOME), tmp_path / "out").certificate.changed_rows == 24


def test_files_that_are_missing_or_damaged(refused: Callable[..., str], source: Source, tmp_path: Path) -> None:
    assert "adapter_config.json: no such file" in refused(tmp_path / "nowhere", CertificateError)
    adapter = source()
    weights = adapter / "adapter_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-8])
    assert "adapter_model.safetensors" in refused(adapter)
    weights.unlink()
    assert "adapter_model.safetensors" in refused(adapter)


def test_values_that_are_no_numbers(refused: Callable[..., str], source: Source) -> None:
    adapter = source()
    tensors = load_file(adapter / "adapter_model.safetensors")
    next(iter(tensors.values()))[0, 0] = float("nan")
    save_file(tensors, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    assert "not finite" in refused(adapter)


def test_an_adapter_without_queries(refused: Callable[..., str], source: Source) -> None:
    assert "no query projection" in refused(source("llama", "o_proj"))


@pytest.mark.parametrize(
    ("count", "settings", "said"),
    [
        (1, {"combination": "ties"}, "at least two"),
        (1, {"weights": [1.0]}, "at least two"),
        (1, {"density": 0.5}, "combination ties"),
        (2, {}, "linear, ties"),
        (2, {"combination": "cat"}, "accepted: linear, ties"),
        (2, {"combination": "linear", "density": 0.5}, "combination ties"),
        (2, {"combination": "ties", "density": 0.0}, "density is 0"),
        (2, {"combination": "ties", "density": 1.5}, "density is 1.5"),
        (2, {"combination": "ties", "weights": [1.0]}, "each of 2 adapters"),
        (2, {"combination": "ties", "weights": [1.0, float("nan")]}, "each of 2 adapters"),
    ],
    ids=str,
)
def test_settings_that_do_not_fit(
    refused: Callable[..., str], source: Source, count: int, settings: dict[str, Any], said: str
) -> None:
    assert said in refused([source(name=f"a{i}") for i in range(count)], **settings)


def test_unequal_ranks_name_both(refused: Callable[..., str], source: Source) -> None:
    said = refused([source(name="one"), source(name="two", r=8)], combination="linear")
    assert "r = 4" in said
    assert "r = 8" in said


def test_what_is_there_is_kept(
    tiny_model: TinyModel, selection_of: SelectionOf, source: Source, tmp_path: Path
) -> None:
    model, adapter, out = tiny_model("llama"), source(), tmp_path / "out"
    chosen, fewer = selection_of(model, SOME), selection_of(model, SOME[:1])
    # Another's adapter is never replaced, one that castune mask wrote if asked.
    with pytest.raises(CastuneError, match="exists already"):
        mask_adapter(model, adapter, chosen, adapter, overwrite=True)
    out.mkdir()  # an empty directory is nothing
    mask_adapter(model, adapter, chosen, out)
    with pytest.raises(CastuneError, match="exists already"):
        mask_adapter(model, adapter, fewer, out)
    assert MaskedAdapter.load(out).certificate.heads == SOME
    mask_adapter(model, adapter, fewer, out, overwrite=True)
    assert MaskedAdapter.load(out).certificate.heads == SOME[:1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]


# -- merging


@pytest.mark.parametrize(("family", "query", "other"), FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_merged_model_differs_in_selected_rows_alone(
    tiny_model: TinyModel, tiny_tokenizer: Any, selection_of: SelectionOf, source: Source,
    same_bits: Callable[[Tensor, Tensor], bool], tmp_path: Path, family: str, query: str, other: str, dtype: torch.dtype,
) -> None:  # fmt: skip
    model = tiny_model(family).to(dtype)
    layout = HeadLayout.of(model)
    with torch.no_grad():
        # Adding the zero update of an unselected row would turn -0.0 into +0.0.
        layout.query_projection(model, 0).weight[:, :3] = -0.0
        layout.query_projection(model, 0).weight[:3] = -0.0
    selection = selection_of(model, SOME)
    mask_adapter(model, source(family, query), selection, tmp_path / "adapter")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    (tmp_path / "merged").mkdir()
    done = write_merged(model, tiny_tokenizer, tmp_path / "adapter", selection, tmp_path / "merged")
    assert all(same_bits(tensor, before[name]) for name, tensor in model.state_dict().items()), "the base is as it was"

    written = type(model).from_pretrained(tmp_path / "merged", dtype=dtype)
    peft_merged = PeftModel.from_pretrained(model, tmp_path / "adapter").merge_and_unload()
    paths = {f"{layout.at(layer).query_path}.weight": layer for layer in (0, 2)}
    for name, tensor in written.state_dict().items():
        if name not in paths:
            assert same_bits(tensor, before[name]), name
            continue
        transposed = layout.at(paths[name]).transposed
        new, old, merged = (t.t() if transposed else t for t in (tensor, before[name], peft_merged.state_dict()[name]))
        chosen = query_rows_mask(layout, selection, paths[name], len(new))
        assert same_bits(new[~chosen], old[~chosen])
        assert torch.equal(new[chosen], merged[chosen]), "PEFT's own arithmetic"
        assert not torch.equal(new[chosen], old[chosen])
    assert done.identical_tensors == len(before) - 2
    assert done.changed_rows == done.certificate.changed_rows == 24


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("model.layers.1.mlp.up_proj.weight", "differs from the base in model.layers.1.mlp.up_proj.weight"),
        (
            "model.layers.0.self_attn.q_proj.weight",
            "differs from the merged one in model.layers.0.self_attn.q_proj.weight",
        ),
    ],
)
def test_a_file_that_is_not_what_was_merged_is_found(
    tiny_model: TinyModel, tiny_tokenizer: Any, selection_of: SelectionOf, source: Source, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, name: str, said: str,
) -> None:  # fmt: skip
    model = tiny_model("llama")
    with torch.no_grad():
        model.get_parameter(name)[0, 0] = 0.0
    selection = selection_of(model, SOME)
    mask_adapter(model, source(), selection, tmp_path / "adapter")
    save = model.save_pretrained

    def tampered(out: Path) -> None:
        save(out)
        tensors = load_file(out / "model.safetensors")
        tensors[name][0, 0] = -0.0  # equal by value
        save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})

    monkeypatch.setattr(model, "save_pretrained", tampered)
    (tmp_path / "merged").mkdir()
    with pytest.raises(CertificateError, match=said):
        write_merged(model, tiny_tokenizer, tmp_path / "adapter", selection, tmp_path / "merged")


def test_a_quantised_base_is_refused(
    tiny_model: TinyModel, tiny_tokenizer: Any, selection_of: SelectionOf, source: Source, tmp_path: Path
) -> None:
    model = tiny_model("llama")
    selection = selection_of(model, SOME)
    mask_adapter(model, source(), selection, tmp_path / "adapter")
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.to(torch.int8), requires_grad=False)
    with pytest.raises(CastuneError, match="quantised"):
        write_merged(model, tiny_tokenizer, tmp_path / "adapter", selection, tmp_path / "merged")
