"""Bad input on the real command line: exit code 2, one line that says what to do, nothing half-written."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import assert_one_error, castune
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from castune.artifacts import ConflictMap
from castune.config import Recipe
from castune.core.heads import HeadLayout

Models = Callable[..., Path]
RecipeOf = Callable[..., Recipe]


@pytest.fixture
def recipe_file(models: Models, recipe_of: RecipeOf, tmp_path: Path) -> Path:
    path = tmp_path / "recipe.toml"
    path.write_text(recipe_of(models()).to_toml(), encoding="utf-8")
    return path


@pytest.fixture
def fails(recipe_file: Path, tmp_path: Path) -> Callable[..., str]:
    """`castune run` with these settings: one error, and no run directory."""

    def check(*overrides: str, said: tuple[str, ...]) -> str:
        options = [part for override in overrides for part in ("--set", override)]
        line = assert_one_error(castune("run", recipe_file, *options, cwd=tmp_path), *said)
        assert not (tmp_path / "run").exists(), "nothing half-written"
        return line

    return check


# -- data


def test_missing_file(fails: Callable[..., str]) -> None:
    fails("align=/nowhere/data.jsonl", said=(r"/nowhere/data\.jsonl: no such file",))


def test_malformed_jsonl_names_file_and_line(fails: Callable[..., str], tmp_path: Path) -> None:
    path = tmp_path / "broken.jsonl"
    path.write_text('{"prompt": "a", "target": "b"}\n{"prompt": "c", \n')
    fails(f"safety={path}", said=(rf"{re.escape(str(path))} line 2: malformed JSON",))


def test_missing_column_is_named_with_what_was_found(fails: Callable[..., str], tmp_path: Path) -> None:
    path = tmp_path / "columns.jsonl"
    path.write_text('{"question": "a", "choices": ["x", "y"], "answer": 0}\n')
    fails(f"utility={path}", said=(r"columns\.jsonl line 1", "'prompt' is missing", "found: question, choices, answer"))


def test_empty_data(fails: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").touch()
    fails(f"safety={tmp_path / 'empty.jsonl'}", said=(r"empty\.jsonl: no examples",))


def test_harmful_prompts_without_safe_replies(fails: Callable[..., str], tmp_path: Path) -> None:
    path = tmp_path / "bare.jsonl"
    path.write_text('{"prompt": "a"}\n{"prompt": "b"}\n')
    fails(f"safety={path}", said=("no safe reply|no reply", "target"))


def test_alignment_data_without_replies(fails: Callable[..., str], tmp_path: Path) -> None:
    # Found out before the diagnosis, not hours later.
    path = tmp_path / "bare.jsonl"
    path.write_text('{"prompt": "a"}\n{"prompt": "b"}\n')
    fails(f"align={path}", said=("no reply",))


def test_unknown_suite_lists_the_known(fails: Callable[..., str]) -> None:
    fails('evaluate.suites=["xtest"]', said=("xtest", "xstest", "starter-safety-eval"))


def test_unknown_named_source_lists_the_known(fails: Callable[..., str]) -> None:
    fails("utility=mmlux=some/file.jsonl", said=("mmlux", "csqa", "mmlu,"))


# -- recipes


def test_unknown_recipe_key_lists_the_accepted(fails: Callable[..., str]) -> None:
    fails("tune.learning_rat=1e-4", said=("unknown key", "learning_rat", "learning_rate", "weight_decay"))


@pytest.mark.parametrize("fraction", ["0", "1.01", "nan"])
def test_fraction_outside_its_range(fails: Callable[..., str], fraction: str) -> None:
    fails(f"select.fraction={fraction}", said=("fraction",))


def test_malformed_set(fails: Callable[..., str]) -> None:
    fails("tune.rank", said=("--set tune.rank", "key=value"))


def test_malformed_toml_names_the_line(tmp_path: Path) -> None:
    path = tmp_path / "bad.toml"
    path.write_text('out = "run"\nmodel = \n')
    assert_one_error(castune("run", path, cwd=tmp_path), r"bad\.toml: malformed TOML", "line 2")
    assert [item.name for item in tmp_path.iterdir()] == ["bad.toml"]


def test_missing_recipe(tmp_path: Path) -> None:
    assert_one_error(castune("run", "absent.toml", cwd=tmp_path), r"absent\.toml: no such recipe")
    assert not list(tmp_path.iterdir())


# -- models


@pytest.fixture
def mamba(tmp_path: Path, tiny_tokenizer: Any) -> Path:
    config = AutoConfig.for_model(
        "mamba", vocab_size=258, hidden_size=16, state_size=4, num_hidden_layers=2, pad_token_id=0, bos_token_id=256,
        eos_token_id=257,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "mamba")
    tiny_tokenizer.save_pretrained(tmp_path / "mamba")
    return tmp_path / "mamba"


def test_a_model_without_attention_heads(fails: Callable[..., str], mamba: Path) -> None:
    fails(f"model={mamba}", said=("no attention heads", "mamba", "llama, mistral"))


def test_diagnose_of_a_model_without_attention_heads(mamba: Path, own_data: dict[str, Path], tmp_path: Path) -> None:
    options = ["--safety", own_data["safety"], "--utility", own_data["utility"]]
    done = castune("diagnose", mamba, "--out", tmp_path / "run", *options, cwd=tmp_path)
    assert_one_error(done, "no attention heads")
    assert not (tmp_path / "run").exists()


def test_a_directory_that_is_no_model(fails: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    fails(f"model={tmp_path / 'empty'}", said=(r"empty.*config\.json",))


def test_nan_weights(fails: Callable[..., str], models: Models) -> None:
    broken = models(name="broken", change=lambda model: model.model.layers[1].mlp.down_proj.weight.fill_(float("nan")))
    line = fails(f"model={broken}", said=("(?i)nan|finite",))
    assert "Traceback" not in line


# -- run directories


@pytest.fixture
def finished(finished_run: Callable[..., Path]) -> Path:
    """A run without a comparison arm."""
    return finished_run(select__compare=[])


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_run_directory_made_from_another_model(
    finished: Path, models: Models, recipe_of: RecipeOf, tmp_path: Path
) -> None:
    before, old = files(finished), ConflictMap.load(finished).fingerprint
    path = tmp_path / "recipe.toml"
    path.write_text(recipe_of(models(name="other", seed=1), select__compare=[]).to_toml(), encoding="utf-8")
    assert_one_error(
        castune("run", path, cwd=tmp_path), "made with model = ", f"{tmp_path}/model", f"{tmp_path}/other", "--out"
    )
    models(seed=1)  # other weights at the same place
    for command in (["tune", finished, "--data", tmp_path / "align.jsonl"], ["evaluate", finished, "--limit", "2"]):
        assert_one_error(castune(*command, cwd=tmp_path), f"made from model .*{old}", "loaded model is [0-9a-f]{16}")
    assert files(finished) == before


def test_a_loss_that_is_no_number(finished: Path, tmp_path: Path) -> None:
    before = files(finished)
    options = ["--data", tmp_path / "align.jsonl", "--overwrite", "--max-steps", "5", "--learning-rate", "1e30"]
    done = castune("tune", finished, *options, cwd=tmp_path)
    assert_one_error(done, "learning_rate", "not finite|the loss is (nan|inf)")
    assert files(finished) == before, "the adapter that was there is kept, the recipe too"


@pytest.mark.parametrize("fraction", ["0", "1.5", "-1"])
def test_select_with_a_fraction_outside_its_range(finished: Path, tmp_path: Path, fraction: str) -> None:
    before = files(finished)
    done = castune("select", finished, f"--fraction={fraction}", cwd=tmp_path)
    assert_one_error(done, f"fraction is {float(fraction)}", "above 0, at most 1")
    assert files(finished) == before


@pytest.mark.parametrize("command", ["select", "tune", "evaluate", "report"])
def test_a_folder_that_is_no_run(tmp_path: Path, command: str) -> None:
    assert_one_error(castune(command, tmp_path / "nowhere", cwd=tmp_path), "nowhere", "castune diagnose")
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize("command", ["evaluate", "report"])
def test_an_adapter_with_dora(
    finished: Path, models: Models, tiny_model: Callable[..., Any], tmp_path: Path, command: str
) -> None:
    selection = json.loads((finished / "selection.json").read_text())
    layers = sorted({layer for layer, _ in selection["heads"]})
    model = tiny_model("llama")
    names = [HeadLayout.of(model).at(layers[0]).query_name]
    config = LoraConfig(r=4, use_dora=True, target_modules=names, layers_to_transform=layers, task_type="CAUSAL_LM")
    torch.manual_seed(0)
    get_peft_model(model, config).save_pretrained(finished / "adapter")
    before = files(finished)
    done = castune(command, finished, *(["--limit", "2"] if command == "evaluate" else []), cwd=tmp_path)
    assert_one_error(done, "adapter", "(?i)dora|certif|other weights|hash")
    assert files(finished) == before
