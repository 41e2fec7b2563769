"""`castune mask` and `castune export`: what is published is what was measured, and bad input leaves nothing behind."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import assert_one_error, castune
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_models import query_rows_mask
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from typer.testing import CliRunner

from castune.artifacts import Certificate, EvalResult, HeadSelection, MaskedAdapter, TuneResult
from castune.artifacts.unit import joined
from castune.cli import app
from castune.config import Recipe
from castune.core.heads import HeadLayout
from castune.errors import CastuneError
from castune.evaluation.run import evaluate
from castune.evaluation.suites import load_suites
from castune.pipeline import run
from castune.report.card import CardFacts, Merging, model_card
from castune.steps.export import export

Models = Callable[..., Path]
RecipeOf = Callable[..., Recipe]
IDS = torch.arange(5, 25)[None]


@pytest.fixture
def finished(finished_run: Callable[..., Path]) -> Path:
    """A run with a comparison arm, `risky`."""
    return finished_run()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def refused(*arguments: object) -> str:
    """What the command line refuses, in this process: a user error, of which `main` makes one line and exit code 2."""
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert isinstance(done.exception, CastuneError), done.exception
    assert "\n" not in str(done.exception)
    return str(done.exception)


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


# -- merged models


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3"])
def test_a_merged_model_is_base_and_adapter(models: Models, recipe_of: RecipeOf, tmp_path: Path, family: str) -> None:
    model = models(family)
    GenerationConfig(max_new_tokens=7, eos_token_id=257, pad_token_id=0, bos_token_id=256).save_pretrained(model)
    folder = run(recipe_of(model, select__compare=[], evaluate__suites=[str(tmp_path / "utility.jsonl")])).path
    done = castune("export", folder, "--merged", "--out", tmp_path / "merged", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "bit-identical to the base" in done.stdout

    base = AutoModelForCausalLM.from_pretrained(model)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert merged.dtype == base.dtype == torch.float32
    layout, selection = HeadLayout.of(base), HeadSelection.load(folder)
    layer_of = {f"{layout.at(layer).query_path}.weight": layer for layer in selection.layers}
    old = base.state_dict()
    for name, tensor in merged.state_dict().items():
        different = (tensor.view(torch.int32) != old[name].view(torch.int32)).any(int(not layout.at(0).transposed)) \
            if tensor.ndim == 2 else (tensor != old[name]).any()  # fmt: skip
        if name in layer_of:
            assert not different[~query_rows_mask(layout, selection, layer_of[name], len(different))].any()
            assert different.any()
        else:
            assert not different.any(), name
    # The same sums in another order: float32 on logits of order one.
    adapted = PeftModel.from_pretrained(base, folder / "adapter")
    torch.testing.assert_close(logits(merged), logits(adapted), rtol=1e-5, atol=1e-4)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert tokenizer.chat_template
    assert GenerationConfig.from_pretrained(tmp_path / "merged").max_new_tokens == 7
    modes = {path.stat().st_mode & 0o777 for path in (tmp_path / "merged").iterdir()}
    assert modes == {(tmp_path / "utility.jsonl").stat().st_mode & 0o777}, "as readable as any other file"
    assert str(tmp_path) not in (tmp_path / "merged" / "config.json").read_text()


def test_a_16_bit_base_stays_16_bit(models: Models, recipe_of: RecipeOf, tmp_path: Path) -> None:
    # The run computed in float32; the merged model is as the base is stored, so that no weight is widened.
    model = models(change=lambda model: model.to(torch.bfloat16))
    folder = run(recipe_of(model, select__compare=[], evaluate__suites=[str(tmp_path / "utility.jsonl")])).path
    done = export(folder, tmp_path / "merged", merged=True)
    assert done.merging is not None
    assert done.merging.dtype == "bfloat16"
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "merged").dtype == torch.bfloat16
    assert Certificate.load(tmp_path / "merged") == done.certificate
    assert (
        export(folder, tmp_path / "wide", merged=True, dtype="float32").certificate
        == TuneResult.load(folder / "adapter").certificate
    )


# -- adapters


@pytest.mark.parametrize(("made_in", "wanted"), [("float32", "float16"), ("bfloat16", "float16"), ("float16", "auto")])
def test_a_base_in_float16_is_known_again(
    models: Models, recipe_of: RecipeOf, tmp_path: Path, made_in: str, wanted: str
) -> None:
    model = models()
    recipe = recipe_of(model, dtype=made_in, select__compare=[], evaluate__suites=[str(tmp_path / "utility.jsonl")])
    folder = run(recipe).path
    done = export(folder, tmp_path / "merged", merged=True, dtype=wanted)
    dtype = torch.float16 if wanted == "float16" else torch.float32
    merged, base = (AutoModelForCausalLM.from_pretrained(path, dtype=dtype) for path in (done.path, model))
    assert AutoModelForCausalLM.from_pretrained(done.path).dtype == dtype
    changed = {name for name, tensor in merged.state_dict().items() if not torch.equal(tensor, base.state_dict()[name])}
    assert changed
    assert all(name.endswith("q_proj.weight") for name in changed)
    # The adapter alone knows it again, too; and another model is none.
    export(folder, tmp_path / "adapter")
    assert export(tmp_path / "adapter", tmp_path / "again", merged=True, dtype=wanted).merging is not None
    other = models(name="other", seed=5)
    with pytest.raises(CastuneError, match="was made for model"):
        export(folder, tmp_path / "none", merged=True, dtype=wanted, base=str(other))
    assert not (tmp_path / "none").exists()


def test_an_arm_is_exported_as_it_is(finished: Path, tmp_path: Path) -> None:
    done = castune("export", finished, "--arm", "risky", "--out", tmp_path / "out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    source = finished / "arms" / "risky" / "adapter"
    copied = {"adapter_config.json", "adapter_model.safetensors", "certificate.json", "tune.json"}
    assert files(tmp_path / "out") == copied | {"README.md"}
    assert all((tmp_path / "out" / name).read_bytes() == (source / name).read_bytes() for name in copied)
    # What was exported can be exported again: as a whole model, from the base it names.
    assert export(tmp_path / "out", tmp_path / "merged", merged=True).merging is not None


# -- masks on the command line


@pytest.fixture
def plain(tmp_path: Path, tiny_model: Callable[..., Any]) -> Callable[..., Path]:
    def make(name: str = "plain", seed: int = 3, **changes: Any) -> Path:
        config = LoraConfig(
            **{
                "r": 4,
                "target_modules": ["q_proj", "v_proj"],
                "init_lora_weights": False,
                "task_type": "CAUSAL_LM",
                **changes,
            }
        )
        torch.manual_seed(seed)
        get_peft_model(tiny_model("llama"), config).save_pretrained(tmp_path / name)
        return tmp_path / name

    return make


def test_a_mask_of_a_run(finished: Path, plain: Callable[..., Path], tmp_path: Path) -> None:
    done = castune("mask", plain(), "--run", finished, "--out", tmp_path / "out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "safe: 3 of 12 heads kept" in done.stdout
    assert re.search(r"dropped: .*3 v_proj", done.stdout)
    result = MaskedAdapter.load(tmp_path / "out")
    assert result.certificate.units == HeadSelection.load(finished).units
    assert result.dropped["v_proj"] == 3
    exported = castune(
        "export", tmp_path / "out", "--merged", "--base", tmp_path / "model", "--out", tmp_path / "m", cwd=tmp_path
    )
    assert exported.returncode == 0, exported.stderr
    card = (tmp_path / "m" / "README.md").read_text(encoding="utf-8")
    assert "| Zone | safe |" in card
    assert "| plain | " in card
    assert "3 of 12 attention heads" in card


def test_ties_of_all_heads_and_of_chosen_ones(finished: Path, plain: Callable[..., Path], tmp_path: Path) -> None:
    settings = ["--combination", "ties", "--weights", "1,0.5", "--density", "0.4"]
    two = [plain("one"), plain("two", seed=4)]
    for name, where in (
        ("safe", ["--run", finished]),
        ("all", ["--run", finished, "--arm", "all"]),
        ("base", ["--base", tmp_path / "model"]),
    ):
        done = CliRunner().invoke(
            app, [str(part) for part in ("mask", *two, *where, *settings, "--out", tmp_path / name)]
        )
        assert done.exit_code == 0, done.exception
    all_heads, safe = MaskedAdapter.load(tmp_path / "all"), MaskedAdapter.load(tmp_path / "safe")
    assert (all_heads.combination, all_heads.weights, all_heads.density) == ("ties", (1.0, 0.5), 0.4)
    assert (all_heads.certificate.selected_rows, safe.certificate.selected_rows) == (96, 24)
    assert (tmp_path / "all" / "adapter_model.safetensors").read_bytes() == (
        tmp_path / "base" / "adapter_model.safetensors"
    ).read_bytes()


def test_a_combination_stands_beside_the_trained_arms(
    finished: Path, plain: Callable[..., Path], tmp_path: Path
) -> None:
    ties = ["--combination", "ties", "--run", finished, "--as", "ties"]
    made = castune("mask", plain("one"), plain("two", seed=4), *ties, cwd=tmp_path)
    assert made.returncode == 0, made.stderr
    recipe = Recipe.load(finished / "recipe.toml").evaluate
    suites = ["--suites", ",".join(recipe.suites), "--max-new-tokens", recipe.max_new_tokens]
    for command in (["evaluate", finished, *suites], ["report", finished]):
        done = castune(*command, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    arm = finished / "arms" / "ties"
    masked = MaskedAdapter.load(arm / "adapter")
    assert HeadSelection.load(arm) == HeadSelection.load(finished)
    evaluation = EvalResult.load(finished / "evaluation" / "ties")
    assert evaluation.model["adapter"] == masked.certificate.adapter_hash

    # What was measured is the adapter that any user of PEFT would load.
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    by_hand = evaluate(
        PeftModel.from_pretrained(model, arm / "adapter"),
        tokenizer,
        suites=load_suites(recipe.suites, limit=None, seed=0),
        config=recipe,
        name="by hand",
    )
    assert by_hand.samples == evaluation.samples
    assert by_hand.samples != EvalResult.load(finished / "evaluation" / "base").samples

    # Stored replies are judged again without a model.
    before = (finished / "evaluation" / "ties" / "metrics.json").read_bytes()
    done = castune("judge", finished, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "ties" in done.stdout
    assert (finished / "evaluation" / "ties" / "metrics.json").read_bytes() == before
    assert_one_error(castune("judge", finished, "--judge", "oracle", cwd=tmp_path), "unknown judge 'oracle'", "prefix")

    report = (finished / "report.html").read_text(encoding="utf-8")
    assert "Made of other adapters, without training" in report
    assert "one × 1, two × 1" in report
    exported = export(finished, tmp_path / "out", arm="ties")
    assert exported.certificate == masked.certificate
    assert "## Evaluation" in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")

    again = castune("mask", plain("one"), plain("two"), *ties, cwd=tmp_path)
    assert_one_error(again, "exists already", "--overwrite")
    assert_one_error(castune("tune", finished, "--arm", "ties", cwd=tmp_path), "made from other adapters")
    for name, said in (
        ("safe", "already has an arm 'safe'"),
        ("base", "not a valid name"),
        ("../x", "not a valid name"),
    ):
        done = castune("mask", plain("one"), "--run", finished, "--as", name, cwd=tmp_path)
        assert_one_error(done, said)
    assert sorted(path.name for path in (finished / "arms").iterdir()) == ["risky", "ties"]


# -- GGUF


@pytest.mark.parametrize("arm", [None, "risky"])
def test_gguf_is_refused_with_the_commands_that_make_it(finished: Path, tmp_path: Path, arm: str | None) -> None:
    out, of_arm = tmp_path / "my export", () if arm is None else ("--arm", arm)
    said = refused("export", finished, "--gguf", *of_arm, "--out", out)
    assert not out.exists()
    base = Path(Recipe.load(finished / "recipe.toml").model)
    assert (base / "config.json").is_file()
    steps = re.findall(r"(?:castune|python) [^;]*?(?=, then |\. The whole |$)", said)
    exported, of_adapter, merged, of_model = map(shlex.split, steps)
    assert of_adapter[1:] == [
        "convert_lora_to_gguf.py", "--base", str(base), "--outfile", str(out / "adapter.gguf"), str(out),
    ]  # fmt: skip
    assert of_model[1:] == ["convert_hf_to_gguf.py", "--outfile", str(out / "model.gguf"), str(out)]
    # The commands of castune that it names make what those of llama.cpp take.
    for words, made in ((exported, "adapter_config.json"), (merged, "config.json")):
        done = CliRunner().invoke(app, words[1:])
        assert done.exit_code == 0, done.output
        assert (out / made).is_file()
        shutil.rmtree(out)


def test_gguf_of_an_adapter_whose_base_is_on_the_hub(finished: Path, tmp_path: Path) -> None:
    said = refused("export", finished / "adapter", "--base", "owner/model", "--gguf", "--out", tmp_path / "out")
    assert "convert_lora_to_gguf.py --base-model-id owner/model --outfile" in said


# -- the card


def test_the_card_has_the_numbers_of_the_run(finished: Path, tmp_path: Path) -> None:
    export(finished, tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    tuning = TuneResult.load(finished / "adapter")
    for label, value in (
        ("Zone", "safe"),
        ("Trainable parameters", f"{tuning.budget['trainable_parameters']:,}"),
        ("Query rows", "24"),
        ("rank", "4"),
        ("learning_rate", "0.02"),
        ("seed", str(tuning.settings["seed"])),
        ("Data (D_align)", "align.jsonl (n = 8)"),
        ("Harmful prompts (D_safe)", "safety.jsonl (n = 4)"),
        ("Questions (D_util)", "utility.jsonl (n = 4)"),
        ("Selected query rows that changed", "24 of 24"),
        ("Other rows of the adapted projections, all identical", f"{tuning.certificate.checked_rows}"),
        ("Adapter", tuning.certificate.adapter_hash),
    ):
        assert f"| {label} | {value} |" in card, label
    evaluation = EvalResult.load(finished / "evaluation" / "safe")
    for suite in evaluation.suites:
        line = next(line for line in card.splitlines() if line.startswith(f"| {Path(suite.suite).name} |"))
        assert suite.value is not None
        assert f"{suite.value:.3f} ± {suite.standard_error:.3f} (n = {suite.n})" in line
        assert f"| {suite.judge} | {suite.max_new_tokens or ''} |" in line
    assert "measured on the base model with the adapter in float32" in card
    assert not re.search(r"\b(?:None|nan|not recorded|not measured)\b", card)
    assert str(tmp_path) not in card, "no paths of this machine"
    assert not any(sample["prompt"] in card for sample in evaluation.samples), "no prompts"


def test_what_a_run_does_not_have_is_left_out(finished: Path, tmp_path: Path) -> None:
    shutil.rmtree(finished / "evaluation")
    export(finished, tmp_path / "bare")
    card = (tmp_path / "bare" / "README.md").read_text(encoding="utf-8")
    assert "## Evaluation" not in card
    assert "## Training" in card
    (tmp_path / "bare" / "tune.json").unlink()
    export(tmp_path / "bare", tmp_path / "barer")
    card = (tmp_path / "barer" / "README.md").read_text(encoding="utf-8")
    assert "## Certificate" in card
    assert not re.search(r"## (?:Training|Evaluation|Conflict map)|Zone", card)


def test_an_evaluation_of_another_adapter_is_not_in_the_card(finished: Path, tmp_path: Path) -> None:
    path = finished / "evaluation" / "safe" / "metrics.json"
    record = json.loads(path.read_text())
    del record["digest"]
    record["model"]["adapter"] = "0123-4567"
    path.write_text(json.dumps(record))
    export(finished, tmp_path / "out")
    assert "## Evaluation" not in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")


def test_names_from_outside_stay_in_their_cells() -> None:
    certificate = Certificate("f" * 16, joined([(0, 1)]), "a-b", 24, 30, 8, 8, 0.5)
    name = 'x|y\n# title <script>alert(1)</script> [l](http://x) `c` "q"\n```'
    tuning = TuneResult("adapter", certificate, {}, {"rank": 4}, {"source": name, "n": 2}, (), 1, 2, 3.0, {}, {})
    card = model_card(CardFacts({"name": name}, certificate, tuning=tuning))
    assert "<script" not in card
    assert len(re.findall(r"^# ", card, re.MULTILINE)) == 1
    assert card.count("```") == 2, "one block of code"
    assert "base_model" not in card, "no hub id"
    rows = [line for line in card.splitlines() if line.startswith("| Data (D_align)")]
    assert len(rows) == 1
    assert len(re.findall(r"(?<!\\)\|", rows[0])) == 3
    merged = model_card(CardFacts({"name": "org/Base-1B"}, certificate, merging=Merging("bfloat16", 29, 24)))
    assert 'base_model: "org/Base-1B"' in merged
    assert "29 other tensors and 24 unselected rows" in merged


# -- refusals


def test_a_place_that_is_taken(finished: Path, tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "notes.txt").write_text("mine")
    for command in (
        ["export", finished],
        ["export", finished, "--merged"],
        ["mask", finished / "adapter", "--run", finished],
    ):
        assert_one_error(castune(*command, "--out", tmp_path / "taken", cwd=tmp_path), "taken: exists already", "--out")
    assert files(tmp_path / "taken") == {"notes.txt"}


@pytest.mark.parametrize("options", [[], ["--merged"]])
def test_an_export_that_cannot_be(finished: Path, models: Models, tmp_path: Path, options: list[str]) -> None:
    out = tmp_path / "made" / "out"
    (tmp_path / "empty").mkdir()
    config = finished / "adapter" / "adapter_config.json"

    def fails(source: Path, *said: str, more: tuple[Any, ...] = ()) -> None:
        before = sorted(path for path in tmp_path.rglob("*") if "cache" not in path.parts)
        error = refused("export", source, *options, *more, "--out", out)
        assert all(re.search(pattern, error) for pattern in said), error
        assert sorted(path for path in tmp_path.rglob("*") if "cache" not in path.parts) == before

    fails(tmp_path / "empty", "no recipe.toml")
    fails(finished, "no selection named saef", "safe, risky", more=("--arm", "saef"))
    fails(finished / "adapter", "no arms", more=("--arm", "safe"))
    if options:
        other = models(name="other", seed=1)
        fails(finished, "made for model", more=("--base", other))
        fails(finished / "adapter", "made for model", more=("--base", other))
        fails(finished, "could not load|no such directory|no model config", more=("--base", "/nowhere/at/all"))
    config.write_text(config.read_text() + "\n")
    fails(finished, "is not the one its certificate was made for")
    fails(finished / "adapter", "is not the one its certificate was made for")
    (finished / "adapter" / "certificate.json").unlink()
    fails(finished / "adapter", "has no certificate", "castune mask")


def test_a_write_that_fails_leaves_nothing(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(facts: CardFacts) -> str:
        raise CastuneError("disk full")

    monkeypatch.setattr("castune.steps.export.model_card", broken)
    for merged in (False, True):
        with pytest.raises(CastuneError, match="disk full"):
            export(finished, tmp_path / "made" / "out", merged=merged)
        assert not (tmp_path / "made").exists()


def test_a_mask_that_cannot_be(finished: Path, plain: Callable[..., Path], models: Models, tmp_path: Path) -> None:
    adapter, dora = plain(), plain("dora", use_dora=True)
    run_of, base, other = (
        ["--run", finished],
        ["--base", tmp_path / "model"],
        ["--base", models("llama", name="other", seed=1)],
    )
    for arguments, said in (
        ([adapter], "--run RUN, or use --base MODEL"),
        ([adapter, *run_of, *base], "--run RUN, or use --base MODEL"),
        ([adapter, *base, "--arm", "safe"], "--arm safe needs the run it belongs to"),
        ([adapter, *run_of, "--as", "mine"], "choose one output"),
        ([adapter, *run_of, "--arm", "saef"], "no selection named saef"),
        ([adapter, adapter, *run_of], "linear, ties"),
        ([adapter, adapter, *run_of, "--combination", "ties", "--weights", "1,x"], "--weights 1,x"),
        ([adapter, adapter, *run_of, "--combination", "ties", "--density", "2"], "density is 2"),
        ([tmp_path / "nowhere", *run_of], "no such file"),
        ([dora, *run_of], "use_dora"),
        ([finished / "adapter", *other], "was made for model"),
    ):
        assert said in refused("mask", *arguments, "--out", tmp_path / "made" / "out")
        assert not (tmp_path / "made").exists()
    done = castune("mask", dora, *run_of, "--out", tmp_path / "made" / "out", cwd=tmp_path)
    assert_one_error(done, "use_dora", "DoRA", "accepted: plain LoRA")
    done = castune("export", finished, "--merged", *other, "--out", tmp_path / "made" / "out", cwd=tmp_path)
    assert_one_error(done, "made for model [0-9a-f]{16}")
    assert not (tmp_path / "made").exists()
