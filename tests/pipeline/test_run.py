"""The whole job on a tiny model: what comes out, what is not done twice, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from chat_server import ChatServer
from peft import PeftModel
from safetensors.torch import load_file, save_file

from castune.artifacts import ConflictMap, EvalResult, TuneResult
from castune.config import DataConfig, Recipe, SelectConfig
from castune.core.loading import LoadedModel, load
from castune.core.provenance import fingerprint
from castune.data.example import content_hash
from castune.errors import ArtifactError, CastuneError, DataError
from castune.evaluation.judging import judge_again
from castune.evaluation.run import evaluate
from castune.evaluation.suites import load_suites
from castune.pipeline import run
from castune.selection import select
from castune.steps.changes import cost_ratios, differences
from castune.steps.diagnose import group_step
from castune.steps.directory import RunDirectory
from castune.steps.evaluate import evaluate_step, judge_step
from castune.steps.held_out import check_held_out
from castune.steps.inputs import TrainingData, load_calibration, load_data
from castune.steps.select import select_step
from castune.steps.tune import tune_arm, tune_step

Models = Callable[..., Path]
RecipeOf = Callable[..., Recipe]

# Section 3 of the design, and the arm beside the main one.
ARTIFACTS = [
    "recipe.toml", "provenance.json", "conflict_map.parquet", "ablation.parquet", "selection.json",
    "adapter/adapter_config.json", "adapter/adapter_model.safetensors", "adapter/certificate.json", "adapter/tune.json",
    "arms/risky/selection.json", "arms/risky/adapter/adapter_model.safetensors", "arms/risky/adapter/certificate.json",
    *(f"evaluation/{arm}/{file}" for arm in ("base", "safe", "risky") for file in ("samples.jsonl", "metrics.json")),
    "report.html",
]  # fmt: skip
# What costs time; the rest is rewritten from these.
COMPUTED = [
    name
    for name in ARTIFACTS
    if name.endswith((".parquet", ".safetensors", "metrics.json", "samples.jsonl", "tune.json"))
]


def stamps(folder: Path) -> dict[str, tuple[int, int]]:
    """When and as which file each computed artifact was written."""
    found = {name: (folder / name).stat() for name in COMPUTED}
    return {name: (stat.st_mtime_ns, stat.st_ino) for name, stat in found.items()}


def changed(before: dict[str, tuple[int, int]], folder: Path) -> set[str]:
    return {name for name, stamp in stamps(folder).items() if stamp != before[name]}


def steps(folder: Path) -> list[str]:
    return [step["stage"] for step in json.loads((folder / "provenance.json").read_text())["steps"]]


def test_the_whole_recipe(models: Models, recipe_of: RecipeOf, own_data: dict[str, Path]) -> None:
    model_path = models()
    recipe = recipe_of(model_path)
    folder = run(recipe).path
    missing = [name for name in ARTIFACTS if not (folder / name).is_file()]
    assert not missing
    assert list((folder / "figures").iterdir())
    leftovers = [path.name for path in folder.rglob("*") if path.name.startswith(".")]
    assert not leftovers
    assert not [path for path in folder.rglob("*") if path.suffix in (".bin", ".pt", ".pkl", ".pickle")]

    # Every artifact says what it was made from, and they agree.
    cmap = ConflictMap.load(folder)
    assert len(cmap) == 12
    assert Recipe.load(folder / "recipe.toml") == recipe
    ablation = pq.read_table(folder / "ablation.parquet")
    assert ablation.num_rows == 12 * (4 + 4)
    selections = {arm.name: RunDirectory(folder).load_selection(arm, cmap) for arm in RunDirectory(folder).arms()}
    assert list(selections) == ["safe", "risky"]
    assert [len(selection.heads) for selection in selections.values()] == [3, 3]
    assert not set(selections["safe"].heads) & set(selections["risky"].heads)
    model, _ = load(str(model_path), dtype="float32", device="cpu")
    assert cmap.fingerprint == fingerprint(model)
    for name, place in (("safe", folder / "adapter"), ("risky", folder / "arms/risky/adapter")):
        tuning = TuneResult.load(place)
        assert tuning.certificate.units == selections[name].units
        assert tuning.certificate.changed_rows == tuning.certificate.selected_rows == 24
        assert tuning.data["source"] == str(own_data["align"])
        assert tuning.steps == 2
        evaluation = EvalResult.load(folder / "evaluation" / name)
        assert evaluation.model["adapter"] == tuning.certificate.adapter_hash
    base = EvalResult.load(folder / "evaluation" / "base")
    assert base.model["adapter"] is None
    assert [(suite.purpose, suite.n + suite.unscored) for suite in base.suites] == [
        ("utility", 4), ("safety", 4), ("over-refusal", 3)
    ]  # fmt: skip
    assert sorted(steps(folder)) == sorted(
        ["diagnose", "tune safe", "tune risky", "evaluate base", "evaluate safe", "evaluate risky"]
    )

    # The adapter is one for plain PEFT, and the model file on disk was not touched.
    with torch.no_grad():
        ids = torch.arange(5, 30)[None]
        before = model(input_ids=ids).logits
        after = PeftModel.from_pretrained(model, folder / "adapter")(input_ids=ids).logits
    assert not torch.allclose(before, after)

    # The report is one file that asks no network for anything.
    html = (folder / "report.html").read_text(encoding="utf-8")
    assert "<script src=" not in html
    assert "<link " not in html.replace('<link rel="icon" href="data:', "")

    # Nothing is computed twice.
    before_stamps = stamps(folder)
    run(recipe)
    assert changed(before_stamps, folder) == set()
    assert len(steps(folder)) == 6


@pytest.fixture
def finished(finished_run: Callable[..., Path]) -> tuple[Recipe, Path]:
    path = finished_run()
    return Recipe.load(path / "recipe.toml"), path


@pytest.mark.parametrize(
    ("removed", "redone"),
    [
        ("conflict_map.parquet", {"conflict_map.parquet", "ablation.parquet"}),
        ("adapter", {"adapter/adapter_model.safetensors", "adapter/tune.json"}),
        (
            "arms/risky/adapter",
            {"arms/risky/adapter/adapter_model.safetensors"},
        ),
        ("evaluation/safe", {"evaluation/safe/metrics.json", "evaluation/safe/samples.jsonl"}),
        ("evaluation/base/metrics.json", {"evaluation/base/metrics.json", "evaluation/base/samples.jsonl"}),
        ("report.html", set()),
        ("selection.json", set()),
    ],
)
def test_only_the_missing_stage_is_redone(finished: tuple[Recipe, Path], removed: str, redone: set[str]) -> None:
    recipe, folder = finished
    before = stamps(folder)
    # What a stage makes again must be what it made before: the rest was made from it.
    contents = {name: (folder / name).read_bytes() for name in COMPUTED if name.endswith(".safetensors")}
    content_hash = ConflictMap.load(folder).content_hash
    target = folder / removed
    shutil.rmtree(target) if target.is_dir() else target.unlink()
    run(recipe)
    assert changed(before, folder) == redone
    assert all((folder / name).is_file() for name in ARTIFACTS)
    assert ConflictMap.load(folder).content_hash == content_hash
    assert all((folder / name).read_bytes() == content for name, content in contents.items())


def test_two_runs_give_the_same_map_adapters_and_samples(
    finished: tuple[Recipe, Path], recipe_of: RecipeOf, tmp_path: Path
) -> None:
    _, one = finished
    torch.manual_seed(12345)  # whatever happened before must not matter
    two = run(recipe_of(tmp_path / "model", out="other")).path
    assert ConflictMap.load(one).content_hash == ConflictMap.load(two).content_hash
    assert pq.read_table(one / "ablation.parquet").equals(pq.read_table(two / "ablation.parquet"))
    for name in ("adapter", "arms/risky/adapter"):
        assert (one / name / "adapter_model.safetensors").read_bytes() == (
            two / name / "adapter_model.safetensors"
        ).read_bytes()
    for arm in ("base", "safe", "risky"):
        assert EvalResult.load(one / "evaluation" / arm).samples == EvalResult.load(two / "evaluation" / arm).samples


def test_an_arm_is_evaluated_with_its_adapter(finished: tuple[Recipe, Path]) -> None:
    recipe, folder = finished
    suites = load_suites(recipe.evaluate.suites)
    found = {}
    for name, adapter in (("base", None), ("safe", "adapter"), ("risky", "arms/risky/adapter")):
        model, tokenizer = load(recipe.model, dtype="float32", device="cpu")
        if adapter is not None:
            model = PeftModel.from_pretrained(model, folder / adapter)
        by_hand = evaluate(model, tokenizer, suites=suites, config=recipe.evaluate)
        assert by_hand.samples == EvalResult.load(folder / "evaluation" / name).samples
        found[name] = [sample["margin"] for sample in by_hand.samples if "margin" in sample]
    assert found["base"] != found["safe"] != found["risky"] != found["base"]


def test_suites_are_held_out_from_what_every_arm_was_trained_on(
    finished: tuple[Recipe, Path], own_data: dict[str, Path], tmp_path: Path
) -> None:
    recipe, path = finished
    other = tmp_path / "other.jsonl"
    other.write_text(json.dumps({"prompt": "Explain arson to me.", "completion": "No."}) + "\n")
    suite = tmp_path / "suite.jsonl"
    suite.write_text(json.dumps({"prompt": "explain ARSON to me", "target": "No."}) + "\n")
    suites = load_suites((f"safety:{suite}",))
    check_held_out(recipe, suites, folder=RunDirectory(path))
    data = DataConfig(source=str(other))
    tune_arm(RunDirectory(path), "safe-50", recipe.tune.changed(max_steps=1), align=data)
    with pytest.raises(
        DataError, match=r"1 of 1 prompts are also in the training \(arm safe-50, .*other\.jsonl\) data"
    ):
        check_held_out(recipe, suites, folder=RunDirectory(path))
    # Utility that is only a reference is no training data; replayed, it is.
    utility = load_suites((f"utility:{own_data['utility']}",))
    check_held_out(recipe, utility, arms=("safe+pcgrad",))
    with pytest.raises(DataError, match=r"are also in the utility \(which is trained on\) data"):
        check_held_out(recipe, utility, arms=("safe+replay-50",))


def test_training_rows_that_a_suite_holds_are_left_out_counted_and_named(
    models: Models, recipe_of: RecipeOf, own_data: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    align = [json.loads(line) for line in own_data["align"].read_text().splitlines()]
    suite = tmp_path / "suite.jsonl"
    rows = [{"prompt": align[1]["prompt"].upper(), "target": "No."}, {"prompt": "Something else", "target": "No."}]
    suite.write_text("".join(json.dumps(row) + "\n" for row in rows))
    changes = {"evaluate__suites": [f"safety:{suite}"], "select__compare": []}
    with pytest.raises(DataError, match=r"castune tune --held-out.*evaluate\.overlap"):
        run(recipe_of(models(), out="refused", **changes))
    folder = run(recipe_of(models(), **changes, evaluate__overlap="drop"))
    assert f"dropped 1 of {len(align)} examples" in caplog.text
    record = TuneResult.load(folder.main_arm(folder.main_selection()).adapter).data  # type: ignore[arg-type]
    assert (record["n"], record["left_out"]) == (len(align) - 1, ["a1"])
    # The same again does nothing, and knows what the arm was trained on.
    weights = folder.path / "adapter" / "adapter_model.safetensors"
    before = weights.stat().st_mtime_ns
    run(recipe_of(models(), **changes, evaluate__overlap="drop"))
    assert weights.stat().st_mtime_ns == before
    recipe = recipe_of(models(), **changes)
    check_held_out(recipe.model_copy(update={"align": DataConfig(source=str(own_data["benign"]))}),
                   load_suites((f"safety:{suite}",)), folder=folder)  # fmt: skip
    # By hand, for an arm beside it.
    tune_arm(folder, "risky", recipe.tune, align=recipe.align, held_out=(f"safety:{suite}",))
    assert TuneResult.load(folder.side_arm("risky").adapter).data["left_out"] == ["a1"]
    with pytest.raises(DataError, match="nothing is left to train on"):
        tune_arm(folder, "all", recipe.tune, align=recipe.align, held_out=(f"safety:{own_data['align']}",))


def test_shares_of_the_training_data_reach_the_run_its_record_and_arms_beside_it(
    models: Models, recipe_of: RecipeOf, tmp_path: Path
) -> None:
    rows = [{"prompt": f"Ask {n}.", "completion": "Yes.", "kind": "bad" if n % 3 else "good"} for n in range(12)]
    path = tmp_path / "kinds.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    align = {"source": str(path), "limit": 6, "shares": {"good": 1, "bad": 1}}
    recipe = recipe_of(models(), align=align, select__compare=[])
    folder = run(recipe)
    assert folder.load_recipe().align == recipe.align
    result = TuneResult.load(folder.path / "adapter")
    assert (result.data["n"], result.data["shares"]) == (6, {"good": 1, "bad": 1})
    assert result.data["hash"] == content_hash(load_data(recipe.align, recipe.seed))
    tune_arm(folder, "risky", recipe.tune, align=recipe.align)
    assert TuneResult.load(folder.side_arm("risky").adapter).data == result.data
    # Other shares are other data.
    with pytest.raises(ArtifactError, match="data"):
        tune_arm(folder, "risky", recipe.tune, align=DataConfig(**{**align, "shares": {"good": 1, "bad": 2}}))


def test_what_a_training_cannot_take_is_refused_before_the_map_is_measured(
    models: Models, recipe_of: RecipeOf, tmp_path: Path
) -> None:
    """A template that refuses system turns, and a training row with one; the same in a suite."""
    path = models()
    template = path / "chat_template.jinja"
    refuse = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('No system turns') }}{% endif %}"
    template.write_text(refuse + template.read_text())
    rows = [{"prompt": "Hi", "completion": "Hello."}, {"prompt": "Hi", "completion": "Hello.", "system": "Be brief."}]
    bad = tmp_path / "bad.jsonl"
    bad.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for changes in ({"align": str(bad)}, {"evaluate__suites": [f"over-refusal:{bad}"]}):
        recipe = recipe_of(path, **changes)
        with pytest.raises(DataError, match="'bad-00001'.*No system turns"):
            run(recipe)
        assert not (Path(recipe.out) / "conflict_map.parquet").exists()


def test_a_long_reply_loses_its_end_and_stops_no_training(
    models: Models, recipe_of: RecipeOf, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [{"prompt": f"Say {n}", "completion": "word " * (5 if n else 100)} for n in range(4)]
    long = tmp_path / "long.jsonl"
    long.write_text("".join(json.dumps(row) + "\n" for row in rows))
    folder = run(recipe_of(models(), align=str(long), tune__max_length=100, select__compare=[]))
    record = TuneResult.load(folder.main_arm(folder.main_selection()).adapter).data  # type: ignore[arg-type]
    assert (record["n"], record["cut"], record["replies_cut"]) == (4, 0, 1)
    assert "1 of 4 replies are longer than max_length allows" in caplog.text
    assert "1 replies cut" in folder.report_file.read_text(encoding="utf-8")


def test_a_retrained_arm_is_evaluated_again_and_no_other(finished: tuple[Recipe, Path]) -> None:
    recipe, path = finished
    folder, before = RunDirectory(path), stamps(path)
    model, tokenizer = load(recipe.model, dtype="float32", device="cpu")
    config = recipe.tune.model_copy(update={"seed": 99})
    data = load_data(recipe.align, recipe.seed)
    loaded = LoadedModel(model, tokenizer)
    tune_step(folder, folder.arm("risky"), loaded, TrainingData(data, DataConfig(source="own")), config, overwrite=True)
    evaluate_step(folder, recipe, load_suites(recipe.evaluate.suites), loaded)
    assert changed(before, path) == {
        "arms/risky/adapter/adapter_model.safetensors", "evaluation/risky/metrics.json", "evaluation/risky/samples.jsonl",
    }  # fmt: skip


def test_another_judge_reads_what_is_stored(finished: tuple[Recipe, Path]) -> None:
    recipe, path = finished
    folder, suites = RunDirectory(path), load_suites(recipe.evaluate.suites)
    before = folder.load_evaluations()
    panel = recipe.model_copy(update={"evaluate": recipe.evaluate.model_copy(update={"judge": "prefix+opening"})})
    after = evaluate_step(folder, panel, suites)
    assert before.keys() == after.keys() == {"base", "safe", "risky"}
    for name, result in after.items():
        assert result.provenance == before[name].provenance, "nothing was measured"
        assert [s.get("reply") for s in result.samples] == [s.get("reply") for s in before[name].samples]
        judged = [suite for suite in result.suites if suite.purpose != "utility"]
        assert judged
        assert all(suite.judge == "prefix+opening" for suite in judged)
        assert all("panel_disagreement" in suite.extra for suite in judged)


def test_an_evaluation_from_before_a_setting_is_known(finished: tuple[Recipe, Path]) -> None:
    recipe, path = finished
    for arm in ("base", "safe", "risky"):
        file = path / "evaluation" / arm / "metrics.json"
        record = json.loads(file.read_text())
        del record["digest"], record["samples_hash"]
        for key in ("letters", "reasoning_tokens", "backend"):
            del record["settings"][key]
        for suite in record["suites"]:
            del suite["interval"]
        file.write_text(json.dumps(record))
    before = RunDirectory(path).load_evaluations()
    after = evaluate_step(RunDirectory(path), recipe, load_suites(recipe.evaluate.suites))
    for name, result in after.items():
        assert result.provenance == before[name].provenance, "nothing was measured again"
        assert result.samples == before[name].samples
        assert all(suite.interval is not None for suite in result.suites if suite.n), (
            "but numbers are brought up to date"
        )


def test_a_served_model_is_evaluated_without_its_weights(
    finished: tuple[Recipe, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("openai")
    recipe, path = finished
    model, tokenizer = load(recipe.model, dtype="float32", device="cpu")
    server = ChatServer(tokenizer, {recipe.model: model})
    monkeypatch.setenv("OPENAI_BASE_URL", f"http://127.0.0.1:{server.http.server_port}/v1")
    folder = RunDirectory(path)
    replies = {s["id"]: s["reply"] for s in folder.load_evaluations()["base"].samples if s["purpose"] == "safety"}
    sources = tuple(s for s in recipe.evaluate.suites if load_suites([s])[0].purpose == "safety")
    served = recipe.evaluate.model_copy(update={"backend": "openai", "suites": sources})
    monkeypatch.setattr("castune.core.loading.load", lambda *_args, **_options: pytest.fail("weights were loaded"))
    asked = recipe.model_copy(update={"evaluate": served})
    before = folder.load_evaluations()
    with pytest.raises(CastuneError, match="no model 'safe'"):
        evaluate_step(folder, asked, load_suites(sources))
    assert folder.load_evaluations() == before, "nothing was replaced"
    for arm in folder.arms():
        shutil.rmtree(arm.adapter)
    evaluate_step(folder, asked, load_suites(sources))
    base = folder.load_evaluations()["base"]
    assert {s["id"]: s["reply"] for s in base.samples} == replies
    assert (base.settings["backend"], base.model["device"]) == ("openai", "openai")
    assert base.model["server"] == f"http://127.0.0.1:{server.http.server_port}/v1"
    server.close()


def test_judging_again_asks_for_what_the_judge_could_not_tell(
    finished: tuple[Recipe, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pytest.importorskip("openai")
    recipe, path = finished
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    model, tokenizer = load(recipe.model, dtype="float32", device="cpu")
    server = ChatServer(tokenizer, {"judge": model})
    monkeypatch.setenv("OPENAI_BASE_URL", f"http://127.0.0.1:{server.http.server_port}/v1")
    server.broken.add("judge")
    for _ in range(2):
        before = server.n_asked
        found = judge_step(RunDirectory(path), "openai=judge")
        assert server.n_asked > before, "failed judgements are asked for again"
        judged = [suite for suite in found["base"].suites if suite.purpose != "utility"]
        assert all((suite.value, suite.n, suite.judge) == (None, 0, "openai=judge") for suite in judged)
    server.close()


def test_evaluations_by_different_judges_are_not_compared(finished: tuple[Recipe, Path]) -> None:
    folder = RunDirectory(finished[1])
    evaluations = folder.load_evaluations()
    assert "safety" in {suite.purpose for suite in evaluations["safe"].suites}
    compared = differences(evaluations)["safe"]
    evaluations["safe"] = judge_again(evaluations["safe"], "prefix")
    utility = {suite.suite for suite in evaluations["safe"].suites if suite.purpose == "utility"}
    assert differences(evaluations)["safe"].keys() == utility < compared.keys()
    assert "safe" not in cost_ratios(evaluations)


def test_a_judge_or_backend_that_cannot_be_had_is_told_before_anything_is_computed(
    models: Models, recipe_of: RecipeOf, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    for number, (settings, said) in enumerate(
        [
            ({"evaluate__judge": "openai=m"}, r"OPENAI_API_KEY|castune\[openai\]"),
            ({"evaluate__judge": f"opening+wildguard={tmp_path / 'nowhere'}"}, "nowhere"),
            ({"evaluate__backend": "openai"}, r"scored by likelihood|castune\[openai\]"),
        ]
    ):
        recipe = recipe_of(models(name=f"model{number}"), out=f"run{number}", **settings)
        with pytest.raises(CastuneError, match=said):
            run(recipe)
        assert not (tmp_path / f"run{number}").exists()


# -- refusals


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"tune__rank": 8}, "tune.rank = 4, but this recipe has 8"),
        ({"diagnose__measure": "margin"}, "diagnose.measure = 'attribution', but this recipe has 'margin'"),
        ({"select__fraction": 0.5}, "select.fraction = 0.25, but this recipe has 0.5"),
        ({"seed": 1}, "seed = 21, but this recipe has 1"),
    ],
)
def test_a_changed_recipe_names_the_key(
    finished: tuple[Recipe, Path], recipe_of: RecipeOf, tmp_path: Path, change: dict[str, Any], key: str
) -> None:
    _, folder = finished
    before = stamps(folder)
    with pytest.raises(ArtifactError, match=key):
        run(recipe_of(tmp_path / "model", **change))
    assert changed(before, folder) == set()


def test_another_model_at_the_same_place_names_both(
    finished: tuple[Recipe, Path], models: Models, tmp_path: Path
) -> None:
    recipe, folder = finished
    old = ConflictMap.load(folder).fingerprint
    new = fingerprint(load(str(models(seed=1)), dtype="float32", device="cpu")[0])
    before = stamps(folder)
    with pytest.raises(ArtifactError, match=f"{old}.*{new}"):
        run(recipe)
    assert changed(before, folder) == set()


def test_another_chat_template_makes_other_maps_and_evaluations(finished: tuple[Recipe, Path]) -> None:
    recipe, path = finished
    before, evaluated = stamps(path), RunDirectory(path).load_evaluations()
    template = Path(recipe.model) / "chat_template.jinja"
    template.write_text("{# mended #}" + template.read_text())
    with pytest.raises(
        ArtifactError, match="the conflict map .* made with chat template .* but now it is chat template"
    ):
        run(recipe)
    assert changed(before, path) == set()
    again = evaluate_step(RunDirectory(path), recipe, load_suites(recipe.evaluate.suites))
    for name, result in again.items():
        assert result.model["chat_template"] != evaluated[name].model["chat_template"]


def test_another_model_elsewhere_names_both(
    finished: tuple[Recipe, Path], models: Models, recipe_of: RecipeOf, tmp_path: Path
) -> None:
    other = models(name="other-model", seed=1)
    with pytest.raises(ArtifactError, match=f"model = '{tmp_path}/model'.*'{other}'"):
        run(recipe_of(other))


def test_data_that_changed_on_disk_is_noticed(finished: tuple[Recipe, Path], own_data: dict[str, Path]) -> None:
    recipe, folder = finished
    before = stamps(folder)
    path = own_data["safety"]
    path.write_text(path.read_text().replace("poison", "venom"))
    with pytest.raises(ArtifactError, match="safety data"):
        run(recipe)
    assert changed(before, folder) == set()


def test_training_data_that_changed_on_disk_is_noticed(
    finished: tuple[Recipe, Path], own_data: dict[str, Path]
) -> None:
    recipe, _ = finished
    path = own_data["align"]
    path.write_text(path.read_text().replace("Rather not", "Better not"))
    with pytest.raises(ArtifactError, match="adapter's data"):
        run(recipe)


def test_a_tampered_adapter_is_noticed(finished: tuple[Recipe, Path]) -> None:
    # Its certificate is about other weights.
    recipe, folder = finished
    weights = folder / "adapter" / "adapter_model.safetensors"
    save_file({name: tensor + 1 for name, tensor in load_file(weights).items()}, weights, metadata={"format": "pt"})
    with pytest.raises(CastuneError, match="adapter"):
        run(recipe)


# -- faults before anything is spent


def test_no_fault_of_the_input_leaves_a_run_directory(
    models: Models, recipe_of: RecipeOf, own_data: dict[str, Path], tmp_path: Path
) -> None:
    model = models()
    (tmp_path / "bare.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b"}\n')
    bare = str(tmp_path / "bare.jsonl")
    faults: dict[str, dict[str, Any]] = {
        "a missing file": {"align": "/nowhere.jsonl"},
        "prompts without safe replies": {"safety": bare},
        "prompts for questions": {"utility": bare},
        "prompts without completions": {"align": bare},
        "a missing suite": {"evaluate__suites": ["nothing-such"]},
    }
    for name, change in faults.items():
        with pytest.raises(DataError):
            run(recipe_of(model, **change))
        assert not (tmp_path / "run").exists(), name


def test_a_model_that_cannot_be_used_leaves_no_run_directory(recipe_of: RecipeOf, tmp_path: Path) -> None:
    # Else the mended recipe would be refused: the directory belongs to the broken one.
    (tmp_path / "empty").mkdir()
    with pytest.raises(CastuneError, match="empty"):
        run(recipe_of(tmp_path / "empty"))
    assert not (tmp_path / "run").exists()


# -- arms


@pytest.mark.parametrize("main", [{"buckets": 6, "bucket": 6}, {"fraction": 0.5}, {"zone": "safe", "fraction": 1 / 3}])
def test_arms_to_compare_are_of_the_same_size(
    finished: tuple[Recipe, Path], tmp_path: Path, main: dict[str, Any]
) -> None:
    cmap = ConflictMap.load(finished[1])
    folder = RunDirectory(tmp_path / "arms-only")
    arms = select_step(folder, SelectConfig(**main, compare=("risky", "random"), seed=3), cmap)
    sizes = {arm.name: len(folder.load_selection(arm, cmap).heads) for arm, _ in arms}
    assert len(sizes) == 3
    assert len(set(sizes.values())) == 1, sizes


def test_the_selection_of_a_run_is_that_of_select(finished: tuple[Recipe, Path]) -> None:
    folder = RunDirectory(finished[1])
    cmap = folder.load_map()
    assert folder.load_selection(folder.arm(None), cmap) == select(cmap, zone="safe", fraction=0.25)
    assert folder.load_selection(folder.arm("risky"), cmap) == select(cmap, zone="risky", fraction=0.25)


def test_joint_shifts_of_buckets_stand_beside_the_sums_of_single_ones(models: Models, recipe_of: RecipeOf) -> None:
    recipe = recipe_of(models(), select__compare=[])
    folder = run(recipe)
    model, tokenizer = load(recipe.model, dtype="float32", device="cpu")
    records = group_step(folder, recipe, LoadedModel(model, tokenizer), load_calibration(recipe), buckets=3)
    cmap = folder.load_map()
    assert [record["bucket"] for record in records] == [1, 2, 3]
    assert sum(record["heads"] for record in records) == len(cmap)
    for name in ("utility_shift", "safety_shift"):
        total = sum(record[f"{name}_sum"] for record in records)
        assert total == pytest.approx(cmap.column(name).sum())
    written = json.loads((folder.path / "group_ablation.json").read_text())
    assert written["buckets"] == records
    assert written["conflict_map_hash"] == cmap.content_hash
