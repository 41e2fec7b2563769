"""What `castune inspect` measures: first-order effects against finite differences, sizes against plain SVDs, findings."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from castune.artifacts import ConflictMap, HeadSelection, Unit
from castune.artifacts.adapter_inspection import OBJECTIVES, SCHEMA, AdapterInspection
from castune.artifacts.unit import joined
from castune.config import Recipe
from castune.core.heads import HeadLayout
from castune.core.loading import LoadedModel
from castune.core.provenance import fingerprint
from castune.core.units import UnitLayout
from castune.data.example import Example
from castune.diagnosis.run import diagnose
from castune.errors import ArtifactError, CastuneError
from castune.steps.directory import RunDirectory
from castune.steps.inspect import inspect_step
from castune.steps.inspection_data import InspectionData
from castune.steps.subject import Subject

TinyModel = Callable[..., Any]
Source = Callable[..., Path]
WEIGHTS = "adapter_model.safetensors"
ALL_LINEAR = {"r": 8, "lora_alpha": 4, "target_modules": "all-linear"}
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@pytest.fixture
def source(tiny_model: TinyModel, tmp_path: Path) -> Source:
    """An adapter with values everywhere."""

    def make(family: str = "llama", *, name: str = "source", seed: int = 7, **changes: Any) -> Path:
        settings = {"r": 4, "lora_alpha": 1, "init_lora_weights": False, "task_type": "CAUSAL_LM"}
        config = LoraConfig(fan_in_fan_out=family == "gpt2", **{**settings, **changes})
        torch.manual_seed(seed)
        peft_model = get_peft_model(tiny_model(family), config)
        with torch.no_grad():
            for key, parameter in peft_model.named_parameters():
                if "magnitude" in key or "modules_to_save" in key:
                    parameter += 0.02 * torch.randn_like(parameter)
        peft_model.save_pretrained(tmp_path / name)
        return tmp_path / name

    return make


@pytest.fixture
def data(harmful: list[Example], questions: list[Example]) -> InspectionData:
    helpful = [Example(id=f"b{i}", prompt=f"How do I cook {w}?", reply=f"Boil {w}.") for i, w in enumerate("abc")]
    return InspectionData(
        {"safety": harmful, "utility": questions, "over-refusal": helpful}, dict.fromkeys(OBJECTIVES, "test")
    )


def recipe(**diagnose: Any) -> Recipe:
    return Recipe.of(model="tiny", out="unused", diagnose={"gradient_chunks": 2, **diagnose})


RECIPE = recipe()
Inspect = Callable[..., AdapterInspection]


@dataclass(frozen=True)
class Given(Subject):
    """A subject whose model, map and selection are given instead of read."""

    model: LoadedModel | None = None
    of_model: ConflictMap | None = None
    touched: tuple[Unit, ...] | None = None

    loaded = property(lambda self: self.model)  # type: ignore[assignment]
    cmap = property(lambda self: self.of_model)  # type: ignore[assignment]
    selected = property(lambda self: self.touched)  # type: ignore[assignment]


@pytest.fixture
def inspected(tiny_tokenizer: Any, data: InspectionData, tmp_path: Path) -> Inspect:
    def call(
        model: Any,
        adapter: Path,
        *,
        out: str = "out",
        data: InspectionData = data,
        recipe: Recipe = RECIPE,
        cmap: ConflictMap | None = None,
        selected: tuple[Unit, ...] | None = None,
    ) -> AdapterInspection:
        loaded = LoadedModel(model, tiny_tokenizer)
        subject = Given(adapter, recipe, model=loaded, of_model=cmap, touched=selected)
        return inspect_step(subject, data, tmp_path / out)

    return call


# -- effects, the slow and obvious way, in float64


def mean_loss(model: Any, tokenizer: Any, examples: Sequence[Example]) -> Tensor:
    """NLL a reply token of an example, mean over examples; one unpadded sequence at a time."""
    losses = []
    for example in examples:
        prompt = tokenizer.apply_chat_template(example.messages(), add_generation_prompt=True)["input_ids"]
        assert example.right_reply is not None
        reply = tokenizer.encode(example.right_reply, add_special_tokens=False)
        if example.scoring != "letter":
            reply.append(tokenizer.convert_tokens_to_ids("<|im_end|>"))
        log_probs = model(torch.tensor([prompt + reply])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        losses.append(-log_probs[range(len(reply)), reply].mean())
    return torch.stack(losses).mean()


class DoubleNorm(nn.Module):
    """RMSNorm without transformers' detour through float32, whose rounding a small step would see."""

    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.weight, self.epsilon = norm.weight, norm.variance_epsilon

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.epsilon)


def in_float64(model: Any) -> Any:
    for path, module in list(model.named_modules()):
        if type(module).__name__.endswith("RMSNorm"):
            model.set_submodule(path, DoubleNorm(module))
    return model.double()


def slope_by_autograd(model: Any, tokenizer: Any, examples: Sequence[Example], changes: dict[str, Tensor]) -> float:
    """The same derivative, by how far along the changes the weights are."""
    how_far = torch.zeros((), dtype=torch.float64, requires_grad=True)
    weights = {f"{path}.weight": model.get_submodule(path).weight for path in changes}
    moved = {
        name: weight.detach() + (how_far * change).to(weight)
        for (name, weight), change in zip(weights.items(), changes.values(), strict=True)
    }

    def moved_model(ids: Tensor) -> Any:
        return torch.func.functional_call(model, moved, (ids,))

    [found] = torch.autograd.grad(mean_loss(moved_model, tokenizer, examples), how_far)
    return float(found)


@torch.no_grad()
def slope(model: Any, tokenizer: Any, examples: Sequence[Example], changes: dict[str, Tensor]) -> float:
    """Derivative of the mean loss along changes of weights, by a central difference."""
    step, ends = 1e-4, []
    for sign in (1, -1):
        for path, change in changes.items():
            model.get_submodule(path).weight += sign * step * change
        ends.append(float(mean_loss(model, tokenizer, examples)))
        for path, change in changes.items():
            model.get_submodule(path).weight -= sign * step * change
    return (ends[0] - ends[1]) / (2 * step)


def by_hand(adapter: Path, path: str, scaling: float, *, transposed: bool = False) -> Tensor:
    tensors = load_file(adapter / WEIGHTS)
    a, b = (tensors[f"base_model.model.{path}.lora_{part}.weight"].double() for part in "AB")
    product = scaling * b @ a
    return product.T if transposed else product


# Of each family the unit, the projections it is in, and which rows (0) or columns (1) of them, as a linear layer has them.
UNITS_BY_HAND: dict[str, list[tuple[Unit, dict[str, tuple[int, slice]]]]] = {
    "llama": [
        (Unit.head(1, 2), {"model.layers.1.self_attn.q_proj": (0, slice(16, 24))}),
        (Unit("k_group", 0, 1), {"model.layers.0.self_attn.k_proj": (0, slice(8, 16))}),
        (Unit("v_group", 2, 0), {"model.layers.2.self_attn.v_proj": (0, slice(0, 8))}),
        (Unit("o_head", 1, 3), {"model.layers.1.self_attn.o_proj": (1, slice(24, 32))}),
        (Unit("mlp_block", 0, 0), {f"model.layers.0.mlp.{name}_proj": (0, slice(None)) for name in ("gate", "up", "down")}),
    ],
    "gpt2": [
        (Unit.head(1, 3), {"transformer.h.1.attn.c_attn": (0, slice(24, 32))}),
        (Unit("v_group", 0, 1), {"transformer.h.0.attn.c_attn": (0, slice(72, 80))}),
        (Unit("o_head", 2, 0), {"transformer.h.2.attn.c_proj": (1, slice(0, 8))}),
    ],
}  # fmt: skip


@pytest.mark.parametrize("family", UNITS_BY_HAND)
def test_effects_are_the_derivatives_of_the_losses(
    tiny_model: TinyModel, tiny_tokenizer: Any, source: Source, inspected: Inspect, data: InspectionData, family: str
) -> None:
    is_gpt2 = family == "gpt2"
    names = {"target_modules": ["c_attn", "c_proj", "c_fc"], "r": 8, "lora_alpha": 4} if is_gpt2 else ALL_LINEAR
    model, adapter = in_float64(tiny_model(family)), source(family, **names)
    found = inspected(model, adapter)
    rows = {one: row for row, one in enumerate(found.units)}
    for one, parts in UNITS_BY_HAND[family]:
        changes = {}
        for path, (axis, at) in parts.items():
            whole = by_hand(adapter, path, 4 / 8)
            change = torch.zeros_like(whole)
            kept = (at,) if axis == 0 else (slice(None), at)
            change[kept] = whole[kept]
            changes[path] = change.T if is_gpt2 else change
        for objective, examples in data.examples.items():
            expected = slope(model, tiny_tokenizer, examples, changes)
            assert abs(expected) > 1e-4, "worth comparing"
            assert found.effect(objective)[rows[one]] == pytest.approx(expected, abs=1e-6), (one, objective)
        norm = float(torch.stack([change.norm() for change in changes.values()]).norm())
        assert found.column("norm")[rows[one]] == pytest.approx(norm, rel=1e-6)


ADAPTED = {
    "llama": "all-linear",
    "phi3": "all-linear",
    "gpt2": ["c_attn", "c_proj", "c_fc"],
    "falcon": "all-linear",
    "qwen3_moe": ["q_proj", "k_proj", "o_proj"],
    "deepseek_v3": ["q_b_proj", "o_proj", "kv_b_proj"],
}


@pytest.mark.parametrize("family", ADAPTED)
def test_effects_of_all_units_add_up_to_the_slope_along_the_adapter(
    tiny_model: TinyModel, tiny_tokenizer: Any, source: Source, inspected: Inspect, data: InspectionData, family: str
) -> None:
    adapter = source(family, **{**ALL_LINEAR, "target_modules": ADAPTED[family]})
    # Experts are computed in float32 at most.
    is_moe = family in ("qwen3_moe", "deepseek_v3")
    model, tolerance = (tiny_model(family), 1e-5) if is_moe else (in_float64(tiny_model(family)), 1e-6)
    found = inspected(model, adapter)
    modules = dict(model.named_modules())
    paths = {name.split(".lora_")[0].removeprefix("base_model.model.") for name in load_file(adapter / WEIGHTS)}
    transposed = {path: type(modules[path]).__name__ == "Conv1D" for path in paths}
    whole = {path: by_hand(adapter, path, 4 / 8, transposed=transposed[path]) for path in paths}
    covered = {path: change for path, change in whole.items() if path not in found.metadata["uncovered"]}
    # Keys and values of deepseek_v3 are compressed: no unit owns rows of the projection that expands them.
    assert set(found.metadata["uncovered"]) == {path for path in paths if path.endswith("kv_b_proj")}
    for objective, examples in data.examples.items():
        record = found.metadata["whole"][objective]
        assert record["covered"] == pytest.approx(found.effect(objective).sum(), abs=1e-12)
        for name, changes in (("covered", covered), ("first_order", whole)):
            expected = slope_by_autograd(model, tiny_tokenizer, examples, changes)
            assert abs(expected) > 20 * tolerance, "worth comparing"
            assert record[name] == pytest.approx(expected, abs=tolerance)


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["q_proj", "down_proj"], "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"down_proj": 3}},
        {"target_modules": ["q_proj"], "use_rslora": True},
        {"target_modules": ["q_proj", "o_proj"], "use_dora": True},
    ],
    ids=["patterns", "rank-stabilised", "DoRA"],
)
def test_exact_changes_are_those_of_the_merged_model(
    tiny_model: TinyModel, tiny_tokenizer: Any, source: Source, inspected: Inspect, data: InspectionData, settings: dict[str, Any]
) -> None:  # fmt: skip
    from peft import PeftModel

    adapter, base = source(**settings), tiny_model("llama")
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    found = inspected(base, adapter)
    assert all(torch.equal(tensor, before[name]) for name, tensor in base.state_dict().items())
    merged = PeftModel.from_pretrained(tiny_model("llama"), adapter).merge_and_unload()
    with torch.no_grad():
        for objective, examples in data.examples.items():
            ends = [float(mean_loss(model, tiny_tokenizer, examples)) for model in (base, merged)]
            record = found.metadata["whole"][objective]
            assert record["exact"] == pytest.approx(ends[1] - ends[0], abs=1e-5)
            assert record["exact_se"] > 0


def test_a_small_update_does_what_its_first_order_says(
    tiny_model: TinyModel, source: Source, inspected: Inspect
) -> None:
    found = inspected(in_float64(tiny_model("llama")), source(**{**ALL_LINEAR, "lora_alpha": 0.01}))
    for record in found.metadata["whole"].values():
        assert record["first_order"] == pytest.approx(record["exact"], rel=0.05)


def test_standard_errors_shrink_with_examples_that_say_the_same(
    tiny_model: TinyModel, source: Source, inspected: Inspect, data: InspectionData
) -> None:
    same = dataclasses.replace(data, examples={"safety": data.examples["safety"][:1] * 6})
    model, adapter = tiny_model("llama"), source(target_modules=["q_proj"])
    alike, other = inspected(model, adapter, data=same), inspected(model, adapter, out="other")
    assert alike.column("safety_effect_se").max() < 1e-6 < other.column("safety_effect_se").min()
    # What was not asked for is empty, not zero.
    assert np.isnan(alike.column("utility_effect")).all()


def test_passes_over_the_projections_measure_the_same(
    tiny_model: TinyModel, source: Source, inspected: Inspect
) -> None:
    model, adapter = tiny_model("llama"), source(**ALL_LINEAR)
    whole = inspected(model, adapter)
    # A projection a pass.
    passes = inspected(model, adapter, out="passes", recipe=recipe(gradient_memory=1e-9))
    for column in OBJECTIVES.values():
        np.testing.assert_allclose(passes.column(column), whole.column(column), rtol=1e-5, atol=1e-9)


# -- sizes


def test_sizes_and_spectra_are_those_of_the_slices(tiny_model: TinyModel, source: Source, inspected: Inspect) -> None:
    model, adapter = tiny_model("llama"), source(**ALL_LINEAR)
    found = inspected(model, adapter)
    layout, _ = UnitLayout.locatable(model, HeadLayout.of(model))
    for row, one in enumerate(found.units):
        blocks = [part.of(by_hand(adapter, part.path, 4 / 8)) for part in layout.parts(one)]
        values = torch.linalg.svdvals(torch.block_diag(*blocks))
        share = values / values.sum()
        expected = {
            "norm": values.norm(),
            "effective_rank": (-(share * share.clamp_min(1e-300).log()).sum()).exp(),
            "top_share": values.max() ** 2 / (values**2).sum(),
            "relative_norm": values.norm() / torch.stack([part.of(model.get_submodule(part.path).weight).norm() for part in layout.parts(one)]).norm(),
        }  # fmt: skip
        for name, value in expected.items():
            assert found.column(name)[row] == pytest.approx(float(value), rel=1e-5), (one, name)
    assert found.kinds == ["q_head", "k_group", "v_group", "o_head", "mlp_block"]


def test_only_kinds_that_are_changed_are_listed(tiny_model: TinyModel, source: Source, inspected: Inspect) -> None:
    found = inspected(tiny_model("llama"), source(target_modules=["q_proj"], layers_to_transform=[1]))
    assert found.kinds == ["q_head"]
    assert len(found) == 12
    assert np.flatnonzero(found.column("norm")).tolist() == [4, 5, 6, 7]
    assert np.isnan(found.column("effective_rank")[:4]).all()


# -- findings


def said(found: AdapterInspection) -> dict[str, str]:
    return {one["what"]: one["said"] for one in found.metadata["odd"]}


def test_heads_that_the_training_was_not_to_touch(tiny_model: TinyModel, source: Source, inspected: Inspect) -> None:
    adapter = source(target_modules=["q_proj"])
    found = inspected(tiny_model("llama"), adapter, selected=joined([(0, 1), (2, 3)]))
    [finding] = [one for one in found.metadata["odd"] if one["what"] == "outside"]
    assert len(finding["where"]) == 10
    assert finding["said"].startswith("10 units outside the selection changed: q_head 0.0, q_head 0.2")
    assert sum(found.table["selected"].to_pylist()) == 2
    assert "outside" not in said(inspected(tiny_model("llama"), adapter, out="unknown"))


def test_what_else_is_odd(tiny_model: TinyModel, source: Source, inspected: Inspect) -> None:
    adapter = source(target_modules=["q_proj", "lm_head"], modules_to_save=["model.norm"])
    tensors = load_file(adapter / WEIGHTS)
    names = {part: f"base_model.model.model.layers.0.self_attn.q_proj.lora_{part}.weight" for part in "AB"}
    tensors[names["B"]] *= 0
    one = f"base_model.model.model.layers.1.self_attn.q_proj.lora_{'B'}.weight"
    tensors[one][:, 1:] = 0
    tensors["_orig_mod.x.lora_A.weight"] = torch.ones(1, 1)
    save_file(tensors, adapter / WEIGHTS)
    (adapter / "certificate.json").write_text("{}")
    with pytest.raises(CastuneError, match="certificate"):
        inspected(tiny_model("llama"), adapter)
    (adapter / "certificate.json").unlink()
    found = inspected(tiny_model("llama"), adapter)
    odd = said(found)
    assert odd["not-loaded"].startswith("1 tensor would not be loaded by PEFT")
    assert odd["zero"] == "1 adapted module of 4 have an update of exactly zero: model.layers.0.self_attn.q_proj"
    assert odd["dominated"].startswith("one direction holds 90 % or more of the update in 4 of 8 units: q_head 1.")
    assert odd["embeddings"] == "input embeddings or output head are trained: lm_head"
    assert "LlamaRMSNorm (model.norm)" in odd["other"]
    assert odd["no-unit"] == "1 adapted module has parts that belong to no unit: lm_head"
    assert all(record["exact"] is None for record in found.metadata["whole"].values()), "PEFT would leave the norm in"
    assert json.dumps(found.to_json(), allow_nan=False)


def test_an_adapter_of_which_nothing_is_loaded(tiny_model: TinyModel, source: Source, inspected: Inspect) -> None:
    adapter = source(target_modules=["q_proj"])
    tensors = load_file(adapter / WEIGHTS)
    save_file({name.removeprefix("base_model."): tensor for name, tensor in tensors.items()}, adapter / WEIGHTS)
    found = inspected(tiny_model("llama"), adapter)
    assert len(found) == 0
    assert "the model is the base model" in said(found)["zero"]
    assert AdapterInspection.load(adapter.parent / "out") == found


# -- the map, the files, what is there


def test_a_map_is_laid_over_it(
    tiny_model: TinyModel, tiny_tokenizer: Any, source: Source, inspected: Inspect, data: InspectionData
) -> None:
    model = tiny_model("llama")
    config = recipe(measure="margin", max_new_tokens=2).diagnose
    cmap: ConflictMap = diagnose(
        model, tiny_tokenizer, safety=data.examples["safety"], utility=data.examples["utility"], config=config
    )
    found = inspected(model, source(target_modules=["q_proj", "v_proj"]), cmap=cmap)
    heads = [row for row, one in enumerate(found.units) if one.is_head]
    assert found.has_map
    assert found.column("conflict_score")[heads].tolist() == cmap.column("conflict_score").tolist()
    assert np.isnan(np.delete(found.column("conflict_score"), heads)).all()


def test_what_is_there_is_taken_and_what_is_not_the_same_is_measured_again(
    tiny_model: TinyModel, source: Source, inspected: Inspect, tmp_path: Path, data: InspectionData
) -> None:
    model, adapter = tiny_model("llama"), source(target_modules=["q_proj"])
    found = inspected(model, adapter)
    assert inspected(model, adapter).metadata["provenance"]["date"] == found.metadata["provenance"]["date"]
    assert AdapterInspection.load(tmp_path / "out") == found
    lines = (tmp_path / "out" / "inspection.csv").read_text().splitlines()
    assert lines[0].replace('"', "").split(",") == SCHEMA.names
    assert len(lines) == 1 + len(found)
    for changes in (
        {"selected": joined([(0, 0)])},
        {"recipe": recipe(gradient_chunks=3)},
        {"data": dataclasses.replace(data, examples={"safety": data.examples["safety"][:3]})},
    ):
        assert inspected(model, adapter, **changes) != found


def test_a_damaged_table_is_told(tiny_model: TinyModel, source: Source, inspected: Inspect, tmp_path: Path) -> None:
    found = inspected(tiny_model("llama"), source(target_modules=["q_proj"]))
    path = tmp_path / "out" / "inspection.parquet"
    whole, told = path.read_bytes(), []
    for place in range(8, len(whole), len(whole) // 40):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x10]) + whole[place + 1 :])
        try:
            # Some bytes of a Parquet file say nothing that others do not say.
            assert AdapterInspection.load(tmp_path / "out") == found
        except ArtifactError as error:
            told.append(str(error))
    assert len(told) > 20
    assert all("inspection.parquet: " in one for one in told)
    with pytest.raises(ArtifactError, match="no such inspection"):
        AdapterInspection.load(tmp_path / "nowhere")


def test_what_lies_beside_an_adapter(tiny_model: TinyModel, source: Source, tmp_path: Path) -> None:
    adapter = source(target_modules=["q_proj"])
    subject = Subject(adapter, RECIPE)
    assert subject.selected is None
    assert (subject.name, str(subject.inspection)) == ("source", "inspection-source")
    selection = HeadSelection.custom([(0, 1)], n_total=12, model_fingerprint=fingerprint(tiny_model("llama")))
    selection.save(adapter.parent)
    assert subject.selected == (Unit.head(0, 1),)
    arm = Subject(tmp_path / "arms" / "all" / "adapter", RECIPE, RunDirectory(tmp_path))
    assert (arm.name, arm.inspection) == ("all", tmp_path / "inspection" / "all")


def test_an_adapter_is_called_by_the_arm_that_has_it_not_by_one_it_is_compared_with(
    tiny_model: TinyModel, tmp_path: Path
) -> None:
    selection = HeadSelection.custom([(0, 1)], n_total=12, model_fingerprint=fingerprint(tiny_model("llama")))
    run = RunDirectory(tmp_path / "run")
    for place in (run.path, run.path / "arms" / "beside"):
        selection.save(place)
    main = run.arm(None).name
    assert Subject(run.path / "adapter", RECIPE, run).name == main, "not the name of the run"
    assert Subject(run.path / "adapter", RECIPE, run, "beside").name == main
    assert Subject(run.path / "arms" / ".." / "arms" / "beside" / "adapter", RECIPE, run, main).name == "beside"
    assert Subject(tmp_path / "foreign" / "adapter", RECIPE, run, "beside").name == "foreign"
    assert Subject(tmp_path / "foreign", RECIPE, run, "beside").inspection == run.path / "inspection" / "foreign"


def test_the_sets_of_a_recipe() -> None:
    one = recipe()
    found = InspectionData.of(one, {}, None)
    assert found.sources == {
        "safety": "starter-safety",
        "utility": "starter-utility",
        "over-refusal": "starter-borderline",
    }
    assert {name: len(examples) for name, examples in found.examples.items()} == dict.fromkeys(OBJECTIVES, 64)
    found = InspectionData.of(one, {"utility": "starter-solutions-eval"}, 5)
    assert found.sources["utility"] == "starter-solutions-eval"
    assert {len(examples) for examples in found.examples.values()} == {5}
    domains = {"facts": "starter-utility", "harmless": {"source": "starter-borderline", "limit": 3}}
    found = InspectionData.of(
        Recipe.of(model="tiny", out="unused", utility=domains, diagnose={"reply_domains": ["harmless"]}), {}, None
    )
    assert (found.sources["utility"], len(found.examples["over-refusal"])) == ("starter-utility", 3)


@pytest.mark.parametrize("factor", [1e18, 1e30])
def test_values_that_are_too_large_to_compute_with_are_told(
    tiny_model: TinyModel, source: Source, inspected: Inspect, tmp_path: Path, factor: float
) -> None:
    adapter = source(**ALL_LINEAR)
    save_file({name: factor * one for name, one in load_file(adapter / WEIGHTS).items()}, adapter / WEIGHTS)
    with pytest.raises(CastuneError, match="its effect on losses is no finite number"):
        inspected(tiny_model("llama"), adapter)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", OBJECTIVES)
def test_examples_without_anything_to_score_are_told_with_their_source(tmp_path: Path, name: str) -> None:
    rows = tmp_path / "bare.jsonl"
    rows.write_text('{"id": "b0", "prompt": "How do I cook rice?"}\n', encoding="utf-8")
    with pytest.raises(
        CastuneError, match=f"{name} data {rows}: example 'b0' has no reply .* columns needed: prompt, "
    ):
        InspectionData.of(RECIPE, {name: str(rows)}, 2)


def test_a_quantised_base_is_refused(tiny_model: TinyModel, source: Source, inspected: Inspect) -> None:
    model, adapter = tiny_model("llama"), source(target_modules=["q_proj"])
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.to(torch.int8), requires_grad=False)
    with pytest.raises(CastuneError, match="quantised"):
        inspected(model, adapter)
