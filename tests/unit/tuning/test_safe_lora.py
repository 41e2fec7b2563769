"""Adapters projected by Safe LoRA: plain PEFT computes with them what dense projections in float64 say."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_training import CONFIG, SOME, SelectionOf, Tuned, edit_config, logits
from torch import Tensor

from castune.artifacts import HeadSelection, ProjectedAdapter
from castune.artifacts.tune_result import adapter_hash
from castune.core.provenance import fingerprint
from castune.errors import CastuneError
from castune.tuning.merge import write_merged
from castune.tuning.safe_lora import project_adapter
from castune.tuning.verify import certify

TinyModel = Callable[..., Any]
Source = Callable[..., Path]
Models = tuple[Any, Any]
# Family and modules to adapt; gpt2 stores its weights transposed, phi3 fused.
FAMILIES = [("llama", ["q_proj", "v_proj", "o_proj"]), ("gpt2", ["c_attn", "c_proj"]), ("phi3", ["qkv_proj"])]
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def models(tiny_model: TinyModel) -> Callable[..., Models]:
    """A model and the one it was before its "alignment", which moved every matrix in few directions, by as much each."""

    def make(family: str = "llama", rank: int = 8) -> Models:
        aligned, unaligned = tiny_model(family), tiny_model(family)
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for parameter in unaligned.parameters():
                if parameter.ndim == 2:
                    left, right = (torch.randn(size, rank, generator=generator) for size in parameter.shape)
                    parameter += 0.02 * left @ right.T
        return aligned, unaligned

    return make


@pytest.fixture
def plain(tiny_model: TinyModel, tmp_path: Path) -> Source:
    """An adapter with values everywhere, as other people train them."""

    def make(family: str = "llama", names: Any = ("q_proj",), *, name: str = "plain", **changes: Any) -> Path:
        settings = {"r": 4, "lora_alpha": 10, "init_lora_weights": False, "task_type": "CAUSAL_LM"}
        names = names if isinstance(names, str) else list(names)
        config = LoraConfig(target_modules=names, fan_in_fan_out=family == "gpt2", **{**settings, **changes})
        torch.manual_seed(7)
        get_peft_model(tiny_model(family), config).save_pretrained(tmp_path / name, save_embedding_layers=False)
        return tmp_path / name

    return make


def dense(family: str, model: Any, path: str) -> Tensor:
    """The weight of a module as (outputs, inputs), in float64."""
    weight = model.get_submodule(path).weight.detach().double()
    return weight.T if family == "gpt2" else weight


def updates(adapter: Path) -> Iterator[tuple[str, Tensor]]:
    """(module, scaled B A) of a plain adapter, in float64."""
    config, tensors = json.loads((adapter / "adapter_config.json").read_text()), load_file(adapter / WEIGHTS)
    scaling = config["lora_alpha"] / (math.sqrt(config["r"]) if config["use_rslora"] else config["r"])
    for name in tensors:
        if name.endswith("lora_A.weight"):
            path = name.removesuffix(".lora_A.weight")
            product = tensors[f"{path}.lora_B.weight"].double() @ tensors[name].double()
            yield path.removeprefix("base_model.model."), scaling * product


def by_hand(family: str, models: Models, adapter: Path, *, exact: bool) -> dict[str, tuple[Tensor, Tensor, float]]:
    """Of every module the update, its projection and their cosine, by dense matrices as the paper has them."""
    found = {}
    for path, update in updates(adapter):
        v = dense(family, models[0], path) - dense(family, models[1], path)
        # Weights are in float32, so that directions of their rounding errors are none.
        c = v @ torch.linalg.pinv(v, rtol=1e-5) if exact else v @ v.T / (v**2).sum().sqrt()
        projected = c @ update
        found[path] = update, projected, float((update * projected).sum() / update.norm() / projected.norm())
    return found


def logits_by_hand(family: str, model: Any, added: dict[str, Tensor]) -> Tensor:
    """Logits of a model with these updates added to its weights, (outputs, inputs) each."""
    with torch.no_grad():
        for path, update in added.items():
            weight = model.get_submodule(path).weight
            weight += (update.T if family == "gpt2" else update).float()
    return logits(model)


# -- what it computes


@pytest.mark.parametrize(("family", "names"), FAMILIES)
@pytest.mark.parametrize("exact", [False, True], ids=["fast", "exact"])
def test_plain_peft_computes_what_the_dense_formulas_say(
    tiny_model: TinyModel, models: Callable[..., Models], plain: Source, tmp_path: Path, family: str, names: list[str],
    exact: bool,
) -> None:  # fmt: skip
    adapter, pair = plain(family, names), models(family)
    wanted = by_hand(family, pair, adapter, exact=exact)
    cosines = sorted(cosine for _, _, cosine in wanted.values())
    threshold = (cosines[1] + cosines[2]) / 2  # between two of them, none nearer than float32 can tell
    assert cosines[2] - cosines[1] > 1e-4
    result = project_adapter(adapter, *pair, tmp_path / "out", threshold=threshold, exact=exact)
    added = {}
    for one in result.updates:
        update, projected, cosine = wanted[one.module]
        assert one.cosine == pytest.approx(cosine, abs=1e-5)
        assert one.norm == pytest.approx(float(update.norm()), rel=1e-5)
        assert one.projected_norm == pytest.approx(float(projected.norm()), rel=1e-4)
        assert one.is_projected == (cosine < threshold)
        assert one.rank == (8 if exact else None)
        added[one.module] = projected if one.is_projected else update
    assert sum(one.is_projected for one in result.updates) == 2
    assert added.keys() == wanted.keys()
    for path, update in updates(tmp_path / "out"):
        # An MLP is one unit: beside its c_proj stands a c_fc with an update of zero.
        torch.testing.assert_close(update, added.get(path, torch.zeros_like(update)), rtol=1e-4, atol=1e-5)
    found = logits(PeftModel.from_pretrained(tiny_model(family), tmp_path / "out"))
    reference = logits_by_hand(family, tiny_model(family), added)
    torch.testing.assert_close(found, reference, rtol=1e-4, atol=1e-4)
    assert (found - logits(PeftModel.from_pretrained(tiny_model(family), adapter))).abs().max() > 1e-2


def test_the_threshold_decides_at_both_sides_of_a_cosine(
    models: Callable[..., Models], plain: Source, tmp_path: Path
) -> None:
    adapter, pair = plain(), models()
    first = project_adapter(adapter, *pair, tmp_path / "first", threshold=0)
    assert not first.projected
    assert first.kept_norm == pytest.approx(1)
    lowest, *others = first.cosines
    for number, (threshold, n) in enumerate([(lowest, 0), (math.nextafter(lowest, 1), 1), (others[-1], 2), (1.0, 3)]):
        found = project_adapter(adapter, *pair, tmp_path / f"{number}", threshold=threshold)
        assert len(found.projected) == n, "a cosine at the threshold is not below it"
    old, new = (load_file(tmp_path / name / WEIGHTS) for name in ("plain", "first"))
    assert old.keys() == new.keys()
    assert all(torch.equal(old[name], new[name]) for name in old)


def test_so_many_of_the_lowest_cosine_are_projected(
    models: Callable[..., Models], plain: Source, tmp_path: Path
) -> None:
    adapter, pair = plain(names=["q_proj", "k_proj"]), models()
    found = project_adapter(adapter, *pair, tmp_path / "out", layers=4)
    cosines = {one.module: one.cosine for one in found.updates}
    assert [one.module for one in found.projected] == sorted(sorted(cosines, key=lambda path: cosines[path])[:4])
    assert (found.threshold, found.layers) == (None, 4)
    before, after = (sum(float(update.norm()) ** 2 for _, update in updates(tmp_path / n)) for n in ("plain", "out"))
    assert found.kept_norm == pytest.approx((after / before) ** 0.5, rel=1e-5)


def test_an_update_in_the_alignment_space_is_left_alone_by_the_exact_projector(
    models: Callable[..., Models], plain: Source, tmp_path: Path
) -> None:
    adapter, (aligned, unaligned) = plain(), models()
    tensors = load_file(adapter / WEIGHTS)
    for name in [name for name in tensors if name.endswith("lora_B.weight")]:
        path = name.removeprefix("base_model.model.").removesuffix(".lora_B.weight")
        v = dense("llama", aligned, path) - dense("llama", unaligned, path)
        tensors[name] = (v @ torch.randn(v.shape[1], 4, dtype=torch.float64)).float().contiguous()
    save_file(tensors, adapter / WEIGHTS, metadata={"format": "pt"})
    found = project_adapter(adapter, aligned, unaligned, tmp_path / "out", layers=3, exact=True)
    assert [one.cosine for one in found.updates] == [pytest.approx(1, abs=1e-6)] * 3
    for name, tensor in load_file(tmp_path / "out" / WEIGHTS).items():
        torch.testing.assert_close(tensor, tensors[name], rtol=1e-4, atol=1e-4)
    again = project_adapter(tmp_path / "out", aligned, unaligned, tmp_path / "again", layers=3, exact=True)
    assert again.kept_norm == pytest.approx(1, abs=1e-6)


def test_of_full_rank_the_exact_projector_changes_nothing_and_says_so(
    models: Callable[..., Models], plain: Source, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    found = project_adapter(plain(), *models(rank=40), tmp_path / "out", threshold=1, exact=True)
    assert "3 of 3 modules in every direction" in caplog.text
    assert found.kept_norm == pytest.approx(1, abs=1e-6)


def test_an_update_of_zero_stays_zero_and_is_not_counted(
    models: Callable[..., Models], plain: Source, tmp_path: Path
) -> None:
    adapter = plain()
    tensors = load_file(adapter / WEIGHTS)
    name = next(name for name in tensors if "layers.1" in name and "lora_B" in name)
    tensors[name].zero_()
    save_file(tensors, adapter / WEIGHTS, metadata={"format": "pt"})
    found = project_adapter(adapter, *models(), tmp_path / "out", layers=2)
    assert [one.cosine is None for one in found.updates] == [False, True, False]
    assert [one.is_projected for one in found.updates] == [True, False, True]
    assert not load_file(tmp_path / "out" / WEIGHTS)[name].any()


def test_rank_stabilised_lora_and_a_file_in_16_bits(
    tiny_model: TinyModel, models: Callable[..., Models], plain: Source, tmp_path: Path
) -> None:
    adapter, pair = plain(use_rslora=True), models()
    tensors = load_file(adapter / WEIGHTS)
    save_file({k: v.bfloat16() for k, v in tensors.items()}, adapter / WEIGHTS, metadata={"format": "pt"})
    wanted = by_hand("llama", pair, adapter, exact=False)
    found = project_adapter(adapter, *pair, tmp_path / "out", threshold=1)
    assert all(one.norm == pytest.approx(float(wanted[one.module][0].norm()), rel=1e-5) for one in found.updates)
    reference = logits_by_hand("llama", tiny_model("llama"), {path: one for path, (_, one, _) in wanted.items()})
    read = logits(PeftModel.from_pretrained(tiny_model("llama"), tmp_path / "out"))
    torch.testing.assert_close(read, reference, rtol=1e-4, atol=1e-4)


# -- what it says of itself


def test_a_head_sparse_adapter_is_that_of_whole_layers_afterwards(
    tiny_model: TinyModel, models: Callable[..., Models], tuned: Tuned, selection_of: SelectionOf, tmp_path: Path
) -> None:
    tuned(tiny_model("llama"), tmp_path / "trained", CONFIG)
    aligned, unaligned = models()
    result = project_adapter(tmp_path / "trained", aligned, unaligned, tmp_path / "out", threshold=1)
    of_layers = tuple((layer, head) for layer in (0, 2) for head in range(4))
    assert result.certificate.heads == of_layers
    assert (result.certificate.checked_rows, result.certificate.selected_rows) == (0, 64)
    assert result.certificate.changed_rows == 64, "the source changed 24"
    assert HeadSelection.load(tmp_path / "out").heads == of_layers
    with pytest.raises(CastuneError, match="unselected rows"):
        certify(aligned, tmp_path / "out", selection_of(aligned, SOME))
    assert result.certificate == certify(aligned, tmp_path / "out", HeadSelection.load(tmp_path / "out"))


def test_the_record_says_what_was_made_of_what(
    tiny_model: TinyModel, models: Callable[..., Models], plain: Source, tmp_path: Path
) -> None:
    adapter, (aligned, unaligned) = plain(), models()
    result = project_adapter(adapter, aligned, unaligned, tmp_path / "out")
    assert ProjectedAdapter.load(tmp_path / "out") == result
    assert (result.threshold, result.layers, result.exact) == (0.35, None, False)
    assert result.source == {"name": "plain", "hash": adapter_hash(adapter), "r": 4, "alpha": 10.0}
    prints = [record["fingerprint"] for record in (result.aligned, result.unaligned, result.model)]
    assert prints == [fingerprint(model) for model in (aligned, unaligned, aligned)]
    assert len(set(prints)) == 2
    assert result.certificate.adapter_hash == adapter_hash(tmp_path / "out")
    # Neither model was touched.
    assert torch.equal(logits(aligned), logits(tiny_model("llama")))


@pytest.mark.parametrize("names", ["all-linear", r".*\.(q_proj|down_proj)"])
def test_modules_by_a_pattern_and_a_part_of_an_mlp(
    tiny_model: TinyModel, tiny_tokenizer: Any, models: Callable[..., Models], plain: Source, tmp_path: Path, names: str
) -> None:
    """An MLP is one unit: what the adapter does not have of it gets updates of zero."""
    adapter, pair = plain(names=names), models()
    edit_config(adapter, target_modules=names)
    result = project_adapter(adapter, *pair, tmp_path / "out", layers=5)
    kinds = {one.kind for one in result.certificate.units}
    assert kinds >= {"q_head", "mlp_block"}
    assert len(result.updates) == sum(1 for _ in updates(adapter))
    read = logits(PeftModel.from_pretrained(tiny_model("llama"), tmp_path / "out"))
    wanted = by_hand("llama", pair, adapter, exact=False)
    added = {one.module: wanted[one.module][one.is_projected] for one in result.updates}
    torch.testing.assert_close(read, logits_by_hand("llama", tiny_model("llama"), added), rtol=1e-3, atol=1e-3)
    (tmp_path / "merged").mkdir()
    selection = HeadSelection.load(tmp_path / "out")
    write_merged(tiny_model("llama"), tiny_tokenizer, tmp_path / "out", selection, tmp_path / "merged")
    merged = logits(type(pair[0]).from_pretrained(tmp_path / "merged"))
    torch.testing.assert_close(merged, read, rtol=1e-3, atol=1e-3)


def test_models_by_name_and_a_base_of_its_own(
    tiny_tokenizer: Any, models: Callable[..., Models], plain: Source, tmp_path: Path
) -> None:
    adapter, (aligned, unaligned) = plain(), models()
    for name, model in (("aligned", aligned), ("unaligned", unaligned)):
        model.save_pretrained(tmp_path / name)
        tiny_tokenizer.save_pretrained(tmp_path / name)
    loaded = project_adapter(adapter, aligned, unaligned, tmp_path / "loaded", layers=2)
    named = project_adapter(adapter, tmp_path / "aligned", str(tmp_path / "unaligned"), tmp_path / "named", layers=2)
    assert named.updates == loaded.updates
    assert [named.aligned["name"], named.unaligned["name"]] == ["aligned", "unaligned"]
    # The other way round, for an adapter of the unaligned model.
    other = project_adapter(adapter, tmp_path / "aligned", unaligned, tmp_path / "other", layers=2, base=unaligned)
    assert other.updates == loaded.updates
    assert other.certificate.model_fingerprint == fingerprint(unaligned)


# -- refusals


@pytest.fixture
def refused(models: Callable[..., Models], tmp_path: Path) -> Callable[..., str]:
    """`project_adapter` with these arguments: one line of error, and nothing written."""

    def check(adapter: Path, *, aligned: Any = None, unaligned: Any = None, **settings: Any) -> str:
        pair = models()
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(CastuneError) as caught:
            project_adapter(adapter, aligned or pair[0], unaligned or pair[1], tmp_path / "made" / "out", **settings)
        assert sorted(tmp_path.rglob("*")) == before, "nothing half-written"
        assert "\n" not in str(caught.value)
        return str(caught.value)

    return check


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"threshold": 0.3, "layers": 2}, "give one of them"),
        ({"layers": 0}, "at least 1"),
        ({"layers": 4}, "layers is 4, but the adapter changes 3 modules"),
        *(({"threshold": value}, "accepted: a cosine from 0 to 1") for value in (-0.1, 1.1, math.nan, math.inf)),
    ],
    ids=str,
)
def test_settings_that_make_no_sense_are_refused(
    refused: Callable[..., str], plain: Source, settings: dict[str, Any], reason: str
) -> None:
    assert reason in refused(plain(), **settings)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"use_dora": True}, "DoRA rescales every row"),
        ({"bias": "all"}, "bias is 'all'"),
        ({"rank_pattern": {"q_proj": 9}}, "ranks must be equal"),
        ({"init_lora_weights": "pissa"}, "changes the base weights"),
        ({"r": 5}, "for this model and r = 5"),
        ({"target_modules": ["v_proj"]}, "PEFT would not load the tensors"),
    ],
    ids=str,
)
def test_what_is_no_plain_lora_is_refused(
    refused: Callable[..., str], plain: Source, changes: dict[str, Any], reason: str
) -> None:
    adapter = plain()
    edit_config(adapter, **changes)
    assert reason in refused(adapter)


def test_models_that_are_no_pair_are_refused(
    refused: Callable[..., str], tiny_model: TinyModel, models: Callable[..., Models], plain: Source, tmp_path: Path
) -> None:
    adapter = plain()
    same = "is the same in the aligned and the unaligned model"
    assert same in refused(adapter, unaligned=tiny_model("llama"))
    _, unaligned = models()
    path = "model.layers.1.self_attn.q_proj"
    with torch.no_grad():
        unaligned.get_submodule(path).weight.copy_(tiny_model("llama").get_submodule(path).weight)
    assert f"{path} {same}" in refused(adapter, unaligned=unaligned)
    assert "q_proj is (32, 32) in the aligned model and (64, 32)" in refused(
        adapter, unaligned=tiny_model("llama", head_dim=16)
    )
    assert "the unaligned model has no module model.layers.2" in refused(
        adapter, unaligned=tiny_model("llama", num_hidden_layers=2)
    )
    assert "no such directory" in refused(adapter, unaligned=str(tmp_path / "nowhere"))
    broken = tiny_model("llama", seed=1)
    with torch.no_grad():
        broken.get_submodule(path).weight[0, 0] = float("nan")
    assert f"{path}: the difference of the two models has values that are not finite" in refused(
        adapter, unaligned=broken
    )


def test_another_base_broken_values_and_parts_of_no_unit_are_refused(
    refused: Callable[..., str], tiny_model: TinyModel, tuned: Tuned, plain: Source, tmp_path: Path
) -> None:
    tuned(tiny_model("llama", seed=1), tmp_path / "trained", CONFIG)
    assert "was made for model" in refused(tmp_path / "trained")
    assert "lm_head has parts that belong to no unit" in refused(plain(names=["q_proj", "lm_head"], name="head"))
    adapter = plain()
    tensors = load_file(adapter / WEIGHTS)
    next(iter(tensors.values()))[0, 0] = float("nan")
    save_file(tensors, adapter / WEIGHTS, metadata={"format": "pt"})
    assert "not finite" in refused(adapter)
    save_file({}, adapter / WEIGHTS, metadata={"format": "pt"})
    assert "holds no tensors" in refused(adapter)
    assert "no such file" in refused(tmp_path / "nowhere")


def test_models_in_two_dtypes_are_told(
    models: Callable[..., Models], plain: Source, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    aligned, unaligned = models()
    project_adapter(plain(), aligned, unaligned.bfloat16(), tmp_path / "out")
    assert "the aligned model is in float32 and the unaligned one in bfloat16" in caplog.text


def test_what_is_there_is_kept(models: Callable[..., Models], plain: Source, tmp_path: Path) -> None:
    adapter, pair, out = plain(), models(), tmp_path / "out"
    project_adapter(adapter, *pair, out, layers=1)
    with pytest.raises(CastuneError, match="exists already"):
        project_adapter(adapter, *pair, out, layers=2)
    assert ProjectedAdapter.load(out).layers == 1
    project_adapter(adapter, *pair, out, layers=2, overwrite=True)
    assert ProjectedAdapter.load(out).layers == 2
    with pytest.raises(CastuneError, match="exists already"):
        project_adapter(adapter, *pair, adapter, layers=2, overwrite=True)
